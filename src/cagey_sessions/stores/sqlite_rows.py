"""What is done to the rows of an SQLite file, on a connection and within a transaction that are somebody else's. What
lives here: the tables, the statements, and what their answers mean. What must not: files, threads, transactions.
"""

from __future__ import annotations

import functools
import itertools
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from .base import Claim, Outcome, Record, Verdict, text_of

__all__ = [
    "APPLICATION_ID",
    "COLUMNS",
    "CREATE",
    "ERASE",
    "LAYOUT",
    "LOAD",
    "ROWS_IN_A_SCAN",
    "TABLES",
    "claim_rows",
    "portions",
    "release_rows",
    "save_rows",
    "scan_rows",
]

T = TypeVar("T")

APPLICATION_ID = 0x63616765
"""What ``file`` and SQLite itself know our files by: "cage"."""
LAYOUT = 1
"""The number of the layout below, kept in ``user_version``."""
ROWS_IN_A_SCAN = 500
ROWS_IN_A_STATEMENT = 200
MOST_COLUMNS = 6
"""Of a row below that is bound to parameters."""

CREATE = (
    # no affinity for user_id, so that 1 and '1' are two users
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
    # rows that were claimed and never saved are deleted; a new row starts above the highest epoch of any of them
    "CREATE TABLE cagey_sessions_epochs (highest_deleted INTEGER NOT NULL)",
    "INSERT INTO cagey_sessions_epochs VALUES (0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {LAYOUT}",
)
TABLES = {"cagey_sessions", "cagey_sessions_epochs"}
COLUMNS = ["user_id", "epoch", "owner", "released", "version", "schema", "body", "saved_at", "erased"]

# Of the statements below that take many rows one text serves for all numbers of them up to the same power of two, so
# that few are prepared and kept; the rows that are left over are NULL.
CLAIM = """INSERT INTO cagey_sessions
    WITH batch (user_id, owner) AS (VALUES {rows})
    SELECT user_id, highest_deleted + 1, owner, 0, 0, 0, NULL, NULL, 0 FROM batch, cagey_sessions_epochs
        WHERE user_id IS NOT NULL
    ON CONFLICT (user_id) DO UPDATE SET epoch = epoch + 1, owner = excluded.owner, released = 0, erased = 0
    RETURNING user_id, epoch, version, schema, CAST(body AS BLOB), saved_at"""
LOOK = """WITH batch (user_id, epoch, version) AS (VALUES {rows})
    SELECT batch.user_id, kept.epoch, kept.owner, kept.version, kept.erased
    FROM batch LEFT JOIN cagey_sessions AS kept ON kept.user_id = batch.user_id
    WHERE batch.user_id IS NOT NULL AND (kept.epoch = batch.epoch AND kept.owner = ?
        AND kept.version < batch.version AND NOT kept.released AND NOT kept.erased) IS NOT TRUE"""
"""The rows that forbid a save. Commonly there are none."""
# An upsert, though every row is there: UPDATE FROM copies the bodies into a table of its own, and by statistics that
# are out of date it may read all of ours.
SAVE = """INSERT INTO cagey_sessions
    WITH batch (user_id, released, version, schema, body, saved_at) AS (VALUES {rows})
    SELECT user_id, 0, '', released, version, schema, body, saved_at, 0 FROM batch WHERE user_id IS NOT NULL
    ON CONFLICT (user_id) DO UPDATE SET released = excluded.released, version = excluded.version,
        schema = excluded.schema, body = excluded.body, saved_at = excluded.saved_at"""
RELEASE = """WITH batch (user_id, epoch) AS (VALUES {rows})
    UPDATE cagey_sessions SET released = 1 WHERE rowid IN (
        SELECT kept.rowid FROM batch JOIN cagey_sessions AS kept ON kept.user_id = batch.user_id
        WHERE kept.epoch = batch.epoch AND kept.owner = ? AND NOT kept.released)
    RETURNING user_id, epoch, version"""
DELETE_UNSAVED = """WITH batch (user_id) AS (VALUES {rows})
    DELETE FROM cagey_sessions WHERE user_id IN (SELECT user_id FROM batch) AND body IS NULL AND NOT erased"""
REMEMBER_UNSAVED = "UPDATE cagey_sessions_epochs SET highest_deleted = max(highest_deleted, ?)"
ERASE = """UPDATE cagey_sessions
    SET epoch = epoch + 1, released = 1, version = 0, body = NULL, saved_at = NULL, erased = 1 WHERE user_id = ?"""
