# The table of all sessions: by key and by user, from `create` to `forget`.
#
# What lives here: `SessionTable` - the two indexes, and the beginning and the end of a session. What must not:
# coroutines, events, retry delays - the caller gives the deadlines of retries; the others are chosen in rows.pxi.
#
# Invariants
#   - A key is in the index while its session is live and not ending; a user until the row is forgotten. An entry is
#     removed only if it is this very session.
#
# Cost: every operation is O(1) amortised.

cdef inline PyObject* key_of(PyObject* session) noexcept:
    """The key of a session, borrowed."""
    return <PyObject*> (<SessionCore> session).key


cdef inline int put_item(list items, uint32_t at, item) except -1:
    cdef object before = <object> PyList_GET_ITEM(items, at)
    Py_INCREF(item)
    PyList_SET_ITEM(items, at, item)
    Py_DECREF(before)  # the list's reference; ours is dropped at the end, when everything is consistent again
    return 0


@cython.final
@cython.no_gc_clear
cdef class SessionTable(SessionLanes):
    """All sessions of one server: rows in one C array, found by key, by user, by deadline and by age.

    `session_type` is the subclass of `SessionCore` to make; `host` is what sessions have as ``_host``; `seed` says
    where in the interval the places begin. With `stored` a version stands for certain bytes, which `fix` decides;
    without, every save that is taken is a new version. Not thread-safe: after `bind_thread` any other thread is
    refused.
    """
    cdef Index by_key
    cdef Index by_user
    cdef uint64_t salt          # of the hashes in the indexes
    cdef uint32_t loud          # the reasons against doing a call in one step: see calls.pxi
    cdef object loop
    cdef object running         # the hook that the loop has set in the thread while it runs, or None
    cdef object now             # nanoseconds, as a function
    cdef uint64_t tick          # nanoseconds
    cdef uint64_t interval      # ticks, or 0
    cdef object arm             # a function for when the next deadline may have become an earlier one
    cdef dict ending            # sessions whose end is under way, each with what has its `reason`
    cdef dict waited_for        # sessions whose end a caller waits for
    cdef object destroyed       # the reason of an ordinary end
    cdef object user_id_type

    def __cinit__(self, type session_type not None, host, *, uint64_t seed=0, bint stored=False):
        index_init(&self.by_key)
        index_init(&self.by_user)
        self.salt = mixed(seed)
        self.loud = LOUD_CLOSED

    def __dealloc__(self):
        PyMem_RawFree(self.by_key.entries)
        PyMem_RawFree(self.by_user.entries)

    cdef inline uint32_t hash_of_key(self, key) noexcept:
        return <uint32_t> (mixed(<uint64_t> hash_of_str(key) ^ self.salt) >> 32)

    cdef inline uint32_t hash_of_user(self, user_id) except? 0:
        return <uint32_t> (mixed(<uint64_t> hash(user_id) ^ self.salt) >> 32)

    cdef inline SessionCore session_at(self, uint32_t slot):
        return <SessionCore> PyList_GET_ITEM(self.sessions, slot)

    cdef inline uint32_t key_slot_hashed(self, PyObject* key, uint32_t hash) noexcept:
        """The slot of the session under a key, or 0. The key is exactly a str."""
        cdef Entry* entry
        cdef PyObject* found
        cdef uint64_t at = hash & self.by_key.mask
        while True:
            entry = &self.by_key.entries[at]
            if entry.slot == 0:
                return 0
            if entry.hash == hash:
                found = key_of(PyList_GET_ITEM(self.sessions, entry.slot))
                if found is key or compare_text(found, key) == 0:
                    return entry.slot
            at = (at + 1) & self.by_key.mask

    cdef uint32_t key_slot(self, key) noexcept:
        return self.key_slot_hashed(<PyObject*> key, self.hash_of_key(key))

    cdef uint32_t user_slot_hashed(self, user_id, uint32_t hash) except? 0:
        """The slot of the session that has a user, or 0. The id is exactly an int or a str: comparing runs no code."""
        cdef Entry* entry
        cdef uint64_t at = hash & self.by_user.mask
        while True:
            entry = &self.by_user.entries[at]
            if entry.slot == 0:
                return 0
            if entry.hash == hash and self.session_at(entry.slot).user_id == user_id:
                return entry.slot
            at = (at + 1) & self.by_user.mask

    cdef uint32_t user_slot(self, user_id) except? 0:
        if type(user_id) is not int and type(user_id) is not str:
            return 0
        return self.user_slot_hashed(user_id, self.hash_of_user(user_id))

    def keep_time(self, *, now, uint64_t tick, uint64_t interval, arm, user_id_type=None):
        """Say what a call needs that gives a session its user in one step: see `SessionCall`.

        `now` returns nanoseconds, `tick` has so many of them, `interval` so many ticks; `arm` is called when a deadline
        may have become the next one. User ids are of `user_id_type`, if one is given.
        """
        self.now = now
        self.tick = tick
        self.interval = interval
        self.arm = arm
        self.user_id_type = user_id_type

    def attend_ends(self, *, dict ending not None, dict waited_for not None, destroyed):
        """Say what a call needs that ends a session in one step, and admit sessions.

        `ending` has the sessions whose end is under way, each with an object that has its ``reason``; `waited_for` has
        those whose end a caller waits for; `destroyed` is the reason of an ordinary end.
        """
        self.ending = ending
        self.waited_for = waited_for
        self.destroyed = destroyed
        self.admit(True)

    def hear(self, str event not None, bint heard):
        """Set whether there are listeners for an event on the manager."""
        cdef uint32_t bit = LOUD.get(event, 0)
        self.loud = self.loud | bit if heard else self.loud & ~bit

    def admit(self, bint admits):
        """Set whether new sessions and users are admitted."""
        self.loud = self.loud & ~<uint32_t> LOUD_CLOSED if admits else self.loud | LOUD_CLOSED

    def reseed(self, uint64_t seed):
        """Spread deadlines, and hash keys, by another seed. Raises `UsageError` once there is a session."""
        if self.counters.created:
            raise UsageError("a table that has sessions keeps its seed")
        self.phase = mixed(seed)
        self.salt = mixed(seed)

    def bind_loop(self, loop):
        """Allow calls in one step only while this event loop runs in this thread."""
        self.loop = loop
        self.running = None

    cdef inline bint is_on_its_loop(self) except -1:
        """Whether the bound loop runs in this thread; False if that cannot be told cheaply, and the host has to."""
        if running_hook() is <PyObject*> self.running and self.forked == fork_epoch:
            return True
        return self.sees_its_loop()

    cdef bint sees_its_loop(self) except -1:
        # A loop sets its own hook for asynchronous generators in the thread while it runs, a new one for each run.
        # Asking asyncio for the running loop costs as much as all the rest of a call: it reads the process id each
        # time.
        cdef PyObject* hook = running_hook()
        if self.loop is None or hook is NULL or self.forked != fork_epoch:
            return False
        if getattr(<object> hook, "__self__", None) is not self.loop:
            return False
        self.running = <object> hook
        return True

    def create(self, key=None):
        """Make a session, under a key if one is given. Raises `InvalidKeyError`, `KeyTakenError`. O(1) amortised."""
        self.check_thread()
        return self.add(key)

    cdef SessionCore add(self, key):
        if key is not None:
            require_key(key)
        cdef uint32_t hash = 0
        if key is not None:
            hash = self.hash_of_key(key)
            prefetch(&self.by_key.entries[hash & self.by_key.mask])
        # Before the key is looked up: making an object may run any code, even calls that take the same key.
        made = new_object(self.session_type, ())
        if type(made) is not self.session_type and not isinstance(made, SessionCore):
            raise TypeError(f"a session type makes sessions, not {type(made).__name__}")
        cdef SessionCore session = <SessionCore> made
        if session.table is not None:
            raise TypeError("a session type makes a new session each time")
        if key is not None:
            if self.key_slot_hashed(<PyObject*> key, hash):
                raise KeyTakenError("another live session has this key; end it first, or create with replace=True")
            index_reserve(&self.by_key)
        cdef uint32_t slot = self.allocate()
        if key is not None:
            index_put(&self.by_key, hash, slot)
        session.table = self
        session.slot = slot
        session.key = key
        put_item(self.sessions, slot, session)
        cdef Row* row = &self.rows[slot]
        row.state = NONE
        row.failures = row.marks = row.flags = 0
        row.version = row.acknowledged = row.saved_at = 0
        if self.copies is not NULL:
            memset(&self.copies[slot], 0, sizeof(Copy))
        self.age_append(ANONYMOUS, slot)
        self.counters.created += 1
        if CAGEY_DEBUG:
            check_table(self)
        return session

    def find_by_key(self, key):
        """The live session under a key, or None. Raises `InvalidKeyError` for what is not a `str`. O(1)."""
        return self.with_key(key)

    cdef inline object with_key(self, key):
        self.check_thread()
        if type(key) is not str:
            require_key(key)
        cdef uint32_t slot = self.key_slot_hashed(<PyObject*> key, self.hash_of_key(key))
        return self.session_at(slot) if slot else None

    def find_by_user(self, user_id):
        """The live session of a user; None if there is none, or it is ending. Raises `InvalidUserIdError`. O(1)."""
        self.check_thread()
        require_user_id(user_id)
        cdef uint32_t slot = self.user_slot(user_id)
        if slot == 0 or is_ending(self.rows[slot].state) or self.rows[slot].flags & FLAG_SILENT:
            return None
        return self.session_at(slot)

    def active_session(self, user_id):
        """The session that has a user, even while it is ending, or None. O(1)."""
        cdef uint32_t slot = self.user_slot(user_id)
        return self.session_at(slot) if slot else None

    def sessions_now(self):
        """A list of all sessions that were not forgotten, except for silent ones. O(capacity)."""
        self.check_thread()
        return [session for session in self.sessions if session is not None and not self.is_silent(session)]

    def state(self, SessionCore session not None):
        """The state of a session's save, as a name from `SAVE_STATES`. O(1)."""
        self.refuse_stranger(session)
        if session.slot == 0:
            return "gone"
        return SAVE_STATES[self.rows[session.slot].state]

    def failures(self, SessionCore session not None):
        """How many saves have failed since one was acknowledged, at most 255. O(1)."""
        return self.rows[self.slot_of(session)].failures

    def versions(self, SessionCore session not None):
        """The version last taken and the version last acknowledged. O(1)."""
        cdef Row* row = &self.rows[self.slot_of(session)]
        return row.version, row.acknowledged

    def saved_at(self, SessionCore session not None):
        """The tick at which the state last acknowledged was encoded; before the first, when the user was set. O(1)."""
        return self.rows[self.slot_of(session)].saved_at

    def is_ending(self, SessionCore session not None):
        """Whether a session is being ended, or has been forgotten. O(1)."""
        self.refuse_stranger(session)
        return session.slot == 0 or is_ending(self.rows[session.slot].state)

    def lose(self, SessionCore session not None):
        """Note that a session has lost its user; see `is_lost`. O(1)."""
        self.rows[self.slot_of(session)].flags |= FLAG_LOST

    def is_lost(self, SessionCore session not None):
        """Whether no save of a session may be written any more: it has lost its user, or was forgotten. O(1)."""
        self.refuse_stranger(session)
        return session.slot == 0 or (self.rows[session.slot].flags & FLAG_LOST) != 0

    def set_final(self, SessionCore session not None, bint final):
        """Set whether the next save of an ending session is its last one, which releases the user. O(1)."""
        cdef Row* row = &self.rows[self.slot_of(session)]
        if final and not is_ending(row.state):
            raise UsageError("only a session that is being ended has a last save")
        row.flags = row.flags | FLAG_FINAL if final else row.flags & ~FLAG_FINAL

    def set_released(self, SessionCore session not None, bint released):
        """Set whether the save last written has released the user in the store. O(1)."""
        cdef Row* row = &self.rows[self.slot_of(session)]
        row.flags = row.flags | FLAG_RELEASED if released else row.flags & ~FLAG_RELEASED

    def is_released(self, SessionCore session not None):
        """Whether the save last acknowledged has released the user in the store, or the session was forgotten. O(1)."""
        self.refuse_stranger(session)
        return session.slot == 0 or (self.rows[session.slot].flags & FLAG_RELEASED) != 0

    def is_final(self, SessionCore session not None):
        """Whether the next save of a session is its last one, which releases the user. O(1)."""
        self.refuse_stranger(session)
        return session.slot != 0 and (self.rows[session.slot].flags & FLAG_FINAL) != 0

    def identify(self, SessionCore session not None, user_id, user_data, uint64_t now, uint64_t interval=0):
        """Give a session its user; with an interval in ticks it is due for the first time at its place in that.

        Raises `AlreadyIdentifiedError`, `UserActiveError`, `InvalidUserDataError` or `SessionEndedError` before
        anything changes. The id must have passed `check_user_id`. O(1) amortised.
        """
        self.give_user(session, user_id, user_data, now, interval)

    cdef int give_user(self, SessionCore session, user_id, user_data, uint64_t now, uint64_t interval) except -1:
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        if is_ending(row.state):
            raise SessionEndedError("the session is ending: it cannot get a user any more")
        if row.state != NONE:
            raise AlreadyIdentifiedError(f"this session is user {quote(session.user_id)} already; make another session")
        if user_data is None:
            raise InvalidUserDataError("user_data must not be None: a user without data would be saved as nothing")
        if type(user_id) is not int:
            require_user_id(user_id)
        cdef uint32_t hash = self.hash_of_user(user_id)
        cdef uint32_t active = self.user_slot_hashed(user_id, hash)
        if active:
            raise UserActiveError(
                f"user {quote(user_id)} has a session that is {'ending' if is_ending(self.rows[active].state) else 'live'}: "
                "end it and wait for its end, then load the data again", session=self.session_at(active))
        require_time(now, interval)
        index_reserve(&self.by_user)
        index_put(&self.by_user, hash, slot)
        session.user_id = user_id
        session.data = user_data
        step(row, IDENTIFY)
        row.saved_at = now
        self.age_remove(slot)
        self.age_append(self.age_list_of(slot), slot)
        self.counters.identified += not row.flags & FLAG_SILENT
        row.deadline = 0
        if interval:
            wheel_arm(&self.wheel, self.rows, slot, now + self.ticks_to_place(slot, now, interval))
        if CAGEY_DEBUG:
            check_table(self)
        return 0

    def hold(self, user_id, user_data):
        """Make a silent session of a user, to be written once, when it ends.

        It is not due by the clock, `find_by_user`, `sessions_now` and walks do not meet it, and of the counters only
        `silent` has it. Raises what `identify` raises. O(1) amortised.
        """
        self.check_thread()
        cdef SessionCore session = self.add(None)
        cdef uint32_t slot = session.slot
        self.counters.created -= 1
        self.counters.silent += 1
        self.rows[slot].flags = FLAG_SILENT
        self.age_remove(slot)
        self.age_append(SILENT, slot)
        try:
            self.give_user(session, user_id, user_data, 0, 0)
        except:
            self.hide(session)
            self.remove(session)
            finish(session, self.destroyed)
            raise
        return session

    def is_silent(self, SessionCore session not None):
        """Whether a session was made by `hold`. O(1)."""
        self.refuse_stranger(session)
        return session.slot != 0 and (self.rows[session.slot].flags & FLAG_SILENT) != 0

    def begin_end(self, SessionCore session not None):
        """Hide a session from its key and stop its periodic saves; its user stays taken. O(1)."""
        self.hide(session)

    cdef int hide(self, SessionCore session) except -1:
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        if is_ending(row.state):
            return 0
        self.enter_lane(slot, END)
        self.forget_key(session)
        if CAGEY_DEBUG:
            check_table(self)
        return 0

    cdef int forget_key(self, SessionCore session) except -1:
        if session.key is not None:
            index_remove(&self.by_key, self.hash_of_key(session.key), session.slot)
        return 0

    def forget(self, SessionCore session not None):
        """Remove a session that is being ended from the table; its user may have a session again. O(1).

        If a save is still in flight, its outcome no longer counts: `acknowledge` and `fail` return False.
        """
        self.remove(session)

    cdef int remove(self, SessionCore session) except -1:
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        cdef uint8_t before = row.state
        if transitions[before][FORGET] == STATES:
            step(row, FORGET)
        unlist(&self.wheel, self.rows, slot)
        if before == ENDING_ASKED:
            self.counters.due -= 1
        if has_save_in_flight(before):
            self.counters.in_flight -= 1
        return self.clear(session, slot)

    cdef int end_at_once(self, SessionCore session) except -1:
        """`begin_end` and `forget` in one, for a session with no save in flight or asked for: none, idle or due."""
        cdef uint32_t slot = session.slot
        if self.rows[slot].state == DUE:
            self.counters.due -= 1
        unlist(&self.wheel, self.rows, slot)
        self.forget_key(session)
        return self.clear(session, slot)

    cdef inline int clear(self, SessionCore session, uint32_t slot) except -1:
        cdef bint is_silent = (self.rows[slot].flags & FLAG_SILENT) != 0
        self.age_remove(slot)
        if session.user_id is not None:
            self.counters.identified -= not is_silent
            index_remove(&self.by_user, self.hash_of_user(session.user_id), slot)
        session.slot = 0
        put_item(self.sessions, slot, None)
        self.release(slot)
        if is_silent:
            self.counters.silent -= 1
        else:
            self.counters.ended += 1
        if CAGEY_DEBUG:
            check_table(self)
        return 0

    @property
    def oldest_save(self):
        """The tick at which the oldest state was encoded that is still some user's last acknowledged one, or None.

        Users are kept in the order in which their saves were acknowledged, so it may be late by the duration of one
        save. O(1), plus one step for each walk under way.
        """
        cdef uint32_t slot = self.rows[IDENTIFIED].newer
        while slot != IDENTIFIED and self.rows[slot].state == GONE:
            slot = self.rows[slot].newer
        return None if slot == IDENTIFIED else self.rows[slot].saved_at

    def oldest_first(self, bint identified=True, *, bint to_the_end=False):
        """A walk over the sessions, oldest save first (anonymous ones: oldest first); see `OldestFirst`."""
        return OldestFirst(self, identified, to_the_end)

    def _check(self):
        """Raise AssertionError if an invariant does not hold; returns False in a release build, which checks nothing."""
        if CAGEY_DEBUG:
            check_everything(self)
        return bool(CAGEY_DEBUG)
