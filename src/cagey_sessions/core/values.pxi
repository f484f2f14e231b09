# Plain values, and their bytes.
#
# What lives here: a walk that tells JSON values of exactly the built-in types from everything else, the step from a
# value to its bytes, and the path to a value that is refused. What must not: richer types, and reading bytes.
#
# A serialiser alone does not suffice. It writes different values alike (a tuple and a list, nan and None), runs code of
# the values, and reads freed memory if that code changes the container that it is walking.
#
# Invariants
#   - From the first value of the walk until the bytes are complete no Python code runs, and nothing is allocated that
#     could start the garbage collector. So no container changes during the walk, and a body is the state of one moment.
#   - What is accepted is read back by orjson as the same values of the same types.
#   - The path is made only for a refusal: each level of the recursion adds its step on the way out.
#
# Cost: O(values), at most one for each byte allowed. The depth is bounded, so a container that holds itself ends, too.
# Most data is in no cache when it is saved, and the walk waits for memory. So it prefetches the next value while it
# checks one, which saves a tenth of the time, and the serialiser finds everything in the cache.

cdef enum:
    DEEPEST = 200           # levels of nesting; orjson writes 253 and reads 1,023
    AHEAD = 2               # members of a list
    SHOWN_FIRST = 8         # steps of a long path
    SHOWN_LAST = 4
    SHOWN_OF_KEY = 40       # characters of a long key

cdef enum Fault:
    NOT_PLAIN
    NOT_FINITE
    TOO_WIDE
    NOT_TEXT
    KEY_NOT_STR
    KEY_NOT_TEXT
    TOO_DEEP
    TOO_LARGE

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX
    ctypedef struct PyTypeObject:
        const char* tp_name
    PyTypeObject PyBool_Type, PyDict_Type, PyFloat_Type, PyList_Type, PyLong_Type, PyUnicode_Type
    PyTypeObject* type_of "Py_TYPE"(PyObject*) noexcept nogil
    bint is_none "Py_IsNone"(PyObject*) noexcept nogil
    double float_of "PyFloat_AS_DOUBLE"(PyObject*) noexcept nogil
    Py_ssize_t size_of_list "PyList_GET_SIZE"(PyObject*) noexcept nogil
    PyObject* member_of "PyList_GET_ITEM"(PyObject*, Py_ssize_t) noexcept nogil
    bint next_of_dict "PyDict_Next"(PyObject*, Py_ssize_t*, PyObject**, PyObject**) noexcept
    Py_ssize_t length_of "PyUnicode_GET_LENGTH"(PyObject*) noexcept nogil
    bint is_ascii "PyUnicode_IS_COMPACT_ASCII"(PyObject*) noexcept nogil
    int kind_of "PyUnicode_KIND"(PyObject*) noexcept nogil
    void* text_of "PyUnicode_DATA"(PyObject*) noexcept nogil
    object call_one "PyObject_CallOneArg"(object, object)

cdef extern from *:
    """
    /* A str made by an old C interface of Python 3.11 may not have its final form yet. */
    #if PY_VERSION_HEX < 0x030C0000
      #define cagey_ready(text) (PyUnicode_READY(text) == 0)
    #else
      #define cagey_ready(text) 1
    #endif
    /* Whether an int fits into 64 signed bits. */
    static inline int cagey_is_narrow(PyObject *number)
    {
        int overflow = 0;
    #if PY_VERSION_HEX < 0x030C0000
        if (Py_ABS(Py_SIZE(number)) * PyLong_SHIFT < 64)
            return 1;
    #else
        if (PyUnstable_Long_IsCompact((PyLongObject *)number))
            return 1;
    #endif
        (void)PyLong_AsLongLongAndOverflow(number, &overflow);
        return overflow == 0;
    }
    #if defined(__GNUC__)
      #define cagey_prefetch(at) __builtin_prefetch(at)
    #else
      #define cagey_prefetch(at) ((void)(at))
    #endif
    """
    bint is_ready "cagey_ready"(PyObject*) noexcept
    bint is_narrow "cagey_is_narrow"(PyObject*) noexcept
    void prefetch "cagey_prefetch"(const void*) noexcept nogil

cdef struct Walk:
    Py_ssize_t left                     # how many bytes the rest may take; each value counts with the least it can take
    Fault fault                         # this and all below is set by a refusal
    int depth                           # steps to the culprit
    PyObject* culprit
    PyObject* containers[DEEPEST]       # borrowed, only compared with each other
    PyObject* keys[DEEPEST]             # owned; NULL for a member of a list, whose index is below
    Py_ssize_t indexes[DEEPEST]

cdef object orjson_dumps = orjson.dumps


