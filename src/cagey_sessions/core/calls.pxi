# The calls that are awaited, done in one step if there is nothing to wait for.
#
# What lives here: `SessionCall`, the coroutine that `create`, `open`, `start`, `set_user` and `destroy` return, and
# `ManagerCore`, the base of a manager. What must not: any rule of its own. If there is neither a listener nor a store,
# no end under way and nothing to refuse, a call does in one step what the host's coroutine of the same name would do.
# In all other cases it creates that coroutine and passes on every step to it.
#
# Invariants
#   - Like any coroutine a call does nothing before it is awaited: it may be made into a task, cancelled, or thrown away.
#   - Nothing else runs between the end of a call that is entered and its block, so a session that was made is always
#     ended by the block.
#   - `loud` has a bit for each reason against doing a call in one step, so one comparison asks for all of them.
#
# Cost: O(1). A call without listeners makes no frame, looks up no name and emits no event.

cdef enum:
    LOUD_CREATED = 1            # there are listeners for the event on the manager
    LOUD_STARTED = 2
    LOUD_IDENTIFIED = 4
    LOUD_ENDING = 8
    LOUD_ENDED = 16
    LOUD_CLOSED = 32            # no new session is admitted, or what a call needs is not known yet

LOUD = {
    "created": LOUD_CREATED,
    "started": LOUD_STARTED,
    "identified": LOUD_IDENTIFIED,
    "before_destroy": LOUD_ENDING,
    "destroy": LOUD_ENDED,
}

cdef enum Act:
    ACT_CREATE
    ACT_START
    ACT_SET_USER
    ACT_DESTROY
    ACT_OPEN

cdef enum Stage:
    FRESH
    DELEGATED
    SPENT

NAMES = ("SessionManager.create", "Session.start", "Session.set_user", "Session.destroy", "SessionManager.open")

cdef extern from *:
    """
    /* Cython has no names for these slots. Python 3.11 uses the first, 3.12 and later the second. The third is cheaper
       than a `__dealloc__`, which saves and restores the current exception each time. */
    static destructor cagey_free_call;
    static void cagey_is_coroutine(PyTypeObject* type, sendfunc send, iternextfunc next, destructor dealloc) {
        type->tp_as_async->am_send = send;
        type->tp_iternext = next;
        cagey_free_call = type->tp_dealloc;
        type->tp_dealloc = dealloc;
    }
    #define cagey_method_of(type, method) \
        PyDescr_NewMethod((PyTypeObject*)(type), ((PyMethodDescrObject*)(method))->d_method)
    """
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    ctypedef PySendResult (*sendfunc)(PyObject*, PyObject*, PyObject**) except PYGEN_ERROR
    ctypedef PyObject* (*iternextfunc)(PyObject*) except? NULL
    ctypedef void (*destructor)(PyObject*) noexcept
    destructor free_call "cagey_free_call"
    object method_of "cagey_method_of"(type, object)
    void make_coroutine "cagey_is_coroutine"(type, sendfunc, iternextfunc, destructor)

cdef extern from "Python.h":
    void untrack "PyObject_GC_UnTrack"(PyObject*) noexcept
    int warn "PyErr_WarnFormat"(object, Py_ssize_t, const char*, object) noexcept
    void write_unraisable "PyErr_WriteUnraisable"(object) noexcept
    PySendResult PyIter_Send(object, object, PyObject**) except PYGEN_ERROR


@cython.final
@cython.freelist(16)
cdef class SessionCall:
    """What `SessionManager.create` and `SessionManager.open` return: await it, and it is the session.

    Or enter it: ``async with manager.create() as session:`` is ``async with await manager.create() as session:``, so the
    session ends with the block. Like any coroutine it does nothing before that, it can be made into a task, and it is
    used once.
    """
    cdef object owner           # in the block of an `async with` the session
    cdef object first
    cdef object second
    cdef object delegate        # the coroutine that does the work if it takes more than one step
    cdef Act act
    cdef Stage stage

    def __reduce__(self):
        raise TypeError("a coroutine cannot be copied or pickled")

    def __await__(self):
        return self

    def __next__(self):
        raise NotImplementedError  # the slot is set below

    def __repr__(self):
        return f"<coroutine {NAMES[self.act]!r}>"

    def send(self, value):
        """One step, as of any coroutine."""
        cdef PyObject* result = NULL
        cdef PySendResult how = call_send(<PyObject*> self, <PyObject*> value, &result)
        answer = <object> result
        Py_DECREF(answer)
        if how == PYGEN_NEXT:
            return answer
        raise StopIteration(answer)

    def throw(self, kind, value=None, traceback=None):
        """One step that begins with an exception, as of any coroutine."""
        if self.stage == DELEGATED:
            return self.delegate.throw(kind if value is None else value)
        require_fresh(self)
        spend(self)
        if value is not None and not isinstance(value, BaseException):
            value = kind(value)
        raise kind if value is None else value

    def close(self):
        """Give it up, as any coroutine."""
        if self.stage == DELEGATED:
            self.delegate.close()
        elif self.stage == FRESH:
            spend(self)

    @classmethod
    def __class_getitem__(cls, session_type):
        return GenericAlias(cls, session_type)

    async def __aenter__(self):
        """Make the session and enter it: see `Session.__aenter__`."""
        if self.act != ACT_CREATE and self.act != ACT_OPEN:
            raise TypeError(f"{NAMES[self.act]} makes no session that could be entered: await it")
        session = await self
        # It waits for nothing, so no cancellation can come in between and leave a session without a block.
        entered = await session.__aenter__()
        self.owner = session
        return entered

    def __aexit__(self, kind, error, traceback):
        """Leave the session: see `Session.__aexit__`."""
        if self.stage == FRESH or self.owner is None:
            raise RuntimeError("this call has not been entered, or has been left")
        session, self.owner = self.owner, None
        return session.__aexit__(kind, error, traceback)


