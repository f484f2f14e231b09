"""Faults that were found in the write-behind path, each as the smallest test that shows it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from cagey_sessions import (
    EndReason,
    FencedError,
    SessionManager,
    StoreUnavailableError,
    UnsavableError,
    UserNotFoundError,
    WouldDeadlockError,
)
from cagey_sessions.stores import CallbackStore, MemoryStore, Outcome, Verdict
from support import ManualClock, ScriptedStore, changed, end, let_time_pass, turns


class Losing(ScriptedStore):
    """A store that loses the calls whose numbers are in `lost`, counted from the moment it is set: they hang, and write
    nothing. Unlike ``"hang"`` that is no reason for it not to take the same users again: it is fenced.
    """

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.lost: set[int] = set()
        self.count = 0
        self.let_go = asyncio.Event()

    def lose(self, *numbers: int) -> None:
        self.count = 0
        self.lost = set(numbers)

    async def save_many(self, records: Any) -> Any:
        self.count += 1
        if self.count in self.lost:
            await self.let_go.wait()
            raise StoreUnavailableError("let go")
        return await super().save_many(records)


@pytest.fixture
def store(clock: ManualClock) -> Losing:
    return Losing(clock)


async def edit(manager: Any, user_id: int = 1) -> None:
    async with manager.edit(user_id, default={"n": 0}) as data:
        data["n"] = 1


async def play(clock: ManualClock, opening: asyncio.Task[Any]) -> None:
    """Whoever has been let in by now has something saved, and acknowledged."""
    if opening.done() and opening.exception() is None:
        opening.result().user_data["n"] = 100
        await let_time_pass(clock, opening.result().persist_now())


class Table:
    """A table behind a `CallbackStore`; `gates` holds the next saves back until they are set, and then they commit.

    `erase_gates` does the same with erasures.
    """

    def __init__(self) -> None:
        self.rows: dict[Any, Any] = {}
        self.gates: list[asyncio.Event] = []
        self.erase_gates: list[asyncio.Event] = []
        self.open: dict[Any, int] = {}
        self.most_open = 0
        self.calls = 0

    async def load(self, user_id: Any) -> Any:
        return self.rows.get(user_id)

    async def save_many(self, records: Any) -> None:
        self.calls += 1
        for record in records:
            self.open[record.user_id] = self.open.get(record.user_id, 0) + 1
            self.most_open = max(self.most_open, self.open[record.user_id])
        if self.gates:
            await self.gates.pop(0).wait()
        for record in records:
            self.open[record.user_id] -= 1
            self.rows[record.user_id] = record.value()

    async def erase(self, user_id: Any) -> bool:
        if self.erase_gates:
            await self.erase_gates.pop(0).wait()
        return self.rows.pop(user_id, None) is not None

    def store(self) -> CallbackStore:
        return CallbackStore(self.load, self.save_many, erase=self.erase)


# F1: an unfenced store, and a call that hangs


async def test_f1a_a_late_write_of_a_session_let_go_of_never_lands_on_the_next_one(clock):
    """Unfenced: a user whose call hangs is not free for another login before that call has come to its end."""
    table = Table()
    manager = SessionManager(store=table.store(), clock=clock)
    session = await changed(manager)
    table.gates = [gate := asyncio.Event()]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    leaving = asyncio.ensure_future(session.destroy(persist=False))
    await turns()
    again = asyncio.ensure_future(manager.open(1))
    await clock.advance("1s")
    await play(clock, again)
    gate.set()
    await turns()
    await let_time_pass(clock, asyncio.gather(leaving, again, return_exceptions=True))
    assert table.most_open == 1, "two saves of one user are under way at a time"
    live = manager.find_by_user(1)
    if live is not None and live.user_data["n"] == 100:
        assert table.rows[1] == {"n": 100}, "an older write has replaced what was acknowledged"
    await end(clock, manager)


async def test_f1b_a_late_write_of_an_edit_never_lands_on_a_newer_save(clock):
    """Unfenced: after an edit whose write hangs nobody else may write the user before that call has come to its end."""
    table = Table()
    table.rows[1] = {"n": 0}
    manager = SessionManager(store=table.store(), clock=clock)
    table.gates = [gate := asyncio.Event()]

    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, edit(manager))
    opening = asyncio.ensure_future(manager.open(1))
    await clock.advance("100ms")
    await play(clock, opening)
    gate.set()
    session = await let_time_pass(clock, opening)
    if session.user_data["n"] == 100:
        assert table.rows[1] == {"n": 100}, "the late write of the edit has replaced an acknowledged save"
    assert table.most_open == 1
    await end(clock, manager)


async def test_f1c_a_cancelled_edit_whose_write_is_under_way_holds_the_user(clock):
    """Unfenced: cancelling an edit does not end its write, so the next login has to wait for it."""
    table = Table()
    table.rows[1] = {"n": 0}
    manager = SessionManager(store=table.store(), clock=clock)
    table.gates = [gate := asyncio.Event()]

    task = asyncio.ensure_future(edit(manager))
    await turns()
    assert table.open[1] == 1
    task.cancel()
    opening = asyncio.ensure_future(manager.open(1))
    await turns()
    await play(clock, opening)
    gate.set()
    session = await let_time_pass(clock, opening)
    if session.user_data["n"] == 100:
        assert table.rows[1] == {"n": 100}, "the write of a cancelled edit has replaced an acknowledged save"
    await asyncio.gather(task, return_exceptions=True)
    await end(clock, manager)


async def test_f1h_a_login_in_the_very_turn_in_which_a_write_returns_holds_up_nobody(clock):
    """Unfenced: the write counts as under way until the loop has seen that it is done."""
    gate, landed = asyncio.Event(), asyncio.Event()

    async def save_many(_: Any) -> None:
        await gate.wait()
        landed.set()

    async def log_in_at_once() -> Any:
        session = await manager.create()
        await landed.wait()
        await session.login(1)
        return session

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 1

    manager = SessionManager(store=CallbackStore(lambda _: {"n": 0}, save_many), clock=clock)
    editing = asyncio.ensure_future(edit())
    await turns()
    editing.cancel()
    coming = asyncio.ensure_future(log_in_at_once())
    await turns()
    gate.set()
    session = await let_time_pass(clock, coming)
    assert session.user_id == 1
    await asyncio.gather(editing, return_exceptions=True)
    await end(clock, manager)


async def test_f1d_an_erased_user_is_not_brought_back_by_a_save_under_way(clock):
    """Unfenced: erase waits for the save under way, and no other of that session begins."""
    table = Table()
    manager = SessionManager(store=table.store(), clock=clock)
    session = await changed(manager)
    table.gates = [gate := asyncio.Event()]
    save = asyncio.ensure_future(session.persist_now())
    await turns()
    erasing = asyncio.ensure_future(manager.erase(1))
    await turns()
    gate.set()
    await let_time_pass(clock, asyncio.gather(save, erasing, return_exceptions=True))
    await clock.advance("31s")
    assert 1 not in table.rows, "the erased user is back"
    await end(clock, manager)


async def test_f1e_an_erased_user_is_not_brought_back_by_a_listener_that_saves(clock):
    """Unfenced: nothing is written in the name of a session that has been erased, whoever asks for it."""
    table = Table()
    manager = SessionManager(store=table.store(), clock=clock)
    session = await changed(manager)

    @session.on("before_destroy")
    async def save() -> None:
        session.user_data["n"] = 2
        await session.persist_now()

    await asyncio.gather(let_time_pass(clock, manager.erase(1)), return_exceptions=True)
    assert 1 not in table.rows, "the erased user is back"
    await end(clock, manager)


@pytest.mark.parametrize("end_of_call", ["cancelled", "timed out"])
async def test_f1f_a_late_erasure_never_lands_on_a_newer_save(clock, end_of_call):
    """Unfenced: after an erasure that hangs nobody loads the user before that call has come to its end."""
    table = Table()
    table.rows[1] = {"n": 0}
    manager = SessionManager(store=table.store(), clock=clock)
    table.erase_gates = [gate := asyncio.Event()]
    erasing = asyncio.ensure_future(manager.erase(1))
    await turns()
    if end_of_call == "cancelled":
        erasing.cancel()
        await asyncio.gather(erasing, return_exceptions=True)
    else:
        with pytest.raises(StoreUnavailableError):
            await let_time_pass(clock, erasing)
    opening = asyncio.ensure_future(manager.open(1, default={"n": 1}))
    await clock.advance("100ms")
    await play(clock, opening)
    gate.set()
    session = await let_time_pass(clock, opening)
    assert session.user_data["n"] == 1, "what is to be erased was loaded"
    await let_time_pass(clock, session.persist_now())
    assert table.rows[1] == {"n": 1}
    await end(clock, manager)


async def test_f1g_an_erasure_is_not_repeated_on_top_of_one_under_way(clock):
    """Unfenced: whoever erases once more waits for the call before, which would land on what follows."""
    table = Table()
    table.rows[1] = {"n": 0}
    manager = SessionManager(store=table.store(), clock=clock)
    table.erase_gates = [gate := asyncio.Event()]
    first = asyncio.ensure_future(manager.erase(1))
    await turns()
    first.cancel()
    again = asyncio.ensure_future(manager.erase(1))
    await clock.advance("1s")
    assert not again.done()
    gate.set()
    assert await let_time_pass(clock, again) is False, "the first has erased them"
    await end(clock, manager)


# F2: a session of `open` that is handed to somebody who is not counted


async def test_f2a_who_joins_while_identified_listeners_run_keeps_the_session(clock, store, manager):
    """A session that `open` has returned to a second caller is not ended because the first was cancelled."""
    gate = asyncio.Event()

    @manager.on("identified")
    async def wait(session: Any, *_: Any) -> None:
        await gate.wait()

    first = asyncio.ensure_future(manager.open(1, default={"n": 0}))
    await turns()
    second = asyncio.ensure_future(manager.open(1, default={"n": 0}))
    await turns()
    first.cancel()
    await turns()
    if second.done():
        second.result().user_data["n"] = 5
    gate.set()
    await turns()
    session = await second
    assert session.alive, "ended under the caller who has it"
    session.user_data["n"] = 5
    await end(clock, manager)
    assert store.stored(1) == {"n": 5}


async def test_f2b_an_open_cancelled_as_it_comes_to_its_end_leaves_nobody_behind(clock, store, manager):
    """Cancelled at any turn of the loop: either the caller has the session or it is ended."""
    for count in range(30):
        task = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await turns(count)
        task.cancel()
        await turns()
        if task.cancelled():
            assert manager.find_by_user(count) is None, f"a session that nobody has (cancelled after {count} turns)"
            assert store.owner_of(count) == "", f"cancelled after {count} turns"
    await end(clock, manager)


@pytest.mark.parametrize("later", range(3))
async def test_f2d_who_opens_a_user_as_another_open_is_cancelled_has_a_live_session(clock, store, manager, later):
    """At any turn of the loop: never the session that is ended because nobody waits for it any more."""
    for count in range(30):
        first = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await turns(count)
        first.cancel()
        await turns(later)
        second = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        session = await let_time_pass(clock, second)
        await turns()
        assert session.alive, f"cancelled after {count} turns"
        assert manager.find_by_user(count) is session
    await end(clock, manager)


@pytest.mark.parametrize("when_active", ["replace", "refuse"])
async def test_f2c_the_same_for_an_open_that_does_not_join(clock, store, manager, when_active):
    """Cancelling `open` ends the session if nobody else waits for it, also while `identified` listeners run."""
    gate = asyncio.Event()

    @manager.on("identified")
    async def wait(session: Any, *_: Any) -> None:
        await gate.wait()

    task = asyncio.ensure_future(manager.open(1, default={"n": 0}, when_active=when_active))
    await turns()
    task.cancel()
    await turns()
    assert task.cancelled()
    assert manager.find_by_user(1) is None
    assert len(manager) == 0
    await end(clock, manager)


# F3: a claim that is granted in the very moment its caller is cancelled


async def test_f3_a_login_cancelled_at_any_turn_lets_go_of_its_claim(clock, store, manager):
    """Cancelled logins identify nobody, and leave no claim behind."""
    for count in range(30):
        session = await manager.create()
        task = asyncio.ensure_future(session.login(count, default={"n": 0}))
        await turns(count)
        task.cancel()
        await turns()
        if task.cancelled():
            assert session.user_id is None
            assert store.owner_of(count) == "", f"still claimed (cancelled after {count} turns)"
    await end(clock, manager)


async def test_f3b_an_edit_cancelled_at_any_turn_lets_go_of_its_claim(clock, store, manager):
    for count in range(40):
        task = asyncio.ensure_future(edit(manager, count))
        await turns(count)
        task.cancel()
        await turns()
        await asyncio.gather(task, return_exceptions=True)
        assert store.owner_of(count) == "", f"still claimed (cancelled after {count} turns)"
    await end(clock, manager)


# F4: whose record it is


async def test_f4a_a_change_after_a_last_save_whose_reply_was_lost_is_saved(clock, store, manager):
    """The store has released the user with a write whose reply was lost; nobody else has claimed it since."""
    session = await changed(manager)
    store.script = ["lose"]
    task = asyncio.ensure_future(session.destroy())
    await turns()
    assert store.stored(1) == {"n": 1}
    assert store.owner_of(1) == ""
    session.user_data["n"] = 2  # still live: the end comes with the `destroy` events
    await let_time_pass(clock, asyncio.gather(task, return_exceptions=True))
    await clock.advance("20s")
    assert (store.stored(1), session.end_reason) == ({"n": 2}, EndReason.DESTROYED)
    await end(clock, manager)


async def test_f4b_a_node_taken_over_never_overwrites_who_was_made_new(clock, store, manager):
    """I4: another node took the user over, erased it and made it new; its version is lower than ours by that."""
    session = await changed(manager)
    for number in range(2, 6):
        session.user_data["n"] = number
        await session.persist_now()
    session.user_data["n"] = 6
    store.bury(manager._life.owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    await other.erase(1)
    theirs = await other.open(1, default={"theirs": True})
    await let_time_pass(clock, theirs.destroy())
    assert store.stored(1) == {"theirs": True}
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"theirs": True}
    await let_time_pass(clock, asyncio.gather(other.destroy(), manager.destroy(), return_exceptions=True))


async def test_f4c_a_stray_claim_does_not_make_a_stale_session_the_owner(clock, store, manager):
    """I4: what another node wrote meanwhile is not overwritten in the name of a claim that came late."""
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    store.put(1, b'{"n":0}')
    store.claim_script = [hang]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1))  # its claim is under way for a long time
    session = await let_time_pass(clock, manager.open(1))
    session.user_data["n"] = 1
    await let_time_pass(clock, session.persist_now())
    store.bury(manager._life.owner)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    theirs = await other.open(1)
    theirs.user_data["n"] = 50
    await let_time_pass(clock, theirs.destroy())
    assert store.stored(1) == {"n": 50}
    store.backing.dead.clear()
    gate.set()  # the claim arrives now, and is granted
    await turns()
    session.user_data["n"] = 2
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"n": 50}
    await let_time_pass(clock, asyncio.gather(other.destroy(), manager.destroy(), return_exceptions=True))


async def test_f4d_a_callback_that_answers_fenced_ends_the_session(clock):
    """The program's own tables say that somebody else has changed the row: that is an answer, not an outage."""

    async def save_many(records: Any) -> Any:
        return [Outcome.FENCED for _ in records]

    manager = SessionManager(store=CallbackStore(lambda _: {"n": 0}, save_many), clock=clock)
    session = await manager.open(1)
    session.user_data["n"] = 1
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await turns()
    assert session.end_reason == EndReason.FENCED
    await end(clock, manager)


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
        manager._life.autosave._table.ask(session)  # nobody waits
    manager._life.autosave.employ()
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
    original = store.release

    async def release(*args: Any) -> bool:
        await hold.wait()
        return await original(*args)

    store.release = release
    store.script = [StoreUnavailableError("blip")]
    await clock.advance("1ms")
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    assert not manager.statistics().store_up
    manager._life.claims.let_go(9, 1)  # as after a cancelled login
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
    manager._life.gateway._say = lambda level, message, *args: said.append(message % args)
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
    last = sessions[list(manager._life.table.oldest_first())[-1].user_id]
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
    while manager._life.table.state(session) != "ending":  # a retry has just failed
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
    original = store.release

    async def release(*args: Any) -> bool:
        await clock.sleep("50ms")
        return await original(*args)

    store.release = release
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("10ms")
    last = 1
    if session.alive:
        last = session.user_data["n"] = 2
    await let_time_pass(clock, task)
    assert store.stored(1) == {"n": last}
    assert store.owner_of(1) == ""
    await end(clock, manager)


