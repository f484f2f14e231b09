# The compiled base of every session object.
#
# What lives here: `SessionCore`, and the checks of keys and user ids. What must not: rows, lists, deadlines - a session
# knows its slot, and leaves the rest to the table.
#
# Invariants
#   - `slot` is 0 once the session is forgotten; until it has ended, data and bag can still be read.
#   - A session takes 96 bytes, including 16 of the garbage collector. It has no `cdef` methods, because a pointer to a
#     table of these would make it 112.
#   - No dict is made in advance: the bag is made at the first `set`, the listeners at the first `on`.
#
# Cost: everything here is O(1).

cdef enum:
    MAX_USER_ID_BYTES = 1024


cdef int require_key(key) except -1:
    if type(key) is not str:
        raise InvalidKeyError(f"a key is a non-empty str, not {kind_name(key)}")
    if length_of(<PyObject*> key) == 0:
        raise InvalidKeyError("a key is a non-empty str, and this one is empty; leave it out for a session without a key")
    return 0


def check_key(key):
    """Raise `InvalidKeyError` unless the key is a non-empty `str`; no subclass, which could compare differently."""
    require_key(key)


cdef int require_user_id(user_id, required=None) except -1:
    kind = type(user_id)
    if kind is not int and kind is not str:
        raise InvalidUserIdError(f"a user id is an int or a str, not {kind_name(user_id)}")
    if required is not None and kind is not required:
        raise InvalidUserIdError(f"this manager takes user ids of type {required.__name__}, not {kind.__name__}")
    if kind is int:
        if not -0x8000000000000000 <= user_id <= 0x7FFFFFFFFFFFFFFF:
            raise InvalidUserIdError("a user id that is an int has to fit into 64 signed bits")
        return 0
    if not user_id:
        raise InvalidUserIdError("a user id that is a str must not be empty")
    try:
        size = len(user_id.encode())
    except UnicodeEncodeError:
        raise InvalidUserIdError(
            f"a user id must be valid text; this one holds a lone surrogate: {quote(user_id)}") from None
    if size > MAX_USER_ID_BYTES:
        raise InvalidUserIdError(
            f"a user id that is a str takes at most {MAX_USER_ID_BYTES} bytes of UTF-8; this one takes {size}")
    if "\0" in user_id:
        raise InvalidUserIdError(f"a user id must not hold a NUL character: {quote(user_id)}")
    return 0


def check_user_id(user_id, required=None):
    """Raise `InvalidUserIdError` unless the id is an `int` of 64 bits or a `str` of 1 to 1,024 bytes of UTF-8.

    `required` narrows it to ``int`` or ``str``. O(length).
    """
    require_user_id(user_id, required)


cdef class SessionTable


