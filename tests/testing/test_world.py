"""The test kit, as somebody uses it who tests a game."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import cagey_sessions
from cagey_sessions import OptionError, SessionManager
from cagey_sessions.testing import CrashTestError, StuckError, WorldError, crash_test, world


def make_manager(store, clock):
    return SessionManager(store=store, clock=clock, interval="30s")


def new_player():
    return {"gold": 100}


# The world


def test_time_passes_without_waiting(cagey_world):
    here = cagey_world(make_manager)
    alice = here.open("alice", default=new_player)
    alice.user_data["gold"] += 10
    assert here.stored("alice") is None
    here.advance("31s")
    assert here.stored("alice") == {"gold": 110}
    assert 31 <= here.now < 31.1


def test_a_crash_loses_what_was_not_acknowledged_and_nothing_else():
    with world(make_manager) as here:
        alice = here.open("alice", default=new_player)
        alice.user_data["gold"] = 1
        here.run(alice.persist_now())
        alice.user_data["gold"] = 2
        here.crash()
        with pytest.raises(WorldError, match="restart"):
            here.manager  # noqa: B018
        here.restart()
        assert here.open("alice").user_data == {"gold": 1}


def test_no_code_of_a_crashed_server_runs():
    ran = []

    async def play():
        try:
            await asyncio.sleep(5)
        finally:
            ran.append(here.now)

    with world(make_manager) as here:
        here.spawn(play())
        here.advance("1s")
        here.crash()
        here.restart()
        here.advance("1m")
        assert not ran


def test_stopping_saves_everybody():
    with world(make_manager) as here:
        here.open("alice", default=new_player)
        assert here.stop().saved == 1
        assert here.stored("alice") == {"gold": 100}
        here.restart()
        assert here.open("alice").user_data == {"gold": 100}


def test_a_store_that_is_down_and_one_that_is_slow():
    with world(make_manager) as here:
        here.put("alice", {"gold": 5})
        alice = here.open("alice")
        here.store_down("2m")
        alice.user_data["gold"] = 6
        here.advance("1m")
        assert here.manager.health().state == "down"
        assert here.stored("alice") == {"gold": 5}
        here.advance("90s")
        assert here.manager.health().state == "ok"
        assert here.stored("alice") == {"gold": 6}
        here.store_slow("2s")
        alice.user_data["gold"] = 7
        before = here.now
        here.run(alice.persist_now())
        assert here.now - before == pytest.approx(2)
        here.store_down(silent=True)
        alice.user_data["gold"] = 8
        here.advance("1m")
        assert here.stored("alice") == {"gold": 7}
        here.store_up()
        here.advance("1m")
        assert here.stored("alice") == {"gold": 8}


def test_what_is_asked_for_in_the_wrong_order_is_said():
    with world(make_manager) as here:
        with pytest.raises(WorldError, match="running"):
            here.restart()
        here.open("alice", default=new_player)
        with pytest.raises(WorldError, match="end the session"):
            here.put("alice", {})


def test_a_world_is_driven_from_outside():
    async def inside(here):
        for call in (lambda: here.advance("1s"), here.crash, lambda: here.open("bob"), here.stop):
            with pytest.raises(WorldError, match="from outside"):
                call()
        await here.manager.open("ann", default=new_player)

    with world(make_manager) as here:
        here.run(inside(here))
        assert here.now < 1


def test_waiting_for_ever_is_found_out():
    async def wait():
        await asyncio.get_running_loop().create_future()

    with world(make_manager) as here, pytest.raises(StuckError, match=r"wait\(\)"):
        here.run(wait())


def test_an_error_nobody_caught_fails_the_test():
    async def fail():
        raise LookupError("no such sword")

    with pytest.raises(WorldError, match="no such sword"), world(make_manager) as here:
        task = here.spawn(fail())
        here.advance("1s")
        del task


def test_a_manager_on_another_store_is_refused():
    with pytest.raises(WorldError, match="make_manager"), world(lambda store, clock: SessionManager()):
        pass
    with pytest.raises(WorldError, match="not a SessionManager"), world(lambda store, clock: 7):
        pass


def test_threads_are_part_of_the_simulation():
    async def think():
        return await asyncio.to_thread(sum, [1, 2, 3])

    with world(make_manager) as here:
        assert here.run(think()) == 6


def test_a_world_leaves_the_dice_as_they_were():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    with world(make_manager):
        random.random()
    assert random.random() == expected


# Crashes


def total(stored):
    assert sum(data["gold"] for data in stored.values()) == 100 * len(stored)


async def careless_trade(manager):
    alice = await manager.open("alice", default=new_player)
    bob = await manager.open("bob", default=new_player)
    for _ in range(10):
        amount = random.randrange(1, 5)
        alice.user_data["gold"] -= amount
        await alice.persist_now()
        bob.user_data["gold"] += amount
        await bob.persist_now()
        await asyncio.sleep(1)


def test_a_trade_that_loses_gold_is_found():
    with pytest.raises(CrashTestError) as raised:
        crash_test(make_manager, careless_trade, total, seeds=20)
    message = str(raised.value)
    assert "after a crash at step" in message
    assert "again: crash_test(..., first=" in message
    assert "'alice': {" in message
    # the smallest history: both are there, and one of them has paid
    assert message.count(" s  'alice'") <= 3


async def peaceful(manager):
    alice = await manager.open("alice", default=new_player)
    await asyncio.sleep(100)
    alice.user_data["level"] = 2
    await alice.persist_now()


def test_what_keeps_the_invariant_passes():
    crash_test(make_manager, peaceful, total, seeds=30)


def test_an_invariant_may_return_false_and_is_checked_without_a_crash_too():
    with pytest.raises(CrashTestError, match="nobody disturbed"):
        crash_test(make_manager, peaceful, lambda stored: False, seeds=3)


def test_what_play_raises_is_raised():
    async def play(manager):
        raise LookupError("no such sword")

    with pytest.raises(LookupError, match="sword"):
        crash_test(make_manager, play, total, seeds=3)


def test_misuse_of_crash_test():
    with pytest.raises(OptionError, match="invariant is a function"):
        crash_test(make_manager, peaceful, None)
    with pytest.raises(OptionError, match="async def"):
        crash_test(make_manager, lambda manager: None, total)


# What pytest finds by itself


def pytest_of(folder, code, *arguments):
    """What pytest says of somebody else's tests."""
    (folder / "test_theirs.py").write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, *arguments, folder],
        env=os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    ).stdout


