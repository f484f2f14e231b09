"""A spilled user who is let go of, and the answer to that is lost: nothing of them may be, and nobody may keep them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cagey_sessions import SpillConflictError, StoreUnavailableError
from cagey_sessions.stores import Outcome, Verdict
from support import ScriptedStore, inside, let_time_pass, turns
from support.cluster import Cluster, spill_gold


class Losing(ScriptedStore):
    """A store that carries out the next `losing` releases, and loses their answers."""

    losing = 0

    async def release_many(self, claims: Any, owner: str) -> list[bool]:
        released = await super().release_many(claims, owner)
        if self.losing:
            self.losing -= 1
            raise StoreUnavailableError("the answer was lost")
        return released


async def start_losing(cluster: Cluster, losing: int = 1, **verdict_of: Verdict) -> Any:
    """A process begins, and the store loses the answers to its first releases."""
    store = Losing(cluster.clock, backing=cluster.backing)
    store.losing = losing
    store.verdict_of.update(verdict_of)
    return await cluster.start(store=store)


def assert_no_conflict(cluster: Cluster) -> None:
    assert not any(isinstance(error, SpillConflictError) for error in cluster.errors)


REFUSED = Verdict(Outcome.FAILED, "not now")


@pytest.mark.parametrize("losing", [1, 3])
async def test_a_user_whose_replay_failed_is_released_and_seen_by_the_next_login(cluster, losing):
    """Ann was saved before, bob never: both wait in the file, and each is theirs again."""
    await spill_gold(cluster, bob=5)
    manager = await start_losing(cluster, losing, ann=REFUSED, bob=REFUSED)
    await cluster.clock.advance("20s")
    assert set(manager.spill_report.pending) == {"ann", "bob"}
    assert cluster.store.owner_of("ann") == cluster.store.owner_of("bob") == ""
    asked = len(cluster.store.releases)
    await cluster.clock.advance("1m")
    assert len(cluster.store.releases) == asked, "it is known that nobody has them"
    cluster.store.verdict_of.clear()
    for user_id, gold in (("ann", 2), ("bob", 5)):
        assert (await manager.open(user_id, default={"gold": 0})).user_data == {"gold": gold}
    assert not cluster.path.exists()
    assert_no_conflict(cluster)
    await manager.destroy()
    assert (cluster.stored("ann"), cluster.stored("bob")) == ({"gold": 2}, {"gold": 5})


async def test_a_user_whose_replay_failed_stays_when_they_log_in_before_the_release(cluster):
    """The release of the claim before is of an epoch that is over."""
    await spill_gold(cluster, bob=5)
    manager = await start_losing(cluster, 2, ann=REFUSED, bob=REFUSED)
    await turns()
    cluster.store.verdict_of.clear()
    sessions = [await let_time_pass(cluster.clock, manager.open(each, default={"gold": 0})) for each in ("ann", "bob")]
    await cluster.clock.advance("1m")
    for session in sessions:
        assert session.alive and cluster.store.owner_of(session.user_id) == inside(manager).owner
        session.user_data["gold"] += 10
    assert_no_conflict(cluster)
    await manager.destroy()
    assert (cluster.stored("ann"), cluster.stored("bob")) == ({"gold": 12}, {"gold": 15})
    assert cluster.store.owner_of("ann") == cluster.store.owner_of("bob") == ""


async def test_a_process_that_ends_before_the_release_is_repeated_makes_no_conflict(cluster):
    await spill_gold(cluster, bob=5)
    manager = await start_losing(cluster, 1000, ann=REFUSED, bob=REFUSED)
    await let_time_pass(cluster.clock, manager.destroy())
    assert set(cluster.spilled()) == {"ann", "bob"}
    manager = await cluster.start()
    assert set(manager.spill_report.replayed) == {"ann", "bob"}
    assert (cluster.stored("ann"), cluster.stored("bob")) == ({"gold": 2}, {"gold": 5})
    assert_no_conflict(cluster)
    await manager.destroy()


async def test_a_spilled_user_whom_the_store_has_already_is_released(cluster, tmp_path):
    """The replay has nothing to write, so the release is a call of its own."""
    await spill_gold(cluster)
    row = cluster.backing.rows["ann"]
    row.record = row.record._replace(body=b'{"gold":2}', version=2)  # the last save went through
    manager = await start_losing(cluster)
    assert manager.spill_report.replayed == ("ann",)
    other = cluster.manager(spill=tmp_path / "other")
    await other.__aenter__()
    session = await other.open("ann")
    await cluster.clock.advance("1m")
    assert session.alive and cluster.store.owner_of("ann") == inside(other).owner
    session.user_data["gold"] = 3
    await other.destroy()
    await manager.destroy()
    assert cluster.stored("ann") == {"gold": 3}
    assert not cluster.path.exists()


async def test_a_user_in_conflict_is_released(cluster):
    await spill_gold(cluster)
    row = cluster.backing.rows["ann"]
    row.record = row.record._replace(body=b'{"gold":77}', version=9)
    manager = await start_losing(cluster)
    await cluster.clock.advance("1m")
    assert manager.spill_report.conflicts == ("ann",)
    assert cluster.store.owner_of("ann") == ""
    assert (await manager.open("ann")).user_data == {"gold": 77}
    await manager.destroy()
    assert cluster.spilled() == {"ann": b'{"gold":2}'}


@pytest.mark.parametrize("lands", [False, True])
async def test_a_last_save_that_released_the_user_is_no_conflict(cluster, tmp_path, lands):
    """Its answer is lost, and the store down from then on; somebody else has them in between, and saves nothing."""
    manager = await cluster.start()
    ann = await manager.open("ann", default={"gold": 0})
    await ann.persist_now()
    bob = await manager.open("bob", default={"gold": 0})
    for session in (ann, bob):
        session.user_data["gold"] = 2
    cluster.store.script = ["lose" if lands else StoreUnavailableError("no")]
    ends = [asyncio.create_task(session.destroy()) for session in (ann, bob)]
    await turns()
    await cluster.fail(manager)
    await asyncio.gather(*ends, return_exceptions=True)
    assert cluster.spilled() == {"ann": b'{"gold":2}', "bob": b'{"gold":2}'}
    if lands:
        assert cluster.stored("ann") == cluster.stored("bob") == {"gold": 2}
        other = cluster.manager(spill=tmp_path / "other")  # nobody is dead: they were let go of
        await other.__aenter__()
        for user_id in ("ann", "bob"):
            assert (await other.open(user_id)).user_data == {"gold": 2}
        await other.destroy(False)
    manager = await cluster.start()
    assert set(manager.spill_report.replayed) == {"ann", "bob"}
    assert cluster.stored("ann") == cluster.stored("bob") == {"gold": 2}
    assert_no_conflict(cluster)
    await manager.destroy()


async def test_a_user_whose_claim_was_not_answered_is_released_if_the_replay_fails(cluster, tmp_path):
    """The claim was granted, and the store did not answer again before the replay gave up."""
    await spill_gold(cluster)
    store = Losing(cluster.clock, backing=cluster.backing)
    claim_many = store.claim_many

    async def lose(user_ids: Any, owner: str) -> Any:
        await claim_many(user_ids, owner)
        store.down = True
        raise StoreUnavailableError("the answer was lost")

    store.claim_many = lose  # type: ignore[method-assign]
    manager = await let_time_pass(cluster.clock, asyncio.create_task(cluster.start(store=store)))
    assert manager.spill_report.pending == ("ann",)
    assert store.owner_of("ann") == inside(manager).owner
    store.down, store.claim_many = False, claim_many  # type: ignore[method-assign]
    await cluster.clock.advance("1m")
    assert store.owner_of("ann") == ""
    assert (await manager.open("ann")).user_data == {"gold": 2}
    assert_no_conflict(cluster)
    await manager.destroy()
    assert not cluster.path.exists()
