# Reading bodies back: exactly what the text says, or an error.
#
# What lives here: the step from bytes to a value, and the check that nothing of the text is lost in it. What must not:
# richer types, and the other direction (`values.pxi`).
#
# A parser alone does not suffice. It reads an int that does not fit into 64 bits as a float, a number with more digits
# than a float has as the nearest float, one that is too small as 0, and of two members with the same name it keeps the
# second. The next save would overwrite what was there with that.
#
# Invariants
#   - If a value gives the same bytes when it is written again, nothing was lost, and nothing else is checked. All that
#     was written by this library is so.
#   - Any other text is walked once. An int has to fit. A float is accepted if it gives the digits of the text again
#     when it is written with as many digits as the text has, or with as few as it needs. The text has to have as many
#     members as the value.
#
# Cost: O(size). Writing again takes a third of the time of reading; the walk as much, and a microsecond for each float
# of more than 15 digits.

cdef enum:
    SURE_DIGITS = 15        # two decimal numbers of so many digits are different floats, too,
    SURE_EXPONENT = 290     # unless they are close to the largest or the smallest float
    MOST_DIGITS = 767       # no float has more

cdef enum Loss:
    NOTHING_LOST
    INT_TOO_WIDE
    NUMBER_TOO_LONG
    MEMBER_TWICE

cdef object orjson_loads = orjson.loads
cdef object JSONDecodeError = orjson.JSONDecodeError


cdef inline bint is_digit(unsigned char byte) noexcept nogil:
    return c'0' <= byte <= c'9'


cdef bint is_whole(const unsigned char* digits, Py_ssize_t count, bint negative) noexcept nogil:
    """Whether the parser reads digits as an int: from -2**63 to 2**64 - 1. JSON has no leading zeros."""
    if count < 19:
        return True
    if negative:
        return count == 19 and memcmp(digits, b"9223372036854775808", 19) <= 0
    return count == 19 or (count == 20 and memcmp(digits, b"18446744073709551615", 20) <= 0)


cdef bint is_named(bytes digits, Py_ssize_t exponent, bytes text) except -1:
    """Whether the float that a text is read as has these digits, the first one at the power of ten `exponent`."""
    cdef Py_ssize_t count = len(digits)
    if count > MOST_DIGITS:
        return False
    number, wanted = abs(float(text)), digits.decode()
    # The shortest text of a float; next to a power of two it is not the nearest one of its length, so it is tried
    # first.
    if repr(number).partition("e")[0].replace(".", "").strip("0") == wanted:
        return True
    mantissa, _, power = f"{number:.{count - 1}e}".partition("e")
    return mantissa.replace(".", "") == wanted and int(power) == exponent


cdef Py_ssize_t members_in(PyObject* value) noexcept:
    """How many members all objects in a parsed value have together."""
    cdef PyTypeObject* kind = type_of(value)
    cdef PyObject* key
    cdef PyObject* item
    cdef Py_ssize_t place = 0, count = 0
    if kind is &PyDict_Type:
        while next_of_dict(value, &place, &key, &item):
            count += 1 + members_in(item)
    elif kind is &PyList_Type:
        for place in range(size_of_list(value)):
            count += members_in(member_of(value, place))
    return count


cdef Loss loss_in(bytes body, value, Py_ssize_t* where) except *:
    """What was lost between a body, which is JSON, and the value that it was parsed to; and at which byte."""
    cdef const unsigned char* text = <const unsigned char*> PyBytes_AS_STRING(body)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body), at = 0, members = 0
    cdef Py_ssize_t start, whole, first, last, exponent, written
    cdef bint negative, negative_power, is_float
    while at < size:
        if text[at] == c'"':
            at += 1
            while text[at] != c'"':
                at += 2 if text[at] == c'\\' else 1
            at += 1
        elif text[at] == c':':
            members += 1
            at += 1
        elif text[at] == c'-' or is_digit(text[at]):
            where[0] = start = at
            negative = text[at] == c'-'
            at += negative
            first = last = -1  # digits that are not 0
            whole = 0  # digits before the point
            is_float = False
            while at < size and (is_digit(text[at]) or text[at] == c'.'):
                if text[at] == c'.':
                    is_float = True
                else:
                    whole += not is_float
                    if text[at] != c'0':
                        last = at
                        if first < 0:
                            first = at
                at += 1
            exponent = 0
            if at < size and text[at] | 0x20 == c'e':
                is_float = True
                at += 1
                negative_power = text[at] == c'-'
                at += text[at] == c'-' or text[at] == c'+'
                while at < size and is_digit(text[at]):
                    exponent = min(10 * exponent + (text[at] - c'0'), <Py_ssize_t> 1 << 40)
                    at += 1
                if negative_power:
                    exponent = -exponent
            if not is_float:
                if not is_whole(text + start + negative, whole, negative):
                    return INT_TOO_WIDE
                continue
            if first < 0:
                continue  # it is 0
            written = first - start - negative
            exponent += whole - 1 - written + (written > whole)
            if last - first < SURE_DIGITS and -SURE_EXPONENT < exponent < SURE_EXPONENT:
                continue
            if not is_named(body[first : last + 1].replace(b".", b""), exponent, body[start:at]):
                return NUMBER_TOO_LONG
        else:
            at += 1
    return NOTHING_LOST if members == members_in(<PyObject*> value) else MEMBER_TWICE


def decode_plain(bytes body not None, prefix="user_data: "):
    """Read a body, JSON in UTF-8, and return its value.

    Raises `EncodingError`, whose text begins with `prefix` and quotes nothing of the body, if it is not JSON, or if a
    value cannot represent it: an int that does not fit into 64 bits, a number with more digits than a float has, an
    object with two members of the same name. O(size).
    """
    cdef Py_ssize_t where = 0
    cdef Loss loss = NOTHING_LOST
    reason = ""
    try:
        value = orjson_loads(body)
    except JSONDecodeError as error:
        reason = f"not JSON in UTF-8, at character {error.pos}"
    if reason:
        raise EncodingError(f"{prefix}{reason}")  # not in the `except`: the parser's error, its context, holds the body
    try:
        again = call_one(orjson_dumps, value)
    except TypeError:  # orjson reads deeper nesting than it writes
        again = None
    if again == body:
        return value
    loss = loss_in(body, value, &where)
    if loss == INT_TOO_WIDE:
        reason = f"the int at byte {where} does not fit into 64 bits"
    elif loss == NUMBER_TOO_LONG:
        reason = f"the number at byte {where} has more digits, or is smaller, than a float can be"
    elif loss == MEMBER_TWICE:
        reason = "an object has two members of one name"
    else:
        return value
    raise EncodingError(f"{prefix}{reason}")
