"""The last save of a session: when it is made, repeated, and given up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pickle
from typing import Any

import pytest

from cagey_sessions import (
    DrainError,
    EndReason,
    ListenerError,
    SessionEndedError,
    SessionManager,
    StoreUnavailableError,
    UserActiveError,
)
from cagey_sessions.stores import Outcome
from support import add_user, changed, end, let_time_pass, turns


@pytest.mark.parametrize("hang", ["save", "listener"])
async def test_destroy_raises_when_the_manager_s_deadline_passed_before_the_save(make_manager, db, clock, hang):
    manager = make_manager()
    session = await add_user(manager, 1)
    if hang == "listener":
        session.on("before_destroy", asyncio.Event().wait)
    db.always[1] = "hang"
    end = asyncio.create_task(session.destroy(True))
    await turns()
    with pytest.raises(DrainError):
        await let_time_pass(clock, manager.destroy(True, deadline="1s"))
    with pytest.raises(ListenerError, match="deadline"):
        await end
    assert session.end_reason == "unsaved"
    db.release.set()
    await turns()


async def test_a_parked_end_is_not_over_while_newer_data_is_known(make_manager, db, clock):
    manager = make_manager(interval="30s")
    session = await add_user(manager, 1, {"gold": 0})
    db.script = [OSError("down"), "1s", OSError("down again")]
    with pytest.raises(ListenerError):
        await session.destroy(True)
    session.user_data["gold"] = 1
    first = asyncio.create_task(session.persist_now())
    await turns()
    session.user_data["gold"] = 2
    second = asyncio.create_task(session.persist_now())
    await clock.advance("1s")
    await first
    with pytest.raises(ListenerError):
        await second
    await clock.advance("30s")
    assert not session.alive
    assert db.stored == {1: {"gold": 2}}
    await manager.destroy()


async def test_a_change_during_the_retry_of_a_parked_end_is_saved(make_manager, db, clock):
    manager = make_manager(interval="30s")
    session = await add_user(manager, 1, {"gold": 0})
    db.script = [OSError("blip"), "1s"]
    with pytest.raises(ListenerError):
        await session.destroy(True)
    while not db.open:
        await clock.advance("100ms")
    session.user_data["gold"] = 5
    await clock.advance("10s")
    assert not session.alive
    assert db.stored == {1: {"gold": 5}}
    assert len(db.log) == 3, "and no save more than needed"
    await manager.destroy()


@pytest.mark.fault("`try: await session.destroy(True)` with `finally: await session.destroy()` threw away the data.")
async def test_a_destroy_that_asks_for_nothing_keeps_what_an_earlier_one_asked_for(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    db.script = [OSError("down")]
    with pytest.raises(ListenerError):
        await session.destroy(True)
    await session.destroy()
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_a_save_that_fails_under_an_end_without_save_is_reported(make_manager, db, clock):
    manager = make_manager(interval="1s")
    heard = []
    manager.on("error", lambda error, session: heard.append(session))

    async def fail():
        await clock.sleep("900ms")
        raise OSError("down")

    db.script = [fail]
    session = await add_user(manager, 1)
    while not db.open:
        await clock.advance("10ms")
    await let_time_pass(clock, session.destroy())
    assert heard == [session]
    await manager.destroy()


class Wallet:
    """Data that is not JSON: its changes cannot be seen."""

    def __init__(self, gold):
        self.gold = gold


@dataclasses.dataclass(slots=True)
class Unset:
    gold: int = 1
    never_set: int = dataclasses.field(init=False)


class WithAttribute(dict):
    gold = 1


@pytest.mark.fault("Such data was taken for saved by a save from before the end.")
@pytest.mark.parametrize("data", [Wallet(1), Unset(), WithAttribute(), {1: "a"}, {"nan": float("nan")}, ("tuple",)])
async def test_data_that_is_not_json_gets_its_last_save_like_any_other(clock, data):
    manager = SessionManager(interval="10s", clock=clock)
    stored = []

    @manager.on("persist_user_data")
    async def save(session):
        body = pickle.dumps(session.user_data) if not isinstance(session.user_data, Unset) else session.user_data.gold
        gold = getattr(session.user_data, "gold", None)
        await clock.sleep("1s")
        stored.append((body, gold))

    session = await add_user(manager, 1, data)
    earlier = asyncio.create_task(session.persist_now())
    await turns()
    with contextlib.suppress(AttributeError):
        session.user_data.gold = 100
    await let_time_pass(clock, session.destroy(True))
    await earlier
    assert len(stored) == 2
    assert stored[-1][1] in (100, None)
    await manager.destroy()


async def test_a_save_asked_for_too_late_is_an_error(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    session.on("destroy", lambda: clock.sleep("1s"))
    end = asyncio.create_task(session.destroy())
    await turns()
    with pytest.raises(SessionEndedError, match="without"):
        await let_time_pass(clock, session.destroy(True))
    await end
    await manager.destroy()


async def test_a_change_while_the_release_is_under_way_is_saved(clock, store, manager):
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


async def test_what_is_saved_by_before_save_changes_at_each_attempt_and_ends_well(clock, store):
    """Live state that never stands still, replies lost at every other save, and a release."""
    count = 0

    def before_save(session: Any) -> None:
        nonlocal count
        count += 1
        session.user_data["n"] = count

    manager = SessionManager(store=store, clock=clock, before_save=before_save)
    session = await manager.open(1, default={"n": 0})
    for _ in range(5):
        store.script = ["lose"]
        await let_time_pass(clock, session.persist_now())
    store.script = ["lose"]
    await let_time_pass(clock, session.destroy())
    assert session.end_reason == EndReason.DESTROYED
    assert store.stored(1)["n"] >= count - 1
    await end(clock, manager)


async def test_the_last_save_and_the_events_come_in_the_original_s_order(make_manager, db):
    manager = make_manager()
    seen = []
    for name in ("created", "started", "identified", "persist_user_data", "before_destroy", "destroy"):
        manager.on(name, lambda session, *args, name=name: seen.append(("manager", name, *args)))
    session = await manager.create("k")
    for name in ("started", "identified", "before_destroy", "destroy"):
        session.on(name, lambda *args, name=name: seen.append(("session", name, *args)))
    await session.start()
    await session.set_user(7, {"gold": 1})
    await session.destroy(True)
    assert seen == [
        ("manager", "created"),
        ("manager", "started"),
        ("session", "started"),
        ("manager", "identified", 7, {"gold": 1}),
        ("session", "identified", 7, {"gold": 1}),
        ("manager", "before_destroy"),
        ("session", "before_destroy"),
        ("manager", "persist_user_data"),
        ("manager", "destroy"),
        ("session", "destroy"),
    ]
    await manager.destroy()


async def test_the_last_save_is_repeated_while_the_data_changes_under_it(make_manager, db, clock):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)
    db.delay = "50ms"
    end = asyncio.create_task(session.destroy(True))
    await clock.advance("20ms")
    session.user_data["gold"] = 7
    await clock.advance("50ms")
    session.user_data["gold"] = 8
    await let_time_pass(clock, end)
    assert db.writes(1) == [{"gold": 1}, {"gold": 7}, {"gold": 8}]
    await manager.destroy()


async def test_data_that_never_stops_changing_does_not_keep_its_session_for_ever(make_manager, db, clock, caplog):
    manager = make_manager(interval=None)
    session = await add_user(manager, 1)

    async def write_and_change():
        await clock.sleep("10ms")
        if session.alive:
            session.user_data["gold"] += 1

    db.always[1] = write_and_change
    await let_time_pass(clock, session.destroy(True))
    assert not session.alive
    assert 2 < len(db.log) < 50
    assert "goes on changing" in caplog.text
    await manager.destroy()


async def test_a_call_that_asks_for_a_save_gets_it_from_an_end_that_did_not_want_one(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    session.on("before_destroy", lambda: clock.sleep("1s"))
    without = asyncio.create_task(session.destroy(False))
    await turns()
    with_save = asyncio.create_task(session.destroy(True))
    await clock.advance("1s")
    await asyncio.gather(without, with_save)
    assert db.stored == {1: {"gold": 1}}
    await manager.destroy()


async def test_destroy_without_a_save_writes_nothing_even_if_one_was_due(make_manager, db, clock):
    manager = make_manager(interval="1s", max_in_flight=1)
    hung, session = await add_user(manager, 0), await add_user(manager, 1)
    db.always[0] = "hang"
    save = asyncio.create_task(hung.persist_now())
    await clock.advance("2s")
    assert manager.statistics().pending == 1
    await session.destroy(False)
    db.release.set()
    await turns()
    await save
    assert db.writes(1) == []
    await let_time_pass(clock, manager.destroy())


async def test_a_parked_end_is_retried_at_once_by_another_call_or_given_up(make_manager, db, clock):
    manager = make_manager()
    first, second = await add_user(manager, 1), await add_user(manager, 2)
    db.script = [OSError("no"), OSError("no")]
    for session in (first, second):
        with pytest.raises(ListenerError) as caught:
            await session.destroy(True)
        assert "tried again" in caught.value.__notes__[0]
    with pytest.raises(UserActiveError):
        await add_user(manager, 1)
    await first.destroy(True)
    await second.destroy(False)
    assert db.stored == {1: {"gold": 1}}
    assert not second.alive
    await manager.destroy()


async def test_persist_now_while_ending_repeats_the_last_save(make_manager, db, clock):
    manager = make_manager()
    session = await add_user(manager, 1)
    db.delay = "1s"
    end = asyncio.create_task(session.destroy(True))
    await clock.advance("500ms")
    session.user_data["gold"] = 2
    save = asyncio.create_task(session.persist_now())
    await clock.advance("500ms")
    assert not end.done()
    await let_time_pass(clock, asyncio.gather(end, save))
    assert db.stored == {1: {"gold": 2}}
    await manager.destroy()


async def test_a_change_after_a_last_save_whose_reply_was_lost_is_saved(clock, store, manager):
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


@pytest.mark.parametrize("shared", [True, False])
async def test_an_end_is_not_over_before_the_store_has_the_last_state(clock, store, manager, shared):
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
