# A hierarchical timing wheel over slot numbers.
#
# What lives here: arming, disarming, advancing, and the next deadline. What must not: any Python object, and what a
# deadline is for. A caller that moves rows between the wheel and another list does so with the functions below.
#
# The shape is that of Varghese and Lauck ("Hashed and hierarchical timing wheels", SOSP 1987) as tokio lays it out:
# 64 buckets a level, a bitmap of the occupied ones for each level, and the level of a deadline is the highest group of
# six bits in which it differs from the tick already elapsed. Eleven levels cover all 64 bits, so no deadline wraps.
#
#   level 0: one tick a bucket, 64 ticks          level 2: 4,096 ticks a bucket
#   level 1: 64 ticks a bucket, 4,096 ticks       ...
#
# Invariants
#   - A deadline in bucket b of level L shares with `elapsed` every group of bits above L. So an occupied bucket never
#     lies behind the current one, and nothing in a level is later than anything in a level above it.
#   - The current bucket of a level above 0 is occupied only while it is being emptied by a bounded `wheel_advance`;
#     `unfinished` names it, and it comes before everything else, because rows already cascaded out of it may be later.
#   - Time moves from bucket to bucket. A deadline at or before `elapsed` waits in the current bucket of level 0.
#
# Cost: arm and disarm O(1); `wheel_next` O(1), one look at each level's bitmap; `wheel_advance` O(limit) rows, and each
# row cascades at most once a level before it is due.

cdef enum:
    LEVEL_BITS = 6
    BUCKETS_PER_LEVEL = 64
    LEVELS = 11
    BUCKETS = 704           # LEVELS * BUCKETS_PER_LEVEL
    NO_BUCKET = 704
    GROUP = 32              # how many rows ahead memory is prefetched


cdef struct Wheel:
    uint64_t elapsed
    uint64_t occupied[LEVELS]
    uint32_t armed          # rows in the wheel
    uint32_t unfinished     # the bucket in which a bounded advance stopped, or NO_BUCKET


cdef struct Trail:
    uint32_t count
    uint32_t slots[GROUP]   # the last GROUP rows, as a ring


cdef inline void follow(Trail* trail, Row* rows, uint32_t slot) noexcept nogil:
    """Note a row that is put on a list, in the row GROUP places before it; when that is due, this can be prefetched."""
    cdef uint32_t place = trail.count % GROUP
    if trail.count >= GROUP:
        rows[trail.slots[place]].ahead = slot
    trail.slots[place] = slot
    trail.count += 1


cdef inline void list_append(Row* rows, uint32_t sentinel, uint32_t slot) noexcept nogil:
    cdef uint32_t last = rows[sentinel].prev
    rows[slot].prev = last
    rows[slot].next = sentinel
    rows[last].next = slot
    rows[sentinel].prev = slot


cdef inline uint32_t list_remove(Row* rows, uint32_t slot) noexcept nogil:
    """Unlink a row; returns the sentinel of its list if that is empty now, otherwise 0xFFFFFFFF."""
    cdef uint32_t after = rows[slot].next, before = rows[slot].prev
    rows[before].next = after
    rows[after].prev = before
    rows[slot].next = rows[slot].prev = slot
    return after if after == before else <uint32_t> -1


cdef inline bint listed(Row* rows, uint32_t slot) noexcept nogil:
    return rows[slot].next != slot


cdef void wheel_init(Wheel* wheel) noexcept nogil:
    memset(wheel, 0, sizeof(Wheel))
    wheel.unfinished = NO_BUCKET


cdef inline void wheel_arm(Wheel* wheel, Row* rows, uint32_t slot, uint64_t deadline) noexcept nogil:
    """Put a row that is on no list into the bucket of its deadline."""
    cdef uint64_t place = deadline if deadline > wheel.elapsed else wheel.elapsed
    cdef uint64_t differs = place ^ wheel.elapsed
    cdef uint32_t level = highest_bit(differs) // LEVEL_BITS if differs else 0
    cdef uint32_t bucket = <uint32_t> (place >> (level * LEVEL_BITS)) & (BUCKETS_PER_LEVEL - 1)
    rows[slot].deadline = deadline
    list_append(rows, level * BUCKETS_PER_LEVEL + bucket, slot)
    wheel.occupied[level] |= <uint64_t> 1 << bucket
    wheel.armed += 1


