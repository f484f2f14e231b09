"""The fence of `PostgresTable`: epochs, owners and versions of users whose data is in the program's own table.

The fence is in a side table of ours, in columns that the program added to its table, or nowhere. The statements are
written once, with names in braces that `fence_names` fills in for each of these; values are always parameters.

With a side table a save is one statement: it locks the rows of the fence that allow the save, updates the data, and
sets the new version in the fence where there was a row to update.

In READ COMMITTED a statement that has waited for a lock sees the new version of the locked row, but of all other rows
only what was committed before it began. So the data is read after the claim, and deleted after the lock, by a statement
of its own.
"""

from __future__ import annotations

from ..contract import MAX_NUMBER
from ..rows import LAST_CLAIMED
from .catalog import OwnTable, own_names
from .engine import quoted

__all__ = [
    "BURY_BESIDE",
    "BURY_INSIDE",
    "CLAIM",
    "DELETE",
    "DELETE_UNSAVED",
    "ENSURE",
    "FENCE",
    "FIELDS",
    "FIRST_EPOCH",
    "FIRST_PAGE",
    "HOLDERS",
    "INSERT_ALONE",
    "INSERT_BESIDE",
    "INSIDE",
    "IS_THERE",
    "LAYOUT",
    "LOAD",
    "LOAD_ALONE",
    "LOCK",
    "LOOK",
    "MAY_INSERT",
    "NEXT_PAGE",
    "ONE",
    "READ",
    "RELEASE",
    "RELEASE_REPEATED",
    "SAVE_ALONE",
    "SAVE_BESIDE",
    "SAVE_INSIDE",
    "SETTLE",
    "ddl",
    "fence_names",
    "side_table",
]

LAYOUT = 1
"""The number of the layout of the side table, kept in its comment."""
PREFIX = "cagey_sessions_fence_"
FIELDS = ("epoch", "owner", "released", "version", "schema", "saved_at", "erased", "absent")
"""The fields of a fence. `absent` says that the user is claimed and has no data; with a side table, also no row."""
INSIDE = tuple(f"cagey_{field}" for field in FIELDS)
"""Their names as columns of the program's table."""
FIRST_EPOCH = {"side_table": 1, "columns": 0, "none": 0}
"""The lowest epoch of a sound row; 0 if rows may exist that were never claimed."""

SIDE_DDL = (
    "CREATE TABLE {fence} AS SELECT {key} AS user_id FROM {table} WITH NO DATA",
    """ALTER TABLE {fence}
    ADD PRIMARY KEY (user_id),
    ADD epoch bigint NOT NULL,
    ADD owner text NOT NULL,
    ADD released boolean NOT NULL,
    ADD version bigint NOT NULL,
    ADD schema bigint NOT NULL,
    ADD saved_at double precision,
    ADD erased boolean NOT NULL,
    ADD absent boolean NOT NULL,
    SET (fillfactor = 50)""",
    """DO $do$ BEGIN
    EXECUTE (SELECT format('COMMENT ON TABLE %s IS %L', {fence_text}, '{comment}' || format('%I.%I', nspname, relname))
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = {table_text}::regclass);
END $do$""",
)
INSIDE_DDL = (
    """ALTER TABLE {table}
    ADD cagey_epoch bigint NOT NULL DEFAULT 0,
    ADD cagey_owner text NOT NULL DEFAULT '',
    ADD cagey_released boolean NOT NULL DEFAULT true,
    ADD cagey_version bigint NOT NULL DEFAULT 0,
    ADD cagey_schema bigint NOT NULL DEFAULT 0,
    ADD cagey_saved_at double precision,
    ADD cagey_erased boolean NOT NULL DEFAULT false,
    ADD cagey_absent boolean NOT NULL DEFAULT false""",
)

CLOCK = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
# FOR SHARE reads the leases as they are now; without it a statement that has waited for a row would see them as they
# were when it began.
IS_FREE = """(kept.{released} OR kept.{owner} = {who} OR EXISTS (SELECT FROM {nodes} AS nodes
        WHERE nodes.owner = kept.{owner} AND nodes.doubted AND nodes.alive_until < clock_timestamp() FOR SHARE))"""
HOLDS = """kept.{epoch} = batch.epoch AND kept.{owner} = batch.owner AND kept.{version} < batch.version
        AND kept.{version} >= 0 AND NOT kept.{released} AND NOT kept.{erased}"""
