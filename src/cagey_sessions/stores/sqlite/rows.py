"""The tables of `SQLiteStore`, the statements about users, and what their answers mean.

All functions run in the writer thread of `store.py`, on its connection and within its transaction. So each statement
sees the file as the one before it left it, and no row is locked.
"""

from __future__ import annotations

import functools
import itertools
import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from ..._core import check_user_id
from ...errors import CorruptRecordError, InvalidUserIdError, StoreError, StoreLayoutError
from ..contract import MAX_NUMBER, Claim, Outcome, Record, Verdict, text_of
from ..rows import LAST_CLAIMED, StoredRow, no_id, verdict_of_damage

__all__ = [
    "APPLICATION_ID",
    "COLUMNS",
    "CREATE",
    "HIGHEST_DELETED",
    "LAYOUT",
    "TABLES",
    "claim_rows",
    "erase_row",
    "load_row",
    "portions",
    "release_rows",
    "save_rows",
    "scan_rows",
    "text",
]

T = TypeVar("T")

APPLICATION_ID = 0x63616765
"""The mark of our files, which SQLite keeps in the header: "cage" in ASCII."""
LAYOUT = 1
"""The number of the layout below, kept in ``user_version``."""
ROWS_IN_A_SCAN = 500
"""Saves wait while a portion of a scan is read."""
ROWS_IN_A_STATEMENT = 200
MOST_COLUMNS = 6
"""The most columns of a batch in a statement below; each is one parameter a row, and SQLite limits their number."""

CREATE = (
    # user_id has no type, and so no affinity: with one SQLite would convert, and 1 and '1' would be the same user
    """CREATE TABLE cagey_sessions (
        user_id UNIQUE NOT NULL,
        epoch INTEGER NOT NULL,
        owner TEXT NOT NULL,
        released INTEGER NOT NULL,
        version INTEGER NOT NULL,
        schema INTEGER NOT NULL,
        body TEXT,
        saved_at REAL,
        erased INTEGER NOT NULL
    )""",
    # Rows of users who were never saved are deleted at their release. A new row starts above the highest epoch that any
    # of them had, so that no epoch of a user is given twice.
    "CREATE TABLE cagey_sessions_epochs (highest_deleted INTEGER NOT NULL)",
    "INSERT INTO cagey_sessions_epochs VALUES (0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {LAYOUT}",
)
TABLES = {"cagey_sessions", "cagey_sessions_epochs"}
COLUMNS = ["user_id", "epoch", "owner", "released", "version", "schema", "body", "saved_at", "erased"]

# The checks of `StoredRow`, in SQL. SQLite stores values of any type in any column, whatever its declared type, so the
# type of each is checked, too.
IS_SOUND = f"""typeof(user_id) IN ('integer', 'text')
    AND typeof(epoch) = 'integer' AND epoch BETWEEN 1 AND {LAST_CLAIMED}
    AND released IN (0, 1) AND (released = 1 OR typeof(owner) = 'text' AND owner <> '')
    AND erased IN (0, 1) AND released >= erased AND typeof(version) = 'integer' AND CASE WHEN body IS NULL
        THEN version = 0
        ELSE erased = 0 AND version BETWEEN 1 AND {LAST_CLAIMED}
            AND typeof(schema) = 'integer' AND schema BETWEEN 0 AND {MAX_NUMBER - 1}
            AND typeof(saved_at) = 'real' AND abs(saved_at) < 9e999 END"""
FIELDS = "epoch, owner, released, version, schema, CAST(body AS BLOB), saved_at, erased"

# In the statements below {rows} stands for a number of rows that is rounded up to a power of two, and the rows that are
# left over are NULL. So there are few texts, and SQLite prepares each only once.
CLAIM = f"""INSERT INTO cagey_sessions
    WITH batch (user_id, owner) AS (VALUES {{rows}})
    SELECT user_id, highest_deleted + 1, owner, 0, 0, 0, NULL, NULL, 0 FROM batch, cagey_sessions_epochs
        WHERE user_id IS NOT NULL
    ON CONFLICT (user_id) DO UPDATE SET epoch = epoch + 1, owner = excluded.owner, released = 0, erased = 0
        WHERE {IS_SOUND.replace("user_id", "cagey_sessions.user_id")}
    RETURNING user_id, epoch, version, schema, CAST(body AS BLOB), saved_at"""