# F9: an edit that meets a login


async def test_f9_an_edit_does_not_end_a_session_that_logs_in_meanwhile(clock, store, manager):
    """`edit` is the live data, or load-change-save; it sends nobody home."""
    store.put(1, b'{"n":0}')
    gate = asyncio.Event()

    async def wait(_: Any) -> None:
        await gate.wait()

    store.claim_script = [wait]
    session = await manager.create()
    login = asyncio.ensure_future(session.login(1))
    await turns()

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] += 1

    editing = asyncio.ensure_future(edit())
    await turns()
    gate.set()
    await let_time_pass(clock, login)
    await let_time_pass(clock, editing)
    assert session.alive
    assert session.user_data == {"n": 1}
    await end(clock, manager)
    assert store.stored(1) == {"n": 1}


# F10: circles of waiting


@pytest.mark.parametrize("event", ["before_destroy", "destroy"])
@pytest.mark.parametrize("call", ["edit", "erase", "open", "login"])
async def test_f10_a_listener_of_an_end_that_a_login_waits_for_cannot_wait_for_that_login(
    clock, store, manager, event, call
):
    """It hears `WouldDeadlockError` (or is served) instead of hanging for ever with the login and the user."""
    session = await changed(manager)
    outcome: list[Any] = []

    async def listener() -> None:
        try:
            if call == "edit":
                async with manager.edit(1) as data:
                    data["seen"] = True
            elif call == "erase":
                await manager.erase(1)
            elif call == "open":
                await manager.open(1)
            else:
                await (await manager.create()).login(1)
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append("done")

    session.on(event, listener)
    login = asyncio.ensure_future((await manager.create()).login(1, default={"n": 0}))
    await clock.advance("30s")
    hangs = not login.done()
    leaving = asyncio.gather(manager.destroy(deadline="1s"), login, return_exceptions=True)
    await let_time_pass(clock, leaving)
    assert not hangs, "the login hangs, and with it the user"
    assert outcome == ["done"] or isinstance(outcome[0], WouldDeadlockError), outcome


