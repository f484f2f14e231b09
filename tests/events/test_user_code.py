"""Code of the program's may raise anything: the harm stays with the user it was called for.

Every place where such code runs is a row of one of the tables below. Each is tried with every kind of exception.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from cagey_sessions import (
    CorruptRecordError,
    DrainError,
    ListenerCancelledError,
    ListenerError,
    OptionError,
    SessionManager,
    StoreError,
    UnsavableError,
    UnsavedError,
    read_snapshot,
)
from cagey_sessions.stores import CallbackStore, MemoryStore
from support import add_user, inside, let_time_pass, turns


class Unusual(BaseException):
    """As test frameworks and event loops have of their own."""


class Hostile(Exception):
    """One that takes no note and has no text."""

    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")

    def __str__(self) -> str:
        raise RuntimeError("no text")


RAISED = {
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
    "a BaseException": Unusual,
    "StopIteration": StopIteration,
    "StopAsyncIteration": StopAsyncIteration,
    "TimeoutError": TimeoutError,
    "OSError": PermissionError,
    "an error of the library": lambda: StoreError("not the store"),
    "an exception without text": Hostile,
}
"""What the code raises: a function that makes it."""
BAD, USERS = 3, 20


@pytest.fixture(params=RAISED)
def raised(request: pytest.FixtureRequest) -> Callable[[], BaseException]:
    return RAISED[request.param]


class Faulty:
    """Code that raises for one user, and only when told to."""

    def __init__(self, raised: Callable[[], BaseException]) -> None:
        self.raised = raised
        self.is_on = False
        self.calls = 0

    def __call__(self, user_id: object) -> None:
        if self.is_on and user_id == BAD:
            self.calls += 1
            raise self.raised()

    async def later(self, user_id: object) -> None:
        await asyncio.sleep(0)
        self(user_id)


# With a store: hooks in the way of a save


def before_save(faulty: Faulty) -> dict[str, Any]:
    return {"before_save": lambda session: faulty(session.user_id)}


def encode(faulty: Faulty) -> dict[str, Any]:
    def encode(data: Any) -> Any:
        faulty(data["id"])
        return data

    return {"encode": encode}


HOOKS = {"before_save": before_save, "encode": encode}


@pytest.mark.guarantee("I10")
@pytest.mark.parametrize("tracking", ["content", "marked"])
@pytest.mark.parametrize("hook", HOOKS)
async def test_a_hook_of_one_user_stops_no_save_of_another(hook, tracking, raised, clock, tmp_path):
    faulty, store, told = Faulty(raised), MemoryStore(), []
    manager = SessionManager(
        store=store, interval="1s", clock=clock, tracking=tracking, spill=tmp_path / "spill", **HOOKS[hook](faulty)
    )
    manager.on("unsavable", lambda session, error: told.append((session.user_id, type(error))))
    sessions = [await manager.open(user_id, default={"id": user_id, "gold": 0}) for user_id in range(USERS)]
    await let_time_pass(clock, manager.persist_all_user_data())
    faulty.is_on = True
    for session in sessions:
        session.user_data["gold"] = 1
        session.mark_changed()
    await clock.advance("1s")
    others = [(await store.load(user_id)).body for user_id in range(USERS) if user_id != BAD]
    assert all(b'"gold":1' in body for body in others), "within one interval"
    assert (manager.statistics().unsavable, told) == (1, [(BAD, UnsavableError)])
    with pytest.raises(UnsavableError):
        await let_time_pass(clock, sessions[BAD].persist_now())
    with pytest.raises(UnsavedError) as everybody:
        await let_time_pass(clock, manager.persist_all_user_data())
    assert everybody.value.user_ids == (BAD,)
    with pytest.raises(UnsavableError):
        await let_time_pass(clock, sessions[BAD].destroy())
    assert sessions[BAD].alive, "and live, so that the program can mend it"
    with pytest.raises(DrainError) as end:
        await let_time_pass(clock, manager.destroy(deadline="1s"))
    assert end.value.user_ids == (BAD,)
    assert end.value.report.saved == USERS - 1
    assert faulty.calls
    # what cannot be encoded cannot be spilled, and takes no other with it
    assert not (tmp_path / "spill").exists()


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_user_unsaved_for_another_reason_is_spilled_beside_a_hook_that_raises(
    hook, raised, clock, tmp_path, store
):
    faulty = Faulty(raised)
    manager = SessionManager(store=store, clock=clock, spill=tmp_path / "spill", **HOOKS[hook](faulty))
    sessions = [await manager.open(user_id, default={"id": user_id, "gold": 0}) for user_id in range(USERS)]
    await let_time_pass(clock, manager.persist_all_user_data())
    faulty.is_on = True
    for session in sessions:
        session.user_data["gold"] = 1
    store.down = True
    with pytest.raises(DrainError) as end:
        await let_time_pass(clock, manager.destroy(deadline="1s"))
    assert sorted(end.value.user_ids) == list(range(USERS))
    spilled = {entry.user_id: orjson.loads(entry.body) for entry in read_snapshot(tmp_path / "spill").entries}
    assert spilled == {user_id: {"id": user_id, "gold": 1} for user_id in range(USERS) if user_id != BAD}


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_snapshot_leaves_out_whose_hook_raises(hook, raised, clock, tmp_path):
    faulty = Faulty(raised)
    manager = SessionManager(store=MemoryStore(), clock=clock, **HOOKS[hook](faulty))
    for user_id in range(USERS):
        await manager.open(user_id, default={"id": user_id})
    faulty.is_on = True
    report = await manager.snapshot(tmp_path / "snapshot")
    assert (report.saved, report.left_out) == (USERS - 1, (BAD,))
    faulty.is_on = False
    await let_time_pass(clock, manager.destroy())


async def test_a_decode_of_one_user_stops_no_login_of_another(raised, clock):
    faulty, store = Faulty(raised), MemoryStore()

    def decode(value: Any) -> Any:
        faulty(value["id"])
        return value

    manager = SessionManager(store=store, clock=clock, decode=decode)
    for user_id in range(USERS):
        await (await manager.open(user_id, default={"id": user_id})).destroy()
    faulty.is_on = True
    opened = await asyncio.gather(*(manager.open(user_id) for user_id in range(USERS)), return_exceptions=True)
    assert [user_id for user_id, each in enumerate(opened) if isinstance(each, BaseException)] == [BAD]
    assert isinstance(opened[BAD], CorruptRecordError)
    session = await manager.create()
    with pytest.raises(CorruptRecordError):
        await session.login(BAD)
    with pytest.raises(CorruptRecordError):
        await manager.read(BAD)
    with pytest.raises(CorruptRecordError):
        async with manager.edit(BAD):
            pass
    faulty.is_on = False
    assert (await manager.open(BAD)).user_data == {"id": BAD}, "and nobody has been left with the user"
    await let_time_pass(clock, manager.destroy())


async def test_a_default_that_raises_fails_its_own_call(raised, clock):
    manager = SessionManager(store=MemoryStore(), clock=clock)

    def default() -> Any:
        raise raised()

    others = [asyncio.ensure_future(manager.open(user_id, default={})) for user_id in range(USERS) if user_id != BAD]
    failed = (await asyncio.gather(manager.open(BAD, default=default), return_exceptions=True))[0]
    # a StopIteration cannot leave a coroutine
    expected = type(raised()) if isinstance(raised(), Exception) else OptionError
    assert type(failed) is expected or isinstance(failed, RuntimeError)
    await asyncio.gather(*others)
    session = await manager.create()
    with pytest.raises(Exception) as caught:
        await session.login(BAD, default=default)
    assert type(caught.value) in (expected, RuntimeError)
    await session.login(BAD, default={})
    await let_time_pass(clock, manager.destroy())


# Listeners


LISTENERS = {
    "created": lambda manager: manager.create(),
    "started": lambda manager: manager.find_by_key("k").start(),
    "before_destroy": lambda manager: manager.find_by_key("k").destroy(),
    "destroy": lambda manager: manager.find_by_key("k").destroy(),
}


def as_listener(kind: str, raised: Callable[[], BaseException]) -> Callable[..., object]:
    def sync(*_: object) -> None:
        raise raised()

    async def asynchronous(*_: object) -> None:
        await asyncio.sleep(0)
        raise raised()

    def future(*_: object) -> Any:
        failed: concurrent.futures.Future[None] = concurrent.futures.Future()
        error = raised()
        if isinstance(error, asyncio.CancelledError):
            failed.cancel()
        else:
            failed.set_exception(error)
        return failed

    return {"sync": sync, "async": asynchronous, "a future of a thread": future}[kind]


@pytest.mark.parametrize("kind", ["sync", "async", "a future of a thread"])
@pytest.mark.parametrize("stored", [False, True], ids=["listeners", "store"])
@pytest.mark.parametrize("event", LISTENERS)
async def test_a_listener_that_raises_fails_the_call_it_was_called_for_and_nothing_else(
    event, stored, kind, raised, make_manager, clock
):
    manager = SessionManager(store=MemoryStore(), clock=clock) if stored else make_manager()
    await manager.create("k")
    other = await manager.open(1, default={}) if stored else await add_user(manager, 1)
    after = []
    manager.once(event, as_listener(kind, raised))
    manager.once(event, lambda *_: after.append(event))
    with pytest.raises(ListenerError) as caught:
        await LISTENERS[event](manager)
    (error,) = caught.value.exceptions
    assert isinstance(error, (type(raised()), ListenerCancelledError, RuntimeError)), error
    assert after == [event], "the next listener has heard it"
    assert other.alive
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("kind", ["sync", "async", "a future of a thread"])
async def test_an_identified_listener_that_raises_leaves_the_user_set(kind, raised, clock):
    manager = SessionManager(store=MemoryStore(), clock=clock)
    session = await manager.create()
    session.on("identified", as_listener(kind, raised))
    with pytest.raises(ListenerError):
        await session.login(1, default={})
    assert session.user_id == 1
    manager.once("identified", as_listener(kind, raised))
    with pytest.raises(ListenerError):
        await manager.open(2, default={})
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("kind", ["sync", "async", "a future of a thread"])
async def test_a_saving_listener_that_raises_for_one_user_stops_no_other(kind, raised, clock):
    manager = SessionManager(interval="1s", clock=clock)
    saved, heard, is_on = set(), [], False
    fails = as_listener(kind, raised)

    @manager.on("persist_user_data")
    def save(session: Any) -> object:
        if session.user_id == BAD and is_on:
            return fails()
        saved.add(session.user_id)
        return None

    manager.on("error", lambda error, session: heard.append((type(error), session and session.user_id)))
    sessions = [await add_user(manager, user_id) for user_id in range(USERS)]
    is_on = True
    await clock.advance("1s")
    assert saved == set(range(USERS)) - {BAD}
    assert set(heard) == {(ListenerError, BAD)}
    with pytest.raises(ListenerError):
        await let_time_pass(clock, sessions[BAD].persist_now())
    with pytest.raises(DrainError) as end:
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))
    assert end.value.user_ids == (BAD,)


@pytest.mark.parametrize("event", ["error", "unsavable"])
@pytest.mark.parametrize("kind", ["sync", "async", "a future of a thread"])
async def test_a_listener_of_reports_that_raises_is_logged(event, kind, raised, clock, caplog):
    manager = SessionManager(store=MemoryStore(), interval="1s", clock=clock)
    manager.on(event, as_listener(kind, raised))
    if event == "unsavable":
        (await manager.open(1, default={})).user_data = {"a set": {1}}
    else:
        inside(manager).reports.error(OSError("told"), None)
    other = await manager.open(2, default={})
    other.user_data["gold"] = 1
    await clock.advance("1s")
    assert f"of event '{event}' raised" in caplog.text
    assert (await let_time_pass(clock, other.persist_now())).version
    with pytest.raises(DrainError) if event == "unsavable" else pytest.MonkeyPatch.context():
        await let_time_pass(clock, manager.destroy(deadline="1s"))


async def test_a_log_that_raises_stops_nothing(raised, clock, store):
    class Log:
        def __getattr__(self, level: str) -> Any:
            def say(*_: object) -> None:
                raise raised()

            return say

    manager = SessionManager(store=store, interval="1s", clock=clock, log=Log())
    session = await manager.open(1, default={})
    store.down = True
    session.user_data["gold"] = 1
    await clock.advance("2s")
    store.down = False
    await clock.advance("2s")
    assert (await let_time_pass(clock, session.persist_now())).changed is False, "it was saved meanwhile"
    await let_time_pass(clock, manager.destroy())


# Functions and stores of the program's


@pytest.mark.guarantee("I10")
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_load_that_raises_for_one_user_stops_no_login_of_another(kind, raised, clock):
    faulty = Faulty(raised)
    faulty.is_on = True

    async def load(user_id: int) -> Any:
        await asyncio.sleep(0)
        await faulty.later(user_id) if kind == "async" else faulty(user_id)

    manager = SessionManager(store=CallbackStore(load, lambda records: None), clock=clock, save_timeout="1s")
    opened = await let_time_pass(
        clock,
        asyncio.gather(*(manager.open(user_id, default={}) for user_id in range(USERS)), return_exceptions=True),
    )
    assert [user_id for user_id, each in enumerate(opened) if isinstance(each, BaseException)] == [BAD]
    assert isinstance(opened[BAD], StoreError)
    assert manager.health().state == "ok", "one user is not the store"
    await let_time_pass(clock, manager.destroy())


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_save_that_raises_for_one_user_stops_no_save_of_another(kind, raised, clock):
    faulty, saved = Faulty(raised), {}

    async def save_many(records: list[Any]) -> None:
        for record in records:
            await faulty.later(record.user_id) if kind == "async" else faulty(record.user_id)
        saved.update((record.user_id, record.value()) for record in records)

    manager = SessionManager(store=CallbackStore(lambda user_id: None, save_many), interval="1s", clock=clock)
    sessions = [await manager.open(user_id, default={}) for user_id in range(USERS)]
    await let_time_pass(clock, manager.persist_all_user_data())
    faulty.is_on = True
    for session in sessions:
        session.user_data["gold"] = 1
    await clock.advance("2s")
    assert [user_id for user_id in range(USERS) if saved[user_id] != {"gold": 1}] == [BAD]
    assert manager.statistics().store_up
    with pytest.raises(DrainError) as end:
        await let_time_pass(clock, manager.destroy(deadline="1s"))
    assert end.value.user_ids == (BAD,)


@pytest.mark.parametrize("method", ["open", "claim_many", "save_many", "release_many", "load", "erase", "holder"])
async def test_a_method_of_a_store_that_raises_once_is_called_again(method, raised, clock):
    class Odd(MemoryStore):
        shared = True
        is_on = False

    def make(name: str) -> Any:
        real = getattr(MemoryStore, name)

        async def odd(self: Odd, *args: Any) -> Any:
            if self.is_on:
                type(self).is_on = False
                raise raised()
            return await real(self, *args)

        return odd

    setattr(Odd, method, make(method))
    store = Odd()
    manager = SessionManager(store=store, interval="1s", clock=clock)
    if method != "open":
        await manager.__aenter__()
        await manager.open(1, default={})
    Odd.is_on = True
    session = None
    for _ in range(2):  # the first call of a method that is not repeated by itself may raise, as a StoreError
        try:
            session = session or await let_time_pass(clock, manager.open(2, default={}))
        except Exception as error:
            assert isinstance(error, (StoreError, type(raised()), RuntimeError)), error
    for call in (manager.read, manager.erase):
        try:
            await let_time_pass(clock, call(2))
        except Exception as error:
            assert isinstance(error, (StoreError, LookupError, type(raised()), RuntimeError)), error
    Odd.is_on = method == "release_many"
    await clock.advance("5s")
    report = await let_time_pass(clock, manager.destroy())
    assert report.unsaved == ()


async def test_a_store_that_raises_while_it_is_closed_or_asked_to_abort_ends_all_the_same(raised, clock, caplog):
    class Odd(MemoryStore):
        async def save_many(self, records: Any) -> Any:
            await asyncio.Event().wait()

        def abort(self, call: Any) -> None:
            call.cancel()
            raise raised()

        async def close(self) -> None:
            await super().close()
            raise raised()

    manager = SessionManager(store=Odd(), clock=clock, save_timeout="1s")
    session = await manager.open(1, default={})
    with pytest.raises(StoreError):
        await let_time_pass(clock, session.persist_now())
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(deadline="1s"))
    assert "could not be closed" in caplog.text and "could not abort" in caplog.text


# What is meant for the loop or the process


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_may_end_the_process(hook, ends):
    faulty = Faulty(ends)

    async def main() -> None:
        manager = SessionManager(store=MemoryStore(), log=logging.getLogger("silent"), **HOOKS[hook](faulty))
        session = await manager.open(BAD, default={"id": BAD})
        faulty.is_on = True
        await session.persist_now()

    with pytest.raises(ends):
        asyncio.run(main())


async def test_the_cancellation_of_a_call_ends_the_listener_it_waits_for(make_manager):
    manager = make_manager()
    session = await manager.create()
    ended = []

    @session.on("started")
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    call = asyncio.ensure_future(session.start())
    await turns()
    call.cancel()
    await turns()
    assert call.cancelled() and ended
    await manager.destroy()


async def test_the_cancellation_of_the_task_of_an_end_is_raised_at_no_other_caller(make_manager, clock, db):
    manager = make_manager()
    await add_user(manager, 1)
    db.script = ["1s"]
    ends = [asyncio.ensure_future(manager.destroy(True)) for _ in range(2)]
    for _ in range(3):
        await turns()
        for task in asyncio.all_tasks():
            if task.get_name().startswith("cagey-sessions"):
                task.cancel()
    for end in ends:
        assert (await let_time_pass(clock, end)).unsaved == ()
    assert db.stored == {1: {"gold": 1}}
