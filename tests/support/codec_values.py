"""What tests of codecs share: classes, values of every kind, and how one is refused. What must not be here: tests."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import pytest
from hypothesis import strategies as st

from cagey_sessions import EncodingError
from cagey_sessions.data.encoding import Encoding
from cagey_sessions.stores.contract import Record


def stored(body: bytes, schema: int = 0) -> Record:
    return Record(user_id="alice", epoch=1, owner="node", version=1, schema=schema, body=body, saved_at=0.0)


def shape(value: Any) -> Any:
    """A value with the exact type of everything in it, and the order of keys."""
    if is_dataclass(value):
        return type(value), [(each.name, shape(getattr(value, each.name))) for each in fields(value)]
    if isinstance(value, dict):
        return dict, [(shape(key), shape(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    if isinstance(value, (list, tuple)):
        return type(value), [shape(item) for item in value]
    return type(value), repr(value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
integers = st.integers(-(2**63), 2**63 - 1)
plain = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


class Suit(enum.Enum):
    HEARTS = "h"
    SPADES = 1


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Item:
    name: str
    price: float = 0.0
    tags: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    x: int
    y: int = 0


def refuses(codec: Any, value: object, path: str, says: str) -> None:
    """Both by the codec alone and by a save."""
    with pytest.raises(EncodingError, match=says) as caught:
        codec.encode(value)
    assert caught.value.path == path
    assert str(caught.value).startswith("user_data: " if path == "user_data" else "a value in user_data: ")
    assert "[" not in str(caught.value).partition(": ")[0], "names of members are data"
    assert "canary" not in str(caught.value)
    with pytest.raises(EncodingError, match=says):
        Encoding(codec.encode, codec.decode).dump(value)
