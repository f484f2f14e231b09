"""The base that benchmarks compare with obeys our rules."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from benchmarks.rivals import port
from benchmarks.workloads import saves

import cagey_sessions
from cagey_sessions import (
    AlreadyIdentifiedError,
    InvalidKeyError,
    InvalidUserDataError,
    InvalidUserIdError,
    KeyTakenError,
    ListenerError,
    ManagerClosedError,
    NothingSavesError,
    NotIdentifiedError,
    SessionEndedError,
    UnknownEventError,
    UserActiveError,
)


@pytest.fixture(params=["ours", "port"])
def make(request: pytest.FixtureRequest) -> Any:
    return {"ours": cagey_sessions.SessionManager, "port": port.SessionManager}[request.param]


async def test_a_taken_key_is_refused_until_its_session_ends(make):
    manager = make()
    first = await manager.create("k")
    with pytest.raises(KeyTakenError):
        await manager.create("k")
    assert manager.find_by_key("k") is first
    await first.destroy()
    assert manager.find_by_key("k") is None
    second = await manager.create("k")
    await first.destroy()
    assert manager.find_by_key("k") is second
    assert len(manager) == 1
    await manager.destroy()


async def test_an_active_user_is_refused_until_their_session_ends(make):
    manager = make()
    first, second = await manager.create(), await manager.create()
    await first.set_user("alice", {})
    with pytest.raises(UserActiveError) as caught:
        await second.set_user("alice", {})
    assert caught.value.session is first
    with pytest.raises(AlreadyIdentifiedError):
        await first.set_user("bob", {})
    assert second.user_id is None
    assert manager.find_by_user("alice") is first
    await first.destroy()
    assert manager.find_by_user("alice") is None
    await second.set_user("alice", {})
    assert manager.find_by_user("alice") is second
    await manager.destroy()


async def test_keys_users_and_data_are_checked_and_nothing_changes(make):
    manager = make()
    for key in ("", 1, b"k", True):
        with pytest.raises(InvalidKeyError):
            await manager.create(key)
    with pytest.raises(InvalidKeyError):
        manager.find_by_key(1)
    assert len(manager) == 0
    session = await manager.create()
    for user_id in ("", "a\0", "\ud800", "a" * 1025, "é" * 513, 1.0, True, None, 1 << 63, -(1 << 63) - 1):
        with pytest.raises(InvalidUserIdError):
            await session.set_user(user_id, {})
    with pytest.raises(InvalidUserDataError):
        await session.set_user(1, None)
    with pytest.raises(NotIdentifiedError):
        session.user_data = {}
    with pytest.raises(NotIdentifiedError):
        session.user_data["gold"] = 1
    with pytest.raises(InvalidKeyError):
        session.set(1, 1)
    assert session.user_id is None
    await session.set_user("é" * 512, {})
    await manager.destroy()
    with pytest.raises(ManagerClosedError):
        await manager.create()


async def test_dead_handles_raise(make):
    manager = make()
    session = await manager.create("k")
    await session.set_user(1, {})
    session.set("room", 7)
    await session.destroy()
    assert not session.alive
    assert session.end_reason == "destroyed"
    assert session.get("room") == 7
    await session.destroy()
    for call in (session.start, session.persist_now, lambda: session.set_user(2, {})):
        with pytest.raises(SessionEndedError):
            await call()
    with pytest.raises(SessionEndedError):
        session.set("room", 8)
    with pytest.raises(SessionEndedError):
        session.user_data  # noqa: B018 - the look itself raises
    with pytest.raises(SessionEndedError):
        session.on("destroy", print)
    await manager.destroy()


async def test_events_come_in_order_on_the_manager_first(make):
    manager = make()
    seen = []

    async def on_started(session):
        await asyncio.sleep(0)
        seen.append("started")

    manager.on("created", lambda session: seen.append("created"))
    manager.on("started", on_started)
    manager.on("identified", lambda session, user_id, data: seen.append(("identified", user_id, data)))
    manager.on("before_destroy", lambda session: seen.append(("before_destroy", session.alive)))
    manager.on("persist_user_data", lambda session: seen.append(("persist", session.user_data)))
    manager.on("destroy", lambda session: seen.append(("destroy", manager.find_by_user(session.user_id))))
    session = await manager.create("k")
    session.on("started", lambda: seen.append("its started"))
    session.on("identified", lambda user_id, data: seen.append(("its identified", user_id, data)))
    session.on("before_destroy", lambda: seen.append("its before_destroy"))
    session.on("destroy", lambda: seen.append("its destroy"))
    with pytest.raises(UnknownEventError):
        manager.on("create", print)
    await session.start()
    await session.set_user(1, {"gold": 1})
    await session.persist_now()
    session.user_data = {"gold": 2}
    await session.destroy(True)
    assert seen == [
        "created",
        "started",
        "its started",
        ("identified", 1, {"gold": 1}),
        ("its identified", 1, {"gold": 1}),
        ("persist", {"gold": 1}),
        ("before_destroy", True),
        "its before_destroy",
        ("persist", {"gold": 2}),
        ("destroy", None),
        "its destroy",
    ]
    await manager.destroy()


async def test_what_listeners_raise_reaches_the_caller_and_stops_no_other(make):
    manager = make()
    seen = []

    def fail(session, *args):
        raise ValueError("no")

    for name in ("started", "identified", "destroy"):
        manager.on(name, fail)
        manager.on(name, lambda *args, name=name: seen.append(name))
    session = await manager.create()
    for work in (session.start(), session.set_user(1, {}), session.destroy()):
        with pytest.raises(ListenerError):
            await work
    assert seen == ["started", "identified", "destroy"]
    assert not session.alive
    manager.on("created", fail)
    with pytest.raises(ListenerError):
        await manager.create("k")
    assert manager.find_by_key("k") is None
    assert len(manager) == 0
    await manager.destroy()


async def test_autosave_is_performed_again_and_again(make):
    manager = make(interval=0.01)
    saves, errors = [], []
    enough = asyncio.Event()

    def save(session):
        saves.append(session.user_id)
        if min(saves.count(1), saves.count(2)) == 3:
            enough.set()
        if len(saves) == 1:
            raise OSError("a failed save is tried again")

    manager.on("persist_user_data", save)
    manager.on("error", lambda error, session: errors.append((type(error), session.user_id)))
    for user_id in (1, 2):
        session = await manager.create()
        await session.set_user(user_id, {})
    await manager.create()
    await enough.wait()
    assert errors == [(ListenerError, saves[0])]
    await manager.destroy()
    count = len(saves)
    await asyncio.sleep(0.03)
    assert len(saves) == count


async def test_a_call_during_a_save_gets_a_later_one_that_is_shared(make):
    manager = make()
    begun, release = asyncio.Event(), asyncio.Event()
    saved = []

    async def save(session):
        saved.append(session.user_data["gold"])
        begun.set()
        await release.wait()

    manager.on("persist_user_data", save)
    session = await manager.create()
    await session.persist_now()
    await session.set_user(1, {"gold": 1})
    first = asyncio.ensure_future(session.persist_now())
    await begun.wait()
    session.user_data["gold"] = 2
    later = [asyncio.ensure_future(session.persist_now()) for _ in range(3)]
    await asyncio.sleep(0)
    assert saved == [1]
    release.set()
    await asyncio.gather(first, *later)
    assert saved == [1, 2]
    await manager.destroy()


async def test_a_failed_last_save_keeps_the_user_until_it_succeeds(make):
    manager = make()
    session = await manager.create("k")
    await session.set_user(1, {})
    with pytest.raises(NothingSavesError):
        await session.destroy(True)
    assert manager.find_by_key("k") is session
    broken = True

    def save(session):
        if broken:
            raise OSError("the database is down")

    manager.on("persist_user_data", save)
    with pytest.raises(ListenerError):
        await session.destroy(True)
    assert session.alive
    assert manager.find_by_key("k") is None
    other = await manager.create("k")
    with pytest.raises(UserActiveError):
        await other.set_user(1, {})
    with pytest.raises(SessionEndedError):
        await session.start()
    broken = False
    await session.destroy(True)
    assert not session.alive
    await other.set_user(1, {})
    await manager.destroy()


def test_the_base_of_the_save_row_saves_everybody(monkeypatch):
    saved = []

    def make() -> port.SessionManager:
        manager = port.SessionManager(interval="1d")
        manager.on("persist_user_data", saved.append)
        return manager

    monkeypatch.setattr(saves, "make_port", make)
    with saves.tasks(600) as save_each:
        save_each()
        save_each()
        assert len(saved) == 1200
        assert len(set(saved)) == 600
