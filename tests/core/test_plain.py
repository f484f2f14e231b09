"""What is stored is what comes back, of the same types, or it is refused with its path and nothing of its content."""

from __future__ import annotations

import enum
import json
import math
import os
import sys
import tracemalloc
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import orjson
import pytest
from hypothesis import given, settings

from cagey_sessions import EncodingError
from cagey_sessions._core import encode_plain, is_plain, path_of
from cagey_sessions.data.encoding import MAX_BYTES
from support.plain_data import plain, shape


@pytest.mark.guarantee("I16")
@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(plain)
def test_what_is_plain_comes_back_the_same(value):
    """Against the standard library's parser, which shares no code with ours."""
    body = encode_plain(value)
    assert is_plain(value)
    assert shape(json.loads(body)) == shape(value)
    assert shape(orjson.loads(body)) == shape(value)


@pytest.mark.parametrize(
    "value",
    [
        *(0, 1, True, False, None, 1.0, -0.0, 0.1, 5e-324, 1.7e308, 2**63 - 1, -(2**63), 2**53 + 1, "", "\0", "é"),
        *("\x7f\x80\xff", "\ud7ff\ue000", "\U0001f600", "\U0010ffff", '"\\\n\u2028', "x" * 5000, "é" * 5000),
    ],
    ids=repr,
)
def test_the_edges_of_what_is_plain_come_back_the_same(value):
    for holder in (value, [value], {"k": value}, [[], {}, {"": [value, value]}]):
        assert shape(orjson.loads(encode_plain(holder))) == shape(holder)


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Real(float):
    pass


class Colour(enum.Enum):
    RED = "red"


class Rank(enum.IntEnum):
    LOW = 1


class Kind(enum.StrEnum):
    A = "a"


class Pair(NamedTuple):
    left: int
    right: int


@dataclass
class Plain:
    x: int = 1


REFUSED = [
    (math.nan, "nan is not JSON"),
    (math.inf, "inf is not JSON"),
    (-math.inf, "-inf is not JSON"),
    (2**63, "64 signed bits"),
    (-(2**63) - 1, "64 signed bits"),
    (10**5000, "64 signed bits"),
    ("\ud800", "surrogate"),
    ("a" * 100 + "\udfff", "surrogate"),
    ("\U0001f600\udc00", "surrogate"),
    ((1, 2), "tuple"),
    (Pair(1, 2), "Pair"),
    ({1}, "set"),
    (frozenset(), "frozenset"),
    (b"x", "bytes"),
    (bytearray(), "bytearray"),
    (1j, "complex"),
    (Decimal(1), "Decimal"),
    (datetime(2030, 1, 1), "datetime"),
    (UUID(int=1), "UUID"),
    (Colour.RED, "Colour"),
    (Rank.LOW, "Rank"),
    (Kind.A, "Kind"),
    (Text("a"), "Text"),
    (Number(1), "Number"),
    (Real(1), "Real"),
    (OrderedDict(), "OrderedDict"),
    (Plain(), "Plain"),
    (orjson.Fragment(b"1"), "Fragment"),
    (object(), "object"),
    (len, "builtin_function_or_method"),
    (Plain, "type"),
    (NotImplemented, "NotImplementedType"),
    (..., "ellipsis"),
]


@pytest.mark.guarantee("I16")
@pytest.mark.parametrize(("value", "says"), REFUSED, ids=[f"{says}-{at}" for at, (_, says) in enumerate(REFUSED)])
def test_whatever_else_is_refused_with_its_path(value, says):
    data = {"name": "x", "bag": [0, {}, [], {"price": value, "later": math.nan}]}
    assert not is_plain(data)
    with pytest.raises(EncodingError, match=says) as caught:
        encode_plain(data)
    assert caught.value.path == 'user_data["bag"][3]["price"]'
    assert str(caught.value).startswith("a value in user_data: ")
    assert "bag" not in str(caught.value), "names of members are data, too"
    with pytest.raises(EncodingError, match=says) as caught:
        encode_plain(value)
    assert caught.value.path == "user_data"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        *((1, "int"), (True, "bool"), (None, "None"), (1.5, "float"), ((), "tuple"), (Text("k"), "Text")),
        *((Kind.A, "Kind"), (b"k", "bytes"), ("\udcff", "surrogate"), ("é\U0001f600\ud800", "surrogate")),
    ],
    ids=repr,
)
def test_keys_are_exactly_str(key, says):
    data = {"bag": [{"fine": 1, key: 2}]}
    assert not is_plain(data)
    with pytest.raises(EncodingError, match=says) as caught:
        encode_plain(data)
    assert caught.value.path == 'user_data["bag"][0]'


def test_no_message_quotes_what_a_str_holds():
    for secret in ("canary\ud800", Text("canary"), {"canary": 1}.keys(), b"canary", ("canary",), {"canary\ud800": 1}):
        with pytest.raises(EncodingError) as caught:
            encode_plain({"note": [secret]})
        assert "canary" not in str(caught.value)
        assert caught.value.__cause__ is caught.value.__context__ is None


def test_the_path_is_an_expression_that_finds_the_value():
    data = {'quote " and \\ and \n': {"": [[{"ключ": math.nan}]]}}
    with pytest.raises(EncodingError) as caught:
        encode_plain(data)
    assert math.isnan(eval(caught.value.path, {"user_data": data}))
    assert path_of(["\ud800", 3]) == 'user_data["?"][3]'


