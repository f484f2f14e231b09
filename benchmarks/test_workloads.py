"""The workloads as pytest-benchmark runs them: `pytest benchmarks --benchmark-only`. What lives here: the adapter. What
must not: scenarios, goals and verdicts; those of `python -m benchmarks` count, for only there are both sides measured
in turns.

One side is one benchmark. What pytest-benchmark times is a whole round, what is not part of the operation included, so
the cost of one operation, counted as the workload counts it, stands beside it as ``extra_info``.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

from benchmarks.workloads import WORKLOADS, Sizes, Workload, measurable

SIZES = Sizes(
    many=int(os.environ.get("CAGEY_BENCH_MANY", "2000")), most=int(os.environ.get("CAGEY_BENCH_MOST", "10000"))
)
ROUNDS = int(os.environ.get("CAGEY_BENCH_ROUNDS", "3"))


@pytest.mark.parametrize("side", ["ours", "base"])
@pytest.mark.parametrize("workload", [w for w in WORKLOADS if measurable(w)], ids=lambda workload: workload.id)
def test_workload(benchmark: Any, workload: Workload, side: str) -> None:
    benchmark.group = workload.id
    with workload.prepare(SIZES) as pair:
        pair.ours()  # first in any case: some bases look at what it took
        if not workload.collector:
            gc.disable()
        try:
            costs = benchmark.pedantic(getattr(pair, side), rounds=ROUNDS, iterations=1, warmup_rounds=0)
        finally:
            gc.enable()
    for figure, cost in zip(workload.figures, costs if isinstance(costs, tuple) else (costs,), strict=True):
        benchmark.extra_info[figure.id] = f"{cost:.6g} {figure.unit}"
