"""Runs that failed once, kept for ever. What lives here: `kept.jsonl`, read and added to. What must not: playing.

One JSON object a line: the settings and the steps of a shrunk plan, its seed, and what went wrong then.
"""

from __future__ import annotations

import json
from pathlib import Path

from .plan import Plan

__all__ = ["FILE", "add", "plans"]

FILE = Path(__file__).with_name("kept.jsonl")


def plans() -> list[tuple[str, Plan]]:
    """What went wrong once, and the plan that showed it."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    kept = [json.loads(line) for line in lines if line.strip()]
    return [(entry["what"], Plan(entry["seed"], entry["settings"], entry["steps"])) for entry in kept]


def add(plan: Plan, what: str) -> None:
    """Keep a plan, with one line about what it shows."""
    entry = {"what": what, "seed": plan.seed, "settings": plan.settings, "steps": plan.steps}
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
