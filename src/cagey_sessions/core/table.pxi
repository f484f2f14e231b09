# The rows and the two indexes.
#
# What lives here: `SessionTable` - rows, key and user index, lanes, age lists - and `Counters`. What must not:
# coroutines, events, retry delays - the table is told deadlines, it does not choose them beyond spreading the first.
#
# Invariants
#   - A row with state GONE is on the free list; every other row belongs to exactly one session, or is a mark of a walk.
#   - `sessions[slot]` is the session whose `slot` is that number, else None; its `generation` is the row's.
#   - A key is in the index while its session is live and not ending; a user until the row is forgotten. An entry is
#     removed only if it is this very session.
#   - DUE rows are in the periodic lane, ASKED ones in the urgent lane, ENDING_ASKED ones in the final lane, rows with a
#     deadline in the wheel, all others on no list. Every row of a session is on one age list: anonymous, or identified.
#
# Cost: every operation is O(1) amortised; `advance` O(limit).

cdef enum:
    URGENT = BUCKETS        # the three lanes: somebody waits for the save,
    FINAL                   # it is the last one of a session,
    PERIODIC                # or its time has come
    ANONYMOUS
    IDENTIFIED
    FREE
    FIRST_SLOT

cdef uint64_t fork_epoch = 0

cdef enum:
    INITIAL_SLOTS = 64


def _after_fork_in_child():
    global fork_epoch
    fork_epoch += 1

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


cdef struct Copy:
    uint64_t epoch          # of the claim under which the session is saved
    uint64_t digest         # of the bytes of the version last fixed
    uint64_t stored         # of the bytes of the version last acknowledged, as they are in the store


cdef inline uint32_t lane_of(int state) noexcept nogil:
    """The lane a row in that state stands in, or 0."""
    if state == ASKED:
        return URGENT
    if state == ENDING_ASKED:
        return FINAL
    return PERIODIC if state == DUE else 0


cdef inline void fill_pair(tuple pair, first, second) noexcept:
    """Set the two items of a tuple that nobody else has seen."""
    Py_INCREF(first)
    PyTuple_SET_ITEM(pair, 0, first)
    Py_INCREF(second)
    PyTuple_SET_ITEM(pair, 1, second)


@cython.final
cdef class Counters:
    """Running totals of one table. They outlive it, so that a forgotten manager can still say what was not saved."""
    cdef readonly uint64_t created
    cdef readonly uint64_t ended
    cdef readonly uint64_t identified
    cdef readonly uint64_t in_flight
    cdef readonly uint64_t due
    cdef readonly uint64_t saved
    cdef readonly uint64_t skipped
    cdef readonly uint64_t failed