# The checks of `PostgresTable._kept`, in SQL, for a row that is to be changed.
IS_FENCE_SOUND = f"""(kept.{{epoch}} BETWEEN {{first_epoch}} AND {MAX_NUMBER - 1}
        AND kept.{{version}} BETWEEN 0 AND {MAX_NUMBER - 1} AND kept.{{released}} IS NOT NULL
        AND kept.{{erased}} IS NOT NULL AND kept.{{absent}} IS NOT NULL AND (kept.{{released}} OR kept.{{owner}} <> '')
        AND (kept.{{released}} OR NOT kept.{{erased}})) IS TRUE"""
MAY_BE_CLAIMED = f"""({IS_FENCE_SOUND} AND kept.{{epoch}} <= {LAST_CLAIMED} AND kept.{{version}} <= {LAST_CLAIMED}
        AND kept.{{schema}} BETWEEN 0 AND {MAX_NUMBER - 1} AND (kept.{{saved_at}} IS NULL AND kept.{{version}} = 0
            OR kept.{{saved_at}} > '-Infinity' AND kept.{{saved_at}} < 'Infinity')) IS TRUE"""
MOVES = """{released} = batch.release, {version} = batch.version, {schema} = batch.schema,
        {saved_at} = batch.saved_at, {absent} = false"""
BATCH = """unnest($1::{keys}, $2::bigint[], $3::text[], $4::bigint[], $5::bigint[], $6::float8[], $7::boolean[]{arrays})
        AS batch (user_id, epoch, owner, version, schema, saved_at, release{fields})"""

# A new row gets an epoch above all that were ever given: the clock, in microseconds.
CLAIM = """INSERT INTO {fence} AS kept
        ({id}, {epoch}, {owner}, {released}, {version}, {schema}, {erased}, {absent})
    SELECT user_id, {clock}, $2, false, 0, 0, false, true FROM unnest($1::{keys}) AS batch (user_id) ORDER BY user_id
    ON CONFLICT ({id}) DO UPDATE SET
        {epoch} = CASE kept.{epoch} WHEN 0 THEN excluded.{epoch} ELSE kept.{epoch} + 1 END,
        {owner} = excluded.{owner}, {released} = false, {erased} = false
        WHERE {may_be_claimed} AND {is_free_for_new}
    RETURNING kept.{id} AS user_id, kept.{epoch} AS epoch, kept.{version} AS version, kept.{schema} AS schema,
        kept.{saved_at} AS saved_at, kept.{absent} AS absent"""
READ = "SELECT own.{key} AS user_id, {reads} FROM {table} AS own WHERE own.{key} = ANY ($1::{keys})"
SETTLE = """UPDATE {fence} AS kept SET {absent} = batch.absent,
        {version} = CASE WHEN batch.is_new THEN 0 ELSE kept.{version} END
    FROM unnest($1::{keys}, $2::bigint[], $3::boolean[], $4::boolean[]) AS batch (user_id, epoch, absent, is_new)
    WHERE kept.{id} = batch.user_id AND kept.{epoch} = batch.epoch AND kept.{owner} = $5"""
HOLDERS = """SELECT {id} AS user_id, CASE WHEN {released} THEN '' ELSE {owner} END AS holder, {epoch} AS epoch,
        {may_be_claimed} AS is_sound FROM {fence} AS kept WHERE {id} = ANY ($1::{keys})"""
FENCE = """SELECT {epoch} AS epoch, {owner} AS owner, {released} AS released, {version} AS version, {schema} AS schema,
        {saved_at} AS saved_at, {erased} AS erased, {absent} AS absent FROM {fence} AS kept WHERE {id} = $1"""

SAVE_BESIDE = """WITH batch AS MATERIALIZED (SELECT * FROM {batch}),
    held AS MATERIALIZED (
        SELECT kept.{id} AS user_id FROM {fence} AS kept JOIN batch ON kept.{id} = batch.user_id
        WHERE {holds} ORDER BY kept.{id} FOR UPDATE OF kept),
    written AS (
        UPDATE {table} AS own SET {sets} FROM batch JOIN held ON held.user_id = batch.user_id
        WHERE own.{key} = batch.user_id RETURNING batch.user_id)
    UPDATE {fence} AS kept SET {moves} FROM batch JOIN written ON written.user_id = batch.user_id
    WHERE kept.{id} = batch.user_id RETURNING kept.{id} AS user_id"""
