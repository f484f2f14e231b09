"""Faults found in the write-behind path: hanging calls, outages, retries. Each is the smallest test that shows it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from cagey_sessions import EndReason, FencedError, SessionManager, StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import ManualClock, ScriptedStore, changed, end, let_time_pass, turns
from support.losing import Losing, edit


@pytest.fixture
def store(clock: ManualClock) -> Losing:
    return Losing(clock)


# F5: rows of a batch that are not in the call that hangs


async def one_that_failed(clock: ManualClock, store: Losing, manager: Any) -> tuple[Any, Any]:
    """Two users with a change; the last save of the first has failed, that of the other has not."""
    bad, good = await changed(manager, 1), await changed(manager, 2)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "locked")
    await clock.advance("31s")
    store.verdict_of.clear()
    good.user_data["n"] = bad.user_data["n"] = 2
    return bad, good


async def test_f5a_a_call_that_hangs_does_not_hold_rows_it_has_not_got(clock, store, manager):
    """Fenced: who failed before shares no call with who did not, and does not wait for a call that hangs either."""
    bad, good = await one_that_failed(clock, store, manager)
    store.batches.clear()
    store.lose(1)
    tasks = [asyncio.ensure_future(session.persist_now()) for session in (bad, good)]
    await clock.advance("60s")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert store.stored(2) == {"n": 2}, "the one whose call hung was tried again"
    assert store.stored(1) == {"n": 2}, "never sent: it waits for a call that is not its own"
    store.let_go.set()
    await end(clock, manager)


async def test_f5b_a_half_does_not_wait_for_another_half_that_hangs(clock, store, manager):
    sessions = [await changed(manager, number) for number in range(10)]
    store.script = [ValueError("whole batch")]
    store.lose(2)
    tasks = [asyncio.ensure_future(session.persist_now()) for session in sessions]
    await clock.advance("60s")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [store.stored(number)["n"] for number in range(10)] == [1] * 10
    store.let_go.set()
    await end(clock, manager)


async def test_f5c_destroy_does_not_hang_with_a_call_of_others(clock, store, manager):
    """`destroy` raises after `save_timeout` at the latest, also for a row whose batch waits for another call."""
    bad, good = await one_that_failed(clock, store, manager)
    store.lose(1)
    for session in (bad, good):
        manager._server.autosave._table.ask(session)  # nobody waits
    manager._server.autosave.employ()
    await turns()
    assert store.count == 1
    task = asyncio.ensure_future(bad.destroy())
    await clock.advance("60s")
    assert task.done(), "destroy hangs"
    await asyncio.gather(task, return_exceptions=True)
    store.let_go.set()
    await end(clock, manager)


# F6: the gateway


async def test_f6a_a_probe_that_never_returns_is_not_the_last(clock, store, manager):
    """Store hangs: the program goes on. A probe that has passed its deadline does not keep all others out."""
    session = await changed(manager)
    await clock.advance("1ms")
    store.lose(1, 2)  # two calls are lost in a network; from then on the store is well
    await asyncio.gather(let_time_pass(clock, session.persist_now()), return_exceptions=True)
    await clock.advance("60s")
    await asyncio.gather(let_time_pass(clock, session.persist_now()), return_exceptions=True)
    assert manager.statistics().store_up
    assert store.stored(1) == {"n": 1}
    store.let_go.set()
    await end(clock, manager)


async def test_f6b_a_release_that_never_returns_does_not_keep_the_store_down(clock, store, manager):
    """A release nobody waits for has a deadline too, and is not the only call allowed while the store is down."""
    session = await changed(manager)
    hold = asyncio.Event()
    original = store.release_many

    async def release(*args: Any) -> list[bool]:
        await hold.wait()
        return await original(*args)

    store.release_many = release
    store.script = [StoreUnavailableError("blip")]
    await clock.advance("1ms")
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    assert not manager.statistics().store_up
    manager._server.claims.let_go(9, 1)  # as after a cancelled login
    await clock.advance("5s")
    assert (await task).changed, "saves come before releases"
    assert store.stored(1) == {"n": 1}
    hold.set()
    await end(clock, manager)


async def test_f6c_an_outage_told_by_another_exception_is_probed_as_seldom(clock, store, manager):
    """I32: drivers raise errors of their own; while the store is down one probe at a time, now and then."""
    [await changed(manager, number) for number in range(300)]

    async def refuse(records: Any) -> None:
        raise RuntimeError("connection refused, says the driver")

    class Always(list):
        def __bool__(self) -> bool:
            return True

        def pop(self, *_: Any) -> Any:
            return refuse

    store.script = Always()
    await clock.advance("30s")
    store.batches.clear()
    await clock.advance("30s")
    sent = len(store.batches)
    store.script = []
    await clock.advance("60s")
    await end(clock, manager)
    assert sent <= 75, f"{sent} calls in 30 s of an outage"


async def test_f6d_two_poison_rows_are_not_an_outage(clock, store, manager):
    """I10: rows the engine chokes on, retried together, do not make the store count as down for everybody."""
    sessions = [await changed(manager, number) for number in range(20)]
    store.poison = {3, 4}
    store.delay = "5ms"
    await clock.advance("31s")
    said = []
    manager._server.link._say = lambda level, message, *args: said.append(message % args)
    for _ in range(5):
        for session in sessions:
            session.user_data["n"] += 1
        tasks = [asyncio.ensure_future(sessions[n].persist_now()) for n in (3, 4)]
        await clock.advance("12s")
        await asyncio.gather(*tasks, return_exceptions=True)
    store.poison = set()
    await end(clock, manager)
    assert said == []


# F7: what is tried again, and when


async def test_f7a_who_waits_is_retried_before_those_whose_time_has_come(clock, store, manager):
    """A caller's retry does not queue behind everybody who is due after an outage."""
    sessions = [await changed(manager, number) for number in range(3000)]
    store.down = True
    await clock.advance("40s")
    store.down = False
    await clock.advance("1500ms")
    last = sessions[list(manager._server.table.oldest_first())[-1].user_id]
    last.user_data["n"] = 9
    store.verdict_of[last.user_id] = Verdict(Outcome.FAILED, "locked for a moment")
    task = asyncio.ensure_future(last.persist_now())
    await clock.advance("100ms")
    assert not task.done()
    store.verdict_of.clear()
    await clock.advance("1200ms")
    assert task.done(), "its retry waits in the periodic lane"
    await task
    await end(clock, manager)