cdef inline void bucket_emptied(Wheel* wheel, uint32_t bucket) noexcept nogil:
    wheel.occupied[bucket // BUCKETS_PER_LEVEL] &= ~(<uint64_t> 1 << (bucket % BUCKETS_PER_LEVEL))
    if wheel.unfinished == bucket:
        wheel.unfinished = NO_BUCKET


cdef inline void wheel_disarm(Wheel* wheel, Row* rows, uint32_t slot) noexcept nogil:
    """Take a row out of its bucket."""
    cdef uint32_t emptied = list_remove(rows, slot)
    wheel.armed -= 1
    if emptied < BUCKETS:
        bucket_emptied(wheel, emptied)


cdef inline void unlist(Wheel* wheel, Row* rows, uint32_t slot) noexcept nogil:
    """Take a row off the list that it is on: a bucket, a lane, or none."""
    if not listed(rows, slot):
        return
    if rows[slot].state == IDLE or rows[slot].state == ENDING:
        wheel_disarm(wheel, rows, slot)
    else:
        list_remove(rows, slot)


cdef uint32_t wheel_next_bucket(Wheel* wheel, uint64_t* start) noexcept nogil:
    """The first bucket that is occupied, and the tick at which it starts; NO_BUCKET and NEVER if the wheel is empty."""
    cdef uint32_t level, bucket, shift
    cdef uint64_t ahead, above
    if wheel.unfinished != NO_BUCKET:
        start[0] = wheel.elapsed
        return wheel.unfinished
    for level in range(<uint32_t> LEVELS):
        shift = level * LEVEL_BITS
        bucket = <uint32_t> (wheel.elapsed >> shift) & (BUCKETS_PER_LEVEL - 1)
        ahead = wheel.occupied[level] >> bucket
        if ahead:
            bucket += lowest_bit(ahead)
            above = shift + LEVEL_BITS
            start[0] = (wheel.elapsed >> above << above if above < 64 else 0) | <uint64_t> bucket << shift
            return level * BUCKETS_PER_LEVEL + bucket
    start[0] = NEVER
    return NO_BUCKET


cdef uint64_t wheel_next(Wheel* wheel) noexcept nogil:
    """A tick at or before the next deadline: exact in level 0, the start of its bucket in others; NEVER if empty."""
    cdef uint64_t start
    wheel_next_bucket(wheel, &start)
    return start


cdef uint32_t wheel_pop(Wheel* wheel, Row* rows, uint64_t now, uint32_t* budget) noexcept nogil:
    """Move time towards `now` until a row is due; returns its slot, taken off the list, or 0.

    Each row that is due or cascades takes one from the budget. If it returns 0 and the budget is used up, there may be
    more to do at this tick, and the next call continues with the unfinished bucket. If it returns 0 and some of the
    budget is left, `elapsed` has reached `now`.
    """
    cdef uint64_t start
    cdef uint32_t bucket, slot, emptied
    while budget[0]:
        bucket = wheel_next_bucket(wheel, &start)
        if start > now or bucket == NO_BUCKET:
            if now > wheel.elapsed:
                wheel.elapsed = now
            return 0
        if start > wheel.elapsed:
            wheel.elapsed = start
        if bucket >= BUCKETS_PER_LEVEL:
            wheel.unfinished = bucket
        while budget[0]:
            slot = rows[bucket].next
            prefetch(&rows[rows[slot].ahead])
            budget[0] -= 1
            emptied = list_remove(rows, slot)
            wheel.armed -= 1
            if emptied == bucket:
                bucket_emptied(wheel, bucket)
            if rows[slot].deadline <= wheel.elapsed:
                return slot
            wheel_arm(wheel, rows, slot, rows[slot].deadline)
            if emptied == bucket:
                break
    return 0