INSERT_BESIDE = """WITH batch AS MATERIALIZED (SELECT * FROM {batch}),
    held AS MATERIALIZED (
        SELECT kept.{id} AS user_id FROM {fence} AS kept JOIN batch ON kept.{id} = batch.user_id
        WHERE {holds} AND kept.{absent} ORDER BY kept.{id} FOR UPDATE OF kept),
    written AS (
        INSERT INTO {table} ({key}{columns})
        SELECT batch.user_id{values} FROM batch JOIN held ON held.user_id = batch.user_id ORDER BY batch.user_id
        ON CONFLICT ({key}) DO UPDATE SET {excluded} RETURNING {key} AS user_id)
    UPDATE {fence} AS kept SET {moves} FROM batch JOIN written ON written.user_id = batch.user_id
    WHERE kept.{id} = batch.user_id RETURNING kept.{id} AS user_id"""
SAVE_INSIDE = """UPDATE {table} AS kept SET {moves}, {sets} FROM {batch}
    WHERE kept.{id} = batch.user_id AND {holds} RETURNING kept.{id} AS user_id"""
MAY_INSERT = """SELECT FROM {fence} AS kept, unnest($1::{keys}, $2::bigint[], $3::text[], $4::bigint[])
        AS batch (user_id, epoch, owner, version)
    WHERE kept.{id} = batch.user_id AND {holds} AND kept.{absent} FOR UPDATE OF kept"""
LOOK = """SELECT kept.{id} AS user_id, kept.{epoch} AS epoch, kept.{owner} AS owner, kept.{version} AS version,
        kept.{erased} AS erased, kept.{released} AS released, kept.{absent} AS absent, own.{key} IS NOT NULL AS there
    FROM {fence} AS kept LEFT JOIN {table} AS own ON own.{key} = kept.{id} WHERE kept.{id} = ANY ($1::{keys})"""
RELEASE = """UPDATE {fence} AS kept SET {released} = true
    FROM unnest($1::{keys}, $2::bigint[]) AS batch (user_id, epoch)
    WHERE kept.{id} = batch.user_id AND kept.{epoch} = batch.epoch AND kept.{owner} = $3
        AND NOT kept.{released} AND NOT kept.{erased} AND {is_fence_sound}
    RETURNING kept.{id} AS user_id, kept.{absent} AS absent"""
RELEASE_REPEATED = """UPDATE {fence} AS kept SET {released} = true
    FROM unnest($1::{keys}, $2::bigint[], $3::text[], $4::bigint[]) AS batch (user_id, epoch, owner, version)
    WHERE kept.{id} = batch.user_id AND kept.{epoch} = batch.epoch AND kept.{owner} = batch.owner
        AND kept.{version} = batch.version AND NOT kept.{released} AND NOT kept.{erased} AND {is_fence_sound}"""
# Not after an erasure (then saved_at is set): a server that had the user would find the row missing, and save the user
# again.
DELETE_UNSAVED = """DELETE FROM {fence} AS kept USING unnest($1::{keys}, $2::bigint[]) AS batch (user_id, epoch)
    WHERE kept.{id} = batch.user_id AND kept.{epoch} = batch.epoch AND kept.{released} AND kept.{absent}
        AND NOT kept.{erased} AND kept.{version} = 0 AND kept.{saved_at} IS NULL"""

ENSURE = """INSERT INTO {fence} ({id}, {epoch}, {owner}, {released}, {version}, {schema}, {erased}, {absent})
    SELECT {key}, {clock}, '', true, 0, 0, false, false FROM {table} WHERE {key} = $1 ON CONFLICT DO NOTHING"""
# In a damaged row the owner and the epoch may be unusable; the erasure then needs no owner, and takes a new epoch.
LOCK = f"""SELECT kept.{{absent}} AS absent,
        CASE WHEN kept.{{epoch}} BETWEEN 0 AND {LAST_CLAIMED - 1} THEN kept.{{epoch}} ELSE {{clock}} END AS epoch
    FROM {{fence}} AS kept
    WHERE kept.{{id}} = $1 AND ({{is_free_for_2}} OR NOT {{is_fence_sound}}) FOR UPDATE OF kept"""
