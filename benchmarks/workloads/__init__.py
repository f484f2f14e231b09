"""What is measured: each scenario once, seeded, ours and its base side by side.

What lives here: the list of all workloads. What must not: rounds, medians, verdicts (harness.py), and anything that
makes a base slower than a user's own program would be.
"""

from . import caches, engines, idle, lag, lifecycle, memory, saves, startup, timers
from .base import FULL, QUICK, STATM, Figure, Goal, Pair, Sizes, Workload, measurable

__all__ = ["FULL", "QUICK", "STATM", "WORKLOADS", "Figure", "Goal", "Pair", "Sizes", "Workload", "measurable"]

WORKLOADS: tuple[Workload, ...] = (
    *lifecycle.WORKLOADS,
    *timers.WORKLOADS,
    *idle.WORKLOADS,
    *saves.WORKLOADS,
    *lag.WORKLOADS,
    *memory.WORKLOADS,
    *caches.WORKLOADS,
    *engines.WORKLOADS,
    *startup.WORKLOADS,
)