# F11: bad input


async def test_f11a_a_default_of_none_is_refused_before_anything_changes(clock, store, manager):
    """I6: no claim is made for it; and no user becomes null, whom nobody could log in any more."""
    session = await manager.create()
    with pytest.raises(ValueError, match=r"None|null"):
        await session.login(1, default=None)
    assert store.claims == []
    await end(clock, manager)


async def test_f11b_an_edit_makes_no_user_of_nothing(clock, store, manager):
    with pytest.raises((ValueError, UserNotFoundError)):
        async with manager.edit(1, default=lambda: None):
            pass
    assert store.stored(1) is None
    assert store.backing.rows.get(1) is None or store.backing.rows[1].record is None
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
    original = store.release

    async def release(*_: Any) -> bool:
        raise StoreUnavailableError("a blip")

    store.release = release
    await let_time_pass(clock, session.destroy(persist=False))
    store.release = original
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
    store.bury(manager._life.owner)
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


# F16: the listeners of the earlier session


async def test_f16_a_login_does_not_fail_for_a_listener_of_the_earlier_session(clock, store, manager):
    """I10: the earlier session is saved and has ended, whatever its listeners raised; that is reported, not raised."""
    heard = []
    manager.on("error", lambda error, session: heard.append(error))
    older = await changed(manager)
    older.on("destroy", lambda: 1 / 0)
    session = await manager.create()
    await let_time_pass(clock, session.login(1))
    assert session.user_data == {"n": 1}
    await turns()
    assert len(heard) == 1
    await end(clock, manager)