LOOK = """WITH batch (user_id, epoch, version) AS (VALUES {rows})
    SELECT batch.user_id, kept.user_id IS NULL, kept.epoch, kept.owner, kept.released, kept.version, kept.erased
    FROM batch LEFT JOIN cagey_sessions AS kept ON kept.user_id = batch.user_id
    WHERE batch.user_id IS NOT NULL AND (kept.epoch = batch.epoch AND kept.owner = ?
        AND typeof(kept.version) = 'integer' AND kept.version BETWEEN 0 AND batch.version - 1
        AND kept.released = 0 AND kept.erased = 0) IS NOT TRUE"""
"""Finds the rows that forbid a save; usually there are none."""
# An upsert, though every row exists: UPDATE FROM would copy all bodies into a temporary table, and with outdated
# statistics it may read our whole table.
SAVE = """INSERT INTO cagey_sessions
    WITH batch (user_id, released, version, schema, body, saved_at) AS (VALUES {rows})
    SELECT user_id, 0, '', released, version, schema, body, saved_at, 0 FROM batch WHERE user_id IS NOT NULL
    ON CONFLICT (user_id) DO UPDATE SET released = excluded.released, version = excluded.version,
        schema = excluded.schema, body = excluded.body, saved_at = excluded.saved_at"""
# typeof(body), because some versions of SQLite do not see in RETURNING that a value IS NULL.
RELEASE = f"""WITH batch (user_id, epoch) AS (VALUES {{rows}})
    UPDATE cagey_sessions SET released = 1 WHERE rowid IN (
        SELECT kept.rowid FROM batch JOIN cagey_sessions AS kept ON kept.user_id = batch.user_id
        WHERE kept.epoch = batch.epoch AND kept.owner = ? AND kept.released = 0 AND kept.erased = 0
            AND typeof(kept.version) = 'integer' AND kept.version BETWEEN 0 AND {MAX_NUMBER - 1})
    RETURNING user_id, epoch, typeof(body) = 'null' AND version = 0"""
DELETE_UNSAVED = """WITH batch (user_id) AS (VALUES {rows})
    DELETE FROM cagey_sessions WHERE user_id IN (SELECT user_id FROM batch)
        AND body IS NULL AND version = 0 AND erased = 0"""
REMEMBER_UNSAVED = "UPDATE cagey_sessions_epochs SET highest_deleted = max(highest_deleted, ?)"
# A damaged row may have no epoch to go on from. It gets one above all that were ever given: the clock, in microseconds.
ERASE = f"""UPDATE cagey_sessions
    SET user_id = ?, epoch = iif(typeof(epoch) = 'integer' AND epoch BETWEEN 1 AND {LAST_CLAIMED - 1}, epoch + 1, ?),
        owner = iif(typeof(owner) = 'text', owner, ''),
        released = 1, version = 0, schema = 0, body = NULL, saved_at = NULL, erased = 1
    WHERE user_id = ?"""
HAD_DATA = f"SELECT body IS NOT NULL OR ({IS_SOUND}) IS NOT TRUE FROM cagey_sessions WHERE user_id = ?"
HIGHEST_DELETED = f"""SELECT count(*) = 1 AND typeof(max(highest_deleted)) = 'integer'
    AND max(highest_deleted) BETWEEN 0 AND {LAST_CLAIMED - 1} FROM cagey_sessions_epochs"""
LOAD = f"SELECT typeof(user_id) = typeof(?), {FIELDS} FROM cagey_sessions WHERE user_id = ?"  # 1 = 1.0
SCAN = f"SELECT rowid, user_id, {FIELDS} FROM cagey_sessions WHERE rowid > ? ORDER BY rowid LIMIT ?"


