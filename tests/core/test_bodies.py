"""What is read of a body is what it says, or it is refused, with the place and nothing of its content."""

from __future__ import annotations

import json
import math
from decimal import Context, Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import EncodingError
from cagey_sessions._core import decode_plain, encode_plain
from support.plain_data import plain, shape

INTS = [0, 1, 10**17, 10**18, 2**53 + 1, 2**63 - 1, 2**63, 10**19, 2**64 - 1, -1, -(10**18), -(2**63)]
TOO_WIDE = [2**64, 2**64 + 1, 2 * 10**19, 10**20, -(2**63) - 1, -(10**19), -(2**64), 10**300]


@pytest.mark.parametrize("number", INTS)
def test_an_int_of_64_bits_is_read_as_it_is(number):
    for text in (f"{number}", f"[{number}]", f'{{"n": {number}}}', f"[1.50, {number} ]"):
        value = decode_plain(text.encode())
        assert shape(value) == shape(json.loads(text))


@pytest.mark.parametrize("number", TOO_WIDE)
def test_an_int_that_does_not_fit_is_refused_with_its_place(number):
    for before, after in (("", ""), ("[", "]"), ('{"a": "1\\"2", "n": ', "}"), ('[0, "\\\\", 1.50, ', " ]")):
        with pytest.raises(EncodingError, match=f"int at byte {len(before)} does not fit into 64 bits"):
            decode_plain(f"{before}{number}{after}".encode())


@pytest.mark.parametrize(
    "text",
    [
        *("0.1", "1.50", "1e3", "1E+3", "10.0e-1", "0.0", "-0.0", "0e5", "0e-999999999999999999999", "-0", "1e300"),
        *(
            "0.1000000000000000055511151231257827",
            "0.10000000000000001",
            "0.30000000000000004",
            "1.7976931348623157e308",
        ),
        *("5e-324", "4.94e-324", "2.2250738585072014e-308", "9007199254740992.0", "9007199254740994.000", "1e22"),
        *("123456789012345.00000000000000000000", "0.000000000000000000000000012500", "1000000000000000000000000.0"),
    ],
)
def test_a_float_is_read_where_its_digits_are_those_of_the_float(text):
    assert shape(decode_plain(text.encode())) == shape(orjson.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        *("9007199254740993.0", "12345678901234567.89", "3.14159265358979323846", "1e-400", "-1e-400", "3e-324"),
        *(
            "2.22507385850720138311e-308",
            "0.1000000000000000055511151231257828",
            "0." + "1" * 800,
            "1e-999999999",
        ),
        *("90071992547409.93", "0." + "0" * 400 + "1", "1.00000000000000000000000000000000000000000001"),
    ],
)
def test_a_number_that_no_float_is_is_refused_with_its_place(text):
    with pytest.raises(EncodingError, match="number at byte 12 has more digits, or is smaller, than a float can be"):
        decode_plain(f'{{"a":2, "n":{text}}}'.encode())


def is_exact(text: str) -> bool:
    """Whether a number is a float, to as many digits as it has; with decimal arithmetic, which shares no code."""
    wanted = Decimal(text)
    found = float(text)
    if not wanted or not math.isfinite(found):
        return not wanted
    if wanted == Decimal(repr(found)):
        return True
    digits = len(wanted.normalize(Context(prec=2000)).as_tuple().digits)
    return Context(prec=digits).create_decimal(Decimal(found)) == wanted


@given(
    st.integers(0, 10**40),
    st.integers(0, 10**20),
    st.integers(0, 25),
    st.none() | st.integers(-345, 290),
    st.booleans(),
)
def test_a_float_is_read_or_refused_as_decimal_arithmetic_says(whole, rest, zeros, power, negative):
    text = f"{'-' * negative}{whole}.{'0' * zeros}{rest}" + (f"e{power}" if power is not None else "")
    try:
        decode_plain(f"[{text} ]".encode())
    except EncodingError:
        assert not is_exact(text)
    else:
        assert is_exact(text)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 30))
def test_a_float_written_with_any_number_of_digits_it_needs_is_read(number, more):
    for text in (
        repr(number),
        f"{number:.16e}",
        f"{number:.{17 + more}e}",
        format(Decimal(number), "f") + ".0" * (number == int(number)),
    ):
        assert decode_plain(f"[ {text}]".encode()) == [number]


@pytest.mark.parametrize(
    "text",
    [
        *('{"a":1,"a":1}', '{"a":1,"b":2,"a":3}', '[[{"x":{"a":1, "\\u0061":2}}]]', '{"":0,"":0}'),
        '{"deep":' + '{"deep":' * 100 + "1" + "}" * 100 + ',"deep":2}',
    ],
)
def test_two_members_of_one_name_are_refused(text):
    with pytest.raises(EncodingError, match="user_data: an object has two members of one name"):
        decode_plain(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        *('{ "a:b" : ":" , "c" : [ { "a:b" : "\\\\" } , { "a:b" : "\\":" } ] }', " [ ] ", '{"a":{}, "b":{"a":{}}}'),
        *('"1e999 18446744073709551616 \\" 18446744073709551616"', '{"18446744073709551616":1, "-1e-999":2}'),
        "[" * 300 + "]" * 300,
    ],
)
def test_what_stands_in_strings_and_between_values_is_no_number_and_no_member(text):
    assert shape(decode_plain(text.encode())) == shape(orjson.loads(text))


@given(plain, st.sampled_from([None, 1]), st.booleans())
def test_whatever_another_program_writes_of_plain_data_is_read(value, indent, ascii_only):
    for body in (encode_plain(value), json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()):
        assert shape(decode_plain(body)) == shape(value)


@pytest.mark.parametrize("body", [b"", b"{", b"NaN", b"1e400", b"\xff", b'"\\ud800"', b"1" * 400, b"[" * 2000])
def test_what_is_no_json_is_refused_and_the_error_holds_nothing_of_it(body):
    with pytest.raises(EncodingError, match="line 3: not JSON in UTF-8, at character") as caught:
        decode_plain(body, "line 3: ")
    assert caught.value.__context__ is None


@pytest.mark.parametrize("body", [b'{"canary":1,"canary":2}', b'["canary", 18446744073709551616]', b"[1e-999]"])
def test_an_error_holds_nothing_of_the_body(body):
    with pytest.raises(EncodingError) as caught:
        decode_plain(body)
    assert "canary" not in str(caught.value) and "999" not in str(caught.value) and "1844" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize("body", [None, "{}", bytearray(b"{}"), memoryview(b"{}"), 1])
def test_a_body_is_bytes(body: Any):
    with pytest.raises(TypeError):
        decode_plain(body)
