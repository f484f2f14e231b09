# What must be true of a table at any time.
#
# What lives here: `check_table`, which verifies every structure against every other one. What must not: repairs. Debug
# builds run it after every operation; in release builds nobody calls it.
#
# Cost: O(capacity).

cdef int check_table(SessionTable table) except -1:
    cdef uint32_t slot, after, bucket, level, lane
    cdef uint64_t start, span, in_wheel = 0, in_lanes = 0, in_flight = 0, live = 0, identified = 0, free = 0
    cdef set seen = set()
    for bucket in range(<uint32_t> FIRST_SLOT):
        slot = table.rows[bucket].next
        if bucket < BUCKETS:
            level = bucket // BUCKETS_PER_LEVEL
            assert listed(table.rows, bucket) == bool(
                table.wheel.occupied[level] >> (bucket % BUCKETS_PER_LEVEL) & 1), f"bitmap of bucket {bucket}"
        while slot != bucket and bucket not in (ANONYMOUS, IDENTIFIED):
            after = table.rows[slot].next
            assert table.rows[after].prev == slot, f"links of slot {slot}"
            assert slot >= FIRST_SLOT and slot not in seen, f"slot {slot} is listed twice"
            seen.add(slot)
            if bucket < BUCKETS:
                assert table.rows[slot].state in (IDLE, ENDING), f"slot {slot} is in the wheel"
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
    cdef set aged = set()
    for lane in (ANONYMOUS, IDENTIFIED):
        slot = table.rows[lane].newer
        while slot != lane:
            assert table.rows[table.rows[slot].newer].older == slot, f"age links of slot {slot}"
            assert slot not in aged
            aged.add(slot)
            if table.rows[slot].state != GONE:
                assert ((<SessionCore> table.sessions[slot]).user_id is None) == (lane == ANONYMOUS)
            slot = table.rows[slot].newer
    cdef SessionCore session
    cdef uint64_t marks = 0
    for slot in range(FIRST_SLOT, table.capacity):
        if table.rows[slot].state == GONE:
            assert table.sessions[slot] is None, f"slot {slot} is gone and has a session"
            marks += slot in aged
            continue
        session = <SessionCore> table.sessions[slot]
        live += 1
        assert session.slot == slot and session.generation == table.rows[slot].generation, f"handle of slot {slot}"
        assert slot in aged, f"slot {slot} has no age"
        in_flight += has_save_in_flight(table.rows[slot].state)
        if session.user_id is not None:
            identified += 1
            assert table.by_user.get(session.user_id) is session, f"user of slot {slot}"
        if session.key is not None:
            assert (table.by_key.get(session.key) is session) != is_ending(table.rows[slot].state), f"key of slot {slot}"
        assert table.rows[slot].acknowledged <= table.rows[slot].version
        assert not table.rows[slot].marks & MARKED_BEFORE or has_save_in_flight(table.rows[slot].state)
    assert <uint64_t> len(table.by_user) == identified == table.counters.identified
    assert live == table.counters.created - table.counters.ended
    assert live + free + marks == table.capacity - FIRST_SLOT
    assert in_wheel == table.wheel.armed and in_lanes == table.counters.due and in_flight == table.counters.in_flight
    bucket = wheel_next_bucket(&table.wheel, &start)
    assert (bucket == NO_BUCKET) == (in_wheel == 0)
    for slot in range(FIRST_SLOT, table.capacity):
        if listed(table.rows, slot) and table.rows[slot].state in (IDLE, ENDING):
            assert start <= max(table.rows[slot].deadline, table.wheel.elapsed), "next_deadline is late"
    return 0
