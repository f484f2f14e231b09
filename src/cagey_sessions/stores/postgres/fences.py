"""The fence of `PostgresTable`: epochs, owners and versions of users whose data is in the program's own table.

The fence is in a side table of ours, or nowhere; the statements without one have ALONE in their names. The names in
braces are filled in by `fence_names`; values are always parameters.

With a fence a save is one statement: it locks the rows of the fence that allow the save, updates the data, and sets the
new version in the fence where there was a row to update.

In READ COMMITTED a statement that has waited for a lock sees the new version of the locked row, but of all other rows
only what was committed before it began. So the data is read after the claim, and deleted after the lock, by a statement
of its own.
"""

from __future__ import annotations

from ..contract import MAX_NUMBER
from ..rows import LAST_CLAIMED
from .catalog import OwnTable, own_names
from .engine import BY_KEY, quoted

__all__ = [
    "BURY",
    "CLAIM",
    "DELETE",
    "DELETE_UNSAVED",
    "ENSURE",
    "FENCE",
    "FIELDS",
    "FIRST_PAGE",
    "HOLDERS",
    "INSERT",
    "INSERT_ALONE",
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
    "SAVE",
    "SAVE_ALONE",
    "SETTLE",
    "ddl",
    "fence_names",
    "side_table",
]

LAYOUT = 1
"""The number of the layout of the side table, kept in its comment."""
PREFIX = "cagey_sessions_fence_"
FIELDS = ("epoch", "owner", "released", "version", "schema", "saved_at", "erased", "absent")
"""The fields of a fence. `absent` says that the user has no row in the program's table, as far as we know."""

