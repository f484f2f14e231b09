# Saves of many sessions at a time.
#
# What lives here: taking the sessions that are due, encoding and acknowledging them, one batch in one call, for
# ordinary saves. What must not: a clock, a store, and saves that are not ordinary - these are left to the caller, one
# session at a time.
#
# A save is ordinary if the timer wants it and no caller waits for it, the one before it succeeded, the session is not
# being ended, the data can be encoded, and the store answers that it is saved. Nearly all saves are.
#
# Invariants
#   - The save of every session in a batch is in flight. `settle`, `hand_over` and `left_out` take sessions out of it, each
#     session once; what they do not settle is the caller's to settle.
#   - Between fixing the body, version, epoch and user id of a session no Python code runs but the encoder. What that
#     may have changed is checked after it.
#
# Cost: O(1) a session besides its bytes.

cdef enum:
    MOST_IN_BATCH = 256

cdef extern from *:
    """
    /* An instance of a subclass of tuple that adds nothing to it, such as a NamedTuple; its items are still to be set. */
    static inline PyObject *cagey_new_tuple_like(PyObject *type, Py_ssize_t size)
    {
        return ((PyTypeObject *)type)->tp_alloc((PyTypeObject *)type, size);
    }
    #define PyTuple_GET_ITEM_0(target) PyTuple_GET_ITEM(target, 0)
    """
    PyObject* first_item "PyTuple_GET_ITEM_0"(object)
    tuple new_tuple_like "cagey_new_tuple_like"(object, Py_ssize_t)


cdef struct Save:
    uint32_t slot
    uint64_t version
    uint64_t taken_at


cdef inline void fill_item(tuple target, Py_ssize_t place, item) noexcept:
    Py_INCREF(item)
    PyTuple_SET_ITEM(target, place, item)


@cython.final
cdef class SaveBatches:
    """Makes the batches of one table.

    `record` is the NamedTuple that a save is sent as: (user_id, epoch, owner, version, schema, body, saved_at,
    release). `verdict` is the NamedTuple of the answer; its first item is one of `saved` if the bytes are stored.
    `dump` encodes a session's data; without it that is done by `encode_plain` with `max_bytes`.
    """
    cdef SessionTable table
    cdef object record, verdict, owner, schema, dump
    cdef tuple saved
    cdef Digest digest
    cdef Py_ssize_t max_bytes

    def __cinit__(self, SessionTable table not None, Digest digest not None, *, record, verdict, tuple saved not None,
                  owner, schema, dump=None, Py_ssize_t max_bytes=PY_SSIZE_T_MAX):
        table.require_copies()
        for kind in (record, verdict):
            if not (isinstance(kind, type) and issubclass(kind, tuple)):
                raise UsageError("records and verdicts are named tuples")
        self.table = table
        self.digest = digest
        self.record = record
        self.verdict = verdict
        self.saved = saved
        self.owner = owner
        self.schema = schema
        self.dump = dump
        self.max_bytes = max_bytes

    def has_due(self):
        """Whether a batch would take any session now. O(1)."""
        cdef uint32_t slot = self.table.rows[PERIODIC].next
        return slot != PERIODIC and self.table.rows[slot].failures == 0

    def fixed(self, SessionCore session not None):
        """The version last encoded and the digest of its bytes; version 0 before the first. O(1)."""
        cdef uint32_t slot = self.table.slot_of(session)
        return self.table.rows[slot].version, self.table.copies[slot].digest

    def batch(self):
        """An empty batch."""
        cdef SaveBatch batch = SaveBatch.__new__(SaveBatch)
        batch.plan = self
        batch.table = self.table
        batch.records = []
        batch.sessions = []
        batch.excluded = []
        return batch

    cdef bytes body_of(self, data):
        if self.dump is None:
            return plain_bytes(data, self.max_bytes)
        return self.dump(data)


