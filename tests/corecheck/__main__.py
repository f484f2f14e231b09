"""Whether the core can be trusted: ``python -m corecheck --debug FOLDER --sanitize FOLDER`` (`make check-core`).

What lives here: running the core's tests on a debug build and on a sanitizer build, and the leak scripts, and one line
for each of them. What must not: any test.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .operations import OPERATIONS

ROOT = Path(__file__).parents[2]
TESTS = ["tests/core", "tests/data/test_encoding.py"]


class Outcome(NamedTuple):
    passed: bool
    summary: str
    """One line."""
    output: str = ""
    """What to read if it did not pass."""


class Runs(NamedTuple):
    examples: int
    patience: float

    def python(self, arguments: Iterable[str], **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        try:
            return subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                text=True,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=self.patience,
            )
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            return subprocess.CompletedProcess(command, 1, f"{said}\nno end within {self.patience:,.0f} s")

    def tests(self, build: Path, **environment: str) -> Outcome:
        done = self.python(
            ["-m", "pytest", "-q", *TESTS],
            PYTHONPATH=str(build),
            CAGEY_TEST_EXAMPLES=str(self.examples),
            **environment,
        )
        last = done.stdout.strip().rpartition("\n")[2]
        return Outcome(done.returncode == 0, re.sub(r" in [\d.]+s.*", "", last.strip("= ")), done.stdout)

    def debug(self, build: Path) -> Outcome:
        """Structures checked after each operation, objects counted, and memory guarded by Python's own allocator."""
        if self.python(
            ["-c", "from cagey_sessions import _core; assert _core.DEBUG"], PYTHONPATH=str(build)
        ).returncode:
            return Outcome(False, f"no debug build in {build}")
        return self.tests(build, PYTHONMALLOC="debug")

    def sanitizers(self, build: Path) -> Outcome:
        libraries = list(build.glob("cagey_sessions/_core*.so"))
        if not libraries or b"__asan_init" not in libraries[0].read_bytes():
            return Outcome(False, f"no sanitizer build in {build}")
        compiler = os.environ.get("CC", "cc")
        asked = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
        if not os.path.isabs(library := asked.stdout.strip()):
            return Outcome(False, f"{compiler} has no libasan.so to preload")
        return self.tests(
            build,
            LD_PRELOAD=library,
            ASAN_OPTIONS="detect_leaks=0",  # the interpreter itself leaves much behind; `leaks` looks for ours
            UBSAN_OPTIONS="print_stacktrace=1",
            PYTHONMALLOC="malloc",  # so that each object has its own red zones
        )

    def leaks(self) -> Outcome:
        """Each operation in a process of its own."""

        def weigh(name: str) -> tuple[str, subprocess.CompletedProcess[str]]:
            return name, self.python(["-m", "corecheck.leaks", name])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(weigh, OPERATIONS))
        failed = [(name, each.stdout) for name, each in done if each.returncode]
        times = sum(int(each.stdout.split()[0].replace(",", "")) for _, each in done if not each.returncode)
        summary = f"{len(done)} operations in their own processes, {times:,} times in all: "
        summary += f"{len(failed)} of them keep something" if failed else "no block, byte or object kept"
        return Outcome(not failed, summary, "\n".join(f"{name}: {said.strip()}" for name, said in failed))

    def references(self, build: Path) -> Outcome:
        """All operations in one process that counts the core's objects."""
        seconds = str(float(os.environ.get("CAGEY_TEST_LEAK_SECONDS", "0.1")) / 3)
        path = os.pathsep.join([str(build), "tests"])
        done = self.python(["-m", "corecheck.leaks"], PYTHONPATH=path, CAGEY_TEST_LEAK_SECONDS=seconds)
        last = done.stdout.strip().rpartition("\n")[2]
        return Outcome(done.returncode == 0, f"{last} in one process: counts of references and objects", done.stdout)


def main() -> int:
    """The exit status: 1 if a part did not pass."""
    parser = argparse.ArgumentParser(prog="python -m corecheck", description=__doc__.splitlines()[0])
    parser.add_argument("--debug", type=Path, required=True, help="where a build with CAGEY_SESSIONS_DEBUG=1 is")
    parser.add_argument("--sanitize", type=Path, required=True, help="where one with CAGEY_SESSIONS_SANITIZE=1 is")
    parser.add_argument("--only", help="parts, separated by commas: debug, sanitizers, leaks, references")
    parser.add_argument("--examples", type=int, default=8, help="how many each property test looks at")
    parser.add_argument("--patience", type=float, default=600, help="how many seconds a part may take")
    given = parser.parse_args()
    runs = Runs(given.examples, given.patience)
    parts: dict[str, Callable[[], Outcome]] = {
        "debug": lambda: runs.debug(given.debug.absolute()),
        "sanitizers": lambda: runs.sanitizers(given.sanitize.absolute()),
        "references": lambda: runs.references(given.debug.absolute()),
        "leaks": runs.leaks,
    }
    wanted = given.only.split(",") if given.only else list(parts)

    def timed(name: str) -> tuple[str, Outcome, float]:
        started = time.monotonic()
        return name, parts[name](), time.monotonic() - started

    def show(results: Iterable[tuple[str, Outcome, float]]) -> bool:
        passed = True
        for name, outcome, seconds in results:
            print(
                f"{'ok  ' if outcome.passed else 'FAIL'}  {name:<11} {outcome.summary}  ({seconds:.0f} s)", flush=True
            )
            if not outcome.passed:
                print(outcome.output, flush=True)
                passed = False
        return passed

    # one process is waited for at a time in the first three; the leak scripts take every core there is
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = show(pool.map(timed, [name for name in wanted if name != "leaks"]))
    return int(not (show(map(timed, [name for name in wanted if name == "leaks"])) and passed))


if __name__ == "__main__":
    sys.exit(main())
