"""What the simulation has found, told so that a person can read it."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from itertools import pairwise

import pytest

from cagey_sessions import SessionEndedError, SessionManager, StoreUnavailableError
from cagey_sessions.testing import world
from cagey_sessions.testing.store import Faults
from cagey_sessions.testing.world import Server
from support import inside


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


@pytest.mark.parametrize("before_save", [None, lambda session: None], ids=["in batches", "one by one"])
def test_an_interval_is_counted_from_when_the_bytes_were_fixed(before_save):
    def make(store, clock):
        return SessionManager(store=store, clock=clock, interval="10s", before_save=before_save)

    with world(make) as here:
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


def test_a_session_whose_row_was_claimed_once_more_by_a_late_claim_lets_go_of_it():
    with world(make_manager) as here:
        here.put("bob", {"gold": 1})
        for user_id in ("ann", "bob"):  # one who is new, and one who is not
            session = here.open(user_id, default={})
            here.run(here.server.store.claim_many([user_id], here.server.store.owner))  # given up on, and late
            here.run(session.destroy(persist=False))
        here.advance("5s")
        assert here.database.owner_of("ann") == here.database.owner_of("bob") == ""


def test_who_returns_meanwhile_is_not_let_go_of_with_the_session_before():
    with world(make_manager) as here:
        here.put("ann", {"gold": 1})
        session = here.open("ann")
        here.run(here.server.store.claim_many(["ann"], here.server.store.owner))
        here.run(session.destroy(persist=False))
        again = here.open("ann")
        here.advance("5s")
        assert here.database.owner_of("ann") == here.server.store.owner
        again.user_data["gold"] = 2
        here.run(again.persist_now())
        assert here.stored("ann") == {"gold": 2}


def test_an_outage_that_is_over_delays_no_save_when_most_users_have_left():
    with world(make_manager) as here:
        users = [here.open(user_id, default={"n": 0}) for user_id in range(20)]
        here.store_down("40s")
        for second in range(150):
            for user in users:
                user.user_data["n"] += 1
            here.advance("1s")
            if second == 70:
                while len(users) > 5:
                    here.run(users.pop().destroy(persist=False))
            if second > 70:
                assert here.manager.statistics().oldest_unsaved <= 10.2


def test_a_row_that_was_lost_does_not_begin_again_among_the_epochs_of_before():
    with world(make_manager) as here:
        ann = here.open("ann", default={"n": 1})
        here.run(ann.persist_now())
        store = here.server.store
        (first,) = here.run(store.claim_many(["ann"], store.owner))
        here.database.lose(["ann"])
        (claim,) = here.run(store.claim_many(["ann"], store.owner))
        assert claim.record is None
        assert claim.epoch > first.epoch


def lose_first_answer(store, name):
    """Have the store carry out a call, and its answer be lost."""
    method = getattr(store, name)

    async def lossy(*arguments):
        setattr(store, name, method)
        await method(*arguments)
        raise StoreUnavailableError("the answer was lost")

    setattr(store, name, lossy)


@contextmanager
def other_server(here):
    server = Server(here.database, make_manager)
    server.run(server.manager.__aenter__())
    yield server
    server.kill()
    here._graves.append(server)


def test_whoever_lost_the_answer_to_a_release_leaves_the_next_owner_alone():
    """B has the only copy there is: the engine has lost the row, and a claim of A would take the user from B."""
    with world(make_manager) as here, other_server(here) as other:
        here.put("ann", {"gold": 1})
        session = here.open("ann")
        lose_first_answer(here.server.store, "release_many")
        here.run(session.destroy(persist=False))
        here.server.store.faults = Faults(down="refusing")
        ann = other.run(other.manager.open("ann"))
        ann.user_data["gold"] = 500
        other.run(ann.persist_now())
        ann.user_data["gold"] = 777
        here.database.lose(["ann"])
        here.server.store.faults = Faults()
        here.advance("30s")
        assert ann.alive
        assert here.stored("ann") == {"gold": 777}


def test_letting_go_of_a_user_leaves_a_tombstone_where_it_is():
    with world(make_manager) as here, other_server(here) as other:
        old = other.run(other.manager.open("ann", default={"secret": "of ann"}))
        here.database.backing.dead.add(other.store.owner)
        session = here.open("ann", default={})
        here.store_down()
        with pytest.raises(StoreUnavailableError):
            here.run(here.manager.read("bob"))
        here.run(session.destroy(persist=False))
        here.store_up()
        here.run(here.manager.erase("ann"))
        here.advance("5s")
        assert here.database.backing.rows["ann"].erased
        with pytest.raises(SessionEndedError):
            other.run(old.persist_now())
        assert here.stored("ann") is None


def test_a_session_that_was_fenced_off_and_is_slow_to_end_keeps_its_user_from_nobody():
    with world(make_manager) as here, other_server(here) as other:
        here.put("ann", {"n": 1})
        ann = here.open("ann")
        store = here.server.store
        here.database.backing.dead.add(store.owner)
        taken_over = other.run(other.manager.open("ann"))
        here.database.backing.dead.discard(store.owner)

        @ann.on("before_destroy")
        async def think():
            await asyncio.sleep(90)

        async def lose(user_ids, owner):
            store.claim_many = claim_many
            raise StoreUnavailableError("sent, and carried out late")

        claim_many, store.claim_many = store.claim_many, lose
        ann.user_data["n"] = 2
        here.advance("14s")
        other.run(taken_over.destroy())
        here.run(claim_many(["ann"], store.owner))
        here.advance("120s")
        assert not ann.alive
        assert here.database.owner_of("ann") == ""


def test_who_was_let_go_of_in_an_outage_is_released_by_a_few_calls_at_a_time():
    with world(make_manager) as here:
        users = [here.open(number, default={}) for number in range(100)]
        here.store_down()
        with pytest.raises(StoreUnavailableError):
            here.run(here.manager.read("bob"))

        async def end_all():
            for user in users:
                await user.destroy(persist=False)

        here.run(end_all())
        most = 0

        def look(*_):
            nonlocal most
            most = max(most, len(here.server.store.under_way))

        here.database.watchers.append(look)
        here.store_up()
        here.advance("5s")
        assert not any(here.database.owner_of(number) for number in range(100))
        assert most <= 4


def test_a_login_does_not_wait_for_what_is_done_about_a_late_claim():
    with world(make_manager) as here:
        here.put("ann", {"n": 1})
        session = here.open("ann")
        here.run(here.server.store.claim_many(["ann"], here.server.store.owner))
        here.run(session.destroy(persist=False))
        here.store_down(silent=True)
        started = here.now
        with pytest.raises(StoreUnavailableError):
            here.open("ann")
        assert here.now - started <= 10.1


def test_what_is_left_of_a_batch_waits_when_the_store_has_gone_down_meanwhile():
    with world(make_manager) as here:
        users = [here.open(user_id, default={"n": 0}) for user_id in ("ann", "bob")]
        store = here.server.store
        save_many = store.save_many
        sent = []

        async def fail_as_a_whole(records):
            sent.append((here.now, len(records)))
            if len(records) == 1:
                return await save_many(records)
            await asyncio.sleep(1)
            here.database.faults.down = ""
            raise ValueError("one of them is the cause")

        store.save_many = fail_as_a_whole
        saving = [here.spawn(user.persist_now()) for user in users]
        here.advance("0.99s")
        here.store_down()
        with pytest.raises(StoreUnavailableError):
            here.run(store_asked_once(here))
        here.advance("30ms")
        assert [number for _, number in sent] == [2]
        here.advance("5s")
        assert all(call.done() for call in saving)
        assert here.stored("ann") == here.stored("bob") == {"n": 0}


async def store_asked_once(here):
    await inside(here.manager).link.ask(here.server.store.load, "eve")
