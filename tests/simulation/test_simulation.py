"""Runs drawn from seeds, those that once failed, and that a seed is a run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from simulation import kept
from simulation.driver import Run, play
from simulation.plan import draw
from simulation.shrink import shrink

SEEDS = int(os.environ.get("CAGEY_TEST_SEEDS", "500"))
KEPT = kept.plans()


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_no_seed_breaks_a_law(first):
    for seed in range(first, min(first + 50, SEEDS)):
        try:
            play(draw(seed))
        except BaseException:
            print(f"seed {seed}")
            raise


@pytest.mark.parametrize("what, plan", KEPT, ids=[f"seed {plan.seed}" for _, plan in KEPT])
def test_what_failed_once_does_not_fail_again(what, plan):
    play(plan)


SCRIPT = """
import logging, sys
logging.disable(logging.CRITICAL)
from simulation.driver import play
from simulation.plan import draw
for seed in range(3, 9):
    run = play(draw(seed))
    print(run.universe.steps, run.universe.now)
    print(*run.trace, sep="\\n")
    for applied in run.database.log:
        print(applied.when, applied.record.user_id, applied.record.version, applied.record.body, applied.verdict)
"""


@pytest.mark.slow
def test_a_seed_is_one_run_in_every_process():
    def output(hash_seed):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment
        )
        return done.stdout.splitlines()

    first = output("1")
    assert len(first) > 600
    assert output("2") == first


def test_a_failing_plan_is_shrunk_to_what_matters():
    assert shrink(40, lambda steps: 17 in steps and 31 in steps) == [17, 31]


def test_the_laws_can_be_broken():
    """A database that takes a write back is found out."""

    class Forgetful(Run):
        def step(self, name, a, b):
            super().step(name, a, b)
            for row in self.database.backing.rows.values():
                if row.record is not None and row.record.version > 3:
                    row.record = row.record._replace(body=b'{"n":0,"twice":0}')

    found = 0
    for seed in range(20):
        run = Forgetful(draw(seed))
        try:
            run.play()
        except AssertionError as error:
            found += str(error).startswith("I3")
        finally:
            run.close()
    assert found > 5
