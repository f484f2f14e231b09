# The lanes: queues of sessions that wait for a save, and the way of a save through them.
#
# What lives here: `SessionLanes` - which sessions are asked for, which are due, which are taken, and what the outcome
# of a save does to a row. What must not: keys and users (table.pxi), and retry delays - the caller gives deadlines, or
# the interval.
#
# Invariants
#   - DUE rows are in the periodic lane, ASKED ones in the urgent lane, ENDING_ASKED ones in the final lane, rows with a
#     deadline in the wheel, all others on no list.
#   - `counters.due` is how many rows the three lanes hold, `counters.in_flight` how many saves are under way.
#
# Cost: every operation is O(1); `advance` O(limit).

cdef inline uint32_t lane_of(int state) noexcept nogil:
    """The lane that a row in a state waits in, or 0."""
    if state == ASKED:
        return URGENT
    if state == ENDING_ASKED:
        return FINAL
    return PERIODIC if state == DUE else 0


cdef inline int require_time(uint64_t now, uint64_t interval) except -1:
    """Raise `UsageError` unless an interval that begins now ends within 64 bits."""
    if now == NEVER or interval > NEVER - 1 - now:
        raise UsageError("the deadline lies past the end of time")
    return 0


cdef inline int require_interval(uint64_t interval) except -1:
    if interval == 0:
        raise UsageError("an interval has at least one tick")
    return 0


cdef inline void fill_pair(tuple pair, first, second) noexcept:
    """Set the two items of a new tuple, which no other code has seen."""
    Py_INCREF(first)
    PyTuple_SET_ITEM(pair, 0, first)
    Py_INCREF(second)
    PyTuple_SET_ITEM(pair, 1, second)


