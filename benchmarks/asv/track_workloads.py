"""What one operation costs on either side, for each row. What lives here: the adapter; see `__init__.py`."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # asv puts only this folder there

from benchmarks.workloads import WORKLOADS, Sizes, Workload, measurable

SIZES = Sizes(
    many=int(os.environ.get("CAGEY_BENCH_MANY", "10000")), most=int(os.environ.get("CAGEY_BENCH_MOST", "50000"))
)


def tracker(workload: Workload) -> Any:
    """A function for asv, which calls it for each row and side."""
    figures = [figure.id for figure in workload.figures]

    def track(figure: str, side: str) -> float:
        with workload.prepare(SIZES) as pair:
            if not workload.collector:
                gc.disable()
            try:
                ours = pair.ours()  # first in any case: some bases look at what it took
                costs = ours if side == "ours" else pair.base()
            finally:
                gc.enable()
        return costs[figures.index(figure)] if isinstance(costs, tuple) else costs

    track.params = [figures, ["ours", "base"]]
    track.param_names = ["row", "side"]
    track.unit = workload.unit  # of the first row: asv knows one for each function
    track.timeout = 300
    track.__name__ = track.__qualname__ = f"track_{workload.id}"
    return track


for _workload in WORKLOADS:
    if measurable(_workload):
        globals()[f"track_{_workload.id}"] = tracker(_workload)
