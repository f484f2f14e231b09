"""Of which classes a codec of dataclasses can be made, and how those are named of which it cannot."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID

import pytest

from cagey_sessions import CorruptRecordError, OptionError, dataclass_codec
from cagey_sessions.data.encoding import Encoding
from support.codec_values import Item, Level, Position, Suit, refuses, stored


@dataclass
class Base:
    a: int
    b: str = "b"


@dataclass
class Derived(Base):
    b: int = 2  # type: ignore[assignment]
    c: "Derived | None" = None  # noqa: UP037 - a string on top of a string


@dataclass
class Node:
    children: list[Node] = field(default_factory=list)
    by_name: dict[str, Leaf] = field(default_factory=dict)


@dataclass
class Leaf:
    up: Node | None = None


@dataclass(frozen=True)
class Counted:
    hits: int
    total: int = field(init=False)
    cache: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.hits * 2)


def test_inherited_forward_and_recursive_fields():
    derived = dataclass_codec(Derived)
    value = Derived(1, 3, Derived(4))
    assert derived.decode(derived.encode(value)) == value
    nodes = dataclass_codec(Node)
    tree = Node([Node(), Node([Node()], {"x": Leaf(Node())})])
    assert nodes.decode(nodes.encode(tree)) == tree
    tree.children[1].by_name["x"].up = 1  # type: ignore[assignment]
    refuses(nodes, tree, 'user_data["children"][1]["by_name"]["x"]["up"]', "not int")


def test_a_dataclass_inside_itself_is_refused():
    nodes = dataclass_codec(Node)
    loop = Node()
    loop.children.append(loop)
    refuses(nodes, loop, "user_data", "inside itself")


def test_fields_without_init_are_kept_in_frozen_classes_too():
    counted = dataclass_codec(Counted)
    value = Counted(3)
    object.__setattr__(value, "total", 100)
    assert counted.encode(value) == {"hits": 3, "total": 100, "cache": 0}
    assert counted.decode(counted.encode(value)) == value
    assert counted.decode({"hits": 3}) == Counted(3)
    object.__delattr__(value, "total")
    refuses(counted, value, 'user_data["total"]', "has no value")


@dataclass
class Picky:
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("canary")


@dataclass
class Holder:
    picky: list[Picky]


def test_a_class_that_refuses_its_values_is_named_with_the_path():
    holders = dataclass_codec(Holder)
    with pytest.raises(CorruptRecordError, match="Picky raised ValueError") as caught:
        Encoding(decode=holders.decode).load(stored(b'{"picky":[{"size":-1}]}'))
    assert caught.value.path == 'user_data["picky"][0]'
    assert "canary" not in str(caught.value)
    assert str(caught.value.__cause__) == "canary"


class Pair(NamedTuple):
    left: int


V = TypeVar("V")


@dataclass
class Box(Generic[V]):
    value: V


@dataclass
class Init:
    a: int
    b: InitVar[int]


@dataclass(init=False)
class Custom:
    a: int

    def __init__(self, first: int) -> None:
        self.a = first


@dataclass
class Unknown:
    a: Nowhere  # type: ignore[name-defined]  # noqa: F821


class Odd(enum.Enum):
    A = (1, 2)


class Mixed(enum.Enum):
    A = True


def with_field(annotation: Any) -> type:
    return dataclass(type("Holds", (), {"__annotations__": {"it": annotation}}))


UNSTORABLE: list[Any] = [
    *(
        complex,
        bytes,
        Decimal,
        object,
        timedelta,
        type,
        type[int],
        set,
        frozenset,
        set[float],
        set[Item],
        set[int | str],
    ),
    *(dict[float, int], dict[bool, int], list[complex], dict[str, bytes], tuple[int, complex], int | complex),
    *(str | datetime, datetime | UUID, list[int] | tuple[int, ...], int | Level, int | Literal[1]),
    *(dict[str, int] | Item, Item | Position, bool | Literal[True], Literal[b"x"], Literal[Suit.HEARTS], Odd, Mixed),
    *(Box, Box[int], V, dict[V, int], InitVar[int], Final, Pair, OrderedDict, OrderedDict[str, int]),  # type: ignore[valid-type]
    *(list["Nowhere"], Callable, Callable[[], int]),  # type: ignore[name-defined]  # noqa: F821
]


@pytest.mark.parametrize("annotation", UNSTORABLE, ids=str)
def test_a_field_that_cannot_be_stored_is_named_when_the_codec_is_made(annotation):
    with pytest.raises(OptionError, match=r"^(Holds\.it|Holds|Box\.value): "):
        dataclass_codec(with_field(annotation))


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Init, "requires 'b'"),
        (Custom, r"Custom\.a: its constructor does not take"),
        (Unknown, "Unknown: its annotations cannot be read"),
        (Box, r"Box\.value"),
        (int, "takes a dataclass, not <class 'int'>"),
        (Item("a"), "takes a dataclass"),
        (list[int], "takes a dataclass"),
        (None, "takes a dataclass"),
    ],
    ids=str,
)
def test_a_class_that_cannot_be_stored_is_named(cls, says):
    with pytest.raises(OptionError, match=says) as caught:
        dataclass_codec(cls)
    assert "canary" not in str(caught.value)
