"""The independent reader. What lives here: reading the database by its own means and the bots' ledgers as JSON, and
comparing them. What must not: an import of anything else of this package; it would then believe what it is to check.

A ledger of one bot holds ``known``, pairs of a time and a state the server acknowledged, from the last confirmed
purchase on; ``receipt``, the state of that purchase, and ``version``, the number the store gave it (None without a
store); ``awaited``, the state that an unanswered request leads to if the server has heard it; ``shown``, the known and
the awaited state before each return or look around, and the one seen then.
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
    """How many times they have been saved."""


Players = Mapping[str, Stored]
Ledgers = Mapping[str, Mapping[str, Any]]


@dataclass
class AfterKill:
    """What a kill took."""

    lost: set[str] = field(default_factory=set)
    """Players of whom something is missing that was confirmed, or who are in a state they never were in."""
    older_than_allowed: int = 0
    """Acknowledged changes that had been made longer before the kill than allowed, and are missing."""
    changes: int = 0
    """Acknowledged changes that are missing, all of them."""
    oldest: float = 0.0
    """How long before the kill the oldest missing change was acknowledged, in seconds."""


def read_players(place: str) -> dict[str, Stored]:
    """Every player in the database: an SQLite file, or the URL of a server with the schema or prefix in it."""
    scheme = place.partition("://")[0]
    if scheme == "sqlite":
        return _read_sqlite(place.removeprefix("sqlite:///"))
    parameters = dict(parse_qsl(urlsplit(place).query))
    url = place.partition("?")[0]
    if scheme in ("postgresql", "postgres"):
        return asyncio.run(_read_postgres(url, parameters["schema"]))
    return _read_redis(url, parameters["prefix"])


def _read_sqlite(path: str) -> dict[str, Stored]:
    """A store counts saves in ``version``, the listener of the demo in ``saves``."""
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
    """What every bot knows."""
    ledgers: dict[str, dict[str, Any]] = json.loads(Path(path).read_text())
    return ledgers


def different(players: Players, ledgers: Ledgers) -> set[str]:
    """Who is not stored in the very last state their bot knows; that of an unanswered request will do as well."""
    wrong = {
        user
        for user, ledger in ledgers.items()
        if not _is_current(players.get(user), ledger) or _breaks_receipt(players.get(user), ledger)
    }
    return wrong | (players.keys() - ledgers.keys())


def contradicted(ledgers: Ledgers) -> set[str]:
    """Who came back or looked around, and was not shown the state they had left."""
    return {
        user
        for user, ledger in ledgers.items()
        if any(seen not in (known, awaited) for known, awaited, seen in ledger["shown"])
    }


def mixed_up(players: Players, ledgers: Ledgers) -> set[str]:
    """Who is stored with the data of somebody else, or was shown it. All data says whose it is."""
    stored = {user for user, (state, _) in players.items() if state["name"] != user}
    return stored | {
        user
        for user, ledger in ledgers.items()
        if any(state["name"] != user for _, state in ledger["known"])
        or any(seen["name"] != user for _, _, seen in ledger["shown"])
    }


def after_kill(players: Players, ledgers: Ledgers, killed_at: float, allowed_age: float) -> AfterKill:
    """Compare with what the bots knew when the server was killed, `killed_at` being of the monotonic clock.

    A player's state must be one that the bot was told, or the one it was waiting for, and not older than the last
    confirmed purchase. Of what was acknowledged later, only what is younger than `allowed_age` seconds may be missing.
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
    """Whether the confirmed version is not there, nor a later one, or stands for something else than was confirmed."""
    receipt: State | None = ledger["receipt"]
    version: int | None = ledger["version"]
    if receipt is None:
        return False
    if stored is None or stored.state["seq"] < receipt["seq"]:
        return True
    if version is None:
        return False
    return stored.version < version or (stored.version == version) != (stored.state == receipt)
