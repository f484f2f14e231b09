"""Where user data is kept. What lives here: the names of the stores. What must not: any of their code."""

from importlib import import_module
from typing import TYPE_CHECKING

from .contract import MAX_NUMBER, Claim, Outcome, Record, Store, Verdict
from .rows import StoredRow

if TYPE_CHECKING:
    from .callback import CallbackStore
    from .memory import MemoryStore
    from .postgres.own_table import PostgresTable
    from .postgres.store import PostgresStore
    from .redis.store import RedisStore
    from .sqlite.store import SQLiteStore
    from .urls import open_store

__all__ = [
    "MAX_NUMBER",
    "CallbackStore",
    "Claim",
    "MemoryStore",
    "Outcome",
    "PostgresStore",
    "PostgresTable",
    "Record",
    "RedisStore",
    "SQLiteStore",
    "Store",
    "StoredRow",
    "Verdict",
    "open_store",
]

_LAZY = {
    "CallbackStore": "callback",
    "MemoryStore": "memory",
    "PostgresStore": "postgres.store",
    "PostgresTable": "postgres.own_table",
    "RedisStore": "redis.store",
    "SQLiteStore": "sqlite.store",
    "open_store": "urls",
}
"""The stores, by module; each is imported when it is first named, and its driver with it."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    store: object = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    return store


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
