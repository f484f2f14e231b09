"""Bad input is a typed error that quotes it, before anything has changed."""

from __future__ import annotations

import asyncio
import math
import os
from datetime import timedelta

import pytest

from cagey_sessions import (
    CageySessionsError,
    DurationError,
    InvalidKeyError,
    InvalidUserIdError,
    NotIdentifiedError,
    OptionError,
    Session,
    SessionManager,
    UsageError,
    WrongLoopError,
    create,
    errors,
)
from cagey_sessions.options import SECOND, parse_duration
from cagey_sessions.stores import MemoryStore, PostgresStore, RedisStore, open_store
from cagey_sessions.testing import world
from cagey_sessions.wording import quote

GOOD = {
    30: 30,
    2.0: 2,
    0.5: 0.5,
    timedelta(minutes=1): 60,
    "30s": 30,
    "  30s ": 30,
    "30 S": 30,
    "1:30": 90,
    "1.5h": 5400,
    "1h30m": 5400,
    "1.5s": 1.5,
    "500ms": 0.5,
    "250 ms": 0.25,
    "1.5 milliseconds": 0.0015,
    "\t1h\n 30m ": 5400,
    " 500  ms ": 0.5,
    "1 week, 2 days, 3 hours, 4 minutes, 5 seconds": 788_645,
}
BAD = [
    *("90", "", "1m30", "1h 30", "1y", "1e3s", "8h:57m:28s", "5:1", "-5s", "0s", "abc", "1 fortnight", "-1ms", "0ms"),
    *("999999999999999d", "1e400s", "30s" + " " * 100, "\ud800s", "30\0s"),
    *(math.nan, math.inf, -math.inf, 0, -5, 1e300, 10**400, 10**5000),
    *(True, False, b"30s", [], {}, object(), timedelta(0), timedelta(seconds=-1)),
]


def _advance(duration):
    with world(lambda store, clock: SessionManager(store=store, clock=clock)) as here:
        here.advance(duration)


def _run(duration, call):
    manager = SessionManager()
    asyncio.run(getattr(manager, call)(deadline=duration))


SETTINGS = {
    "interval": lambda value: SessionManager(interval=value),
    "save_timeout": lambda value: SessionManager(store=MemoryStore(), save_timeout=value),
    "destroy": lambda value: _run(value, "destroy"),
    "run_until_signal": lambda value: _run(value, "run_until_signal"),
    "redis lease": lambda value: RedisStore(lease=value),
    "postgres timeout": lambda value: PostgresStore(timeout=value),
    "in a URL": lambda value: open_store(f"redis://localhost?lease={value}"),
    "virtual time": _advance,
}
"""Wherever a duration is given."""


@pytest.mark.parametrize("value", GOOD)
def test_durations_that_are_understood(value):
    assert parse_duration(value, "interval") == GOOD[value] * SECOND


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_durations_that_are_not(value):
    with pytest.raises(DurationError) as caught:
        SessionManager(interval=value)
    assert isinstance(caught.value, ValueError)
    assert "interval" in str(caught.value)
    assert quote(value) in str(caught.value)
    with pytest.raises(DurationError):
        create({}, {"user_data": {"persistence": {"interval": value}}})


ENDLESS = [
    "1h" + "\t" * 5000 + "!",
    "1m" + " " * 5000 + "x",
    "1" + " " * 5000 + "s!",
    " " * 50_000 + "!",
    "1" * 50_000,
    "1." * 50_000 + "s",
    "1:" * 50_000,
    "1w, " * 20_000,
    "1 w 1 d 1 h 1 m " * 5 + "!",
]
"""What a regular expression may take minutes or years for."""


@pytest.mark.parametrize("text", ENDLESS, ids=range(len(ENDLESS)))
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_text_is_refused_as_a_duration_without_long_thought(setting, text):
    with pytest.raises(DurationError):
        SETTINGS[setting](text)


def test_an_interval_that_would_only_keep_the_loop_busy_is_refused():
    SessionManager(interval="10ms")
    with pytest.raises(DurationError, match=r"0\.01"):
        SessionManager(interval="9ms")


@pytest.mark.guarantee("I6")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"userData": {}}, "did you mean 'user_data'"),
        ({"user_data": {"persistance": {}}}, "did you mean 'persistence'"),
        ({"user_data": {"persistence": {"intervall": "30s"}}}, "did you mean 'interval'"),
        ({"user_data": {"persistence": {"events": "shutdown"}}}, "list of names"),
        ({"user_data": {"persistence": {"events": ["logout"]}}}, "'logout'"),
        ({"user_data": {"persistence": []}}, "mapping"),
        ({"user_data": "30s"}, "mapping"),
        ("30s", "mapping"),
    ],
)
def test_options_that_do_not_exist(options, says):
    with pytest.raises(OptionError, match=says):
        SessionManager(options)
    with pytest.raises(OptionError, match=says):
        create({}, options)


