"""What is stored is what comes back, of the same types, or it is refused with its path and nothing of its content."""

from __future__ import annotations

import asyncio
import copy
import enum
import functools
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions import (
    CorruptRecordError,
    EncodingError,
    NewerSchemaError,
    OptionError,
)
from cagey_sessions._core import Digest, encode_plain, is_plain, path_of
from cagey_sessions.encoding import MAX_BYTES, Encoding
from cagey_sessions.stores.base import Record

UTC = timezone.utc  # noqa: UP017 - the same object; its type is what counts here


def stored(body: bytes, schema: int = 0) -> Record:
    return Record(user_id="alice", epoch=1, owner="node", version=1, schema=schema, body=body, saved_at=0.0)


def shape(value: Any) -> Any:
    """A value with the exact type of everything in it, and the order of keys."""
    if isinstance(value, dict):
        return dict, [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [shape(item) for item in value]
    return type(value), repr(value)


# Plain values

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | integers | floats | texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts, inner, max_size=6),
    max_leaves=30,
)


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


@pytest.mark.parametrize(("value", "says"), REFUSED, ids=[f"{says}-{at}" for at, (_, says) in enumerate(REFUSED)])
def test_whatever_else_is_refused_with_its_path(value, says):
    data = {"name": "x", "bag": [0, {}, [], {"price": value, "later": math.nan}]}
    assert not is_plain(data)
    with pytest.raises(EncodingError, match=says) as caught:
        encode_plain(data)
    assert caught.value.path == 'user_data["bag"][3]["price"]'
    assert str(caught.value).startswith(caught.value.path + ": ")
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


# Digests


def siphash13(data: bytes, key: bytes) -> int:
    """From the paper, with one round a word and three at the end."""
    mask = 2**64 - 1
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotl(x: int, bits: int) -> int:
        return (x << bits | x >> (64 - bits)) & mask

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0] = (v[0] + v[1]) & mask
            v[1] = rotl(v[1], 13) ^ v[0]
            v[0] = rotl(v[0], 32)
            v[2] = (v[2] + v[3]) & mask
            v[3] = rotl(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & mask
            v[3] = rotl(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & mask
            v[1] = rotl(v[1], 17) ^ v[2]
            v[2] = rotl(v[2], 32)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 0xFF])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        rounds(1)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(3)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.binary(min_size=16, max_size=16))
def test_a_digest_is_siphash_1_3(body, key):
    assert Digest(key)(body) == siphash13(body, key)


def test_a_digest_is_that_of_the_published_vectors():
    """For the key 00 01 … 0f, and messages of the first so many bytes of it."""
    digest = Digest(bytes(range(16)))
    vectors = {
        0: 0xABAC0158050FC4DC,
        1: 0xC9F49BF37D57CA93,
        2: 0x82CB9B024DC7D44D,
        3: 0x8BF80AB8E7DDF7FB,
        8: 0x369095118D299A8E,
    }
    assert {size: digest(bytes(range(size))) for size in vectors} == vectors


@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="this Python hashes bytes by another function")
@pytest.mark.parametrize("seed", [0, 1, 4711])
def test_a_digest_is_what_python_itself_makes_of_bytes(seed):
    """PYTHONHASHSEED fixes Python's own key: zeros for 0, else the numbers of a generator that is in its sources."""
    key, state = bytearray(), seed
    for _ in range(16):
        state = (state * 214013 + 2531011) % 2**32
        key.append(state >> 16 & 0xFF)
    digest = Digest(bytes(key) if seed else bytes(16))
    made = "[bytes(at * 7 & 0xFF for at in range(size)) for size in range(1, 200)]"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"print([hash(body) % 2**64 for body in {made}])"],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [digest(body) for body in eval(made)]


def test_a_digest_takes_a_key_of_16_bytes_and_bytes():
    for key in (b"", bytes(15), bytes(17)):
        with pytest.raises(ValueError, match="16 bytes"):
            Digest(key)
    digest = Digest(bytes(16))
    for body in (None, "text", bytearray(), memoryview(b"")):
        with pytest.raises(TypeError):
            digest(body)
    with pytest.raises(TypeError):
        copy.copy(digest)
    assert 0 < digest(b"") < 2**64


# Encoding


def load_json(body: bytes, written_with: int = 0, **options: Any) -> Any:
    return Encoding(**options).load(stored(body, written_with))


def test_without_functions_the_data_is_json_as_it_is():
    encoding = Encoding()
    data = {"gold": 1, "bag": [1.0, "é"]}
    body = encoding.dump(data)
    assert body == '{"gold":1,"bag":[1.0,"é"]}'.encode()
    assert encoding.load(stored(body)) == data
    with pytest.raises(EncodingError, match="tuple") as caught:
        encoding.dump({"bag": (1,)})
    assert caught.value.path == 'user_data["bag"]'


def test_a_pair_of_functions_takes_data_to_json_and_back():
    encoding = Encoding(encode=lambda data: {"v": [*data]}, decode=lambda stored: tuple(stored["v"]))
    assert encoding.dump((1, 2)) == b'{"v":[1,2]}'
    assert encoding.load(stored(b'{"v":[1,2]}')) == (1, 2)


def upgrade(value: Any, *, schema: int) -> Any:
    return (value, schema)


class Upgrader:
    def __call__(self, value: Any, schema: int = 0) -> Any:
        return (value, schema)

    def method(self, value: Any, schema: int) -> Any:
        return (value, schema)


@pytest.mark.parametrize(
    "decode",
    [
        upgrade,
        Upgrader(),
        Upgrader().method,
        lambda value, schema: (value, schema),
        functools.partial(upgrade, schema=9),
    ],
    ids=range(5),
)
def test_a_decode_with_a_parameter_schema_is_told_the_schema(decode):
    assert load_json(b"[]", 2, decode=decode, schema=3) == ([], 2)


