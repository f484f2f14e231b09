# The rows: where they lie, who has one, and in which order they age.
#
# What lives here: `Counters`, and `SessionRows` - the array of rows, the sessions beside it, the free list, the age
# lists, and who may use them. What must not: keys and users (table.pxi), and the way of a save (lanes.pxi).
#
# Each row has a place in the interval, by which the saves of all are spread evenly for ever. It follows from the number of
# the row: neighbours lie the golden ratio apart, so any number of them, one after the other, are spread as evenly as can be
# (Knuth, TAOCP 3, 6.4, on Fibonacci hashing). Whoever is saved for another reason is due at their place again. Whoever the
# timer has saved late, as after a stall or an outage, comes back to it by a tenth of the way with each save: all of them at
# once would be as many saves again, in the interval in which the store has the most to do.
#
# Invariants
#   - A row with state GONE is on the free list; every other row belongs to exactly one session, or is a mark of a walk.
#   - `sessions[slot]` is the session whose `slot` is that number, else None; and no session keeps its slot beyond `forget`.
#   - Rows from `used` on were never anybody's, and their memory was never touched.
#   - Every row of a session is on one age list: anonymous, identified, or silent.
#
# Cost: every operation is O(1) amortised; only growing moves the array.

cdef enum:
    URGENT = BUCKETS        # the three lanes: somebody waits for the save,
    FINAL                   # it is the last one of a session,
    PERIODIC                # or its time has come
    ANONYMOUS
    IDENTIFIED
    SILENT
    FREE
    FIRST_SLOT

cdef uint64_t fork_epoch = 0

cdef enum:
    INITIAL_SLOTS = 64
    STEPS = 10


def _after_fork_in_child():
    global fork_epoch
    fork_epoch += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


cdef struct Copy:
    uint64_t epoch          # of the claim under which the session is saved
    uint64_t digest         # of the bytes of the version last fixed
    uint64_t stored         # of the bytes of the version last acknowledged, as they are in the store


cdef inline void row_init(Row* rows, uint32_t slot) noexcept nogil:
    memset(&rows[slot], 0, sizeof(Row))
    rows[slot].state = GONE
    rows[slot].next = rows[slot].prev = rows[slot].newer = rows[slot].older = slot


@cython.final
cdef class Counters:
    """Running totals of one table. They outlive it, so that a forgotten manager can still say what was not saved."""
    cdef readonly uint64_t created
    cdef readonly uint64_t ended
    cdef readonly uint64_t identified
    cdef readonly uint64_t silent
    cdef readonly uint64_t in_flight
    cdef readonly uint64_t due
    cdef readonly uint64_t saved
    cdef readonly uint64_t skipped
    cdef readonly uint64_t failed


