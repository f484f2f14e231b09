"""The part that both stores in PostgreSQL share: connections, calls and their deadlines, leases, and errors.

A server that has users renews its *lease*, by the clock of PostgreSQL. That a lease has expired does not make its owner
dead: after an outage of the database the leases of all servers have expired. A claim of such a user first puts the
owner in *doubt*, for a third of a lease. Only an owner that has not renewed its lease by then is dead, and a later
claim is granted. An owner without any lease is put in doubt, too.

A statement is repeated only if PostgreSQL says that it was rolled back. A call whose outcome is unknown is not: the
caller decides what to do.

The statements about users are in `store.py` and in `fences.py`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from ...errors import (
    CageySessionsError,
    OptionError,
    StoreContractError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
)
from ...options import SECOND, Duration, is_text, lacks, parse_duration, yes_or_no
from ...wording import kind_name, quote
from ..connections import Connections
from ..contract import Outcome, Record, Store, Verdict
from ..layouts import check_layout
from ..leases import Leases
from ..reasons import SettingsError, reason_of, without_names
from ..rows import StoredRow, verdict_of_damage
from .driver import asyncpg
from .pooler import SHARED_STATEMENTS, Unattached, is_pooled, refuse_shared_statements
from .settings import settings_fault

__all__ = [
    "BY_KEY",
    "DOUBT",
    "NODES",
    "SCHEMA",
    "PostgresEngine",
    "asyncpg",
    "check_name",
    "is_of_call",
    "quoted",
    "verdict_on",
]

T = TypeVar("T")

OLDEST = 15
LONGEST_NAME = 63
"""In bytes; PostgreSQL cuts longer names off without an error."""
CONNECTIONS = 6
"""One for each batch in flight, of which there are 4 by default, and two for logins."""
LONGEST_WAIT = 2.0
"""How many seconds a statement waits for a row that another program has locked. It is shorter than the timeout of a
call, so that such a row fails by itself, and does not make the store count as down."""
ANY_NUMBER = 1 << 30
"""The limit of connections if the program gave a pool: that has a limit of its own."""
ATTEMPTS = 5
"""How often a statement is tried that PostgreSQL rolls back and says may be repeated."""

# The planner is not to see what else is asked of a row that was found by its key. It takes the rows of an owner for
# none, because a server has another owner id at each start, and PostgreSQL has no statistics of that one yet; then it
# reads the whole table for every batch, and compares each of its rows with each of the batch. In a CASE that names the
# batch the conditions belong to the join.
BY_KEY = "CASE WHEN batch.user_id IS NOT NULL THEN "

SCHEMA = "CREATE SCHEMA IF NOT EXISTS {schema}"
NODES = """CREATE TABLE IF NOT EXISTS {nodes} (
    owner text COLLATE "C" PRIMARY KEY,
    alive_until timestamptz NOT NULL,
    doubted boolean NOT NULL
)"""
MAY_USE = """SELECT bool_and(has_table_privilege(to_regclass($1), privilege))
    FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privileges (privilege)"""
RENEW = """INSERT INTO {nodes} VALUES ($1, clock_timestamp() + $2, false)
    ON CONFLICT (owner) DO UPDATE SET alive_until = excluded.alive_until, doubted = false"""
DOUBT = """INSERT INTO {nodes} AS nodes
    SELECT owner, clock_timestamp() + $2, true FROM unnest($1::text[]) AS doubted (owner) ORDER BY owner
    ON CONFLICT (owner) DO UPDATE SET alive_until = excluded.alive_until, doubted = true
        WHERE NOT nodes.doubted AND nodes.alive_until < clock_timestamp()"""
END_LEASES = """UPDATE {nodes} SET alive_until = clock_timestamp() - interval '1 s', doubted = true
    WHERE owner = ANY ($1::text[])"""
# When this text changes, acknowledged saves may be lost. A promoted replica begins a new timeline, which is in the name
# of the WAL file. A crash loses the last commits if they are not synchronous, and all of an unlogged table; it shows in
# the start time of the server, and in that of the statistics, which a crash resets even if only one backend died.
INCARNATION = """SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8) || CASE
        WHEN $1::boolean OR current_setting('synchronous_commit') = 'off' OR current_setting('fsync') = 'off'
        THEN pg_postmaster_start_time()::text || coalesce((SELECT stats_reset::text FROM pg_stat_bgwriter), '')
        ELSE '' END"""
FORGET_NODES = "DELETE FROM {nodes} WHERE alive_until < clock_timestamp() - interval '7 days'"


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def check_name(what: str, name: object) -> str:
    """Check a name for PostgreSQL, and return it; raises `OptionError` for one that is empty or too long."""
    if not is_text(name) or not 0 < len(name.encode()) <= LONGEST_NAME:
        raise OptionError(f"{what} is a name of at most {LONGEST_NAME} bytes, not {quote(name)}")
    return name


class PostgresEngine(Store):
    """The base of the stores in PostgreSQL."""

    uses_leases = True
    """Whether other servers may use the same users, so that owners need leases."""

    def __init__(
        self, dsn: str | None, pool: Any, schema: str, create: bool, timeout: Duration, lease: Duration
    ) -> None:
        if dsn is not None and not (is_text(dsn) and dsn.startswith(("postgresql://", "postgres://"))):
            raise OptionError("a DSN is a text that begins with postgresql://")
        if pool is not None and lacks(pool, ("acquire", "release")):
            raise OptionError(f"pool is an asyncpg.Pool, not {kind_name(pool)}")
        self._dsn = dsn
        self._given = pool
        self._schema = check_name("schema", schema)
        self._creates = yes_or_no("create", create)
        self._timeout = parse_duration(timeout, "timeout", shortest=SECOND // 10) / SECOND
        self._lease = parse_duration(lease, "lease", shortest=SECOND) / SECOND
        if self._lease < self._timeout:
            raise OptionError(f"lease is at least timeout ({self._timeout:g} s): else it runs out during a claim")
        self._names = {"nodes": f"{quoted(schema)}.cagey_sessions_nodes"}
        """What to put into statements for the names in braces."""
        self._statements: dict[str, str] = {}
        self._is_unlogged = False
        self._connections: Connections[Any] | None = None
        self._state = "closed"
        self._leases = Leases(self.name, self._lease, self._send_renewal)
        self._lease_connection: Any = None
        """A connection for leases alone, so that a renewal waits behind no save; unused if the program gave a pool."""
        self._is_pooled = False
        """Whether the DSN leads to a pooler, which may run each transaction in another session of the server."""

    def _sql(self, statement: str) -> str:
        """A statement with our names put in."""
        text = self._statements.get(statement)
        if text is None:
            text = self._statements[statement] = statement.format(**self._names)
        return text

    # Opening and closing

    async def open(self) -> None:
        if self._state != "closed":
            raise StoreContractError(f"this {self.name} is open already; make one for each manager")
        self._state = "opening"  # `close` during the open changes it, which is checked below
        self._leases = Leases(self.name, self._lease, self._send_renewal)
        pool = self._given
        kind: Callable[..., Connections[Any]] = Connections if pool is None else partial(_OfPool, pool)
        connections = kind(
            self.name,
            most=CONNECTIONS if pool is None else ANY_NUMBER,
            timeout=self._timeout,
            connect=self._connect if pool is None else partial(pool.acquire, timeout=self._timeout),
            is_live=_is_live,
            cut=_cut,
            finish=_finish,
        )
        try:
            # first, because it decides how all other connections are made
            if pool is None:
                self._is_pooled = await self._find_pooler()
            await connections.run(self._set_up)
            if self._state != "opening":
                raise StoreUnavailableError(f"this {self.name} was closed while it was opened")
        except BaseException as error:
            self._state = "closed"
            await connections.close()
            if isinstance(error, SettingsError):  # at the start the program is to learn of it; later it is an outage
                raise OptionError(str(error)) from None
            raise _explained(error) from None
        self._connections = connections
        self._state = "open"

    async def _find_pooler(self) -> bool:
        """Whether a pooler is in front of the server; asked on a connection of its own, without prepared statements."""
        connection = await self._dial("cagey-sessions", {}, statement_cache_size=0)
        try:
            async with asyncio.timeout(self._timeout):
                found = await is_pooled(connection)
                await connection.close()
        finally:
            connection.terminate()
        return found

    async def _connect(self, name: str = "cagey-sessions") -> Any:
        """A new connection for statements about users; `name` is shown by PostgreSQL in its list of sessions."""
        limits = {
            "lock_timeout": str(int(LONGEST_WAIT * 1000)),
            "statement_timeout": str(int(self._timeout * 1000)),
        }
        if self._is_pooled:  # a pooler refuses settings at the start of a connection, or drops them later
            return Unattached(await self._dial(name, {}, statement_cache_size=0), limits)
        return await self._dial(name, {"default_transaction_isolation": "read committed", **limits})

    async def _dial(self, name: str, settings: dict[str, str], **options: Any) -> Any:
        """A new connection. Raises `SettingsError` if it cannot even be tried, otherwise the driver's errors."""
        settings = {"application_name": name, **settings}
        try:
            timeout: Any = self._timeout  # asyncpg has no annotation there, and its default is an int
            return await asyncpg.connect(self._dsn, timeout=timeout, server_settings=settings, **options)
        except asyncpg.ProtocolViolationError as error:
            raise OptionError(
                f"a pooler in front of PostgreSQL refuses what the DSN sets ({error.args[0]}); leave that out of it"
            ) from None
        except (OSError, ValueError, asyncpg.InterfaceError) as error:
            if fault := settings_fault(self._dsn or "", error):
                raise SettingsError(fault) from None
            raise
        except asyncpg.PostgresError as error:
            raise _refused(error) from None

    async def _set_up(self, connection: Any) -> None:
        """Check the server, and prepare what the store needs in it."""
        async with asyncio.timeout(self._timeout):
            if self._given is not None:
                await refuse_shared_statements(self._given, connection)
            await self._check_server(connection)
            await self._prepare(connection)
            if self.uses_leases:
                await connection.execute(self._sql(FORGET_NODES))

    async def _check_server(self, connection: Any) -> None:
        """Refuse a server that is too old, read-only, or set to another encoding or isolation than the stores need.

        With REPEATABLE READ an update of a row that another statement has just changed would fail, not wait.
        """
        if connection.get_server_version().major < OLDEST:
            raise StoreUnavailableError(f"PostgreSQL {OLDEST} or newer is needed")
        encoding = await connection.fetchval("SHOW server_encoding")
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise StoreLayoutError(f"the encoding of this database is {encoding}; UTF8 is needed")
        if await connection.fetchval("SHOW default_transaction_isolation") != "read committed":
            raise OptionError("the connections of this pool are set to another isolation than READ COMMITTED")
        if await connection.fetchval("SHOW transaction_read_only") == "on":
            raise StoreUnavailableError("this PostgreSQL takes no writes: it is a standby, or set to read only")

    @abstractmethod
    async def _prepare(self, connection: Any) -> None:
        """Check the tables, create missing ones, and set `loss_class`."""

    async def _make(self, connection: Any, name: str, statements: Sequence[str]) -> None:
        """Run statements that create a table of ours, unless it exists. Raises `StoreLayoutError` if it may not."""
        async with connection.transaction():
            # several servers may open the store at once, and CREATE TABLE IF NOT EXISTS may fail then
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('cagey-sessions'))")
            if await connection.fetchval("SELECT to_regclass($1)", name) is not None:
                return
            if not self._creates:
                raise StoreLayoutError(
                    f"there is no table {name}; make it with the statements of `ddl()`, or leave out create=False"
                )
            try:
                if await connection.fetchval("SELECT to_regnamespace($1)", quoted(self._schema)) is None:
                    await connection.execute(f"CREATE SCHEMA {quoted(self._schema)}")
                for statement in statements:
                    await connection.execute(statement)
            except asyncpg.InsufficientPrivilegeError as error:
                raise StoreLayoutError(
                    f"there is no table {name}, and this user may not make it ({error.args[0]}); have it made with the "
                    "statements of `ddl()`"
                ) from None

    async def _check_ours(self, connection: Any, name: str, layout: int, of: str = "") -> None:
        """Raise `StoreLayoutError` for a table that is not ours, is of a newer version, or may not be used.

        `of` is the table that it is a side table of.
        """
        comment = await connection.fetchval("SELECT obj_description($1::regclass, 'pg_class')", name)
        mark, _, found = (comment or "").partition(", layout ")
        found, _, whose = found.partition(", of ")
        check_layout(name, mark, found, kind="table", known=layout, setting="schema")
        if whose != of:
            raise StoreLayoutError(
                f"{name} belongs to {whose or 'no other table'}, not to {of}. Give it another schema="
            )
        await self._check_may_use(connection, name)  # now, and not at the first save

    async def _check_may_use(self, connection: Any, name: str) -> None:
        """Raise `StoreLayoutError` unless this database user may read and write a table."""
        if not await connection.fetchval(MAY_USE, name):
            raise StoreLayoutError(f"this user may not read and write {name}, or it is not there")

    async def _loss_class(self, connection: Any, *tables: str) -> str:
        """What a crash may lose of what was committed to some tables, by the settings of the server."""
        names = ("synchronous_commit", "synchronous_standby_names", "fsync")
        synchronous, standbys, fsync = [await connection.fetchval(f"SHOW {name}") for name in names]
        kinds = await connection.fetch(
            "SELECT relpersistence::text FROM pg_class WHERE oid = ANY ($1::text[]::regclass[])", tables
        )
        what = f"synchronous_commit={synchronous}, synchronous_standby_names={standbys!r}, fsync={fsync}"
        self._is_unlogged = any(kind[0] != "p" for kind in kinds)
        if self._is_unlogged:
            return f"{what}, an unlogged table: everything is lost when the server dies"
        if fsync == "off":
            return f"{what}: a crash of the machine may damage everything"
        if synchronous == "off":
            return f"{what}: the last transactions are lost when the server dies"
        lost = "" if standbys else "; a failover loses what had not reached the replica"
        return f"{what}: nothing acknowledged is lost when the server or its machine dies{lost}"

    async def close(self) -> None:
        self._state = "closed"
        connections = self._connections
        if connections is None:
            return
        try:
            await self._leases.end()
            if self._leases.owners:
                # If a user was not released, other servers need not wait for the lease to run out.
                with suppress(Exception):
                    async with asyncio.timeout(self._timeout):
                        await connections.run(
                            lambda connection: connection.execute(self._sql(END_LEASES), self._leases.owners)
                        )
        finally:
            self._connections = None
            self._drop_lease_connection()
            await connections.close()

    # Calls

    def abort(self, call: asyncio.Task[Any]) -> None:
        """Close the connection of a call. The outcome of its statement is unknown."""
        if self._connections is not None:
            self._connections.abort(call)

    async def _run(self, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Await `work(connection)`, repeat it if PostgreSQL rolled it back, and raise errors of the store."""
        attempt = 0
        while True:
            attempt += 1
            if self._connections is None:
                raise StoreUnavailableError(f"this {self.name} is not open")
            try:
                return await self._connections.run(partial(_run_or_cut, work))
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as error:
                if attempt == ATTEMPTS:
                    raise StoreUnavailableError(f"PostgreSQL: {error.args[0]}") from None
            except Exception as error:
                raise _explained(error) from None

    # Leases

    async def _send_renewal(self, owner: str) -> None:
        """Renew the lease of an owner, on the connection that is for that alone, or on the program's pool."""
        renewal = self._sql(RENEW), owner, timedelta(seconds=self._lease)
        if self._connections is None:
            raise StoreUnavailableError(f"this {self.name} is not open")
        try:
            if self._given is not None:
                await self._connections.run(partial(_run_or_cut, partial(self._renew, renewal)))
                return
            if self._lease_connection is None or self._lease_connection.is_closed():
                self._lease_connection = await self._connect("cagey-sessions lease")
                if self._connections is None:
                    raise StoreUnavailableError(f"this {self.name} was closed meanwhile")
            await _run_or_cut(partial(self._renew, renewal), self._lease_connection)
        except BaseException as error:
            self._drop_lease_connection()
            raise _explained(error) from None

    async def _renew(self, renewal: tuple[Any, ...], connection: Any) -> None:
        await connection.execute(*renewal)
        before = self.incarnation
        # read with each renewal, and so soon after a failover
        with suppress(asyncpg.PostgresError):  # some hosted servers have no such functions
            self.incarnation: str = await connection.fetchval(INCARNATION, self._is_unlogged)
        if before not in ("", self.incarnation):
            # Open connections may lead to the old primary. It may still accept writes, which would be lost.
            if self._connections is not None:
                self._connections.cut_all()
            if self._given is not None:
                await self._given.expire_connections()

    def _drop_lease_connection(self) -> None:
        connection, self._lease_connection = self._lease_connection, None
        if connection is not None:
            connection.terminate()

    async def _doubt(self, connection: Any, owners: set[str]) -> None:
        """Put owners in doubt whose lease has expired or is missing: they have a third of a lease to renew it."""
        if owners:
            await connection.execute(self._sql(DOUBT), list(owners), timedelta(seconds=self._lease / 3))


class _OfPool(Connections[Any]):
    """The connections of a pool that the program gave: taken from it for each call, and given back."""

    def __init__(self, pool: Any, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._pool = pool

    async def _give(self, connection: Any) -> None:
        await self._pool.release(connection)


async def _run_or_cut(work: Callable[[Any], Coroutine[Any, Any, T]], connection: Any) -> T:
    """Await `work(connection)`; after an error by which the connection is of no more use, close it."""
    try:
        return await work(connection)
    except (asyncpg.ReadOnlySQLTransactionError, asyncpg.InternalClientError):
        _cut(connection)  # its server has become a standby, or it is broken; a new one may reach the primary
        raise
    except AttributeError:
        if not connection.is_closed():
            raise  # then it is a fault of ours, and not to be hidden
        # It was cut between two messages of a call, and the driver uses an attribute that it has already dropped.
        raise asyncpg.InterfaceError("the connection was closed during the call") from None


def _is_live(connection: Any) -> bool:
    return not connection.is_closed() and not connection.is_in_transaction()


def _cut(connection: Any) -> None:
    # Without a request to cancel the statement: that could end its wait for a synchronous standby. The row would be
    # there, a repeated save would be "already", and the standby might not have it.
    connection.terminate()


async def _finish(connection: Any) -> None:
    await connection.close()


_UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # raised if the server ends a connection while something is being sent
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.QueryCanceledError,
)


def is_of_call(error: Exception) -> bool:
    """Whether an error is about the connection or the server, and not about the rows of a statement."""
    return isinstance(error, (*_UNREACHABLE, asyncpg.SerializationError, asyncpg.DeadlockDetectedError))


def _explained(error: BaseException) -> BaseException:
    """An error of the driver as an error of the store.

    The driver's own error is not passed on, also not as a cause: its details quote rows, and what it says about a
    connection quotes the DSN.
    """
    if isinstance(error, (CageySessionsError, asyncio.CancelledError)):
        return error
    if isinstance(error, SettingsError):
        return StoreUnavailableError(str(error))
    name, text = type(error).__name__, str(error.args[0]) if error.args else ""
    if isinstance(error, (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)):
        return _refused(error)
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return StoreLayoutError(f"PostgreSQL: {text}")
    if isinstance(error, (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError)):
        return StoreError(f"PostgreSQL: {text}; {SHARED_STATEMENTS}")
    if isinstance(error, (OSError, TimeoutError)):
        reason = "it does no TLS" if "rejected SSL upgrade" in text else reason_of(error)
        return StoreUnavailableError(f"PostgreSQL cannot be reached ({f'{name}: {reason}'.rstrip(': ')})")
    if isinstance(error, _UNREACHABLE):
        return StoreUnavailableError(f"PostgreSQL cannot be reached ({name}: {without_names(text)})")
    if isinstance(error, asyncpg.PostgresError):
        return StoreError(f"PostgreSQL: {text} ({name})")
    return error


def _refused(error: asyncpg.PostgresError) -> StoreUnavailableError | SettingsError:
    """The error for a server that refuses a new connection."""
    text = without_names(str(error.args[0]))
    if isinstance(error, (asyncpg.UndefinedObjectError, asyncpg.InvalidParameterValueError)):
        return SettingsError(
            f"PostgreSQL refuses a setting of the connection: {text}. A parameter of the DSN that is neither the "
            "store's nor the driver's goes to the server as a setting"
        )
    if isinstance(error, (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)):
        text += "; check the user, password and database"
    return StoreUnavailableError(f"PostgreSQL refuses the connection: {text}")


def verdict_on(record: Record, row: Any) -> Verdict:
    """The verdict on a record that was not written, by the row of its user; None if there is no row."""
    if row is None:
        return Verdict(Outcome.MISSING)
    kept = StoredRow(row["epoch"], row["owner"], row["released"], row["version"], 0, None, None, row["erased"])
    if fault := kept.fence_fault():
        return verdict_of_damage(fault)
    if row["erased"]:
        return Verdict(Outcome.ERASED)
    if (row["epoch"], row["owner"]) != (record.epoch, record.owner):
        return Verdict(Outcome.FENCED)
    if record.version <= row["version"]:
        return Verdict(Outcome.ALREADY)
    if row["released"]:
        return Verdict(Outcome.FENCED)
    return Verdict(Outcome.FAILED, "the row was changed at the same moment")
