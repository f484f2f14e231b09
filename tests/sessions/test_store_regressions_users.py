"""Faults that were found in who has a user: opens, logins, edits, claims. Each is the smallest test that shows it."""

from __future__ import annotations

import asyncio
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
from support.losing import Losing, edit


@pytest.fixture
def store(clock: ManualClock) -> Losing:
    return Losing(clock)


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


@pytest.mark.parametrize("when_active", ["replace", "refuse"])
async def test_f2e_a_session_that_another_open_has_returned_outlives_the_open_that_made_it(
    clock, store, manager, when_active
):
    """Cancelled while its `identified` listeners run: by then somebody else has the session, and plays."""
    gate = asyncio.Event()

    @manager.on("identified")
    async def wait(session: Any, *_: Any) -> None:
        await gate.wait()

    first = asyncio.ensure_future(manager.open(1, default={"n": 0}, when_active=when_active))
    await turns()
    session = await manager.open(1)
    session.user_data["n"] = 5
    first.cancel()
    gate.set()
    await turns()
    assert session.alive, "ended under the caller who has it"
    await end(clock, manager)
    assert store.stored(1) == {"n": 5}


async def test_f2f_nor_does_it_end_if_that_other_open_came_just_before_the_cancellation(clock, store, manager):
    """Whichever turns of the loop those are."""
    for count in range(30):
        first = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await turns(count)
        second = asyncio.ensure_future(manager.open(count, default={"n": 0}))
        await asyncio.sleep(0)
        first.cancel()
        session = await let_time_pass(clock, second)
        await turns()
        assert session.alive, f"cancelled after {count} turns"
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
    store.bury(manager._server.owner)
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
    store.bury(manager._server.owner)
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
        await MemoryStore.claim_many(store, [1], manager._server.owner)

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
            store.bury(manager._server.owner)
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
        await MemoryStore.claim_many(store, [1], manager._server.owner)

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


@pytest.mark.parametrize("goes_on", ["has them", "has saved them"])
async def test_f20e_an_edit_that_may_be_written_does_not_say_that_it_is_not(clock, store, manager, goes_on):
    """The reply to the write is lost, and before the repeat somebody else takes the user over."""
    store.put(1, b'{"n":0}')
    other = MemoryStore(store.backing)
    await other.open()

    async def take_over(_: Any) -> None:
        (claim,) = await other.claim_many([1], "b")
        assert claim.record is not None
        if goes_on == "has saved them":
            await other.save_many([claim.record._replace(version=3, body=b'{"n":8}', release=True)])

    store.script = ["lose", take_over]

    async def edit() -> None:
        async with manager.edit(1) as data:
            data["n"] = 1

    with pytest.raises(FencedError, match="whether this edit was written before that is not known"):
        await let_time_pass(clock, edit())
    await end(clock, manager)


async def test_f20f_an_edit_that_cannot_be_written_says_so(clock, store, manager):
    """Somebody else takes the user over before anything is sent, and has them."""
    store.put(1, b'{"n":0}')
    other = MemoryStore(store.backing)
    await other.open()

    async def edit() -> None:
        async with manager.edit(1) as data:
            store.bury(manager._server.owner)
            await other.claim_many([1], "b")
            data["n"] = 1

    with pytest.raises(FencedError, match="nothing was written"):
        await let_time_pass(clock, edit())
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
