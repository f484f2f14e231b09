"""What happens in one run. What lives here: settings and steps, drawn from a seed, as JSON. What must not: the run.

A step is a name, a few small numbers that the driver takes modulo whatever there is to choose from, and a pause. So any
part of a plan is a plan, which is what shrinking needs.
"""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

__all__ = ["Plan", "draw"]

STEPS = 110

WEIGHTS = {
    "open": 16,
    "login": 6,
    "create": 2,
    "change": 26,
    "persist": 14,
    "persist_all": 3,
    "edit": 4,
    "read": 3,
    "erase": 1,
    "destroy": 5,
    "drop": 3,
    "cancel": 4,
    "drain": 1,
    "crash": 3,
    "start": 6,
    "bury": 1,
    "foreign": 1,
    "dead_handle": 1,
    "rates": 3,
    "outage": 3,
    "invalid": 1,
    "lose": 1,
    "slow": 1,
    "calm": 3,
}
"""How often each step is drawn."""

PAUSES = [
    ("turns", 0),
    ("turns", 1),
    ("turns", 2),
    ("turns", 7),
    ("wait", 1),
    ("wait", 20),
    ("wait", 300),
    ("wait", 2_000),
    ("wait", 11_000),
]
"""After a step: so many turns, or so many milliseconds."""


class Plan(NamedTuple):
    """One run, from its settings to its last step."""

    seed: int
    settings: dict[str, Any]
    steps: list[list[Any]]

    def only(self, numbers: list[int]) -> Plan:
        """The same with some of the steps only."""
        return self._replace(steps=[self.steps[number] for number in numbers])


def draw(seed: int) -> Plan:
    """The plan of a seed; the same in every process and on every version of Python."""
    chance = Random(seed)
    shared = chance.random() < 0.75
    settings = {
        "servers": chance.choice([1, 2, 2, 3]) if shared else 1,
        "fenced": shared,
        "users": chance.choice([2, 4, 9]),
        "interval": chance.choice([1, 5, 30]),
        "save_timeout": chance.choice([2, 10]),
        "max_in_flight": chance.choice([1, 2, 4]),
        "shuffle": chance.choice([0.0, 0.3, 1.0]),
        "tick": chance.choice([0, 0, 1_000, 20_000]),
        "listeners": chance.choice(["none", "none", "change", "slow", "raise"]),
        "tracking": chance.choice(["content", "content", "marked"]),
    }
    names = list(WEIGHTS)
    weights = list(WEIGHTS.values())
    steps = [
        [
            chance.choices(names, weights)[0],
            chance.randrange(1000),
            chance.randrange(1000),
            *(chance.choice(PAUSES) if chance.random() < 0.9 else PAUSES[0]),
        ]
        for _ in range(STEPS)
    ]
    return Plan(seed, settings, steps)
