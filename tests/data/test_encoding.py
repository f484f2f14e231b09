"""From data to bytes and back, through the functions of the program: what cannot be read is kept, and not quoted."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

from cagey_sessions import CorruptRecordError, EncodingError, NewerSchemaError, OptionError
from cagey_sessions.data.encoding import Encoding
from cagey_sessions.stores.contract import Record


def stored(body: bytes, schema: int = 0) -> Record:
    return Record(user_id="alice", epoch=1, owner="node", version=1, schema=schema, body=body, saved_at=0.0)


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


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"canary":18446744073709551616}', "the int at byte 10 does not fit into 64 bits"),
        (b"[-9223372036854775809]", "the int at byte 1 does not fit into 64 bits"),
        (b"[1e-400]", "the number at byte 1 has more digits, or is smaller, than a float can be"),
        (b'{"canary":1,"canary":2}', "an object has two members of one name"),
    ],
)
def test_a_body_of_which_something_would_be_lost_is_not_read(body, says):
    for options in ({}, {"decode": lambda value: value}):
        with pytest.raises(CorruptRecordError, match=says) as caught:
            load_json(body, **options)
        assert (caught.value.body, caught.value.user_id) == (body, "alice")
        assert "canary" not in str(caught.value)


def test_a_body_of_another_writer_is_read_as_it_is():
    assert load_json(b' {"b" : [1.50, 1E2, -0] , "a":"\\u00e9"} ') == {"b": [1.5, 100.0, 0], "a": "é"}
    assert load_json(b"[18446744073709551615]") == [2**64 - 1]


def test_a_decode_that_raises_is_a_corrupt_record_with_the_cause():
    def decode(value: Any) -> Any:
        return value["canary"]

    with pytest.raises(CorruptRecordError, match="decode raised KeyError") as caught:
        load_json(b"{}", decode=decode)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_a_decode_may_end_the_process(ends: type[BaseException]):
    def decode(value: Any) -> Any:
        raise ends

    with pytest.raises(ends):
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
        ({"encode": 1}, "encode is a function, not 1"),
        ({"decode": "json"}, "decode is a function, not 'json'"),
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
