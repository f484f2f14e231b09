"""What `health` says, and why: one answer for each way in which users may go unsaved."""

from __future__ import annotations

import asyncio

from cagey_sessions import Health, SessionManager
from support import ManualClock, ScriptedStore, add_user, let_time_pass, turns


def test_health_is_true_while_users_are_being_saved():
    assert Health("ok", "")
    assert Health("degraded", "slow")
    assert not Health("down", "gone")


async def test_a_manager_that_is_to_save_and_has_no_listener_is_down_as_soon_as_it_has_a_user(clock: ManualClock):
    manager = SessionManager(interval="30s", clock=clock)
    session = await manager.create()
    assert manager.health() == Health("ok", ""), "nobody is there to be saved"
    await session.set_user(1, {})
    assert manager.health() == Health("down", "nobody listens to 'persist_user_data', and there is no store")
    manager.on("persist_user_data", lambda session: None)
    assert manager.health() == Health("ok", "")
    await manager.destroy()
    assert manager.health() == Health("down", "the manager has been destroyed")


async def test_a_manager_that_never_meant_to_save_is_well():
    manager = SessionManager()
    await (await manager.create()).set_user(1, {})
    assert manager.health() == Health("ok", "")
    await manager.destroy()


async def test_saves_that_take_longer_than_the_interval_are_counted(clock: ManualClock):
    manager = SessionManager(interval="30s", clock=clock)
    gate = asyncio.Event()

    @manager.on("persist_user_data")
    async def save(session):
        await gate.wait()

    for number in range(2):
        await (await manager.create()).set_user(number, {"n": 0})
    saves = asyncio.create_task(manager.persist_all_user_data())
    await turns()
    await clock.advance("31s")
    assert manager.health() == Health("degraded", "saves that take longer than the interval: 2")
    gate.set()
    await let_time_pass(clock, saves)
    assert manager.health() == Health("ok", "")
    await manager.destroy()


async def test_what_is_older_than_two_intervals_is_told_before_what_is_slow(clock: ManualClock):
    manager = SessionManager(interval="30s", clock=clock)
    gate = asyncio.Event()

    @manager.on("persist_user_data")
    async def save(session):
        await gate.wait()

    session = await manager.create()
    await session.set_user(1, {"n": 0})
    await clock.advance("91s")
    health = manager.health()
    assert health.state == "degraded"
    assert health.reason.startswith("the oldest unsaved state is ")
    gate.set()
    await turns()
    await manager.destroy()


async def test_a_manager_that_is_being_destroyed_says_so(clock: ManualClock):
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    told = []

    @manager.on("before_destroy")
    def ending(session):
        told.append(manager.health())

    await let_time_pass(clock, manager.open(1, default={"n": 0}))
    await let_time_pass(clock, manager.destroy())
    assert told == [Health("degraded", "the manager is being destroyed")]


async def test_data_that_cannot_be_saved_is_counted_until_it_can(clock: ManualClock):
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, clock=clock)
    session = await let_time_pass(clock, manager.open(1, default={"n": 0}))
    session.user_data["n"] = {1, 2}
    await clock.advance("31s")
    assert manager.health() == Health("degraded", "users whose data cannot be saved as it is: 1 (1)")
    session.user_data["n"] = [1, 2]
    await clock.advance("31s")
    assert manager.health() == Health("ok", "")
    await let_time_pass(clock, manager.destroy())


async def test_another_thread_has_the_figures_handed_over(clock: ManualClock):
    manager = SessionManager(clock=clock)
    await manager.create()
    loop = asyncio.get_running_loop()

    async def figures() -> tuple[int, str]:
        return manager.statistics().live, manager.health().state

    def export() -> tuple[int, str]:
        return asyncio.run_coroutine_threadsafe(figures(), loop).result(timeout=30)

    assert await asyncio.to_thread(export) == (1, "ok")
    await manager.destroy()


async def test_users_whose_data_cannot_be_saved_are_named(clock: ManualClock, store: ScriptedStore):
    manager = SessionManager(store=store, clock=clock)
    sessions = [await manager.open(user_id, default={}) for user_id in ("ann", 7, "b" * 1000)]
    sessions[0].user_data["bag"] = {1}
    await clock.advance("31s")
    found = manager.health()
    assert found == Health("degraded", "users whose data cannot be saved as it is: 1 ('ann')")
    for session in sessions:
        session.user_data["bag"] = {1}
    await clock.advance("31s")
    assert manager.health().reason.startswith("the oldest unsaved state is 62.0 s old; users whose data cannot be ")
    assert all(name in manager.health().reason for name in ("'ann'", "7", "'bbb"))
    more = [await manager.open(user_id, default={}) for user_id in range(1000, 1020)]
    for session in more:
        session.user_data["bag"] = {1}
    await clock.advance("31s")
    reason = manager.health().reason.partition("; ")[2]
    assert reason.startswith("users whose data cannot be saved as it is: 23 (")
    assert reason.endswith(", ...)")
    assert len(reason) < 1000
    for session in (*sessions, *more):
        session.user_data.clear()
    await clock.advance("31s")
    assert manager.health() == Health("ok", "")
    await let_time_pass(clock, manager.destroy())


async def test_tick_lag_is_not_the_time_without_users(make_manager, clock):
    manager = make_manager(interval="10s")
    assert manager.statistics().tick_lag == 0
    await (await add_user(manager, 1)).destroy()
    await clock.advance("5h")
    await add_user(manager, 1)
    await clock.advance("9s")
    assert manager.statistics().tick_lag <= 0.01
    await clock.jump("20s")
    assert manager.statistics().tick_lag >= 9
    await manager.destroy()
