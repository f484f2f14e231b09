"""Many seeds on all cores: ``python -m simulation --seeds 50000``. What lives here: the command. What must not: laws.

A failing seed is shrunk and kept in `kept.jsonl`, which the suite plays for ever.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .kept import FILE
from .search import attempt, shrink_and_keep

CHUNK = 20


def main() -> int:
    """The exit status: 1 if any seed failed."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50_000, help="how many seeds to play")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at a time")
    given = parser.parse_args()
    last = given.first + given.seeds
    chunks = [range(start, min(start + CHUNK, last)) for start in range(given.first, last, CHUNK)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    failed: list[tuple[int, str]] = []
    with (
        ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task("seeds", total=given.seeds)
        for seeds, bad in zip(chunks, pool.map(attempt, chunks), strict=True):
            failed += bad
            for seed, what in bad:
                progress.console.print(f"seed {seed}: {what}", soft_wrap=True)
            progress.advance(bar, len(seeds))
            done = seeds.stop - given.first
            if not sys.stderr.isatty() and done % 1000 < CHUNK:
                print(f"{done} seeds, {time.monotonic() - started:.0f} s", flush=True)
    for seed, what in failed[:5]:
        print(f"seed {seed} is shrunk ... {shrink_and_keep(seed, what)} steps, in {FILE.name}", flush=True)
    print(f"{given.seeds} seeds in {time.monotonic() - started:.0f} s, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
