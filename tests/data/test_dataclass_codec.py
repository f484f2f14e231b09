"""Dataclasses: what is saved comes back equal and of the same types, or is refused with its path."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from typing import Annotated, Any, ClassVar, Literal, NewType, Optional, Union
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions import CorruptRecordError, EncodingError, OptionError, dataclass_codec
from cagey_sessions.data.encoding import Encoding
from support.codec_values import Item, Level, Position, Suit, integers, plain, refuses, shape, stored, texts


class Perm(enum.Flag):
    READ = 1
    WRITE = 2


GuildId = NewType("GuildId", str)
OuterId = NewType("OuterId", GuildId)


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
        pytest.param(  # named here: a set of these two is shown in one order or the other
            {"bag": [Item("a", tags={"a", 1})]}, '["bag"][0]["tags"]', "should be str, not int", id="mixed tags"
        ),
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
        ({"perm": -1}, '["perm"]', "is not the value of a Perm"),
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
    assert caught.value.path == "user_data" + path
    assert path not in str(caught.value)
    assert "canary" not in str(caught.value).replace('["canary"]', "")
    assert caught.value.body == body


def test_missing_fields_take_their_default():
    assert players.decode({"gold": 5}) == Player(5)
    assert players.decode({"gold": 5}).bag is not players.decode({"gold": 5}).bag
    with pytest.raises(EncodingError, match="is missing, and Player has no default for it"):
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


def test_the_codec_is_not_changed_by_what_it_reads():
    value = {"gold": 1, "extra": {"a": [1]}, "bag": [{"name": "a", "tags": ["x"]}]}
    before = json.dumps(value)
    players.decode(value)
    assert json.dumps(value) == before
