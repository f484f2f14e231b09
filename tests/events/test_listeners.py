"""Listeners: who is called, when, and what their errors do."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from cagey_sessions import (
    DrainError,
    InvalidListenerError,
    ListenerCancelledError,
    ListenerError,
    SessionManager,
    UnknownEventError,
    WrongLoopError,
)
from support import add_user, turns


async def test_a_raising_listener_stops_no_other(make_manager, db):
    manager = make_manager(interval=None)
    seen = []

    @manager.on("persist_user_data")
    def sync_raise(session):
        raise ValueError("sync")

    @manager.on("persist_user_data")
    async def async_raise(session):
        await asyncio.sleep(0)
        raise KeyError("async")

    manager.on("persist_user_data", lambda session: seen.append(session.user_id))
    manager.on("destroy", sync_raise)
    manager.on("destroy", async_raise)
    manager.on("destroy", lambda session: seen.append("destroyed"))
    session = await manager.create()
    await session.set_user(1, {})
    with pytest.raises(ListenerError) as caught:
        await session.persist_now()
    assert seen == [1]
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]
    assert "sync_raise" in caught.value.exceptions[0].__notes__[0]
    assert manager.statistics().saved == 0, "a save counts only if every listener succeeded"
    with pytest.raises(ListenerError) as caught:
        await session.destroy()
    assert seen == [1, "destroyed"]
    assert len(caught.value.exceptions) == 2
    await manager.destroy()


class Game:
    """Listeners of many kinds, which fail."""

    def arrive(self, session):
        raise ValueError("arrive")

    async def leave(self):
        raise KeyError("leave")

    def save(self, wanted, session):
        raise OSError("save")

    def __call__(self, session):
        raise RuntimeError("called")


class Nameless:
    """A listener that is asked for its name in vain."""

    def __call__(self, session):
        raise RuntimeError("called")

    def __getattr__(self, name):
        raise OSError(name)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """An exception that nothing can be added to."""

    about: int


async def test_the_message_names_who_raised_and_at_which_event(make_manager):
    manager = make_manager()
    game, secret = Game(), {"password": "xyzzy"}
    session = await manager.create("secret key")
    cases = (
        (game.arrive, "listener Game.arrive of event 'started' raised"),
        (functools.partial(game.save, secret), "listener Game.save of event 'started' raised"),
        (game, "listener Game of event 'started' raised"),
        (Nameless(), "listener Nameless of event 'started' raised"),
    )
    for listener, said in cases:
        manager.once("started", listener)
        with pytest.raises(ListenerError) as caught:
            await session.start()
        assert caught.value.message == said
        assert caught.value.exceptions[0].__notes__ == ["raised by " + said.removesuffix(" raised")]
    manager.once("started", game.arrive)
    session.on("started", game.leave)
    with pytest.raises(ListenerError, match=r"^2 listeners raised: Game\.arrive of event 'started', Game\.leave of"):
        await session.start()
    await session.set_user(1, secret)
    manager.on("before_destroy", game.arrive)
    manager.on("persist_user_data", functools.partial(game.save, secret))
    with pytest.raises(ListenerError) as caught:
        await session.destroy(True)
    assert caught.value.message == (
        "2 listeners raised: Game.arrive of event 'before_destroy', Game.save of event 'persist_user_data'"
    )
    session.on("destroy", game.leave)
    with pytest.raises(ListenerError) as caught:
        await session.destroy(False)
    assert caught.value.message == "listener Game.leave of event 'destroy' raised"
    await manager.destroy()


async def test_an_exception_that_is_raised_over_and_over_names_who_raised_it_this_time(make_manager):
    manager = make_manager()
    for failure in (ValueError("always the same"), Frozen(1)):

        def first(*args, failure=failure):
            raise failure

        def second(*args, failure=failure):
            raise failure

        session = await manager.create()
        session.on("started", first)
        session.on("identified", second)
        for _ in range(2):
            with pytest.raises(ListenerError) as caught:
                await session.start()
            assert "first of event 'started'" in caught.value.message and "second" not in caught.value.message
        with pytest.raises(ListenerError) as caught:
            await session.set_user(1, {})
        assert "second of event 'identified'" in caught.value.message and "first" not in caught.value.message
        session.on("started", second)
        with pytest.raises(ListenerError, match=r"first of event 'started', .*second of event 'started'"):
            await session.start()
        assert len(failure.__notes__) == 3
        await session.destroy()
    await manager.destroy()


async def test_a_message_names_some_of_very_many(make_manager):
    manager = make_manager()
    for number in range(30):

        def fails(session, number=number):
            raise ValueError(number)

        fails.__qualname__ = f"listener_{number}"
        manager.on("started", fails)
    with pytest.raises(ListenerError, match=r"^30 listeners raised: listener_0 of .*, listener_9 of .*, \.\.\.$"):
        await (await manager.create()).start()
    await manager.destroy()


async def test_the_list_may_change_during_an_emit(make_manager):
    manager = make_manager()
    seen = []

    def a(session):
        seen.append("a")
        manager.off("started", b)

    def b(session):
        seen.append("b")

    def c(session):
        seen.append("c")
        manager.on("started", d)

    def d(session):
        seen.append("d")

    async def e(session):
        seen.append("e")
        await session.start()

    for listener in (a, b, c):
        manager.on("started", listener)
    manager.once("started", e)
    session = await manager.create()
    await session.start()
    assert seen == ["a", "c", "e", "a", "c", "d"], "removed: skipped; added: from the next emit on; once: once"
    await manager.destroy()


async def test_a_once_listener_runs_once_and_can_be_removed(make_manager):
    manager = make_manager()
    runs = []

    def f(session):
        runs.append(session)
        manager.off("started", f)
        raise ValueError("no")

    manager.once("started", f)
    session = await manager.create()
    with pytest.raises(ListenerError):
        await session.start()
    await session.start()
    assert runs == [session]
    manager.off("started", f)
    manager.once("started", f)
    manager.off("started", f)
    await session.start()
    assert runs == [session]
    await manager.destroy()


async def test_listeners_run_one_at_a_time_in_the_order_of_registration(make_manager, clock):
    manager = make_manager()
    seen = []

    class Thing:
        async def method(self, session):
            seen.append("method begins")
            await clock.sleep("1s")
            seen.append("method ends")

        def __call__(self, session):
            seen.append("callable")

    manager.on("started", Thing().method)
    manager.on("started", functools.partial(lambda tag, session: seen.append(tag), "partial"))
    manager.on("started", Thing())
    session = await manager.create()
    start = asyncio.create_task(session.start())
    await turns()
    assert seen == ["method begins"]
    await clock.advance("1s")
    await start
    assert seen == ["method begins", "method ends", "partial", "callable"]
    await manager.destroy()


async def test_on_is_a_decorator_too_and_off_takes_back_one_registration(make_manager):
    manager = make_manager()
    calls = []

    @manager.on("created")
    @manager.on("created")
    def listener(session):
        calls.append(session)

    await manager.create()
    assert len(calls) == 2
    manager.off("created", listener)
    session = await manager.create()
    assert len(calls) == 3

    @session.once("started")
    async def begun():
        calls.append("begun")

    await session.start()
    await session.start()
    assert calls[3:] == ["begun"]
    await manager.destroy()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("beforeDestroy", "did you mean 'before_destroy'"),
        ("persistUserData", "did you mean 'persist_user_data'"),
        ("authenticated", "known are"),
        ("destroyed", "did you mean 'destroy'"),
        (7, "is a str"),
    ],
)
def test_an_event_that_does_not_exist_is_refused_with_a_suggestion(name, hint):
    manager = SessionManager()
    for call in (manager.on, manager.once, manager.off):
        with pytest.raises(UnknownEventError, match=hint):
            call(name, print)


async def test_a_session_has_only_its_own_events(make_manager):
    manager = make_manager()
    session = await manager.create()
    for name in ("created", "persist_user_data", "error"):
        with pytest.raises(UnknownEventError):
            session.on(name, print)
    with pytest.raises(InvalidListenerError):
        session.on("started", "print")
    with pytest.raises(InvalidListenerError):
        manager.on("started", 7)
    await manager.destroy()


async def test_what_is_no_exception_is_in_the_group_as_the_cause_of_one(make_manager):
    class Stop(BaseException):
        pass

    manager = make_manager()

    def stop(session):
        raise Stop

    manager.on("started", stop)
    session = await manager.create()
    with pytest.raises(ListenerError) as caught:
        await session.start()
    (error,) = caught.value.exceptions
    assert isinstance(error, ListenerCancelledError) and "raised Stop" in str(error)
    assert isinstance(error.__cause__, Stop)
    manager.on("created", stop)
    with pytest.raises(ListenerError):
        await manager.create("k")
    await turns()
    assert manager.find_by_key("k") is None
    assert len(manager) == 1
    await manager.destroy()


async def test_a_listener_that_is_cancelled_from_outside_fails_like_any_other(make_manager, db):
    """A CancelledError that is not ours must not leave an end without an outcome."""
    manager = make_manager()
    seen = []

    async def cancelled(*_):
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    for name in ("before_destroy", "destroy", "started"):
        manager.on(name, cancelled)
        manager.on(name, lambda session, name=name: seen.append(name))
    session = await manager.create()
    with pytest.raises(ListenerError):
        await session.start()
    await session.set_user(1, {"gold": 1})
    with pytest.raises(ListenerError) as caught:
        await session.destroy(True)
    assert seen == ["started", "before_destroy", "destroy"]
    assert len(caught.value.exceptions) == 2
    assert db.stored == {1: {"gold": 1}}
    await manager.create()
    with pytest.raises(DrainError):
        await manager.destroy(True)


async def test_after_a_failing_identified_listener_the_user_stays_set(make_manager, db):
    manager = make_manager()
    session = await manager.create()
    session.on("identified", lambda user_id, data: 1 / 0)
    with pytest.raises(ListenerError):
        await session.set_user(7, {"gold": 1})
    assert manager.find_by_user(7) is session
    await session.destroy(True)
    assert db.stored == {7: {"gold": 1}}
    await manager.destroy()


async def test_error_listeners_that_fail_or_hang_stop_nothing(make_manager, db, clock, caplog):
    manager = make_manager(interval="1s")

    @manager.on("error")
    async def fails(error, session):
        raise ValueError("in the error listener")

    session = await manager.create()
    await session.set_user(1, {"gold": 1})
    db.always[1] = OSError("down")
    await clock.advance("3s")
    said = [record.getMessage() for record in caplog.records]
    assert any("<locals>.fails of event 'error' raised" in line for line in said)
    assert any("Db.save of event 'persist_user_data' raised" in line for line in said)
    hang, told = asyncio.Event(), []

    @manager.on("error")
    async def hangs(error, session):
        told.append(error)
        await hang.wait()

    await clock.advance("2000s")
    assert len(told) == 1
    db.always.clear()
    await clock.advance("1s")
    assert db.stored == {1: {"gold": 1}}
    hang.set()
    await turns(5000)
    assert 900 < len(told) <= 1001, "what waits to be told is bounded"
    await manager.destroy()


async def test_a_listener_may_return_a_future_of_a_thread_pool(clock):
    with ThreadPoolExecutor(1) as pool:
        manager = SessionManager(clock=clock)
        manager.on("persist_user_data", lambda session: pool.submit(lambda: 1 / 0))
        session = await add_user(manager, 1)
        with pytest.raises(ListenerError) as caught:
            await session.persist_now()
        assert isinstance(caught.value.exceptions[0], ZeroDivisionError)
        await manager.destroy()


async def test_listeners_cannot_be_registered_from_another_thread(make_manager):
    manager = make_manager()
    await manager.create()
    with pytest.raises(WrongLoopError):
        await asyncio.to_thread(manager.on, "persist_user_data", print)
    await manager.destroy()


def test_a_listener_may_be_registered_while_the_loop_stands_still(clock):
    manager = SessionManager(interval="1s", clock=clock)
    saved = []

    async def begin():
        await add_user(manager, 1)
        await clock.advance("2s")

    async def go_on():
        await turns()
        await manager.destroy(True)

    with asyncio.Runner() as runner:
        runner.run(begin())
        manager.on("persist_user_data", lambda session: saved.append(session.user_id))
        runner.run(go_on())
    assert saved == [1, 1]