def test_a_setting_given_twice_is_refused():
    nested = {"user_data": {"persistence": {"interval": "30s", "events": ["shutdown"]}}}
    with pytest.raises(OptionError, match="interval"):
        SessionManager(nested, interval="20s")
    with pytest.raises(OptionError, match="persist_on"):
        SessionManager(nested, persist_on=[])
    SessionManager(nested, max_in_flight=3)


@pytest.mark.parametrize("apis", [[], "log", {"logger": None}, {"log": object()}])
def test_apis_that_do_not_exist(apis):
    with pytest.raises(OptionError):
        create(apis, {})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", math.inf])
def test_max_in_flight_is_a_whole_number_from_one(value):
    with pytest.raises(OptionError, match="max_in_flight"):
        SessionManager(max_in_flight=value)


@pytest.mark.parametrize("value", [bool, float, "int", 7])
def test_the_type_of_user_ids_is_int_or_str(value):
    with pytest.raises(OptionError, match="user_id"):
        SessionManager(user_id=value)


class Text(str):
    pass


class Number(int):
    pass


@pytest.mark.parametrize("key", [None, 0, 1, b"k", ("k",), object(), Text("k")], ids=lambda key: type(key).__name__)
async def test_what_is_no_key(make_manager, key):
    manager = make_manager()
    with pytest.raises(InvalidKeyError):
        manager.find_by_key(key)
    if key is not None:
        with pytest.raises(InvalidKeyError) as caught:
            await manager.create(key)
        assert isinstance(caught.value, TypeError)
        with pytest.raises(InvalidKeyError):
            await manager.create(key, replace=True)
    assert manager.find_by_key("") is None
    assert len(manager) == 0
    await manager.destroy()


