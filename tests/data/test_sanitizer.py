"""`debug=True`: each mistake with data is warned of, what is no mistake is not, and no save is stopped by it."""

from __future__ import annotations

import asyncio
import functools
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from cagey_sessions import OptionError, SessionManager, UserDataWarning, dataclass_codec
from cagey_sessions.data.sanitizer import ENDED_WATCHED, _difference
from support import ManualClock, ScriptedStore, end, inside, turns


@pytest.fixture
def make(clock: ManualClock, store: ScriptedStore) -> Any:
    return functools.partial(SessionManager, store=store, clock=clock, debug=True)


@pytest.mark.parametrize("debug", [1, "yes", None])
def test_it_is_on_or_off(store, debug):
    if debug is None:
        SessionManager(store=store, debug=debug)
        return
    with pytest.raises(OptionError, match="debug is True or False"):
        SessionManager(store=store, debug=debug)


def test_off_there_is_none(store):
    manager = SessionManager(store=store)
    assert inside(manager).sanitizer is None
    assert inside(manager).listeners._sanitizer is None
    assert inside(manager).store_saver._sanitizer is None


async def test_a_program_without_mistakes_hears_nothing(clock, store, make, said):
    manager = make()

    @manager.on("identified")
    async def hello(session: Any, *_: object) -> None:
        await asyncio.sleep(0)

    for user_id in range(20):
        session = await manager.open(user_id, default={"bag": [{"sword": []}], "empty": {}})
    for number in range(5):
        for session in manager.sessions():
            session.user_data["bag"][0]["sword"].append(number)
        await clock.advance("30s")
    for session in manager.sessions()[:10]:
        await session.destroy()
    await end(clock, manager)
    assert said() == []


# Sharing


async def test_a_container_of_two_users(clock, store, make, said):
    manager = make()
    chest: list[str] = []
    ann, bob = [await manager.open(name, default={"bags": {}}) for name in ("ann", "bob")]
    ann.user_data["bags"]["chest"] = chest
    bob.user_data["mine"] = [1, chest]
    for _ in range(3):
        chest.append("sword")
        await ann.persist_now()
        await bob.persist_now()
    assert said() == [
        'user \'bob\': user_data["mine"][1] is the very object that is user_data["bags"]["chest"] of user \'ann\'; '
        "loaded again it will be two copies"
    ]
    await end(clock, manager)
    assert len(said()) == 1


async def test_a_default_that_returns_the_same_object(clock, store, make, said):
    manager = make()
    same: dict[str, Any] = {"gold": 0}
    for name in ("ann", "bob", "eve"):
        await manager.open(name, default=lambda: same)
    await manager.persist_all_user_data()
    assert len(said()) == 2
    assert all("user_data is the very object that is user_data of user" in text for text in said())
    await end(clock, manager)


async def test_what_is_shared_with_nobody_who_lives_is_not_shared(clock, store, make, said):
    manager = make()
    bag: list[int] = []
    ann = await manager.open("ann", default={})
    ann.user_data["bag"] = bag
    await ann.persist_now()
    del ann.user_data["bag"]  # handed over: ann is not saved again before bob is
    bob = await manager.open("bob", default={})
    bob.user_data["bag"] = bag
    await bob.persist_now()
    await bob.destroy()
    eve = await manager.open("eve", default={})
    eve.user_data["bag"] = bag
    await eve.persist_now()
    await end(clock, manager)
    assert said() == []


async def test_ids_that_are_used_again_are_not_sharing(clock, store, make, said):
    manager = make()
    sessions = [await manager.open(user_id, default={}) for user_id in range(10)]
    for number in range(200):
        session = sessions[number % 10]
        session.user_data.clear()
        session.user_data["bag"] = [[] for _ in range(number % 7)]
        await session.persist_now()
    await end(clock, manager)
    assert said() == []


async def test_data_that_holds_itself_twice_is_its_own_affair(clock, store, make, said):
    manager = make()
    ann = await manager.open("ann", default={})
    bag: list[int] = []
    ann.user_data.update(one=bag, other=bag)
    await ann.persist_now()
    await end(clock, manager)
    assert said() == []


async def test_sharing_is_seen_without_a_store(clock, db, said):
    manager = SessionManager(clock=clock, debug=True)
    manager.on("persist_user_data", db.save)
    data: dict[str, Any] = {}
    for user_id in (1, 2):
        session = await manager.create()
        await session.set_user(user_id, {"bag": data})
        await session.persist_now()
    assert len(said()) == 1
    assert said()[0].startswith('user 2: user_data["bag"] is the very object')
    await manager.destroy()


