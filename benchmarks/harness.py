"""How it is measured. What lives here: rounds, medians, the spread, verdicts, the table. What must not: any scenario.

One round runs ours and then the base; a row has the ratio of each round and reports their median, so that whatever
slows the machine for longer than a round slows both sides of it. `ours` and `base` are the medians of their own. The
spread is the range of the middle half of the ratios over their median. A row that spreads over more than `NOISY` is run
once more, and if that does not help it is reported as noisy, without a verdict.

Rows about lag have a bound on the difference of the two sides, and their ratio means little: the least lag of an idle
loop is close to nothing. Their spread is the range of the middle half of the differences over the bound, and such a row
is noisy if the bound lies within that range. A row without a goal is reported as it is, and run once.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import cagey_sessions

from .workloads import Figure, Sizes, Workload
from .workloads.base import Costs, Pair

__all__ = ["Progress", "Row", "machine", "measure", "report", "table"]

NOISY = 0.15


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    ours: float
    base: float
    ratio: float
    spread: float
    goal: str
    holds: bool | None
    """None: too noisy to tell, or no goal."""
    unit: str
    note: str

    @property
    def verdict(self) -> str:
        if not self.goal:
            return "reported"
        return {True: "holds", False: "MISSED", None: "noisy"}[self.holds]


class Progress:
    """What is running now, on one line of a terminal, or as a line for each row elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._redraws = stream.isatty()

    def show(self, row: str, round_: int, rounds: int) -> None:
        if self._redraws:
            doing = f"round {round_} of {rounds}" if round_ > 0 else "warming up"
            self._stream.write(f"\r\x1b[K{row}: {doing}")
        elif round_ == 1:
            self._stream.write(f"{row}: {rounds} rounds\n")
        self._stream.flush()

    def close(self) -> None:
        if self._redraws:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def measure(workload: Workload, sizes: Sizes, progress: Progress) -> list[Row]:
    """Run a workload, and again if a row was too noisy for a verdict that is asked for; the others stay as they are."""
    with nullcontext() if workload.collector else _collector_off(), workload.prepare(sizes) as pair:
        rows = _run(workload, sizes, pair, progress, workload.id, workload.warm_ups)
        if any(row.verdict == "noisy" for row in rows):
            again = _run(workload, sizes, pair, progress, f"{workload.id}, again", 0)
            rows = [second if first.verdict == "noisy" else first for first, second in zip(rows, again, strict=True)]
    return rows


def _run(workload: Workload, sizes: Sizes, pair: Pair, progress: Progress, label: str, warm_ups: int) -> list[Row]:
    ours: list[Costs] = []
    base: list[Costs] = []
    for round_ in range(1 - warm_ups, workload.rounds + 1):
        progress.show(label, round_, workload.rounds)
        _collect(workload)
        ours.append(pair.ours())
        _collect(workload)
        base.append(pair.base())
    del ours[:warm_ups], base[:warm_ups]
    return [
        _judge(figure, [_part(cost, place) for cost in ours], [_part(cost, place) for cost in base], sizes)
        for place, figure in enumerate(workload.figures)
    ]


def _part(costs: Costs, place: int) -> float:
    return costs[place] if isinstance(costs, tuple) else costs


def _judge(figure: Figure, ours: list[float], base: list[float], sizes: Sizes) -> Row:
    goal, note = figure.goal, figure.note(sizes)
    ratios = [goal.ratio_of(*costs) for costs in zip(ours, base, strict=True)]
    ratio, cost = statistics.median(ratios), statistics.median(ours)
    if goal.added is None:
        first, last = _middle_half(ratios)
        spread = (last - first) / ratio
        is_noisy = spread > NOISY
        holds = goal.holds(cost, ratio)
    else:
        differences = [one - other for one, other in zip(ours, base, strict=True)]
        first, last = _middle_half(differences)
        added = statistics.median(differences)
        spread = (last - first) / goal.added
        is_noisy = first <= goal.added < last
        holds = goal.holds(cost, ratio, added)
        note += f"; added {added:.2f}, middle half {first:.2f} to {last:.2f}"
    return Row(
        id=figure.id,
        ours=cost,
        base=statistics.median(base),
        ratio=ratio,
        spread=spread,
        goal=str(goal),
        holds=None if is_noisy or not goal.is_set else holds,
        unit=figure.unit,
        note=note,
    )


def _middle_half(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, last = statistics.quantiles(values, n=4, method="inclusive")
    return first, last


def _collect(workload: Workload) -> None:
    """Before each side. What is left is frozen, for to walk a million timers each time takes longer than most sides;
    not where the collector is measured, too."""
    gc.collect()
    if not workload.collector:
        gc.freeze()


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def machine() -> str:
    """One line about what ran this."""
    cpu = platform.processor()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    parts = (
        f"cagey-sessions {cagey_sessions.__version__}",
        f"{platform.python_implementation()} {platform.python_version()}",
        f"{platform.system()} {platform.release()} {platform.machine()}",
        f"{os.cpu_count()} x {cpu or 'unknown CPU'}",
    )
    return ", ".join(parts)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [("row", "ours", "base", "ratio", "spread", "goal", "verdict", "what")]
    for row in rows:
        ratio = f"{row.ratio:.2f}x faster" if "x faster" in row.goal else f"{row.ratio:.2f}"
        costs = (_amount(row.ours, row.unit), _amount(row.base, row.unit))
        lines.append((row.id, *costs, ratio, f"{row.spread:.0%}", row.goal or "none", row.verdict, row.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_the_right = (False, True, True, True, True, False, False, False)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_the_right, strict=True)
        ).rstrip()
        for line in lines
    )


def _amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 10_000 else f"{value:.{1 if value >= 10 else 2}f} {unit}"


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """What `--json` writes."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}