cdef inline int require_fresh(SessionCall call) except -1:
    if call.stage != FRESH or call.owner is None:
        raise RuntimeError("cannot reuse already awaited coroutine")
    return 0


cdef inline int spend(SessionCall call) except -1:
    """Drop everything that the call holds, as the frame of a coroutine that has ended does."""
    call.stage = SPENT
    call.owner = call.first = call.second = None
    return 0


cdef SessionCall new_call(Act act, owner, first, second):
    cdef SessionCall call = SessionCall.__new__(SessionCall)
    call.act = act
    call.owner = owner
    call.first = first
    call.second = second
    return call


cdef PySendResult call_send(PyObject* self, PyObject* value, PyObject** result) except PYGEN_ERROR:
    """One step: the result, or what the event loop is to wait for."""
    cdef SessionCall call = <SessionCall> self
    cdef PySendResult how
    if call.stage == DELEGATED:
        return PyIter_Send(call.delegate, <object> value, result)
    require_fresh(call)
    if not is_none(value):
        raise TypeError("can't send non-None value to a just-started coroutine")
    call.stage = SPENT
    try:
        answer = call_act(call)
    except:
        spend(call)
        raise
    spend(call)
    if answer is call:
        call.stage = DELEGATED
        return PyIter_Send(call.delegate, None, result)
    Py_INCREF(answer)
    result[0] = <PyObject*> answer
    return PYGEN_RETURN


cdef PyObject* call_next(PyObject* self) except? NULL:
    cdef PyObject* result = NULL
    cdef PySendResult how = call_send(self, <PyObject*> None, &result)
    if how == PYGEN_NEXT:
        return result
    answer = <object> result
    Py_DECREF(answer)
    if answer is not None:  # NULL without an exception means that the coroutine returned None
        PyErr_SetObject(StopIteration, StopIteration(answer))
    return NULL


cdef void call_dealloc(PyObject* self) noexcept:
    if (<SessionCall> self).stage == FRESH and not is_none(<PyObject*> (<SessionCall> self).owner):
        # It is being freed, and a warning may run any code, also the garbage collector, which must not find it.
        untrack(self)
        warn_of_unawaited((<SessionCall> self).act)
    free_call(self)


cdef void warn_of_unawaited(Act act) noexcept:
    cdef PyObject* kind
    cdef PyObject* value
    cdef PyObject* traceback
    PyErr_Fetch(&kind, &value, &traceback)
    if warn(RuntimeWarning, 1, "coroutine %R was never awaited", NAMES[act]) < 0:
        write_unraisable(NAMES[act])  # a filter turns warnings into errors, and there is no caller to raise it to
    PyErr_Restore(kind, value, traceback)


make_coroutine(SessionCall, call_send, call_next, call_dealloc)


cdef object call_act(SessionCall call):
    """Do the call in one step and return its result, or make the host's coroutine and return the call itself."""
    cdef Act act = call.act
    cdef SessionCore session
    cdef SessionTable table
    if act == ACT_CREATE:
        table = (<ManagerCore> call.owner).table
        if (not table.loud & (LOUD_CREATED | LOUD_CLOSED) and call.second is False
                and table.is_on_its_loop()):
            return table.add(call.first)
        call.delegate = table.host._beginnings.create(call.first, call.second)
        return call
    if act == ACT_OPEN:
        call.delegate = (<ManagerCore> call.owner).table.host._logins.open(*call.first)
        return call
    session = <SessionCore> call.owner
    table = session.table
    if act == ACT_START:
        if is_quiet(session, LOUD_STARTED) and session.slot and not is_ending(table.rows[session.slot].state):
            return None
        call.delegate = table.host._beginnings.start(session)
    elif act == ACT_SET_USER:
        if (is_quiet(session, LOUD_IDENTIFIED | LOUD_CLOSED) and table.copies is NULL
                and session.slot and not is_ending(table.rows[session.slot].state)):
            set_user(table, session, call.first, call.second)
            return None
        call.delegate = table.host._beginnings.set_user(session, call.first, call.second)
    else:
        if is_quiet(session, LOUD_ENDING | LOUD_ENDED) and end(table, session, call.first):
            return None
        call.delegate = table.host._endings.end(session, call.first)
    return call


