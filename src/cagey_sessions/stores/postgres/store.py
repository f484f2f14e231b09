"""`PostgresStore`: users in PostgreSQL, in a table of ours. The table, and the statements about users.

A batch is one statement over arrays (``unnest``), with the fence in its WHERE: a row is changed only under the epoch
and the owner of its claim. If some rows were not written, a second statement reads them to tell why. No statement is
put together from values.

Several servers share the table. When the owner of a user counts as dead is explained in `engine.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from operator import itemgetter
from typing import Any

from ...errors import OptionError, OwnedElsewhereError, StoreError, StoreLayoutError
from ...options import Duration
from ...wording import quote
from ..contract import MAX_NUMBER, Answers, Claim, Outcome, Record, Verdict, latest_of, text_of
from ..rows import LAST_CLAIMED, StoredRow, key_of, user_id_of
from .engine import BY_KEY, DOUBT, NODES, SCHEMA, PostgresEngine, asyncpg, quoted, verdict_on

__all__ = ["PostgresStore"]

LAYOUT = 1
"""The number of the layout below, kept in the comment of the table."""
ROWS_IN_A_SCAN = 100
# fillfactor: half of each page is left free, so that a row that is saved again stays in its page, and its index entry
# need not change
DDL = (
    """CREATE TABLE {users} (
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
) WITH (fillfactor = 50)""",
    "COMMENT ON TABLE {users} IS 'cagey-sessions, layout {layout}'",
)
COLUMNS: dict[str, tuple[str, ...]] = {
    "user_id": ("text",),
    "epoch": ("bigint",),
    "owner": ("text",),
    "released": ("boolean",),
    "version": ("bigint",),
    "schema": ("bigint",),
    "body": ("json", "text"),
    "saved_at": ("double precision",),
    "erased": ("boolean",),
}
"""The types that each column may have. NOT NULL is not checked: the program may have created the table itself."""
TYPES = """SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
    WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped"""

# The checks of `StoredRow`, in SQL, for a row that is to be changed.
IS_FENCE_SOUND = f"""(kept.epoch BETWEEN 1 AND {MAX_NUMBER - 1} AND kept.version BETWEEN 0 AND {MAX_NUMBER - 1}
    AND kept.released IS NOT NULL AND kept.erased IS NOT NULL AND (kept.released OR kept.owner <> '')
    AND (kept.released OR NOT kept.erased)) IS TRUE"""
IS_SOUND = f"""({IS_FENCE_SOUND} AND CASE WHEN kept.body IS NULL THEN kept.version = 0
    ELSE NOT kept.erased AND kept.version > 0 AND kept.schema BETWEEN 0 AND {MAX_NUMBER - 1}
        AND kept.saved_at > '-Infinity' AND kept.saved_at < 'Infinity' END) IS TRUE"""
MAY_BE_CLAIMED = f"({IS_SOUND} AND kept.epoch <= {LAST_CLAIMED} AND kept.version <= {LAST_CLAIMED})"
FIELDS = "kept.epoch, kept.owner, kept.released, kept.version, kept.schema, kept.body::text, kept.saved_at, kept.erased"

# A new row gets an epoch above all that were ever given, the clock in microseconds: the row of a user may have been
# deleted. FOR SHARE reads the leases as they are now; without it a statement that has waited for a row would see them
# as they were when it began.
CLAIM = """INSERT INTO {users} AS kept
    SELECT user_id, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, $2, false, 0, 0, NULL, NULL, false
        FROM unnest($1::text[]) AS batch (user_id) ORDER BY user_id COLLATE "C"
    ON CONFLICT (user_id) DO UPDATE SET epoch = kept.epoch + 1, owner = excluded.owner, released = false, erased = false
        WHERE {may_be_claimed} AND (kept.released OR kept.owner = excluded.owner OR EXISTS (
            SELECT FROM {nodes} AS nodes
            WHERE nodes.owner = kept.owner AND nodes.doubted AND nodes.alive_until < clock_timestamp() FOR SHARE))
    RETURNING user_id, epoch, version, schema, body::text, saved_at"""
HOLDERS = """SELECT user_id, CASE WHEN released THEN '' ELSE owner END AS holder, epoch, {may_be_claimed} AS is_sound
    FROM {users} AS kept WHERE user_id = ANY ($1::text[])"""
# Most of the time of a save goes into arrays, those of numbers above all. So values that are the same for all rows are
# no arrays, and the users that were written are returned only if some were not.
SAVE = """WITH saved AS (
        UPDATE {users} AS kept SET released = batch.user_id = ANY ($8::text[]), version = batch.version, schema = $7,
            body = batch.body::json, saved_at = batch.saved_at
        FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::text[], $5::float8[])
            AS batch (user_id, epoch, version, body, saved_at)
        WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.owner = $6
            AND kept.version < batch.version AND kept.version >= 0 AND NOT kept.released AND NOT kept.erased) END
        RETURNING kept.user_id)
    SELECT CASE WHEN count(*) < cardinality($1) THEN coalesce(array_agg(user_id), ARRAY[]::text[]) END FROM saved"""
LOOK = "SELECT user_id, epoch, owner, version, erased, released FROM {users} WHERE user_id = ANY ($1::text[])"
RELEASE = """UPDATE {users} AS kept SET released = true
    FROM unnest($1::text[], $2::bigint[]) AS batch (user_id, epoch)
    WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.owner = $3
        AND NOT kept.released AND NOT kept.erased AND {is_fence_sound}) END
    RETURNING kept.user_id, kept.body IS NULL AS unsaved"""
RELEASE_REPEATED = """UPDATE {users} AS kept SET released = true
    FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS batch (user_id, epoch, version)
    WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.version = batch.version
        AND kept.owner = $4 AND NOT kept.released AND NOT kept.erased AND {is_fence_sound}) END"""
# Not after an erasure (then saved_at is set): a server that had the user would find the row missing, and save the user
# again.
DELETE_UNSAVED = """DELETE FROM {users} AS kept USING unnest($1::text[], $2::bigint[]) AS batch (user_id, epoch)
    WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.released AND kept.body IS NULL
        AND NOT kept.erased AND kept.version = 0 AND kept.saved_at IS NULL) END"""
# In a damaged row the owner and the epoch may be unusable; the erasure then needs no owner, and takes a new epoch.
ERASE = f"""UPDATE {{users}} AS kept SET epoch = CASE WHEN epoch BETWEEN 1 AND {LAST_CLAIMED - 1} THEN epoch + 1
            ELSE (extract(epoch FROM clock_timestamp()) * 1000000)::bigint END,
        owner = coalesce(owner, ''), released = true, version = 0, schema = 0, body = NULL,
        saved_at = extract(epoch FROM clock_timestamp()), erased = true
    FROM (SELECT user_id, body IS NOT NULL OR NOT {{is_sound}} AS had_data FROM {{users}} AS kept
        WHERE user_id = $1 FOR UPDATE) AS before
    WHERE kept.user_id = before.user_id AND (released OR owner = $2 OR NOT {{is_fence_sound}} OR EXISTS (
        SELECT FROM {{nodes}} AS nodes
        WHERE nodes.owner = kept.owner AND nodes.doubted AND nodes.alive_until < clock_timestamp() FOR SHARE))
    RETURNING before.had_data"""
LOAD = f"SELECT {FIELDS} FROM {{users}} AS kept WHERE user_id = $1"
HOLDER = "SELECT epoch, owner, released, version, schema, NULL, NULL, erased FROM {users} WHERE user_id = $1"
SCAN = f"""SELECT user_id, {FIELDS} FROM {{users}} AS kept
    WHERE user_id > $1 AND (body IS NOT NULL OR NOT {{is_sound}}) ORDER BY user_id LIMIT $2"""


def _row(fields: Sequence[Any]) -> StoredRow:
    epoch, owner, released, version, schema, body, saved_at, erased = fields
    return StoredRow(epoch, owner, released, version, schema, body and body.encode(), saved_at, erased)


_Row = tuple[str, str, Record]
"""A record to be saved: its key, its body as text, and the record itself."""


class PostgresStore(PostgresEngine):
    """Users in one table of PostgreSQL 15 or newer, shared by any number of servers.

    `dsn` says where the database is, as asyncpg and libpq understand it. Without it, and without `pool`, the
    environment does (``PGHOST``, ``PGUSER``, ...). `pool` is an ``asyncpg.Pool`` of yours, which is used for all calls
    and stays open. `schema` is the schema of the table ``cagey_sessions``. The table is created at `open` unless
    `create` is false: then create it yourself, with the statements of `ddl`. A call that takes longer than `timeout`
    (seconds, or a text such as "10s") has its connection closed, and an unknown outcome. If a server dies, others
    cannot claim its users until its `lease` has run out, and then for another third of it, which begins when one of
    them first asks. With a shorter lease a server that only stalls loses its users sooner.

    Raises `MissingExtraError` without asyncpg, and `OptionError`. `open` raises `StoreUnavailableError` if the server
    cannot be reached, or refuses the user, `StoreLayoutError` for a table of another shape, one made by a newer
    version, or one that this user may not write, and `OptionError` for a `pool` whose prepared statements come together
    with those of others in a pooler such as PgBouncer. Costs one statement for each batch, one more where a row of it
    was not written, and one more for those of the rows that are released.
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
        super().__init__(dsn, pool, schema, create, timeout, lease)
        self._users = self._names["users"] = f"{quoted(schema)}.cagey_sessions"
        self._names |= {"is_sound": IS_SOUND, "is_fence_sound": IS_FENCE_SOUND, "may_be_claimed": MAY_BE_CLAIMED}
        self._names["by_key"] = BY_KEY

    def ddl(self) -> list[str]:
        """Return the statements that create what `open` creates, in order, for your own migrations."""
        schema = [] if self._schema == "public" else [SCHEMA.format(schema=quoted(self._schema))]
        return [*schema, *self._tables()]

    def _tables(self) -> list[str]:
        return [statement.format(layout=LAYOUT, **self._names) for statement in (*DDL, NODES)]

    async def _prepare(self, connection: Any) -> None:
        await self._make(connection, self._users, self._tables())
        await self._check_layout(connection)
        self.loss_class: str = await self._loss_class(connection, self._users)

    async def _check_layout(self, connection: Any) -> None:
        table = self._users
        await self._check_ours(connection, table, LAYOUT)
        await self._check_may_use(connection, self._names["nodes"])
        types = dict(await connection.fetch(TYPES, table))
        for name, known in COLUMNS.items():
            if types.get(name) not in known:
                raise StoreLayoutError(
                    f"{table} is not of the shape it was made with: {name} is {types.get(name, 'not there')}; it is "
                    "left as it is"
                )
        # Run the statements with nothing in them: PostgreSQL then checks the columns, and whether there is a unique
        # index for ON CONFLICT.
        try:
            await connection.fetch(self._sql(SCAN), "", 0)
            await connection.fetch(self._sql(CLAIM), [], "")
            await connection.fetch(self._sql(SAVE), *([],) * 5, "", 0, [])
            await connection.execute(self._sql(DOUBT), [], timedelta())
        except asyncpg.SyntaxOrAccessError as error:
            raise StoreLayoutError(
                f"{table} is not of the shape it was made with ({error.args[0]}); it is left as it is"
            ) from None

    # The contract

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        if not user_ids:
            return []
        await self._leases.hold(owner)  # before the claim: without a lease the users could be taken at once
        answers: dict[str, Claim | StoreError] = {}
        left = {key_of(user_id): user_id for user_id in user_ids}

        async def claim(connection: Any) -> None:
            for row in await connection.fetch(self._sql(CLAIM), list(left), owner):
                key, epoch, version, schema, body, saved_at = row
                user_id = left.pop(key)
                record = (
                    None if body is None else Record(user_id, epoch, owner, version, schema, body.encode(), saved_at)
                )
                answers[key] = Claim(user_id, epoch, record)
            if not left:
                return
            holders = set()
            for key, holder, epoch, is_sound in await connection.fetch(self._sql(HOLDERS), list(left)):
                if not is_sound:
                    fields = await connection.fetchrow(self._sql(LOAD), key)
                    refusal = None if fields is None else _row(fields).claim_refusal(left[key])
                    if refusal is not None:  # else it was repaired meanwhile, and is claimed again below
                        del left[key]
                        answers[key] = refusal
                elif holder not in ("", owner):  # else it was released meanwhile, and is claimed again below
                    answers[key] = Claim(left.pop(key), epoch, None, holder)
                    holders.add(holder)
            await self._doubt(connection, holders)

        while left:  # of a user who was released between the two statements, neither knows the answer
            await self._run(claim)
        return [answers[key_of(user_id)] for user_id in user_ids]

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        latest = latest_of(records)
        verdicts: dict[int | str, Verdict] = {}
        alike: dict[tuple[str, int], list[_Row]] = {}  # owner and schema are single parameters of the statement
        for record in latest.values():
            text = text_of(record.body)
            if text is None:
                verdicts[record.user_id] = Verdict(Outcome.INVALID, "the body is not text")
            else:
                alike.setdefault((record.owner, record.schema), []).append((key_of(record.user_id), text, record))
        for rows in alike.values():
            rows.sort(key=itemgetter(0))  # all servers lock rows in the same order, so two batches cannot deadlock
            verdicts |= await self._run(partial(self._save, rows))
        return [verdicts[record.user_id] for record in records]

    async def _save(self, rows: list[_Row], connection: Any) -> dict[int | str, Verdict]:
        keys, texts, records = zip(*rows, strict=True)
        _, epochs, owners, versions, schemas, _, times, _ = zip(*records, strict=True)
        released = [key for key, _, record in rows if record.release]
        try:
            written = await connection.fetchval(
                self._sql(SAVE), keys, epochs, versions, texts, times, owners[0], schemas[0], released
            )
        except (
            asyncpg.DataError,
            asyncpg.ProgramLimitExceededError,
            asyncpg.IntegrityConstraintViolationError,
        ) as error:
            # PostgreSQL has undone the statement. One record is the cause, and it does not say which: halve the batch
            # until that record is alone.
            if len(rows) == 1:
                return {records[0].user_id: Verdict(Outcome.INVALID, str(error.args[0]))}
            middle = len(rows) // 2
            return {**await self._save(rows[:middle], connection), **await self._save(rows[middle:], connection)}
        verdicts = {record.user_id: _SAVED for record in records}
        if written is not None:
            done = set(written)
            others = {key: record for key, _, record in rows if key not in done}
            kept = {row["user_id"]: row for row in await connection.fetch(self._sql(LOOK), list(others))}
            repeated = []
            for key, record in others.items():
                verdict = verdicts[record.user_id] = verdict_on(record, kept.get(key))
                # only with the row's own version: a repeated write that comes late must not release the user
                if verdict.outcome is Outcome.ALREADY and record.release and record.version == kept[key]["version"]:
                    repeated.append((key, record.epoch, record.version))
            if repeated:
                await connection.execute(self._sql(RELEASE_REPEATED), *zip(*repeated, strict=True), owners[0])
        return verdicts

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        if not claims:
            return []
        epochs = {key_of(user_id): epoch for user_id, epoch in claims}

        async def release(connection: Any) -> set[str]:
            keys = sorted(epochs)
            rows = await connection.fetch(self._sql(RELEASE), keys, [epochs[key] for key in keys], owner)
            if unsaved := [row["user_id"] for row in rows if row["unsaved"]]:
                with suppress(asyncpg.PostgresError):  # the rows only take up space
                    await connection.execute(self._sql(DELETE_UNSAVED), unsaved, [epochs[key] for key in unsaved])
            return {row["user_id"] for row in rows}

        released = await self._run(release)
        return [key in released for key in epochs]

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        key = key_of(user_id)

        async def erase(connection: Any) -> bool:
            while True:
                row = await connection.fetchrow(self._sql(ERASE), key, owner)
                if row is not None:
                    return bool(row[0])
                holders = await connection.fetch(self._sql(HOLDERS), [key])
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

        return await self._run(erase)

    async def load(self, user_id: int | str) -> Record | None:
        fields = await self._run(lambda connection: connection.fetchrow(self._sql(LOAD), key_of(user_id)))
        return None if fields is None else _row(fields).record(user_id)

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        fields = await self._run(lambda connection: connection.fetchrow(self._sql(HOLDER), key_of(user_id)))
        return ("", 0) if fields is None else _row(fields).holder(user_id)

    async def scan(self) -> AsyncIterator[Record | StoreError]:
        last = ""

        async def read(connection: Any) -> list[Any]:
            return list(await connection.fetch(self._sql(SCAN), last, ROWS_IN_A_SCAN))

        while True:
            rows = await self._run(read)
            for key, *fields in rows:
                last = key
                try:
                    record = _row(fields).record(user_id_of(key))
                except StoreError as error:
                    yield error
                else:
                    if record is not None:
                        yield record
            if len(rows) < ROWS_IN_A_SCAN:
                return


_SAVED = Verdict(Outcome.SAVED)
