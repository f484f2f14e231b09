"""The command ``cagey-sessions``: its arguments, their checks, and its exit statuses.

The work is done in `store.py` and in ``demo/``. What needs an extra is imported when a command needs it, so that
``--help`` works without.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from .._version import __version__
from ..errors import (
    CageySessionsError,
    CorruptRecordError,
    DurationError,
    InvalidUserIdError,
    OptionError,
    OwnedElsewhereError,
)
from ..options import SECOND, SHORTEST_INTERVAL, duration_of, parse_duration
from ..stores.urls import engine_of
from ..wording import quote
from . import store as tools

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["main"]

DEMO_NEEDS = ("rich", "uvloop", "websockets")

DEMO = """\
Bots play against a game server over WebSockets on this machine. Half way the server is stopped with SIGTERM and started
again; at the end it is killed with SIGKILL while they play, and started once more. Each time a reader that shares no
code with the library compares every player in the database with what the player's bot was told.
"""
DEMO_ENDS = """\
The last line of the output is one JSON object: "saves" were written, "skipped" were due and found nothing changed,
"lost" counts players who were not stored as promised. Exit status: 0 if nothing acknowledged was lost, 1 if
something was, 2 if the demo could not run, 130 if it was interrupted.
"""

STORE = """\
Tools for the store of a server. stats, show and export only read, and work while servers run. import and erase refuse
users whom a live server has; for an SQLite file its server must be stopped.

  cagey-sessions store stats sqlite:///players.db
  cagey-sessions store show sqlite:////var/lib/game/players.db ann
  cagey-sessions store export 'postgresql://game@db/game?schema=players' players.jsonl
  cagey-sessions store import redis://127.0.0.1:6379/0 players.jsonl

Anybody who may list processes can see a password in a URL; for PostgreSQL use PGPASSWORD or ~/.pgpass.
"""
STORE_ENDS = """\
Exit status: 0 done, 1 something was refused, left out or not found, 2 the arguments are wrong or it could not run,
130 it was interrupted.
"""
STATS = """\
Reads every user. Times are from the servers' clocks. "owned" counts the users whom a server has now; it is null for
SQLite, where one process has them all. "damaged" counts rows that no server could load; each is named, and in no other
figure.

  cagey-sessions store stats sqlite:///players.db
"""
SHOW = """\
"owner" is the server that has the user now, or null; in an SQLite file it is the process that had them last.

  cagey-sessions store show sqlite:///players.db ann
  cagey-sessions store show sqlite:///players.db 7 --int
"""
EXPORT = """\
One line for each user, in no order: {"user_id":"ann","version":3,"schema":0,"saved_at":1767225600.0,"body":{"gold":1}}
Each user is as last saved when their turn comes. FILE appears when it is complete, and is readable by its owner only.

  cagey-sessions store export sqlite:///players.db players.jsonl
  cagey-sessions store export sqlite:///players.db | gzip > players.jsonl.gz
"""
IMPORT = """\
The lines are those of export; only "user_id" and "body" are required. A file is checked as a whole before anything is
written. stdin is checked line by line: users written before a damaged line stay. Users are refused if they are in the
store already, unless --replace is given, and if a live server has them.

  cagey-sessions store import postgresql://game@db/game players.jsonl
  cagey-sessions store export sqlite:///players.db | cagey-sessions store import redis://127.0.0.1:6379/0 -
"""
ERASE = """\
A mark stays that there was a user with this id. Refused while a live server has the user: call manager.erase there, or
stop it.

  cagey-sessions store erase sqlite:///players.db ann
  cagey-sessions store erase redis://127.0.0.1:6379/0 7 --int --yes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cagey-sessions`` with these arguments, or the process's own, and return the exit status."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        sys.stdout.flush()
    except CageySessionsError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # a pager was closed, for example; without this Python would complain at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cagey-sessions", description="User sessions for stateful asyncio servers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_store(commands)
    return parser


# The demo


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="let bots play, stop and kill their server, and check for losses",
        description=DEMO,
        epilog=DEMO_ENDS,
    )
    demo.set_defaults(run=_demo)

    def option(name: str, kind: Callable[[str], object], default: str | None, metavar: str, text: str) -> None:
        demo.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    option("--bots", _whole(1, 50_000), "500", "N", "how many bots play (default: 500)")
    option("--seconds", _duration(SECOND), "20s", "TIME", "how long they play in all (default: 20s)")
    option("--interval", _duration(SHORTEST_INTERVAL), "2s", "TIME", "the longest a change is unsaved (default: 2s)")
    option("--port", _whole(0, 65_535), "0", "N", "the server's TCP port on 127.0.0.1 (default: any free one)")
    where = demo.add_mutually_exclusive_group()
    help_store = (
        "keep the players in this new SQLite file, and leave it, with what the bots were told beside it; or in the "
        "PostgreSQL or Redis of a URL, in a schema or under a prefix of their own, removed if nothing was lost "
        "(default: a temporary SQLite file, removed as well)"
    )
    where.add_argument("--store", type=_new_place, metavar="FILE|URL", help=help_store)
    help_events = (
        "use no store: the server loads, and saves in a listener of persist_user_data, to a temporary SQLite file; no "
        "save is skipped then"
    )
    where.add_argument("--events", action="store_true", help=help_events)


def _demo(arguments: argparse.Namespace) -> int:
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


# A store


