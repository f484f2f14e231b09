"""The stores, and a store of one's own. Read by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, assert_type

from cagey_sessions import Clock, SessionManager, Snapshot, StoreError, read_snapshot
from cagey_sessions.stores import (
    CallbackStore,
    Claim,
    MemoryStore,
    PostgresStore,
    PostgresTable,
    Record,
    RedisStore,
    SQLiteStore,
    Store,
    Verdict,
    open_store,
)
from cagey_sessions.testing import World, world


async def load(user_id: int | str) -> dict[str, int] | None:
    return {"gold": 0}


async def save_many(records: list[Record]) -> list[bool]:
    return [True for record in records]


async def save_wrongly(record: Record) -> None: ...


stores: list[Store] = [
    MemoryStore(),
    SQLiteStore("players.db"),
    SQLiteStore(Path("players.db")),
    CallbackStore(load, save_many),
    PostgresStore("postgresql:///players"),
    RedisStore("redis:///0"),
]
assert_type(open_store("sqlite:///players.db"), Store)
SQLiteStore("players.db", synchronous="NORMAL")
SQLiteStore("players.db", synchronous="normal")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PostgresTable("postgresql:///players", "players", body="data", fence="none")
PostgresTable("postgresql:///players", "players", body="data", fence="columns")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SQLiteStore(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
CallbackStore(load)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
CallbackStore(load, save_wrongly)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def contract(store: Store, table: PostgresTable) -> None:
    of_its_own: Store = table
    claims: Sequence[Claim | StoreError] = await store.claim_many(["bob"], "me")
    verdicts: Sequence[Verdict] = await store.save_many([])
    record: Record | None = await store.load("bob")
    assert_type(await store.erase("bob"), bool)
    assert_type(store.fenced, bool)
    assert_type(store.loss_class, str)
    del of_its_own, claims, verdicts, record


def snapshots() -> None:
    assert_type(read_snapshot("players.spill"), Snapshot)
    assert_type(read_snapshot("players.spill").kind, Literal["snapshot", "spill"])
    read_snapshot(b"players.spill")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def make_manager(store: Store, clock: Clock) -> SessionManager[dict[str, Any]]:
    return SessionManager(store=store, clock=clock)


def worlds() -> None:
    with world(make_manager, seed=7) as here:
        assert_type(here, World)
        session = here.open("bob", default={}, when_active="replace")
        here.open("bob", defaults={})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        here.stop(deadlines="3s")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        here.advance("31s")
        assert_type(here.run(session.wait_ended()), str)  # type: ignore[assert-type]  # pyright: ignore[reportAssertTypeFailure]
        here.run(session.wait_ended)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        here.advance({})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    world(SessionManager[Any](), seed=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
