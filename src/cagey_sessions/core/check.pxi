# The invariants of a table, and counts of the core's objects, for debug builds.
#
# What lives here: `check_everything`, which checks every structure against every other one, and `living`, which says
# how many objects of each type exist. What must not: repairs, and anything that costs time in a release build: there
# the checks are not called, and the objects are not counted.
#
# Invariants
#   - Debug builds check after every operation; a table of more than 2,048 rows only after every n-th, with n in
#     proportion to the rows, so that tests with thousands of users come to an end.
#   - An object is counted from its allocation to its release, even if its construction fails in between.
#
# Cost: a check O(capacity), and so bounded per operation; `living` O(1).

cdef enum:
    ALWAYS_CHECKED = 2048   # rows

cdef uint64_t checks_wanted = 0


cdef int check_table(SessionTable table) except -1:
    """Check everything after an operation; in a large table only after some operations."""
    global checks_wanted
    checks_wanted += 1
    if table.capacity > ALWAYS_CHECKED and checks_wanted % (table.capacity // (ALWAYS_CHECKED // 2)):
        return 0
    return check_everything(table)


cdef int check_everything(SessionTable table) except -1:
    cdef uint32_t slot, after, bucket, level, lane
    cdef uint64_t start, span, in_wheel = 0, in_lanes = 0, in_flight = 0, live = 0, keyed = 0, free = 0
    cdef uint64_t identified = 0, held = 0
    # Made before anything is read: an allocation may start a collection, and that may run any code.
    cdef set seen = set(), aged = set()
    for bucket in range(<uint32_t> FIRST_SLOT):
        slot = table.rows[bucket].next
        if bucket < BUCKETS:
            level = bucket // BUCKETS_PER_LEVEL
            assert listed(table.rows, bucket) == bool(
                table.wheel.occupied[level] >> (bucket % BUCKETS_PER_LEVEL) & 1), f"bitmap of bucket {bucket}"
        while slot != bucket and bucket not in (ANONYMOUS, IDENTIFIED, SILENT):
            after = table.rows[slot].next
            assert table.rows[after].prev == slot, f"links of slot {slot}"
            assert slot >= FIRST_SLOT and slot not in seen, f"slot {slot} is listed twice"
            seen.add(slot)
            if bucket < BUCKETS:
                assert table.rows[slot].state in (IDLE, ENDING), f"slot {slot} is in the wheel"
                assert table.rows[slot].state == ENDING or not table.rows[slot].flags & FLAG_SILENT
                in_wheel += 1
                if table.rows[slot].deadline > table.wheel.elapsed:
                    span = table.rows[slot].deadline >> (level * LEVEL_BITS)
                    assert span & (BUCKETS_PER_LEVEL - 1) == bucket % BUCKETS_PER_LEVEL, f"bucket of slot {slot}"
                    assert bucket == table.wheel.unfinished or level == 0 or (
                        span > table.wheel.elapsed >> (level * LEVEL_BITS)), f"slot {slot} lies behind"
            elif bucket <= PERIODIC:
                assert lane_of(table.rows[slot].state) == bucket, f"slot {slot} is in lane {bucket - URGENT}"
                in_lanes += 1
            else:
                assert table.rows[slot].state == GONE, f"slot {slot} is free"
                free += 1
            slot = after
    for lane in (ANONYMOUS, IDENTIFIED, SILENT):
        slot = table.rows[lane].newer
        while slot != lane:
            assert table.rows[table.rows[slot].newer].older == slot, f"age links of slot {slot}"
            assert slot not in aged
            aged.add(slot)
            if table.rows[slot].state != GONE:
                assert (table.rows[slot].flags & FLAG_SILENT != 0) == (lane == SILENT)
                assert lane == SILENT or ((<SessionCore> table.sessions[slot]).user_id is None) == (lane == ANONYMOUS)
            slot = table.rows[slot].newer
    cdef SessionCore session
    cdef uint64_t marks = 0
    assert <uint64_t> len(table.sessions) == table.used <= table.capacity
    for slot in range(FIRST_SLOT, table.used):
        if table.rows[slot].state == GONE:
            assert table.sessions[slot] is None, f"slot {slot} is gone and has a session"
            marks += slot in aged
            continue
        session = <SessionCore> table.sessions[slot]
        live += 1
        assert session.slot == slot, f"handle of slot {slot}"
        assert slot in aged, f"slot {slot} has no age"
        in_flight += has_save_in_flight(table.rows[slot].state)
        if session.user_id is not None:
            identified += 1
            held += (table.rows[slot].flags & FLAG_SILENT) != 0
            assert table.user_slot(session.user_id) == slot, f"user of slot {slot}"
        if session.key is not None:
            assert (table.key_slot(session.key) == slot) != is_ending(table.rows[slot].state), f"key of slot {slot}"
            keyed += not is_ending(table.rows[slot].state)
        assert table.rows[slot].acknowledged <= table.rows[slot].version
        assert not table.rows[slot].marks & MARKED_BEFORE or has_save_in_flight(table.rows[slot].state)
        assert not table.rows[slot].flags & FLAG_FINAL or is_ending(table.rows[slot].state), f"slot {slot} lives"
    assert table.by_key.used == keyed
    assert table.by_user.used == identified == table.counters.identified + held
    assert live == table.counters.created - table.counters.ended + table.counters.silent
    assert live + free + marks == table.used - FIRST_SLOT
    assert in_wheel == table.wheel.armed and in_lanes == table.counters.due and in_flight == table.counters.in_flight
    bucket = wheel_next_bucket(&table.wheel, &start)
    assert (bucket == NO_BUCKET) == (in_wheel == 0)
    for slot in range(FIRST_SLOT, table.used):
        if listed(table.rows, slot) and table.rows[slot].state in (IDLE, ENDING):
            assert start <= max(table.rows[slot].deadline, table.wheel.elapsed), "next_deadline is late"
    return 0


# Objects are counted by functions that a debug build puts into the slots of their types at import: counters in the
# classes themselves would give every session of a release build a destructor. Only `SessionCore` can be subclassed; its
# subclasses allocate by themselves, so sessions are counted where they are made. Objects of the other types are counted
# where they are allocated.

cdef extern from "Python.h":
    ctypedef struct Slots "PyTypeObject":
        Slots* tp_base
        PyObject* (*tp_new)(Slots*, PyObject*, PyObject*) noexcept
        PyObject* (*tp_alloc)(Slots*, Py_ssize_t) noexcept
        void (*tp_dealloc)(PyObject*) noexcept
    Slots* slots_of "Py_TYPE"(PyObject*) noexcept

COUNTED = (SessionCore, SessionTable, Counters, OldestFirst) if CAGEY_DEBUG else ()

cdef enum:
    MOST_COUNTED = 4

cdef Slots* counted[MOST_COUNTED]
cdef void (*released[MOST_COUNTED])(PyObject*) noexcept
cdef PyObject* (*allocated[MOST_COUNTED])(Slots*, Py_ssize_t) noexcept
cdef PyObject* (*made)(Slots*, PyObject*, PyObject*) noexcept
cdef int64_t alive[MOST_COUNTED]


cdef int place_of(Slots* kind) noexcept:
    cdef int place = 0
    while counted[place] is not kind:
        place += 1
        if place == MOST_COUNTED:
            place, kind = 0, kind.tp_base
    return place


cdef PyObject* count_made(Slots* kind, PyObject* arguments, PyObject* keywords) noexcept:
    cdef PyObject* session = made(kind, arguments, keywords)
    alive[0] += session is not NULL
    return session


cdef PyObject* count_allocated(Slots* kind, Py_ssize_t size) noexcept:
    cdef int place = place_of(kind)
    cdef PyObject* result = allocated[place](kind, size)
    alive[place] += result is not NULL
    return result


cdef void count_released(PyObject* dying) noexcept:
    cdef int place = place_of(slots_of(dying))
    alive[place] -= 1
    released[place](dying)


cdef void start_counting():
    global made
    cdef int place
    for place, kind in enumerate(COUNTED):
        counted[place] = <Slots*> <PyObject*> kind
        released[place] = counted[place].tp_dealloc
        counted[place].tp_dealloc = count_released
        if place:
            allocated[place] = counted[place].tp_alloc
            counted[place].tp_alloc = count_allocated
    if COUNTED:
        made = counted[0].tp_new
        counted[0].tp_new = count_made

start_counting()


def living():
    """How many objects of each type of the core exist, by name; empty in a release build, which does not count. O(1)."""
    return {kind.__name__: alive[place] for place, kind in enumerate(COUNTED)}