@pytest.mark.parametrize(
    "decode",
    [lambda value: value, lambda schema: schema, lambda value, **more: value, lambda value, schema=0, /: value, list],
)
def test_a_decode_without_one_is_not(decode):
    assert load_json(b"[1]", 2, decode=decode, schema=3) == [1]


def test_a_newer_schema_is_refused():
    calls: list[Any] = []
    with pytest.raises(NewerSchemaError, match="'alice' has schema 3, and this program reads up to 2") as caught:
        load_json(b"broken", 3, decode=calls.append, schema=2)
    assert (caught.value.user_id, caught.value.schema, calls) == ("alice", 3, [])
    assert load_json(b"1", 2, schema=2) == load_json(b"1", 0, schema=2) == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"{", b'{"canary":}', b'{"canary": 1,}', b'{"canary": 1} x', b"'canary'", b"\x80\x04canary."),
        *(b"\xff", b'"\xed\xa0\x80"', b'"\\ud800"', b"\xef\xbb\xbf1", b"NaN", b"1e400", b"null", b"[" * 5000),
    ],
    ids=range(16),
)
def test_a_broken_body_is_kept_and_not_quoted(body):
    with pytest.raises(CorruptRecordError, match="'alice'") as caught:
        load_json(body)
    assert (caught.value.body, caught.value.user_id) == (body, "alice")
    assert "canary" not in str(caught.value)


def test_a_decode_that_raises_is_a_corrupt_record_with_the_cause():
    def decode(value: Any) -> Any:
        return value["canary"]

    with pytest.raises(CorruptRecordError, match="decode raised KeyError") as caught:
        load_json(b"{}", decode=decode)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "canary" not in str(caught.value)


def test_a_decode_never_stops_what_is_no_exception():
    def decode(value: Any) -> Any:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        load_json(b"{}", decode=decode)


def test_none_is_no_data():
    for encoding in (Encoding(), Encoding(encode=lambda data: {})):
        with pytest.raises(EncodingError, match="no data"):
            encoding.dump(None)
    with pytest.raises(EncodingError, match="encode returned None"):
        Encoding(encode=lambda data: None).dump({})
    with pytest.raises(CorruptRecordError, match="null"):
        load_json(b"null")
    with pytest.raises(CorruptRecordError, match="decode returned None"):
        load_json(b"{}", decode=lambda value: None)
    assert load_json(b"null", decode=lambda value: {}) == {}


def test_an_encode_that_raises_is_an_encoding_error_with_the_cause():
    def encode(data: Any) -> Any:
        raise KeyError("canary")

    with pytest.raises(EncodingError, match="encode raised KeyError") as caught:
        Encoding(encode=encode).dump({})
    assert isinstance(caught.value.__cause__, KeyError)
    assert "canary" not in str(caught.value)

    def refuse(data: Any) -> Any:
        raise EncodingError("mine", path="there")

    with pytest.raises(EncodingError, match="mine") as caught:
        Encoding(encode=refuse).dump({})
    assert caught.value.path == "there"


async def waits(value: Any) -> Any:
    return value


async def test_functions_that_would_have_to_wait_are_refused():
    for options in ({"encode": waits}, {"decode": waits}, {"encode": functools.partial(waits)}):
        with pytest.raises(OptionError, match="cannot wait"):
            Encoding(**options)
    with pytest.raises(EncodingError, match="encode returned an awaitable"):
        Encoding(encode=lambda data: waits(data)).dump({})
    with pytest.raises(EncodingError, match="encode returned an awaitable"):
        Encoding(encode=lambda data: asyncio.get_running_loop().create_future()).dump({})
    with pytest.raises(CorruptRecordError, match="decode returned an awaitable"):
        load_json(b"{}", decode=lambda value: waits(value))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"encode": 1}, "encode is a function, not int"),
        ({"decode": "json"}, "decode is a function, not str"),
        *(({"schema": schema}, "schema is a whole number") for schema in (-1, 2**31, 1.0, True, "1", None, 10**5000)),
        *(({"max_bytes": size}, "max_bytes is a whole number") for size in (0, -1, 1.0, True, "1", None)),
    ],
    ids=range(15),
)
def test_options_are_checked(options, says):
    with pytest.raises(OptionError, match=says):
        Encoding(**options)
    Encoding(schema=2**31 - 1, max_bytes=1)


def test_a_body_is_at_most_max_bytes():
    assert len(Encoding(max_bytes=20).dump("x" * 18)) == 20
    with pytest.raises(EncodingError, match="more than the 20 bytes of max_bytes"):
        Encoding(max_bytes=20).dump("x" * 19)
    with pytest.raises(EncodingError, match="takes 31 bytes, more than the 20 of max_bytes"):
        Encoding(max_bytes=20, encode=lambda data: data).dump(["\n"] * 6)
    with pytest.raises(EncodingError, match="1,048,576"):
        Encoding().dump("x" * 2**20)


def test_a_copy_shares_nothing():
    data = {"bag": [{"n": 1}]}
    again = Encoding().copy(data)
    assert again == data
    again["bag"][0]["n"] = 2
    assert data == {"bag": [{"n": 1}]}
    with pytest.raises(EncodingError, match="object"):
        Encoding().copy({"x": object()})
    with pytest.raises(EncodingError, match="decode raised ZeroDivisionError"):
        Encoding(decode=lambda value: 1 / 0).copy({})


def test_a_copy_is_decoded_with_the_current_schema():
    assert Encoding(decode=upgrade, schema=7).copy([1]) == ([1], 7)
