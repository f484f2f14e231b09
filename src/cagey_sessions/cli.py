"""The command line. What lives here: arguments, their checks, and exit statuses. What must not: the work itself, or an
import of anything that only an extra installs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from ._version import __version__
from .errors import DurationError
from .options import SECOND, SHORTEST_INTERVAL, parse_duration

__all__ = ["main"]

DEMO_NEEDS = ("rich", "uvloop", "websockets")

DEMO = """\
Bots play against a game server over WebSockets on this machine. Half way the server is stopped with SIGTERM and started
again; at the end it is killed with SIGKILL while they play, and started once more. Each time a reader that shares no
code with the library compares every player in the database with what the player's bot was told.
"""
DEMO_ENDS = """\
The last line of the output is one JSON object: "saves" were written, "skipped" were due and found nothing changed,
"lost" counts players who were not found as they were promised. Exit status: 0 if nothing acknowledged was lost, 1 if
something was, 2 if the demo could not run, 130 if it was interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cagey-sessions`` with these arguments, or the process's own, and return the exit status."""
    arguments = _parser().parse_args(argv)
    missing = [name for name in DEMO_NEEDS if find_spec(name) is None]
    if sys.platform == "win32":
        return _refuse("the demo stops its server with SIGTERM and kills it with SIGKILL: it does not run on Windows")
    if missing:
        return _refuse(f'the demo needs {", ".join(missing)}: pip install "cagey-sessions[demo]"')
    from .demo.run import Settings, run  # noqa: PLC0415 - needs the extra

    how = Settings(
        arguments.bots, arguments.seconds, arguments.interval, arguments.store, arguments.events, arguments.port
    )
    return run(how)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cagey-sessions", description="User sessions for stateful asyncio servers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="let bots play, stop and kill their server, and look for losses",
        description=DEMO,
        epilog=DEMO_ENDS,
    )

    def option(name: str, kind: Callable[[str], object], default: str | None, metavar: str, text: str) -> None:
        demo.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    option("--bots", _whole(1, 50_000), "500", "N", "how many bots play (default: 500)")
    option("--seconds", _duration(SECOND), "20s", "TIME", "how long they play in all (default: 20s)")
    option("--interval", _duration(SHORTEST_INTERVAL), "2s", "TIME", "how old unsaved changes may become (default: 2s)")
    option("--port", _whole(0, 65_535), "0", "N", "the server's TCP port on 127.0.0.1 (default: any free one)")
    where = demo.add_mutually_exclusive_group()
    help_store = (
        "have the library keep the players in this new SQLite file, and leave it and what the bots were told beside it "
        "(default: the same in a temporary folder, removed if nothing was lost)"
    )
    where.add_argument("--store", type=_new_file, metavar="FILE", help=help_store)
    help_events = (
        "no store: let the server load, and save in a listener of persist_user_data, to a temporary SQLite file of its "
        "own; no save is skipped then"
    )
    where.add_argument("--events", action="store_true", help=help_events)
    return parser


def _duration(shortest: int) -> Callable[[str], float]:
    """The type of an argument: a duration in seconds, given as the library's own settings are."""

    def duration(text: str) -> float:
        try:
            return parse_duration(_number(text), "time", shortest=shortest) / SECOND
        except DurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return duration


def _whole(smallest: int, largest: int) -> Callable[[str], int]:
    """The type of an argument: a whole number."""

    def whole(text: str) -> int:
        if text.isdecimal() and smallest <= int(text) <= largest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number from {smallest} to {largest}")

    return whole


def _new_file(text: str) -> Path:
    """The type of an argument: a file that can be made. An existing one may hold players that our bots do not know."""
    path = Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{text!r:.80} exists already; name a new file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r:.80} is in a folder that does not exist")
    return path


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _refuse(reason: str) -> int:
    print(f"cagey-sessions: {reason}", file=sys.stderr)
    return 2
