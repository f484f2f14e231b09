"""Whatever is given to a public call is accepted, or refused with a documented error, and then nothing has changed."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cagey_sessions import (
    CageySessionsError,
    DurationError,
    EncodingError,
    InvalidKeyError,
    InvalidListenerError,
    InvalidUserDataError,
    InvalidUserIdError,
    OptionError,
    SessionManager,
    SnapshotError,
    StoreError,
    UnknownEventError,
    UnsavableError,
    UserNotFoundError,
    create,
    dataclass_codec,
    msgspec_codec,
    read_snapshot,
)
from cagey_sessions.stores import CallbackStore, MemoryStore, PostgresStore, PostgresTable, RedisStore, SQLiteStore
from cagey_sessions.stores import open_store as open_by_url
from cagey_sessions.testing import FaultProxy, WorldError, crash_test, world
from cagey_sessions.wording import MOST_SHOWN, quote


class OwnError(Exception):
    """Of somebody else's code."""


def _raise(*_: object, **__: object) -> Any:
    raise OwnError("looked at")


class Touchy:
    """Whatever is done with it raises."""

    __eq__ = __ne__ = __lt__ = __hash__ = __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = _raise
    __repr__ = __str__ = __format__ = __index__ = __int__ = __float__ = __fspath__ = __getattr__ = _raise


class TouchyFunction(Touchy):
    __call__ = _raise


class Crooked(os.PathLike[str]):
    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        return self.path


class Word(StrEnum):
    OTHER = "other"


class Loud(type):
    __name__ = property(_raise)
    __repr__ = _raise


class Louder(metaclass=Loud):
    pass


@dataclass
class Player:
    gold: int = 0


async def _coroutine_function(*_: object) -> None:
    return None


def _generator_function(*_: object) -> Iterator[None]:
    yield


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_INSIDE_ITSELF: list[Any] = []
_INSIDE_ITSELF.append(_INSIDE_ITSELF)

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**5000, -(10**5000), 2**70),
    *(0.0, 1.5, -1.0, float("nan"), float("inf"), 1e308, 1j, Decimal(1), Decimal("NaN"), date.min, timedelta.max),
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\ud800",
        "\udc80",
        "a" * 100_000,
        "%s %d {}",
        "../..",
        "\n",
        "5 s",
        "1h" + " " * 90 + "!",
    ),
    *(b"", b"\0", b"x" * 100_000, bytearray(b"x"), Path("x\0y"), Path("\ud800"), Path("a" * 5000)),
    *(Crooked("a\0b"), Crooked(b"x"), Crooked(7), Crooked("\ud800"), Word.OTHER),
    *([], {}, set(), (), [1], {"a": 1}, {1: 2}, ("a", "b", "c"), ["\0"], [Touchy()], {"x": Touchy()}, [[], {}]),
    *(_nested(300), _nested(100_000), _INSIDE_ITSELF, {"log": None}, range(10**9)),
    *(object(), object, Touchy(), Touchy, TouchyFunction(), Louder(), Louder, Ellipsis, NotImplemented),
    *(print, _raise, _coroutine_function, _generator_function, partial(_raise), partial(TouchyFunction()), os, Player),
]