cdef bint has_surrogate(PyObject* text) noexcept:
    """Whether a str that is not ASCII has a lone surrogate. The loops are without branches, to be vectorised."""
    cdef const uint16_t* narrow
    cdef const uint32_t* wide
    cdef Py_ssize_t at
    cdef uint32_t found = 0
    if not is_ready(text):
        PyErr_Clear()
        return True
    cdef int kind = kind_of(text)
    cdef Py_ssize_t length = length_of(text)
    if kind == 2:
        narrow = <const uint16_t*> text_of(text)
        for at in range(length):
            found |= (narrow[at] & 0xF800u) == 0xD800u
    elif kind == 4:
        wide = <const uint32_t*> text_of(text)
        for at in range(length):
            found |= (wide[at] & 0xFFFFF800u) == 0xD800u
    return found != 0


cdef inline bint is_leaf(PyObject* value, Walk* walk) noexcept:
    """Whether a value is plain, is not a container, and is not too large for the bytes that are left."""
    cdef PyTypeObject* kind = type_of(value)
    cdef Py_ssize_t least
    if kind is &PyUnicode_Type:
        if not is_ascii(value) and has_surrogate(value):
            return False
        least = length_of(value) + 2
    elif kind is &PyLong_Type:
        if not is_narrow(value):
            return False
        least = 1
    elif kind is &PyFloat_Type:
        if not isfinite(float_of(value)):
            return False
        least = 3
    elif kind is &PyBool_Type or is_none(value):
        least = 4
    else:
        return False
    walk.left -= least
    return walk.left >= 0


cdef bint refused(Walk* walk, Fault fault, int depth, PyObject* culprit) noexcept:
    Py_INCREF(<object> culprit)
    walk.fault = fault
    walk.depth = depth
    walk.culprit = culprit
    return False


cdef bint accepted(PyObject* value, int depth, Walk* walk) noexcept:
    """Whether a value, `depth` levels down, is plain; if not, `walk` has the reason and the path."""
    cdef PyTypeObject* kind = type_of(value)
    cdef PyObject* key
    cdef PyObject* item
    cdef PyObject* next_key
    cdef PyObject* next_item
    cdef bint more
    cdef Py_ssize_t place = 0, size
    cdef bint is_dict = kind is &PyDict_Type
    if not is_dict and kind is not &PyList_Type:
        return is_leaf(value, walk) or refused(walk, fault_of(value, walk), depth, value)
    if depth == DEEPEST:
        return refused(walk, TOO_DEEP, depth, value)
    walk.left -= 2
    if walk.left < 0:
        return refused(walk, TOO_LARGE, depth, value)
    if is_dict:
        more = next_of_dict(value, &place, &next_key, &next_item)
        while more:
            key, item = next_key, next_item
            more = next_of_dict(value, &place, &next_key, &next_item)
            if more:
                prefetch(next_item)
            if type_of(key) is not &PyUnicode_Type:
                return refused(walk, KEY_NOT_STR, depth, key)
            if not is_ascii(key) and has_surrogate(key):
                return refused(walk, KEY_NOT_TEXT, depth, key)
            walk.left -= length_of(key) + 3
            if not is_leaf(item, walk) and not accepted(item, depth + 1, walk):
                Py_INCREF(<object> key)
                walk.containers[depth] = value
                walk.keys[depth] = key
                return False
    else:
        size = size_of_list(value)
        for place in range(size):
            if place + AHEAD < size:
                prefetch(member_of(value, place + AHEAD))
            item = member_of(value, place)
            if not is_leaf(item, walk) and not accepted(item, depth + 1, walk):
                walk.containers[depth] = value
                walk.keys[depth] = NULL
                walk.indexes[depth] = place
                return False
    return True


cdef Fault fault_of(PyObject* value, Walk* walk) noexcept:
    """Why a value that is not a container is refused."""
    cdef PyTypeObject* kind = type_of(value)
    if kind is &PyUnicode_Type and not is_ascii(value) and has_surrogate(value):
        return NOT_TEXT
    if kind is &PyLong_Type and not is_narrow(value):
        return TOO_WIDE
    if kind is &PyFloat_Type and not isfinite(float_of(value)):
        return NOT_FINITE
    return TOO_LARGE if walk.left < 0 else NOT_PLAIN


cdef str shown(key):
    """One step of a path, as in a Python expression; a long key is cut short."""
    if isinstance(key, int):
        return f"[{key}]"
    if len(key) > SHOWN_OF_KEY:
        key = key[: SHOWN_OF_KEY - 1] + "…"
    return f"[{orjson_dumps(key.encode('utf-8', 'replace').decode()).decode()}]"


