"""The program's own table, for `PostgresTable`: what the catalog says of it, and how user data becomes column values.

`read_table` refuses every table in which data would not come back as it was saved, or users could be mixed up. It only
reads; the statements that write are in `fences.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import orjson

from ..._core import decode_plain
from ...errors import EncodingError, StoreLayoutError
from ...wording import quote
from ..contract import Record, text_of
from .engine import asyncpg, quoted

__all__ = ["COLUMN_TYPES", "Column", "GivenBodies", "OwnTable", "UnfitError", "own_names", "read_table"]

MOST_GIVEN = 64 * 1024 * 1024
"""In bytes, of all bodies together."""
_INTEGERS = {"smallint": 16, "integer": 32, "bigint": 64}
_TEXTS = ("text", "character varying")
_JSON = ("json", "jsonb")
COLUMN_TYPES = (*_INTEGERS, "double precision", "boolean", *_TEXTS, *_JSON)
_ARRAYS = {"double precision": "float8[]", "boolean": "boolean[]"} | dict.fromkeys(_INTEGERS, "bigint[]")
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "i": "an index", "S": "a sequence"}
# an escaped NUL in JSON text, which is not the end of an escaped backslash
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_MAY_BE_LARGE = re.compile(r"\d[eE]\+?\d")
_LARGE = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?[eE]\+?\d{1,3}(?!\d)')
"""Matches a number with an exponent, or a whole text: what looks like a number in a text is passed over with it."""

TABLE = """SELECT relkind::text AS kind, quote_ident(nspname) || '.' || quote_ident(relname) AS name,
        row_security_active(pg_class.oid) AS hides_rows
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = to_regclass($1)"""
# The type of a column; if it is a domain, the type that the domain is made from.
COLUMNS = """WITH RECURSIVE columns AS (
        SELECT attname, attnum, atttypid AS type, atttypmod AS modifier, attnotnull AS required,
            atthasdef OR attidentity <> '' AS has_default, attgenerated <> '' AS is_generated,
            attidentity = 'a' AS is_numbered, coalesce(collisdeterministic, true) AS is_exact
        FROM pg_attribute LEFT JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped
    UNION ALL
        SELECT attname, attnum, typbasetype, typtypmod, required OR typnotnull, has_default OR typdefault IS NOT NULL,
            is_generated, is_numbered, is_exact
        FROM columns JOIN pg_type ON pg_type.oid = type WHERE typtype = 'd')
    SELECT columns.*, format_type(type, NULL) AS type_name FROM columns JOIN pg_type ON pg_type.oid = type
    WHERE typtype <> 'd' ORDER BY attnum"""
IS_UNIQUE = """SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = $1::regclass AND indisunique AND indisvalid
        AND indimmediate AND indpred IS NULL AND indnkeyatts = 1 AND indkey[0] = $2)"""


def _written_out(match: re.Match[str]) -> str:
    """A match of `_LARGE` without an exponent, and with a point, so that it stays a float; texts as they are."""
    if match[0].startswith('"'):
        return match[0]
    number = format(Decimal(match[0]), "f")
    return number if "." in number else f"{number}.0"


class UnfitError(Exception):
    """The table cannot hold some data, or an id. The text names the column and the reason, never the value."""


class Column(NamedTuple):
    """A column that is read and written."""

    name: str
    type: str
    """Its type; for a domain the type that it is made from."""
    required: bool
    """Whether it is NOT NULL."""
    length: int | None
    """The most characters, if it is a ``varchar(n)``."""

    @property
    def array(self) -> str:
        """The type of the array by which its values are sent."""
        return _ARRAYS.get(self.type, "text[]")

    @property
    def cast(self) -> str:
        """The cast from an element of the array to the column; empty if PostgreSQL converts it by itself.

        It then refuses a value that does not fit; a cast would cut it off.
        """
        return f"::{self.type}" if self.type in _JSON else ""

    def sent(self, value: Any) -> Any:
        """A JSON value as the driver wants it. Raises `UnfitError` if it would not come back the same."""
        if self.type in _JSON:
            return self._json(value)
        if value is None:
            if self.required:
                raise UnfitError(f"column {self.name} is NOT NULL, and takes no None")
            return None
        if self.type in _INTEGERS:
            if type(value) is not int:
                raise UnfitError(f"column {self.name} is {self.type}, and takes no {type(value).__name__}")
            if not -(limit := 1 << _INTEGERS[self.type] - 1) <= value < limit:
                raise UnfitError(f"column {self.name}: the number is out of the range of {self.type}")
            return value
        if self.type == "double precision":
            if type(value) is int and float(value) == value:  # comes back as a float, which is equal
                return float(value)
            if type(value) is not float or not math.isfinite(value):
                raise UnfitError(f"column {self.name} is {self.type}, and takes no such {type(value).__name__}")
            return value
        if type(value) is not (bool if self.type == "boolean" else str):
            raise UnfitError(f"column {self.name} is {self.type}, and takes no {type(value).__name__}")
        if isinstance(value, str):
            if "\0" in value:
                raise UnfitError(f"column {self.name}: no text of PostgreSQL has a NUL in it")
            if self.length is not None and len(value) > self.length:
                raise UnfitError(f"column {self.name}: the text is longer than {self.length} characters")
        return value

    def _json(self, value: Any) -> str | None:
        if value is None and not self.required:
            return None
        return self.text(orjson.dumps(value).decode())

    def text(self, text: str) -> str:
        """JSON text as it is sent, so that the same data comes back. Raises `UnfitError`."""
        if self.type != "jsonb":
            return text
        if _NUL.search(text):
            raise UnfitError(f"column {self.name}: no jsonb of PostgreSQL has a NUL in it")
        # jsonb keeps a number as a decimal, and drops the exponent: 1e20 would come back as an int
        return _LARGE.sub(_written_out, text) if _MAY_BE_LARGE.search(text) else text

    def came(self, value: Any) -> Any:
        """A value from the driver as it is put into a body."""
        if value is None:
            return None
        if self.type in _JSON:
            return orjson.Fragment(value)
        if type(value) is float and not math.isfinite(value):
            return orjson.Fragment(b"NaN")  # not JSON, on purpose: JSON cannot say this value, so the record is damaged
        return value


class GivenBodies:
    """Bodies as they were saved, for tables that give back the same data in other bytes.

    A session that has to claim its user again, after a claim that came late or a change during its last save, goes on
    only if the stored body is exactly what it wrote. That happens soon after the save, so the oldest bodies are dropped
    when there are too many.
    """

    def __init__(self) -> None:
        self._kept: dict[int | str, tuple[int, bytes]] = {}
        self._size = 0

    def add(self, record: Record) -> None:
        """Keep the body of a record in the place of an older one of the user."""
        self.forget(record.user_id)
        self._kept[record.user_id] = record.version, record.body
        self._size += len(record.body)
        while self._size > MOST_GIVEN:
            self.forget(next(iter(self._kept)))

    def forget(self, user_id: int | str) -> None:
        _, body = self._kept.pop(user_id, (0, b""))
        self._size -= len(body)

    def as_given(self, user_id: int | str, version: int, body: bytes) -> bytes:
        """The kept bytes of a version if `body`, which was read, is the same data; otherwise `body`."""
        known = self._kept.get(user_id)
        return known[1] if known is not None and known[0] == version and _is_same(body, known[1]) else body


def _is_same(body: bytes, other: bytes) -> bool:
    """Whether two bodies are the same data, apart from the order of members and how numbers are written."""
    try:
        return _equal(decode_plain(body), decode_plain(other))
    except EncodingError:
        return False


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(each, other[name]) for name, each in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


class OwnTable:
    """The program's table, and its columns that the store reads and writes: one for the whole data, or several."""

    def __init__(self, name: str, key: Column, columns: Sequence[Column], is_body: bool, needed: Sequence[str]) -> None:
        self.name = name
        """Its name with its schema, quoted."""
        self.key = key
        self.columns: tuple[Column, ...] = tuple(columns)
        self.is_body = is_body
        self.needed: tuple[str, ...] = tuple(needed)
        """Columns that the store does not set, and that are NOT NULL and have no default: they prevent an INSERT."""
        self.makes_keys = False
        """Whether the key is GENERATED ALWAYS, so that an INSERT may not set it."""
        self.keeps_bytes: bool = is_body and columns[0].type != "jsonb"
        """Whether a body comes back byte for byte."""
        self._names = frozenset(column.name for column in columns)

    def check_key(self, key: Any) -> Any:
        """Check that the key column can hold a key, and return it. Raises `UnfitError`."""
        return self.key.sent(key)

    def sent(self, body: bytes) -> tuple[Any, ...]:
        """The values of the columns for a body. Raises `UnfitError`."""
        if self.is_body:
            text = text_of(body)
            if text is None:
                raise UnfitError(f"column {self.columns[0].name}: the body is not text")
            return (self.columns[0].text(text),)
        try:
            value = decode_plain(body, "")
        except EncodingError as error:
            raise UnfitError(f"the body is refused: {error}") from None
        if type(value) is not dict:
            raise UnfitError("with columns= the data is a dict with a member for each of them")
        if value.keys() != self._names:
            missing = sorted(self._names - value.keys())
            what = f"there is no member {quote(missing[0])}" if missing else "it has another one, without a column"
            raise UnfitError(f"with columns= the data is a dict with a member for each of them: {what}")
        return tuple(column.sent(value[column.name]) for column in self.columns)

    def body(self, row: Any, was_saved: bool) -> bytes | None:
        """The body of a row; None if it has no data.

        With one column for the whole data that is so if it is NULL. With several it is so if all are NULL and we never
        saved the user: the program may have made the row without them.
        """
        values = [row[f"c{place}"] for place in range(len(self.columns))]
        if all(value is None for value in values) and (self.is_body or not was_saved):
            return None
        if self.is_body:
            text: str = values[0]
            return text.encode()
        return orjson.dumps(
            {column.name: column.came(value) for column, value in zip(self.columns, values, strict=True)}
        )

    def reason(self, error: asyncpg.PostgresError) -> str:
        """Why PostgreSQL refused a row, in words that quote no value of it."""
        name: str | None = getattr(error, "column_name", None)  # asyncpg sets it, and declares it nowhere
        if isinstance(error, asyncpg.NotNullViolationError) and name in self.needed:
            return (
                f"a new row needs column {name}, which is NOT NULL, has no default and is not among those given to "
                "PostgresTable: give it insert=, a function that makes the row"
            )
        if isinstance(error, asyncpg.PLPGSQLError):
            return f"a trigger of the table refuses it ({type(error).__name__})"
        text = str(error.args[0])
        # the message of a data error quotes the value after a colon
        return text if isinstance(error, asyncpg.IntegrityConstraintViolationError) else text.partition(":")[0]