def _texts(alphabet: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.text(alphabet.filter(lambda each: each != "/"), max_size=200)  # no file is made elsewhere


class Given:
    """A value in a case of its own, which can be looked at and shown."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return quote(self.value)


PLAIN = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    _texts(st.characters()),
    _texts(st.sampled_from("0123456789.:,-+ \t\nhmswd\0\ud800")),
)
DRAWN = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)).map(Given)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


LONGEST = 10_000
"""Characters of a message; a path is shown as it is."""


def attempt(call: Callable[[], Any], documented: tuple[type[Exception], ...]) -> Exception | None:
    """Make a call, and wait for what it returns: what it was refused with."""
    try:
        call()
    except documented as refused:
        assert len(str(refused)) < LONGEST, "what a message quotes is bounded"
        return refused
    return None


def try_all(call: Callable[[Any], Any], *, but: Callable[[Any], bool] = lambda value: False, drawn: int = 30) -> None:
    """Call with each of the hostile values, and with some that are drawn; CAGEY_TEST_EXAMPLES is how many per cent."""
    for value in HOSTILE:
        if not but(value):
            call(value)

    @settings(
        max_examples=max(1, drawn * int(os.environ.get("CAGEY_TEST_EXAMPLES", "100")) // 100),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(DRAWN.filter(lambda each: not but(each.value)))
    def try_some(given_: Given) -> None:
        call(given_.value)

    try_some()


# What is made


def _of_manager(name: str, **more: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda value: SessionManager(**{each: make() for each, make in more.items()} | {name: value})


def _in_mapping(value: Any) -> Any:
    return SessionManager({"user_data": {"persistence": {"interval": value, "events": value}}})


def _of_table(name: str) -> Callable[[Any], Any]:
    good = {"columns": ["gold"]} if name != "body" else {}
    return lambda value: PostgresTable("postgresql://localhost/x", "players", **good | {name: value})


def _of_url(name: str, scheme: str = "postgresql") -> Callable[[Any], Any]:
    return lambda value: open_by_url(f"{scheme}://localhost/x", **{name: value})


MADE: dict[str, Callable[[Any], Any]] = {
    **{
        f"SessionManager({name}=)": _of_manager(name)
        for name in ("interval", "persist_on", "max_in_flight", "user_id", "log", "debug", "clock", "store")
    },
    **{
        f"SessionManager(store=MemoryStore(), {name}=)": _of_manager(name, store=MemoryStore)
        for name in (
            *("interval", "encode", "decode", "schema", "max_bytes", "before_save", "save_timeout", "tracking"),
            "spill",
        )
    },
    "SessionManager(options)": SessionManager,
    "SessionManager({...: interval})": _in_mapping,
    "create(apis)": create,
    "create({}, options)": lambda value: create({}, value),
    "create({'log': log})": lambda value: create({"log": value}),
    "SQLiteStore(path)": SQLiteStore,
    "SQLiteStore(synchronous=)": lambda value: SQLiteStore("x", synchronous=value),
    "SQLiteStore(read_only=)": lambda value: SQLiteStore("x", read_only=value),
    "MemoryStore(backing)": MemoryStore,
    "CallbackStore(load)": lambda value: CallbackStore(value, _raise),
    "CallbackStore(save_many)": lambda value: CallbackStore(_raise, value),
    "CallbackStore(erase=)": lambda value: CallbackStore(_raise, _raise, erase=value),
    "PostgresStore(dsn)": PostgresStore,
    **{
        f"PostgresStore({name}=)": lambda value, name=name: PostgresStore(**{name: value})
        for name in ("pool", "schema", "create", "timeout", "lease")
    },
    "PostgresTable(pool)": lambda value: PostgresTable(value, "players", columns=["gold"]),
    **{
        f"PostgresTable({name}=)": _of_table(name)
        for name in ("table", "key", "columns", "body", "fence", "schema", "create", "insert", "timeout", "lease")
        if name != "table"
    },
    "PostgresTable(table)": lambda value: PostgresTable("postgresql://localhost/x", value, columns=["gold"]),
    "RedisStore(url)": RedisStore,
    **{
        f"RedisStore({name}=)": lambda value, name=name: RedisStore(**{name: value})
        for name in ("prefix", "timeout", "lease")
    },
    "open_store(url)": open_by_url,
    "open_store(url, schema=)": _of_url("schema"),
    "open_store(url, timeout=)": _of_url("timeout"),
    "open_store(url, prefix=)": _of_url("prefix", "redis"),
    "open_store(url, synchronous=)": lambda value: open_by_url("sqlite:///x", synchronous=value),
    "dataclass_codec(cls)": dataclass_codec,
    "dataclass_codec(unknown=)": lambda value: dataclass_codec(Player, unknown=value),
    "msgspec_codec(kind)": msgspec_codec,
    "FaultProxy(host)": lambda value: FaultProxy(value, 1),
    "FaultProxy(port)": lambda value: FaultProxy(port=value),
    "FaultProxy(path=)": lambda value: FaultProxy(path=value),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_takes_its_arguments_or_refuses_them(name):
    try_all(lambda value: attempt(lambda: MADE[name](value), (OptionError,)))


def test_a_snapshot_is_read_from_a_path_or_nothing_is():
    def read(value: Any) -> None:
        assert attempt(lambda: read_snapshot(value), (OptionError, SnapshotError)) is not None

    try_all(read)


# What is called


async def _made(store: Any = None) -> Any:
    """A manager with a user and an anonymous session."""
    manager: SessionManager[Any] = SessionManager(store=store)
    if store is None:
        manager.on("persist_user_data", lambda session: None)
        user = await manager.create("key")
        await user.set_user("ann", {"gold": 1})
    else:
        user = await manager.open("ann", default={"gold": 1})
    return manager, user, await manager.create("other")


async def _edited(manager: Any, user_id: Any, **options: Any) -> None:
    async with manager.edit(user_id, **options):
        pass


async def _assigned(user: Any, value: Any) -> None:
    user.user_data = value
    await user.persist_now()


async def _called(result: Any) -> None:
    if asyncio.iscoroutine(result) or hasattr(type(result), "__await__"):
        await result


ID = (InvalidUserIdError,)
DATA = (EncodingError, UserNotFoundError, OwnError)  # the last one is what a `default` of the program's own raises
LISTENER = (InvalidListenerError, UnknownEventError)

CALLED: dict[str, tuple[bool, Callable[..., Any], tuple[type[Exception], ...]]] = {
    # name: whether with a store, the call, and how it may be refused
    "create(key)": (False, lambda manager, user, other, value: manager.create(value), (InvalidKeyError,)),
    "create(replace=)": (False, lambda manager, user, other, value: manager.create(replace=value), (OptionError,)),
    "find_by_key": (False, lambda manager, user, other, value: manager.find_by_key(value), (InvalidKeyError,)),
    "find_by_user": (False, lambda manager, user, other, value: manager.find_by_user(value), ID),
    "open(user_id)": (True, lambda manager, user, other, value: manager.open(value), (*ID, UserNotFoundError)),
    "open(default=)": (
        True,
        lambda manager, user, other, value: manager.open("bob", default=value),
        (*DATA, OptionError),
    ),
    "open(when_active=)": (
        True,
        lambda manager, user, other, value: manager.open("bob", default={}, when_active=value),
        (OptionError,),
    ),
    "read": (True, lambda manager, user, other, value: manager.read(value), (*ID, UserNotFoundError)),
    "edit(user_id)": (True, lambda manager, user, other, value: _edited(manager, value), (*ID, UserNotFoundError)),
    "edit(default=)": (
        True,
        lambda manager, user, other, value: _edited(manager, "bob", default=value),
        (*DATA, OptionError),
    ),
    "erase": (True, lambda manager, user, other, value: manager.erase(value), ID),
    "will_persist_user_data_on": (
        False,
        lambda manager, user, other, value: manager.will_persist_user_data_on(value),
        (UnknownEventError,),
    ),
    "snapshot": (True, lambda manager, user, other, value: manager.snapshot(value), (OptionError, SnapshotError)),
    "manager.destroy(persist)": (False, lambda manager, user, other, value: manager.destroy(value), (OptionError,)),
    "manager.destroy(deadline=)": (
        False,
        lambda manager, user, other, value: manager.destroy(deadline=value),
        (DurationError,),
    ),
    "manager.on(name)": (False, lambda manager, user, other, value: manager.on(value, print), LISTENER),
    "manager.on(listener)": (False, lambda manager, user, other, value: manager.on("destroy", value), LISTENER),
    "manager.once(listener)": (False, lambda manager, user, other, value: manager.once("created", value), LISTENER),
    "manager.off(name)": (False, lambda manager, user, other, value: manager.off(value, print), LISTENER),
    "manager.off(listener)": (
        False,
        lambda manager, user, other, value: manager.off("persist_user_data", value),
        LISTENER,
    ),
    "login(user_id)": (True, lambda manager, user, other, value: other.login(value, default={}), ID),
    "login(default=)": (
        True,
        lambda manager, user, other, value: other.login("bob", default=value),
        (*DATA, OptionError),
    ),
    "login(when_active=)": (
        True,
        lambda manager, user, other, value: other.login("bob", default={}, when_active=value),
        (OptionError,),
    ),
    "set_user(user_id)": (False, lambda manager, user, other, value: other.set_user(value, {}), ID),
    "set_user(user_data)": (
        False,
        lambda manager, user, other, value: other.set_user("bob", value),
        (InvalidUserDataError,),
    ),
    "user_data =": (
        True,
        lambda manager, user, other, value: _assigned(user, value),
        (InvalidUserDataError, UnsavableError),
    ),
    "set(key)": (False, lambda manager, user, other, value: other.set(value, 1), (InvalidKeyError,)),
    "set(value)": (False, lambda manager, user, other, value: other.set("name", value), ()),
    "get(key)": (False, lambda manager, user, other, value: other.get(value), (InvalidKeyError,)),
    "session.on(name)": (False, lambda manager, user, other, value: other.on(value, print), LISTENER),
    "session.on(listener)": (False, lambda manager, user, other, value: other.on("destroy", value), LISTENER),
    "session.once(name)": (False, lambda manager, user, other, value: other.once(value, print), LISTENER),
    "session.off(name)": (False, lambda manager, user, other, value: other.off(value, print), LISTENER),
    "session.off(listener)": (False, lambda manager, user, other, value: other.off("destroy", value), LISTENER),
    "session.destroy(persist)": (False, lambda manager, user, other, value: user.destroy(value), (OptionError,)),
}


@pytest.mark.guarantee("I6")
@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_takes_its_arguments_or_changes_nothing(name):
    is_stored, call, documented = CALLED[name]

    async def try_it(value: Any) -> None:
        manager, user, other = await _made(MemoryStore() if is_stored else None)
        user.on("destroy", print)
        before = (len(manager), manager.statistics().identified, user.user_data, other.user_id, other.key)
        try:
            await _called(call(manager, user, other, value))
        except documented as refused:
            assert len(str(refused)) < LONGEST, "what a message quotes is bounded"
            if name != "user_data =":  # the data was taken, and then not saved
                assert before == (
                    *(len(manager), manager.statistics().identified, user.user_data),
                    *(other.user_id, other.key),
                )
        finally:
            for session in (user, other):
                session.off("destroy", print)
                with suppress(CageySessionsError):
                    await session.destroy(False)
            with suppress(CageySessionsError):
                await manager.destroy(False)

    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: pytest.fail(context["message"]))
        try_all(lambda value: runner.run(try_it(value)), drawn=20)


def test_a_manager_that_has_ended_reads_a_deadline_all_the_same():
    manager: SessionManager[Any] = SessionManager()

    with asyncio.Runner() as runner:
        runner.run(manager.destroy())
        wait = manager.run_until_signal
        try_all(lambda value: attempt(lambda: runner.run(wait(deadline=value)), (DurationError,)))


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_of_users_is_opened_or_refused_whatever_its_name_is(read_only):
    async def try_it(value: Any) -> None:
        with suppress(OptionError):
            store = SQLiteStore(value, read_only=read_only)
            try:
                await store.open()
            finally:
                await store.close()

    with asyncio.Runner() as runner:
        try_all(lambda value: attempt(lambda: runner.run(try_it(value)), (StoreError,)), drawn=20)


# The kit for tests


def _make_manager(store: Any, clock: Any) -> SessionManager[Any]:
    return SessionManager(store=store, clock=clock)


async def _play(manager: Any) -> None:
    return None


def _asked_of_a_world(value: Any, name: str) -> None:
    with world(_make_manager) as here:
        getattr(here, name)(value)


KIT: dict[str, Callable[[Any], Any]] = {
    "crash_test(make_manager)": lambda value: crash_test(value, _play, lambda stored: True, seeds=1),
    "crash_test(play)": lambda value: crash_test(_make_manager, value, lambda stored: True, seeds=1),
    "crash_test(invariant)": lambda value: crash_test(_make_manager, _play, value, seeds=1),
    "crash_test(first=)": lambda value: crash_test(_make_manager, _play, lambda stored: True, first=value, seeds=1),
    "world.advance": lambda value: _asked_of_a_world(value, "advance"),
    "world.store_slow": lambda value: _asked_of_a_world(value, "store_slow"),
    "world.store_down": lambda value: _asked_of_a_world(value, "store_down"),
    "world.stored": lambda value: _asked_of_a_world(value, "stored"),
    "world.open": lambda value: _asked_of_a_world(value, "open"),
}


@pytest.mark.parametrize("name", KIT)
def test_the_kit_for_tests_takes_its_arguments_or_refuses_them(name):
    is_called = name.startswith("crash_test")

    def call(value: Any) -> None:
        state = random.getstate()
        attempt(lambda: KIT[name](value), (OptionError, WorldError, InvalidUserIdError, UserNotFoundError))
        assert random.getstate() == state

    # whoever is called may raise anything, and a long time takes long
    try_all(call, but=lambda value: is_called and callable(value), drawn=10)


# How values are shown


def test_a_value_is_quoted_in_a_line_whatever_it_is():
    def look(value: Any) -> None:
        text = quote(value)
        assert 0 < len(text) <= MOST_SHOWN
        text.encode()
        assert "\n" not in text

    try_all(look, drawn=300)


SHOWN: list[tuple[Any, str]] = [
    ("ann", "'ann'"),
    ("a\0\ud800", "'a\\x00\\ud800'"),
    (7, "7"),
    (-(2**63), "-9223372036854775808"),
    (10**5000, "an int of 16,610 bits"),
    (True, "True"),
    (None, "None"),
    (1.5, "1.5"),
    (timedelta(seconds=1), "datetime.timedelta(seconds=1)"),
    (b"x", "b'x'"),
    (float, "<class 'float'>"),
    (["secret"], "a list"),
    ({"secret": 1}, "a dict"),
    (object(), "an object"),
    (Touchy(), "a Touchy"),
    (Louder(), "a Louder"),
    ("a" * 79, "'" + "a" * 78 + "…"),
]


@pytest.mark.parametrize(("value", "shown"), SHOWN, ids=range(len(SHOWN)))
def test_plain_values_are_shown_and_others_by_their_type(value, shown):
    assert quote(value) == shown
