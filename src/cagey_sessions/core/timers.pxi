# A timing wheel by itself, for benchmarks and tests.
#
# What lives here: `TimingWheel` - the functions of `wheel.pxi` over rows of its own, called from Python. What must not:
# anything a session needs, or another implementation of the wheel: benchmarks have to measure the one that the table
# uses.
#
# Of a row only the deadline and the two links are used. The id of a timer is its row; rows 0 to BUCKETS - 1 are the
# buckets, the next one is the list of free rows. The wanted deadlines are in an array of their own: postponing a timer
# writes only eight bytes there, which are far more likely to be in the cache than its row.
#
# Invariants
#   - A row is in the wheel, or it is free and the deadline wanted is NEVER, which no timer can have.
#   - A row is in the wheel at its deadline, which is not after the wanted one. If it comes out earlier than wanted, it
#     is armed again, once for any number of calls of `refresh`.
#
# Cost: `schedule` O(1) amortised, the others O(1); `advance` O(limit).

cdef enum:
    FREE_TIMERS = BUCKETS
    FIRST_TIMER


@cython.final
cdef class TimingWheel:
    """Timers with deadlines in whole ticks. The id of a timer is used again once it is due or cancelled."""
    cdef Row* rows
    cdef uint64_t* wanted       # for each row the deadline it was last given
    cdef uint32_t capacity
    cdef uint32_t untouched     # the first row that no timer has had yet; those before it are in the wheel or free
    cdef Wheel wheel

    def __cinit__(self, uint64_t now=0):
        wheel_init(&self.wheel)
        self.wheel.elapsed = now
        self.grow()

    def __dealloc__(self):
        PyMem_RawFree(self.rows)
        PyMem_RawFree(self.wanted)

    def __reduce__(self):
        raise TypeError("a timing wheel cannot be copied or pickled")

    def __len__(self):
        return self.wheel.armed

    cdef int grow(self) except -1:
        cdef uint32_t old = self.capacity, slot
        cdef uint64_t count = <uint64_t> old * 2 if old else FIRST_TIMER + INITIAL_SLOTS
        if count > MAX_SLOTS:
            raise MemoryError("the timing wheel is full")
        cdef uint64_t* wanted = <uint64_t*> PyMem_RawRealloc(self.wanted, count * sizeof(uint64_t))
        if wanted is NULL:
            raise MemoryError("no memory for more timers")
        self.wanted = wanted
        cdef Row* rows = <Row*> PyMem_RawRealloc(self.rows, count * sizeof(Row))
        if rows is NULL:
            raise MemoryError("no memory for more timers")
        self.rows = rows
        self.capacity = <uint32_t> count
        if old == 0:
            for slot in range(<uint32_t> FIRST_TIMER):
                rows[slot].next = rows[slot].prev = slot
            self.untouched = FIRST_TIMER
        return 0

    cdef inline uint32_t allocate(self) except 0:
        """A row that is on no list: the one freed last, which is still in the cache, or one that was never used."""
        cdef uint32_t timer = self.rows[FREE_TIMERS].prev
        if timer != FREE_TIMERS:
            list_remove(self.rows, timer)
            return timer
        if self.untouched == self.capacity:
            self.grow()
        timer = self.untouched
        self.rows[timer].ahead = 0
        self.untouched += 1
        return timer

    cdef inline uint32_t checked(self, uint32_t timer) except 0:
        if not FIRST_TIMER <= timer < self.untouched or self.wanted[timer] == NEVER:
            raise UsageError(f"there is no timer {timer}: it was due, or cancelled")
        return timer

    cdef inline void release(self, uint32_t timer) noexcept nogil:
        self.wanted[timer] = NEVER
        list_append(self.rows, FREE_TIMERS, timer)

    def schedule(self, uint64_t deadline):
        """Start a timer, and return its id. A deadline that has passed is due at the next `advance`."""
        if deadline == NEVER:
            raise UsageError("the deadline lies past the end of time")
        cdef uint32_t timer = self.allocate()
        wheel_arm(&self.wheel, self.rows, timer, deadline)
        self.wanted[timer] = deadline
        return timer

    def refresh(self, uint32_t timer, uint64_t deadline):
        """Give a timer another deadline. A later one only notes it; the wheel is not touched."""
        self.checked(timer)
        if deadline == NEVER:
            raise UsageError("the deadline lies past the end of time")
        cdef bint is_later = deadline >= self.wanted[timer]
        self.wanted[timer] = deadline
        if not is_later and deadline < self.rows[timer].deadline:
            wheel_disarm(&self.wheel, self.rows, timer)
            wheel_arm(&self.wheel, self.rows, timer, deadline)

    def cancel(self, uint32_t timer):
        """Cancel a timer."""
        self.checked(timer)
        wheel_disarm(&self.wheel, self.rows, timer)
        self.release(timer)

    def advance(self, uint64_t now, uint32_t limit):
        """Move time to `now`, and return the ids of timers that are due, walking at most `limit` rows, with cascades.

        There may be more due as long as `next_deadline` is not after `now`. Time never moves back.
        """
        cdef uint32_t budget = limit, timer
        cdef list due = []
        while True:
            timer = wheel_pop(&self.wheel, self.rows, now, &budget)
            if timer == 0:
                return due
            if self.wanted[timer] > self.wheel.elapsed:
                wheel_arm(&self.wheel, self.rows, timer, self.wanted[timer])
                continue
            self.release(timer)
            due.append(timer)

    def next_deadline(self):
        """A tick no later than the next deadline, or None without timers."""
        cdef uint64_t tick = wheel_next(&self.wheel)
        return tick if self.wheel.armed else None