@cython.no_gc_clear
cdef class SessionLanes(SessionRows):
    """The rows, and the lanes in which they wait for a save."""

    def ask(self, SessionCore session not None):
        """Ask for a save whose bytes are encoded from now on: one that is in flight already does not count. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        if session.user_id is None:
            raise UsageError("a session without a user has nothing to save")
        self.enter_lane(slot, ASK)
        if CAGEY_DEBUG:
            check_table(<SessionTable> self)

    @cython.final
    cdef int enter_lane(self, uint32_t slot, int event) except -1:
        """Step by an event that may lead into a lane, or from one into another, and move the row accordingly."""
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

    def advance(self, uint64_t now, uint32_t limit, uint64_t interval=0):
        """Move time to `now`, and the rows that are due into the lanes, walking at most `limit` rows, with cascades.

        With `interval`, in ticks, users without a mark count as saved at `now`, unchanged, and are due again within it;
        but not if they were never saved, or if a walk under way would miss them. Returns how many rows were walked; if
        these are `limit` there may be more at this instant, which the next call continues with. Time never moves back.
        O(limit).
        """
        cdef uint32_t budget = limit, slot
        cdef Trail trail
        trail.count = 0
        self.check_thread()
        while True:
            slot = wheel_pop(&self.wheel, self.rows, now, &budget)
            if slot == 0:
                break
            if interval and self.is_skipped(slot):
                self.skip(slot, now, interval)
                follow(&trail, self.rows, slot)
                continue
            list_append(self.rows, lane_of(step(&self.rows[slot], BECOME_DUE)), slot)
            self.counters.due += 1
        if CAGEY_DEBUG:
            check_table(<SessionTable> self)
        return limit - budget

    @cython.final
    cdef inline bint is_skipped(self, uint32_t slot) noexcept:
        cdef Row* row = &self.rows[slot]
        return row.marks == 0 and row.state == IDLE and row.acknowledged != 0 and self.walks == 0

    @cython.final
    cdef void skip(self, uint32_t slot, uint64_t now, uint64_t interval) noexcept:
        # after the wheel's own time; otherwise the row would be due again within this call
        cdef uint64_t here = now if now > self.wheel.elapsed else self.wheel.elapsed
        cdef uint64_t left = NEVER - 1 - here
        wheel_arm(&self.wheel, self.rows, slot, self.next_due(slot, here, interval) if interval <= left else NEVER - 1)
        self.rows[slot].saved_at = now
        self.age_remove(slot)
        self.age_append(self.age_list_of(slot), slot)
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

    @cython.final
    cdef uint32_t next_lane(self, bint periodic) noexcept:
        """The lane whose turn it is among those that are not empty, or 0."""
        cdef uint32_t lane = self.served_last
        for _ in range(3):
            lane = URGENT if lane == PERIODIC else lane + 1
            if listed(self.rows, lane) and (periodic or lane != PERIODIC):
                return lane
        return 0

    def take(self, bint periodic=True):
        """Take the next session to save; returns it and its version, or None. Its save is in flight from now on. O(1).

        The lanes take turns while several are not empty, so none starves; without `periodic` that lane is passed over.
        In a table with `stored` the version is the one last encoded; without, it is the next one.
        """
        self.check_thread()
        # Made before the rows are read: an allocation may start a collection, and that may run any code.
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
            check_table(<SessionTable> self)
        return taken

    def own(self, SessionCore session not None, uint64_t epoch, version=None, digest=None, stored=None):
        """Note the epoch of a claim and, after a load, the version and the digest of what was loaded.

        `stored` is the digest of the body as it is stored, if encoding the data now would give other bytes. O(1).
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

    def doubt(self, uint32_t first, uint32_t limit):
        """Treat acknowledged saves as lost, in up to `limit` rows from `first` on.

        The next save of each of these sessions is written as the next version, whether its data has changed or not.
        Returns the row to go on from, 0 at the end; begin with 0. O(limit).
        """
        cdef uint32_t slot = max(first, <uint32_t> FIRST_SLOT)
        cdef uint32_t end = self.used if limit > self.used - min(slot, self.used) else slot + limit
        cdef Row* row
        self.check_thread()
        self.require_copies()
        for slot in range(slot, end):
            row = &self.rows[slot]
            if row.state != GONE and row.version and row.version == row.acknowledged:
                self.copies[slot].digest = ~self.copies[slot].stored
                row.marks |= MARKED
        if CAGEY_DEBUG:
            check_table(<SessionTable> self)
        return 0 if end == self.used else end

    def epoch(self, SessionCore session not None):
        """The epoch of the claim under which a session is saved. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        self.require_copies()
        return self.copies[slot].epoch

    def fix(self, SessionCore session not None, uint64_t digest):
        """Note the digest of the bytes of a save in flight; returns the version to write, 0 if that is not needed.

        Bytes with the digest of the version last encoded are that version: 0 if it is acknowledged, otherwise it is
        repeated. Any other bytes are the next version. Raises `UnsavableError` if there is no next version: stores keep
        numbers below 2**53, and some could not tell 2**53 from the number after it. O(1).
        """
        cdef uint32_t slot = self.slot_of(session)
        cdef Row* row = &self.rows[slot]
        self.require_copies()
        if not has_save_in_flight(row.state):
            raise UsageError("no save of this session is in flight")
        cdef bint is_new = row.version == 0 or self.copies[slot].digest != digest
        if is_new and row.version >= LAST_VERSION:
            raise UnsavableError(
                f"user {quote(session.user_id)} has had the last version there is, 2**53 - 1, and cannot be saved again",
                user_id=session.user_id,
            )
        if row.marks:
            row.marks = MARKED_BEFORE
        if is_new:
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
        """Whether the store has acknowledged exactly this body as this version, or returned it on a load. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        self.require_copies()
        return version != 0 and version == self.rows[slot].acknowledged and digest == self.copies[slot].stored

    def stored(self, SessionCore session not None):
        """The version last acknowledged and the digest of its body, as the store has it; version 0 before that. O(1)."""
        cdef uint32_t slot = self.slot_of(session)
        self.require_copies()
        return self.rows[slot].acknowledged, self.copies[slot].stored

    @cython.final
    cdef int require_copies(self) except -1:
        if self.copies is NULL:
            raise UsageError("this table was made without a store")
        return 0

    def due_after(self, SessionCore session not None, uint64_t tick, uint64_t interval):
        """The tick at which a session is due again, if its data of `tick` is stored; at most `interval` ticks later.

        That is its place in the interval. If its last deadline had passed by `tick`, it comes back to that place by a
        tenth of the way with each save. 0 for a session that was forgotten. O(1).
        """
        self.check_thread()
        self.refuse_stranger(session)
        if session.table is None:
            raise_handmade()
        require_interval(interval)
        require_time(tick, interval)
        if session.slot == 0:
            return 0
        if session.user_id is None:
            raise UsageError("a session without a user has nothing to save")
        return self.next_due(session.slot, tick, interval)

    def acknowledge(self, SessionCore session not None, uint64_t version, uint64_t taken_at, deadline=None):
        """Acknowledge the save of `version`, with bytes encoded at tick `taken_at`; the next is due at `deadline`.

        Returns False, and changes nothing, if the session was forgotten meanwhile. O(1).
        """
        cdef uint64_t tick = 0 if deadline is None else deadline  # first, because the conversion may run any code
        cdef uint32_t slot = self.in_flight_slot(session, version)
        if slot == 0:
            return False
        self.settle_saved(slot, taken_at, deadline is not None, tick)
        if CAGEY_DEBUG:
            check_table(<SessionTable> self)
        return True

    def fail(self, SessionCore session not None, uint64_t version, deadline=None):
        """Count the save of `version` as failed; it is tried again at `deadline`, or when asked for. O(1).

        Returns False, and changes nothing, if the session was forgotten meanwhile.
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
            check_table(<SessionTable> self)
        return True

    @cython.final
    cdef uint32_t in_flight_slot(self, SessionCore session, uint64_t version) except? 0:
        self.check_thread()
        self.refuse_stranger(session)
        if session.table is None:
            raise_handmade()
        cdef uint32_t slot = session.slot
        if slot == 0:
            return 0
        if not has_save_in_flight(self.rows[slot].state) or self.rows[slot].version != version:
            raise UsageError(f"version {version} of this session is not in flight")
        return slot

    @cython.final
    cdef int settle_saved(self, uint32_t slot, uint64_t taken_at, bint again, uint64_t deadline) except -1:
        """Acknowledge the save in flight of a row."""
        cdef Row* row = &self.rows[slot]
        self.settle(slot, ACKNOWLEDGE, again and not is_ending(row.state), deadline)
        row.failures = 0
        row.marks &= MARKED
        if self.copies is not NULL and row.acknowledged != row.version:
            self.copies[slot].stored = self.copies[slot].digest
        row.acknowledged = row.version
        row.saved_at = taken_at
        self.age_remove(slot)
        self.age_append(self.age_list_of(slot), slot)
        self.counters.saved += 1
        return 0

    @cython.final
    cdef int settle(self, uint32_t slot, int event, bint again, uint64_t deadline) except -1:
        cdef Row* row = &self.rows[slot]
        self.counters.in_flight -= 1
        cdef int after = step(row, event)
        cdef uint32_t lane = lane_of(after)
        if lane:
            list_append(self.rows, lane, slot)
            self.counters.due += 1
        elif again and not (row.flags & FLAG_SILENT and after == IDLE):  # that one is saved when it ends
            wheel_arm(&self.wheel, self.rows, slot, deadline)
        return 0