STORES = """
import pytest
from cagey_sessions.stores import MemoryStore, Outcome, Verdict
from cagey_sessions.stores.memory import MemoryBacking
from cagey_sessions.testing.store_conformance import StoreConformance


class Forgetful(MemoryStore):
    async def save_many(self, records):
        return [Verdict(Outcome.SAVED) for _ in records]


class TestSound(StoreConformance):
    store = MemoryStore

    @pytest.fixture
    def make(self):
        backing = MemoryBacking()
        return lambda: self.store(backing)


class TestForgetful(TestSound):
    store = Forgetful
"""


@pytest.mark.slow
def test_pytest_alone_runs_the_tests_of_a_store(tmp_path):
    said = pytest_of(tmp_path, STORES, "-W", "error", "-k", "a_released_user_is_granted_to_anybody")
    assert "TestForgetful::test_a_released_user_is_granted_to_anybody" in said
    assert "1 failed, 1 passed" in said


WORLD = """
from cagey_sessions import SessionManager


def make_manager(store, clock):
    return SessionManager(store=store, clock=clock)


async def fail():
    raise LookupError("no such sword")


def test_theirs(cagey_world):
    cagey_world(make_manager, seed=7).spawn(fail())
"""


@pytest.mark.slow
def test_a_world_of_the_fixture_ends_with_the_test(tmp_path):
    said = pytest_of(tmp_path, WORLD)
    assert "ERROR at teardown of test_theirs" in said
    assert "WorldError: nobody caught what went wrong on the server" in said
    assert "LookupError('no such sword')" in said
    assert "1 passed, 1 error" in said