# The collector must not empty a table before its sessions: their release looks into it. The cycle table - host -
# session is broken at the other two.
@cython.final
@cython.no_gc_clear
cdef class SessionTable:
    """All sessions of one server: rows in one C array, found by key, by user, by deadline and by age.

    `session_type` is the subclass of `SessionCore` to make; `host` is handed to its methods as ``_host``; `seed` starts
    the generator that spreads first deadlines. With `stored` a version stands for certain bytes, and `fix` says which;
    without, every save that is taken is a new version. Not thread-safe: after `bind_thread` any other thread is refused.
    """
    cdef readonly Counters counters
    cdef readonly object host
    cdef type session_type
    cdef Row* rows
    cdef Copy* copies           # one for each row, or NULL where no store keeps any
    cdef uint32_t capacity
    cdef Wheel wheel
    cdef uint32_t served_last   # a lane
    cdef uint32_t walks         # those under way that saves can move a session out of
    cdef uint64_t random
    cdef unsigned long thread
    cdef uint64_t forked
    cdef list sessions
    cdef dict by_key
    cdef dict by_user

    def __cinit__(self, type session_type not None, host, *, uint64_t seed=0, bint stored=False):
        if not issubclass(session_type, SessionCore):
            raise UsageError("session_type has to be a subclass of SessionCore")
        self.session_type = session_type
        self.host = host
        self.counters = Counters.__new__(Counters)
        self.random = seed
        self.sessions = []
        self.by_key = {}
        self.by_user = {}
        self.served_last = PERIODIC
        wheel_init(&self.wheel)
        self.grow()
        if stored:
            self.copies = <Copy*> PyMem_RawCalloc(self.capacity, sizeof(Copy))
            if self.copies is NULL:
                raise MemoryError("no memory for a session table")

    def __dealloc__(self):
        PyMem_RawFree(self.rows)
        PyMem_RawFree(self.copies)

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
        self.sessions.extend([None] * <Py_ssize_t> (wanted - len(self.sessions)))
        cdef Copy* copies
        if self.copies is not NULL:
            copies = <Copy*> PyMem_RawRealloc(self.copies, wanted * sizeof(Copy))
            if copies is NULL:
                raise MemoryError("no memory for more sessions")
            self.copies = copies
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

    cdef inline int refuse_stranger(self, SessionCore session) except -1:
        if session.table is not self and session.table is not None:
            raise UsageError("this session belongs to another manager")
        return 0

    cdef uint32_t slot_of(self, SessionCore session) except 0:
        """The slot of a session of this table that has a row; raises otherwise."""
        self.refuse_stranger(session)
        if session.table is None:
            raise_handmade()
        self.check_thread()
        if session.slot == 0 or self.rows[session.slot].generation != session.generation:
            if session.end_reason is None:
                raise SessionEndedError("the session is ending: its last save is done")
            raise_ended(session)
        return session.slot

    def require_thread(self):
        """Raise `WrongLoopError` in another thread than the bound one, or after a fork."""
        self.check_thread()

    def bind_thread(self):
        """Refuse every other thread, and every forked child, from now on."""
        self.thread = PyThread_get_thread_ident()
        self.forked = fork_epoch

    def create(self, key=None):
        """Make a session, under a key if one is given. Raises `InvalidKeyError`, `KeyTakenError`. O(1) amortised."""
        self.check_thread()
        if key is not None:
            check_key(key)
        cdef uint32_t slot = self.allocate()
        cdef SessionCore session
        try:
            session = <SessionCore?> self.session_type.__new__(self.session_type)
            if key is not None and self.by_key.setdefault(key, session) is not session:
                raise KeyTakenError("another live session has this key; end it first, or create with replace=True")
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
        row.failures = row.marks = 0
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
        self.refuse_stranger(session)
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
        self.refuse_stranger(session)
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
        if now == NEVER or interval > NEVER - 1 - now:
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
            check_table(self)

    def ask(self, SessionCore session not None):
        """Want a save whose bytes are fixed from now on. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        if session.user_id is None:
            raise UsageError("a session without a user has nothing to save")
        self.enter_lane(slot, ASK)
        if CAGEY_DEBUG:
            check_table(self)

    cdef int enter_lane(self, uint32_t slot, int event) except -1:
        """Step by an event that may lead into a lane, or from one into another, and move the row if it does."""
        cdef Row* row = &self.rows[slot]
        cdef uint32_t before = lane_of(row.state), after = lane_of(transitions[row.state][event])
        if transitions[row.state][event] == STATES or (before == after and before):
            step(row, event)  # or raise
            return 0  # it keeps its place
        unlist(&self.wheel, self.rows, slot)
        step(row, event)
        if before:
            self.counters.due -= 1
        if after:
            list_append(self.rows, after, slot)
            self.counters.due += 1
        return 0

    def advance(self, uint64_t now, uint32_t limit, uint64_t again=0):
        """Move time to `now` and what is due into the lanes, walking at most `limit` rows, cascades included.

        With `again`, users without a mark count as saved at `now`, unchanged, and are due again that many ticks later;
        unless they were never saved, or a walk under way would miss them. Returns the rows walked; as many as `limit`
        means there may be more at this instant, first in line for the next call. Time never moves back. O(limit).
        """
        cdef uint32_t budget = limit, slot
        self.check_thread()
        while True:
            slot = wheel_pop(&self.wheel, self.rows, now, &budget)
            if slot == 0:
                break
            if again and self.is_skipped(slot):
                self.skip(slot, now, again)
                continue
            list_append(self.rows, lane_of(step(&self.rows[slot], BECOME_DUE)), slot)
            self.counters.due += 1
        if CAGEY_DEBUG:
            check_table(self)
        return limit - budget

    cdef inline bint is_skipped(self, uint32_t slot) noexcept:
        cdef Row* row = &self.rows[slot]
        return row.marks == 0 and row.state == IDLE and row.acknowledged != 0 and self.walks == 0

    cdef void skip(self, uint32_t slot, uint64_t now, uint64_t again) noexcept:
        # past the wheel's own time, else the row would be due again in this very call
        cdef uint64_t here = now if now > self.wheel.elapsed else self.wheel.elapsed
        wheel_arm(&self.wheel, self.rows, slot, here + (again if again < NEVER - 1 - here else NEVER - 1 - here))
        self.rows[slot].saved_at = now
        self.age_remove(slot)
        self.age_append(IDENTIFIED, slot)
        self.counters.saved += 1
        self.counters.skipped += 1

    def next_deadline(self):
        """A tick no later than the next deadline in the wheel, or None if it is empty. O(1)."""
        cdef uint64_t tick = wheel_next(&self.wheel)
        return tick if self.wheel.armed else None

    @property
    def armed(self):
        """How many rows are in the wheel."""
        return self.wheel.armed

    def has_due(self, bint periodic=True):
        """Whether `take` would return a session. O(1)."""
        return self.next_lane(periodic) != 0

    cdef uint32_t next_lane(self, bint periodic) noexcept:
        """The lane whose turn it is among those that hold somebody, or 0."""
        cdef uint32_t lane = self.served_last
        for _ in range(3):
            lane = URGENT if lane == PERIODIC else lane + 1
            if listed(self.rows, lane) and (periodic or lane != PERIODIC):
                return lane
        return 0

    def take(self, bint periodic=True):
        """The next session to save and its version, or None. Its save is in flight from here on. O(1).

        The lanes take turns while several hold somebody, so none starves; without `periodic` that lane is passed over.
        With `stored` the version is the one last fixed; without, it is the next.
        """
        self.check_thread()
        # before the rows are looked at: making a tuple may run a collection, and that may run anything
        cdef tuple taken = PyTuple_New(2)
        cdef uint32_t lane = self.next_lane(periodic)
        if lane == 0:
            return None
        cdef uint32_t slot = self.rows[lane].next
        cdef Row* row = &self.rows[slot]
        version = row.version + (self.copies is NULL)
        fill_pair(taken, self.sessions[slot], version)
        self.served_last = lane
        list_remove(self.rows, slot)
        step(row, TAKE)
        row.version += self.copies is NULL
        self.counters.due -= 1
        self.counters.in_flight += 1
        if CAGEY_DEBUG:
            check_table(self)
        return taken

    def own(self, SessionCore session not None, uint64_t epoch, version=None, digest=None, stored=None):
        """Note the epoch of a claim and, after a load, the version and the digest of what was loaded.

        `stored` is the digest of the body it was loaded from, if writing it now would give other bytes. O(1).
        """
        cdef uint64_t stored_version = 0 if version is None else version
        cdef uint64_t loaded_digest = 0 if digest is None else digest
        cdef uint64_t stored_digest = loaded_digest if stored is None else stored
        cdef uint32_t slot = self.slot_of(session)
        self.require_copies()
        self.copies[slot].epoch = epoch
        if version is not None:
            self.rows[slot].version = self.rows[slot].acknowledged = stored_version
            self.copies[slot].digest = loaded_digest
            self.copies[slot].stored = stored_digest

    def epoch(self, SessionCore session not None):
        """The epoch of the claim under which a session is saved. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        self.require_copies()
        return self.copies[slot].epoch

    def fix(self, SessionCore session not None, uint64_t digest):
        """The bytes of a save in flight are fixed: the version they are written as, or 0 if that is not needed.

        Bytes with the digest of the version last fixed are that version: 0 if it is acknowledged, else a repeat of it.
        Any other bytes are the next version. O(1).
        """
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        self.require_copies()
        if not has_save_in_flight(row.state):
            raise UsageError("no save of this session is in flight")
        if row.marks:
            row.marks = MARKED_BEFORE
        if row.version == 0 or self.copies[slot].digest != digest:
            row.version += 1
            self.copies[slot].digest = digest
        elif row.version == row.acknowledged:
            return 0
        return row.version

    def is_marked(self, SessionCore session not None):
        """Whether a session has a mark, or was never saved. O(1)."""
        cdef Row* row = &self.rows[self.slot_of(session)]
        return row.marks != 0 or row.acknowledged == 0

    def is_current(self, SessionCore session not None, uint64_t digest):
        """Whether bytes with that digest are the ones last acknowledged. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        self.require_copies()
        return row.version != 0 and row.version == row.acknowledged and self.copies[slot].digest == digest

    def is_stored(self, SessionCore session not None, uint64_t version, uint64_t digest):
        """Whether the store is known to have had just that body under that version. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        self.require_copies()
        return version != 0 and version == self.rows[slot].acknowledged and digest == self.copies[slot].stored

    def stored(self, SessionCore session not None):
        """The version last acknowledged and the digest of its body, as the store has it; version 0 before that. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        self.require_copies()
        return self.rows[slot].acknowledged, self.copies[slot].stored

    cdef int require_copies(self) except -1:
        if self.copies is NULL:
            raise UsageError("this table was made without a store")
        return 0

    def acknowledge(self, SessionCore session not None, uint64_t version, uint64_t taken_at, deadline=None):
        """The save of `version`, its bytes fixed at tick `taken_at`, has succeeded; the next one is due at `deadline`.

        False, and nothing changes, if that save is not in flight any more: the session was forgotten. O(1).
        """
        cdef uint64_t tick = 0 if deadline is None else deadline  # first: the conversion may run anything
        cdef uint32_t slot = self.in_flight_slot(session, version)
        if slot == 0:
            return False
        cdef Row* row = &self.rows[slot]
        self.settle(slot, ACKNOWLEDGE, deadline is not None and not is_ending(row.state), tick)
        row.failures = 0
        row.marks &= MARKED
        if self.copies is not NULL and row.acknowledged != version:
            self.copies[slot].stored = self.copies[slot].digest
        row.acknowledged = version
        row.saved_at = taken_at
        self.age_remove(slot)
        self.age_append(IDENTIFIED, slot)
        self.counters.saved += 1
        if CAGEY_DEBUG:
            check_table(self)
        return True

    def fail(self, SessionCore session not None, uint64_t version, deadline=None):
        """The save of `version` has failed; it is tried again at `deadline`, or when asked for. O(1).

        False, and nothing changes, if that save is not in flight any more.
        """
        cdef uint64_t tick = 0 if deadline is None else deadline
        cdef uint32_t slot = self.in_flight_slot(session, version)
        if slot == 0:
            return False
        cdef Row* row = &self.rows[slot]
        self.settle(slot, FAIL, deadline is not None, tick)
        row.marks = MARKED
        if row.failures < 255:
            row.failures += 1
        self.counters.failed += 1
        if CAGEY_DEBUG:
            check_table(self)
        return True

    cdef uint32_t in_flight_slot(self, SessionCore session, uint64_t version) except? 0:
        self.check_thread()
        self.refuse_stranger(session)
        if session.table is None:
            raise_handmade()
        cdef uint32_t slot = session.slot
        if slot == 0 or self.rows[slot].generation != session.generation:
            return 0
        if not has_save_in_flight(self.rows[slot].state) or self.rows[slot].version != version:
            raise UsageError(f"version {version} of this session is not in flight")
        return slot

    cdef int settle(self, uint32_t slot, int event, bint again, uint64_t deadline) except -1:
        cdef Row* row = &self.rows[slot]
        self.counters.in_flight -= 1
        cdef int after = step(row, event)
        cdef uint32_t lane = lane_of(after)
        if lane:
            list_append(self.rows, lane, slot)
            self.counters.due += 1
        elif again:
            wheel_arm(&self.wheel, self.rows, slot, deadline)
        return 0

    def begin_end(self, SessionCore session not None):
        """Hide a session from its key and stop its periodic saves; its user's slot stays taken. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        if is_ending(row.state):
            return
        self.enter_lane(slot, END)
        self.forget_key(session)
        if CAGEY_DEBUG:
            check_table(self)

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
            check_table(self)

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
        """Raise AssertionError if any structure is wrong: True after a look, False in a release build, which takes none."""
        if CAGEY_DEBUG:
            check_table(self)
        return bool(CAGEY_DEBUG)
