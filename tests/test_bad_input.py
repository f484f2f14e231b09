"""Bad input is a typed error that quotes it, before anything has changed."""

from __future__ import annotations

import asyncio
import math
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
}
BAD = [
    *("90", "", "1m30", "1h 30", "1y", "1e3s", "8h:57m:28s", "5:1", "-5s", "0s", "abc", "1 fortnight", "-1ms", "0ms"),
    *("999999999999999d", "1e400s"),
    *(math.nan, math.inf, -math.inf, 0, -5, 1e300, 10**400, 10**5000),
    *(True, False, b"30s", [], {}, object(), timedelta(0), timedelta(seconds=-1)),
]


@pytest.mark.parametrize("value", GOOD)
def test_case_70_durations_that_are_understood(value):
    assert parse_duration(value, "interval") == GOOD[value] * SECOND


@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_case_70_durations_that_are_not(value):
    with pytest.raises(DurationError) as caught:
        SessionManager(interval=value)
    assert isinstance(caught.value, ValueError)
    assert "interval" in str(caught.value)
    if not isinstance(value, int) or abs(value) < 10**70:
        assert repr(value)[:60] in str(caught.value)
    with pytest.raises(DurationError):
        create({}, {"user_data": {"persistence": {"interval": value}}})


def test_an_interval_that_would_only_keep_the_loop_busy_is_refused():
    SessionManager(interval="10ms")
    with pytest.raises(DurationError, match=r"0\.01"):
        SessionManager(interval="9ms")


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


async def test_a_manager_belongs_to_one_thread(make_manager):
    manager = make_manager()
    session = await manager.create("k")
    await session.set_user(1, {})
    for call in (
        lambda: manager.find_by_key("k"),
        lambda: manager.find_by_user(1),
        manager.sessions,
        lambda: session.set("a", 1),
        lambda: session.user_data,
        lambda: asyncio.run(session.persist_now()),
    ):
        with pytest.raises(WrongLoopError):
            await asyncio.to_thread(call)
    await manager.destroy()


def test_every_error_has_one_root_and_a_name_that_ends_in_error():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, CageySessionsError)
        assert name.endswith("Error")
        assert name in (errors.__doc__ or ""), "drawn in the tree"
