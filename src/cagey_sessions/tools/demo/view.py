"""The display of the demo: a board with its progress, and a table of the results at its end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

__all__ = ["Board", "Check", "show_checks", "showing"]

PHASES = ("joining", "playing", "graceful stop", "playing again", "kill", "checking")
LINE_EVERY = 2.0
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 78
HEALTH_STYLES = {"ok": "green", "degraded": "yellow", "down": "red"}


@dataclass(frozen=True)
class Check:
    """One row of the table of results."""

    what: str
    expected: str
    found: str
    passed: bool


@dataclass
class Board:
    """The progress of the demo, as its processes have reported it. Times are in seconds."""

    bots: int
    seconds: float
    interval: float
    events: bool
    phase: str = PHASES[0]
    online: int = 0
    oldest: float | None = None
    receipts: int = 0
    reconnects: int = 0
    saves: int = 0
    skipped: int = 0
    pending: int = 0
    in_flight: int = 0
    latency: float = 0.0
    health: str = "-"
    reason: str = ""
    rates: deque[float] = field(default_factory=lambda: deque([0.0], maxlen=40))
    played_before: float = 0.0
    playing_since: float | None = None
    _counted: tuple[int, int] = (0, 0)
    _measured: tuple[float, int] = field(default_factory=lambda: (time.monotonic(), 0))

    def played(self) -> float:
        """For how long the bots have played, without the times when the server was down."""
        running = 0.0 if self.playing_since is None else time.monotonic() - self.playing_since
        return min(self.played_before + running, self.seconds)

    def count(self, saved: int, skipped: int) -> None:
        """Note how many saves the server has made, and found unnecessary, since it was started."""
        self.saves += saved - self._counted[0]
        self.skipped += skipped - self._counted[1]
        self._counted = saved, skipped

    def measure_rate(self) -> None:
        (then, before), now = self._measured, time.monotonic()
        self.rates.append((self.saves - before) / (now - then))
        self._measured = now, self.saves

    def server_is_away(self) -> None:
        """Note that the server is down; the next one counts from 0."""
        self.online, self.oldest, self.pending, self.in_flight = 0, None, 0, 0
        self.latency, self.health, self.reason = 0.0, "-", "there is no server"
        self.rates.append(0.0)
        self._counted, self._measured = (0, 0), (time.monotonic(), self.saves)


@asynccontextmanager
async def showing(board: Board, console: Console) -> AsyncIterator[None]:
    """A block in which the board is shown: live on a terminal, otherwise as a line from time to time."""
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        with Live(get_renderable=lambda: _panel(board), console=console, refresh_per_second=8):
            yield
        return
    lines = asyncio.create_task(_print_lines(board))
    try:
        yield
    finally:
        lines.cancel()


async def _print_lines(board: Board) -> None:
    while True:
        facts = (
            f"online {board.online}, saves/s {board.rates[-1]:.0f}, pending {board.pending}, "
            f"in flight {board.in_flight}, oldest unsaved {_age(board.oldest)}, skipped {board.skipped}, "
            f"store {_latency(board)}, health {board.health}, receipts {board.receipts}, "
            f"reconnects {board.reconnects}"
        )
        print(f"{board.played():5.1f} s  {board.phase:<13}  {facts}", flush=True)
        await asyncio.sleep(LINE_EVERY)


def _panel(board: Board) -> Panel:
    bar = ProgressBar(board.seconds, board.played(), WIDTH - 24, complete_style="cyan", finished_style="green")
    progress = Table.grid(padding=(0, 2))
    progress.add_row(bar, f"{board.played():.1f} of {board.seconds:g} s")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", width=14)
    facts.add_column(style="bold", width=8, justify="right")
    facts.add_column()
    facts.add_row("players online", str(board.online), f"of {board.bots}")
    facts.add_row("saves/s", f"{board.rates[-1]:.0f}", Text(_sparkline(board.rates), style="cyan"))
    facts.add_row("oldest unsaved", _age(board.oldest), f"at most {board.interval:g} s and one save")
    facts.add_row("pending", str(board.pending), f"saves due, and {board.in_flight} in flight")
    facts.add_row("saves", str(board.saves))
    facts.add_row("skipped", str(board.skipped), "needs a store" if board.events else "due, but nothing had changed")
    facts.add_row("store", _latency(board), "none: the server saves in a listener" if board.events else "a call")
    facts.add_row("health", Text(board.health, HEALTH_STYLES.get(board.health, "")), board.reason)
    facts.add_row("receipts", str(board.receipts), "purchases confirmed after their save")
    facts.add_row("reconnects", str(board.reconnects))
    content = Group(_phases(board.phase), "", progress, "", facts)
    return Panel(content, title="cagey-sessions demo", title_align="left", width=WIDTH, padding=(1, 2))


def _phases(current: str) -> Text:
    now = PHASES.index(current)
    styles = ["green"] * now + ["bold reverse"] + ["dim"] * len(PHASES)
    return Text("  ").join(Text(name, style) for name, style in zip(PHASES, styles, strict=False))


def _sparkline(values: Iterable[float]) -> str:
    values = list(values)
    top = max(*values, 1.0)
    return "".join(BARS[round(value / top * (len(BARS) - 1))] for value in values)


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _latency(board: Board) -> str:
    return f"{board.latency * 1000:.1f} ms" if board.latency else "-"


def show_checks(checks: Iterable[Check], console: Console) -> None:
    """Print the table of results."""
    table = Table("checked", "expected", "found", "", box=box.SIMPLE_HEAD)
    for check in checks:
        mark = Text("ok", "green") if check.passed else Text("LOST", "bold red")
        table.add_row(check.what, check.expected, check.found, mark)
    console.print(table)
