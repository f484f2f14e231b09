"""Users in PostgreSQL. What lives here: the statements, the leases of nodes, and what each error of the driver means.
What must not: SQL that is put together from values, and any retry of a call whose outcome is unknown.

Everything a batch needs is one statement over arrays (``unnest``), with the fence in its WHERE: a row changes only
under the epoch and the owner it was claimed with. The few rows that were not written are looked at by a second one.

Several servers share the table, and a node that has users renews its *lease*, by the clock of PostgreSQL. An expired
lease alone takes no users from anybody: after an outage all of them have expired. Whoever asks for such a user first
puts the owner in *doubt*, for a third of a lease; only an owner that has not renewed by then is dead. One whose lease
is not there at all is put in doubt, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import Context
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import (
    CageySessionsError,
    MissingExtraError,
    OptionError,
    OwnedElsewhereError,
    StoreContractError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
    WrongLoopError,
)
from ..options import SECOND, Duration, parse_duration
from .base import Claim, Outcome, Record, Store, Verdict, latest_of, text_of

try:
    import asyncpg
except ImportError as error:
    raise MissingExtraError(
        'PostgresStore needs asyncpg: pip install "cagey-sessions[postgres]"', extra="postgres"
    ) from error

__all__ = ["PostgresStore"]

T = TypeVar("T")

_log = logging.getLogger("cagey_sessions")

LAYOUT = 1
"""The number of the layout below, kept in the comment of the table."""
OLDEST = 15
LONGEST_NAME = 63
"""Bytes; PostgreSQL cuts off what is longer."""
CONNECTIONS = 6
"""As many as batches are in flight, and two for logins."""
ROWS_IN_A_SCAN = 100
LONGEST_WAIT = 2.0
"""Seconds for a row that somebody has locked; then it is the row that fails, and not the server."""
ATTEMPTS = 5
"""Of a statement that PostgreSQL has rolled back and says may be repeated."""

DDL = """CREATE TABLE {users} (
    -- 7 is a number, "7" is text
    user_id text COLLATE "C" PRIMARY KEY,
    epoch bigint NOT NULL,
    owner text NOT NULL,
    released boolean NOT NULL,
    version bigint NOT NULL,
    schema bigint NOT NULL,
    body json,
    saved_at double precision,
    erased boolean NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE {users} IS 'cagey-sessions, layout {layout}';
CREATE TABLE {nodes} (
    owner text COLLATE "C" PRIMARY KEY,
    alive_until timestamptz NOT NULL,
    doubted boolean NOT NULL
);"""
"""Half of each page is left free, so that a row that is saved again stays in its page and the index is not touched."""

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
FORGET_NODES = "DELETE FROM {nodes} WHERE alive_until < clock_timestamp() - interval '7 days'"
# A new row begins above any epoch there ever was: at the clock, in microseconds. FOR SHARE, for a statement may have
# waited for a row: what it sees of the leases without it is as old as its beginning.
CLAIM = """INSERT INTO {users} AS kept
    SELECT user_id, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, $2, false, 0, 0, NULL, NULL, false
        FROM unnest($1::text[]) AS batch (user_id) ORDER BY user_id COLLATE "C"
    ON CONFLICT (user_id) DO UPDATE SET epoch = kept.epoch + 1, owner = excluded.owner, released = false, erased = false
        WHERE kept.released OR kept.owner = excluded.owner OR EXISTS (
            SELECT FROM {nodes} AS nodes
            WHERE nodes.owner = kept.owner AND nodes.doubted AND nodes.alive_until < clock_timestamp() FOR SHARE)
    RETURNING user_id, epoch, '', version, schema, body::text, saved_at"""
HOLDER = "SELECT CASE WHEN released THEN '' ELSE owner END, epoch FROM {users} WHERE user_id = $1"
HOLDERS = """SELECT user_id, CASE WHEN released THEN '' ELSE owner END, epoch FROM {users}
    WHERE user_id = ANY ($1::text[])"""
SAVE = """UPDATE {users} AS kept SET released = batch.release, version = batch.version, schema = batch.schema,
        body = batch.body::json, saved_at = batch.saved_at
    FROM unnest($1::text[], $2::bigint[], $3::text[], $4::bigint[], $5::bigint[], $6::text[], $7::float8[],
        $8::boolean[]) AS batch (user_id, epoch, owner, version, schema, body, saved_at, release)
    WHERE kept.user_id = batch.user_id AND kept.epoch = batch.epoch AND kept.owner = batch.owner
        AND kept.version < batch.version AND NOT kept.released AND NOT kept.erased
    RETURNING kept.user_id"""
LOOK = "SELECT user_id, epoch, owner, version, erased, released FROM {users} WHERE user_id = ANY ($1::text[])"
RELEASE = """UPDATE {users} SET released = true
    WHERE user_id = $1 AND epoch = $2 AND owner = $3 AND NOT released AND NOT erased"""
RELEASE_REPEATED = RELEASE + " AND version = $4"
# not if there has been an erasure: who had the user then must not find them missing, and save them again
DELETE_UNSAVED = """DELETE FROM {users} WHERE user_id = $1 AND epoch = $2 AND released AND body IS NULL AND NOT erased
    AND saved_at IS NULL"""
ERASE = """UPDATE {users} AS kept SET epoch = epoch + 1, released = true, version = 0, body = NULL,
        saved_at = extract(epoch FROM clock_timestamp()), erased = true
    FROM (SELECT user_id, body IS NOT NULL AS had_data FROM {users} WHERE user_id = $1 FOR UPDATE) AS before
    WHERE kept.user_id = before.user_id AND (released OR owner = $2 OR EXISTS (
        SELECT FROM {nodes} AS nodes
        WHERE nodes.owner = kept.owner AND nodes.doubted AND nodes.alive_until < clock_timestamp() FOR SHARE))
    RETURNING before.had_data"""
LOAD = """SELECT user_id, epoch, CASE WHEN released THEN '' ELSE owner END, version, schema, body::text, saved_at
    FROM {users} WHERE user_id = $1 AND body IS NOT NULL"""
SCAN = """SELECT user_id, epoch, CASE WHEN released THEN '' ELSE owner END, version, schema, body::text, saved_at
    FROM {users} WHERE user_id > $1 AND body IS NOT NULL ORDER BY user_id LIMIT $2"""


def _key(user_id: int | str) -> str:
    # not JSON, which escapes: what takes 1 KB has to fit into a row of the index
    return f'"{user_id}"' if isinstance(user_id, str) else int.__repr__(user_id)


def _user_id(key: str) -> int | str:
    return key[1:-1] if key.startswith('"') else int(key)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _record(row: Any) -> Record:
    key, epoch, owner, version, schema, body, saved_at = row
    return Record(_user_id(key), epoch, owner, version, schema, body.encode(), saved_at)


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """Without the round trip that puts a connection back as it was: ours are used for nothing else."""

    def get_reset_query(self) -> str:
        return ""


class PostgresStore(Store):
    """Users in one table of PostgreSQL 15 or newer, for as many servers as you like.

    `dsn` says where it is, as asyncpg and libpq understand it; without it, and without `pool`, the environment does
    (``PGHOST``, ``PGUSER``, ...). With `pool`, an ``asyncpg.Pool`` of yours, calls go through that, and it stays open.
    `schema` is the schema of the table ``cagey_sessions``, which is made at `open` unless `create` is false: then make
    it yourself, by what `ddl` gives. The connection of a call that takes longer than `timeout` (seconds, or a text such
    as "10s") is closed, with an unknown outcome. A server that stops without its users being released keeps them from
    others for `lease`, and a third more from when one asks; shorter, and one that is held up for a moment loses them.

    Raises `MissingExtraError` without asyncpg, and `OptionError`. `open` raises `StoreUnavailableError` if the server
    cannot be reached, or refuses the user, and `StoreLayoutError` for a table of another shape, one made by a newer
    version, or one that this user may not write. Costs one statement for each batch, and one more where a row of it was
    not written.
    """

    shared = True

    def __init__(
        self,
        dsn: str | None = None,
        *,
        pool: Any = None,
        schema: str = "public",
        create: bool = True,
        timeout: Duration = 10,
        lease: Duration = 15,
    ) -> None:
        if dsn is not None and pool is not None:
            raise OptionError("PostgresStore takes a DSN or a pool, not both")
        if dsn is not None and not (isinstance(dsn, str) and dsn.startswith(("postgresql://", "postgres://"))):
            raise OptionError("a DSN begins with postgresql://")
        if not isinstance(schema, str) or "\0" in schema or not 0 < len(schema.encode()) <= LONGEST_NAME:
            raise OptionError(f"schema is a name of at most {LONGEST_NAME} bytes, not {schema!r:.80}")
        self._dsn = dsn
        self._given = pool
        self._schema = schema
        self._creates = create
        self._timeout = parse_duration(timeout, "timeout", shortest=SECOND // 10) / SECOND
        self._lease = parse_duration(lease, "lease", shortest=SECOND) / SECOND
        if self._lease < self._timeout:
            raise OptionError(f"lease is at least timeout ({self._timeout:g} s): else it runs out during a claim")
        self._names = {"users": f"{_quoted(schema)}.cagey_sessions", "nodes": f"{_quoted(schema)}.cagey_sessions_nodes"}
        self._users = self._names["users"]
        self._statements: dict[str, str] = {}
        self._pool: Any = None
        self._state = "closed"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: dict[asyncio.Task[Any], Any] = {}
        self._renewed: dict[str, float] = {}
        """When the lease of each of our owners was last renewed, by our clock, before it was asked for."""
        self._renewing: asyncio.Task[None] | None = None
        self._keeper: Any = None
        """The connection for leases, which are not to wait behind anything; not where the pool is given."""
        self._keeping = asyncio.Lock()

    def ddl(self) -> str:
        """The statements that make what `open` makes, for whoever keeps their schema with a tool of their own."""
        return DDL.format(layout=LAYOUT, **self._names)

    def _sql(self, statement: str) -> str:
        """A statement with the names of our tables in it."""
        text = self._statements.get(statement)
        if text is None:
            text = self._statements[statement] = statement.format(**self._names)
        return text

    # Opening and closing

    async def open(self) -> None:
        if self._state != "closed":
            raise StoreContractError("this PostgresStore is open already; make one for each manager")
        self._state = "opening"
        self._keeping = asyncio.Lock()
        pool = self._given
        try:
            if pool is None:
                pool = await asyncpg.create_pool(
                    self._dsn,
                    min_size=1,
                    max_size=CONNECTIONS,
                    timeout=self._timeout,
                    connection_class=_Connection,
                    server_settings={
                        "application_name": "cagey-sessions",
                        "default_transaction_isolation": "read committed",
                        "lock_timeout": str(int(LONGEST_WAIT * 1000)),
                        "statement_timeout": str(int(self._timeout * 1000)),
                    },
                )
            async with pool.acquire(timeout=self._timeout) as connection, asyncio.timeout(self._timeout):
                self.loss_class = await self._prepare(connection)
            if self._state != "opening":
                raise StoreUnavailableError("this PostgresStore was closed while it was opened")
        except BaseException as error:
            self._state = "closed"
            if pool is not None and self._given is None:
                pool.terminate()
            if pool is None and isinstance(error, ValueError):
                raise OptionError(
                    "the DSN cannot be understood; in a password percent-encode what is not a letter or a digit"
                ) from None
            raise _explained(error) from None
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._state = "open"

    async def _prepare(self, connection: Any) -> str:
        """Look at the server and the table, make it if there is none, and say what a crash may cost."""
        if connection.get_server_version().major < OLDEST:
            raise StoreUnavailableError(f"PostgreSQL {OLDEST} or newer is needed")
        encoding = await connection.fetchval("SHOW server_encoding")
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise StoreLayoutError(f"the encoding of this database is {encoding}; UTF8 is needed")
        if await connection.fetchval("SHOW default_transaction_isolation") != "read committed":
            raise OptionError("the connections of this pool are set to another isolation than READ COMMITTED")
        if await connection.fetchval("SHOW transaction_read_only") == "on":
            raise StoreUnavailableError("this PostgreSQL takes no writes: it is a standby, or set to read only")
        async with connection.transaction():
            # one at a time of those who open it first
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('cagey-sessions'))")
            if await connection.fetchval("SELECT to_regclass($1)", self._users) is None:
                if not self._creates:
                    raise StoreLayoutError(
                        f"there is no table {self._users}; make it by what `ddl()` gives, or leave out create=False"
                    )
                if await connection.fetchval("SELECT to_regnamespace($1)", _quoted(self._schema)) is None:
                    await connection.execute(f"CREATE SCHEMA {_quoted(self._schema)}")
                await connection.execute(self.ddl())
        await self._check_layout(connection)
        await connection.execute(self._sql(FORGET_NODES))
        names = ("synchronous_commit", "synchronous_standby_names", "fsync")
        synchronous, standbys, fsync = [await connection.fetchval(f"SHOW {name}") for name in names]
        kind = await connection.fetchval(
            "SELECT relpersistence::text FROM pg_class WHERE oid = $1::regclass", self._users
        )
        what = f"synchronous_commit={synchronous}, synchronous_standby_names={standbys!r}, fsync={fsync}"
        if kind != "p":
            return f"{what}, an unlogged table: everything is lost when the server dies"
        if fsync == "off":
            return f"{what}: a crash of the machine may damage everything"
        if synchronous == "off":
            return f"{what}: the last transactions are lost when the server dies"
        lost = "" if standbys else "; a failover loses what had not reached the replica"
        return f"{what}: nothing acknowledged is lost when the server or its machine dies{lost}"

    async def _check_layout(self, connection: Any) -> None:
        table = self._users
        comment = await connection.fetchval("SELECT obj_description($1::regclass, 'pg_class')", table)
        prefix, _, layout = (comment or "").partition(", layout ")
        if prefix != "cagey-sessions" or not layout.isdigit():
            raise StoreLayoutError(
                f"{table} is not a table of cagey-sessions; it is left as it is. Give it another schema="
            )
        if int(layout) > LAYOUT:
            raise StoreLayoutError(
                f"{table} was made by a newer version of cagey-sessions (layout {layout}, and this one knows "
                f"{LAYOUT}); it is left as it is"
            )
        for name in self._names.values():
            if not await connection.fetchval(MAY_USE, name):
                raise StoreLayoutError(f"this user may not read and write {name}, or it is not there")
        body = await connection.fetchval(
            "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = $1::regclass AND attname = 'body'",
            table,
        )
        if body not in ("json", "text"):
            raise StoreLayoutError(f"{table} is not of the shape it was made with: body is {body}; it is left as it is")
        try:
            await connection.fetch(self._sql(SCAN), "", 0)
            await connection.fetch(self._sql(CLAIM), [], "")
            await connection.fetch(self._sql(SAVE), *([],) * 8)
            await connection.execute(self._sql(DOUBT), [], timedelta())
        except asyncpg.SyntaxOrAccessError as error:
            raise StoreLayoutError(
                f"{table} is not of the shape it was made with ({error.args[0]}); it is left as it is"
            ) from None

    async def close(self) -> None:
        self._state = "closed"
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            renewing, self._renewing = self._renewing, None
            if renewing is not None:
                renewing.cancel()
                await asyncio.wait([renewing])
            with suppress(Exception):
                # nobody has to wait for users we have left behind
                async with asyncio.timeout(self._timeout), pool.acquire() as connection:
                    await connection.execute(self._sql(END_LEASES), list(self._renewed))
            if self._given is None:
                with suppress(Exception):
                    async with asyncio.timeout(self._timeout):
                        await pool.close()
        finally:
            self._renewed.clear()
            self._drop_keeper()
            if self._given is None:
                pool.terminate()

    # Calls

    def abort(self, call: asyncio.Task[Any]) -> None:
        """Close the connection under a call; what became of its statement is not known."""
        connection = self._connections.get(call)
        if connection is not None:
            connection.terminate()

    async def _run(self, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        pool, task = self._pool, asyncio.current_task()
        if pool is None:
            raise StoreUnavailableError("this PostgresStore is not open")
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoopError("this PostgresStore was opened on another event loop")
        assert task is not None
        attempt = 0
        while True:
            attempt += 1
            try:
                async with pool.acquire(timeout=self._timeout) as connection:
                    self._connections[task] = connection
                    # closed, and not cancelled by a request: that could end the wait for a standby, and a repeat would
                    # take for saved what no standby has
                    timer = self._loop.call_later(self._timeout + 1, connection.terminate)
                    try:
                        return await work(connection)
                    except (asyncpg.ReadOnlySQLTransactionError, asyncpg.InternalClientError):
                        connection.terminate()  # of a standby by now, or broken; a new one may do better
                        raise
                    finally:
                        timer.cancel()
                        del self._connections[task]
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as error:
                if attempt == ATTEMPTS:  # it has been rolled back each time
                    raise StoreUnavailableError(f"PostgreSQL: {error.args[0]}") from None
            except Exception as error:
                raise _explained(error) from None

    # Leases

    async def _renew(self, owner: str) -> None:
        """See to it that an owner has a lease for longer than a claim takes."""
        if time.monotonic() - self._renewed.get(owner, -self._lease) < self._lease / 3:
            return
        async with self._keeping:
            now = time.monotonic()
            if now - self._renewed.get(owner, -self._lease) < self._lease / 3:
                return  # somebody else has done it
            try:
                async with asyncio.timeout(self._lease / 6):
                    await self._send_renewal(owner)
            except BaseException as error:
                self._drop_keeper()
                raise _explained(error) from None
            if self._pool is None:
                return  # closed meanwhile
            self._renewed[owner] = now
        if self._renewing is None:
            assert self._loop is not None
            self._renewing = asyncio.Task(
                self._go_on_renewing(), loop=self._loop, name="cagey-sessions lease", context=Context()
            )

    async def _send_renewal(self, owner: str) -> None:
        renewal = self._sql(RENEW), owner, timedelta(seconds=self._lease)
        if self._pool is None:
            raise StoreUnavailableError("this PostgresStore is not open")
        if self._given is not None:
            async with self._given.acquire() as connection:
                await connection.execute(*renewal)
            return
        if self._keeper is None or self._keeper.is_closed():
            self._keeper = await asyncpg.connect(
                self._dsn, server_settings={"application_name": "cagey-sessions lease"}
            )
        await self._keeper.execute(*renewal)

    def _drop_keeper(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.terminate()

    async def _go_on_renewing(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(self._lease / (15 if failed else 3))
            failed = False
            for owner in list(self._renewed):
                try:
                    await self._renew(owner)
                except Exception as error:  # whatever it is: without a lease the users are lost
                    failed = True
                    _log.warning("PostgresStore: a lease could not be renewed: %s", error)

    # The contract

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> list[Claim]:
        if not user_ids:
            return []
        await self._renew(owner)
        claims: dict[str, Claim] = {}
        left = {_key(user_id): user_id for user_id in user_ids}

        async def claim(connection: Any) -> None:
            for row in await connection.fetch(self._sql(CLAIM), list(left), owner):
                record = None if row["body"] is None else _record(row)._replace(owner=owner)
                claims[row["user_id"]] = Claim(left.pop(row["user_id"]), row["epoch"], record)
            if not left:
                return
            holders = set()
            for key, holder, epoch in await connection.fetch(self._sql(HOLDERS), list(left)):
                if holder not in ("", owner):  # else it has been released meanwhile
                    claims[key] = Claim(left.pop(key), epoch, None, holder)
                    holders.add(holder)
            await self._doubt(connection, holders)

        while left:
            await self._run(claim)
        return [claims[_key(user_id)] for user_id in user_ids]

    async def _doubt(self, connection: Any, owners: set[str]) -> None:
        """Have owners whose lease has run out, or is not there, show that they live."""
        if owners:
            await connection.execute(self._sql(DOUBT), list(owners), timedelta(seconds=self._lease / 3))

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        latest = latest_of(records)
        verdicts: dict[int | str, Verdict] = {}
        rows = []
        for record in latest.values():
            text = text_of(record.body)
            if text is None:
                verdicts[record.user_id] = Verdict(Outcome.INVALID, "the body is not text")
            else:
                rows.append((_key(record.user_id), text, record))
        rows.sort(key=lambda row: row[0])  # the same order everywhere: two batches do not wait for each other
        if rows:
            verdicts |= await self._run(lambda connection: self._save(connection, rows))
        return [verdicts[record.user_id] for record in records]

    async def _save(self, connection: Any, rows: list[tuple[str, str, Record]]) -> dict[int | str, Verdict]:
        keys, texts, records = zip(*rows, strict=True)
        _, epochs, owners, versions, schemas, _, times, releases = zip(*records, strict=True)
        try:
            written = await connection.fetch(
                self._sql(SAVE), keys, epochs, owners, versions, schemas, texts, times, releases
            )
        except (
            asyncpg.DataError,
            asyncpg.ProgramLimitExceededError,
            asyncpg.IntegrityConstraintViolationError,
        ) as error:
            # nothing of the statement is left; one record is the cause, and PostgreSQL does not say which
            if len(rows) == 1:
                return {records[0].user_id: Verdict(Outcome.INVALID, str(error.args[0]))}
            middle = len(rows) // 2
            return {**await self._save(connection, rows[:middle]), **await self._save(connection, rows[middle:])}
        verdicts = {record.user_id: _SAVED for record in records}
        if len(written) < len(rows):
            done = {row[0] for row in written}
            others = {key: record for key, _, record in rows if key not in done}
            kept = {row["user_id"]: row for row in await connection.fetch(self._sql(LOOK), list(others))}
            for key, record in others.items():
                verdict = verdicts[record.user_id] = _verdict(record, kept.get(key))
                # only of the version that is there: a repeat that comes late releases nothing
                if verdict.outcome is Outcome.ALREADY and record.release and record.version == kept[key]["version"]:
                    await connection.execute(
                        self._sql(RELEASE_REPEATED), key, record.epoch, record.owner, record.version
                    )
        return verdicts

    async def release(self, user_id: int | str, epoch: int, owner: str) -> bool:
        async def release(connection: Any) -> bool:
            if await connection.execute(self._sql(RELEASE), _key(user_id), epoch, owner) != "UPDATE 1":
                return False
            with suppress(asyncpg.PostgresError):  # it is released all the same
                await connection.execute(self._sql(DELETE_UNSAVED), _key(user_id), epoch)
            return True

        return await self._run(release)

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        key = _key(user_id)

        async def erase(connection: Any) -> bool:
            while True:
                row = await connection.fetchrow(self._sql(ERASE), key, owner)
                if row is not None:
                    return bool(row[0])
                holders = await connection.fetch(self._sql(HOLDERS), [key])
                if not holders:
                    return False
                holder = holders[0][1]
                if holder in ("", owner):
                    continue  # it has been released meanwhile
                await self._doubt(connection, {holder})
                raise OwnedElsewhereError(
                    f"user {user_id!r:.80} is on another node ({holder}) and cannot be erased now",
                    user_id=user_id,
                    owner=holder,
                )

        return await self._run(erase)

    async def load(self, user_id: int | str) -> Record | None:
        row = await self._run(lambda connection: connection.fetchrow(self._sql(LOAD), _key(user_id)))
        return None if row is None else _record(row)

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        row = await self._run(lambda connection: connection.fetchrow(self._sql(HOLDER), _key(user_id)))
        return ("", 0) if row is None else (row[0], row[1])

    async def scan(self) -> AsyncIterator[Record]:
        last = ""

        async def read(connection: Any) -> list[Any]:
            return list(await connection.fetch(self._sql(SCAN), last, ROWS_IN_A_SCAN))

        while True:
            rows = await self._run(read)
            for row in rows:
                last = row["user_id"]
                yield _record(row)
            if len(rows) < ROWS_IN_A_SCAN:
                return


_SAVED = Verdict(Outcome.SAVED)

_UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # of a connection that the server ends while something is being sent
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.QueryCanceledError,
)


def _explained(error: BaseException) -> BaseException:
    """What an error of the driver means for whoever has made the call.

    The driver's own error goes no further: its details quote rows, and what it says of a DSN may be of the password.
    """
    text = str(error.args[0]) if error.args and not isinstance(error, OSError) else str(error)
    if isinstance(error, (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)):
        return StoreUnavailableError(
            f"PostgreSQL refuses the connection: {text}; check the user, password and database"
        )
    if isinstance(error, (CageySessionsError, asyncio.CancelledError)):
        return error
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return StoreLayoutError(f"PostgreSQL: {text}")
    if isinstance(error, _UNREACHABLE):
        return StoreUnavailableError(f"PostgreSQL cannot be reached ({type(error).__name__}: {text})")
    if isinstance(error, asyncpg.PostgresError):
        return StoreError(f"PostgreSQL: {text} ({type(error).__name__})")
    return error


def _verdict(record: Record, row: Any) -> Verdict:
    """Why a record was not written."""
    if row is None:
        return Verdict(Outcome.MISSING)
    if row["erased"]:
        return Verdict(Outcome.ERASED)
    if (row["epoch"], row["owner"]) != (record.epoch, record.owner):
        return Verdict(Outcome.FENCED)
    if record.version <= row["version"]:
        return Verdict(Outcome.ALREADY)
    if row["released"]:
        return Verdict(Outcome.FENCED)
    return Verdict(Outcome.FAILED, "the row was changed at the same moment")
