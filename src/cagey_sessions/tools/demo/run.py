"""The course of the demo: starts the server and the bots, stops and kills the server, and reports what was found.

The game is in `server.py` and `bots.py`, the comparison in `verify.py`, and the display in `view.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...errors import UsageError
from . import verify
from .place import Place, place_of
from .view import Board, Check, show_checks, showing

__all__ = ["Settings", "run"]

ONE_SAVE = 1.0
"""How many seconds one save may take, unless the server has seen one take longer. A change that a kill loses may be
older than the interval by this much: its save has begun by then, but need not be on the disk."""
PATIENCE = 60.0
"""How many seconds to wait for something that should take a moment."""
OTHER_FILES = 100
"""How many files a process has open at most, besides one socket for each bot."""


@dataclass(frozen=True)
class Settings:
    """The settings from the command line; durations in seconds."""

    bots: int
    seconds: float
    interval: float
    store: str | None
    """The URL of an engine, or the path of a new file."""
    events: bool
    port: int


class DemoError(Exception):
    """The demo cannot go on."""


def run(settings: Settings) -> int:
    """Run the demo, print its result, and return the exit status."""
    console = Console(highlight=False)
    try:
        place = place_of(settings.store)
    except UsageError as error:
        print(f"cagey-sessions: {error}", file=sys.stderr)
        return 2
    story = Story(settings, place)
    try:
        asyncio.run(story.tell(console))
    except (DemoError, OSError) as error:
        print(f"cagey-sessions: {str(error) or f'nothing happened for {PATIENCE:g} s'}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("cagey-sessions: interrupted", file=sys.stderr)
        return 130
    finally:
        lost = not all(check.passed for check in story.checks)
        if lost and place.is_temporary:
            print(f"cagey-sessions: the players and what their bots were told are in {place}", file=sys.stderr)
        elif not lost:
            place.remove()
    show_checks(story.checks, console)
    if not story.summary["changes_lost_by_kill"]:
        print("cagey-sessions: warning: the kill hit no unsaved work; play longer or with more bots", file=sys.stderr)
    print(json.dumps(story.summary), flush=True)
    return int(lost)


class Child:
    """A process of the demo, which reports on its output and may obey commands."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, hear: Callable[[dict[str, Any]], None]) -> None:
        self.process = process
        self.ended: asyncio.Task[int] = asyncio.create_task(self._listen(hear), name=name)
        self._done: asyncio.Queue[str] = asyncio.Queue()

    async def ask(self, command: str) -> None:
        """Send a command, and wait until the process reports that it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        await asyncio.wait_for(self._done.get(), PATIENCE)

    async def end(self, sign: signal.Signals) -> int:
        """Send a signal and wait for the exit status."""
        self.process.send_signal(sign)
        return await asyncio.wait_for(self.ended, PATIENCE)

    async def _listen(self, hear: Callable[[dict[str, Any]], None]) -> int:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line.endswith(b"\n"):  # if not, the process was killed in the middle of a line
                facts = json.loads(line)
                if "done" in facts:
                    self._done.put_nowait(facts["done"])
                else:
                    hear(facts)
        return await self.process.wait()


class Story:
    """The steps of the demo in their order, and their results."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self.checks: list[Check] = []
        self.summary: dict[str, int] = {}
        self._settings = settings
        self._place = place
        self._board = Board(settings.bots, settings.seconds, settings.interval, settings.events)
        self._children: dict[str, Child] = {}
        self._players_who_know = 0
        self._drained = ""
        self._one_save = ONE_SAVE
        self._oldest = 0.0
        self._too_old = 0
        self._lost: set[str] = set()

    async def tell(self, console: Console) -> None:
        """Run the demo to its end; whatever happens, no process is left."""
        me = asyncio.current_task()
        assert me is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
        _allow_open_files(self._settings.bots + OTHER_FILES)
        with _listen(self._settings.port, self._settings.bots) as self._listener:
            try:
                async with showing(self._board, console):
                    await self._acts()
            finally:
                for child in self._children.values():
                    if child.process.returncode is None:
                        child.process.kill()
                    await child.process.wait()

    async def _acts(self) -> None:
        await self._start("bots", self._settings.bots, self._listener.getsockname()[1], hear=self._hear_bots)
        await self._start_server()
        await self._until_all_know()
        await self._play("playing")

        self._board.phase = "graceful stop"
        await self._stop_server("graceful stop")
        await self._compare_after_stop(await self._ledgers("stop"))
        await self._start_server()
        await self._play("playing again")

        self._board.phase = "kill"
        killed_at = time.monotonic()
        await self._end_server(signal.SIGKILL)
        stored = await self._compare_after_kill(await self._ledgers("kill"), killed_at)

        self._board.phase = "checking"
        await self._children["bots"].ask("look")
        self._players_who_know = 0
        await self._start_server()
        await self._until_all_know()
        await self._stop_server("last stop")
        await self._compare_after_return(await self._ledgers("end"), stored)

    async def _start(
        self, name: str, *arguments: object, hear: Callable[[dict[str, Any]], None], pass_fds: tuple[int, ...] = ()
    ) -> None:
        # Each in a session of its own, so that Ctrl-C reaches only this process, which ends the others. If this process
        # is killed, they end when their pipes are closed.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"{__package__}.{name}", *map(str, arguments)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self._children[name] = Child(name, process, hear)

    async def _start_server(self) -> None:
        listener = self._listener.fileno()
        arguments = (self._place.url, self._settings.interval, listener, "events" if self._settings.events else "store")
        await self._start("server", *arguments, hear=self._hear_server, pass_fds=(listener,))

    async def _end_server(self, sign: signal.Signals) -> int:
        status = await self._children["server"].end(sign)
        del self._children["server"]
        self._board.server_is_away()
        return status

    async def _stop_server(self, what: str) -> None:
        status = await self._end_server(signal.SIGTERM)
        self._check(what, "exit status 0", f"{status}; {self._drained}", passed=status == 0)

    async def _play(self, phase: str) -> None:
        self._board.phase = phase
        self._board.playing_since = time.monotonic()
        await self._pause(self._settings.seconds / 2)
        self._board.played_before, self._board.playing_since = self._board.played(), None

    async def _until_all_know(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while self._players_who_know < self._settings.bots:
                await self._pause(0.05)

    async def _pause(self, seconds: float) -> None:
        """Wait some seconds, and raise if a child ends meanwhile."""
        done, _ = await asyncio.wait([child.ended for child in self._children.values()], timeout=seconds)
        for task in done:
            raise DemoError(f"the process of the {task.get_name()} ended by itself, with status {task.result()}")

    def _hear_server(self, facts: dict[str, Any]) -> None:
        self._board.count(facts["saved"], facts["skipped"])
        if "drained" in facts:
            self._drained = f"{facts['drained']} saved in {facts['seconds'] * 1000:.0f} ms"
            return
        for name in ("online", "oldest", "pending", "in_flight", "latency", "health", "reason"):
            setattr(self._board, name, facts[name])
        self._board.measure_rate()
        self._one_save = max(self._one_save, facts["slowest"])
        self._oldest = max(self._oldest, facts["oldest"] or 0.0)
        self._too_old += self._oldest_allowed < (facts["oldest"] or 0.0)

    @property
    def _oldest_allowed(self) -> float:
        return self._settings.interval + self._one_save

    def _hear_bots(self, facts: dict[str, Any]) -> None:
        self._players_who_know = facts["known"]
        self._board.receipts, self._board.reconnects = facts["receipts"], facts["reconnects"]

    async def _ledgers(self, moment: str) -> verify.Ledgers:
        path = self._place.ledgers(moment)
        await self._children["bots"].ask(f"write {path}")
        return verify.read_ledgers(path)

    async def _players(self) -> verify.Players:
        return await asyncio.to_thread(verify.read_players, self._place.url)

    async def _compare_after_stop(self, ledgers: verify.Ledgers) -> None:
        players = await self._players()
        self._check_players("stored then", "the last state known", verify.different(players, ledgers))
        self._check_players("whose it is", "their own", verify.mixed_up(players, ledgers))

    async def _compare_after_kill(self, ledgers: verify.Ledgers, killed_at: float) -> verify.Players:
        players = await self._players()
        looks = sum(len(ledger["shown"]) for ledger in ledgers.values())
        self._check_players(f"shown {looks} times", "the state they left", verify.contradicted(ledgers))
        at_most = f"at most {self._settings.interval:g} + {self._one_save:.1f} s"
        self._check("while it ran", at_most, f"up to {self._oldest:.1f} s unsaved", passed=not self._too_old)
        found = verify.after_kill(players, ledgers, killed_at, self._oldest_allowed)
        receipts = sum(ledger["receipts"] for ledger in ledgers.values())
        self._check_players(f"kill: {receipts} receipts", "none missing", found.lost)
        self._check_players("kill: whose it is", "their own", verify.mixed_up(players, ledgers))
        gone = f"{found.changes} gone, up to {found.oldest:.1f} s"
        self._check("kill: all changes", at_most, gone, passed=not found.older_than_allowed)
        self.summary |= {
            "older_than_interval": found.older_than_allowed + self._too_old,
            "changes_lost_by_kill": found.changes,
        }
        return players

    async def _compare_after_return(self, ledgers: verify.Ledgers, stored: verify.Players) -> None:
        self._check_players("shown after the kill", "what the reader found", verify.different(stored, ledgers))
        saves = sum(stored.version for stored in (await self._players()).values())
        receipts = sum(ledger["receipts"] for ledger in ledgers.values())
        reconnects = sum(ledger["logins"] - 1 for ledger in ledgers.values())
        done = {"bots": self._settings.bots, "saves": saves, "skipped": self._board.skipped}
        done |= {"receipts": receipts, "reconnects": reconnects, "lost": len(self._lost)}
        self.summary = done | self.summary

    def _check_players(self, what: str, expected: str, wrong: set[str]) -> None:
        self._lost |= wrong
        right = self._settings.bots - len(wrong)
        self._check(what, expected, f"{right} of {self._settings.bots} players", passed=not wrong)

    def _check(self, what: str, expected: str, found: str, *, passed: bool) -> None:
        self.checks.append(Check(what, expected, found, passed))


def _listen(port: int, backlog: int) -> socket.socket:
    """Make the listening socket, which is given to one server after the other.

    Bots that connect while there is no server wait in its queue, and no other program can take the port.
    """
    try:
        return socket.create_server(("127.0.0.1", port), backlog=backlog)
    except OSError as error:
        raise DemoError(f"cannot listen on port {port}: {os.strerror(error.errno or 0)}") from None


def _allow_open_files(number: int) -> None:
    """Raise the limit of open files for this process and its children, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        raise DemoError(f"so many bots need {number} open files; a process may have {hard} here")
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