@dataclass
class Item:
    name: str


@dataclass(frozen=True)
class Rune:
    name: str


@dataclass
class Player:
    items: list[Item] = field(default_factory=list)
    rune: Rune = Rune("ur")


async def test_objects_of_classes_are_looked_into(clock, store, make, said):
    codec = dataclass_codec(Player)
    manager = make(encode=codec.encode, decode=codec.decode)
    ann, bob = [await manager.open(name, default=Player) for name in ("ann", "bob")]
    await manager.persist_all_user_data()
    assert said() == []
    sword = Item("sword")
    ann.user_data.items.append(sword)
    bob.user_data.items.append(sword)
    await manager.persist_all_user_data()
    assert len(said()) == 1
    assert 'user_data["items"][0] is the very object' in said()[0]
    await end(clock, manager)


# After the end


async def test_a_change_after_the_end_is_seen_at_a_later_save(clock, store, make, said):
    manager = make()
    ann, bob = [await manager.open(name, default={"bag": []}) for name in ("ann", "bob")]
    kept = ann.user_data["bag"]
    await ann.destroy()
    await bob.persist_now()
    assert said() == []
    kept.append("lost")
    await bob.persist_now()
    assert len(said()) == 1
    assert said()[0].startswith("user 'ann': the data was changed after the session had ended")
    await end(clock, manager)
    assert len(said()) == 1


async def test_a_change_after_the_end_is_seen_by_destroy(clock, store, make, said):
    manager = make()
    ann = await manager.open("ann", default={"bag": []})
    kept = ann.user_data
    await ann.destroy()
    kept["gold"] = 1
    await end(clock, manager)
    assert len(said()) == 1


async def test_many_ended_sessions_are_looked_at_in_turn_and_the_oldest_forgotten(clock, store, make, said):
    manager = make()
    kept = []
    for user_id in range(ENDED_WATCHED + 5):
        session = await manager.open(user_id, default={"gold": 0})
        kept.append(session.user_data)
        await session.destroy()
    assert len(inside(manager).sanitizer._ended) == ENDED_WATCHED
    for data in kept:
        data["gold"] = 1
    last = await manager.open("last", default={})
    for _ in range(ENDED_WATCHED):
        await last.persist_now()
    assert len(said()) == ENDED_WATCHED
    await end(clock, manager)


async def test_data_handed_on_to_the_next_session_of_the_user_is_not_lost(clock, db, said):
    manager = SessionManager(clock=clock, debug=True)
    manager.on("persist_user_data", db.save)
    data = {"gold": 0}
    for _ in range(2):
        session = await manager.create()
        await session.set_user("ann", data)
        data["gold"] += 1
        await session.persist_now()
        await session.destroy()
    session = await manager.create()
    await session.set_user("ann", data)
    data["gold"] += 1
    await session.persist_now()
    await manager.destroy()
    assert said() == []


# Conversion


@pytest.mark.parametrize(
    ("encode", "decode", "data", "text"),
    [
        (None, None, {"a": 1}, None),
        (lambda data: {"a": list(data["a"])}, None, {"a": (1, 2)}, 'user_data["a"] is of type list, not tuple'),
        (
            lambda data: {"a": [list(part) for part in data["a"]]},
            lambda value: {"a": [set(part) for part in value["a"]]},
            {"a": [set(), {1}]},
            None,
        ),
        (lambda data: {"a": round(data["a"], 2)}, None, {"a": 1.001}, 'user_data["a"] has another value'),
        (
            lambda data: dict(sorted(data.items())),
            None,
            {"b": 1, "a": 2},
            "user_data has other keys, or in another order",
        ),
        (lambda data: {"a": data["a"][:1]}, None, {"a": [1, 2]}, 'user_data["a"] has another length'),
        (lambda data: {"a": 1}, lambda value: 1 / 0, {"a": 1}, "user_data cannot be read again (EncodingError)"),
    ],
)
async def test_values_that_come_back_as_others(clock, store, make, said, encode, decode, data, text):
    manager = make(encode=encode, decode=decode)
    ann = await manager.open("ann", default=lambda: data)
    await ann.persist_now()
    await ann.persist_now()
    assert said() == ([f"user 'ann': after encode and decode {text}"] if text else [])
    await end(clock, manager)