def path_of(steps):
    """The path of a value in user data as a Python expression: ``user_data["bag"][3]`` for the steps ``"bag", 3``."""
    steps = list(steps)
    if len(steps) > SHOWN_FIRST + SHOWN_LAST:
        return f"{path_of(steps[:SHOWN_FIRST])}…{path_of(steps[-SHOWN_LAST:])[len('user_data'):]}"
    return "user_data" + "".join([shown(key) for key in steps])


def refusal(path, reason):
    """The `EncodingError` for a value. Its text does not contain the path: the names of members are user data, too."""
    if path == "user_data":
        return EncodingError(f"user_data: {reason}", path=path)
    return EncodingError(f"a value in user_data: {reason} (`path` of this error says where)", path=path)


cdef int holds_itself(Walk* walk) noexcept nogil:
    """How many steps down the first container is that contains itself; 0 if none does. The culprit is a container."""
    cdef int inner, outer
    for inner in range(1, walk.depth + 1):
        for outer in range(inner):
            if (walk.culprit if inner == walk.depth else walk.containers[inner]) is walk.containers[outer]:
                return inner
    return 0


cdef object error_of(Walk* walk, Py_ssize_t max_bytes):
    """The `EncodingError` of a refusal. It shows types, never values of the data."""
    cdef int at, depth = walk.depth, loop = 0
    cdef Fault fault = walk.fault
    if fault == TOO_DEEP:
        loop = holds_itself(walk)
    cdef PyObject* named = walk.containers[loop] if 0 < loop < depth else walk.culprit
    name = type_of(named).tp_name.decode("utf-8", "replace")[:80]
    number = float_of(walk.culprit) if fault == NOT_FINITE else 0.0
    steps = [walk.indexes[at] if walk.keys[at] is NULL else <object> walk.keys[at] for at in range(loop or depth)]
    remedy = "; encode= and decode= take richer types to JSON and back"
    if fault == NOT_FINITE:
        reason = f"{number} is not JSON; a number is finite"
    elif fault == TOO_WIDE:
        reason = "an int has to fit into 64 signed bits" + remedy
    elif fault == NOT_TEXT:
        reason = "a str with a lone surrogate is not valid text"
    elif fault == KEY_NOT_STR:
        reason = f"a key is exactly a str, not {name}" + remedy
    elif fault == KEY_NOT_TEXT:
        reason = "a key with a lone surrogate is not valid text"
    elif fault == TOO_DEEP and loop:
        reason = f"this {name} is inside itself"
    elif fault == TOO_DEEP:
        reason = f"values are nested at most {DEEPEST} deep"
    elif fault == TOO_LARGE:
        steps = []
        reason = f"takes more than the {max_bytes:,} bytes of max_bytes; keep less in it, or raise max_bytes"
    else:
        reason = f"{name} is not JSON; only exact dict, list, str, int, float, bool and None are" + remedy
    return refusal(path_of(steps), reason)


cdef void let_go(Walk* walk) noexcept:
    cdef int at
    Py_DECREF(<object> walk.culprit)
    for at in range(walk.depth):
        if walk.keys[at] is not NULL:
            Py_DECREF(<object> walk.keys[at])


cdef int require_plain(value, Py_ssize_t max_bytes) except -1:
    cdef Walk walk
    walk.left = max_bytes
    if accepted(<PyObject*> value, 0, &walk):
        return 0
    try:
        raise error_of(&walk, max_bytes)
    finally:
        let_go(&walk)


def is_plain(value):
    """Whether a value consists only of dict with str keys, list, str, int of 64 bits, finite float, bool and None."""
    cdef Walk walk
    walk.left = PY_SSIZE_T_MAX
    if accepted(<PyObject*> value, 0, &walk):
        return True
    let_go(&walk)
    return False


cdef bytes plain_bytes(value, Py_ssize_t max_bytes):
    require_plain(value, max_bytes)
    body = call_one(orjson_dumps, value)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
    if size > max_bytes:
        raise EncodingError(
            f"user_data: takes {size:,} bytes, more than the {max_bytes:,} of max_bytes; keep less in it, or raise max_bytes"
        )
    # Copied, because bodies are kept, and orjson does not shrink its buffer, which has 4 KB for a body of 300 bytes.
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(body), size)


def encode_plain(value, Py_ssize_t max_bytes=PY_SSIZE_T_MAX):
    """Encode a plain value as JSON in UTF-8, at most `max_bytes` of it.

    Raises `EncodingError`, with the path, for anything that is not exactly a dict with str keys, a list, a str, an int
    of 64 signed bits, a finite float, a bool or None, and for values nested more than 200 deep. O(size).
    """
    return plain_bytes(value, max_bytes)
