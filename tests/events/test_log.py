"""What the log gets: ids, counts and where an error comes from; no value of user data, and no name of a member."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from cagey_sessions import (
    CageySessionsError,
    CorruptRecordError,
    DrainError,
    EncodingError,
    ListenerError,
    SessionManager,
    StoreContractError,
    UnsavableError,
    dataclass_codec,
    msgspec_codec,
)
from cagey_sessions.stores import CallbackStore, MemoryStore, Outcome, Verdict
from support import add_user, let_time_pass

NAME = "canary@example.org"


VALUE = "canary-value"


class Opaque:
    """Nothing that JSON knows."""

    def __repr__(self) -> str:
        return VALUE


@dataclass
class Player:
    by_name: dict[str, int]


UNSAVABLE: dict[str, Any] = {
    "a type": {NAME: Opaque()},
    "deep inside": {NAME: [{"x": {NAME: (VALUE,)}}]},
    "not finite": {NAME: float("nan")},
    "too wide": {NAME: 10**30},
    "no text": {NAME: VALUE + "\ud800"},
    "a name that is no text": {NAME + "\ud800": 1},
    "a name that is no str": {NAME: {7: VALUE}},
    "too large": {NAME: VALUE * 100_000},
}


def seen(caplog: pytest.LogCaptureFixture, *more: object) -> list[str]:
    """All that has been said so far, in the log and in what else is given."""
    texts = [record.getMessage() for record in caplog.records]
    texts += [str(record.args) + str(record.exc_info) for record in caplog.records]
    for each in more:
        texts += [str(each), repr(each)]
    return texts


def assert_clean(texts: list[str]) -> None:
    assert not [text for text in texts if "canary" in text]


async def _refused(clock: Any, manager: Any, session: Any) -> list[BaseException]:
    """Every way in which data is refused."""
    refused: list[BaseException] = []
    for call in (session.persist_now, session.destroy, manager.persist_all_user_data):
        with pytest.raises(CageySessionsError) as caught:
            await let_time_pass(clock, call())
        refused.append(caught.value)
    with pytest.raises(EncodingError) as read:
        await manager.read("ann")
    refused.append(read.value)
    await clock.advance("100s")
    with pytest.raises(DrainError) as drained:
        await let_time_pass(clock, manager.destroy())
    return [*refused, drained.value, *(user.error for user in drained.value.report.unsaved)]


@pytest.mark.guarantee("I24")
@pytest.mark.parametrize("data", UNSAVABLE.values(), ids=UNSAVABLE)
async def test_no_refusal_tells_what_is_in_the_data(clock, caplog, data):
    caplog.set_level(logging.DEBUG)
    told: list[Any] = []
    manager = SessionManager(store=MemoryStore(), clock=clock)
    manager.on("unsavable", lambda session, error: told.append(error))
    session = await manager.open("ann", default={})
    session.user_data = data
    said: list[object] = [session, manager]
    for error in await _refused(clock, manager, session):
        said += [error, *getattr(error, "exceptions", ())]
    said += [manager.health(), manager.statistics(), *told]
    assert any("'ann'" in text for text in seen(caplog)), "whose data it is"
    assert told, "the program hears of it"
    assert_clean(seen(caplog, *said))
    named = [error.path for error in said if isinstance(error, (UnsavableError, EncodingError))]
    assert named
    if data not in (UNSAVABLE["too large"], UNSAVABLE["a name that is no text"]):  # it is all of the data
        assert all(NAME in path for path in named), "and is told where"


CODECS: dict[str, tuple[Any, Any]] = {
    "a function": (lambda data: {}[VALUE], None),
    "a function that says why": (lambda data: 1 / 0, None),
    "a dataclass": (dataclass_codec(Player).encode, Player({NAME: VALUE})),
    "msgspec": (msgspec_codec(dict[str, int]).encode, {NAME: VALUE}),
}


@pytest.mark.parametrize("name", CODECS)
async def test_no_codec_tells_what_is_in_the_data(clock, caplog, name):
    encode, data = CODECS[name]
    manager = SessionManager(store=MemoryStore(), clock=clock, encode=lambda data: data and encode(data))
    session = await manager.open("ann", default=lambda: False)
    session.user_data = data or {NAME: VALUE}
    assert_clean(seen(caplog, *await _refused(clock, manager, session)))
    assert any("'ann'" in text for text in seen(caplog))


async def test_no_store_tells_what_is_in_the_data(clock, caplog):
    class Refusing(MemoryStore):
        async def save_many(self, records: Any) -> list[Verdict]:
            assert_clean([repr(records), str(records)])
            return [Verdict(Outcome.INVALID, "the body is not to its taste")] * len(records)

    manager = SessionManager(store=Refusing(), clock=clock)
    session = await manager.open("ann", default={NAME: VALUE})
    with pytest.raises(UnsavableError) as caught:
        await let_time_pass(clock, session.persist_now())
    await clock.advance("100s")
    with pytest.raises(DrainError) as drained:
        await let_time_pass(clock, manager.destroy())
    assert_clean(seen(caplog, caught.value, drained.value))


async def test_what_a_store_returns_is_not_shown(clock, caplog):
    async def save_many(records: Any) -> None:
        raise KeyError(VALUE)

    manager = SessionManager(store=CallbackStore(lambda user_id: {NAME: {VALUE}}, save_many), clock=clock)
    with pytest.raises(StoreContractError) as caught:
        await let_time_pass(clock, manager.open("ann"))
    assert caught.value.path == f'user_data["{NAME}"]'
    await manager.destroy()
    assert_clean(seen(caplog, caught.value))


async def test_a_record_that_cannot_be_read_is_not_shown(clock, caplog):
    store = MemoryStore()
    async with SessionManager(store=MemoryStore(store.backing), clock=clock) as manager:
        await manager.open("ann", default={"by_name": {NAME: VALUE}})
    decode = dataclass_codec(Player).decode
    async with SessionManager(store=store, clock=clock, decode=decode) as manager:
        for call in (manager.open, manager.read):
            with pytest.raises(CorruptRecordError) as caught:
                await call("ann")
            assert NAME in (caught.value.path or ""), "the program is told where"
            assert VALUE.encode() in caught.value.body
            assert_clean(seen(caplog, caught.value))


async def test_debug_names_places_and_no_values(clock, said):
    manager = SessionManager(store=MemoryStore(), clock=clock, debug=True)
    shared = [VALUE]
    for user_id in ("ann", "bob"):
        session = await manager.open(user_id, default={})
        session.user_data["bag"] = shared
        await session.persist_now()
    assert said()
    assert_clean(said())
    await manager.destroy()


def _raise(*_: object) -> Any:
    raise ValueError(VALUE)


async def _raise_later(*_: object) -> Any:
    await asyncio.sleep(0)
    return _raise()


def lines_of(caplog: pytest.LogCaptureFixture, who: str) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if who in record.getMessage())


def assert_traced(text: str, *functions: str) -> None:
    assert "ValueError, raised in\n" in text
    for name in functions:
        (line,) = {line for line in text.splitlines() if line.endswith(f", in {name}")}
        assert f'File "{__file__}", line ' in line
    assert "canary" not in text


@pytest.mark.parametrize("hook", ["before_save", "encode"])
async def test_a_hook_that_raises_while_no_caller_waits_is_found_in_the_log(clock, caplog, hook):
    def of_a_user(value: Any) -> Any:
        data = value.user_data if hook == "before_save" else value
        return _raise() if data.get("bad") else value

    manager = SessionManager(store=MemoryStore(), clock=clock, **{hook: of_a_user})
    session = await manager.open("ann", default={"gold": 1})
    session.user_data["bad"] = VALUE
    await clock.advance("31s")
    text = lines_of(caplog, "'ann'")
    assert f"{hook} raised ValueError" in text
    assert_traced(text, "_raise", of_a_user.__qualname__)
    await session.destroy(persist=False)
    await manager.destroy()


@pytest.mark.parametrize("listener", [_raise, _raise_later])
@pytest.mark.parametrize("event", ["persist_user_data", "error"])
async def test_a_listener_that_raises_is_found_in_the_log(clock, caplog, event, listener):
    manager = SessionManager(clock=clock, interval="30s")
    manager.on(event, listener)
    if event == "error":
        manager.on("persist_user_data", _raise)
    await add_user(manager, "ann")
    await clock.advance("40s")
    assert_traced(lines_of(caplog, f"'{event}' raised"), listener.__name__, "_raise")
    await manager.destroy(False)


@pytest.mark.parametrize("event", ["before_destroy", "destroy"])
async def test_a_listener_that_raises_when_the_caller_has_gone_is_found_in_the_log(clock, caplog, event):
    gate = asyncio.Event()

    async def wait(*_: object) -> None:
        await gate.wait()
        _raise()

    manager = SessionManager(clock=clock)
    manager.on(event, wait)
    session = await add_user(manager, "ann")
    task = asyncio.create_task(session.destroy())
    await clock.advance("1s")
    task.cancel()
    await clock.advance("1s")
    gate.set()
    await session.wait_ended()
    assert_traced(lines_of(caplog, "user 'ann'"), "_raise")
    await manager.destroy()


async def test_a_function_of_the_store_that_raises_is_found_in_the_log(clock, caplog):
    manager = SessionManager(store=CallbackStore(lambda user_id: None, _raise_later), clock=clock)
    session = await manager.open("ann", default={})
    await clock.advance("40s")
    assert_traced(lines_of(caplog, "'ann'"), "_raise", "_raise_later")
    await session.destroy(persist=False)
    await manager.destroy(False)


async def test_what_somebody_waits_for_is_raised_with_all_its_frames(clock):
    """The caller gets the exception of the hook itself, or as the cause of ours."""
    store = MemoryStore()
    async with SessionManager(store=MemoryStore(store.backing), clock=clock) as manager:
        await manager.open("bob", default={})
    manager = SessionManager(store=store, clock=clock, decode=_raise)
    for call in (partial(manager.open, "ann", default=_raise), partial(manager.open, "bob")):
        with pytest.raises((ValueError, CorruptRecordError)) as caught:
            await call()
        error = caught.value if isinstance(caught.value, ValueError) else caught.value.__cause__
        assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-1] == "_raise"
    await manager.destroy()


async def test_a_long_way_is_cut_to_its_end(clock, caplog):
    def deeper(left: int) -> Any:
        return deeper(left - 1) if left else _raise()

    manager = SessionManager(store=MemoryStore(), clock=clock, before_save=lambda session: deeper(200))
    session = await manager.open("ann", default={})
    await clock.advance("31s")
    text = lines_of(caplog, "'ann'")
    assert_traced(text, "_raise")
    assert len(text.splitlines()) < 30
    await session.destroy(persist=False)
    await manager.destroy()


class Braces:
    """Formats with braces, as loguru does, and only if there is something to format."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _take(self, message: str, *args: object, **more: object) -> None:
        self.lines.append(message.format(*args, **more) if args or more else message)

    debug = info = warning = error = _take