# F17: a drain that meets a login or an edit


@pytest.mark.parametrize("call", ["login", "open", "edit"])
async def test_f17_a_drain_leaves_no_claim_behind(clock, call):
    """Whoever is at work on a user when the manager is destroyed lets go of that user before the store is closed."""
    for count in range(20):
        store = ScriptedStore(clock)
        manager = SessionManager(store=store, clock=clock)
        session = await manager.create()

        if call == "login":
            task = asyncio.ensure_future(session.login(1, default={"n": 0}))
        elif call == "open":
            task = asyncio.ensure_future(manager.open(1, default={"n": 0}))
        else:
            task = asyncio.ensure_future(edit(manager))
        await turns(count)
        leaving = asyncio.ensure_future(manager.destroy())
        await let_time_pass(clock, asyncio.gather(leaving, task, return_exceptions=True))
        assert store.owner_of(1) == "", f"still claimed (destroyed after {count} turns)"


# F18: what is asked for and cannot be waited for


async def test_f18_an_erase_that_cannot_wait_changes_nothing(clock, store, manager):
    """A listener of an end that erases the very user: erased without an error, or an error and not erased."""
    session = await changed(manager)
    outcome: list[Any] = []

    async def listener() -> None:
        try:
            outcome.append(await manager.erase(1))
        except WouldDeadlockError as error:
            outcome.append(error)

    session.on("before_destroy", listener)
    await asyncio.gather(let_time_pass(clock, session.destroy()), return_exceptions=True)
    assert (store.stored(1) is None) == (outcome == [True]), (outcome, store.stored(1))
    await end(clock, manager)


