"""The type of the user data, from `decode=` to `user_data`. Read by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, assert_type

from cagey_sessions import (
    DrainReport,
    EndReason,
    Health,
    Receipt,
    Session,
    SessionCall,
    SessionManager,
    SnapshotReport,
    SpillReport,
    Statistics,
    create,
    dataclass_codec,
)
from cagey_sessions.stores import MemoryStore


@dataclass
class Player:
    gold: int = 0


@dataclass
class Monster:
    rage: int = 0


players = dataclass_codec(Player)
store = MemoryStore()


def load(value: Any, schema: int) -> Player:
    return Player(gold=value["gold"] if schema > 1 else value["money"])


def dump(player: Player) -> dict[str, int]:
    return {"gold": player.gold}


def copy_live_state(session: Session[Player]) -> None:
    assert_type(session.user_data, Player)


# `decode` says what the data is
assert_type(SessionManager(store=store, decode=load), SessionManager[Player])
assert_type(SessionManager(store=store, encode=dump, decode=load, schema=2), SessionManager[Player])
assert_type(SessionManager(store=store, encode=players.encode, decode=players.decode), SessionManager[Player])
assert_type(SessionManager(store=store, decode=lambda value: Player(**value)), SessionManager[Player])
assert_type(SessionManager(store=store, decode=load, before_save=copy_live_state), SessionManager[Player])

# without it a program may say so, or the data is anything
named: SessionManager[dict[str, int]] = SessionManager(interval="30s")
assert_type(named.sessions(), list[Session[dict[str, int]]])
assert_type(SessionManager[Player](interval=30), SessionManager[Player])
assert_type(SessionManager(store=store), SessionManager[Any])
assert_type(create({"log": None}, {"user_data": {}}), SessionManager[Any])


def what_is_not_named_is_anything(manager: SessionManager, session: Session) -> None:
    assert_type(manager, SessionManager[Any])
    assert_type(session.user_data, Any)


# what does not fit together
SessionManager(store=store, encode=dump, decode=lambda value: Monster(**value))  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
SessionManager(store=store, decode=dataclass_codec(Monster).decode, before_save=copy_live_state)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
SessionManager(store=store, decode=load, user_id=float)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionManager(store="players.db")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionManager(store=store, tracking="content", persist_on=["disconnect", "shutdown"])
SessionManager(store=store, tracking="contents")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionManager(store=store, persist_on=["disconnected"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
SessionManager(store=store, persist_on="shutdown")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionManager(store=store, intervall="30s")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SessionManager(store)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def calls(manager: SessionManager[Player]) -> None:
    async with manager as entered:
        assert_type(entered, SessionManager[Player])
    session = await manager.create("cookie", replace=True)
    assert_type(session, Session[Player])
    assert_type(session.user_data, Player)
    assert_type(session.user_data.gold, int)
    assert_type(manager.create(), SessionCall[Session[Player]])
    async with manager.create("cookie", replace=True) as made:
        assert_type(made, Session[Player])
    either_way: Coroutine[Any, Any, Session[Player]] = manager.create()
    assert_type(await asyncio.create_task(either_way), Session[Player])
    assert_type(await asyncio.create_task(manager.create()), Session[Player])
    async with session.start():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    assert_type(manager.find_by_key("cookie"), Session[Player] | None)
    assert_type(manager.find_by_user("alice"), Session[Player] | None)
    assert_type(manager.sessions(), list[Session[Player]])
    assert_type(len(manager), int)
    assert_type(await manager.read("alice"), Player)
    assert_type(await manager.erase(7), bool)
    assert_type(manager.statistics(), Statistics)
    assert_type(manager.health(), Health)
    assert_type(manager.health().state, Literal["ok", "degraded", "down"])
    assert_type(manager.will_persist_user_data_on("disconnect"), bool)
    assert_type(await manager.snapshot("backup"), SnapshotReport)
    assert_type(manager.spill_report, SpillReport | None)
    assert_type(manager.estimate_drain_seconds(), float)
    assert_type(await manager.destroy(deadline=3), DrainReport)
    assert_type(await manager.run_until_signal(), int)

    manager.find_by_user(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.find_by_key(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.will_persist_user_data_on("shut_down")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.create("cookie", True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.create("cookie").key.upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


async def loading(manager: SessionManager[Player]) -> None:
    assert_type(await manager.open("bob"), Session[Player])
    assert_type(await manager.open("bob", default=Player()), Session[Player])
    assert_type(await manager.open("bob", default=Player, when_active="refuse"), Session[Player])
    assert_type(manager.open("bob"), SessionCall[Session[Player]])
    async with manager.open("bob", default=Player) as session, asyncio.TaskGroup() as group:
        assert_type(session, Session[Player])
        assert_type(await group.create_task(manager.open("alice")), Session[Player])

    await manager.open("bob", default=Monster())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.open("bob", default=Monster)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.open("bob", default={"gold": 0})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.open("bob", when_active="joins")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await manager.open(b"bob")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    assert_type(manager.edit("bob", default=Player), AbstractAsyncContextManager[Player])
    async with manager.edit("bob") as player:
        assert_type(player, Player)
        player.gold += 1
        player.silver = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


async def sessions(session: Session[Player]) -> None:
    assert_type(session.key, str | None)
    assert_type(session.user_id, int | str | None)
    assert_type(session.alive, bool)
    assert_type(session.end_reason, EndReason | None)
    session.user_data = Player(gold=1)
    session.user_data = Monster()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    session.key = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    session.nonsense = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]

    await session.start()
    await session.login("bob", default=Player)
    await session.login("bob", when_active="join")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.login("bob", default=Monster)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.set_user("bob", Player())
    await session.set_user("bob", Monster())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await session.persist_now(), Receipt | None)
    assert_type(await session.wait_ended(), EndReason)
    session.mark_changed()
    await session.destroy(persist=True)

    session.set("connection", object())
    assert_type(session.get("connection"), Any)
    session.set(1, object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