@cython.final
cdef class SaveBatch:
    """Saves that are taken, sent and answered together; `len` is how many of them are not settled yet.

    Made by `SaveBatches.batch`.
    """
    cdef SaveBatches plan
    cdef SessionTable table
    cdef readonly list records
    cdef readonly Py_ssize_t size           # bytes of all bodies
    cdef readonly uint64_t unchanged        # how many were stored already as they are
    cdef list sessions                      # None once settled or handed over
    cdef list excluded
    cdef SessionCore taking                 # and the version it had
    cdef uint64_t version
    cdef Py_ssize_t left
    cdef Save saves[MOST_IN_BATCH]

    def __init__(self):
        raise UsageError("batches are made by `SaveBatches.batch`")

    def __len__(self):
        return self.left

    def under_way(self):
        """The sessions whose saves are not settled yet. O(batch)."""
        return [session for session in self.sessions if session is not None]

    cdef void prefetch_due(self, int count) noexcept:
        """Prefetch the sessions that are taken next, and their data."""
        cdef SessionTable table = self.table
        cdef PyObject* nodes[MOST_NODES]
        cdef uint32_t slots[GROUP]
        cdef uint32_t slot = table.rows[PERIODIC].next
        cdef int found = 0, place
        while slot != PERIODIC and found < count:
            prefetch(&table.rows[table.rows[slot].ahead])
            prefetch(item_at(table.sessions, slot))
            prefetch(&table.copies[slot])
            slots[found] = slot
            found += 1
            slot = table.rows[slot].next
        for place in range(found):
            nodes[place] = PyList_GET_ITEM(table.sessions, slots[place])
            prefetch_object(nodes[place])
        for place in range(found):
            prefetch(<PyObject*> (<SessionCore> nodes[place]).user_id)
            nodes[place] = <PyObject*> (<SessionCore> nodes[place]).data
            prefetch(nodes[place])
        if self.plan.dump is None:
            prefetch_trees(nodes, found)

    def fill(self, uint32_t rows, Py_ssize_t size, uint64_t now, uint64_t interval, saved_at):
        """Take up to `rows` sessions that are due, until their bodies have `size` bytes; returns how many were taken.

        `now` is the current tick, and `saved_at` the wall-clock time for the records. A session that has not changed
        counts as saved, and is due again within `interval` ticks. One that cannot be encoded, or is asked for
        meanwhile, is left to `left_out`. O(rows + bytes).
        """
        cdef SessionTable table = self.table
        cdef SessionCore session
        cdef uint32_t taken = 0, slot
        cdef bytes body
        table.check_thread()
        require_interval(interval)
        require_time(now, interval)
        self.set_aside()  # one may be left over from a call that raised
        while taken < rows and size > 0 and len(self.sessions) < MOST_IN_BATCH:
            if taken % GROUP == 0:
                self.prefetch_due(<int> min(rows - taken, <uint32_t> GROUP))
            slot = table.rows[PERIODIC].next
            if slot == PERIODIC or table.rows[slot].failures != 0:
                break
            session = table.session_at(slot)
            self.taking = session  # until its record is complete: if anything raises, `set_aside` finds it here
            self.version = table.rows[slot].version
            list_remove(table.rows, slot)
            step(&table.rows[slot], TAKE)
            table.counters.due -= 1
            table.counters.in_flight += 1
            taken += 1
            try:
                body = self.plan.body_of(session.data)
            except Exception:
                self.set_aside()
                continue
            if not self.send(session, body, now, interval, saved_at):
                self.set_aside()
            self.taking = None
            size -= PyBytes_GET_SIZE(body)
        if CAGEY_DEBUG:
            check_table(table)
        return taken

    cdef int set_aside(self) except -1:
        """Leave the session that is being taken to `left_out`."""
        if self.taking is not None:
            self.excluded.append((self.taking, self.version))
            self.taking = None
        return 0

    cdef bint send(self, SessionCore session, bytes body, uint64_t now, uint64_t interval, saved_at) except -1:
        """Fix a body as the next version, and add its record; False if this save turns out not to be ordinary."""
        cdef SessionTable table = self.table
        cdef uint64_t version = self.version, digest = self.plan.digest.of(body)
        # Made before the row is read: an allocation may start a collection, and that may run any code.
        cdef tuple record = new_tuple_like(self.plan.record, 8)
        cdef uint32_t slot = table.in_flight_slot(session, version)
        if slot == 0:
            return True  # the session was forgotten while it was encoded
        cdef Row* row = &table.rows[slot]
        if row.state != SAVING:
            return False
        cdef bint is_new = version == 0 or table.copies[slot].digest != digest
        if is_new and version >= LAST_VERSION:
            return False
        if not is_new and version == row.acknowledged:
            self.unchanged += 1
            if row.marks:
                row.marks = MARKED_BEFORE
            table.settle_saved(slot, now, True, table.next_due(slot, now, interval))
            return True
        version += is_new
        fill_item(record, 0, session.user_id)
        fill_item(record, 1, table.copies[slot].epoch)
        fill_item(record, 2, self.plan.owner)
        fill_item(record, 3, version)
        fill_item(record, 4, self.plan.schema)
        fill_item(record, 5, body)
        fill_item(record, 6, saved_at)
        fill_item(record, 7, False)
        cdef Py_ssize_t place = len(self.sessions)
        self.sessions.append(None)
        self.records.append(record)
        self.sessions[place] = session  # nothing below can fail, so the batch and the row cannot differ
        if row.marks:
            row.marks = MARKED_BEFORE
        row.version = version
        table.copies[slot].digest = digest
        self.saves[place].slot = slot
        self.saves[place].version = version
        self.saves[place].taken_at = now
        self.left += 1
        self.size += PyBytes_GET_SIZE(body)
        return True

    def left_out(self):
        """Take out the sessions whose saves are not ordinary, as (session, version). Their bytes are not fixed."""
        self.set_aside()
        excluded, self.excluded = self.excluded, []
        return excluded

    def settle(self, list verdicts not None, uint64_t interval, dict watched not None):
        """Acknowledge all saves if every verdict says that the bytes are stored; otherwise change nothing, return None.

        Each session is due again within `interval` ticks after it was taken. Returns the sessions that are left for
        `hand_over`: those in `watched`, and those that are asked for or being ended by now. O(batch).
        """
        cdef SessionTable table = self.table
        cdef Py_ssize_t place
        cdef uint32_t slot
        cdef uint64_t taken_at
        table.check_thread()
        require_interval(interval)
        if len(verdicts) != len(self.records):
            return None
        for verdict in verdicts:
            if type(verdict) is not self.plan.verdict or not verdict or not self.is_saved(verdict):
                return None
        cdef list left = []
        cdef Trail trail
        trail.count = 0
        for place in range(len(self.sessions)):
            slot = self.saves[place].slot
            prefetch(&table.rows[table.rows[slot].older])
            prefetch(&table.rows[table.rows[slot].newer])
        for place in range(len(self.sessions)):
            session = self.sessions[place]
            if session is None:
                continue
            slot = table.in_flight_slot(<SessionCore> session, self.saves[place].version)
            if slot == 0:  # the session was forgotten
                self.take_out(place)
            elif table.rows[slot].state != SAVING or (watched and session in watched):
                left.append(session)
            else:
                self.take_out(place)
                taken_at = self.saves[place].taken_at
                table.settle_saved(slot, taken_at, True, table.next_due(slot, taken_at, interval))
                follow(&trail, table.rows, slot)
        if CAGEY_DEBUG:
            check_table(table)
        return left

    cdef bint is_saved(self, verdict):
        cdef PyObject* outcome = first_item(verdict)
        for stored in self.plan.saved:
            if outcome is <PyObject*> stored:
                return True
        return False

    cdef void take_out(self, Py_ssize_t place) noexcept:
        self.sessions[place] = None
        self.left -= 1

    def hand_over(self):
        """Take out all sessions that are left, as (session, version, digest, place in `records`). O(batch)."""
        cdef SessionTable table = self.table
        cdef list handed = []
        cdef Py_ssize_t place
        cdef uint32_t slot
        if not self.left:
            return handed
        for place in range(len(self.sessions)):
            session = self.sessions[place]
            if session is None:
                continue
            slot = (<SessionCore> session).slot
            handed.append((session, self.saves[place].version, table.copies[slot].digest if slot else 0, place))
            self.take_out(place)
        return handed
