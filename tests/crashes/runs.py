"""Killing writers. What lives here: who is started and killed when, and what came out of it. What must not: what is
wrong with a history (`judge.py`).

On a file there is one writer at a time, each killed at a random moment after it has opened it. On a shared engine there
are two, which want the same users; one is killed, the other lives and gets the users of the dead one when its lease has
run out, and another one takes its place. Now and then one is held up for longer than its lease, and goes on as if it
had its users still. Every few kills both are killed: then all they have told is judged.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cagey_sessions

from .engines import DamagedError, Engine, look
from .history import Event, read_history
from .judge import Judge, describe
from .writer import LEASE

__all__ = ["ENVIRONMENT", "Result", "kill_writers"]

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[1], Path(cagey_sessions.__file__).parents[1])))
}
LONGEST = 0.4
"""How long a writer lives that is alone, in seconds."""
LONGEST_OF_TWO = 2.4
"""How long two live side by side: longer than it takes to get the users of one that was killed."""
HELD_UP = 1.8
"""For how long a writer is stopped, in seconds: until the other one has its users."""
KILLS_IN_A_ROUND = 6
PATIENCE = 30
"""With a writer that begins, in seconds."""
EVENTS_SHOWN = 30


@dataclass
class Result:
    """What came out of the kills of one engine."""

    name: str
    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    unacknowledged: int = 0
    """Versions that were stored, and whose writers were never told."""
    take_overs: int = 0
    fenced: int = 0
    problems: list[str] = field(default_factory=list)
    """What is wrong, in words; empty if nothing is."""
    seconds: float = 0.0

    def hear(self, judge: Judge, events: list[Event], where: str = "") -> None:
        """Have events judged; what is wrong with them is a problem, with the history of the user."""
        for kind, user, what in judge.hear(events):
            lines = [f"{where}: " * bool(where) + f"{kind}: {user}: {what}"]
            lines += map(describe, judge.events_of(user)[-EVENTS_SHOWN:])
            self.problems.append("\n    ".join(lines))

    def count(self, judge: Judge) -> None:
        """Add what a judge has heard."""
        self.acknowledged += judge.acknowledged
        self.lost += judge.lost
        self.unacknowledged += judge.unacknowledged
        self.take_overs += judge.take_overs
        self.fenced += judge.counts["fenced"]

    def require_bite(self, *, shared: bool = False) -> None:
        """A kill that is always too early or too late proves nothing."""
        missing = {
            "no kill came between a save and its acknowledgement": self.unacknowledged,
            "nobody took over a user of a writer that was killed": not shared or self.take_overs,
            "nobody saved a user who had been taken over": not shared or self.fenced,
        }
        self.problems += [f"it did not bite: {what}" for what, is_there in missing.items() if not is_there]


class _Writer:
    def __init__(self, engine: Engine, folder: Path, number: int) -> None:
        self.history = folder / f"writer-{number}.jsonl"
        self.history.touch()
        self._stderr = folder / f"writer-{number}.stderr"
        command = [sys.executable, "-m", "crashes.writer", engine.url, engine.space, str(self.history), str(number)]
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=ENVIRONMENT
            )

    def wait_open(self) -> str:
        """Until it has its store: what is wrong, if so."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not ready:
            return f"a writer had not opened its store after {PATIENCE} s"
        if self._process.stdout.readline() != b"open\n":
            self._process.wait()
            return f"a writer could not open its store: {self._said()}"
        return ""

    def stop(self) -> None:
        """Hold it up until `go_on`, as a full swap or a virtual machine that is moved does."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> str:
        """Kill it: what is wrong, if it was dead already."""
        process = self._process
        process.send_signal(signal.SIGKILL)
        status = process.wait()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        if status == -signal.SIGKILL:
            return ""
        return f"a writer has ended by itself, with status {status}: {self._said()}"

    def _said(self) -> str:
        return self._stderr.read_text(errors="replace")[-3000:]


class _Run:
    """All kills of one engine."""

    def __init__(self, engine: Engine, folder: Path, result: Result, on_kill: Callable[[], None]) -> None:
        self.engine = engine
        self.folder = folder
        self.result = result
        self.on_kill = on_kill
        self.judge = Judge(LEASE if engine.shared else 0)
        self.living: list[_Writer] = []
        self.events: list[Event] = []
        """Not judged yet."""
        self._started = 0

    def start(self, count: int) -> None:
        self._started += count
        self.living += [
            _Writer(self.engine, self.folder, number) for number in range(self._started - count, self._started)
        ]
        for writer in self.living[-count:]:
            if problem := writer.wait_open():
                self.result.problems.append(problem)

    def kill(self, writer: _Writer) -> None:
        self.living.remove(writer)
        if problem := writer.kill():
            self.result.problems.append(problem)
        self.events += read_history(writer.history)
        self.result.kills += 1
        self.on_kill()

    def look(self) -> None:
        try:
            self.events += look(self.engine, {event.user for event in self.events} | set(self.judge.users))
        except DamagedError as error:
            self.result.problems.append(str(error))

    def judge_all(self) -> None:
        """Nobody lives."""
        events, self.events = self.events, []
        self.result.hear(self.judge, events)
        if not self.result.problems:
            for history in self.folder.glob("writer-*"):
                history.unlink()


def kill_writers(
    name: str,
    engine: Engine,
    kills: int,
    folder: Path,
    *,
    seed: int = 0,
    on_kill: Callable[[], None] = lambda: None,
) -> Result:
    """Kill writers so many times, until something is wrong: what came out of it.

    `folder` is for what writers tell, which stays there if something is wrong with it. `on_kill` is called after each
    kill. Takes about a second for each.
    """
    started = time.monotonic()
    chance = random.Random(seed)
    result = Result(name)
    run = _Run(engine, folder, result, on_kill)
    try:
        while result.kills < kills and not result.problems:
            if engine.shared:
                _kill_two(run, min(KILLS_IN_A_ROUND, kills - result.kills), chance)
            else:
                run.start(1)
                time.sleep(chance.uniform(0, LONGEST))
                run.kill(run.living[0])
                run.look()
            run.judge_all()
    finally:
        for writer in run.living:
            writer.kill()
    result.count(run.judge)
    result.require_bite(shared=engine.shared)
    result.seconds = time.monotonic() - started
    return result


def _kill_two(run: _Run, kills: int, chance: random.Random) -> None:
    run.start(2)
    for number in range(kills - 2):
        if number % 2:
            held_up = chance.choice(run.living)
            held_up.stop()
            time.sleep(HELD_UP)
            held_up.go_on()
        time.sleep(chance.uniform(0, LONGEST_OF_TWO))
        run.kill(chance.choice(run.living))
        run.look()
        run.start(1)
    time.sleep(chance.uniform(0, LONGEST_OF_TWO))
    for writer in list(run.living):
        run.kill(writer)
    run.look()