@pytest.mark.parametrize(
    "user_id",
    [
        None,
        True,
        False,
        1.0,
        b"x",
        (),
        object(),
        2**63,
        -(2**63) - 1,
        "",
        "a\0b",
        "\ud800",
        "é" * 513,
        Text("x"),
        Number(7),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_what_is_no_user_id(make_manager, user_id):
    manager = make_manager()
    session = await manager.create()
    with pytest.raises(InvalidUserIdError):
        await session.set_user(user_id, {})
    with pytest.raises(InvalidUserIdError):
        manager.find_by_user(user_id)
    assert session.user_id is None
    assert manager.statistics().identified == 0
    await manager.destroy()


@pytest.mark.parametrize("user_id", [0, -1, 2**63 - 1, -(2**63), "x", "é" * 512, " ", "'; drop table", "\n"])
async def test_what_is_a_user_id(make_manager, user_id):
    manager = make_manager()
    session = await manager.create()
    await session.set_user(user_id, {})
    assert manager.find_by_user(user_id) is session
    await manager.destroy()


async def test_user_ids_can_be_narrowed_to_one_type(clock):
    manager = SessionManager(user_id=int, clock=clock)
    session = await manager.create()
    with pytest.raises(InvalidUserIdError, match="int"):
        await session.set_user("7", {})
    await session.set_user(7, {})
    await manager.destroy()


async def test_data_is_assigned_as_it_is_set(make_manager, db):
    manager = make_manager()
    session = await manager.create()
    with pytest.raises(NotIdentifiedError, match=r"no user yet; `await session\.login\(user_id\)` comes first"):
        session.user_data["gold"] += 1
    with pytest.raises(NotIdentifiedError, match="no user yet"):
        session.user_data = {}
    data = {"gold": 1}
    await session.set_user(1, data)
    assert session.user_data is data
    with pytest.raises(ValueError, match="None"):
        session.user_data = None
    assert session.user_data is data
    session.user_data = {"gold": 2}
    await session.destroy(True)
    assert db.stored == {1: {"gold": 2}}
    await manager.destroy()


async def test_names_in_the_bag_are_texts(make_manager):
    manager = make_manager()
    session = await manager.create()
    with pytest.raises(InvalidKeyError):
        session.set(7, "x")
    assert session.get("nothing") is None
    session.set("client", 7)
    assert session.get("client") == 7
    await manager.destroy()


def test_sessions_are_not_made_by_hand():
    with pytest.raises(UsageError, match=r"manager\.create"):
        Session()


def test_a_manager_belongs_to_one_loop(make_manager):
    manager = make_manager()
    session = asyncio.run(manager.create("k"))
    with pytest.raises(WrongLoopError):
        asyncio.run(manager.create())
    with pytest.raises(WrongLoopError):
        asyncio.run(session.start())


async def _in_block(block):
    async with block:
        pass


CALLS = {
    # whose name it is, and a call of it
    (SessionManager, "create"): lambda manager, session: manager.create(),
    (SessionManager, "destroy"): lambda manager, session: manager.destroy(),
    (SessionManager, "edit"): lambda manager, session: _in_block(manager.edit(1)),
    (SessionManager, "erase"): lambda manager, session: manager.erase(1),
    (SessionManager, "estimate_drain_seconds"): lambda manager, session: manager.estimate_drain_seconds(),
    (SessionManager, "find_by_key"): lambda manager, session: manager.find_by_key("k"),
    (SessionManager, "find_by_user"): lambda manager, session: manager.find_by_user(1),
    (SessionManager, "health"): lambda manager, session: manager.health(),
    (SessionManager, "off"): lambda manager, session: manager.off("created", print),
    (SessionManager, "on"): lambda manager, session: manager.on("created", print),
    (SessionManager, "once"): lambda manager, session: manager.once("created", print),
    (SessionManager, "open"): lambda manager, session: manager.open(1),
    (SessionManager, "persist_all_user_data"): lambda manager, session: manager.persist_all_user_data(),
    (SessionManager, "read"): lambda manager, session: manager.read(1),
    (SessionManager, "run_until_signal"): lambda manager, session: manager.run_until_signal(),
    (SessionManager, "sessions"): lambda manager, session: manager.sessions(),
    (SessionManager, "snapshot"): lambda manager, session: manager.snapshot("nowhere"),
    (SessionManager, "spill_report"): lambda manager, session: manager.spill_report,
    (SessionManager, "statistics"): lambda manager, session: manager.statistics(),
    (SessionManager, "will_persist_user_data_on"): lambda manager, session: manager.will_persist_user_data_on(
        "shutdown"
    ),
    (SessionManager, "__len__"): lambda manager, session: len(manager),
    (SessionManager, "__aenter__"): lambda manager, session: _in_block(manager),
    (Session, "destroy"): lambda manager, session: session.destroy(),
    (Session, "get"): lambda manager, session: session.get("name"),
    (Session, "login"): lambda manager, session: session.login(1),
    (Session, "mark_changed"): lambda manager, session: session.mark_changed(),
    (Session, "off"): lambda manager, session: session.off("destroy", print),
    (Session, "on"): lambda manager, session: session.on("destroy", print),
    (Session, "once"): lambda manager, session: session.once("destroy", print),
    (Session, "persist_now"): lambda manager, session: session.persist_now(),
    (Session, "set"): lambda manager, session: session.set("name", 1),
    (Session, "set_user"): lambda manager, session: session.set_user(1, {}),
    (Session, "start"): lambda manager, session: session.start(),
    (Session, "user_data"): lambda manager, session: session.user_data,
    (Session, "wait_ended"): lambda manager, session: session.wait_ended(),
    (Session, "__aenter__"): lambda manager, session: _in_block(session),
}
READ_ANYWHERE = {
    (Session, "alive"): True,
    (Session, "end_reason"): None,
    (Session, "key"): "k",
    (Session, "user_id"): "ann",
}
"""What a session is, and whether it still is: neither can be half of anything."""


def test_every_public_name_is_tried_in_the_wrong_place():
    public = {(kind, name) for kind in (SessionManager, Session) for name in dir(kind) if not name.startswith("_")}
    assert public == {each for each in {**CALLS, **READ_ANYWHERE} if not each[1].startswith("_")}


def accepted(manager, session):
    """What can be called here all the same."""
    names = []
    for (kind, name), call in CALLS.items():
        try:
            result = call(manager, session)
            if hasattr(type(result), "__await__"):
                asyncio.run(_called(result))
        except WrongLoopError:
            continue
        except UsageError as refused:
            name += f": {refused}"
        names.append(f"{kind.__name__}.{name}")
    for (kind, name), value in READ_ANYWHERE.items():
        if getattr(session, name) != value:
            names.append(f"{kind.__name__}.{name} has another value")
    return names


async def _called(result):
    await result


def _accepted_in_a_child(manager, session):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, repr(accepted(manager, session)).encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return found


@pytest.mark.guarantee("I28")
@pytest.mark.parametrize("stored", [False, True])
async def test_a_manager_belongs_to_one_thread(clock, tmp_path, stored):
    manager, session = await _with_a_user(clock, tmp_path, stored)
    assert await asyncio.to_thread(accepted, manager, session) == []
    assert bool(manager), "a truth, and no call"
    await session.destroy()
    assert await asyncio.to_thread(session.__repr__) == "<Session user 'ann', ended: destroyed>"
    await manager.destroy()


@pytest.mark.guarantee("I28")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("stored", [False, True])
async def test_a_manager_is_of_no_use_in_a_forked_child(clock, tmp_path, stored):
    manager, session = await _with_a_user(clock, tmp_path, stored)
    assert _accepted_in_a_child(manager, session) == "[]"
    await session.destroy()
    await manager.destroy()


async def _with_a_user(clock, tmp_path, stored):
    if stored:
        manager = SessionManager(store=MemoryStore(), spill=tmp_path / "spill", clock=clock)
        session = await manager.create("k")
        await session.login("ann", default={})
    else:
        manager = SessionManager(clock=clock)
        session = await manager.create("k")
        await session.set_user("ann", {})
    return manager, session


def test_every_error_has_one_root_and_a_name_that_ends_in_error():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, CageySessionsError)
        assert name.endswith("Error")
        assert name in (errors.__doc__ or ""), "drawn in the tree"