async def test_f18b_an_open_of_ones_own_user_in_before_destroy_is_told_at_once(clock, store, manager):
    """`open` shares a task, but knows who called it: no ten seconds, and no talk of the store."""
    session = await changed(manager)
    outcome: list[Any] = []

    async def listener() -> None:
        try:
            outcome.append(await manager.open(1))
        except Exception as error:
            outcome.append(error)

    session.on("before_destroy", listener)
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("15s")
    await asyncio.gather(task, return_exceptions=True)
    assert [type(each) for each in outcome] == [WouldDeadlockError]
    await end(clock, manager)


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


# F20: an edit, and a claim of ours that comes late


async def test_f20_an_edit_is_not_fenced_by_our_own_late_claim(clock, store, manager):
    """Nobody else has the user: the row is claimed again and written."""
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    store.put(1, b'{"n":0}')
    store.claim_script = [hang]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, manager.open(1))

    async def edit() -> None:
        async with manager.edit(1) as data:
            gate.set()  # the claim that was given up is granted now
            await turns()
            data["n"] = 1

    await let_time_pass(clock, edit())
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_f20b_an_edit_that_was_written_is_saved_whatever_claim_of_ours_comes_after_it(clock, store, manager):
    """The reply to the write is lost, and before the repeat a claim is granted that we had given up."""

    async def claim_late(_: Any) -> None:
        await MemoryStore.claim_many(store, [1], manager._life.owner)

    store.put(1, b'{"n":0}')
    store.script = ["lose", claim_late]

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 1

    await let_time_pass(clock, edit())
    assert store.stored(1) == {"n": 1}
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_f20c_an_edit_writes_over_nobody_who_has_taken_over_and_saved_meanwhile(clock, store, manager):
    """Not even once they have let go of the user, so that the claim made again is granted."""
    store.put(1, b'{"n":0}')
    other = MemoryStore(store.backing)
    await other.open()

    async def edit() -> None:
        async with manager.edit(1) as data:
            store.bury(manager._life.owner)
            (claim,) = await other.claim_many([1], "b")
            await other.save_many([claim.record._replace(version=2, body=b'{"n":7}', release=True)])
            data["n"] = 1

    with pytest.raises(FencedError):
        await let_time_pass(clock, edit())
    assert store.stored(1) == {"n": 7}
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_f20d_an_edit_that_is_refused_after_a_claim_made_again_lets_go_of_that(clock, store, manager):
    async def claim_late(_: Any) -> None:
        await MemoryStore.claim_many(store, [1], manager._life.owner)

    async def refuse(_: Any) -> None:
        store.verdict_of[1] = Verdict(Outcome.INVALID, "too odd")

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 1

    store.put(1, b'{"n":0}')
    store.script = [claim_late, refuse]
    with pytest.raises(UnsavableError, match="too odd"):
        await let_time_pass(clock, edit())
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


# F21: a claim made again that comes late


async def test_f21_a_claim_made_again_that_comes_late_is_let_go_of(clock, store, manager):
    """The reclaim of a fenced or missing row is given up, the session is let go of, and then the claim is granted."""
    session = await changed(manager)
    gate = asyncio.Event()

    async def hang(_: Any) -> None:
        await gate.wait()

    del store.backing.rows[1]
    store.claim_script = [hang]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    await let_time_pass(clock, session.destroy(persist=False))
    assert session.end_reason == EndReason.DESTROYED
    gate.set()
    await turns()
    await clock.advance("1s")
    assert store.owner_of(1) == "", "owned for as long as this node lives, and nobody has the user"
    await end(clock, manager)


# F22: patience adds up


async def test_f22_destroy_raises_after_the_save_timeout_also_when_a_save_hangs(clock, store, manager):
    """Not after what is left of the one under way, and then `save_timeout` once more."""
    session = await changed(manager)
    store.lose(1)
    manager._life.autosave._table.ask(session)
    manager._life.autosave.employ()
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
                "login": lambda: manager._life.ownership.login(manager._life.table.create(), 2, {"n": 0}, "replace"),
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
