"""`python -m benchmarks`. What lives here: the command line. What must not: measuring.

Ends with status 1 if a goal is missed; a noisy row is not missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .harness import Progress, machine, measure, report, table
from .workloads import FULL, QUICK, WORKLOADS, Workload, measurable


def _ids(text: str) -> list[str]:
    known = [figure.id for workload in WORKLOADS for figure in workload.figures]
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no row {name!r}; known are {', '.join(known)}")
    return chosen


def _chosen(workload: Workload, only: list[str] | None) -> list[str]:
    """The rows of a workload that are wanted: those named, and with ``lag`` also ``lag_p999``."""
    return [
        figure.id
        for figure in workload.figures
        if only is None
        or figure.id in only
        or any(figure.id.startswith(f"{name}_") for name in only if name == workload.id)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure cagey-sessions against what one would use instead."
    )
    parser.add_argument("--only", type=_ids, metavar="ID,ID", help="these rows only")
    parser.add_argument("--quick", action="store_true", help="a twenty-fifth of the size; under a minute")
    parser.add_argument("--size", type=int, metavar="N", help="so many where it says a million, a tenth elsewhere")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    if options.size is not None:
        sizes = replace(sizes, many=max(1, options.size // 10), most=options.size)
    progress = Progress(sys.stderr)
    begin = time.monotonic()
    print(machine(), flush=True)
    rows = []
    for workload in WORKLOADS:
        chosen = _chosen(workload, options.only)
        if not chosen:
            continue
        if not measurable(workload):
            print(f"{workload.id}: cannot be measured on this system", file=sys.stderr)
            continue
        rows += [row for row in measure(workload, sizes, progress) if row.id in chosen]
    progress.close()
    print(table(rows))
    print(f"{len(rows)} rows in {time.monotonic() - begin:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(report(rows), indent=2) + "\n")
    return 1 if any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
