# The rows, the two indexes, and the objects Python sees.
#
# What lives here: `SessionTable` (rows, key and user index, lanes, age lists), `SessionCore` (what every session object
# is made of), `OldestFirst` (a walk that survives changes) and `Counters`. What must not: coroutines, events, retry
# delays - the table is told deadlines, it does not choose them beyond spreading the first.
#
# Invariants
#   - A row with state GONE is on the free list; every other row belongs to exactly one session, or is a mark of a walk.
#   - `sessions[slot]` is the session whose `slot` is that number, else None; its `generation` is the row's.
#   - A key is in the index while its session is live and not ending; a user until the row is forgotten. An entry is
#     removed only if it is this very session.
#   - DUE rows are in the periodic lane, *ASKED rows without a save in flight in the urgent lane, rows with a deadline in
#     the wheel, all others on no list. Every row of a session is on one age list: anonymous, or identified.
#
# Cost: every operation is O(1) amortised; `advance` O(limit).

cdef enum:
    URGENT = BUCKETS
    PERIODIC
    ANONYMOUS
    IDENTIFIED
    FREE
    FIRST_SLOT

cdef uint64_t fork_epoch = 0

cdef enum:
    MAX_USER_ID_BYTES = 1024
    INITIAL_SLOTS = 64


def _after_fork_in_child():
    global fork_epoch
    fork_epoch += 1

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def check_key(key):
    """Raise `InvalidKeyError` unless the key is a non-empty `str` (a subclass has its own ideas of equality)."""
    if type(key) is not str:
        raise InvalidKeyError(f"a key is a non-empty str, not {type(key).__name__}")
    if not key:
        raise InvalidKeyError("a key is a non-empty str, and this one is empty; leave it out for a session without a key")


def check_user_id(user_id, required=None):
    """Raise `InvalidUserIdError` unless the id is an `int` of 64 bits or a `str` of 1 to 1,024 bytes of UTF-8.

    `required` narrows it to ``int`` or ``str``. O(length).
    """
    kind = type(user_id)
    if kind is not int and kind is not str:
        raise InvalidUserIdError(f"a user id is an int or a str, not {kind.__name__}")
    if required is not None and kind is not required:
        raise InvalidUserIdError(f"this manager takes user ids of type {required.__name__}, not {kind.__name__}: {user_id!r:.80}")
    if kind is int:
        if not -0x8000000000000000 <= user_id <= 0x7FFFFFFFFFFFFFFF:
            raise InvalidUserIdError("a user id that is an int has to fit into 64 signed bits")
        return
    if not user_id:
        raise InvalidUserIdError("a user id that is a str must not be empty")
    try:
        size = len(user_id.encode())
    except UnicodeEncodeError:
        raise InvalidUserIdError(f"a user id must be valid text; this one holds a lone surrogate: {user_id!r:.80}") from None
    if size > MAX_USER_ID_BYTES:
        raise InvalidUserIdError(f"a user id that is a str takes at most {MAX_USER_ID_BYTES} bytes of UTF-8; this one takes {size}")
    if "\0" in user_id:
        raise InvalidUserIdError(f"a user id must not hold a NUL character: {user_id!r:.80}")


cdef class SessionTable


