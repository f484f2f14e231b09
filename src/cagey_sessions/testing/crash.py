"""`crash_test`: kills a server at any moment of a scenario, and checks what is stored.

Under each seed the scenario is played to its end, and then again with the server killed at one of the steps it took.
What the database has after that has to satisfy the program's invariant, and again after a restart. See `world.py` for
the server, and `universe.py` for the virtual time that it runs in.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, NamedTuple

from ..errors import OptionError
from ..options import SECOND
from ..sessions import SessionManager
from ..stores import Outcome
from ..wording import quote
from .store import MILLISECOND
from .universe import Universe
from .world import LIMIT, MakeManager, World

__all__ = ["CrashTestError", "crash_test"]

Play = Callable[[SessionManager[Any]], Coroutine[Any, Any, Any]]
Invariant = Callable[[dict[int | str, Any]], object]

# each seed chooses one of these: how often the event loop's order is shuffled, and how long the database takes
SHUFFLES = (0.0, 0.0, 0.5, 1.0)
WAYS = ((1 * MILLISECOND, 5 * MILLISECOND), (1 * MILLISECOND, 80 * MILLISECOND))
LATEST = 30 * SECOND
"""After a crash, how long the calls that were sent have to arrive at the database."""
MOST_SEEDS = 2**31
MOST_MOMENTS = 400
"""The most moments that the search for the shortest history tries."""


class CrashTestError(AssertionError):
    """The program's invariant does not hold for what is stored."""


class _Broken(NamedTuple):
    seed: int
    step: int | None
    """The step at which the server was killed; None if it was not."""
    seconds: float
    reason: BaseException
    history: list[str]
    stored: dict[int | str, Any]


def crash_test(
    make_manager: MakeManager, play: Play, invariant: Invariant, *, seeds: int = 200, first: int = 0
) -> None:
    """Kill the server at any moment of a scenario, and check what is stored.

    Parameters
    ----------
    make_manager
        As in `world`: ``make_manager(store=store, clock=clock)``.
    play
        ``async def play(manager)``: what players do, through the program's own handlers. It is run on each server, also
        on one that was started after a crash, so it has to begin with what is stored then. The seed decides what it
        draws from the `random` module.
    invariant
        ``invariant(stored)`` is given the data of all users, by user id, as plain values. It raises, or returns False,
        if something is wrong.
    seeds
        How many seeds are tried, from `first` on. Each decides the order of what is ready at the same time, how long
        the database takes, which of its answers are lost, and at which moment the server is killed.

    Notes
    -----
    For each seed the invariant is checked after an undisturbed run, after the crash, and after a restart that plays the
    scenario again. Raises `CrashTestError` with the seed, the moment, what was written, and what is stored; of all
    moments at which that seed fails it reports the one with the shortest history. Raises what `play` raises. Cost: for
    each seed about three plays, none of which waits in real time.
    """
    for check, name in ((make_manager, "make_manager"), (play, "play"), (invariant, "invariant")):
        if not callable(check):
            raise OptionError(f"{name} is a function, not {quote(check)}")
    for number, name in ((seeds, "seeds"), (first, "first")):
        if type(number) is not int or not 0 <= number <= MOST_SEEDS:
            raise OptionError(f"{name} is a whole number from 0 to {MOST_SEEDS}, not {quote(number)}")
    state = random.getstate()
    try:
        for seed in range(first, first + seeds):
            broken = _try_seed(make_manager, play, invariant, seed)
            if broken is not None:
                raise CrashTestError(_report(_smallest(make_manager, play, invariant, broken))) from broken.reason
    finally:
        random.setstate(state)


def _try_seed(make_manager: MakeManager, play: Play, invariant: Invariant, seed: int) -> _Broken | None:
    steps, broken = _run(make_manager, play, invariant, seed, None)
    if broken is None and steps > 1:
        moment = Random(f"moment {seed}").randrange(1, steps)
        _, broken = _run(make_manager, play, invariant, seed, moment)
    return broken


def _smallest(make_manager: MakeManager, play: Play, invariant: Invariant, broken: _Broken) -> _Broken:
    """Of the moments at which the same seed fails, the one with the fewest writes, and the earliest of these."""
    if broken.step is None:
        return broken
    moments = range(1, broken.step)
    for moment in moments[:: max(1, len(moments) // MOST_MOMENTS)]:
        _, other = _run(make_manager, play, invariant, broken.seed, moment)
        if other is not None and len(other.history) <= len(broken.history):
            return other
    return broken


def _run(
    make_manager: MakeManager, play: Play, invariant: Invariant, seed: int, kill_at: int | None
) -> tuple[int, _Broken | None]:
    """Play once, with the server killed at a step or not; returns how many steps it took, and a failure or None."""
    chance = Random(f"crash test {seed}")
    random.seed(seed)
    universe = Universe(f"universe {seed}", shuffle=chance.choice(SHUFFLES))
    here = World(make_manager, universe)
    faults = here.database.faults
    faults.latency = chance.choice(WAYS)
    faults.losing_replies = chance.choice((0.0, 0.0, 0.02))
    try:
        here.restart()
        begun = universe.steps
        scene = here.spawn(_as_coroutine(play, here.manager))
        until = universe.now + LIMIT
        while not scene.done() and (kill_at is None or universe.steps - begun < kill_at):
            if not universe.step(until):
                break
        steps, moment = universe.steps - begun, universe.seconds
        if kill_at is None:
            here.run(_wait(scene))
            here.stop()
        else:
            if scene.done():
                scene.result()
            here.crash()
            universe.advance(LATEST)
        stored = here.database.everything()
        reason = _check(invariant, stored)
        if reason is None and kill_at is not None:
            faults.losing_replies = 0.0
            here.restart()
            here.run(_as_coroutine(play, here.manager))
            here.stop()
            stored = here.database.everything()
            reason = _check(invariant, stored)
        if reason is None:
            return steps, None
        return steps, _Broken(seed, kill_at, moment, reason, _history(here), stored)
    finally:
        here.close()


async def _as_coroutine(play: Play, manager: SessionManager[Any]) -> None:
    outcome = play(manager)
    if not inspect.isawaitable(outcome):
        raise OptionError("play is an `async def` that takes the manager")
    await outcome


async def _wait(task: Any) -> None:
    await task


def _check(invariant: Invariant, stored: dict[int | str, Any]) -> Exception | None:
    try:
        if invariant(stored) is False:
            return AssertionError("the invariant returned False")
    except Exception as error:
        return error
    return None


def _history(here: World) -> list[str]:
    """Every write that the database accepted, one line each."""
    return [
        f"{applied.when:10.3f} s  {applied.record.user_id!r}: {applied.record.body.decode()}"
        for applied in here.database.log
        if applied.verdict.outcome == Outcome.SAVED
    ]


def _report(broken: _Broken) -> str:
    if broken.step is None:
        when = "after a run that nobody disturbed"
    else:
        when = f"after a crash at step {broken.step}, {broken.seconds:.3f} s into the run"
    reason = f"{type(broken.reason).__name__}: {broken.reason}".removesuffix(": ").partition("\n")[0]
    lines = [
        f"the invariant does not hold {when} (seed {broken.seed}): {reason}",
        "what was written:",
        *(broken.history or ["  nothing"]),
        "what is stored:",
        *(f"  {user_id!r}: {data!r}" for user_id, data in broken.stored.items()),
        f"again: crash_test(..., first={broken.seed}, seeds=1)",
    ]
    return "\n".join(lines)
