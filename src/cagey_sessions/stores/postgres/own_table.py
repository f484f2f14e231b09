"""`PostgresTable`: users in a table of PostgreSQL that belongs to the program.

The table stays the program's: only the listed columns are ever set, and its definition is never changed. A row is
inserted only if there was none when the user was claimed. If one is deleted later, the user is reported as missing
first.

The statements are in `fences.py`, the columns and their values in `catalog.py`, connections and leases in `engine.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple

from ...errors import (
    CorruptRecordError,
    OptionError,
    OwnedElsewhereError,
    RecordError,
    StoreContractError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
)
from ...options import Duration, one_of
from ...wording import quote
from ..contract import Answers, Claim, Outcome, Record, Verdict, latest_of
from ..rows import StoredRow, damaged
from . import fences as sql
from .catalog import GivenBodies, OwnTable, UnfitError, read_table
from .engine import DOUBT, NODES, SCHEMA, PostgresEngine, asyncpg, check_name, is_of_call, quoted, verdict_on
from .pooler import driver_of

__all__ = ["PostgresTable"]

FENCES = ("side_table", "none")
ROWS_IN_A_SCAN = 100
_SAVED = Verdict(Outcome.SAVED)
_REFUSALS = (
    asyncpg.DataError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.PLPGSQLError,
)
"""Errors because of one row, which will never be accepted. PostgreSQL has undone the statement, and does not say which
row it was."""

Insert = Callable[[Any, "int | str", Any], Awaitable[object]]


class _Row(NamedTuple):
    """A record to be saved: its key, the values of the listed columns, and the record itself."""

    key: Any
    values: tuple[Any, ...]
    record: Record


class PostgresTable(PostgresEngine):
    """Users in a table of yours, in PostgreSQL 15 or newer.

    `pool` is an ``asyncpg.Pool`` of yours, which stays open, or a DSN. `table` is a name as it is in the catalog,
    capitals included, or a pair ``(schema, name)``; `key` is its column with the user ids, of an integer type or text,
    and unique by itself. The data is either in `columns`, a dict with a member for each of them, or as a whole in the
    one column `body`, of type json, jsonb or text.

    `fence` says where claims are kept: in a ``"side_table"`` in `schema`, which is created at `open` unless `create` is
    false; or nowhere, ``"none"``, for one process alone. `ddl` gives the statements.
    ``await insert(connection, user_id, value)`` makes the row of a new user, where it takes more than the columns given
    here; what it has not set of those is set after it, in the same transaction. `timeout` and `lease` are as with
    `PostgresStore`.

    Raises `MissingExtraError` without asyncpg, and `OptionError`. `open` raises what that of `PostgresStore` does, and
    `StoreLayoutError` for a table that cannot be used. An id that the key column cannot hold is a `RecordError`. Costs
    one statement for each batch, one more where a row of it was not written, and one more each for rows that are new
    and for those that are only released.
    """

    def __init__(
        self,
        pool: Any,
        table: str | tuple[str, str],
        *,
        key: str = "id",
        columns: Sequence[str] | None = None,
        body: str | None = None,
        fence: Literal["side_table", "none"] = "side_table",
        schema: str = "cagey_sessions",
        create: bool = True,
        insert: Insert | None = None,
        timeout: Duration = 10,
        lease: Duration = 15,
    ) -> None:
        is_dsn = isinstance(pool, str)
        if pool is None:
            raise OptionError("PostgresTable takes an asyncpg.Pool or a DSN first")
        super().__init__(pool if is_dsn else None, None if is_dsn else pool, schema, create, timeout, lease)
        names = (table,) if isinstance(table, str) else table
        if not isinstance(names, tuple) or len(names) not in (1, 2):
            raise OptionError(f"table is a name or a pair (schema, name), not {quote(table)}")
        self._table = ".".join(quoted(check_name("table", name)) for name in names)
        self._key_name = check_name("key", key)
        if (columns is None) == (body is None):
            raise OptionError("give either columns=[...], or body=, the one column with the whole of the data")
        if columns is not None and (isinstance(columns, str) or not isinstance(columns, Sequence) or not len(columns)):
            raise OptionError("columns is a list of names, and not empty")
        self._listed = [check_name("a column", name) for name in ([body] if columns is None else columns)]
        if len({key, *self._listed}) <= len(self._listed):
            raise OptionError("a column is given twice, or the key is among them")
        self._is_body = columns is None
        if insert is not None and not callable(insert):
            raise OptionError(f"insert is an async function, not {quote(insert)}")
        self._insert = insert
        self.uses_leases: bool = one_of("fence", fence, FENCES) == "side_table"
        self.fenced: bool = self.uses_leases
        self.shared: bool = self.uses_leases
        self.keeps_schema: bool = self.uses_leases
        self._save_sql, self._insert_sql, self._load_sql = (
            (sql.SAVE, sql.INSERT, sql.LOAD) if self.fenced else (sql.SAVE_ALONE, sql.INSERT_ALONE, sql.LOAD_ALONE)
        )
        self._side = sql.side_table(names[-1], schema)
        self._own: OwnTable | None = None
        self._given_bodies = GivenBodies()
        self._epoch = 0
        self._new: set[int | str] = set()
        """Without a fence: the users who had no row when they were claimed."""

    def ddl(self) -> list[str]:
        """Return the statements that create the side table and that of the leases; none with ``fence="none"``."""
        if not self.uses_leases:
            return []
        return [SCHEMA.format(schema=quoted(self._schema)), *self._fence_ddl(), NODES.format(**self._names)]

    def _fence_ddl(self) -> list[str]:
        return sql.ddl(self._table, quoted(self._key_name), self._side)

    def key_of(self, user_id: int | str) -> int | str:
        """Return the value of the key column for a user.

        It is the id itself. If your keys are something else, override this and `user_id_of`, its inverse.
        """
        return user_id

    def user_id_of(self, key: int | str) -> int | str:
        """Return the user whose row has a key; the inverse of `key_of`."""
        return key

    # Opening

    async def _prepare(self, connection: Any) -> None:
        own = await read_table(connection, self._table, self._key_name, self._listed, self._is_body)
        tables, nodes = [own.name], self._names["nodes"]
        if self.fenced:
            await self._make(connection, self._side, self._fence_ddl())
            await self._check_ours(connection, self._side, sql.LAYOUT, own.name)
            tables.append(self._side)
            await self._make(connection, nodes, [NODES.format(nodes=nodes)])
            await self._check_may_use(connection, nodes)
        self._names = sql.fence_names(own, self._side, nodes, fenced=self.fenced)
        self._statements.clear()
        await self._check_statements(connection, own)
        self.loss_class: str = await self._loss_class(connection, *tables)
        self._own = own

    async def _check_statements(self, connection: Any, own: OwnTable) -> None:
        """Run the statements with nothing in them: PostgreSQL checks the columns, and what this user may do."""
        arrays: list[list[Any]] = [[] for _ in own.columns]
        await connection.fetch(self._sql(sql.READ), [])
        if not self.fenced:
            await connection.fetch(self._sql(self._load_sql + sql.FIRST_PAGE), 0)
            await connection.fetch(self._sql(self._save_sql), [], *arrays)
            return
        try:
            await connection.fetch(self._sql(self._load_sql + sql.FIRST_PAGE), 0)
            await connection.fetch(self._sql(sql.CLAIM), [], "")
            await connection.execute(self._sql(sql.SETTLE), [], [], [], [], "")
            await connection.fetch(self._sql(self._save_sql), *([],) * 7, *arrays)
            await connection.fetch(self._sql(sql.LOOK), [])
            await connection.execute(self._sql(DOUBT), [], timedelta())
        except asyncpg.SyntaxOrAccessError as error:
            if isinstance(error, asyncpg.InsufficientPrivilegeError):
                raise
            raise StoreLayoutError(
                f"the fence of {own.name} is not of the shape it was made with ({error.args[0]}); it is left as it is"
            ) from None

    # Claims

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        if not user_ids:
            return []
        keys = {self._key(user_id): user_id for user_id in user_ids}  # first, because it may raise
        if len(keys) < len(user_ids):  # two users would overwrite each other
            raise StoreContractError("key_of has given two users the same key")
        if not self.fenced:
            claims = await self._run(lambda connection: self._claim_alone(connection, keys, owner))
            return [claims[key] for key in keys]
        await self._leases.hold(owner)
        answers: dict[Any, Claim | StoreError] = {}
        while len(answers) < len(keys):
            left = [key for key in keys if key not in answers]
            answers |= await self._run(partial(self._claim, left=left, keys=keys, owner=owner))
        return [answers[key] for key in keys]

    async def _claim(
        self, connection: Any, left: list[Any], keys: dict[Any, int | str], owner: str
    ) -> dict[Any, Claim | StoreError]:
        """Claim users in the fence, then read their rows; returns the answers that are known.

        In this order, because a row that is read before its user is claimed may be out of date. If a user was released
        between the statements there is no answer, and the claim has to be repeated.
        """
        own = self._open_table()
        claims: dict[Any, Claim | StoreError] = {}
        granted = {row["user_id"]: row for row in await connection.fetch(self._sql(sql.CLAIM), left, owner)}
        if granted:
            found = {row["user_id"]: row for row in await connection.fetch(self._sql(sql.READ), list(granted))}
            to_settle = []
            for key, row in granted.items():
                data = found.get(key)
                absent = data is None
                body = None if data is None else own.body(data, row["version"] > 0)
                if absent != row["absent"] or (body is None and row["version"]):
                    to_settle.append((key, row["epoch"], absent, body is None))
                claims[key] = Claim(keys[key], row["epoch"], self._record(keys[key], row, owner, body))
            if to_settle:  # the fence does not agree with the row: note whether there is one, and begin versions anew
                await connection.execute(self._sql(sql.SETTLE), *map(list, zip(*to_settle, strict=True)), owner)
        if len(granted) < len(left):
            holders = set()
            refused = [key for key in left if key not in granted]
            for key, holder, epoch, is_sound in await connection.fetch(self._sql(sql.HOLDERS), refused):
                if not is_sound:
                    fence = await connection.fetchrow(self._sql(sql.FENCE), key)
                    refusal = None if fence is None else self._refusal(keys[key], fence)
                    if refusal is not None:  # else it was repaired meanwhile
                        claims[key] = refusal
                elif holder not in ("", owner):  # else it was released meanwhile
                    claims[key] = Claim(keys[key], epoch, None, holder)
                    holders.add(holder)
            await self._doubt(connection, holders)
        return claims

    def _kept(self, user_id: int | str, fence: Any) -> StoredRow:
        """The fence of a user as a row for the checks of `StoredRow`, which wants a body, a version and a time.

        The fence has no body: that is in the program's table. For a user whom only others have written it has version 0
        and no time. Raises `CorruptRecordError` if the fence is damaged.
        """
        epoch, owner, released, version, schema, saved_at, erased, absent = (fence[field] for field in sql.FIELDS)
        kept = StoredRow(epoch, owner, released, version, schema, None, saved_at, erased)
        fault = kept.fence_fault()
        if not fault and type(absent) is not bool:
            fault = "its field absent is missing"
        if not fault:
            time = 0.0 if saved_at is None and not version else saved_at
            kept = kept._replace(version=max(version, 1), body=b"", saved_at=time, erased=False)
            fault = kept.fault()
        if fault:
            raise damaged(user_id, fault)
        return kept

    def _refusal(self, user_id: int | str, fence: Any) -> CorruptRecordError | None:
        """The error for a claim that a damaged fence does not allow to anybody; None if the fence is sound."""
        try:
            return self._kept(user_id, fence).claim_refusal(user_id)
        except CorruptRecordError as error:
            return error

    def _record(self, user_id: int | str, row: Any, owner: str, body: bytes | None) -> Record | None:
        if body is None:
            return None
        version = max(row["version"], 1)  # 0 if only others have written the row; a record begins with 1
        body = self._given_bodies.as_given(user_id, version, body)
        return Record(user_id, row["epoch"], owner, version, row["schema"], body, row["saved_at"] or 0.0)

    async def _claim_alone(self, connection: Any, keys: dict[Any, int | str], owner: str) -> dict[Any, Claim]:
        """Claim users without a fence: read their rows, and grant everything."""
        own = self._open_table()
        claims = {}
        found = {row["user_id"]: row for row in await connection.fetch(self._sql(sql.READ), list(keys))}
        for key, user_id in keys.items():
            self._epoch += 1
            data = found.get(key)
            # remembered, because without a fence nothing else tells a new user from one whose row was deleted
            (self._new.add if data is None else self._new.discard)(user_id)
            body = None if data is None else own.body(data, was_saved=False)
            record = None if body is None else Record(user_id, self._epoch, owner, 1, 0, body, 0.0)
            claims[key] = Claim(user_id, self._epoch, record)
        return claims

    # Saves

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        latest = latest_of(records)
        verdicts: dict[int | str, Verdict] = {}
        rows = []
        for user_id, record in latest.items():
            try:
                rows.append(_Row(self._key(user_id), self._open_table().sent(record.body), record))
            except (UnfitError, RecordError) as error:  # one user's data must not fail the batch
                verdicts[user_id] = Verdict(Outcome.INVALID, str(error))
        rows.sort(key=lambda row: row.key)  # all servers lock rows in the same order, so two batches cannot deadlock
        if rows:
            verdicts |= await self._run(lambda connection: self._save(connection, rows))
        return [verdicts[record.user_id] for record in records]

    async def _save(self, connection: Any, rows: list[_Row]) -> dict[int | str, Verdict]:
        """Update the rows of a batch, look up why some were not written, and insert those that are new."""
        verdicts: dict[int | str, Verdict] = {}
        await self._write(connection, self._save_sql, rows, verdicts)
        if left := [row for row in rows if row.record.user_id not in verdicts]:
            new = await (self._look if self.fenced else self._look_alone)(connection, left, verdicts)
            if new:
                await self._insert_all(connection, new, verdicts)
        for row in rows:
            record = row.record
            if verdicts[record.user_id].outcome is Outcome.SAVED:
                self._remember_body(record)
        return verdicts

    async def _write(
        self, connection: Any, statement: str, rows: list[_Row], verdicts: dict[int | str, Verdict]
    ) -> None:
        """Write rows by one statement, and add the verdicts of those that were written or are refused for good.

        If the table refuses a row, the batch is halved until that row is alone. A row that the statement did not find,
        or that its fence did not allow, gets no verdict here.
        """
        try:
            found = await connection.fetch(self._sql(statement), *self._arrays(rows))
        except _REFUSALS as error:
            if len(rows) == 1:
                verdicts[rows[0].record.user_id] = Verdict(Outcome.INVALID, self._open_table().reason(error))
                return
            middle = len(rows) // 2
            await self._write(connection, statement, rows[:middle], verdicts)
            await self._write(connection, statement, rows[middle:], verdicts)
            return
        written = {row["user_id"] for row in found}
        verdicts |= {row.record.user_id: _SAVED for row in rows if row.key in written}

    def _arrays(self, rows: list[_Row]) -> list[Any]:
        keys, values, records = zip(*rows, strict=True)
        columns = zip(*values, strict=True)
        if not self.fenced:
            return [keys, *columns]
        _, epochs, owners, versions, schemas, _, times, releases = zip(*records, strict=True)
        return [keys, epochs, owners, versions, schemas, times, releases, *columns]

    async def _look(self, connection: Any, rows: list[_Row], verdicts: dict[int | str, Verdict]) -> list[_Row]:
        """Find out why rows were not updated, and add their verdicts; returns the rows that are to be inserted."""
        new, repeated = [], []
        keys = [row.key for row in rows]
        kept = {row["user_id"]: row for row in await connection.fetch(self._sql(sql.LOOK), keys)}
        for row in rows:
            record, found = row.record, kept.get(row.key)
            verdict = verdict_on(record, found)
            if found is not None and verdict.outcome is Outcome.FAILED:  # the fence allows it: the row is the reason
                if not found["there"] and found["absent"]:  # there was no row at the claim, and is none now
                    new.append(row)
                    continue
                verdict = _HELD_BACK if found["there"] else Verdict(Outcome.MISSING)
            elif found is not None and verdict.outcome is Outcome.ALREADY and record.version == found["version"]:
                self._remember_body(record)
                if record.release:  # only here: a lower version has come late, and must not release the user
                    repeated.append((row.key, record.epoch, record.owner, record.version))
            verdicts[record.user_id] = verdict
        if repeated:
            await connection.execute(self._sql(sql.RELEASE_REPEATED), *zip(*repeated, strict=True))
        return new

    async def _look_alone(self, connection: Any, rows: list[_Row], verdicts: dict[int | str, Verdict]) -> list[_Row]:
        """As `_look`, without a fence."""
        new = [row for row in rows if row.record.user_id in self._new]
        others = [row for row in rows if row.record.user_id not in self._new]
        found = await connection.fetch(self._sql(sql.READ), [row.key for row in others])
        there = {row["user_id"] for row in found}
        verdicts |= {row.record.user_id: _HELD_BACK if row.key in there else Verdict(Outcome.MISSING) for row in others}
        return new

    async def _insert_all(self, connection: Any, rows: list[_Row], verdicts: dict[int | str, Verdict]) -> None:
        if self._insert is not None:
            for row in rows:
                verdicts[row.record.user_id] = await self._insert_one(connection, self._insert, row)
        elif self._open_table().makes_keys:
            reason = (
                "the key of a new row is GENERATED ALWAYS: give PostgresTable insert=, a function that makes the row"
            )
            verdicts |= {row.record.user_id: Verdict(Outcome.INVALID, reason) for row in rows}
        else:
            await self._write(connection, self._insert_sql, rows, verdicts)
        for row in rows:
            # without a verdict: neither inserted nor refused, so a trigger has skipped the row
            if verdicts.setdefault(row.record.user_id, _HELD_BACK) is _SAVED:
                self._new.discard(row.record.user_id)

    async def _insert_one(self, connection: Any, insert: Insert, row: _Row) -> Verdict:
        """Have the program's `insert` make a row, and set the listed columns, in one transaction under the fence."""
        record = row.record
        try:
            async with connection.transaction():
                if self.fenced and not await connection.fetch(
                    self._sql(sql.MAY_INSERT), [row.key], [record.epoch], [record.owner], [record.version]
                ):
                    return _HELD_BACK
                await insert(driver_of(connection), record.user_id, record.value())
                if not await connection.fetch(self._sql(self._save_sql), *self._arrays([row])):
                    raise _NoRowError
        except _NoRowError:
            return Verdict(Outcome.FAILED, "insert made no row with the key of this user")
        except _REFUSALS as error:
            return Verdict(Outcome.INVALID, self._open_table().reason(error))
        except Exception as error:
            if connection.is_closed() or (is_of_call(error) and not isinstance(error, (OSError, TimeoutError))):
                raise  # an OSError alone may be about something else that the program's function uses
            return Verdict(Outcome.FAILED, f"insert raised {type(error).__name__}")
        return _SAVED

    def _remember_body(self, record: Record) -> None:
        """Keep the bytes of a saved record, if the table would give others back."""
        if self.fenced and not self._open_table().keeps_bytes:
            self._given_bodies.add(record)

    # The rest

    def _open_table(self) -> OwnTable:
        """The table, as it was found when the store was opened. Raises `StoreUnavailableError` if it is not open."""
        if self._own is None or self._state != "open":
            raise StoreUnavailableError(f"this {self.name} is not open")
        return self._own

    def _key(self, user_id: int | str) -> Any:
        """The key of a user. Raises `RecordError` if the key column cannot hold it."""
        own = self._open_table()
        try:
            return own.check_key(self.key_of(user_id))
        except UnfitError as error:
            kind = "str" if own.key.array == "text[]" else "int"
            problem = f"{own.name} cannot have user {quote(user_id)}: {error}; the ids of this table are {kind}"
        raise RecordError(problem, user_id=user_id)

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        epochs = {self._key(user_id): epoch for user_id, epoch in claims}
        if not self.fenced:
            self._new.difference_update(user_id for user_id, _ in claims)
            return [True] * len(claims)

        async def release(connection: Any) -> set[Any]:
            keys = sorted(epochs)
            rows = await connection.fetch(self._sql(sql.RELEASE), keys, [epochs[key] for key in keys], owner)
            absent = [row["user_id"] for row in rows if row["absent"]]
            if absent:
                with suppress(asyncpg.PostgresError):  # the rows of the fence only take up space
                    await connection.execute(self._sql(sql.DELETE_UNSAVED), absent, [epochs[key] for key in absent])
            return {row["user_id"] for row in rows}

        released = await self._run(release) if epochs else set()
        return [key in released for key in epochs]

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        """Delete the user's row, with all its columns; returns whether there was one.

        The fence keeps the id, and that it was erased. Raises `StoreError` if a trigger prevents it, and
        `OwnedElsewhereError` while a live owner other than `owner` has the user.
        """
        key = self._key(user_id)

        async def erase(connection: Any) -> bool:
            while True:
                async with connection.transaction():
                    epoch = None
                    if self.fenced:
                        await connection.execute(self._sql(sql.ENSURE), key)
                        epoch = await connection.fetchval(self._sql(sql.LOCK), key, owner)
                    if epoch is not None or not self.fenced:
                        # after the lock, by a statement of its own: it sees what was committed while the lock waited
                        was_there: bool = await connection.execute(self._sql(sql.DELETE), key) != "DELETE 0"
                        if await connection.fetchval(self._sql(sql.IS_THERE), key):
                            raise StoreError(
                                f"the row of user {quote(user_id)} cannot be deleted: a trigger holds it back"
                            )
                        if epoch is not None:
                            await connection.execute(self._sql(sql.BURY), key, epoch + 1)
                        return was_there
                holders = await connection.fetch(self._sql(sql.HOLDERS), [key])
                if not holders:
                    return False
                holder = holders[0]["holder"]
                if holder in ("", owner):
                    continue  # it was released meanwhile
                await self._doubt(connection, {holder})
                raise OwnedElsewhereError(
                    f"user {quote(user_id)} is on another server ({holder}) and cannot be erased now",
                    user_id=user_id,
                    owner=holder,
                )

        erased = await self._run(erase)
        self._given_bodies.forget(user_id)  # erased data must not stay in memory either
        return erased

    async def load(self, user_id: int | str) -> Record | None:
        key = self._key(user_id)
        row = await self._run(lambda connection: connection.fetchrow(self._sql(self._load_sql + sql.ONE), key))
        return None if row is None else self._loaded(row)

    def _loaded(self, row: Any) -> Record | None:
        """The record of a row that was read with its fence; None if it has no data."""
        user_id = self.user_id_of(row["user_id"])
        if not row["is_fenced"]:
            body = self._open_table().body(row, was_saved=False)
            return None if body is None else Record(user_id, 0, "", 1, 0, body, 0.0)
        self._kept(user_id, row)
        body = self._open_table().body(row, row["version"] > 0)
        return self._record(user_id, row, "" if row["released"] else row["owner"], body)

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        if not self.fenced:
            return await super().holder(user_id)
        key = self._key(user_id)
        row = await self._run(lambda connection: connection.fetchrow(self._sql(sql.FENCE), key))
        if row is None:
            return "", 0
        self._kept(user_id, row)
        return "" if row["released"] else row["owner"], row["epoch"]

    async def scan(self) -> AsyncIterator[Record | StoreError]:
        """As `Store.scan`: all users with data, including those who were never saved by this library."""
        statement = self._load_sql + sql.FIRST_PAGE
        last: list[Any] = []

        async def read(connection: Any) -> list[Any]:
            return list(await connection.fetch(self._sql(statement), ROWS_IN_A_SCAN, *last))

        while True:
            rows = await self._run(read)
            for row in rows:
                try:
                    record = self._loaded(row)
                except CorruptRecordError as error:
                    yield error
                else:
                    if record is not None:
                        yield record
            if len(rows) < ROWS_IN_A_SCAN:
                return
            statement, last = self._load_sql + sql.NEXT_PAGE, [rows[-1]["user_id"]]


class _NoRowError(Exception):
    """Raised to undo a transaction: `insert` returned, but there is no row with the user's key."""


_HELD_BACK = Verdict(Outcome.FAILED, "the row was changed at the same moment, or a trigger of the table held it back")