cdef class SessionCore:
    """What every session is made of: its place in the table, its identity, its data and its bag.

    Made by `SessionTable.create`, never by hand.
    """
    cdef SessionTable table
    cdef uint32_t slot              # 0 once forgotten
    cdef uint32_t generation
    cdef readonly object key
    cdef readonly object user_id
    cdef object data
    cdef object bag
    cdef public object _listeners
    cdef readonly object end_reason
    cdef object __weakref__

    def __init__(self):
        raise UsageError("sessions are made by `await manager.create()`")

    def __reduce__(self):
        raise TypeError("a session is one human on this server: it cannot be copied or pickled; copy its user_data")

    def __repr__(self):
        if self.table is None:
            return f"<{type(self).__name__} of no manager>"
        who = "anonymous" if self.user_id is None else f"user {self.user_id!r:.80}"
        if self.end_reason is not None:
            life = f"ended: {self.end_reason}"
        else:
            life = "live" if self.slot and not is_ending(self.table.rows[self.slot].state) else "ending"
        return f"<{type(self).__name__} {who}, {life}>"

    @property
    def alive(self):
        """Whether the session has not ended. True until the last ``destroy`` listener has run."""
        return self.table is not None and self.end_reason is None

    @property
    def user_data(self):
        """The user's data: the very object given to `set_user`, or None while nobody is identified.

        Change it in place, or assign another object. Raises `SessionEndedError` after the end.
        """
        table_of(self)
        return self.data

    @user_data.setter
    def user_data(self, value):
        table_of(self)
        if self.user_id is None:
            raise NotIdentifiedError("this session has no user yet; `await session.set_user(user_id, user_data)` comes first")
        if value is None:
            raise InvalidUserDataError("user_data must not be None: there would be nothing to save")
        self.data = value

    def set(self, key, value):
        """Keep any live object under a name for as long as the session lives. It is never saved.

        Raises `SessionEndedError` after the end. O(1).
        """
        table_of(self)
        if type(key) is not str:
            raise InvalidKeyError(f"a name in the bag is a str, not {type(key).__name__}")
        if self.bag is None:
            self.bag = {}
        (<dict> self.bag)[key] = value

    def get(self, key, default=None):
        """The object kept under a name, or `default`. Works after the end too, on what is left. O(1)."""
        if self.bag is None:
            return default
        return (<dict> self.bag).get(key, default)

    @property
    def _host(self):
        """Whoever the table belongs to."""
        if self.table is None:
            raise_handmade()
        return self.table.host

    def _require_alive(self):
        """Raise `SessionEndedError` after the end, and what any use from the wrong place raises."""
        table_of(self)

    def _end(self, reason):
        """Let go of the data and the listeners; from here on the handle is dead."""
        self.end_reason = reason
        self.data = None
        self._listeners = None


cdef int raise_handmade() except -1:
    raise UsageError("this session belongs to no manager; sessions are made by `await manager.create()`")


cdef int raise_ended(SessionCore session) except -1:
    who = "" if session.user_id is None else f" of user {session.user_id!r:.80}"
    raise SessionEndedError(f"the session{who} has ended ({session.end_reason})")


cdef inline SessionTable table_of(SessionCore session):
    """The table of a session that has not ended, used from the right thread; raises otherwise."""
    if session.table is None:
        raise_handmade()
    if session.end_reason is not None:
        raise_ended(session)
    session.table.check_thread()
    return session.table


@cython.final
cdef class Counters:
    """Running totals of one table. They outlive it, so that a forgotten manager can still say what was not saved."""
    cdef readonly uint64_t created
    cdef readonly uint64_t ended
    cdef readonly uint64_t identified
    cdef readonly uint64_t in_flight
    cdef readonly uint64_t due
    cdef readonly uint64_t saved
    cdef readonly uint64_t failed


