"""Where user data is kept. What lives here: the contract between the library and a store, the stores that come with
the library, and the link by which a manager calls its store. What must not: when a user is saved or claimed, because a
store is also used without a manager, by tools and tests.

A store's module, and with it the driver of an engine, is imported when the store is first named.
"""

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
"""The module of each store. It is imported when the store is first named, because it imports the store's driver."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    store: object = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    return store


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
