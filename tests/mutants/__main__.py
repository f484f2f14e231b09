"""Whether the tests find known faults: ``python -m mutants``. What lives here: the command. What must not: the faults.

Each fault is put into a copy of the sources, alone, and the tests are run on that copy: the simulation first, then the
suites that are named with the fault. A fault that no test finds is a hole in the tests, and so is one that ends the
process before a test can say what is wrong. The sources as they are come first, for a test that fails anyway would find
everything. What cannot be tried is as bad as what is not found, and said at length.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import cagey_sessions

from .faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
SEEDS = 120
PATIENCE = 1800
"""In seconds, for all that is run on one fault: tests that hang have found it, too."""
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""How a process ends by itself; by other signals somebody else has ended it."""
ENDLESS = "the tests do not come to an end"
SIMULATION = "tests/simulation"


class ProblemError(Exception):
    """Why something could not be tried."""


class Result(NamedTuple):
    fault: Fault
    caught_by: str
    """The first test that failed; empty if none did."""
    crashed: str
    """The suites that ended the process before any test had failed."""
    problem: str
    """Why the fault could not be tried, if so."""
    seconds: float

    @property
    def said(self) -> str:
        if self.problem:
            return "COULD NOT BE TRIED: see below"
        if self.caught_by:
            return self.caught_by.removeprefix("tests/")
        return f"NOT FOUND: the process ended in {self.crashed}" if self.crashed else "NOT FOUND"


def make_builder(folder: Path) -> Path:
    """An environment that holds what pyproject.toml wants for a build; pip alone would make one for each fault."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted], check=True)
    return folder / "bin" / "python"


def attempt(fault: Fault, builder: Path | None) -> Result:
    """Put one fault into a copy and run the tests on it."""
    started = time.monotonic()
    caught_by = crashed = problem = ""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        try:
            copy_sources(copy)
            put_in(fault, copy)
            put_core_in(copy, builder if fault.is_in_core else None)
            for arguments in ([SIMULATION], list(fault.tests)):
                if not arguments:
                    continue
                failed, ended = run_tests(copy, arguments)
                crashed = crashed or ended
                if failed:
                    caught_by = failed
                    break
        except ProblemError as error:
            problem = str(error)
    return Result(fault, caught_by, crashed, problem, time.monotonic() - started)


def copy_sources(copy: Path) -> None:
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "_core.c")
    shutil.copytree(ROOT / "src", copy / "src", ignore=left_out)


def put_in(fault: Fault, copy: Path) -> None:
    """Change the copy."""
    path = copy / "src" / "cagey_sessions" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.before) != 1:
        raise ProblemError(f"the text is there {text.count(fault.before)} times in {fault.file}")
    path.write_text(text.replace(fault.before, fault.after), encoding="utf-8")


def put_core_in(copy: Path, builder: Path | None) -> None:
    """Build the core of the copy the way the package is built; without a builder it is the one built already."""
    package = copy / "src" / "cagey_sessions"
    built = Path(cagey_sessions.__file__).parent
    if builder is not None:
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        built = copy / "built" / "cagey_sessions"
        install = [builder, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", "built"]
        done = subprocess.run(
            [*install, "."], cwd=copy, capture_output=True, text=True, check=False, env=os.environ | {"CFLAGS": "-O0"}
        )
        if done.returncode:
            raise ProblemError(f"it cannot be built: status {done.returncode}\n{done.stdout}{done.stderr}")
    for library in built.glob("_core*.so"):
        shutil.copy(library, package)
    done = run([sys.executable, "-c", "import cagey_sessions; print(cagey_sessions._core.__file__)"], copy)
    if done.returncode or not Path(done.stdout.strip()).is_relative_to(package):
        raise ProblemError(f"it cannot be imported: status {done.returncode}\n{done.stdout}{done.stderr}")


def run(command: list[str], copy: Path, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(copy / "src"),
        "CAGEY_TEST_SEEDS": str(SEEDS),
        "CAGEY_TEST_EXAMPLES": "60",
        "CAGEY_TEST_HISTORIES": "10",
    }
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=patience
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, f"FAILED {ENDLESS}", "")


def run_tests(copy: Path, arguments: list[str], patience: float = PATIENCE) -> tuple[str, str]:
    """The first test that fails, or nothing; and the suites, if the process ended before it could say so."""
    done = run([sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "60", *arguments], copy, patience)
    if done.returncode == 0:
        return "", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*)", done.stdout, re.MULTILINE)  # what tests log is set in further
    if failed:
        return failed[1].split(" - ")[0], ""
    if "+ Timeout +" in done.stdout + done.stderr:  # in a random test, which no clock fails: it ended the process
        return ENDLESS, ""
    if -done.returncode in CRASHES:
        return "", " ".join(arguments)
    raise ProblemError(f"pytest ended with status {done.returncode}\n{done.stdout}{done.stderr}")


def why_as_they_are(wanted: list[Fault], builder: Path | None) -> str:
    """What is wrong with the sources as they are, built the same way, if anything."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        try:
            copy_sources(copy)
            put_core_in(copy, builder)
            suites = sorted({SIMULATION, *(test for fault in wanted for test in fault.tests)})
            failed, ended = run_tests(copy, suites, 4 * PATIENCE)
        except ProblemError as error:
            return str(error)
    return failed or (f"the process ended in {ended}" if ended else "")


def main() -> int:
    """The exit status: 1 if a fault was not found, or could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of faults, or parts of names, separated by commas")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--no-baseline", action="store_true", help="the sources as they are pass, it is known")
    given = parser.parse_args()
    parts = given.only.split(",") if given.only else [""]
    console = Console(width=None if sys.stdout.isatty() else 150)
    for part in parts:
        if not any(part in fault.name for fault in FAULTS):
            console.print(f"no fault is named like {part!r}", markup=False)
            return 1
    wanted = [fault for fault in FAULTS if any(part in fault.name for part in parts)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        builder = make_builder(Path(folder) / "builder") if any(fault.is_in_core for fault in wanted) else None
        if not given.no_baseline and (failing := why_as_they_are(wanted, builder)):
            console.print(f"the sources as they are fail: mend that first\n{failing}", markup=False)
            return 1
        with ThreadPoolExecutor(given.processes) as pool:
            results = list(
                track(
                    pool.map(lambda fault: attempt(fault, builder), wanted),
                    "faults",
                    total=len(wanted),
                    console=console,
                    disable=not console.is_terminal,
                )
            )
    return report(results, console)


def report(results: list[Result], console: Console) -> int:
    table = Table("fault", "in", "found by", "seconds")
    for result in results:
        table.add_row(result.fault.name, result.fault.file, escape(result.said), f"{result.seconds:.0f}")
    console.print(table)
    not_tried = [result for result in results if result.problem]
    for result in not_tried:
        console.print(f"\nCOULD NOT BE TRIED: {result.fault.name}: {result.problem}", markup=False, highlight=False)
    found = sum(bool(result.caught_by) for result in results)
    console.print(f"{found} of {len(results)} faults were found, {len(not_tried)} could not be tried")
    return int(found < len(results))


if __name__ == "__main__":
    sys.exit(main())