# The collector must not empty a table before its sessions: their release looks into it. The cycle table - host -
# session is broken at the other two.
@cython.final
@cython.no_gc_clear
cdef class SessionTable:
    """All sessions of one server: rows in one C array, found by key, by user, by deadline and by age.

    `session_type` is the subclass of `SessionCore` to make; `host` is handed to its methods as ``_host``; `seed` starts
    the generator that spreads first deadlines. Not thread-safe: after `bind_thread` any other thread is refused.
    """
    cdef readonly Counters counters
    cdef readonly object host
    cdef type session_type
    cdef Row* rows
    cdef uint32_t capacity
    cdef Wheel wheel
    cdef bint urgent_took_last
    cdef uint64_t random
    cdef unsigned long thread
    cdef uint64_t forked
    cdef list sessions
    cdef dict by_key
    cdef dict by_user

    def __cinit__(self, type session_type not None, host, *, uint64_t seed=0):
        if not issubclass(session_type, SessionCore):
            raise UsageError("session_type has to be a subclass of SessionCore")
        self.session_type = session_type
        self.host = host
        self.counters = Counters.__new__(Counters)
        self.random = seed
        self.sessions = []
        self.by_key = {}
        self.by_user = {}
        wheel_init(&self.wheel)
        self.grow()

    def __dealloc__(self):
        PyMem_RawFree(self.rows)

    def __reduce__(self):
        raise TypeError("a session table cannot be copied or pickled")

    def __len__(self):
        return self.counters.created - self.counters.ended

    cdef inline int check_thread(self) except -1:
        if self.thread and (self.thread != PyThread_get_thread_ident() or self.forked != fork_epoch):
            if self.forked != fork_epoch:
                raise WrongLoopError("this manager was made before a fork; make one of its own in the child process")
            raise WrongLoopError("this manager belongs to the event loop of another thread; "
                                 "hand the call over with loop.call_soon_threadsafe or asyncio.run_coroutine_threadsafe")
        return 0

    cdef int grow(self) except -1:
        cdef uint32_t old = self.capacity
        cdef uint64_t wanted = <uint64_t> old * 2 if old else FIRST_SLOT + INITIAL_SLOTS
        cdef uint32_t slot
        if wanted > MAX_SLOTS:
            raise MemoryError("the session table is full")
        cdef Row* rows = <Row*> PyMem_RawRealloc(self.rows, wanted * sizeof(Row))
        if rows is NULL:
            raise MemoryError("no memory for more sessions")
        self.rows = rows
        self.capacity = <uint32_t> wanted
        memset(rows + old, 0, (wanted - old) * sizeof(Row))
        for slot in range(old, self.capacity):
            rows[slot].state = GONE
            rows[slot].next = rows[slot].prev = rows[slot].newer = rows[slot].older = slot
        slot = self.capacity
        while slot > (old if old else FIRST_SLOT):
            slot -= 1
            list_append(rows, FREE, slot)
        self.sessions.extend([None] * <Py_ssize_t> (wanted - old))
        return 0

    cdef uint32_t allocate(self) except 0:
        cdef uint32_t slot = self.rows[FREE].prev  # the one freed last: its row is still in the cache
        if slot == FREE:
            self.grow()
            slot = self.rows[FREE].prev
        list_remove(self.rows, slot)
        self.rows[slot].generation += 1
        return slot

    cdef inline void release(self, uint32_t slot) noexcept:
        self.rows[slot].state = GONE
        list_append(self.rows, FREE, slot)

    cdef inline uint64_t spread(self, uint64_t interval) noexcept:
        """A number of ticks from 1 to `interval`, by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
        self.random += <uint64_t> 0x9E3779B97F4A7C15
        cdef uint64_t mixed = self.random
        mixed = (mixed ^ (mixed >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * <uint64_t> 0x94D049BB133111EB
        mixed ^= mixed >> 31
        return 1 + mixed % interval

    cdef inline void age_append(self, uint32_t age_list, uint32_t slot) noexcept:
        cdef uint32_t newest = self.rows[age_list].older
        self.rows[slot].older = newest
        self.rows[slot].newer = age_list
        self.rows[newest].newer = slot
        self.rows[age_list].older = slot

    cdef inline void age_remove(self, uint32_t slot) noexcept:
        self.rows[self.rows[slot].older].newer = self.rows[slot].newer
        self.rows[self.rows[slot].newer].older = self.rows[slot].older
        self.rows[slot].newer = self.rows[slot].older = slot

    cdef uint32_t slot_of(self, SessionCore session) except 0:
        """The slot of a session of this table that has a row; raises otherwise."""
        if session.table is not self:
            raise UsageError("this session belongs to another manager")
        self.check_thread()
        if session.slot == 0 or self.rows[session.slot].generation != session.generation:
            if session.end_reason is None:
                raise SessionEndedError("the session is ending: its last save is done")
            raise_ended(session)
        return session.slot

    def bind_thread(self):
        """Refuse every other thread, and every forked child, from now on."""
        self.thread = PyThread_get_thread_ident()
        self.forked = fork_epoch

    def create(self, key=None):
        """Make a session, under a key if one is given. Raises `InvalidKeyError`, `KeyTakenError`. O(1) amortised."""
        self.check_thread()
        if key is not None:
            check_key(key)
            if key in self.by_key:
                raise KeyTakenError("another live session has this key; end it first, or create with replace=True")
        cdef uint32_t slot = self.allocate()
        cdef SessionCore session
        try:
            session = <SessionCore> self.session_type.__new__(self.session_type)
            if key is not None:
                self.by_key[key] = session
        except BaseException:
            self.release(slot)
            raise
        session.table = self
        session.slot = slot
        session.generation = self.rows[slot].generation
        session.key = key
        self.sessions[slot] = session
        cdef Row* row = &self.rows[slot]
        row.state = NONE
        row.failures = 0
        row.version = row.acknowledged = 0
        self.age_append(ANONYMOUS, slot)
        self.counters.created += 1
        if CAGEY_DEBUG:
            self._check()
        return session

    def find_by_key(self, key):
        """The live session under a key, or None. Raises `InvalidKeyError` for what is not a `str`. O(1)."""
        self.check_thread()
        if type(key) is not str:
            check_key(key)
        return self.by_key.get(key)

    def find_by_user(self, user_id):
        """The live session of a user; None if there is none, or it is ending. Raises `InvalidUserIdError`. O(1)."""
        self.check_thread()
        check_user_id(user_id)
        session = self.by_user.get(user_id)
        if session is not None and is_ending(self.rows[(<SessionCore> session).slot].state):
            return None
        return session

    def active_session(self, user_id):
        """The session that holds a user's slot, even while it is ending, or None. O(1)."""
        return self.by_user.get(user_id)

    def sessions_now(self):
        """A list of all sessions that have not been forgotten. O(capacity)."""
        self.check_thread()
        return [session for session in self.sessions if session is not None]

    def state(self, SessionCore session not None):
        """The state of a session's save, as a name from `SAVE_STATES`. O(1)."""
        if session.slot == 0:
            return "gone"
        return SAVE_STATES[self.rows[session.slot].state]

    def failures(self, SessionCore session not None):
        """How many saves failed since the last one that was acknowledged, at most 255. O(1)."""
        return self.rows[self.slot_of(session)].failures

    def versions(self, SessionCore session not None):
        """The version last taken and the version last acknowledged. O(1)."""
        cdef Row* row = &self.rows[self.slot_of(session)]
        return row.version, row.acknowledged

    def saved_at(self, SessionCore session not None):
        """The tick at which the state last acknowledged was fixed; at first, when the user was set. O(1)."""
        return self.rows[self.slot_of(session)].saved_at

    def is_ending(self, SessionCore session not None):
        """Whether a session is being ended, or has been forgotten. O(1)."""
        return session.slot == 0 or is_ending(self.rows[session.slot].state)

    def identify(self, SessionCore session not None, user_id, user_data, uint64_t now, uint64_t interval=0):
        """Give a session its user and, with an interval in ticks, a first deadline spread over it.

        Raises before anything changes: `AlreadyIdentifiedError`, `UserActiveError`, `InvalidUserDataError`,
        `SessionEndedError`. The id must have passed `check_user_id`. O(1) amortised.
        """
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        if is_ending(row.state):
            raise SessionEndedError("the session is ending: it cannot get a user any more")
        if row.state != NONE:
            raise AlreadyIdentifiedError(f"this session is user {session.user_id!r:.80} already; make another session")
        if user_data is None:
            raise InvalidUserDataError("user_data must not be None: a user without data would be saved as nothing")
        active = self.by_user.get(user_id)
        if active is not None:
            raise UserActiveError(
                f"user {user_id!r:.80} has a session that is {'ending' if self.is_ending(active) else 'live'}: "
                "end it and wait for its end, then load the data again", session=active)
        if now > NEVER - interval - 1:
            raise UsageError("the deadline lies past the end of time")
        self.by_user[user_id] = session
        session.user_id = user_id
        session.data = user_data
        step(row, IDENTIFY)
        row.saved_at = now
        self.age_remove(slot)
        self.age_append(IDENTIFIED, slot)
        self.counters.identified += 1
        if interval:
            wheel_arm(&self.wheel, self.rows, slot, now + self.spread(interval))
        if CAGEY_DEBUG:
            self._check()

    def ask(self, SessionCore session not None):
        """Want a save whose bytes are fixed from now on. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        self.enter_urgent(slot, ASK)
        if CAGEY_DEBUG:
            self._check()

    cdef int enter_urgent(self, uint32_t slot, int event) except -1:
        """Step by an event that may lead into the urgent lane, and move the row there if it does."""
        cdef Row* row = &self.rows[slot]
        cdef uint8_t before = row.state
        cdef bint was_in_lane = before == DUE or before == ASKED or before == ENDING_ASKED
        if transitions[before][event] != STATES and before != ASKED and before != ENDING_ASKED:
            unlist(&self.wheel, self.rows, slot)
        step(row, event)
        if before != ASKED and before != ENDING_ASKED and (row.state == ASKED or row.state == ENDING_ASKED):
            list_append(self.rows, URGENT, slot)
            if not was_in_lane:
                self.counters.due += 1
        return 0

    def advance(self, uint64_t now, uint32_t limit):
        """Move time to `now` and what is due into the lanes, walking at most `limit` rows, cascades included.

        Returns the rows walked; as many as `limit` means there may be more at this instant, first in line for the next
        call. Time never moves back. O(limit).
        """
        cdef uint32_t budget = limit, slot
        self.check_thread()
        while True:
            slot = wheel_pop(&self.wheel, self.rows, now, &budget)
            if slot == 0:
                break
            if step(&self.rows[slot], BECOME_DUE) == DUE:
                list_append(self.rows, PERIODIC, slot)
            else:
                list_append(self.rows, URGENT, slot)
            self.counters.due += 1
        if CAGEY_DEBUG:
            self._check()
        return limit - budget

    def next_deadline(self):
        """A tick no later than the next deadline in the wheel, or None if it is empty. O(1)."""
        cdef uint64_t tick = wheel_next(&self.wheel)
        return None if tick == NEVER else tick

    @property
    def armed(self):
        """How many rows are in the wheel."""
        return self.wheel.armed

    def has_due(self, bint periodic=True):
        """Whether `take` would return a session. O(1)."""
        return listed(self.rows, URGENT) or (periodic and listed(self.rows, PERIODIC))

    def take(self, bint periodic=True):
        """The next session to save and the version taken, or None. Its save is in flight from here on. O(1).

        The urgent lane and the periodic lane take turns while both hold somebody, so neither starves; without
        `periodic` only the urgent lane is served.
        """
        cdef bint from_urgent = listed(self.rows, URGENT)
        if periodic and listed(self.rows, PERIODIC):
            from_urgent = from_urgent and not self.urgent_took_last
        elif not from_urgent:
            return None
        self.urgent_took_last = from_urgent
        cdef uint32_t slot = self.rows[URGENT if from_urgent else PERIODIC].next
        cdef Row* row = &self.rows[slot]
        list_remove(self.rows, slot)
        step(row, TAKE)
        row.version += 1
        self.counters.due -= 1
        self.counters.in_flight += 1
        if CAGEY_DEBUG:
            self._check()
        return self.sessions[slot], row.version

    def acknowledge(self, SessionCore session not None, uint64_t version, uint64_t taken_at, deadline=None):
        """The save of `version`, its bytes fixed at tick `taken_at`, has succeeded; the next one is due at `deadline`.

        False, and nothing changes, if that save is not in flight any more: the session was forgotten. O(1).
        """
        cdef uint32_t slot = self.in_flight_slot(session, version)
        if slot == 0:
            return False
        cdef Row* row = &self.rows[slot]
        self.settle(slot, ACKNOWLEDGE, None if is_ending(row.state) else deadline)
        row.failures = 0
        row.acknowledged = version
        row.saved_at = taken_at
        self.age_remove(slot)
        self.age_append(IDENTIFIED, slot)
        self.counters.saved += 1
        if CAGEY_DEBUG:
            self._check()
        return True

    def fail(self, SessionCore session not None, uint64_t version, deadline=None):
        """The save of `version` has failed; it is tried again at `deadline`, or when asked for. O(1).

        False, and nothing changes, if that save is not in flight any more.
        """
        cdef uint32_t slot = self.in_flight_slot(session, version)
        if slot == 0:
            return False
        cdef Row* row = &self.rows[slot]
        self.settle(slot, FAIL, deadline)
        if row.failures < 255:
            row.failures += 1
        self.counters.failed += 1
        if CAGEY_DEBUG:
            self._check()
        return True

    cdef uint32_t in_flight_slot(self, SessionCore session, uint64_t version) except? 0:
        self.check_thread()
        if session.table is not self:
            raise UsageError("this session belongs to another manager")
        cdef uint32_t slot = session.slot
        if slot == 0 or self.rows[slot].generation != session.generation:
            return 0
        if not has_save_in_flight(self.rows[slot].state) or self.rows[slot].version != version:
            raise UsageError(f"version {version} of this session is not in flight")
        return slot

    cdef int settle(self, uint32_t slot, int event, deadline) except -1:
        cdef Row* row = &self.rows[slot]
        cdef uint64_t tick = 0
        if deadline is not None:
            tick = deadline
        self.counters.in_flight -= 1
        cdef int after = step(row, event)
        if after == ASKED or after == ENDING_ASKED:
            list_append(self.rows, URGENT, slot)
            self.counters.due += 1
        elif deadline is not None:
            wheel_arm(&self.wheel, self.rows, slot, tick)
        return 0

    def begin_end(self, SessionCore session not None):
        """Hide a session from its key and stop its periodic saves; its user's slot stays taken. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        if is_ending(row.state):
            return
        if row.state == IDLE or row.state == DUE:
            if row.state == DUE:
                self.counters.due -= 1
            unlist(&self.wheel, self.rows, slot)
        step(row, END)
        self.forget_key(session)
        if CAGEY_DEBUG:
            self._check()

    cdef int forget_key(self, SessionCore session) except -1:
        if session.key is not None and self.by_key.get(session.key) is session:
            del self.by_key[session.key]
        return 0

    def forget(self, SessionCore session not None):
        """Remove a session that is being ended from the table; its user is free again. O(1).

        A save still in flight is disowned: `acknowledge` and `fail` answer False to it.
        """
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
        step(row, FORGET)
        self.age_remove(slot)
        if session.user_id is not None:
            self.counters.identified -= 1
            if self.by_user.get(session.user_id) is session:
                del self.by_user[session.user_id]
        session.slot = 0
        self.sessions[slot] = None
        self.release(slot)
        self.counters.ended += 1
        if CAGEY_DEBUG:
            self._check()

    @property
    def oldest_save(self):
        """The tick of the oldest state that is still the last one acknowledged of some user, or None.

        Users are kept in the order in which saves were acknowledged, so it may be late by the duration of one save.
        O(1), plus one step for each walk under way.
        """
        cdef uint32_t slot = self.rows[IDENTIFIED].newer
        while slot != IDENTIFIED and self.rows[slot].state == GONE:
            slot = self.rows[slot].newer
        return None if slot == IDENTIFIED else self.rows[slot].saved_at

    def oldest_first(self, bint identified=True, *, bint to_the_end=False):
        """A walk over the sessions, oldest save first (anonymous ones: oldest first); see `OldestFirst`."""
        return OldestFirst(self, identified, to_the_end)

    def _check(self):
        """In a debug build, verify every structure against every other one and raise AssertionError; O(capacity)."""
        if not CAGEY_DEBUG:
            return False
        cdef uint32_t slot, after, bucket, level, lane
        cdef uint64_t start, span, in_wheel = 0, in_lanes = 0, in_flight = 0, live = 0, identified = 0, free = 0
        cdef set seen = set()
        for bucket in range(<uint32_t> FIRST_SLOT):
            slot = self.rows[bucket].next
            if bucket < BUCKETS:
                level = bucket // BUCKETS_PER_LEVEL
                assert listed(self.rows, bucket) == bool(
                    self.wheel.occupied[level] >> (bucket % BUCKETS_PER_LEVEL) & 1), f"bitmap of bucket {bucket}"
            while slot != bucket and bucket not in (ANONYMOUS, IDENTIFIED):
                after = self.rows[slot].next
                assert self.rows[after].prev == slot, f"links of slot {slot}"
                assert slot >= FIRST_SLOT and slot not in seen, f"slot {slot} is listed twice"
                seen.add(slot)
                if bucket < BUCKETS:
                    assert self.rows[slot].state in (IDLE, ENDING), f"slot {slot} is in the wheel"
                    in_wheel += 1
                    if self.rows[slot].deadline > self.wheel.elapsed:
                        span = self.rows[slot].deadline >> (level * LEVEL_BITS)
                        assert span & (BUCKETS_PER_LEVEL - 1) == bucket % BUCKETS_PER_LEVEL, f"bucket of slot {slot}"
                        assert bucket == self.wheel.unfinished or level == 0 or (
                            span > self.wheel.elapsed >> (level * LEVEL_BITS)), f"slot {slot} lies behind"
                elif bucket == PERIODIC:
                    assert self.rows[slot].state == DUE, f"slot {slot} is in the periodic lane"
                    in_lanes += 1
                elif bucket == URGENT:
                    assert self.rows[slot].state in (ASKED, ENDING_ASKED), f"slot {slot} is in the urgent lane"
                    in_lanes += 1
                else:
                    assert self.rows[slot].state == GONE, f"slot {slot} is free"
                    free += 1
                slot = after
        cdef set aged = set()
        for lane in (ANONYMOUS, IDENTIFIED):
            slot = self.rows[lane].newer
            while slot != lane:
                assert self.rows[self.rows[slot].newer].older == slot, f"age links of slot {slot}"
                assert slot not in aged
                aged.add(slot)
                if self.rows[slot].state != GONE:
                    assert ((<SessionCore> self.sessions[slot]).user_id is None) == (lane == ANONYMOUS)
                slot = self.rows[slot].newer
        cdef SessionCore session
        cdef uint64_t marks = 0
        for slot in range(FIRST_SLOT, self.capacity):
            if self.rows[slot].state == GONE:
                assert self.sessions[slot] is None, f"slot {slot} is gone and has a session"
                marks += slot in aged
                continue
            session = <SessionCore> self.sessions[slot]
            live += 1
            assert session.slot == slot and session.generation == self.rows[slot].generation, f"handle of slot {slot}"
            assert slot in aged, f"slot {slot} has no age"
            in_flight += has_save_in_flight(self.rows[slot].state)
            if session.user_id is not None:
                identified += 1
                assert self.by_user.get(session.user_id) is session, f"user of slot {slot}"
            if session.key is not None:
                assert (self.by_key.get(session.key) is session) != is_ending(self.rows[slot].state), f"key of slot {slot}"
            assert self.rows[slot].acknowledged <= self.rows[slot].version
        assert <uint64_t> len(self.by_user) == identified == self.counters.identified
        assert live == self.counters.created - self.counters.ended
        assert live + free + marks == self.capacity - FIRST_SLOT
        assert in_wheel == self.wheel.armed and in_lanes == self.counters.due and in_flight == self.counters.in_flight
        bucket = wheel_next_bucket(&self.wheel, &start)
        assert (bucket == NO_BUCKET) == (in_wheel == 0)
        for slot in range(FIRST_SLOT, self.capacity):
            if listed(self.rows, slot) and self.rows[slot].state in (IDLE, ENDING):
                assert start <= max(self.rows[slot].deadline, self.wheel.elapsed), "next_deadline is late"
        return True


