# Prefetching: loading memory into the processor's cache before it is needed.
#
# What lives here: walks over the sessions that are saved next, and over their data, that do nothing but prefetch.
# What must not: any effect. Nothing is changed, counted or allocated here, no Python code runs, and every pointer is
# read from a live object.
#
# A million users do not fit into a cache. A save goes from a row to a session, to its data, and down a tree of objects,
# and at each step it would wait for memory. So each step is made for a whole group before the next one, and the waits
# of the group overlap: group prefetching (Chen, Ailamaki, Gibbons and Mowry, "Improving hash join performance through
# prefetching", ICDE 2004).
#
# Cost: O(group) and, with data, O(MOST_NODES).

cdef enum:
    MOST_NODES = 1024       # values of their data at a time
    DEPTH = 3               # levels of their data; deeper values mostly lie next to their container
    CACHE_LINE = 64

cdef extern from *:
    """
    /* Where the entries of a dict lie; only to be prefetched. */
    #define cagey_keys_of(dict) ((void*)((PyDictObject*)(dict))->ma_keys)
    #define cagey_values_of(dict) ((void*)((PyDictObject*)(dict))->ma_values)
    #define cagey_items_of(list) ((void*)((PyListObject*)(list))->ob_item)
    """
    char* keys_of "cagey_keys_of"(PyObject*) noexcept
    char* values_of "cagey_values_of"(PyObject*) noexcept
    char* items_of "cagey_items_of"(PyObject*) noexcept


cdef inline bint is_container(PyObject* value) noexcept:
    cdef PyTypeObject* kind = type_of(value)
    return kind is &PyDict_Type or kind is &PyList_Type


cdef inline void prefetch_object(PyObject* value) noexcept:
    """Prefetch the head of an object, and the next cache line, in case it lies across two."""
    prefetch(value)
    prefetch(<char*> value + 48)


cdef inline void prefetch_entries(PyObject* container) noexcept:
    """Prefetch the beginning of a container's table of members; the processor then fetches the rest in order."""
    cdef char* at
    if type_of(container) is &PyDict_Type:
        at = keys_of(container)
        prefetch(at)
        prefetch(at + CACHE_LINE)
        prefetch(at + 2 * CACHE_LINE)
        at = values_of(container)
        if at is not NULL:
            prefetch(at)
    else:
        at = items_of(container)
        if at is not NULL:
            prefetch(at)


cdef void prefetch_trees(PyObject** nodes, int count) noexcept:
    """Prefetch values and what is in them, level by level, up to MOST_NODES at a time. Overwrites `nodes`."""
    cdef PyObject* below[MOST_NODES]
    cdef PyObject** level = nodes
    cdef PyObject** next_level = below
    cdef PyObject** spare
    cdef PyObject* key
    cdef PyObject* item
    cdef int place, kept, found
    cdef Py_ssize_t at, size
    for _ in range(DEPTH):
        kept = 0
        for place in range(count):
            if is_container(level[place]):
                prefetch_entries(level[place])
                level[kept] = level[place]
                kept += 1
        found = 0
        for place in range(kept):
            at = 0
            if type_of(level[place]) is &PyDict_Type:
                while found < MOST_NODES and next_of_dict(level[place], &at, &key, &item):
                    prefetch(key)
                    prefetch(item)
                    next_level[found] = item
                    found += 1
            else:
                size = size_of_list(level[place])
                while found < MOST_NODES and at < size:
                    next_level[found] = member_of(level[place], at)
                    prefetch(next_level[found])
                    found += 1
                    at += 1
        spare, level, next_level = level, next_level, level
        count = found
