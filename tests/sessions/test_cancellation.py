"""Cancelling a public await, wherever it can be cancelled, cuts no save and leaves nothing half done."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from cagey_sessions import SessionManager
from support import ScriptedStore, changed, edit, end, inside, let_time_pass, turns


async def add_user(manager, user_id, key=None):
    session = await manager.create(key)
    await session.set_user(user_id, {"gold": 1})
    return session


CALLS = {
    "persist_now": lambda manager, session: session.persist_now(),
    "destroy": lambda manager, session: session.destroy(True),
    "manager.destroy": lambda manager, session: manager.destroy(True),
    "persist_all": lambda manager, session: manager.persist_all_user_data(),
    "replace": lambda manager, session: manager.create("k", replace=True),
    "wait_ended": lambda manager, session: session.wait_ended(),
}


@pytest.mark.guarantee("I14")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("slow", [False, True])
async def test_cancelled_at_every_await(make_manager, db, clock, call, slow):
    """Step the loop n turns into the call, cancel, and compare: for every n until the call ends by itself."""
    for n in range(60):
        manager = make_manager(interval=None)
        manager.on("before_destroy", lambda session: asyncio.sleep(0))
        manager.on("destroy", lambda session: asyncio.sleep(0))
        db.log.clear()
        db.stored.clear()
        db.delay = "10ms" if slow else lambda: asyncio.sleep(0)
        session = await add_user(manager, 1, key="k")
        session.user_data["gold"] = 2
        task = asyncio.create_task(CALLS[call](manager, session))
        for _ in range(n):
            await asyncio.sleep(0)
        by_itself = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or by_itself
        await clock.advance("20ms")
        assert all(write.error is None and write.end is not None for write in db.log), "no write was cut"
        if session.alive:
            assert manager.find_by_user(1) is session, "live and whole"
            assert manager.find_by_key("k") is session
            save = asyncio.create_task(session.persist_now())
            await clock.advance("20ms")
            await save
        else:
            assert manager.find_by_user(1) is None
        if db.log or session.alive:
            assert db.stored == {1: {"gold": 2}}
        again = asyncio.create_task(
            CALLS[call](manager, session) if call == "manager.destroy" else manager.destroy(True)
        )
        await clock.advance("50ms")
        await again
        assert len(manager) == 0
        if by_itself:
            break
    assert n > 1


async def test_cancelling_create_inside_a_created_listener_leaves_no_session(make_manager):
    manager = make_manager()
    manager.on("created", lambda session: asyncio.Event().wait())
    task = asyncio.create_task(manager.create("k"))
    await turns()
    assert manager.find_by_key("k") is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await turns()
    assert manager.find_by_key("k") is None
    assert len(manager) == 0
    await manager.destroy()


async def test_one_of_several_waiting_callers_can_be_cancelled(make_manager, db, clock):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)
    db.delay = "10ms"
    tasks = [asyncio.create_task(session.persist_now()) for _ in range(3)]
    await turns()
    tasks[1].cancel()
    await clock.advance("10ms")
    assert [task.cancelled() for task in tasks] == [False, True, False]
    assert all(task.done() for task in tasks)
    assert len(db.log) == 1
    await manager.destroy()


async def test_one_of_several_callers_of_destroy_can_be_cancelled(make_manager, db, clock):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)
    db.delay = "10ms"
    ends = [asyncio.create_task(session.destroy(True)) for _ in range(3)]
    waits = [asyncio.create_task(session.wait_ended()) for _ in range(2)]
    await turns()
    ends[0].cancel()
    waits[0].cancel()
    await clock.advance("10ms")
    assert [task.cancelled() for task in (*ends, *waits)] == [True, False, False, True, False]
    assert all(task.done() for task in (*ends, *waits))
    assert db.stored == {1: {"gold": 1}}
    drains = [asyncio.create_task(manager.destroy(True)) for _ in range(2)]
    await asyncio.sleep(0)
    drains[0].cancel()
    await turns()
    assert [task.cancelled() for task in drains] == [True, False]
    assert drains[1].done()


async def test_a_failure_that_no_caller_waits_for_any_more_goes_to_the_error_event(make_manager, db, clock):
    manager = make_manager(interval=None)
    errors = []
    manager.on("error", lambda error, session: errors.append(session))
    session = await add_user(manager, 1)

    async def fail_late():
        await clock.sleep("10ms")
        raise OSError("no")

    db.script = [fail_late]
    task = asyncio.create_task(session.persist_now())
    await turns()
    task.cancel()
    await clock.advance("10ms")
    assert errors == [session]
    await manager.destroy()


@pytest.mark.parametrize("call", ["login", "open", "edit", "erase", "destroy", "read"])
def test_a_loop_that_ends_in_the_middle_of_a_call_is_quiet(capfd, clock, call):
    """I14: no noise on stderr from calls that were cut off."""
    for hung in ("claim", "save"):
        store = ScriptedStore(clock)

        async def main(store: Any = store, hung: str = hung) -> None:
            manager = SessionManager(store=store, clock=clock)
            session = await changed(manager)
            if hung == "claim":
                store.claim_script = ["hang"]
            else:
                store.script = ["hang"]

            work = {
                "login": lambda: manager._logins.login(inside(manager).table.create(), 2, {"n": 0}, "replace"),
                "open": lambda: manager.open(2, default={"n": 0}),
                "edit": lambda: edit(manager, 2),
                "erase": lambda: manager.erase(1),
                "destroy": session.destroy,
                "read": lambda: manager.read(1),
            }[call]
            task = asyncio.ensure_future(work())
            await turns()
            del task

        asyncio.run(main())
        gc.collect()
        out, err = capfd.readouterr()
        assert out == ""
        assert "Traceback" not in err, err
        assert "never" not in err, err


def test_a_loop_that_ends_in_the_middle_of_a_save_is_quiet_also_with_a_listener_of_errors(capfd, clock):
    """A listener that takes its time is not begun when the loop is about to close."""
    store = ScriptedStore(clock)

    async def main() -> None:
        manager = SessionManager(store=store, clock=clock)

        async def tell(error: Exception, session: Any) -> None:
            await asyncio.sleep(0.01)

        manager.on("error", tell)
        session = await changed(manager)
        store.script = ["hang"]
        inside(manager).table.ask(session)
        inside(manager).autosave.employ()
        await turns()
        assert store.open_calls == 1

    asyncio.run(main())
    gc.collect()
    _, err = capfd.readouterr()
    assert "never" not in err
    assert "destroyed but it is pending" not in err


@pytest.mark.guarantee("I14")
async def test_cancelling_callers_cancels_no_call_of_the_store(clock, store, manager):
    """A thousand callers who lose patience; the saves go on."""
    session = await changed(manager)
    store.delay = "10ms"
    for number in range(50):
        session.user_data["n"] = number
        task = asyncio.ensure_future(session.persist_now())
        await turns(number % 7)
        task.cancel()
        await clock.advance("3ms")
        gc.collect()
    await clock.advance("1s")
    assert all(batch.error is None for batch in store.batches)
    assert store.stored(1) == {"n": 49}
    await end(clock, manager)


def test_a_loop_that_ends_in_the_middle_of_a_save_is_quiet(capfd, clock):
    store = ScriptedStore(clock)

    async def main() -> None:
        manager = SessionManager(store=store, clock=clock)
        session = await changed(manager)
        store.script = ["hang"]
        task = asyncio.ensure_future(session.persist_now())
        await turns()
        assert store.open_calls == 1
        assert not task.done()

    asyncio.run(main())
    gc.collect()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "never" not in err


# Somebody cancels the library's own tasks


def cancel_ours(name: str) -> int:
    """Cancel the tasks of the library with that name: how many there were."""
    ours = [task for task in asyncio.all_tasks() if task.get_name() == f"cagey-sessions {name}"]
    return sum(task.cancel() for task in ours)


@pytest.mark.fault("the user stayed with this process, and no other server could have them")
@pytest.mark.parametrize("call", ["destroy", "edit"])
async def test_an_end_without_a_save_whose_task_is_cancelled_releases_its_user(clock, store, manager, call):
    store.put(1, b'{"n":0}')
    if call == "destroy":
        session = await let_time_pass(clock, manager.open(1))
        ending = asyncio.ensure_future(session.destroy(persist=False))
        await asyncio.sleep(0)
        assert cancel_ours("end of session") == 1
        await let_time_pass(clock, asyncio.gather(ending, return_exceptions=True))
    else:
        with pytest.raises(KeyError):
            async with manager.edit(1):
                raise KeyError
        assert cancel_ours("end of session") == 1
    await clock.advance("2s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


@pytest.mark.fault("another server had the user while the listener still changed the data, and the change was lost")
async def test_an_end_cancelled_before_its_first_step_does_not_release_before_its_listeners_have_run(
    clock, store, manager
):
    store.put(1, b'{"n":0}')
    session = await let_time_pass(clock, manager.open(1))
    session.user_data["n"] = 1
    seen = []
    session.on("before_destroy", lambda: seen.append(store.owner_of(1)))
    ending = asyncio.ensure_future(session.destroy())
    await asyncio.sleep(0)
    assert cancel_ours("end of session") == 1
    await let_time_pass(clock, asyncio.gather(ending, return_exceptions=True))
    await let_time_pass(clock, session.wait_ended())
    assert seen == [inside(manager).owner]
    assert (store.owner_of(1), store.stored(1)) == ("", {"n": 1})
    await end(clock, manager)


async def test_a_caller_whose_store_is_opened_by_a_task_that_is_cancelled_is_not_cancelled(clock, store, manager):
    opened, store.open = store.open, asyncio.Event().wait
    loading = asyncio.ensure_future(manager.open(1, default={"n": 0}))
    await turns()
    assert cancel_ours("store call") == 1
    store.open = opened
    session = await let_time_pass(clock, loading)
    assert session.user_data == {"n": 0}
    await end(clock, manager)


async def test_a_store_that_was_being_closed_when_the_drain_was_cancelled_is_closed(clock, store, manager):
    closed, returns = [], asyncio.Event()
    close = store.close

    async def slow() -> None:
        await returns.wait()
        await close()
        closed.append(True)

    store.close = slow
    await let_time_pass(clock, manager.open(1, default={"n": 0}))
    leaving = asyncio.ensure_future(manager.destroy())
    while not any(task.get_name() == "cagey-sessions store close" for task in asyncio.all_tasks()):
        await clock.advance("5ms")
    assert cancel_ours("drain") > 0
    returns.set()
    await let_time_pass(clock, leaving)
    assert closed == [True]


@pytest.mark.parametrize("event", ["before_destroy", "destroy"])
async def test_an_erasure_is_not_held_up_by_listeners_that_do_not_return(clock, store, manager, event):
    store.put(1, b'{"n":0}')
    session = await let_time_pass(clock, manager.open(1))
    returns = asyncio.Event()
    session.on(event, returns.wait)
    assert await let_time_pass(clock, manager.erase(1)) is True
    assert session.alive
    returns.set()
    await let_time_pass(clock, session.wait_ended())
    await end(clock, manager)


@pytest.mark.fault("what a user had when the save began was no JSON, so the change during it was not seen")
async def test_data_that_has_become_json_during_the_last_save_has_changed():
    manager, saved = SessionManager(), []

    @manager.on("persist_user_data")
    async def save(session: Any) -> None:
        saved.append(str(session.user_data))
        session.user_data["seen"] = "tomorrow"

    session = await manager.create()
    await session.set_user(1, {"seen": object})
    await session.destroy(True)
    assert len(saved) == 2
    await manager.destroy()
