# The rows: their array, the sessions that they belong to, and the order of their age.
#
# What lives here: `Counters`, and `SessionRows` - the array of rows, the sessions beside it, the free list, the age
# lists, and the check of the thread. What must not: keys and users (table.pxi), and the way of a save (lanes.pxi).
#
# Each row has a place in the interval, at which it is due, so that the saves of all users stay spread evenly. The place
# follows from the number of the row: neighbours lie the golden ratio apart, so any number of consecutive rows are
# spread as evenly as possible (Knuth, TAOCP 3, 6.4, on Fibonacci hashing). A session that is saved for another reason
# is due at its place again. One that the timer has saved late, as after a stall or an outage, comes back to its place
# by a tenth of the way with each save. If all came back at once, each would be saved twice in the interval in which the
# store has most to do.
#
# Invariants
#   - A row with state GONE is on the free list, or is a bookmark of a walk; every other row belongs to one session.
#   - `sessions[slot]` is the session with that `slot`, or None. A session has no slot after `forget`.
#   - Rows from `used` on were never in use, and their memory was never touched.
#   - Every row of a session is on one age list: anonymous, identified, or silent.
#
# Cost: every operation is O(1) amortised; only growing moves the array.

cdef enum:
    URGENT = BUCKETS        # the three lanes: a caller waits for the save,
    FINAL                   # the session is being ended,
    PERIODIC                # or the interval has passed
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
    uint64_t epoch          # the epoch of the claim under which the session is saved
    uint64_t digest         # the digest of the bytes of the version last encoded
    uint64_t stored         # the digest of the bytes of the version last acknowledged, as they are in the store


cdef inline void row_init(Row* rows, uint32_t slot) noexcept nogil:
    memset(&rows[slot], 0, sizeof(Row))
    rows[slot].state = GONE
    rows[slot].next = rows[slot].prev = rows[slot].newer = rows[slot].older = slot


@cython.final
cdef class Counters:
    """Running totals of one table. They outlive it, so that a manager that is freed can still say what is unsaved."""
    cdef readonly uint64_t created
    cdef readonly uint64_t ended
    cdef readonly uint64_t identified
    cdef readonly uint64_t silent
    cdef readonly uint64_t in_flight
    cdef readonly uint64_t due
    cdef readonly uint64_t saved
    cdef readonly uint64_t skipped
    cdef readonly uint64_t failed


# The garbage collector must not clear a table before its sessions, which use it when they are freed. It breaks the
# cycle table - host - session at one of the other two. This holds for the subclasses, too.
@cython.no_gc_clear
cdef class SessionRows:
    """The rows of one server's sessions in one C array, and the sessions they belong to."""
    cdef readonly Counters counters
    cdef readonly object host
    cdef type session_type
    cdef Row* rows
    cdef Copy* copies           # one for each row; NULL without a store
    cdef uint32_t used          # rows below it are or were in use
    cdef uint32_t capacity
    cdef Wheel wheel
    cdef uint32_t served_last   # a lane
    cdef uint32_t walks         # walks under way that would miss a session that is saved meanwhile
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
        cdef uint32_t slot = self.rows[FREE].prev  # the row freed last, which is still in the cache
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
        """How many ticks after `tick`, from 1 to `interval`, the place of a row comes."""
        cdef uint64_t part = (self.phase + slot * <uint64_t> 0x9E3779B97F4A7C15) >> 32
        cdef uint64_t place = part * (interval >> 32) + (part * (interval & 0xFFFFFFFF) >> 32)
        cdef uint64_t here = tick % interval
        return place - here if place > here else place + interval - here

    @cython.final
    cdef inline uint64_t next_due(self, uint32_t slot, uint64_t tick, uint64_t interval) noexcept:
        """When a row is due again if its data of `tick` is stored: at most an interval later."""
        cdef uint64_t ticks = self.ticks_to_place(slot, tick, interval)
        if tick >= self.rows[slot].deadline:  # it was saved by the timer, and perhaps late
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
        """The slot of a session; raises if it has none, belongs to another table, or this is the wrong thread."""
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
        """Raise `WrongLoopError` in any thread but the bound one, and after a fork."""
        self.check_thread()

    def bind_thread(self):
        """Refuse every other thread, and every forked child, from now on."""
        self.thread = current_thread()
        self.forked = fork_epoch
