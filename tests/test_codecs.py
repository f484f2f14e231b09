"""Dataclasses and msgspec types: what is saved comes back equal and of the same types, or is refused with its path."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields, is_dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, NewType, Optional, TypeVar, Union
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions import (
    CorruptRecordError,
    EncodingError,
    MissingExtraError,
    OptionError,
    dataclass_codec,
    msgspec_codec,
)
from cagey_sessions.encoding import Encoding
from cagey_sessions.stores.base import Record

UTC = timezone.utc  # noqa: UP017 - the same object; its type is what counts here


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


# Dataclasses


class Suit(enum.Enum):
    HEARTS = "h"
    SPADES = 1


class Perm(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


GuildId = NewType("GuildId", str)
OuterId = NewType("OuterId", GuildId)


@dataclass
class Item:
    name: str
    price: float = 0.0
    tags: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    x: int
    y: int = 0


@dataclass
class Player:
    gold: int
    bag: list[Item] = field(default_factory=list)
    position: Position | None = None
    note: Optional[str] = None  # noqa: UP045 - the old spelling is to work
    seen: datetime | None = None
    born: date | None = None
    id: UUID | None = None
    suit: Suit = Suit.HEARTS
    perm: Perm = Perm.READ
    level: Level = Level.LOW
    mode: Literal["easy", "hard", 1, True, None] = "easy"
    by_name: dict[str, Item] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    pair: tuple[int, str] = (0, "")
    path: tuple[int, ...] = ()
    nothing: tuple[()] = ()
    ids: frozenset[int] = frozenset()
    extra: Any = None
    anything: list = field(default_factory=list)  # type: ignore[type-arg]
    table: dict = field(default_factory=dict)  # type: ignore[type-arg]
    row: tuple = ()  # type: ignore[type-arg]
    guild: OuterId | None = None
    tagged: Annotated[int, "a note"] = 0
    ratio: int | float = 0
    choice: Union[int, str, list[int], Item, None] = None  # noqa: UP007
    dead: bool = False
    server: ClassVar[str] = "s"


players = dataclass_codec(Player)
encoding = Encoding(players.encode, players.decode)

fixed_zones = st.integers(-86399, 86399).map(lambda s: timezone(timedelta(seconds=s)))
items = st.builds(
    Item, name=texts, price=st.floats(allow_nan=False, allow_infinity=False) | integers, tags=st.sets(texts, max_size=4)
)
positions = st.builds(Position, x=integers, y=integers)
player_values = st.builds(
    Player,
    gold=integers,
    bag=st.lists(items, max_size=3),
    position=st.none() | positions,
    note=st.none() | texts,
    seen=st.none() | (st.datetimes() | st.datetimes(timezones=fixed_zones)).map(lambda seen: seen.replace(fold=0)),
    born=st.none() | st.dates(),
    id=st.none() | st.uuids(),
    suit=st.sampled_from(Suit),
    perm=st.integers(0, 3).map(Perm),
    level=st.sampled_from(Level),
    mode=st.sampled_from(["easy", "hard", 1, True, None]),
    by_name=st.dictionaries(texts, items, max_size=3),
    counts=st.dictionaries(integers, integers, max_size=3),
    pair=st.tuples(integers, texts),
    path=st.lists(integers, max_size=4).map(tuple),
    ids=st.frozensets(integers, max_size=4),
    extra=plain,
    anything=st.lists(plain, max_size=2),
    table=st.dictionaries(texts, plain, max_size=2),
    row=st.lists(plain, max_size=2).map(tuple),
    guild=st.none() | texts,
    tagged=integers,
    ratio=integers | st.floats(allow_nan=False, allow_infinity=False),
    choice=st.none() | integers | texts | st.lists(integers, max_size=2) | items,
    dead=st.booleans(),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(player_values)
def test_a_dataclass_comes_back_equal_and_of_the_same_types(player):
    again = encoding.copy(player)
    assert again == player
    assert shape(again) == shape(player)
    assert encoding.dump(again) == encoding.dump(player), "the same bytes, so that a load makes no save"


def refuses(codec: Any, value: object, path: str, says: str) -> None:
    """Both by the codec alone and by a save."""
    with pytest.raises(EncodingError, match=says) as caught:
        codec.encode(value)
    assert caught.value.path == path
    assert str(caught.value).startswith(path + ": ")
    assert "canary" not in str(caught.value)
    with pytest.raises(EncodingError, match=says):
        Encoding(codec.encode, codec.decode).dump(value)


class RichInt(int):
    pass


class RichItem(Item):
    pass


@pytest.mark.parametrize(
    ("changes", "path", "says"),
    [
        ({"gold": "canary"}, '["gold"]', "should be int, not str"),
        ({"gold": True}, '["gold"]', "should be int, not bool"),
        ({"gold": 1.0}, '["gold"]', "should be int, not float"),
        ({"gold": None}, '["gold"]', "should be int, not NoneType"),
        ({"gold": RichInt(1)}, '["gold"]', "should be int, not RichInt"),
        ({"gold": Level.LOW}, '["gold"]', "should be int, not Level"),
        ({"dead": 1}, '["dead"]', "should be bool, not int"),
        ({"note": 1}, '["note"]', "not int"),
        ({"bag": (Item("a"),)}, '["bag"]', "not tuple"),
        ({"bag": [Item("a"), Item("b", "canary")]}, '["bag"][1]["price"]', "should be float, not str"),
        ({"bag": [Item("a"), Item("b", True)]}, '["bag"][1]["price"]', "should be float, not bool"),
        ({"bag": [Item("a", tags={"a", 1})]}, '["bag"][0]["tags"]', "should be str, not int"),
        ({"bag": [Item("a", tags=["a"])]}, '["bag"][0]["tags"]', "not list"),
        ({"bag": [RichItem("a")]}, '["bag"][0]', "should be Item, not RichItem"),
        ({"bag": [{"name": "a"}]}, '["bag"][0]', "should be Item, not dict"),
        ({"position": Item("a")}, '["position"]', "not Item"),
        ({"position": Position(x="canary")}, '["position"]["x"]', "should be int, not str"),
        ({"by_name": {"k": Item(1)}}, '["by_name"]["k"]["name"]', "should be str, not int"),
        ({"by_name": {1: Item("a")}}, '["by_name"]', "a key should be str, not int"),
        ({"by_name": [1]}, '["by_name"]', "not list"),
        ({"counts": {"1": 1}}, '["counts"]', "a key should be an int of 64 bits, not str"),
        ({"counts": {True: 1}}, '["counts"]', "a key should be an int of 64 bits, not bool"),
        ({"counts": {2**63: 1}}, '["counts"]', "a key should be an int of 64 bits"),
        ({"counts": {7: "canary"}}, '["counts"]["7"]', "should be int, not str"),
        ({"pair": (1,)}, '["pair"]', "2 members, not 1"),
        ({"pair": (1, 2)}, '["pair"][1]', "should be str, not int"),
        ({"pair": [1, "a"]}, '["pair"]', "not list"),
        ({"path": (1, "canary")}, '["path"][1]', "should be int, not str"),
        ({"nothing": (1,)}, '["nothing"]', "0 members, not 1"),
        ({"ids": {1}}, '["ids"]', "not set"),
        ({"suit": "h"}, '["suit"]', "should be Suit, not str"),
        ({"suit": Level.LOW}, '["suit"]', "should be Suit, not Level"),
        ({"level": 1}, '["level"]', "should be Level, not int"),
        ({"mode": "canary"}, '["mode"]', "should be one of"),
        ({"mode": 1.0}, '["mode"]', "not float"),
        ({"mode": False}, '["mode"]', "should be one of"),
        ({"mode": []}, '["mode"]', "not list"),
        ({"seen": datetime(2030, 1, 1, tzinfo=ZoneInfo("UTC"))}, '["seen"]', "no time zone but a fixed offset"),
        ({"seen": date(2030, 1, 1)}, '["seen"]', "not date"),
        ({"born": datetime(2030, 1, 1)}, '["born"]', "not datetime"),
        ({"id": "canary"}, '["id"]', "not str"),
        ({"choice": 1.5}, '["choice"]', "not float"),
        ({"choice": True}, '["choice"]', "not bool"),
        ({"choice": ["canary"]}, '["choice"][0]', "should be int, not str"),
        ({"ratio": True}, '["ratio"]', "not bool"),
        ({"guild": 1}, '["guild"]', "not int"),
        ({"anything": {}}, '["anything"]', "not dict"),
        ({"table": []}, '["table"]', "not list"),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_refused_when_it_is_saved(changes, path, says):
    refuses(players, Player(**{"gold": 1} | changes), "user_data" + path, says)


def test_what_only_the_exact_check_sees_has_the_same_path():
    for name, value in (("extra", (1,)), ("gold", 2**63), ("note", "\ud800"), ("ratio", math.nan), ("anything", [{1}])):
        with pytest.raises(EncodingError) as caught:
            encoding.dump(Player(**{"gold": 1, name: value}))
        assert caught.value.path.startswith(f'user_data["{name}"]')


def test_only_the_class_itself_is_taken():
    class Sub(Player):
        pass

    refuses(players, Sub(1), "user_data", "should be Player, not Sub")
    refuses(players, {"gold": 1}, "user_data", "should be Player, not dict")
    refuses(players, Player, "user_data", "should be Player, not type")


@pytest.mark.parametrize(
    ("changes", "path", "says"),
    [
        ({"gold": "canary"}, '["gold"]', "should be int, not str"),
        ({"gold": True}, '["gold"]', "should be int, not bool"),
        ({"gold": 1.0}, '["gold"]', "should be int, not float"),
        ({"bag": {}}, '["bag"]', "not dict"),
        ({"bag": [{"name": "a"}, {"price": 1}]}, '["bag"][1]["name"]', "is missing, and Item has no default"),
        ({"bag": [{"name": "a", "price": "canary"}]}, '["bag"][0]["price"]', "should be float, not str"),
        ({"bag": [{"name": "a", "tags": "canary"}]}, '["bag"][0]["tags"]', "not str"),
        ({"bag": [{"name": "a", "colour": "canary"}]}, '["bag"][0]["colour"]', "Item has no such field"),
        ({"bag": ["canary"]}, '["bag"][0]', "not str"),
        ({"unheard": 1}, '["unheard"]', "Player has no such field"),
        ({"server": "s"}, '["server"]', "Player has no such field"),
        ({"position": {"y": 1}}, '["position"]["x"]', "is missing"),
        ({"by_name": {"k": {"name": 1}}}, '["by_name"]["k"]["name"]', "should be str, not int"),
        ({"counts": {"canary": 1}}, '["counts"]', "text of an int"),
        ({"counts": {"01": 1}}, '["counts"]', "text of an int"),
        ({"counts": {"7": "canary"}}, '["counts"]["7"]', "should be int"),
        ({"pair": [1]}, '["pair"]', "2 members, not 1"),
        ({"path": {"a": 1}}, '["path"]', "not dict"),
        ({"suit": "canary"}, '["suit"]', "is not the value of a Suit"),
        ({"suit": True}, '["suit"]', "not bool"),
        ({"suit": 1.0}, '["suit"]', "not float"),
        ({"perm": 64}, '["perm"]', "is not the value of a Perm"),
        ({"level": "1"}, '["level"]', "not str"),
        ({"mode": "canary"}, '["mode"]', "should be one of"),
        ({"seen": "canary"}, '["seen"]', "is not the text of a datetime"),
        ({"seen": 1}, '["seen"]', "not int"),
        ({"born": "2030-13-01"}, '["born"]', "is not the text of a date"),
        ({"id": "canary"}, '["id"]', "is not the text of a UUID"),
        ({"choice": {"name": 1}}, '["choice"]["name"]', "should be str"),
        ({"choice": 1.5}, '["choice"]', "not float"),
    ],
    ids=str,
)
def test_stored_data_of_the_wrong_shape_is_a_corrupt_record_with_its_path(changes, path, says):
    value = {"gold": 1} | changes
    with pytest.raises(EncodingError, match=says) as refused:
        players.decode(value)
    assert refused.value.path == "user_data" + path
    body = orjson.dumps(value)
    with pytest.raises(CorruptRecordError, match=says) as caught:
        encoding.load(stored(body))
    assert "user_data" + path in str(caught.value)
    assert "canary" not in str(caught.value).replace('["canary"]', "")
    assert caught.value.body == body


def test_missing_fields_take_their_default():
    assert players.decode({"gold": 5}) == Player(5)
    assert players.decode({"gold": 5}).bag is not players.decode({"gold": 5}).bag
    with pytest.raises(EncodingError, match=r'user_data\["gold"\]: is missing, and Player has no default for it'):
        players.decode({})
    with pytest.raises(EncodingError, match="not list"):
        players.decode([])


def test_unknown_members_can_be_dropped():
    dropping = dataclass_codec(Player, unknown="drop")
    assert dropping.decode({"gold": 5, "old": 1, "bag": [{"name": "a", "older": {}}]}) == Player(5, [Item("a")])
    with pytest.raises(OptionError, match="'refuse' or 'drop'"):
        dataclass_codec(Player, unknown="ignore")  # type: ignore[arg-type]


def test_an_upgrade_wraps_decode():
    def load(value: Any, schema: int) -> Player:
        return players.decode({"gold": value["coins"]} if schema < 2 else value)

    upgrading = Encoding(players.encode, load, schema=2)
    assert (
        upgrading.load(stored(b'{"coins":3}', schema=1)) == upgrading.load(stored(b'{"gold":3}', schema=2)) == Player(3)
    )


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
    with pytest.raises(CorruptRecordError, match=r'user_data\["picky"\]\[0\]: Picky raised ValueError') as caught:
        Encoding(decode=holders.decode).load(stored(b'{"picky":[{"size":-1}]}'))
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
        (int, "takes a dataclass, not int"),
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


def test_the_codec_is_not_changed_by_what_it_reads():
    value = {"gold": 1, "extra": {"a": [1]}, "bag": [{"name": "a", "tags": ["x"]}]}
    before = json.dumps(value)
    players.decode(value)
    assert json.dumps(value) == before


# msgspec


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
    assert f"user_data{path}: " in str(caught.value)
    assert "canary" not in str(caught.value)


def test_unknown_members_are_msgspecs_choice():
    assert things.decode({"name": "a", "old": 1}) == Thing("a")
    with pytest.raises(EncodingError, match="unknown field"):
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
    script = "import sys, cagey_sessions.codecs; print('msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