DDL = (
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

CLOCK = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
# FOR SHARE reads the leases as they are now; without it a statement that has waited for a row would see them as they
# were when it began.
IS_FREE = """(kept.released OR kept.owner = {who} OR EXISTS (SELECT FROM {nodes} AS nodes
        WHERE nodes.owner = kept.owner AND nodes.doubted AND nodes.alive_until < clock_timestamp() FOR SHARE))"""
HOLDS = """{by_key}(kept.epoch = batch.epoch AND kept.owner = batch.owner AND kept.version < batch.version
        AND kept.version >= 0 AND NOT kept.released AND NOT kept.erased) END"""
# The checks of `PostgresTable._kept`, in SQL, for a row that is to be changed.
IS_FENCE_SOUND = f"""(kept.epoch BETWEEN 1 AND {MAX_NUMBER - 1} AND kept.version BETWEEN 0 AND {MAX_NUMBER - 1}
        AND kept.released IS NOT NULL AND kept.erased IS NOT NULL AND kept.absent IS NOT NULL
        AND (kept.released OR kept.owner <> '') AND (kept.released OR NOT kept.erased)) IS TRUE"""
MAY_BE_CLAIMED = f"""({IS_FENCE_SOUND} AND kept.epoch <= {LAST_CLAIMED} AND kept.version <= {LAST_CLAIMED}
        AND kept.schema BETWEEN 0 AND {MAX_NUMBER - 1} AND (kept.saved_at IS NULL AND kept.version = 0
            OR kept.saved_at > '-Infinity' AND kept.saved_at < 'Infinity')) IS TRUE"""
MOVES = """released = batch.release, version = batch.version, schema = batch.schema, saved_at = batch.saved_at,
        absent = false"""
BATCH = """unnest($1::{keys}, $2::bigint[], $3::text[], $4::bigint[], $5::bigint[], $6::float8[], $7::boolean[]{arrays})
        AS batch (user_id, epoch, owner, version, schema, saved_at, release{fields})"""

# A new row gets an epoch above all that were ever given: the clock, in microseconds.
CLAIM = """INSERT INTO {fence} AS kept (user_id, epoch, owner, released, version, schema, erased, absent)
    SELECT user_id, {clock}, $2, false, 0, 0, false, true FROM unnest($1::{keys}) AS batch (user_id) ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET epoch = kept.epoch + 1, owner = excluded.owner, released = false, erased = false
        WHERE {may_be_claimed} AND {is_free_for_new}
    RETURNING kept.user_id, kept.epoch, kept.version, kept.schema, kept.saved_at, kept.absent"""
READ = "SELECT own.{key} AS user_id, {reads} FROM {table} AS own WHERE own.{key} = ANY ($1::{keys})"
SETTLE = """UPDATE {fence} AS kept
    SET absent = batch.absent, version = CASE WHEN batch.is_new THEN 0 ELSE kept.version END
    FROM unnest($1::{keys}, $2::bigint[], $3::boolean[], $4::boolean[]) AS batch (user_id, epoch, absent, is_new)
    WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.owner = $5) END"""
HOLDERS = """SELECT user_id, CASE WHEN released THEN '' ELSE owner END AS holder, epoch, {may_be_claimed} AS is_sound
    FROM {fence} AS kept WHERE user_id = ANY ($1::{keys})"""
FENCE = "SELECT epoch, owner, released, version, schema, saved_at, erased, absent FROM {fence} WHERE user_id = $1"

SAVE = """WITH batch AS MATERIALIZED (SELECT * FROM {batch}),
    held AS MATERIALIZED (
        SELECT kept.user_id FROM {fence} AS kept JOIN batch ON kept.user_id = batch.user_id
        WHERE {holds} ORDER BY kept.user_id FOR UPDATE OF kept),
    written AS (
        UPDATE {table} AS own SET {sets} FROM batch JOIN held ON held.user_id = batch.user_id
        WHERE own.{key} = batch.user_id RETURNING batch.user_id)
    UPDATE {fence} AS kept SET {moves} FROM batch JOIN written ON written.user_id = batch.user_id
    WHERE kept.user_id = batch.user_id RETURNING kept.user_id"""
INSERT = """WITH batch AS MATERIALIZED (SELECT * FROM {batch}),
    held AS MATERIALIZED (
        SELECT kept.user_id FROM {fence} AS kept JOIN batch ON kept.user_id = batch.user_id
        WHERE {holds} AND kept.absent ORDER BY kept.user_id FOR UPDATE OF kept),
    written AS (
        INSERT INTO {table} ({key}{columns})
        SELECT batch.user_id{values} FROM batch JOIN held ON held.user_id = batch.user_id ORDER BY batch.user_id
        ON CONFLICT ({key}) DO UPDATE SET {excluded} RETURNING {key} AS user_id)
    UPDATE {fence} AS kept SET {moves} FROM batch JOIN written ON written.user_id = batch.user_id
    WHERE kept.user_id = batch.user_id RETURNING kept.user_id"""
MAY_INSERT = """SELECT FROM {fence} AS kept, unnest($1::{keys}, $2::bigint[], $3::text[], $4::bigint[])
        AS batch (user_id, epoch, owner, version)
    WHERE kept.user_id = batch.user_id AND {holds} AND kept.absent FOR UPDATE OF kept"""
LOOK = """SELECT kept.user_id, kept.epoch, kept.owner, kept.version, kept.erased, kept.released, kept.absent,
        own.{key} IS NOT NULL AS there
    FROM {fence} AS kept LEFT JOIN {table} AS own ON own.{key} = kept.user_id WHERE kept.user_id = ANY ($1::{keys})"""
RELEASE = """UPDATE {fence} AS kept SET released = true
    FROM unnest($1::{keys}, $2::bigint[]) AS batch (user_id, epoch)
    WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.owner = $3
        AND NOT kept.released AND NOT kept.erased AND {is_fence_sound}) END
    RETURNING kept.user_id, kept.absent"""
RELEASE_REPEATED = """UPDATE {fence} AS kept SET released = true
    FROM unnest($1::{keys}, $2::bigint[], $3::text[], $4::bigint[]) AS batch (user_id, epoch, owner, version)
    WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.owner = batch.owner
        AND kept.version = batch.version AND NOT kept.released AND NOT kept.erased AND {is_fence_sound}) END"""
# Not after an erasure (then saved_at is set): a server that had the user would find the row missing, and save the user
# again.
DELETE_UNSAVED = """DELETE FROM {fence} AS kept USING unnest($1::{keys}, $2::bigint[]) AS batch (user_id, epoch)
    WHERE kept.user_id = batch.user_id AND {by_key}(kept.epoch = batch.epoch AND kept.released AND kept.absent
        AND NOT kept.erased AND kept.version = 0 AND kept.saved_at IS NULL) END"""

ENSURE = """INSERT INTO {fence} (user_id, epoch, owner, released, version, schema, erased, absent)
    SELECT {key}, {clock}, '', true, 0, 0, false, false FROM {table} WHERE {key} = $1 ON CONFLICT DO NOTHING"""
# In a damaged row the owner and the epoch may be unusable; the erasure then needs no owner, and takes a new epoch.
LOCK = f"""SELECT CASE WHEN kept.epoch BETWEEN 1 AND {LAST_CLAIMED - 1} THEN kept.epoch ELSE {{clock}} END
    FROM {{fence}} AS kept
    WHERE kept.user_id = $1 AND ({{is_free_for_2}} OR NOT {{is_fence_sound}}) FOR UPDATE OF kept"""
DELETE = "DELETE FROM {table} WHERE {key} = $1"
IS_THERE = "SELECT EXISTS (SELECT FROM {table} WHERE {key} = $1)"
BURY = """UPDATE {fence} SET epoch = $2, owner = coalesce(owner, ''), released = true, version = 0, schema = 0,
        saved_at = extract(epoch FROM clock_timestamp()), erased = true, absent = true
    WHERE user_id = $1"""

LOAD = """SELECT own.{key} AS user_id, kept.user_id IS NOT NULL AS is_fenced, kept.epoch, kept.owner, kept.released,
        kept.version, kept.schema, kept.saved_at, kept.erased, kept.absent, {reads}
    FROM {table} AS own LEFT JOIN {fence} AS kept ON kept.user_id = own.{key}"""
LOAD_ALONE = "SELECT own.{key} AS user_id, false AS is_fenced, {reads} FROM {table} AS own"
ONE = " WHERE own.{key} = $1"
FIRST_PAGE = " WHERE own.{key} IS NOT NULL ORDER BY own.{key} LIMIT $1"
NEXT_PAGE = " WHERE own.{key} > $2 ORDER BY own.{key} LIMIT $1"

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


def ddl(table: str, key: str, side: str) -> list[str]:
    """The statements that create the side table `side` of a table with the key column `key`. All names are quoted."""
    texts = {
        "fence_text": _literal(side),
        "table_text": _literal(table),
        "comment": f"cagey-sessions, layout {LAYOUT}, of ",
    }
    return [statement.format(fence=side, table=table, key=key, **texts) for statement in DDL]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def fence_names(own: OwnTable, side: str, nodes: str, *, fenced: bool) -> dict[str, str]:
    """What to put into statements for the names in braces: into those with a fence, or into those without one."""
    names = own_names(own, 8 if fenced else 2) | {"fence": side, "nodes": nodes, "clock": CLOCK, "by_key": BY_KEY}
    names |= {"holds": HOLDS.format(**names), "moves": MOVES, "batch": BATCH.format(**names)}
    names |= {"is_fence_sound": IS_FENCE_SOUND, "may_be_claimed": MAY_BE_CLAIMED}
    names |= {"is_free_for_new": IS_FREE.format(who="excluded.owner", **names)}
    names |= {"is_free_for_2": IS_FREE.format(who="$2", **names)}
    return names
