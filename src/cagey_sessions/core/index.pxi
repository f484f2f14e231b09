# An index of slots by hash.
#
# What lives here: an open-addressing table of pairs, slot and hash. What must not: keys, users, and what equality is -
# a lookup walks the entries with its hash, and the caller compares the sessions in these slots.
#
# A dict would keep the hash, the key and the session, 24 bytes each, beside its own table, although the session knows
# its key: 31 bytes a session at a million of them, 42 for an int. This takes 17, grows without reading a single
# session, and leaves no tombstones: a removal moves the entries that follow back towards their home.
#
# Invariants
#   - An entry with slot 0 is empty. An entry lies at its home, `hash & mask`, or after it with no empty entry between.
#   - At most three quarters of the entries are in use, so every walk ends.
#
# Cost: O(1) expected; `index_reserve` O(1) amortised. Hashes are mixed with a secret number, because users may choose
# what is hashed: otherwise one could make all lookups slow.

cdef enum:
    INITIAL_ENTRIES = 64


cdef struct Entry:
    uint32_t slot
    uint32_t hash


cdef struct Index:
    Entry* entries
    uint64_t mask
    uint64_t used


cdef inline uint64_t mixed(uint64_t number) noexcept nogil:
    """The last step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): each bit of the result depends on every bit."""
    number = (number ^ (number >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    number = (number ^ (number >> 27)) * <uint64_t> 0x94D049BB133111EB
    return number ^ number >> 31


cdef int index_init(Index* index) except -1:
    index.entries = <Entry*> PyMem_RawCalloc(INITIAL_ENTRIES, sizeof(Entry))
    if index.entries is NULL:
        raise MemoryError("no memory for an index")
    index.mask = INITIAL_ENTRIES - 1
    index.used = 0
    return 0


cdef inline void index_put(Index* index, uint32_t hash, uint32_t slot) noexcept nogil:
    """Add an entry that is not in the index yet; `index_reserve` has made room for it."""
    cdef uint64_t at = hash & index.mask
    while index.entries[at].slot:
        at = (at + 1) & index.mask
    index.entries[at].slot = slot
    index.entries[at].hash = hash
    index.used += 1


cdef int index_grow(Index* index) except -1:
    """Double the room. Entries are read in order and written in order, in two runs, which caches handle well."""
    cdef Index larger
    cdef uint64_t at
    larger.mask = index.mask * 2 + 1
    larger.used = 0
    larger.entries = <Entry*> PyMem_RawCalloc(larger.mask + 1, sizeof(Entry))
    if larger.entries is NULL:
        raise MemoryError("no memory for more sessions")
    for at in range(index.mask + 1):
        if index.entries[at].slot:
            index_put(&larger, index.entries[at].hash, index.entries[at].slot)
    PyMem_RawFree(index.entries)
    index[0] = larger
    return 0


cdef inline int index_reserve(Index* index) except -1:
    """Make room for one more."""
    if index.used >= (index.mask + 1) // 4 * 3:
        index_grow(index)
    return 0


cdef bint index_remove(Index* index, uint32_t hash, uint32_t slot) noexcept nogil:
    """Remove an entry; returns whether it was there."""
    cdef uint64_t hole = hash & index.mask, at
    while index.entries[hole].slot != slot:
        if index.entries[hole].slot == 0:
            return False
        hole = (hole + 1) & index.mask
    at = hole
    while True:
        at = (at + 1) & index.mask
        if index.entries[at].slot == 0:
            break
        # an entry may move into the hole unless its home lies after the hole: a walk from its home would not find it
        if ((at - index.entries[at].hash) & index.mask) >= ((at - hole) & index.mask):
            index.entries[hole] = index.entries[at]
            hole = at
    index.entries[hole].slot = 0
    index.used -= 1
    return True
