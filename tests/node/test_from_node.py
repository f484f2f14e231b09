"""The table of docs/from-node.md: one test for each row, and the page has a row for each test."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from cagey_sessions import NotIdentifiedError, SessionManager, create
from support import inside

PAGE = Path(__file__).parents[2] / "docs" / "from-node.md"


async def test_create():
    manager = create(
        {"log": logging.getLogger("game")},
        {"user_data": {"persistence": {"interval": "30s", "events": ["disconnect", "shutdown"]}}},
    )
    assert isinstance(manager, SessionManager)
    assert inside(manager).options.interval == 30 * 10**9
    assert inside(manager).options.log.name == "game"


async def test_manager_create():
    manager = create()
    seen = []
    manager.on("created", seen.append)
    session = await manager.create("key")
    assert seen == [session]
    assert session.key == "key"
    assert (await manager.create()).key is None
    await manager.destroy()


async def test_find_by_key():
    manager = create()
    session = await manager.create("key")
    assert manager.find_by_key("key") is session
    assert manager.find_by_key("other") is None
    await session.destroy()
    assert manager.find_by_key("key") is None
    await manager.destroy()


async def test_persist_all_user_data():
    manager = create()
    saved = []
    manager.on("persist_user_data", lambda session: saved.append(session.user_id))
    await manager.create()
    for user_id in (1, 2):
        await (await manager.create()).set_user(user_id, {})
    await manager.persist_all_user_data()
    assert saved == [1, 2]
    await manager.destroy()


async def test_will_persist_user_data_on():
    manager = create({}, {"user_data": {"persistence": {"events": ["shutdown"]}}})
    assert manager.will_persist_user_data_on("shutdown") is True
    assert manager.will_persist_user_data_on("disconnect") is False
    assert create().will_persist_user_data_on("shutdown") is False


async def test_manager_destroy():
    manager = create()
    saved = []
    manager.on("persist_user_data", lambda session: saved.append(session.user_id))
    session = await manager.create()
    await session.set_user(1, {})
    await manager.destroy(True)
    assert saved == [1]
    assert not session.alive


async def test_event_persist_user_data(make_manager, db, clock):
    manager = make_manager(interval="30s")
    session = await manager.create()
    await session.set_user(1, {"gold": 1})
    await clock.advance("30s")
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_user_id_and_user_data():
    manager = create()
    session = await manager.create()
    assert session.user_id is None
    with pytest.raises(NotIdentifiedError):
        session.user_data  # noqa: B018 - to read it is refused
    data = {"gold": 1}
    await session.set_user("alice", data)
    assert session.user_id == "alice"
    assert session.user_data is data
    await manager.destroy()


async def test_set_and_get():
    manager = create()
    session = await manager.create()
    client = object()
    session.set("client", client)
    assert session.get("client") is client
    assert session.get("other") is None
    await manager.destroy()


async def test_start():
    manager = create()
    seen = []

    @manager.on("started")
    def started(session):
        seen.append(session)
        session.on("started", lambda: seen.append("own"))

    session = await manager.create()
    await session.start()
    assert seen == [session, "own"]
    await manager.destroy()


async def test_set_user():
    manager = create()
    seen = []
    manager.on("identified", lambda session, user_id, user_data: seen.append((session, user_id, user_data)))
    session = await manager.create()
    session.on("identified", lambda user_id, user_data: seen.append((user_id, user_data)))
    await session.set_user(7, {"gold": 1})
    assert seen == [(session, 7, {"gold": 1}), (7, {"gold": 1})]
    await manager.destroy()


async def test_persist_now():
    manager = create()
    saved = []
    manager.on("persist_user_data", lambda session: saved.append(dict(session.user_data)))
    session = await manager.create()
    await session.persist_now()
    assert saved == []
    await session.set_user(7, {"gold": 1})
    await session.persist_now()
    assert saved == [{"gold": 1}]
    await manager.destroy()


async def test_session_destroy():
    manager = create()
    seen = []
    manager.on("persist_user_data", lambda session: seen.append("save"))
    for name in ("before_destroy", "destroy"):
        manager.on(name, lambda session, name=name: seen.append((session, name)))
    session = await manager.create()
    for name in ("before_destroy", "destroy"):
        session.on(name, lambda name=name: seen.append(name))
    await session.set_user(7, {})
    await session.destroy(True)
    assert seen == [
        (session, "before_destroy"),
        "before_destroy",
        "save",
        (session, "destroy"),
        "destroy",
    ]
    other = await manager.create()
    await other.set_user(7, {})
    await other.destroy()
    assert seen.count("save") == 1
    await manager.destroy()


async def test_event_error(make_manager, db, clock):
    manager = make_manager(interval="1s")
    seen = []
    manager.on("error", lambda error, session: seen.append(session))
    session = await manager.create()
    await session.set_user(7, {})
    db.script = [OSError("no")]
    await clock.advance("1s")
    assert seen == [session]
    await manager.destroy()


def test_the_page_and_this_file_have_the_same_rows():
    rows = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_page_and_this_file_have_the_same_rows"}
    assert rows == here
