# Which values are plain data.
#
# What lives here: a walk that tells JSON values of exactly the built-in types from everything else. What must not:
# serialising. A serialiser runs code of the values it meets, and calls values equal that are not.
#
# Invariants: no Python code runs during the walk, so no container can change under it.
#
# Cost: O(values); the depth is bounded.

cdef enum:
    DEEPEST = 200           # less than what orjson writes (253) and reads (1,023)


cdef bint is_plain_value(value, int depth) except -1:
    cdef PyObject* key
    cdef PyObject* item
    cdef Py_ssize_t place = 0
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return True
    if kind is float:
        return isfinite(<double> value)
    if depth == 0:
        return False
    if kind is dict:
        while PyDict_Next(value, &place, &key, &item):
            if type(<object> key) is not str or not is_plain_value(<object> item, depth - 1):
                return False
        return True
    if kind is list:
        for member in <list> value:
            if not is_plain_value(member, depth - 1):
                return False
        return True
    return False


def is_plain(value):
    """Whether a value is made of dict with str keys, list, str, int, finite float, bool and None, and of nothing else."""
    return bool(is_plain_value(value, DEEPEST))