async def test_f7b_a_parked_session_is_saved_soon_after_the_store_is_back(clock, store):
    """Also with a long interval: the user cannot log in again before."""
    manager = SessionManager(store=store, clock=clock, interval="1h")
    session = await changed(manager)
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    await clock.advance("60s")
    store.down = False
    await clock.advance("60s")
    assert session.end_reason == EndReason.DESTROYED
    await end(clock, manager)


async def test_f7c_a_login_tries_the_last_save_of_the_earlier_session_at_once(clock, store, manager):
    """The store is back; the login does not wait for a retry that comes after its own patience."""
    session = await changed(manager)
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    await clock.advance("40s")
    while manager._server.table.state(session) != "ending":  # a retry has just failed
        await clock.advance("10ms")
    store.down = False
    again = await let_time_pass(clock, manager.open(1), "1s")
    assert again.user_data == {"n": 1}
    await end(clock, manager)


async def test_f7d_who_comes_later_has_patience_of_their_own(clock, store, manager):
    """`persist_now` waits for `save_timeout`, not for what is left of an earlier caller's."""
    session = await changed(manager)
    store.down = True
    first = asyncio.ensure_future(session.persist_now())
    await clock.advance("9500ms")
    second = asyncio.ensure_future(session.persist_now())
    await clock.advance("2s")
    assert first.done()
    assert isinstance(first.exception(), StoreUnavailableError)
    assert not second.done(), "told after half a second that the store did not answer within 10 s"
    store.down = False
    await clock.advance("2s")
    assert (await second).changed
    await end(clock, manager)


# F8: a change in the window of a release


async def test_f8_a_change_while_the_release_is_under_way_is_saved(clock, store, manager):
    """I2: data saved in before_destroy and changed again before the end is not lost."""
    session = await changed(manager)
    session.on("before_destroy", session.persist_now)
    original = store.release_many

    async def release(*args: Any) -> list[bool]:
        await clock.sleep("50ms")
        return await original(*args)

    store.release_many = release
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("10ms")
    last = 1
    if session.alive:
        last = session.user_data["n"] = 2
    await let_time_pass(clock, task)
    assert store.stored(1) == {"n": last}
    assert store.owner_of(1) == ""
    await end(clock, manager)


# F12: answers of a store that are nonsense of another kind


async def test_f12a_a_verdict_that_cannot_be_hashed_is_nonsense_like_any_other(clock, store, manager):
    session = await changed(manager)

    async def answer(records: Any) -> Any:
        return [Verdict([], "") for _ in records]  # type: ignore[arg-type]

    original, store.save_many = store.save_many, answer
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    store.save_many = original
    await clock.advance("2s")
    await end(clock, manager)


