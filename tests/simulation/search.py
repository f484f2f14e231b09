"""Which seeds fail. What lives here: playing some of them in a process of its own, and keeping what fails. What must
not: the command (`__main__.py`).
"""

from __future__ import annotations

import logging

from .driver import play
from .kept import add
from .plan import draw
from .shrink import shrink

__all__ = ["attempt", "shrink_and_keep"]


def attempt(seeds: range) -> list[tuple[int, str]]:
    """Play some seeds: which failed, and how."""
    logging.disable(logging.CRITICAL)
    failed = []
    for seed in seeds:
        try:
            play(draw(seed))
        except Exception as error:
            failed.append((seed, f"{type(error).__name__}: {error}"))
    return failed


def shrink_and_keep(seed: int, what: str) -> int:
    """Keep the smallest part of a seed's plan that fails in the same way: the number of its steps."""
    logging.disable(logging.CRITICAL)
    plan = draw(seed)

    def fails(numbers: list[int]) -> bool:
        try:
            play(plan.only(numbers))
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:20] == what[:20]
        return False

    smallest = plan.only(shrink(len(plan.steps), fails))
    add(smallest, what)
    return len(smallest.steps)