def test_long_paths_and_keys_are_cut_short():
    data: Any = math.nan
    for _ in range(50):
        data = {"k" * 1000: data}
    with pytest.raises(EncodingError) as caught:
        encode_plain(data)
    assert len(caught.value.path) < 1000
    assert caught.value.path.count("[") == 12


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"k": inner}, lambda inner: {"k": [inner]}])
def test_depth_is_bounded_below_what_orjson_takes(wrap):
    value: Any = 0
    depth = 0
    levels = 2 if isinstance(wrap(0), dict) and isinstance(wrap(0)["k"], list) else 1
    while depth + levels <= 200:
        value, depth = wrap(value), depth + levels
    assert orjson.loads(encode_plain(value)) == value
    with pytest.raises(EncodingError, match="200 deep"):
        encode_plain([value])
    assert not is_plain([value])


def test_a_container_inside_itself_is_named():
    around: dict[str, Any] = {"a": [0]}
    around["a"].append({"self": around})
    with pytest.raises(EncodingError, match="this dict is inside itself") as caught:
        encode_plain({"top": around})
    assert caught.value.path == 'user_data["top"]["a"][1]["self"]'
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(EncodingError, match="this list is inside itself") as caught:
        encode_plain(loop)
    assert caught.value.path == "user_data[0]"
    assert not is_plain(loop)


def test_a_container_met_twice_but_not_inside_itself_is_fine():
    shared = [1]
    assert encode_plain({"a": shared, "b": [shared, shared]}) == b'{"a":[1],"b":[[1],[1]]}'


@pytest.mark.guarantee("I25")
def test_no_code_of_a_refused_value_runs():
    ran = []

    class Meta(type):
        def __getattribute__(cls, name):
            ran.append(name)
            return type.__getattribute__(cls, name)

        def __instancecheck__(cls, instance):
            ran.append("instance")
            return True

        def __eq__(cls, other):
            ran.append("type eq")
            return True

        __hash__ = type.__hash__

    class Evil(metaclass=Meta):
        def __getattribute__(self, name):
            ran.append(name)
            raise RuntimeError(name)

        def __eq__(self, other):
            ran.append("eq")
            data.clear()
            return True

        def __hash__(self):
            ran.append("hash")
            return 1

        def __repr__(self):
            ran.append("repr")
            raise RuntimeError

        def __bool__(self):
            ran.append("bool")
            raise RuntimeError

        def __iter__(self):
            ran.append("iter")
            raise RuntimeError

        def __del__(self):
            ran.append("del")
            data.clear()

    evil = Evil()
    data: dict[Any, Any] = {"a": [evil]}
    keyed = {evil: 1}
    ran.clear()
    assert not is_plain(data)
    for value in (data, keyed, evil):
        with pytest.raises(EncodingError, match="Evil"):
            encode_plain(value)
    assert ran == []
    ran.clear()
    keyed.clear()


@pytest.mark.parametrize("base", [dict, list, str, int, float])
def test_a_subclass_is_refused_without_a_call_of_its_methods(base):
    def fail(self, *_):
        raise AssertionError("called")

    names = ("__iter__", "__len__", "__getitem__", "__eq__", "__str__", "__int__", "__float__", "items", "keys")
    evil = type("Evil", (base,), dict.fromkeys(names, fail) | {"__hash__": base.__hash__})()
    with pytest.raises(EncodingError, match="Evil"):
        encode_plain([evil])


def test_references_are_balanced_after_a_refusal():
    leaf, key = object(), "key-of-" + str(os.getpid())
    data = {key: [leaf]}
    before = sys.getrefcount(leaf), sys.getrefcount(key), sys.getrefcount(data[key])
    for _ in range(1000):
        assert not is_plain(data)
        with pytest.raises(EncodingError):
            encode_plain(data)
    del _
    assert (sys.getrefcount(leaf), sys.getrefcount(key), sys.getrefcount(data[key])) == before


def test_a_body_takes_no_more_memory_than_it_is_long():
    data = {"a": list(range(50))}
    tracemalloc.start()
    try:
        bodies = [encode_plain(data) for _ in range(100)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < sum(map(sys.getsizeof, bodies)) * 1.2 + sys.getsizeof(bodies)


def test_the_size_is_bounded():
    value = {"é": ["é" * 20, 1.5, None]}
    size = len(encode_plain(value))
    assert encode_plain(value, size)
    with pytest.raises(EncodingError, match=rf"takes {size} bytes, more than the {size - 1}"):
        encode_plain(value, size - 1)


def test_a_value_far_too_large_is_refused_before_it_is_encoded():
    bomb: Any = []
    for _ in range(150):
        bomb = [bomb, bomb]  # 2**150 lists, if nobody counts
    with pytest.raises(EncodingError, match="more than the 1,048,576 bytes"):
        encode_plain(bomb, MAX_BYTES)
    with pytest.raises(EncodingError, match="more than"):
        encode_plain(["x" * 1000] * 2000, MAX_BYTES)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(plain)
def test_the_bound_counts_nothing_twice(value):
    """What the walk counts is never more than the bytes are: a body of exactly the bound passes."""
    body = encode_plain(value)
    assert encode_plain(value, len(body)) == body
    with pytest.raises(EncodingError):
        encode_plain(value, len(body) - 1)
