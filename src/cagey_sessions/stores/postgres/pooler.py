"""Poolers in front of PostgreSQL, such as PgBouncer, which may run each transaction in another session of the server.

Settings and prepared statements belong to a session, so a connection through such a pooler may find neither. This
module detects a pooler, refuses a pool of the program's whose prepared statements would get mixed up, and sends
statements in a form that needs no session.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from ...errors import OptionError
from .driver import asyncpg

__all__ = ["SHARED_STATEMENTS", "Unattached", "driver_of", "is_pooled", "refuse_shared_statements"]

T = TypeVar("T")

LOOKS = 5
"""How often it is tried whether two clients get the same session; other clients of the pooler may hide it once."""
SHARED_STATEMENTS = (
    "a pooler gives each transaction another session of PostgreSQL, and asyncpg looks for statements where it has not "
    "prepared them: make the pool with statement_cache_size=0, or give the store a DSN"
)


class Unattached:
    """A connection whose statements may each run in a different session of the server.

    Each statement is sent in a transaction of its own, which begins with the `settings` that a session would have.
    """

    def __init__(self, driver: Any, settings: dict[str, str]) -> None:
        self.driver = driver
        self._settings = "; ".join(f"SET LOCAL {name} = {value}" for name, value in settings.items())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    async def execute(self, query: str, *arguments: Any) -> Any:
        return await self._send(self.driver.execute, query, arguments)

    async def fetch(self, query: str, *arguments: Any) -> Any:
        return await self._send(self.driver.fetch, query, arguments)

    async def fetchrow(self, query: str, *arguments: Any) -> Any:
        return await self._send(self.driver.fetchrow, query, arguments)

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        return await self._send(self.driver.fetchval, query, arguments)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        async with self.driver.transaction(isolation="read_committed"):
            await self.driver.execute(self._settings)
            yield

    async def _send(self, send: Callable[..., Coroutine[Any, Any, T]], query: str, arguments: tuple[Any, ...]) -> T:
        if self.driver.is_in_transaction():
            return await send(query, *arguments)
        await self.driver.execute(f"BEGIN ISOLATION LEVEL READ COMMITTED; {self._settings}")
        try:
            result = await send(query, *arguments)
        except asyncpg.PostgresError:
            if not self.driver.is_closed():
                await self.driver.execute("ROLLBACK")
            raise  # after any other error the connection is not used again, and need not be rolled back
        await self.driver.execute("COMMIT")
        return result


def driver_of(connection: Any) -> Any:
    """The driver's own connection, to give to functions of the program."""
    return connection.driver if isinstance(connection, Unattached) else connection


async def is_pooled(connection: Any) -> bool:
    """Whether a connection leads to a pooler: the process id that it was told is not that of the server's process.

    To be called in a transaction, or on a connection without a statement cache: the query itself must not be prepared
    in a session that another client may get.
    """
    return bool(connection.get_server_pid() != await connection.fetchval("SELECT pg_backend_pid()"))


async def refuse_shared_statements(pool: Any, connection: Any) -> None:
    """Raise `OptionError` for a pool that keeps prepared statements, if those of several clients share a session.

    The driver numbers its statements, so a client would find another client's statement under the name of its own. A
    pooler that keeps them apart, as PgBouncer does with ``max_prepared_statements``, gives them names of its own, by
    which it is recognized here.
    """
    mark = secrets.token_hex(8)
    try:
        async with connection.transaction():
            if not await is_pooled(connection):
                return
            found = await connection.fetch(f"SELECT name FROM pg_prepared_statements WHERE statement LIKE '%{mark}%'")
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
        raise OptionError(SHARED_STATEMENTS) from None
    if not any(row["name"].startswith("__asyncpg") for row in found):
        return
    if pool.get_max_size() == 1:
        raise OptionError(
            "a pooler is in front of PostgreSQL, and through a pool of one connection it cannot be seen whether each "
            "transaction gets another session: make the pool larger, or with statement_cache_size=0"
        )
    async with pool.acquire() as other:
        if await _is_shared(connection, other, mark):
            raise OptionError(SHARED_STATEMENTS)


async def _is_shared(connection: Any, other: Any, mark: str) -> bool:
    """Whether another client gets the session of this one, or this client does not keep its session."""
    # `execute` sends a statement without arguments as it is, without preparing it
    has_mark = f"SELECT FROM current_setting('cagey_sessions.mark', true) AS mark WHERE mark = '{mark}'"
    for _ in range(LOOKS):
        await connection.execute(f"SET cagey_sessions.mark = '{mark}'")
        if await other.execute(has_mark) == "SELECT 1" or await connection.execute(has_mark) == "SELECT 0":
            return True
    return False