cdef class SessionCore:
    """The compiled base of a session: its slot in the table, its key and user, its data and its bag.

    Made by `SessionTable.create`, never by hand.
    """
    cdef SessionTable table
    cdef uint32_t slot              # 0 once forgotten
    cdef bint ended
    cdef readonly object key
    cdef readonly object user_id
    cdef object data
    cdef object bag
    cdef object listeners           # once the session has ended, the reason instead
    cdef object __weakref__

    def __init__(self):
        raise UsageError("sessions are made by `await manager.create()`")

    def __reduce__(self):
        raise TypeError("a session is one human on this server: it cannot be copied or pickled; copy its user_data")

    def __repr__(self):
        if self.table is None:
            return f"<{type(self).__name__} of no manager>"
        who = "anonymous" if self.user_id is None else f"user {quote(self.user_id)}"
        if self.ended:
            life = f"ended: {self.end_reason}"
        else:
            life = "live" if self.slot and not is_ending(self.table.rows[self.slot].state) else "ending"
        return f"<{type(self).__name__} {who}, {life}>"

    @property
    def alive(self):
        """Whether the session has not ended. True until the last ``destroy`` listener has run."""
        return self.table is not None and not self.ended

    @property
    def user_data(self):
        """The user's data: what `login` loaded, or the object that was given to `set_user`.

        Change it in place, or assign another object. Raises `NotIdentifiedError` before the session has a user, and
        `SessionEndedError` after its end. An assignment in a ``destroy`` listener raises that, too: it comes after the
        last save, and would be lost.
        """
        table_of(self)
        if self.user_id is None:
            raise_anonymous()
        return self.data

    @user_data.setter
    def user_data(self, value):
        table_of(self)
        if self.user_id is None:
            raise_anonymous()
        if value is None:
            raise InvalidUserDataError("user_data must not be None: there would be nothing to save")
        if not self.slot:
            raise SessionEndedError(f"the session is past its last save: nothing would save this ({self!r})")
        self.data = value
        self.table.rows[self.slot].marks |= MARKED

    def start(self):
        """async start(self) -> None

        Emit ``started`` on the manager and on the session; a program calls it when it begins to talk to this user.

        Raises `ListenerError` with what the listeners raised, and `SessionEndedError`.
        """
        cdef SessionTable table = require_made(self)
        if table.loud & LOUD_STARTED or (self.listeners is not None and not self.ended):
            return table.host._beginnings.start(self)
        return new_call(ACT_START, self, None, None)

    def set_user(self, user_id, user_data):
        """async set_user(self, user_id: int | str, user_data: T) -> None

        Give the session its user, with data that the program has loaded itself; only without a store. Emits
        ``identified``.

        `user_data` is kept as it is: change it in place. Load it *after* the user's last session has ended; otherwise
        that session's last save would be overwritten by older data. For this reason a user who has a session, live or
        ending, is refused.

        Raises `InvalidUserIdError`, `InvalidUserDataError`, `AlreadyIdentifiedError`, `UserActiveError` (wait for the
        end of its ``session``), `SessionEndedError` or `ManagerClosedError` before anything changes. Raises
        `ListenerError` with what the listeners raised; the user stays set then. O(1).
        """
        cdef SessionTable table = require_made(self)
        if table.loud & LOUD_IDENTIFIED or table.copies is not NULL or (self.listeners is not None and not self.ended):
            return table.host._beginnings.set_user(self, user_id, user_data)
        return new_call(ACT_SET_USER, self, user_id, user_data)

    def destroy(self, persist=None):
        """async destroy(self, persist: bool | None = None) -> None

        End the session: emit ``before_destroy``, make the last save, emit ``destroy``.

        `persist` says whether there is a last save; by default there is one with a store. The session is hidden from
        `find_by_key` at once. Its user stays taken until the last save is acknowledged; the save is repeated if the
        data changed meanwhile (but not without a store if the data is not JSON, as such changes cannot be detected).

        Later calls join the first one. One that asks for a save gets it if the end has not gone past the last save;
        ``persist=False`` has no effect if an earlier call asked for a save, unless that has failed. After the end the
        call does nothing. Inside a listener that this end waits for, or in a task that such a listener has started, it
        returns at once, because it would wait for itself. Cancelling the call stops the waiting, not the end.

        If the last save fails, the call raises what it raised: `StoreUnavailableError` with a store, after
        `save_timeout`; `ListenerError` without. The session then stays hidden, keeps its user, and is tried again until
        it is saved: call once more to try at once, or with ``persist=False`` to give up its unsaved data.

        Raises `UnsavableError` before anything changes if the data cannot be saved as it is, `OptionError`,
        `NothingSavesError` if there is neither a store nor a listener that saves, and `SessionEndedError` if a save is
        asked for too late. Raises `ListenerError` with what the listeners of the two events raised; the session has
        ended all the same. Raises `FencedError` or `UserErasedError` if the session has lost its user meanwhile, and
        has ended unsaved.
        """
        cdef SessionTable table = require_made(self)
        if table.loud & (LOUD_ENDING | LOUD_ENDED) or (self.listeners is not None and not self.ended):
            return table.host._endings.end(self, persist)
        prefetch(&table.rows[self.slot])
        prefetch(<PyObject*> self.key)
        prefetch(<PyObject*> self.user_id)
        return new_call(ACT_DESTROY, self, persist, None)

    def mark_changed(self):
        """mark_changed(self) -> None

        Say that `user_data` has changed. Needed with ``tracking="marked"``, harmless otherwise.

        The mark stays until a save is acknowledged whose bytes were encoded after it. Raises `NotIdentifiedError`, and
        `SessionEndedError` once the last save is done. O(1).
        """
        cdef SessionTable table = table_of(self)
        if self.user_id is None:
            raise NotIdentifiedError("this session has no user yet, and nothing that could have changed")
        table.rows[table.slot_of(self)].marks |= MARKED

    def set(self, key, value):
        """set(self, key: str, value: object) -> None

        Keep any object under a name, such as a socket, for as long as the session lives. It is never saved.

        Raises `InvalidKeyError`, and `SessionEndedError` after the end. O(1).
        """
        table_of(self)
        require_name(key)
        if self.bag is None:
            self.bag = {}
        (<dict> self.bag)[key] = value

    def get(self, key, default=None):
        """get(self, key: str, default: Any = None) -> Any

        Return the object kept under a name, or `default`. Also works after the end.

        Raises `InvalidKeyError`. O(1).
        """
        require_made(self).check_thread()
        require_name(key)
        if self.bag is None:
            return default
        return (<dict> self.bag).get(key, default)

    @property
    def end_reason(self):
        """Why the session has ended, or is ending; None while it is live.

        It is set before the first listener of the end runs, and may change until the last one has run: to ``"unsaved"``
        if the last save turns out to be impossible, or to ``"fenced"`` if another server takes the user over meanwhile.
        """
        if self.ended:
            return self.listeners
        if self.table is None or self.table.ending is None:
            return None
        ending = self.table.ending.get(self)
        return None if ending is None else ending.reason

    @property
    def _listeners(self):
        return None if self.ended else self.listeners

    @_listeners.setter
    def _listeners(self, listeners):
        if self.ended:
            raise_ended(self)
        self.listeners = listeners

    @property
    def _host(self):
        """The manager that the table belongs to."""
        if self.table is None:
            raise_handmade()
        return self.table.host

    def _require_alive(self):
        """Raise `SessionEndedError` after the end, and `WrongLoopError` in the wrong thread."""
        table_of(self)

    def _end(self, reason):
        """Drop the data and the listeners; from now on every use of the session raises."""
        finish(self, reason)


cdef inline int require_name(key) except -1:
    if type(key) is not str:
        raise InvalidKeyError(f"a name in the bag is a str, not {kind_name(key)}")
    return 0


cdef inline int finish(SessionCore session, reason) except -1:
    session.ended = True
    session.listeners = reason
    session.data = None  # last: freeing the data may run code that uses the session
    return 0


cdef inline SessionTable require_made(SessionCore session):
    if session.table is None:
        raise_handmade()
    return session.table


cdef int raise_anonymous() except -1:
    raise NotIdentifiedError(
        "this session has no user yet; `await session.login(user_id)` comes first, or without a store `set_user`")


cdef int raise_handmade() except -1:
    raise UsageError("this session belongs to no manager; sessions are made by `await manager.create()`")


cdef int raise_ended(SessionCore session) except -1:
    who = "" if session.user_id is None else f" of user {quote(session.user_id)}"
    raise SessionEndedError(f"the session{who} has ended ({session.end_reason})")


cdef inline SessionTable table_of(SessionCore session):
    """The table of a session; raises if the session has ended, or this is the wrong thread."""
    if session.table is None:
        raise_handmade()
    if session.ended:
        raise_ended(session)
    session.table.check_thread()
    return session.table
