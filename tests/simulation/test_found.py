"""What the simulation has found, told so that a person can read it."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.testing import world


def make_manager(store, clock):
    return SessionManager(store=store, clock=clock, interval="10s")


def test_a_call_nobody_waits_for_any_more_ends_at_its_deadline():
    with world(make_manager) as here:
        here.store_down(silent=True)
        reading = here.spawn(here.manager.read("ann"))
        here.advance("1s")
        reading.cancel()
        here.advance("1s")
        assert len(here.server.store.under_way) == 1, "cancelling a caller cancels no call"
        here.advance("8s")
        assert not here.server.store.under_way


def test_a_claim_whose_answer_never_came_is_not_kept_from_others():
    with world(make_manager) as here:
        here.put("bob", {"gold": 1})
        here.database.faults.late = 1.0
        for user_id in ("ann", "bob"):  # one who is new, and one who is not
            with pytest.raises(StoreUnavailableError):
                here.open(user_id, default={})
        here.advance("20s")
        mine = here.server.store.owner
        assert mine in (here.database.owner_of("ann"), here.database.owner_of("bob"))
        here.database.faults.late = 0.0
        here.advance("40s")
        assert here.database.owner_of("ann") == here.database.owner_of("bob") == ""


def test_an_interval_is_counted_from_when_the_bytes_were_fixed():
    with world(make_manager) as here:
        ann = here.open("ann", default={"n": 0})
        here.store_slow("6s")
        sent = []
        save_many = here.server.store.save_many

        async def note(records):
            sent.append(here.now)
            return await save_many(records)

        here.server.store.save_many = note
        for _ in range(100):
            ann.user_data["n"] += 1
            here.advance("1s")
        gaps = [later - earlier for earlier, later in pairwise(sent)]
        assert len(gaps) >= 8
        assert max(gaps) <= 10.2


def test_a_last_release_waits_while_the_store_is_down():
    with world(make_manager) as here:
        ann = here.open("ann", default={"n": 0})
        here.run(ann.persist_now())
        here.store_down("1m")
        with pytest.raises(StoreUnavailableError):
            here.run(here.manager.read("bob"))  # now it is known to be down
        here.run(ann.destroy(persist=False))
        assert not ann.alive
        here.advance("2m")
        assert here.database.owner_of("ann") == ""


def test_an_edit_that_had_to_claim_again_lets_go_of_that_claim():
    with world(make_manager) as here:
        here.put("ann", {"gold": 1})
        store = here.server.store
        save_many = store.save_many

        async def fail(records):
            raise StoreUnavailableError("failing")

        async def fence(records):
            store.save_many = fail
            return await save_many(records)

        async def edit():
            async with here.manager.edit("ann") as data:
                data["gold"] = 2
                await store.claim_many(["ann"], store.owner)  # a claim of ours that comes late
                store.save_many = fence

        with pytest.raises(StoreUnavailableError):
            here.run(edit())
        here.advance("1m")
        assert here.database.owner_of("ann") == ""


def test_who_edits_one_user_for_long_keeps_nobody_else():
    with world(make_manager) as here:
        for user_id in ("ann", "bob"):
            here.put(user_id, {"gold": 1})
        here.database.faults.losing_replies = 1.0
        for user_id in ("ann", "bob"):
            with pytest.raises(StoreUnavailableError):
                here.open(user_id)
        here.database.faults.losing_replies = 0.0

        async def edit():
            async with here.manager.edit("ann"):
                await asyncio.sleep(3600)

        here.spawn(edit())
        here.advance("2m")
        assert here.database.owner_of("ann") == here.server.store.owner
        assert here.database.owner_of("bob") == ""
