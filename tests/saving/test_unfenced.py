"""A store without a fence: a write that comes late must not land on what a later session has saved."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.stores import CallbackStore, Outcome
from cagey_sessions.stores.memory import Row
from support import ManualClock, ScriptedStore, changed, edit, end, inside, let_time_pass, turns


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


class UnfencedStore(ScriptedStore):
    """Writes whatever comes, whenever it comes."""

    fenced = shared = False

    def _save(self, record: Any) -> Outcome:
        row = self.backing.rows.setdefault(record.user_id, Row(record.epoch))
        row.record, row.erased = record, False
        return Outcome.SAVED


async def hanging_without_a_fence(clock: ManualClock) -> Any:
    """A manager, and a session whose save has been given up on and will be written later all the same."""
    store = UnfencedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    session = await changed(manager)

    async def write_late(_: Any) -> None:
        await store.release_all.wait()

    store.script = [write_late]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.persist_now())
    assert store.open_calls == 1
    return store, manager, session


@pytest.fixture
def unfenced(store: ScriptedStore) -> ScriptedStore:
    store.fenced = store.shared = False
    return store


async def late_write(store: ScriptedStore, records: Any) -> None:
    """Wait, and then write over whatever is there: what a database without a fence does."""
    await store.release_all.wait()
    for record in records:
        row = store.backing.rows[record.user_id]
        row.record = record


async def test_a_late_write_of_a_released_session_never_lands_on_the_next_one(clock):
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


async def test_a_late_write_of_an_edit_never_lands_on_a_newer_save(clock):
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


async def test_a_cancelled_edit_whose_write_is_under_way_holds_the_user(clock):
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


async def test_a_login_in_the_turn_in_which_a_write_returns_is_served(clock):
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


async def test_an_erased_user_is_not_brought_back_by_a_save_under_way(clock):
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


async def test_an_erased_user_is_not_brought_back_by_a_listener_that_saves(clock):
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
async def test_a_late_erasure_never_lands_on_a_newer_save(clock, end_of_call):
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


async def test_an_erasure_is_not_repeated_on_top_of_one_under_way(clock):
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


async def test_a_user_whose_unfenced_call_hangs_is_not_written_again_before_it_returns(clock):
    """Whatever ends the session meanwhile: what the call writes late must not replace what a later session saved."""
    store, manager, session = await hanging_without_a_fence(clock)

    async def end_and_begin_again() -> None:
        await session.destroy(persist=False)
        newer = await manager.open(1, default={"n": 0})
        newer.user_data["n"] = 50
        await newer.persist_now()

    task = asyncio.ensure_future(end_and_begin_again())
    await clock.advance("1s")
    assert len(store.batches) == 2, "two saves of a user in flight"
    store.release_all.set()
    await let_time_pass(clock, task)
    assert store.stored(1) == {"n": 50}
    await end(clock, manager)


async def test_an_erasure_is_not_undone_by_an_unfenced_call_that_hangs(clock):
    """`erase` returns when nothing can bring the data back, or raises."""
    store, manager, _ = await hanging_without_a_fence(clock)
    task = asyncio.ensure_future(manager.erase(1))
    await clock.advance("1s")
    store.release_all.set()
    assert await let_time_pass(clock, task)
    await clock.advance("1s")
    assert store.stored(1) is None
    await end(clock, manager)


async def test_destroy_behind_a_hanging_periodic_save_raises_within_the_save_timeout(clock):
    """A periodic save hangs for minutes already: `destroy` waits for its own patience, not for that call."""
    store = UnfencedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    session = await changed(manager)
    store.script = ["hang"]
    inside(manager).table.ask(session)
    inside(manager).autosave.employ()
    await clock.advance("60s")
    assert store.open_calls == 1
    before = clock.now()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    assert (clock.now() - before) / 1e9 < 11
    store.release_all.set()
    await clock.advance("2s")
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


@pytest.mark.parametrize("how", ["edit", "destroy", "out of patience"])
async def test_a_late_write_never_lands_on_a_later_session(clock, unfenced, manager, how):
    """Nothing fences it off, so nobody reads the user before it has returned."""
    store = unfenced
    session = await changed(manager)
    if how == "edit":
        await session.destroy()
    step = [lambda records: late_write(store, records)]

    async def write_and_leave() -> None:
        if how == "edit":
            async with manager.edit(1) as data:
                data["n"] = 2
        elif how == "destroy":
            task = asyncio.ensure_future(session.persist_now())
            await turns()
            await session.destroy(persist=False)
            await task
        else:
            store.script = ["9s", *step]
            task = asyncio.ensure_future(session.persist_now())
            await clock.advance("1s")
            session.user_data["n"] = 3
            later = asyncio.ensure_future(session.persist_now())
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.gather(later, return_exceptions=True)
            await session.destroy(persist=False)
            await later

    store.script = list(step)
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, write_and_leave())
    login = asyncio.ensure_future(manager.open(1))
    await clock.advance("5s")
    assert not login.done()
    store.release_all.set()
    newer = await let_time_pass(clock, login)
    newer.user_data["n"] = 100
    await let_time_pass(clock, newer.persist_now())
    await clock.advance("60s")
    assert store.stored(1) == {"n": 100}
    await end(clock, manager)


async def test_erase_comes_after_a_write_under_way(clock, unfenced, manager):
    store = unfenced
    session = await changed(manager)
    store.script = [lambda records: late_write(store, records)]
    saving = asyncio.ensure_future(session.persist_now())
    await turns()
    erasing = asyncio.ensure_future(manager.erase(1))
    await clock.advance("2s")
    assert not erasing.done()
    store.release_all.set()
    assert await let_time_pass(clock, erasing) is True
    await asyncio.gather(saving, return_exceptions=True)
    await clock.advance("40s")
    assert store.stored(1) is None
    await end(clock, manager)
