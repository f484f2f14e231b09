"""SQLite, killed at each system call that changes a file. What lives here: the shim, who is killed at which call, and
what came out of it. What must not: what is wrong with a history (`judge.py`).

First everything is done once unharmed, to see which calls there are. Then it is done again for each call and killed
before it, after it, and in the middle where it writes. Whoever comes next has to find the whole old state or the whole
new one, and the new one if anybody was told of it.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from cagey_sessions import StoreError

from .engines import DamagedError, MissingEngineError, SQLite, look
from .history import Event, read_history
from .judge import Judge
from .runs import ENVIRONMENT, Result
from .saver import ACKNOWLEDGED, SCENARIOS, USER, save_again

__all__ = ["build_shim", "calls_of", "is_synced", "kill_at_each_call"]

SOURCE = Path(__file__).with_name("shim.c")
MOMENTS = ("before", "in the middle of", "after")
PATIENCE = 60
"""With one saver, in seconds."""


def build_shim(folder: Path) -> Path:
    """The shim, compiled. Raises `MissingEngineError`."""
    if sys.platform != "linux":
        raise MissingEngineError("system calls are counted by LD_PRELOAD and /proc, which are of Linux")
    compiler = shutil.which("cc")
    if compiler is None:
        raise MissingEngineError("there is no C compiler, cc, to count system calls with")
    shim = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o", str(shim), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingEngineError(f"{SOURCE.name} cannot be compiled: {done.stderr[:500]}")
    return shim


class SaverError(Exception):
    """A saver has ended by itself."""


class _Attempt:
    """One saver, in a folder of its own."""

    def __init__(self, folder: Path, shim: Path) -> None:
        self.engine = SQLite(folder)
        self.history = folder / "history.jsonl"
        self.trace = folder / "trace.txt"
        self.shim = shim

    def run(self, what: str, at: int = 0, moment: int = 0) -> int:
        """The exit status."""
        path, history, trace = str(self.engine.path), str(self.history), str(self.trace)
        command = [sys.executable, "-m", "crashes.saver", path, history, what, str(at), str(moment), trace]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env=ENVIRONMENT | {"LD_PRELOAD": str(self.shim)},
        )
        if done.returncode not in (0, -signal.SIGKILL):
            raise SaverError(f"a saver has ended with status {done.returncode}: {done.stderr[-3000:]}")
        return done.returncode

    def copy(self) -> _Attempt:
        """The same state, for somebody else; a copy that was made earlier goes."""
        folder = self.engine.path.parent
        copied = folder.with_name(f"{folder.name} copy")
        shutil.rmtree(copied, ignore_errors=True)
        return _Attempt(Path(shutil.copytree(folder, copied)), self.shim)


def _prepared(what: str, shim: Path, folder: Path) -> _Attempt:
    """The state in which each attempt begins."""
    folder.mkdir()
    attempt = _Attempt(folder, shim)
    attempt.history.touch()
    if SCENARIOS[what]:
        attempt.run(SCENARIOS[what])
        attempt.trace.unlink()
    return attempt


def calls_of(what: str, shim: Path, folder: Path) -> list[str]:
    """The system calls of a scenario that is not killed, each with the end of the file's name, and ``acknowledged``."""
    return _calls(_prepared(what, shim, folder), what)


def _calls(begun: _Attempt, what: str) -> list[str]:
    attempt = begun.copy()
    attempt.run(what)
    return attempt.trace.read_text(encoding="utf-8").splitlines()


def is_synced(calls: Sequence[str]) -> bool:
    """Whether the last call before the acknowledgement is a sync of the log."""
    before = calls[: calls.index(ACKNOWLEDGED)] if ACKNOWLEDGED in calls else []
    return bool(before) and before[-1] in ("fdatasync -wal", "fsync -wal")


def kill_at_each_call(
    folder: Path, scenarios: Collection[str] = tuple(SCENARIOS), *, on_kill: Callable[[], None] = lambda: None
) -> Result:
    """Kill savers at each call of each scenario: what came out of it. Takes about half a second for each.

    Raises `MissingEngineError`.
    """
    started = time.monotonic()
    result = Result("sqlite, each system call")
    shim = build_shim(folder)
    try:
        for place, what in enumerate(scenarios):
            begun = _prepared(what, shim, folder / f"begun-{place}")
            calls = _calls(begun, what)
            if not is_synced(calls):
                result.problems.append(f"{what}: acknowledged before the log was synced; a machine that fails loses it")
            _kill(begun, what, [call for call in calls if call != ACKNOWLEDGED], result, on_kill)
    except (SaverError, subprocess.TimeoutExpired) as error:
        result.problems.append(str(error))
    result.require_bite()
    result.seconds = time.monotonic() - started
    return result


def _kill(begun: _Attempt, what: str, calls: list[str], result: Result, on_kill: Callable[[], None]) -> None:
    known = read_history(begun.history)
    for number, call in enumerate(calls, 1):
        for moment, name in enumerate(MOMENTS):
            if name == "in the middle of" and "write" not in call:
                continue
            attempt = begun.copy()
            where = f"{what}: killed {name} call {number} of {len(calls)}, {call}"
            if attempt.run(what, number, moment) != -signal.SIGKILL:
                result.problems.append(f"{where}: it came to its end")
            result.kills += 1
            _judge(known, attempt, where, result)
            on_kill()


def _judge(begun: list[Event], attempt: _Attempt, where: str, result: Result) -> None:
    """Look at what is left, and let the next one go on with it."""
    judge = Judge()
    result.hear(judge, begun, where)
    known = judge.acknowledged
    events: list[Event] = read_history(attempt.history)[len(begun) :]
    after = attempt.history.with_suffix(".after")
    try:
        events += look(attempt.engine, [USER])
        asyncio.run(save_again(str(attempt.engine.path), str(after)))
        events += read_history(after) + look(attempt.engine, [USER])
    except (DamagedError, StoreError) as error:
        result.problems.append(f"{where}: {error}")
    result.hear(judge, events, where)
    result.count(judge)
    result.acknowledged -= known