@cython.final
cdef class OldestFirst:
    """A walk over one age list that stays right while sessions join, leave and are saved.

    It stops where the list ended when the walk began, so it ends although saves move sessions to the young end, and
    meets each session at most once. It does not meet one that was acknowledged before its turn came; who needs what
    such a save may have missed looks after the saves in flight. With `to_the_end` the walk goes on to the end of the list as
    it is when it gets there: it misses nobody, and may meet a session twice.

    Marks, rows without a session, stand in the list for the place reached and for the end. Call `close` when done; an
    abandoned walk costs the table two rows. O(1) a step.
    """
    cdef SessionTable table
    cdef uint32_t here
    cdef uint32_t end

    def __cinit__(self, SessionTable table not None, bint identified, bint to_the_end):
        table.check_thread()
        cdef uint32_t age_list = IDENTIFIED if identified else ANONYMOUS
        self.table = table
        self.here = table.allocate()
        self.end = age_list
        if not to_the_end:
            try:
                self.end = table.allocate()
            except BaseException:
                table.release(self.here)
                raise
            table.age_append(age_list, self.end)
        cdef uint32_t oldest = table.rows[age_list].newer
        table.rows[self.here].older = age_list
        table.rows[self.here].newer = oldest
        table.rows[oldest].older = self.here
        table.rows[age_list].newer = self.here

    def __iter__(self):
        return self

    def __next__(self):
        cdef SessionTable table = self.table
        cdef uint32_t slot
        if table is None:
            raise StopIteration
        table.check_thread()
        cdef Row* rows = table.rows
        while True:
            slot = rows[self.here].newer
            if slot == self.end:
                raise StopIteration
            # the mark and the row it meets change places
            rows[rows[self.here].older].newer = slot
            rows[slot].older = rows[self.here].older
            rows[self.here].newer = rows[slot].newer
            rows[rows[slot].newer].older = self.here
            rows[slot].newer = self.here
            rows[self.here].older = slot
            if rows[slot].state != GONE:
                return table.sessions[slot]

    def close(self):
        """Take the marks out of the list. Idempotent."""
        cdef SessionTable table = self.table
        if table is None:
            return
        self.table = None
        for slot in (self.here, self.end):
            if slot >= FIRST_SLOT:
                table.age_remove(slot)
                table.release(slot)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
