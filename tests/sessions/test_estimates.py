"""`estimate_drain_seconds`: how long the end of a manager will take, with a store and without."""

from __future__ import annotations

import pytest

from cagey_sessions import SessionManager
from support import ScriptedStore, let_time_pass, turns


async def test_the_estimate_with_a_store(clock):
    store = ScriptedStore(clock, delay="100ms")
    manager = SessionManager(store=store, clock=clock)
    assert manager.estimate_drain_seconds() == 0.0
    first = await manager.open("first", default={})
    assert manager.estimate_drain_seconds() <= 0.001, "nothing has been measured"
    for _ in range(100):
        first.user_data["n"] = first.user_data.get("n", 0) + 1
        await let_time_pass(clock, first.persist_now())
    assert manager.estimate_drain_seconds() == pytest.approx(0.1, rel=0.05)
    for user_id in range(799):
        await manager.open(user_id, default={})
    latency = manager.statistics().store_latency
    assert manager.estimate_drain_seconds() == pytest.approx(latency + 0.08), "four batches at a time"
    await manager.open("one more", default={})
    latency = manager.statistics().store_latency
    assert manager.estimate_drain_seconds() == pytest.approx(2 * latency + 0.0801)
    report = await let_time_pass(clock, manager.destroy())
    assert report.seconds == pytest.approx(0.2, rel=0.5)
    assert manager.estimate_drain_seconds() == 0.0


async def test_the_estimate_without_a_store(clock, db, make_manager):
    manager = make_manager(interval=None, max_in_flight=10)
    db.delay = "500ms"
    for user_id in range(25):
        session = await manager.create()
        await session.set_user(user_id, {})
    assert manager.estimate_drain_seconds() <= 0.01
    await let_time_pass(clock, session.persist_now())
    assert manager.estimate_drain_seconds() == pytest.approx(1.5, rel=0.01)
    db.delay = "100ms"
    for _ in range(200):
        await let_time_pass(clock, session.persist_now())
    assert manager.estimate_drain_seconds() == pytest.approx(0.3, rel=0.02)
    await turns()
    report = await let_time_pass(clock, manager.destroy(True))
    assert report.seconds == pytest.approx(0.3, abs=0.1)