DELETE = "DELETE FROM {table} WHERE {key} = $1"
IS_THERE = "SELECT EXISTS (SELECT FROM {table} WHERE {key} = $1)"
BURY_BESIDE = """UPDATE {fence} SET {epoch} = $2, {owner} = coalesce({owner}, ''), {released} = true, {version} = 0,
        {schema} = 0, {saved_at} = extract(epoch FROM clock_timestamp()), {erased} = true, {absent} = true
    WHERE {id} = $1"""
BURY_INSIDE = """INSERT INTO {table} ({id}, {epoch}, {released}, {saved_at}, {erased}, {absent})
    VALUES ($1, CASE $2::bigint WHEN 1 THEN {clock} ELSE $2 END, true, extract(epoch FROM clock_timestamp()), true,
        true)"""

LOAD = """SELECT own.{key} AS user_id, kept.{id} IS NOT NULL AS is_fenced, kept.{epoch} AS epoch, kept.{owner} AS owner,
        kept.{released} AS released, kept.{version} AS version, kept.{schema} AS schema, kept.{saved_at} AS saved_at,
        kept.{erased} AS erased, kept.{absent} AS absent, {reads}
    FROM {table} AS own LEFT JOIN {fence} AS kept ON kept.{id} = own.{key} WHERE {visible}"""
LOAD_ALONE = "SELECT own.{key} AS user_id, false AS is_fenced, {reads} FROM {table} AS own WHERE true"
ONE = " AND own.{key} = $1"
FIRST_PAGE = " AND own.{key} IS NOT NULL ORDER BY own.{key} LIMIT $1"
NEXT_PAGE = " AND own.{key} > $2 ORDER BY own.{key} LIMIT $1"

SAVE_ALONE = """UPDATE {table} AS own SET {sets} FROM unnest($1::{keys}{arrays}) AS batch (user_id{fields})
    WHERE own.{key} = batch.user_id RETURNING own.{key} AS user_id"""
INSERT_ALONE = """INSERT INTO {table} ({key}{columns})
    SELECT batch.user_id{values} FROM unnest($1::{keys}{arrays}) AS batch (user_id{fields}) ORDER BY batch.user_id
    ON CONFLICT ({key}) DO UPDATE SET {excluded} RETURNING {key} AS user_id"""


def side_table(table: str, schema: str) -> str:
    """The name of the side table of a table, quoted.

    A name that is too long is cut off, so that two tables may have the same one; the comment says whose it is.
    """
    return f"{quoted(schema)}.{quoted((PREFIX + table).encode()[:63].decode(errors='ignore'))}"


def ddl(fence: str, table: str, key: str, side: str) -> list[str]:
    """The statements that create the fence of a table. `fence` is its kind; all other names are quoted."""
    if fence == "columns":
        return [statement.format(table=table) for statement in INSIDE_DDL]
    texts = {
        "fence_text": _literal(side),
        "table_text": _literal(table),
        "comment": f"cagey-sessions, layout {LAYOUT}, of ",
    }
    return [statement.format(fence=side, table=table, key=key, **texts) for statement in SIDE_DDL]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def fence_names(fence: str, own: OwnTable, side: str, nodes: str) -> dict[str, str]:
    """What to put into statements for the names in braces."""
    names = own_names(own, 2 if fence == "none" else 8)
    inside = fence == "columns"
    names |= dict(zip(FIELDS, INSIDE if inside else FIELDS, strict=True))
    names |= {"fence": own.name if inside else side, "id": names["key"] if inside else "user_id"}
    names |= {"nodes": nodes, "clock": CLOCK}
    names["visible"] = "kept.cagey_absent IS NOT TRUE" if inside else "true"
    names["first_epoch"] = str(FIRST_EPOCH[fence])
    names["is_free_for_new"] = IS_FREE.format(who=f"excluded.{names['owner']}", **names)
    names["is_free_for_2"] = IS_FREE.format(who="$2", **names)
    texts = {"holds": HOLDS, "moves": MOVES, "batch": BATCH}
    texts |= {"is_fence_sound": IS_FENCE_SOUND, "may_be_claimed": MAY_BE_CLAIMED}
    names |= {name: text.format(**names) for name, text in texts.items()}
    return names