def text(raw: bytes) -> str | bytes:
    """Decode a text of the file, as the connection's `text_factory`; what is not UTF-8 stays bytes, and is damaged."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _row(*fields: Any) -> StoredRow:
    """A row for the checks of `StoredRow`: SQLite has no booleans, so the flags are converted."""
    row = StoredRow(*fields)
    return row._replace(released=_flag(row.released), erased=_flag(row.erased))


def _flag(value: Any) -> Any:
    return bool(value) if type(value) is int and value in (0, 1) else value


def load_row(user_id: int | str, connection: sqlite3.Connection) -> Record | None:
    """As `Store.load`."""
    found = connection.execute(LOAD, (user_id, user_id)).fetchone()
    if found is None:
        return None
    is_of_user, *fields = found
    row = _row(*fields)
    if not is_of_user:
        raise row.damage(user_id, _OTHER_ID)
    return row.record(user_id)


_OTHER_ID = "its user_id is equal to the id, and of another type"


def scan_rows(last: float, connection: sqlite3.Connection) -> tuple[float | None, list[Record | StoreError]]:
    """Read a portion of a scan, the rows after rowid `last`.

    Returns the last rowid that was read, or None at the end of the table, and the records; errors are in the places of
    damaged rows.
    """
    found: list[Record | StoreError] = []
    rows = connection.execute(SCAN, (last, ROWS_IN_A_SCAN)).fetchall()
    for _, user_id, *fields in rows:
        try:
            check_user_id(user_id)
            record = _row(*fields).record(user_id)
        except InvalidUserIdError:
            found.append(no_id(user_id))
        except CorruptRecordError as error:
            found.append(error)
        else:
            if record is not None:
                found.append(record)
    return rows[-1][0] if len(rows) == ROWS_IN_A_SCAN else None, found


def erase_row(user_id: int | str, connection: sqlite3.Connection) -> bool:
    """As `Store.erase`; no other owner can be alive, as the file has one process."""
    row = connection.execute(HAD_DATA, (user_id,)).fetchone()
    connection.execute(ERASE, (user_id, time.time_ns() // 1000, user_id))
    return row is not None and bool(row[0])


@functools.cache
def _statement(template: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return template.format(rows=", ".join([row] * rows))


def _execute(connection: sqlite3.Connection, template: str, rows: Sequence[tuple[Any, ...]], *others: Any) -> list[Any]:
    """Execute a statement once for many rows, and return what it returns.

    Once, and not for each row: with each step of a statement Python releases the GIL, and this thread waits for an
    event loop that is busy to give it back.
    """
    columns, size = len(rows[0]), min(1 << (len(rows) - 1).bit_length(), _most_rows(connection))
    parameters = [*itertools.chain.from_iterable(rows), *[None] * (columns * (size - len(rows))), *others]
    return connection.execute(_statement(template, columns, size), parameters).fetchall()


def _most_rows(connection: sqlite3.Connection) -> int:
    return min(ROWS_IN_A_STATEMENT, connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // (MOST_COLUMNS + 1))


def portions(connection: sqlite3.Connection, everything: Sequence[T]) -> Iterator[Sequence[T]]:
    """Split rows into as many as one statement takes."""
    most = _most_rows(connection)
    for start in range(0, len(everything), most):
        yield everything[start : start + most]


def claim_rows(connection: sqlite3.Connection, user_ids: Sequence[int | str], owner: str) -> list[Claim | StoreError]:
    """As `Store.claim_many`. No claim is refused: every owner but this process is dead, as it has the file's lock."""
    claims: dict[int | str, Claim] = {}
    for portion in portions(connection, user_ids):
        for user_id, epoch, version, schema, body, saved_at in _execute(
            connection, CLAIM, [(user_id, owner) for user_id in portion]
        ):
            record = None if body is None else Record(user_id, epoch, owner, version, schema, body, saved_at)
            claims[user_id] = Claim(user_id, epoch, record)
    # RETURNING gives the rows in no particular order, and leaves out those that may not be claimed
    if len(claims) == len(user_ids):
        return [claims[user_id] for user_id in user_ids]
    return [claims.get(user_id) or _refusal(connection, user_id) for user_id in user_ids]


