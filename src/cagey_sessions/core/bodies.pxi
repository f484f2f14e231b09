# Bodies read back: what the text says, of the same types, or nothing.
#
# What lives here: the one step from bytes to a value, and what makes sure that nothing of the text is lost in it. What
# must not: richer types, and the other direction (`values.pxi`).
#
# A parser alone would not do. An int that does not fit into 64 bits it reads as a float; of a number with more digits
# than a float has it keeps the nearest float, 0 for one that is too small; and of two members of one name it keeps the
# second. The next save would write that over what was there.
#
# Invariants
#   - A value that gives the very bytes when it is written again has lost nothing. So it is with whatever was written
#     here, and then nothing else is looked at.
#   - Any other text is walked once. An int fits, or it is refused. A float is taken if, written with as many digits as
#     the text has, or as few as it needs, it gives these digits. And the text has as many members as the value.
#
# Cost: O(size). Writing again takes a third of the time of reading; the walk as much, and a microsecond for each float
# of more than 15 digits.

cdef enum:
    SURE_DIGITS = 15        # decimal numbers of so many differ as floats, too,
    SURE_EXPONENT = 290     # where floats are not at their ends
    MOST_DIGITS = 767       # that a float ever has

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
    """Whether the parser reads an int as one: from -2**63 to 2**64 - 1. It has no zeros before its digits."""
    if count < 19:
        return True
    if negative:
        return count == 19 and memcmp(digits, b"9223372036854775808", 19) <= 0
    return count == 19 or (count == 20 and memcmp(digits, b"18446744073709551615", 20) <= 0)


cdef bint is_named(bytes digits, Py_ssize_t exponent, bytes text) except -1:
    """Whether the float of a text has these digits, the first of which stands for that power of ten."""
    cdef Py_ssize_t count = len(digits)
    if count > MOST_DIGITS:
        return False
    number, wanted = abs(float(text)), digits.decode()
    # the shortest text of a float, which beside a power of two is not the nearest of its length
    if repr(number).partition("e")[0].replace(".", "").strip("0") == wanted:
        return True
    mantissa, _, power = f"{number:.{count - 1}e}".partition("e")
    return mantissa.replace(".", "") == wanted and int(power) == exponent


cdef Py_ssize_t members_in(PyObject* value) noexcept:
    """How many members the objects of a parsed value have in all."""
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
    """What of a body, which is JSON, is not in the value that it was parsed to, and at which byte."""
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
    """The value of a body: JSON in UTF-8.

    Raises `EncodingError`, which begins with `prefix` and holds nothing of the body, for what is not JSON, and for what a
    value cannot hold as it is there: an int that does not fit into 64 bits, a number of more digits than a float has,
    an object with two members of one name. O(size).
    """
    cdef Py_ssize_t where = 0
    cdef Loss loss = NOTHING_LOST
    reason = ""
    try:
        value = orjson_loads(body)
    except JSONDecodeError as error:
        reason = f"not JSON in UTF-8, at character {error.pos}"
    if reason:
        raise EncodingError(f"{prefix}{reason}")  # out here: the error of the parser holds the whole body
    try:
        again = call_one(orjson_dumps, value)
    except TypeError:  # it reads deeper than it writes
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