LOAD = """SELECT user_id, epoch, iif(released, '', owner), version, schema, CAST(body AS BLOB), saved_at
    FROM cagey_sessions WHERE user_id = ? AND body IS NOT NULL"""
SCAN = """SELECT rowid, user_id, epoch, iif(released, '', owner), version, schema, CAST(body AS BLOB), saved_at
    FROM cagey_sessions WHERE rowid > ? AND body IS NOT NULL ORDER BY rowid LIMIT ?"""


def scan_rows(last: int, connection: sqlite3.Connection) -> list[Any]:
    return connection.execute(SCAN, (last, ROWS_IN_A_SCAN)).fetchall()


@functools.cache
def _statement(template: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return template.format(rows=", ".join([row] * rows))


def _execute(connection: sqlite3.Connection, template: str, rows: Sequence[tuple[Any, ...]], *others: Any) -> list[Any]:
    """For many rows at once: with each step Python gives the GIL away, and a busy loop is slow to give it back."""
    columns, size = len(rows[0]), min(1 << (len(rows) - 1).bit_length(), _most_rows(connection))
    parameters = [*itertools.chain.from_iterable(rows), *[None] * (columns * (size - len(rows))), *others]
    return connection.execute(_statement(template, columns, size), parameters).fetchall()


def _most_rows(connection: sqlite3.Connection) -> int:
    return min(ROWS_IN_A_STATEMENT, connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // (MOST_COLUMNS + 1))


def portions(connection: sqlite3.Connection, everything: Sequence[T]) -> Iterator[Sequence[T]]:
    most = _most_rows(connection)
    for start in range(0, len(everything), most):
        yield everything[start : start + most]


def claim_rows(connection: sqlite3.Connection, user_ids: Sequence[int | str], owner: str) -> list[Claim]:
    claims = {}
    for portion in portions(connection, user_ids):
        for user_id, epoch, version, schema, body, saved_at in _execute(
            connection, CLAIM, [(user_id, owner) for user_id in portion]
        ):
            record = None if body is None else Record(user_id, epoch, owner, version, schema, body, saved_at)
            claims[user_id] = Claim(user_id, epoch, record)
    return [claims[user_id] for user_id in user_ids]


def save_rows(connection: sqlite3.Connection, records: Sequence[Record]) -> list[Verdict]:
    owner = records[0].owner
    if any(record.owner != owner for record in records):
        return [save_rows(connection, [record])[0] for record in records]  # never by a manager, which is one owner
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
        # nothing of the statement is left; one record is the cause, and SQLite does not say which
        if len(records) == 1:
            return [Verdict(Outcome.INVALID, "the body is larger than SQLite takes")]
        middle = len(records) // 2
        return save_rows(connection, records[:middle]) + save_rows(connection, records[middle:])
    repeated = [
        (record.user_id, record.epoch)
        for record, verdict in (zip(records, verdicts, strict=True) if forbidding else ())
        # only of the version that is there: a repeat that comes late releases nothing
        if verdict.outcome is Outcome.ALREADY and record.release and record.version == forbidding[record.user_id][2]
    ]
    if repeated:
        _execute(connection, RELEASE, repeated, owner)
    return verdicts


def release_rows(connection: sqlite3.Connection, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
    released = set()
    for portion in portions(connection, claims):
        rows = _execute(connection, RELEASE, portion, owner)
        released |= {user_id for user_id, _, _ in rows}
        if unsaved := [(user_id, epoch) for user_id, epoch, version in rows if not version]:
            connection.execute(REMEMBER_UNSAVED, (max(epoch for _, epoch in unsaved),))
            _execute(connection, DELETE_UNSAVED, [(user_id,) for user_id, _ in unsaved])
    return [user_id in released for user_id, _ in claims]


_SAVED = Verdict(Outcome.SAVED)


def _verdict(record: Record, forbidding: list[Any] | None) -> Verdict:
    if forbidding is None:
        return _SAVED
    epoch, owner, version, erased = forbidding
    if epoch is None:
        return Verdict(Outcome.MISSING)
    if erased:
        return Verdict(Outcome.ERASED)
    if epoch != record.epoch or owner != record.owner or record.version > version:
        return Verdict(Outcome.FENCED)
    return Verdict(Outcome.ALREADY)