def _refusal(connection: sqlite3.Connection, user_id: int | str) -> StoreError:
    """The error for a row that CLAIM left out: it is damaged, or its epoch or version has no next one."""
    found = connection.execute(LOAD, (user_id, user_id)).fetchone()
    if found is None:
        raise StoreLayoutError("the table cagey_sessions_epochs does not say which epoch a new user begins with")
    is_of_user, *fields = found
    row = _row(*fields)
    return row.damage(user_id, _OTHER_ID) if not is_of_user else row.claim_refusal(user_id) or no_id(user_id)


def save_rows(connection: sqlite3.Connection, records: Sequence[Record]) -> list[Verdict]:
    """As `Store.save_many`, for as many records as one statement takes, each of a different user.

    Two statements for the whole batch: one finds the rows that forbid a save, the other writes all others.
    """
    owner = records[0].owner
    if any(record.owner != owner for record in records):
        # never for a manager, which is one owner, so it need not be fast
        return [save_rows(connection, [record])[0] for record in records]
    try:
        keys = [(record.user_id, record.epoch, record.version) for record in records]
        forbidding = {user_id: row for user_id, *row in _execute(connection, LOOK, keys, owner)}
        verdicts = [_SAVED] * len(records)
        if forbidding:
            verdicts = [_verdict(record, forbidding.get(record.user_id)) for record in records]
        rows = []
        for place, (user_id, _, _, version, schema, body, saved_at, release) in enumerate(records):
            text = text_of(body)
            if text is None:
                verdicts[place] = Verdict(Outcome.INVALID, "the body is not text")
            elif verdicts[place] is _SAVED:
                rows.append((user_id, release, version, schema, text, saved_at))
        if rows:
            _execute(connection, SAVE, rows)
    except (sqlite3.DataError, OverflowError):
        # SQLite has undone the statement. One record is the cause, and it does not say which: halve the batch until
        # that record is alone.
        if len(records) == 1:
            return [Verdict(Outcome.INVALID, "the body is larger than SQLite takes")]
        middle = len(records) // 2
        return save_rows(connection, records[:middle]) + save_rows(connection, records[middle:])
    repeated = [
        (record.user_id, record.epoch)
        for record, verdict in (zip(records, verdicts, strict=True) if forbidding else ())
        # only with the row's own version: a repeated write that comes late must not release the user
        if verdict.outcome is Outcome.ALREADY and record.release and record.version == forbidding[record.user_id][4]
    ]
    if repeated:
        _execute(connection, RELEASE, repeated, owner)
    return verdicts


def release_rows(connection: sqlite3.Connection, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
    """As `Store.release_many`. The rows of users who were never saved are deleted, so that they do not add up."""
    released = set()
    for portion in portions(connection, claims):
        rows = _execute(connection, RELEASE, portion, owner)
        released |= {user_id for user_id, _, _ in rows}
        if unsaved := [(user_id, epoch) for user_id, epoch, is_unsaved in rows if is_unsaved]:
            # in the same transaction as the deletion, or an epoch could be given again
            connection.execute(REMEMBER_UNSAVED, (max(epoch for _, epoch in unsaved),))
            _execute(connection, DELETE_UNSAVED, [(user_id,) for user_id, _ in unsaved])
    return [user_id in released for user_id, _ in claims]


_SAVED = Verdict(Outcome.SAVED)


def _verdict(record: Record, forbidding: list[Any] | None) -> Verdict:
    """The verdict on a record, by the row that forbids its save, if one does."""
    if forbidding is None:
        return _SAVED
    is_missing, epoch, owner, released, version, erased = forbidding
    if is_missing:
        return Verdict(Outcome.MISSING)
    # before the other fields are compared: in a damaged row they may be anything
    if fault := _row(epoch, owner, released, version, 0, None, None, erased).fence_fault():
        return verdict_of_damage(fault)
    if erased:
        return Verdict(Outcome.ERASED)
    if epoch != record.epoch or owner != record.owner or record.version > version:
        return Verdict(Outcome.FENCED)
    return Verdict(Outcome.ALREADY)