class Events(Braces):
    """Takes one text and named values, as structlog does."""

    def _take(self, event: str, **values: object) -> None:
        self.lines.append(event)

    debug = info = warning = error = _take


class Standard(Braces):
    """The one that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.Logger("standard")
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.logger.addHandler(handler)
        self.debug, self.info = self.logger.debug, self.logger.info
        self.warning, self.error = self.logger.warning, self.logger.error


@pytest.mark.parametrize("kind", [Standard, Braces, Events, partial(logging.LoggerAdapter, None)])
@pytest.mark.parametrize("user_id", ["ann", "100 %s {0} %(name)s {", "%"])
async def test_a_logger_of_any_kind_gets_whole_texts(clock, caplog, kind, user_id):
    log = logging.LoggerAdapter(logging.getLogger("adapted")) if isinstance(kind, partial) else kind()
    manager = SessionManager(store=MemoryStore(), clock=clock, log=log)
    session = await manager.open(user_id, default={})
    session.user_data["bad"] = {1}
    await clock.advance("31s")
    lines = caplog.messages if isinstance(kind, partial) else log.lines
    assert any(f"the data of user {user_id!r} cannot be saved" in line for line in lines)
    session.user_data.clear()
    await manager.destroy()


@pytest.mark.parametrize("kind", [Standard, Braces, Events])
def test_a_logger_of_any_kind_hears_of_a_forgotten_manager(kind):
    log = kind()

    async def forget() -> None:
        manager = SessionManager(interval="1h", log=log)
        manager.on("persist_user_data", lambda session: None)
        await add_user(manager, "ann")

    asyncio.run(forget())
    gc.collect()
    assert [line[:16] for line in log.lines] == ["unsaved users: 1"]


async def test_a_logger_that_fails_stops_nothing(clock, db):
    class Log:
        def fails(self, *_):
            raise OSError("the disk of the log is full")

        debug = info = warning = error = fails

    manager = SessionManager(interval="10s", clock=clock, log=Log())
    manager.on("persist_user_data", db.save)
    await add_user(manager, 1)
    db.script = [OSError("down")] * 2
    await clock.advance("20s")
    assert db.stored == {1: {"gold": 1}}
    db.always[1] = OSError("down")
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))


@pytest.mark.guarantee("I24")
async def test_neither_keys_nor_data_are_logged(make_manager, db, clock, caplog):
    caplog.set_level(logging.DEBUG)
    manager = make_manager()
    session = await add_user(manager, 1, {"secret": "canary-data"}, key="canary-key")
    db.script = [ValueError("canary-data")] * 3
    messages = [repr(session)]
    with pytest.raises(ListenerError) as caught:
        await session.destroy(True)
    messages.append(str(caught.value))
    await clock.advance("40s")
    messages += [record.getMessage() for record in caplog.records]
    assert any("user 1" in message for message in messages)
    assert not [message for message in messages if "canary" in message]
    await manager.destroy()
