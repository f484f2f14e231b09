"""Ways in which a save once took no heed of whose user it is by now: late answers, takeovers, releases."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import EndReason, FencedError, SessionEndedError, SessionManager, StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import ScriptedStore, changed, end, let_time_pass, turns

# Late answers


async def test_a_late_answer_for_a_session_that_is_gone_touches_nothing_of_the_next_one(clock, store, manager):
    """The next session of the same user keeps its claim: no other node gets in while it is live."""
    session = await changed(manager)
    store.verdict_of[1] = Verdict(Outcome.FAILED, "for now")
    task = asyncio.ensure_future(session.persist_now())
    await clock.advance("9s")
    store.delay = "3s"
    store.verdict_of.clear()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, task)
    assert store.open_calls == 1, "the last attempt is still under way"
    await session.destroy(persist=False)
    newer = await manager.open(1)
    await clock.advance("5s")
    assert newer.alive
    assert store.owner_of(1) == manager._server.owner
    assert store.backing.rows[1].epoch == manager._server.table.epoch(newer)
    store.delay = 0
    await end(clock, manager)


# After the fence


async def test_a_lost_reply_to_the_last_save_and_a_change_are_no_takeover(clock, store, manager):
    """The user was released by a save whose reply was lost, and nobody else has come: the change is saved."""
    session = await changed(manager)
    store.script = ["lose"]
    task = asyncio.ensure_future(session.destroy())
    await turns()
    assert store.stored(1) == {"n": 1}
    session.user_data["n"] = 2
    await let_time_pass(clock, task)
    assert session.end_reason == EndReason.DESTROYED
    assert store.stored(1) == {"n": 2}
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_who_was_erased_and_made_anew_elsewhere_is_not_written_over(clock, store, manager):
    """Versions begin again after an erasure: a lower one in the store is not an older one of ours."""
    session = await changed(manager)
    for number in range(5):
        session.user_data["n"] = number
        await session.persist_now()
    other_store = ScriptedStore(clock, backing=store.backing)
    other = SessionManager(store=other_store, clock=clock)
    store.bury(manager._server.owner)
    await other.erase(1)
    theirs = await other.open(1, default={"made": "anew"})
    await theirs.destroy()
    store.backing.dead.clear()
    session.user_data["n"] = 99
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    assert store.stored(1) == {"made": "anew"}
    await end(clock, other, manager)


@pytest.mark.parametrize("shared", [True, False])
async def test_an_end_that_is_tried_again_knows_no_more_than_the_store_may_hold(clock, store, manager, shared):
    """Saved, changed with an unknown outcome, changed back: the end is not over before the store has the last state."""
    store.shared = shared
    session = await changed(manager)
    store.script = ["50ms"]
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("10ms")
    session.user_data["n"] = 2
    written = asyncio.Event()
    original = store.save_many

    async def save_many(records: Any) -> Any:
        verdicts = await original(records)
        if any(record.body == b'{"n":2}' for record in records) and verdicts[0].outcome == Outcome.SAVED:
            store.down = True
            written.set()
            raise StoreUnavailableError("the reply is lost")
        return verdicts

    store.save_many = save_many
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, task)
    assert written.is_set()
    assert store.stored(1) == {"n": 2}
    session.user_data["n"] = 1
    again = asyncio.ensure_future(session.destroy())
    await clock.advance("500ms")
    assert not again.done(), "nothing can have been acknowledged"
    store.down = False
    await let_time_pass(clock, again)
    assert store.stored(1) == {"n": 1}
    await end(clock, manager)


async def test_a_takeover_is_told_once_and_nothing_is_sent_after_it(clock, store, manager):
    """Also where somebody has asked for another save while the refused one was under way."""
    heard = []
    manager.on("error", lambda error, session: heard.append(type(error)))
    session = await changed(manager)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    store.bury(manager._server.owner)
    theirs = await other.open(1)
    store.backing.dead.clear()
    store.script = ["50ms"]
    first = asyncio.ensure_future(session.persist_now())
    await clock.advance("10ms")
    second = asyncio.ensure_future(session.persist_now())
    for task in (first, second):
        with pytest.raises(FencedError):
            await let_time_pass(clock, task)
    await clock.advance("1s")
    assert session.end_reason == EndReason.FENCED
    assert len(store.batches) == 2
    assert manager.statistics().fenced == 1
    assert heard == [FencedError]
    await theirs.destroy()
    await end(clock, manager, other)


async def test_a_session_that_was_taken_over_does_not_take_its_user_back(clock, store, manager):
    """Nothing more is written in its name, and no claim is left behind that nobody lets go of."""
    session = await changed(manager)
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    store.bury(manager._server.owner)
    theirs = await other.open(1)
    store.backing.dead.clear()

    async def try_once_more() -> None:
        await theirs.destroy(persist=False)
        with pytest.raises((FencedError, SessionEndedError)):
            await session.persist_now()

    session.on("before_destroy", try_once_more)
    with pytest.raises(FencedError):
        await let_time_pass(clock, session.persist_now())
    await clock.advance("1s")
    assert session.end_reason == EndReason.FENCED
    assert store.owner_of(1) == ""
    await end(clock, manager, other)


async def test_an_erased_user_is_not_written_by_a_claim_for_a_row_that_is_gone(clock, store, manager):
    """The engine loses the row, the save claims it again, and meanwhile the user is erased."""
    session = await changed(manager)
    del store.backing.rows[1]
    store.claim_script = ["50ms"]
    task = asyncio.ensure_future(session.persist_now())
    await turns()
    erasing = asyncio.ensure_future(manager.erase(1))
    await let_time_pass(clock, asyncio.gather(task, erasing, return_exceptions=True))
    assert store.stored(1) is None
    await end(clock, manager)


# Letting go


async def test_a_user_claimed_again_for_a_last_save_is_let_go_of_without_it(clock, store, manager):
    """Released with the last save, claimed again for a change, not saved: `destroy(persist=False)` releases again."""
    session = await changed(manager)
    store.script = ["50ms"]
    task = asyncio.ensure_future(session.destroy())
    await clock.advance("10ms")
    session.user_data["n"] = 2
    original = store.claim_many

    async def claim_and_fall(user_ids: Any, owner: str) -> Any:
        claims = await original(user_ids, owner)
        store.down = True
        return claims

    store.claim_many = claim_and_fall
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, task)
    store.claim_many = original
    store.down = False
    assert store.owner_of(1) == manager._server.owner
    await let_time_pass(clock, session.destroy(persist=False))
    await clock.advance("1s")
    assert store.owner_of(1) == ""
    await end(clock, manager)


async def test_a_release_that_fails_is_repeated(clock, store, manager):
    """A moment's outage at the end of a session does not lock a user out of all other nodes for good."""
    session = await changed(manager)

    async def fail(*_: Any) -> list[bool]:
        raise StoreUnavailableError("down")

    store.release_many = fail
    await let_time_pass(clock, session.destroy(persist=False))
    del store.release_many
    await clock.advance("60s")
    assert store.owner_of(1) == ""
    await end(clock, manager)