# The collector must not empty a table before its sessions: their release looks into it. The cycle table - host -
# session is broken at the other two. This holds for the classes built on this one, too.
@cython.no_gc_clear
cdef class SessionRows:
    """The rows of one server's sessions in one C array, and the sessions they belong to."""
    cdef readonly Counters counters
    cdef readonly object host
    cdef type session_type
    cdef Row* rows
    cdef Copy* copies           # one for each row, or NULL where no store keeps any
    cdef uint32_t used          # rows below it have been somebody's
    cdef uint32_t capacity
    cdef Wheel wheel
    cdef uint32_t served_last   # a lane
    cdef uint32_t walks         # those under way that saves can move a session out of
    cdef uint64_t phase         # where in the interval row 0 would be, in 2**64ths
    cdef unsigned long thread
    cdef uint64_t forked
    cdef list sessions

    def __cinit__(self, type session_type not None, host, *, uint64_t seed=0, bint stored=False):
        if not issubclass(session_type, SessionCore):
            raise UsageError("session_type has to be a subclass of SessionCore")
        self.session_type = session_type
        self.host = host
        self.counters = Counters.__new__(Counters)
        self.phase = mixed(seed)
        self.sessions = [None] * FIRST_SLOT
        self.served_last = PERIODIC
        wheel_init(&self.wheel)
        self.grow()
        cdef uint32_t slot
        for slot in range(<uint32_t> FIRST_SLOT):
            row_init(self.rows, slot)
        self.used = FIRST_SLOT
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

    @cython.final
    cdef inline int check_thread(self) except -1:
        if self.thread and (self.thread != current_thread() or self.forked != fork_epoch):
            if self.forked != fork_epoch:
                raise WrongLoopError("this manager was made before a fork; make one of its own in the child process")
            raise WrongLoopError("this manager belongs to the event loop of another thread; "
                                 "hand the call over with loop.call_soon_threadsafe or asyncio.run_coroutine_threadsafe")
        return 0

    @cython.final
    cdef int grow(self) except -1:
        cdef uint32_t old = self.capacity
        cdef uint64_t wanted = <uint64_t> old * 2 if old else FIRST_SLOT + INITIAL_SLOTS
        if wanted > MAX_SLOTS:
            raise MemoryError("the session table is full")
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
        return 0

    @cython.final
    cdef uint32_t allocate(self) except 0:
        cdef uint32_t slot = self.rows[FREE].prev  # the one freed last: its row is still in the cache
        if slot != FREE:
            list_remove(self.rows, slot)
            return slot
        if self.used == self.capacity:
            self.grow()
        slot = self.used
        self.sessions.append(None)
        row_init(self.rows, slot)
        self.used += 1
        return slot

    @cython.final
    cdef inline void release(self, uint32_t slot) noexcept:
        self.rows[slot].state = GONE
        list_append(self.rows, FREE, slot)

    @cython.final
    cdef inline uint64_t ticks_to_place(self, uint32_t slot, uint64_t tick, uint64_t interval) noexcept:
        """After how many ticks, from 1 to `interval`, a row is at its place."""
        cdef uint64_t part = (self.phase + slot * <uint64_t> 0x9E3779B97F4A7C15) >> 32
        cdef uint64_t place = part * (interval >> 32) + (part * (interval & 0xFFFFFFFF) >> 32)
        cdef uint64_t here = tick % interval
        return place - here if place > here else place + interval - here

    @cython.final
    cdef inline uint64_t next_due(self, uint32_t slot, uint64_t tick, uint64_t interval) noexcept:
        """When a row whose data of `tick` is stored is due again: at the end of the interval at the latest."""
        cdef uint64_t ticks = self.ticks_to_place(slot, tick, interval)
        if tick >= self.rows[slot].deadline:  # the timer had its turn
            ticks = interval - (interval - ticks) // STEPS
        return tick + ticks

    @cython.final
    cdef inline void age_append(self, uint32_t age_list, uint32_t slot) noexcept:
        cdef uint32_t newest = self.rows[age_list].older
        self.rows[slot].older = newest
        self.rows[slot].newer = age_list
        self.rows[newest].newer = slot
        self.rows[age_list].older = slot

    @cython.final
    cdef inline uint32_t age_list_of(self, uint32_t slot) noexcept:
        """The list on which a row with a user is."""
        return SILENT if self.rows[slot].flags & FLAG_SILENT else IDENTIFIED

    @cython.final
    cdef inline void age_remove(self, uint32_t slot) noexcept:
        self.rows[self.rows[slot].older].newer = self.rows[slot].newer
        self.rows[self.rows[slot].newer].older = self.rows[slot].older
        self.rows[slot].newer = self.rows[slot].older = slot

    @cython.final
    cdef inline int refuse_stranger(self, SessionCore session) except -1:
        if session.table is not self and session.table is not None:
            raise UsageError("this session belongs to another manager")
        return 0

    @cython.final
    cdef uint32_t slot_of(self, SessionCore session) except 0:
        """The slot of a session of this table that has a row; raises otherwise."""
        self.refuse_stranger(session)
        if session.table is None:
            raise_handmade()
        self.check_thread()
        if session.slot == 0:
            if not session.ended:
                raise SessionEndedError("the session is ending: its last save is done")
            raise_ended(session)
        return session.slot

    def require_thread(self):
        """Raise `WrongLoopError` in another thread than the bound one, or after a fork."""
        self.check_thread()

    def bind_thread(self):
        """Refuse every other thread, and every forked child, from now on."""
        self.thread = current_thread()
        self.forked = fork_epoch
