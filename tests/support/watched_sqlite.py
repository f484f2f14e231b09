"""Looking into the file of a `SQLiteStore`, its connections and its processes. What must not be here: tests."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cagey_sessions.stores import SQLiteStore
from cagey_sessions.testing.conformance.base import SAVED
from cagey_sessions.testing.store_conformance import record, save

connect_really = sqlite3.connect


class Watched(sqlite3.Connection):
    """The writer's connection: what it is told is written down, and what `fail` names fails."""

    fail = ""

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if self.fail and sql.startswith(self.fail):
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *args)


class Writer:
    """The connections that a store has made so far, and the statements they have begun."""

    def __init__(self) -> None:
        self.connections: list[Watched] = []
        self.statements: list[str] = []
        self.at: dict[str, Callable[[], None]] = {}

    @property
    def connection(self) -> Watched:
        return self.connections[-1]

    def connect(self, *args: Any, **options: Any) -> Watched:
        made = connect_really(*args, factory=Watched, **options)
        made.set_trace_callback(self.note)
        self.connections.append(made)
        return made

    def note(self, statement: str) -> None:
        self.statements.append(statement)
        for start, what in self.at.items():
            if statement.startswith(start):
                what()


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect_really(f"file:{path}?mode=ro", uri=True)) as connection:
        yield connection


@contextmanager
def blocking(path: Path) -> Iterator[Callable[[], None]]:
    """Another program that is in the middle of writing to the file, until the function given is called."""
    with closing(connect_really(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield lambda: connection.execute("ROLLBACK") and None


async def saved(store: SQLiteStore, *users: int | str, body: bytes = b"{}") -> dict[int | str, int]:
    """Claim and save users; their epochs."""
    epochs = {each.user_id: each.epoch for each in await store.claim_many(users, "a")}
    assert set(await save(store, *(record(each, epoch=epochs[each], body=body) for each in users))) == {SAVED}
    return epochs