async def read_table(connection: Any, table: str, key: str, names: Sequence[str], is_body: bool) -> OwnTable:
    """Look up a table by its quoted name.

    `key` is its column with the user ids, and `names` are the columns of the data, one for all of it if `is_body`.
    Raises `StoreLayoutError` for a table that cannot keep users.
    """
    found = await connection.fetchrow(TABLE, table)
    if found is None:
        raise StoreLayoutError(
            f"there is no table {table}; names are taken as they are, capitals included, and of another schema than "
            "those on the search_path a pair is: (schema, name)"
        )
    if found["kind"] not in "rp":
        raise StoreLayoutError(f"{table} is {_KINDS.get(found['kind'], 'something else')}; only a table keeps users")
    if found["hides_rows"]:  # a hidden user would be claimed as new, and their data overwritten
        raise StoreLayoutError(
            f"row level security applies to this user in {table}: who has a row that is hidden would be taken for new. "
            "Use a role with BYPASSRLS"
        )
    columns = {row["attname"]: row for row in await connection.fetch(COLUMNS, table)}
    for name in (key, *names):
        if name not in columns:
            raise StoreLayoutError(f"{table} has no column {name}; it has {', '.join(columns)}")
    at = columns[key]
    if at["type_name"] not in (*_INTEGERS, *_TEXTS):
        raise StoreLayoutError(f"the key {key} of {table} is {at['type_name']}; user ids are integers or text")
    if not at["is_exact"]:  # a nondeterministic collation, such as one that ignores case
        raise StoreLayoutError(f"the key {key} of {table} has a collation by which different ids are equal")
    if not await connection.fetchval(IS_UNIQUE, table, at["attnum"]):
        raise StoreLayoutError(
            f"the key {key} of {table} is not unique by itself: it needs a primary key or a unique constraint on this "
            "one column, which is not deferrable"
        )
    for name in names:
        what = columns[name]["type_name"]
        if columns[name]["is_generated"]:
            raise StoreLayoutError(f"column {name} of {table} is generated: leave it out")
        if what not in (("json", "jsonb", "text") if is_body else COLUMN_TYPES):
            raise StoreLayoutError(
                f"column {name} of {table} is {what}, and "
                + (
                    "body is json, jsonb or text"
                    if is_body
                    else f"user data is {', '.join(COLUMN_TYPES)}: leave it out"
                )
            )
    needed = [
        name
        for name, row in columns.items()
        if name not in (key, *names) and row["required"] and not row["has_default"] and not row["is_generated"]
    ]
    own = OwnTable(found["name"], _column(at), [_column(columns[name]) for name in names], is_body, needed)
    own.makes_keys = at["is_numbered"]
    return own