def _add_store(commands: Commands) -> None:
    store = commands.add_parser(
        "store",
        help="inspect a store, export and import users, erase one",
        description=STORE,
        epilog=STORE_ENDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tools = store.add_subparsers(title="tools", metavar="TOOL", required=True)

    def tool(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str) -> argparse.ArgumentParser:
        parser = tools.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{more}",
            epilog=STORE_ENDS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=run)
        parser.add_argument("url", metavar="URL", help="the store: sqlite:///players.db, postgresql://..., redis://...")
        return parser

    def user(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("id", metavar="ID", help="the user's id: text, unless --int is given")
        parser.add_argument("--int", action="store_true", help="the id is a number: 7 and the text 7 are two users")

    tool("stats", _stats, "say how many users there are, how large and how old, as JSON", STATS)
    user(tool("show", _show, "show one user, and which server has them, as JSON", SHOW))
    export = tool("export", _export, "write all users as lines of JSON", EXPORT)
    export.add_argument("file", metavar="FILE", nargs="?", default="-", help="the file to write (default: stdout)")
    export.add_argument("--force", action="store_true", help="replace an existing FILE")
    bring = tool("import", _import, "save users from lines of JSON", IMPORT)
    bring.add_argument("file", metavar="FILE", help="the file to read; - is stdin")
    bring.add_argument("--replace", action="store_true", help="overwrite users who are in the store already")
    erase = tool("erase", _erase, "erase a user for good", ERASE)
    user(erase)
    erase.add_argument("--yes", action="store_true", help="do not ask; needed where stdin is not a terminal")


def _stats(arguments: argparse.Namespace) -> int:
    figures = tools.statistics(arguments.url, _say)
    _print_json(figures)
    return 1 if figures["damaged"] else 0


def _show(arguments: argparse.Namespace) -> int:
    user_id = _user_id(arguments)
    try:
        record, owner = tools.find(arguments.url, user_id)
    except CorruptRecordError as error:
        return _show_damaged({"user_id": user_id}, error)
    if record is None:
        has = f"; {owner} has them, and has not saved them yet" if owner else ""
        return _not_done(f"{quote(user_id)} is not stored{has}")
    fields = {
        "user_id": user_id,
        "owner": owner or None,
        "epoch": record.epoch,
        "version": record.version,
        "schema": record.schema,
        "saved_at": record.saved_at,
    }
    try:
        _print_json({**fields, "body": record.value()})
    except CorruptRecordError as error:
        return _show_damaged(fields, error)
    return 0


def _show_damaged(fields: Mapping[str, object], error: CorruptRecordError) -> int:
    _print_json({**fields, "damaged_body": error.body.decode(errors="replace")})
    return _not_done(str(error))


def _export(arguments: argparse.Namespace) -> int:
    path = None if arguments.file == "-" else Path(arguments.file)
    written, left_out = tools.export_users(arguments.url, path, _say, replace=arguments.force)
    _say(f"exported {written}, left out {left_out}")
    return 1 if left_out else 0


def _import(arguments: argparse.Namespace) -> int:
    path = None if arguments.file == "-" else Path(arguments.file)
    written, refused = tools.import_users(arguments.url, path, _say, replace=arguments.replace)
    _say(f"imported {written}, refused {refused}")
    return 1 if refused else 0


def _erase(arguments: argparse.Namespace) -> int:
    user_id = _user_id(arguments)
    try:
        if tools.find(arguments.url, user_id).record is None:
            return _not_done(f"{quote(user_id)} is not stored; nothing was erased")
    except CorruptRecordError as error:
        _say(f"cagey-sessions: {error}")
    if not arguments.yes:
        if not sys.stdin.isatty():
            return _refuse("stdin is not a terminal to ask at; add --yes")
        print(f"Erase user {quote(user_id)} for good? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return _not_done("nothing was erased")
    try:
        tools.erase(arguments.url, user_id)
    except OwnedElsewhereError as error:
        return _not_done(str(error))
    _say(f"{quote(user_id)} is erased")
    return 0


def _user_id(arguments: argparse.Namespace) -> int | str:
    text: str = arguments.id
    if not arguments.int:
        return text
    try:
        return int(text)
    except ValueError:
        raise InvalidUserIdError(f"{quote(text)} is not a number, as --int says") from None


def _print_json(value: object) -> None:
    # JSON is UTF-8, whatever the terminal is set to
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _not_done(reason: str) -> int:
    _say(f"cagey-sessions: {reason}")
    return 1


def _refuse(reason: str) -> int:
    _say(f"cagey-sessions: {reason}")
    return 2


# Arguments


def _duration(shortest: int) -> Callable[[str], float]:
    """The type of an argument that is a duration, written as in the library's own settings; in seconds."""

    def duration(text: str) -> float:
        try:
            return parse_duration(duration_of(text), "time", shortest=shortest) / SECOND
        except DurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return duration


def _whole(smallest: int, largest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def whole(text: str) -> int:
        if text.isdecimal() and smallest <= int(text) <= largest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a whole number from {smallest} to {largest}")

    return whole


def _new_place(text: str) -> str:
    """The type of an argument that is the URL of a server, or the path of a file that does not exist yet.

    An existing file may contain players that the bots do not know, and would report as faults.
    """
    if "://" in text and not text.startswith("sqlite:///"):
        try:
            engine = engine_of(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if engine not in ("postgres", "redis") or "sentinel" in text.partition(":")[0]:
            raise argparse.ArgumentTypeError("the demo keeps its players in a file, in PostgreSQL or in Redis")
        return text
    path = Path(text.removeprefix("sqlite:///"))
    if path.exists():
        raise argparse.ArgumentTypeError(f"{quote(text)} exists already; name a new file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{quote(text)} is in a folder that does not exist")
    return str(path)
