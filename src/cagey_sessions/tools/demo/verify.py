"""The independent check: reads the database by its own means, and compares it with the bots' ledgers.

It imports nothing else of this library: a fault of the library could then hide itself from the check.

The ledger of a bot has

- ``known``: pairs of a time and a state that the server has acknowledged, from the last confirmed purchase on
- ``receipt``: the state of that purchase; ``version``: its version in the store (None without a store)
- ``awaited``: the state that an unanswered request leads to, if the server has received it
- ``shown``: the known and the awaited state before each return or look around, and the state that was seen then
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

__all__ = [
    "AfterKill",
    "Ledgers",
    "Players",
    "Stored",
    "after_kill",
    "contradicted",
    "different",
    "mixed_up",
    "read_ledgers",
    "read_players",
]

State = dict[str, Any]


class Stored(NamedTuple):
    """A player in the database."""

    state: State
    version: int
    """How many times the player was saved."""


Players = Mapping[str, Stored]
Ledgers = Mapping[str, Mapping[str, Any]]


@dataclass
class AfterKill:
    """What was lost by a kill."""

    lost: set[str] = field(default_factory=set)
    """Players who miss something that was confirmed, or are in a state that they never were in."""
    older_than_allowed: int = 0
    """The number of missing changes that were acknowledged longer before the kill than allowed."""
    changes: int = 0
    """The number of all acknowledged changes that are missing."""
    oldest: float = 0.0
    """How many seconds before the kill the oldest missing change was acknowledged."""


def read_players(place: str) -> dict[str, Stored]:
    """Read all players from the database: an SQLite file, or the URL of a server with the schema or prefix in it."""
    scheme = place.partition("://")[0]
    if scheme == "sqlite":
        return _read_sqlite(place.removeprefix("sqlite:///"))
    parameters = dict(parse_qsl(urlsplit(place).query))
    url = place.partition("?")[0]
    if scheme in ("postgresql", "postgres"):
        return asyncio.run(_read_postgres(url, parameters["schema"]))
    return _read_redis(url, parameters["prefix"])


def _read_sqlite(path: str) -> dict[str, Stored]:
    """Read an SQLite file: a store's, with its column ``version``, or the listener's of the demo, with ``saves``."""
    with closing(sqlite3.connect(path)) as db:
        by_store = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'cagey_sessions'").fetchone()
        query = (
            "SELECT user_id, body, version FROM cagey_sessions WHERE body IS NOT NULL"
            if by_store
            else "SELECT user_id, body, saves FROM players"
        )
        return {user: Stored(json.loads(body), version) for user, body, version in db.execute(query)}


async def _read_postgres(url: str, schema: str) -> dict[str, Stored]:
    import asyncpg  # noqa: PLC0415 - only where it is the server

    connection = await asyncpg.connect(url)
    try:
        query = f'SELECT user_id, body::text, version FROM "{schema}".cagey_sessions WHERE body IS NOT NULL'
        return {user[1:-1]: Stored(json.loads(body), version) for user, body, version in await connection.fetch(query)}
    finally:
        await connection.close()


def _read_redis(url: str, prefix: str) -> dict[str, Stored]:
    import redis  # noqa: PLC0415 - only where it is the server

    players = {}
    with redis.Redis.from_url(url, decode_responses=True) as client:
        for key in client.scan_iter(f"{prefix}user:*", count=1000):
            body, version = client.hmget(key, "body", "version")
            if body is not None and version is not None:
                players[key.removeprefix(f"{prefix}user:")[1:-1]] = Stored(json.loads(body), int(version))
    return players


def read_ledgers(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the ledgers of all bots."""
    ledgers: dict[str, dict[str, Any]] = json.loads(Path(path).read_text())
    return ledgers


def different(players: Players, ledgers: Ledgers) -> set[str]:
    """The players who are not stored in the last state that their bot knows, nor in that of its unanswered request."""
    wrong = {
        user
        for user, ledger in ledgers.items()
        if not _is_current(players.get(user), ledger) or _breaks_receipt(players.get(user), ledger)
    }
    return wrong | (players.keys() - ledgers.keys())


def contradicted(ledgers: Ledgers) -> set[str]:
    """The players who came back or looked around, and did not see the state that they had left."""
    return {
        user
        for user, ledger in ledgers.items()
        if any(seen not in (known, awaited) for known, awaited, seen in ledger["shown"])
    }


def mixed_up(players: Players, ledgers: Ledgers) -> set[str]:
    """The players who are stored with, or have seen, another player's data; all data contains its player's name."""
    stored = {user for user, (state, _) in players.items() if state["name"] != user}
    return stored | {
        user
        for user, ledger in ledgers.items()
        if any(state["name"] != user for _, state in ledger["known"])
        or any(seen["name"] != user for _, _, seen in ledger["shown"])
    }


def after_kill(players: Players, ledgers: Ledgers, killed_at: float, allowed_age: float) -> AfterKill:
    """Compare the database with what the bots knew when the server was killed, at `killed_at` of the monotonic clock.

    A player's state has to be one that the bot was told, or that it waited for, and not older than the last confirmed
    purchase. Changes acknowledged after that may be missing only if they are younger than `allowed_age` seconds.
    """
    found = AfterKill()
    for user, ledger in ledgers.items():
        stored, known = players.get(user), ledger["known"]
        reached = -1 if stored is None else stored.state["seq"]
        told = [state for _, state in known]
        if _breaks_receipt(stored, ledger) or not (
            _is_current(stored, ledger) or (stored is not None and stored.state in told)
        ):
            found.lost.add(user)
        ages = [killed_at - at for at, state in known if state["seq"] > reached]
        found.older_than_allowed += sum(age > allowed_age for age in ages)
        found.changes += len(ages)
        found.oldest = max(found.oldest, *ages, 0.0)
    found.lost |= players.keys() - ledgers.keys()
    return found


def _is_current(stored: Stored | None, ledger: Mapping[str, Any]) -> bool:
    known = ledger["known"]
    return not known or (stored is not None and stored.state in (known[-1][1], ledger["awaited"]))


def _breaks_receipt(stored: Stored | None, ledger: Mapping[str, Any]) -> bool:
    """Whether neither the confirmed version nor a later one is stored, or that version has another state."""
    receipt: State | None = ledger["receipt"]
    version: int | None = ledger["version"]
    if receipt is None:
        return False
    if stored is None or stored.state["seq"] < receipt["seq"]:
        return True
    if version is None:
        return False
    return stored.version < version or (stored.version == version) != (stored.state == receipt)
