"""Whether the tests find known faults: ``python -m mutants``. What lives here: the command. What must not: the faults.

Each fault is put into a copy of the sources, alone, and the tests are run on that copy: the simulation first, then the
suites that are named with the fault. A fault that no test finds is a hole in the tests. The sources as they are come
first, for a test that fails anyway would find everything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

import cagey_sessions

from .faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
SEEDS = 120
PATIENCE = 600
"""In seconds: tests that hang have found the fault, too."""
SIMULATION = "tests/simulation"


class Result(NamedTuple):
    fault: Fault
    caught_by: str
    """The first test that failed; empty if none did."""
    problem: str
    """Why the fault could not be tried, if so."""
    seconds: float


def attempt(fault: Fault) -> Result:
    """Put one fault into a copy and run the tests on it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so"))
        caught_by, problem = "", put_in(fault, copy)
        if not problem:
            for arguments in ([SIMULATION], list(fault.tests)):
                if arguments and (caught_by := run_tests(copy, arguments)):
                    break
    return Result(fault, caught_by, problem, time.monotonic() - started)


def put_in(fault: Fault, copy: Path) -> str:
    """Change the copy: what is wrong with the fault itself, if anything."""
    path = copy / "src" / "cagey_sessions" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.before) != 1:
        return f"the text is there {text.count(fault.before)} times in {fault.file}"
    path.write_text(text.replace(fault.before, fault.after), encoding="utf-8")
    if path.suffix == ".py":
        for library in Path(cagey_sessions.__file__).parent.glob("_core*.so"):
            shutil.copy(library, copy / "src" / "cagey_sessions")
    else:
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(
            build, cwd=copy, capture_output=True, text=True, check=False, env=os.environ | {"CFLAGS": "-O0"}
        )
        if done.returncode:
            return f"it cannot be built: {done.stderr[-300:]}"
    done = run([sys.executable, "-c", "import cagey_sessions"], copy)
    return f"it cannot be imported: {done.stderr[-300:]}" if done.returncode else ""


def run(command: list[str], copy: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(copy / "src"),
        "CAGEY_TEST_SEEDS": str(SEEDS),
        "CAGEY_TEST_EXAMPLES": "60",
        "CAGEY_TEST_HISTORIES": "10",
    }
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "FAILED the tests do not come to an end", "")


def run_tests(copy: Path, arguments: list[str]) -> str:
    """The first test that fails, or nothing."""
    done = run([sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "60", *arguments], copy)
    if done.returncode in (0, 5):
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.*)", done.stdout, re.MULTILINE)
    return failed[1].split(" - ")[0] if failed else (done.stdout + done.stderr).strip()[-80:]


def main() -> int:
    """The exit status: 1 if a fault was not found, or could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of faults, or parts of names, separated by commas")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--no-baseline", action="store_true", help="the sources as they are pass, it is known")
    given = parser.parse_args()
    wanted = [fault for fault in FAULTS if not given.only or any(part in fault.name for part in given.only.split(","))]
    console = Console(width=None if sys.stdout.isatty() else 150)
    tests = sorted({SIMULATION, *(test for fault in wanted for test in fault.tests)})
    if not given.no_baseline and (failing := run_tests(ROOT, tests)):
        console.print(f"the sources as they are fail {failing}: mend that first")
        return 1
    with ThreadPoolExecutor(given.processes) as pool:
        results = list(
            track(
                pool.map(attempt, wanted), "faults", total=len(wanted), console=console, disable=not console.is_terminal
            )
        )
    table = Table("fault", "in", "found by", "seconds")
    for result in results:
        said = result.problem or result.caught_by.removeprefix("tests/") or "NOT FOUND"
        table.add_row(result.fault.name, result.fault.file, said, f"{result.seconds:.0f}")
    console.print(table)
    found = sum(bool(result.caught_by) for result in results)
    console.print(f"{found} of {len(results)} faults were found")
    return int(found < len(results))


if __name__ == "__main__":
    sys.exit(main())