cdef inline bint is_quiet(SessionCore session, uint32_t loud) except -1:
    """Whether no listener would be called, and no bit of `loud` prevents doing the call in one step."""
    cdef SessionTable table = session.table
    return not table.loud & loud and (session.listeners is None or session.ended) \
        and table.is_on_its_loop()


cdef int set_user(SessionTable table, SessionCore session, user_id, user_data) except -1:
    require_user_id(user_id, table.user_id_type)
    cdef uint64_t now = <uint64_t> table.now() // table.tick
    cdef uint64_t next_deadline = wheel_next(&table.wheel)
    table.give_user(session, user_id, user_data, now, table.interval)
    if wheel_next(&table.wheel) != next_deadline:
        table.arm()
    return 0


cdef inline int prefetch_surroundings(SessionTable table, SessionCore session) except -1:
    """Prefetch all memory that ending a session writes to.

    A session that ends has mostly been idle for long, so none of it is in a cache. One after the other these cache
    misses would be most of the cost of an end.
    """
    cdef Row* row = &table.rows[session.slot]
    prefetch(item_at(table.sessions, session.slot))
    prefetch(&table.rows[row.next])
    prefetch(&table.rows[row.prev])
    prefetch(&table.rows[row.newer])
    prefetch(&table.rows[row.older])
    prefetch(neighbour(<PyObject*> session, 0))
    prefetch(neighbour(<PyObject*> session, 1))
    if session.user_id is not None:
        prefetch(&table.by_user.entries[table.hash_of_user(session.user_id) & table.by_user.mask])
    if session.key is not None:
        prefetch(&table.by_key.entries[table.hash_of_key(session.key) & table.by_key.mask])
    return 0


cdef bint end(SessionTable table, SessionCore session, persist) except -1:
    """End a session in one step if no save of it is under way or wanted; returns whether it has ended."""
    if session.ended:
        return True
    if persist is not None and persist is not False:  # also what is neither, and is to be refused
        return False
    if session.user_id is not None and table.copies is not NULL:
        return False
    if session.slot == 0 or table.rows[session.slot].state > DUE:
        return False
    if table.waited_for is None:
        return False
    prefetch_surroundings(table, session)
    if table.waited_for and session in table.waited_for:
        return False
    table.end_at_once(session)
    finish(session, table.destroyed)
    return True


def direct(cls):
    """Give a subclass the methods of its compiled base as its own.

    The interpreter calls a C method directly only if the object is of exactly the class that the method belongs to.
    """
    for base in (ManagerCore, SessionCore):
        if issubclass(cls, base):
            for name, method in vars(base).items():
                if type(method) is type(str.join) and name not in vars(cls):
                    setattr(cls, name, method_of(cls, method))
    return cls


cdef class ManagerCore:
    """The compiled base of a manager: its table, and the calls that are made for every user."""
    cdef SessionTable table
    cdef object __weakref__

    def __reduce__(self):
        raise TypeError("a manager is the sessions of one server: it cannot be copied or pickled")

    def _attend(self, SessionTable table not None):
        self.table = table

    cdef inline SessionTable require_table(self):
        if self.table is None:
            raise UsageError("this manager was never initialised")
        return self.table

    def create(self, key=None, *, replace=False):
        """create(self, key: str | None = None, *, replace: bool = False) -> SessionCall[Session[T]]

        `key` is a non-empty `str`, such as a cookie, by which `find_by_key` finds the session. If a live session has the
        key already, the call raises `KeyTakenError`; with `replace` it saves and ends that session first. If that one
        cannot be saved it stays live, and the call raises what its `destroy` raises.
        Make a session without a user, emit ``created``, and return the session. ``await`` the call, or enter it, so
        that the session ends with the block: ``async with manager.create() as session: ...``.

        `key` is a non-empty `str`, such as a cookie, by which `find_by_key` finds the session. If a live session has
        the key already, the call raises `KeyTakenError`; with `replace` it saves and ends that session first. If that
        one cannot be saved it stays live, and the call raises what its `destroy` raises.
        `key` is a non-empty `str`, such as a cookie, by which `find_by_key` finds the session. If a live session has
        the key already, the call raises `KeyTakenError`; with `replace` it saves and ends that session first. If that
        one cannot be saved it stays live, and the call raises what its `destroy` raises.

        If a ``created`` listener raises, the session is ended, and the call raises `ListenerError`. Raises
        `InvalidKeyError`, `OptionError`, `ManagerClosedError`. O(1) amortised.
        """
        self.require_table()
        return new_call(ACT_CREATE, self, key, replace)

    def _open(self, user_id, default, when_active):
        """The call of `SessionManager.open`."""
        self.require_table()
        return new_call(ACT_OPEN, self, (user_id, default, when_active), None)

    def find_by_key(self, key):
        """find_by_key(self, key: str) -> Session[T] | None

        Return the live session with a key, or None. Raises `InvalidKeyError` if the key is not a `str`. O(1).
        """
        return self.require_table().with_key(key)