def _column(row: Any) -> Column:
    # a varchar(n) has the type modifier n + 4
    is_limited = row["type_name"] == "character varying" and row["modifier"] > 4
    return Column(row["attname"], row["type_name"], row["required"], row["modifier"] - 4 if is_limited else None)


def own_names(own: OwnTable, first: int) -> dict[str, str]:
    """What to put into statements for the names in braces; the arrays of the data are parameters from `$first` on."""
    fields = [f"c{place}" for place in range(len(own.columns))]
    both = list(zip(own.columns, fields, strict=True))
    return {
        "table": own.name,
        "key": quoted(own.key.name),
        "keys": own.key.array,
        "arrays": "".join(f", ${first + place}::{column.array}" for place, column in enumerate(own.columns)),
        "fields": "".join(f", {field}" for field in fields),
        "columns": "".join(f", {quoted(column.name)}" for column in own.columns),
        "values": "".join(f", batch.{field}{column.cast}" for column, field in both),
        "sets": ", ".join(f"{quoted(column.name)} = batch.{field}{column.cast}" for column, field in both),
        "excluded": ", ".join(f"{quoted(column.name)} = excluded.{quoted(column.name)}" for column in own.columns),
        "reads": ", ".join(
            f"own.{quoted(column.name)}{'::text' if column.cast else ''} AS {field}" for column, field in both
        ),
    }