@pytest.mark.parametrize("epoch", [-1, "1", None])
async def test_f12b_a_claim_with_a_wrong_epoch_identifies_nobody(clock, store, manager, epoch):
    session = await manager.create()
    original = store.claim_many

    async def claim_many(user_ids: Any, owner: str) -> Any:
        return [claim._replace(epoch=epoch) for claim in await original(user_ids, owner)]

    store.claim_many = claim_many
    with pytest.raises(Exception):  # noqa: B017
        await let_time_pass(clock, session.login(1, default={"n": 0}))
    assert session.user_id is None, "identified, though the login has failed"
    store.claim_many = original
    await end(clock, manager)


# F13: a release that does not reach the store


async def test_f13_a_user_nobody_has_is_let_go_of_when_the_store_is_back(clock, store, manager):
    """Else no other node gets that user for as long as this one lives."""
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    session = await changed(manager)
    await session.persist_now()
    original = store.release_many

    async def release(*_: Any) -> list[bool]:
        raise StoreUnavailableError("a blip")

    store.release_many = release
    await let_time_pass(clock, session.destroy(persist=False))
    store.release_many = original
    await clock.advance("60s")
    assert store.owner_of(1) == ""
    await end(clock, manager, other)


# F14: everybody at once while the store is down


async def test_f14_a_save_of_everybody_gives_up_after_the_save_timeout(clock, store, manager):
    """Not after `save_timeout` for each thousand users."""
    [await changed(manager, number) for number in range(2500)]
    store.down = True
    task = asyncio.ensure_future(manager.persist_all_user_data())
    await clock.advance("12s")
    done = task.done()
    store.down = False
    await let_time_pass(clock, asyncio.gather(task, return_exceptions=True), "120s")
    await end(clock, manager)
    assert done


# F15: after a loss


async def test_f15_a_session_that_has_lost_its_user_is_told_once_and_writes_nothing_more(clock, store, manager):
    """A save asked for during the one that is fenced is answered with it, not performed."""
    heard = []
    manager.on("error", lambda error, session: heard.append(error))
    session = await changed(manager)
    gate = asyncio.Event()
    session.on("before_destroy", gate.wait)
    store.bury(manager._server.owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    await other.open(1)
    store.script = ["50ms"]
    first = asyncio.ensure_future(session.persist_now())
    await clock.advance("10ms")
    second = asyncio.ensure_future(session.persist_now())
    await clock.advance("100ms")
    sent = len(store.batches)
    await clock.advance("5s")
    gate.set()
    await turns()
    assert [type(error) for error in await asyncio.gather(first, second, return_exceptions=True)] == [FencedError] * 2
    assert len(store.batches) == sent == 2
    assert len(heard) == 1
    assert manager.statistics().fenced == 1
    await end(clock, manager, other)


# F19: one at a time while the store is down


async def test_f19_reads_are_admitted_like_everything_else_while_the_store_is_down(clock, store, manager):
    """I7, I32: a hundred callers of `read` are not a hundred calls under way to a store that is down."""
    await changed(manager)
    store.down = True
    await clock.advance("40s")
    assert not manager.statistics().store_up
    open_calls = most = 0

    async def load(_: Any) -> Any:
        nonlocal open_calls, most
        open_calls += 1
        most = max(most, open_calls)
        try:
            await clock.sleep("500ms")
            raise StoreUnavailableError("down")
        finally:
            open_calls -= 1

    original, store.load = store.load, load
    tasks = [asyncio.ensure_future(manager.read(100 + number)) for number in range(100)]
    await clock.advance("15s")
    await asyncio.gather(*tasks, return_exceptions=True)
    store.load, store.down = original, False
    await clock.advance("20s")
    await end(clock, manager)
    assert most <= 8


# F22: patience adds up


async def test_f22_destroy_raises_after_the_save_timeout_also_when_a_save_hangs(clock, store, manager):
    """Not after what is left of the one under way, and then `save_timeout` once more."""
    session = await changed(manager)
    store.lose(1)
    manager._server.autosave._table.ask(session)
    manager._server.autosave.employ()
    await turns()
    store.down = True
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("11s")
    done = task.done()
    await asyncio.gather(let_time_pass(clock, task), return_exceptions=True)
    store.down = False
    store.let_go.set()
    await end(clock, manager)
    assert done


# F23: the loop ends


@pytest.mark.parametrize("call", ["login", "open", "edit", "erase", "destroy", "read"])
def test_f23_a_loop_that_ends_in_the_middle_of_anything_is_quiet(capfd, clock, call):
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
                "login": lambda: manager._logins.login(manager._server.table.create(), 2, {"n": 0}, "replace"),
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
