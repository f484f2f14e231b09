"""Processes killed while they save, on every engine: ``python -m crashes``. What lives here: the command. What must
not: the killing.

The exit status is 0 if nothing is wrong, 1 if anything acknowledged was lost, a history cannot be true or no kill came
at a moment that matters, and 2 if an engine is not there. The kill moments come from the seed, what they meet does not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .engines import Engine, MissingEngineError, Postgres, Redis, SQLite
from .points import kill_at_each_call
from .runs import Result, kill_writers

SAYS = "Kill processes while they save, on every engine, and judge what is left."
KILLS = {"sqlite": 300, "postgres": 100, "redis": 100}
CALLS = "calls"
NAMES = (*KILLS, CALLS)
ENGINES: dict[str, Callable[[Path], Engine]] = {
    "sqlite": SQLite,
    "postgres": lambda _: Postgres(),
    "redis": lambda _: Redis(),
}
PROBLEMS_SHOWN = 5
EVERY = 10


def run(name: str, kills: int, seed: int, folder: Path, on_kill: Callable[[], None]) -> Result:
    """Kill on one engine. Raises `MissingEngineError`."""
    if name == CALLS:
        return kill_at_each_call(folder, on_kill=on_kill)
    engine = ENGINES[name](folder)
    engine.open()
    try:
        return kill_writers(name, engine, kills, folder, seed=seed, on_kill=on_kill)
    finally:
        engine.remove()


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m crashes", description=SAYS, epilog=" ".join(__doc__.split("\n\n")[1].split())
    )
    parser.add_argument("--only", help=f"some of {', '.join(NAMES)} (SQLite at each system call), separated by commas")
    many = ", ".join(f"{count} for {name}" for name, count in KILLS.items())
    parser.add_argument("--kills", type=int, help=f"how many on each engine; by default {many}")
    parser.add_argument("--seed", type=int, default=0, help="another seed kills at other moments")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"--only takes {', '.join(NAMES)}, not {', '.join(sorted(unknown))}")
    if given.kills is not None and given.kills < 2:
        parser.error("--kills is at least 2")
    console = Console(width=None if sys.stdout.isatty() else 150)
    results, missing = [], []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix=f"crashes-{name}-"))
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            kills = KILLS.get(name, 0) if given.kills is None else given.kills
            bar = progress.add_task(name, total=None if name == CALLS else kills)
            done = 0

            def on_kill() -> None:
                nonlocal done
                done += 1
                progress.advance(bar)  # noqa: B023 - called before the next round of the loop
                if not console.is_terminal and not done % (5 * EVERY if name == CALLS else EVERY):  # noqa: B023
                    print(f"{name}: {done} kills", flush=True)  # noqa: B023

            try:
                result = run(name, kills, given.seed, folder, on_kill)
            except MissingEngineError as error:
                missing.append(str(error))
                shutil.rmtree(folder)
                continue
        results.append(result)
        for problem in result.problems[:PROBLEMS_SHOWN]:
            console.print(problem, soft_wrap=True, markup=False, highlight=False)
        if len(result.problems) > PROBLEMS_SHOWN:
            console.print(f"and {len(result.problems) - PROBLEMS_SHOWN} more like these")
        if result.problems:
            console.print(f"what the last writers told is in {folder}", soft_wrap=True)
        else:
            shutil.rmtree(folder)
    console.print(_table(results))
    for each in missing:
        console.print(f"could not run: {each}", soft_wrap=True, markup=False)
    if any(result.problems for result in results):
        return 1
    return 2 if missing else 0


def _table(results: list[Result]) -> Table:
    table = Table("engine", caption="applied: stored, and its writer was killed before it was told")
    for column in ("kills", "acknowledged", "lost", "applied", "take-overs", "fenced", "wrong", "seconds"):
        table.add_column(column, justify="right")
    for result in results:
        figures = (result.kills, result.acknowledged, result.lost, result.unacknowledged, result.take_overs)
        others = (result.fenced, len(result.problems), round(result.seconds))
        table.add_row(result.name, *(f"{figure:,}" for figure in figures + others))
    return table


if __name__ == "__main__":
    sys.exit(main())
