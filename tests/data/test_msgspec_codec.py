"""msgspec types: what is saved comes back equal and of the same types, or is refused with its path."""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions import CorruptRecordError, EncodingError, MissingExtraError, OptionError, msgspec_codec
from cagey_sessions.data.encoding import Encoding
from support.codec_values import Level, integers, plain, refuses, shape, stored, texts

UTC = timezone.utc  # noqa: UP017 - the same object; its type is what counts here


class Thing(msgspec.Struct):
    name: str
    price: float = 0.0
    when: datetime | None = None
    id: UUID | None = None
    raw: bytes = b""
    amount: Decimal = Decimal(0)
    tags: set[str] = msgspec.field(default_factory=set)
    pair: tuple[int, ...] = ()
    counts: dict[int, int] = msgspec.field(default_factory=dict)
    rank: Level = Level.LOW
    more: list[Thing] = msgspec.field(default_factory=list)
    any: Any = None


class BigThing(Thing):
    size: int = 0


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    a: int = 0


class Cat(msgspec.Struct, tag=True):
    a: int = 0


class Dog(msgspec.Struct, tag=True):
    a: int = 0


class Identity(msgspec.Struct, eq=False):
    a: int = 0


class Checked(msgspec.Struct):
    a: int = 0

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("Expected `canary`")


things = msgspec_codec(Thing)
full = Thing(
    name="é",
    price=1.5,
    when=datetime(2030, 1, 1, tzinfo=UTC),
    id=UUID(int=7),
    raw=b"\0\xff",
    amount=Decimal("1.10"),
    tags={"a", "b", "c"},
    pair=(1, 2),
    counts={1: 2, -3: 4},
    rank=Level.HIGH,
    more=[Thing("x"), Thing("y")],
    any={"k": [1, 1.0, None]},
)


def test_a_struct_comes_back_the_same():
    again = Encoding(things.encode, things.decode).copy(full)
    assert again == full
    assert type(again.pair) is tuple
    assert again.more is not full.more


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Thing,
        name=texts,
        price=st.floats(allow_nan=False, allow_infinity=False),
        when=st.none() | st.datetimes() | st.datetimes(timezones=st.just(UTC)),
        raw=st.binary(max_size=8),
        tags=st.sets(texts, max_size=4),
        counts=st.dictionaries(integers, integers, max_size=3),
        any=plain,
    )
)
def test_any_struct_comes_back_the_same(thing):
    again = Encoding(things.encode, things.decode).copy(thing)
    assert again == thing
    assert shape(again.any) == shape(thing.any)


@pytest.mark.parametrize(
    ("thing", "path", "says"),
    [
        (Thing(1), '["name"]', "Expected `str`, got `int`"),
        (Thing("a", more=[Thing("b"), Thing("c", price="canary")]), '["more"][1]["price"]', "got `str`"),
        (Thing("a", counts={1: "canary"}), '["counts"][...]', "got `str`"),
        (Thing("a", price=math.nan), '["price"]', "got `null`"),
        (Thing("a", rank="canary"), '["rank"]', "Expected `int`, got `str`"),
        (BigThing("a"), "", "would not come back"),
        (Thing("a", more=[BigThing("b")]), "", "would not come back"),
        (Thing("a", any=(1,)), "", "would not come back"),
        (Thing("a", any=math.nan), "", "would not come back"),
        (Thing("a", any=object()), "", "cannot be encoded by msgspec"),
        (Thing("\ud800"), "", "cannot be encoded by msgspec"),
        ({"name": "a"}, "", "would not come back"),
    ],
    ids=range(12),
)
def test_a_struct_that_would_not_come_back_is_refused(thing, path, says):
    refuses(things, thing, "user_data" + path, says)


@pytest.mark.parametrize(
    ("value", "path", "says"),
    [
        ({}, "", "Object missing required field `name`"),
        ({"name": 1}, '["name"]', "Expected `str`, got `int`"),
        ({"name": "a", "more": [{"name": "b", "price": "canary"}]}, '["more"][0]["price"]', "got `str`"),
        ({"name": "a", "rank": 77}, '["rank"]', "not a value that its annotation allows"),
        ({"name": "a", "id": "canary"}, '["id"]', "not a value that its annotation allows"),
        ({"name": "a", "counts": {"canary": 1}}, '["counts"]', "got `str`"),
    ],
    ids=range(6),
)
def test_a_stored_struct_of_the_wrong_shape_is_a_corrupt_record_with_its_path(value, path, says):
    body = orjson.dumps(value)
    with pytest.raises(CorruptRecordError, match=says) as caught:
        Encoding(things.encode, things.decode).load(stored(body))
    assert caught.value.path == f"user_data{path}"
    assert not path or path not in str(caught.value)
    assert "canary" not in str(caught.value)


def test_unknown_members_are_msgspecs_choice():
    assert things.decode({"name": "a", "old": 1}) == Thing("a")
    with pytest.raises(EncodingError, match="has a member that is no field"):
        msgspec_codec(Strict).decode({"a": 1, "old": 1})


def test_a_union_of_tagged_structs():
    pets = msgspec_codec(Cat | Dog)
    for pet in (Cat(1), Dog(2)):
        assert pets.decode(pets.encode(pet)) == pet
    refuses(pets, full, "user_data", "tag|type|annotation")


def test_a_struct_that_does_not_compare_by_content_cannot_be_checked():
    refuses(msgspec_codec(Identity), Identity(1), "user_data", "compare by content")


def test_what_a_struct_itself_says_is_not_quoted():
    with pytest.raises(EncodingError, match="refused with ValueError") as caught:
        msgspec_codec(Checked).decode({"a": -1})
    assert "canary" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_type_msgspec_cannot_handle_is_an_option_error():
    with pytest.raises(OptionError, match="msgspec_codec"):
        msgspec_codec(int | Level)


def test_without_msgspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(MissingExtraError, match=r"cagey-sessions\[msgspec\]") as caught:
        msgspec_codec(Thing)
    assert caught.value.extra == "msgspec"


def test_the_module_imports_without_msgspec():
    script = "import sys, cagey_sessions.data.codecs; print('msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