def test_differences():
    nan = float("nan")
    assert _difference([nan, {1, 2}, Player([Item("x")])], [float("nan"), {2, 1}, Player([Item("x")])]) is None
    assert _difference(Player([Item("x")]), Player([Item("y")])) == (("items", 0, "name"), "has another value")
    assert _difference({1}, {1.0}) == ((), "has another value")
    assert _difference({"a": True}, {"a": 1}) == (("a",), "is of type int, not bool")
    looped: list[Any] = []
    looped.append(looped)
    assert _difference(looped, looped) is None


# Marks


async def test_a_forgotten_mark(clock, store, make, said):
    manager = make(tracking="marked")
    store.put("ann", b'{"gold":1}')
    ann = await manager.open("ann")
    await clock.advance("2m")
    assert said() == []
    ann.user_data["gold"] = 2
    await clock.advance("30s")
    assert len(said()) == 1
    assert "without a call of session.mark_changed()" in said()[0]
    ann.user_data["gold"] = 3
    await clock.advance("30s")
    assert len(said()) == 1, "once for each user"
    assert store.stored("ann") == {"gold": 3}
    await end(clock, manager)


async def test_marks_that_are_not_forgotten(clock, store, make, said):
    manager = make(tracking="marked")
    await manager.open("new", default={})
    store.put("ann", b'{"gold":1}')
    ann = await manager.open("ann")
    ann.user_data["gold"] = 2
    ann.mark_changed()
    await clock.advance("30s")
    ann.user_data = {"gold": 3}
    await clock.advance("30s")
    async with manager.edit("ann") as data:
        data["gold"] = 4
    ann.user_data["gold"] = 5
    await ann.persist_now()
    ann.user_data["gold"] = 6
    await manager.persist_all_user_data()
    ann.user_data["gold"] = 7
    await ann.destroy()
    await end(clock, manager)
    assert said() == []


async def test_before_save_that_assigns_does_not_hide_a_forgotten_mark(clock, store, make, said):
    def copy(session: Any) -> None:
        session.user_data = {"position": session.get("position")}

    manager = make(tracking="marked", before_save=copy)
    store.put("ann", b'{"position":null}')
    ann = await manager.open("ann")
    await clock.advance("30s")
    ann.set("position", 3)
    await clock.advance("30s")
    assert len(said()) == 1
    await end(clock, manager)


# Warnings that are errors


async def test_a_warning_that_is_an_error_stops_no_save(clock, store, make):
    """As it is in these tests."""
    manager = make(tracking="marked")
    heard: list[Any] = []
    manager.on("error", lambda error, session: heard.append((error, session)))
    same: dict[str, Any] = {"gold": 0}
    ann, bob = [await manager.open(name, default=lambda: same) for name in ("ann", "bob")]
    await manager.persist_all_user_data()
    same["gold"] = 5
    await clock.advance("30s")
    assert store.stored("ann") == store.stored("bob") == {"gold": 5}
    await ann.destroy()
    same["gold"] = 6
    await bob.persist_now()
    assert store.stored("bob") == {"gold": 6}
    await end(clock, manager)
    assert all(type(error) is UserDataWarning for error, _ in heard)
    kinds = ["very object", "mark_changed", "after the session had ended"]
    assert [sum(kind in str(error) for error, _ in heard) for kind in kinds] == [1, 2, 1]


async def test_a_slow_listener_that_is_an_error_is_only_reported(clock, store, make):
    manager = make()
    heard: list[Any] = []
    manager.on("error", lambda error, session: heard.append(error))
    manager.on("started", lambda session: time.sleep(0.15))
    await (await manager.create()).start()
    await turns()
    assert [type(error) for error in heard] == [UserDataWarning]
    await end(clock, manager)


async def test_data_that_cannot_be_compared_stops_no_save(clock, store, make, said):
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no")

        __hash__ = None  # type: ignore[assignment]

    manager = make(encode=lambda data: {}, decode=lambda value: {"odd": Odd()})
    heard: list[Any] = []
    manager.on("error", lambda error, session: heard.append(error))
    ann = await manager.open("ann", default=lambda: {"odd": Odd()})
    assert (await ann.persist_now()).changed
    await end(clock, manager)


async def test_no_text_holds_data_or_keys(clock, store, make, said):
    manager = make(tracking="marked", encode=lambda data: {"gold": str(data["gold"])})
    store.put("ann", b'{"gold":"hush"}')
    ann = await manager.create("cookie-secret")
    await ann.login("ann")
    ann.user_data["gold"] = 777777
    kept = ann.user_data
    await clock.advance("30s")
    await ann.destroy()
    kept["gold"] = 888888
    await end(clock, manager)
    assert len(said()) == 3
    for secret in ("hush", "7777", "8888", "cookie"):
        assert not [text for text in said() if secret in text]
