"""Users who are erased while a drain gives up on them are in no file."""

from __future__ import annotations

import asyncio

import pytest

from cagey_sessions import DrainError, SessionManager, read_snapshot
from support import ScriptedStore, let_time_pass


async def test_a_user_erased_while_the_drain_gives_up_is_in_no_file(clock, tmp_path):
    store = ScriptedStore(clock)
    manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
    await manager.__aenter__()
    for user_id in ("ann", "bob"):
        await manager.open(user_id, default={})
    bob = manager.find_by_user("bob")
    bob.on("destroy", asyncio.Event().wait)  # holds the drain up once the deadline has passed
    store.down = True
    drain = asyncio.ensure_future(manager.destroy(deadline="1s"))
    await clock.advance("1.1s")
    store.down = False
    erased = asyncio.ensure_future(manager.erase("ann"))
    with pytest.raises(DrainError):
        await let_time_pass(clock, drain)
    await erased
    assert [entry.user_id for entry in read_snapshot(tmp_path / "spill").entries] == ["bob"]


async def test_a_user_erased_just_after_the_drain_has_spilled_them_is_removed_from_the_file(clock, tmp_path):
    """The erasure was under way before, and its answer comes while the drain waits for such calls."""
    answered = asyncio.Event()

    class Slow(ScriptedStore):
        async def erase(self, user_id, owner=""):
            await answered.wait()
            return await super().erase(user_id, owner)

    store = Slow(clock)
    manager = SessionManager(store=store, spill=tmp_path / "spill", clock=clock)
    await manager.__aenter__()
    for user_id in ("ann", "bob"):
        await manager.open(user_id, default={})
    store.down = True
    drain = asyncio.ensure_future(manager.destroy(deadline="1s"))
    erased = asyncio.ensure_future(manager.erase("ann"))
    await clock.advance("1.1s")
    while not (tmp_path / "spill").exists():
        await asyncio.sleep(0.01)
        await clock.advance("1ms")
    answered.set()
    with pytest.raises(DrainError):
        await let_time_pass(clock, drain)
    await erased
    assert [entry.user_id for entry in read_snapshot(tmp_path / "spill").entries] == ["bob"]
