"""How it is measured. What lives here: rounds, medians, the spread, verdicts, the table. What must not: any scenario.

One round runs ours and then the base; a row has the ratio of each round and reports their median, so that whatever
slows the machine for longer than a round slows both sides of it. `ours` and `base` are the medians of their own. The
spread is the range of the middle half of the ratios over their median. A row that spreads over more than `NOISY` is run
once more, and if that does not help it is reported as noisy, without a verdict.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import cagey_sessions

from .workloads import Sizes, Workload

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
    """None: too noisy to tell."""
    unit: str
    note: str

    @property
    def verdict(self) -> str:
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


def measure(workload: Workload, sizes: Sizes, progress: Progress) -> Row:
    """Run a workload, twice if the first time was too noisy."""
    row = _measure_once(workload, sizes, progress, workload.id)
    if row.holds is None:
        row = _measure_once(workload, sizes, progress, f"{workload.id}, again")
    return row


def _measure_once(workload: Workload, sizes: Sizes, progress: Progress, label: str) -> Row:
    ours: list[float] = []
    base: list[float] = []
    with _collector_off(), workload.prepare(sizes) as pair:
        for round_ in range(1 - workload.warm_ups, workload.rounds + 1):
            progress.show(label, round_, workload.rounds)
            gc.collect()
            ours.append(pair.ours())
            gc.collect()
            base.append(pair.base())
    del ours[: workload.warm_ups], base[: workload.warm_ups]
    goal = workload.goal
    ratios = [goal.ratio_of(*costs) for costs in zip(ours, base, strict=True)]
    ratio, cost = statistics.median(ratios), statistics.median(ours)
    quarter, _, three_quarters = statistics.quantiles(ratios, n=4, method="inclusive")
    spread = (three_quarters - quarter) / ratio
    return Row(
        id=workload.id,
        ours=cost,
        base=statistics.median(base),
        ratio=ratio,
        spread=spread,
        goal=str(goal),
        holds=None if spread > NOISY else goal.holds(cost, ratio),
        unit=workload.unit,
        note=workload.note(sizes),
    )


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
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
        ratio = f"{row.ratio:.2f}x faster" if row.goal.endswith("faster") else f"{row.ratio:.2f}"
        costs = (f"{row.ours:.1f} {row.unit}", f"{row.base:.1f} {row.unit}")
        lines.append((row.id, *costs, ratio, f"{row.spread:.0%}", row.goal, row.verdict, row.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_the_right = (False, True, True, True, True, False, False, False)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_the_right, strict=True)
        ).rstrip()
        for line in lines
    )


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """What `--json` writes."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}
