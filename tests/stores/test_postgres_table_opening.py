"""`PostgresTable` on a server: settings, tables of any name and shape, which are refused, and where the fence is."""

from __future__ import annotations

import asyncio

import asyncpg
import orjson
import pytest

from cagey_sessions import (
    OptionError,
    SessionManager,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
    UnsavableError,
)
from cagey_sessions.stores import PostgresTable
from cagey_sessions.testing.conformance.base import ALREADY, INVALID, SAVED
from cagey_sessions.testing.store_conformance import claim, opened, record, release, save
from support import POSTGRES as DSN
from support import drop_schema, execute, execute_each, needs_server, new_role, until_a_lock_is_waited_for
from support.players import ANN, COLUMNS, FENCES, PLAYERS, SIDE, body, claimed, fetch, players, table

pytestmark = needs_server(DSN)


# Opening


def test_bad_settings_are_refused_at_once():
    good = {"columns": ["gold"]}
    bad = [
        (object(), "players", good),
        ("mysql://x", "players", good),
        (DSN, "", good),
        (DSN, ("a", "b", "c"), good),
        (DSN, 7, good),
        (DSN, "x" * 64, good),
        (DSN, "players", {}),
        (DSN, "players", {"columns": []}),
        (DSN, "players", {"columns": "gold"}),
        (DSN, "players", {"columns": ["gold"], "body": "data"}),
        (DSN, "players", {"columns": ["gold", "gold"]}),
        (DSN, "players", {"columns": ["id"]}),
        (DSN, "players", {"columns": [7]}),
        (DSN, "players", {**good, "fence": "yes"}),
        (DSN, "players", {**good, "insert": "INSERT"}),
        (DSN, "players", {**good, "schema": ""}),
        (DSN, "players", {**good, "timeout": 0}),
        (DSN, "players", {**good, "lease": 1}),
    ]
    for pool, name, settings in bad:
        with pytest.raises(OptionError):
            PostgresTable(pool, name, **settings)


REFUSED = [
    ("CREATE TABLE other (id int)", "no table"),
    ('CREATE TABLE "Players" (id int PRIMARY KEY, gold int)', "no table .* capitals"),
    ("CREATE TABLE t (id int PRIMARY KEY, gold int); CREATE VIEW players AS SELECT * FROM t", "is a view"),
    ("CREATE MATERIALIZED VIEW players AS SELECT 1 AS id, 2 AS gold", "is a materialized view"),
    ("CREATE TABLE players (id int PRIMARY KEY, silver int)", "no column gold"),
    ("CREATE TABLE players (user_id int PRIMARY KEY, gold int)", "no column id"),
    ("CREATE TABLE players (id int, gold int)", "not unique"),
    ("CREATE TABLE players (id int, realm int, gold int, PRIMARY KEY (id, realm))", "not unique by itself"),
    ("CREATE TABLE players (id int UNIQUE DEFERRABLE, gold int)", "not unique"),
    ("CREATE TABLE players (id int, gold int); CREATE UNIQUE INDEX ON players (id) WHERE gold > 0", "not unique"),
    ("CREATE TABLE players (id int, gold int); CREATE UNIQUE INDEX ON players ((id + 1))", "not unique"),
    ("CREATE TABLE players (id uuid PRIMARY KEY, gold int)", "key id .* is uuid"),
    ("CREATE TABLE players (id char(9) PRIMARY KEY, gold int)", "key id .* is character"),
    ("CREATE TABLE players (id int PRIMARY KEY, gold numeric)", "gold .* is numeric"),
    ("CREATE TABLE players (id int PRIMARY KEY, gold real)", "gold .* is real"),
    ("CREATE TABLE players (id int PRIMARY KEY, gold int[])", r"gold .* is integer\[\]"),
    ("CREATE TABLE players (id int PRIMARY KEY, gold timestamptz)", "gold .* is timestamp"),
    (
        "CREATE COLLATION soft (provider = icu, locale = 'und-u-ks-level2', deterministic = false); "
        "CREATE TABLE players (id text COLLATE soft PRIMARY KEY, gold int)",
        "collation",
    ),
]


@pytest.mark.parametrize(("made", "told"), REFUSED, ids=[told for _, told in REFUSED])
async def test_a_table_that_cannot_keep_users_is_refused_and_left_as_it_is(schema, made, told):
    await execute(f"SET search_path TO {schema}; {made}")
    with pytest.raises(StoreLayoutError, match=told):
        await table(schema).open()
    ours = f"SELECT relname FROM pg_class WHERE relnamespace = '{schema}'::regnamespace AND relname LIKE 'cagey%'"
    assert await fetch(ours) == []


async def test_a_body_is_json_or_text(schema):
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, data bytea)")
    with pytest.raises(StoreLayoutError, match=r"data .* is bytea"):
        await table(schema, body="data").open()


async def test_rows_that_a_policy_hides_are_not_taken_for_new_users(schema):
    await players(schema)
    async with new_role(schema) as (role, dsn):
        await execute(
            f"GRANT ALL ON SCHEMA {schema} TO {role}",
            f"GRANT ALL ON {schema}.players TO {role}",
            f"ALTER TABLE {schema}.players ENABLE ROW LEVEL SECURITY",
        )
        with pytest.raises(StoreLayoutError, match="row level security"):
            await table(schema, pool=dsn).open()
        await execute(
            f"ALTER TABLE {schema}.players DISABLE ROW LEVEL SECURITY", f"REVOKE UPDATE ON {schema}.players FROM {role}"
        )
        with pytest.raises(StoreLayoutError, match=r"^PostgreSQL: permission denied"):
            await table(schema, pool=dsn).open()


@pytest.mark.parametrize("fence", FENCES)
async def test_names_may_be_anything(schema, fence):
    name, key, column = 'Odd "name"; {drop}\'s', "User {Id}", 'g"o{l}d'
    quoted = [f'"{each.replace(chr(34), chr(34) * 2)}"' for each in (name, key, column)]
    store = table(schema, name, key=key, columns=[column], fence=fence)
    await execute(f"CREATE TABLE {schema}.{quoted[0]} ({quoted[1]} int PRIMARY KEY, {quoted[2]} int)")
    async with opened(store):
        epoch = (await claim(store)).epoch
        assert await save(store, record(epoch=epoch, body=orjson.dumps({column: 5}))) == [SAVED]
        assert (await store.load(1)).value() == {column: 5}
        assert await store.erase(1, "a")


@pytest.mark.parametrize("fence", FENCES)
async def test_columns_may_be_called_as_the_parts_of_the_statements_are(schema, fence):
    columns = ["epoch", "owner", "c0", "c1", "batch", "own", "kept", "held", "released", "absent", "version"]
    store = table(schema, key="user_id", columns=columns, fence=fence)
    await execute(
        f"CREATE TABLE {schema}.players (user_id int PRIMARY KEY, {', '.join(f'{each} int' for each in columns)})"
    )
    async with opened(store):
        epoch = (await claim(store)).epoch
        for version in (1, 2):
            data = {each: place * version for place, each in enumerate(columns)}
            assert await save(store, record(1, version, epoch=epoch, body=orjson.dumps(data))) == [SAVED]
            assert (await store.load(1)).value() == (await claim_data(store, epoch, version)) == data
            epoch = (await claim(store)).epoch
        assert await store.erase(1, "a")


async def claim_data(store, epoch, version):
    answer = await claim(store)
    if store.fenced:
        assert (answer.epoch, answer.record.version) == (epoch + 1, version)
    return answer.record.value()


async def test_side_tables_of_long_names_are_not_mixed_up(schema):
    names = ["é" * 30 + "a", "é" * 30 + "b"]
    for name in names:
        await execute(f"CREATE TABLE {schema}.{name} (id int PRIMARY KEY, gold int)")
    async with opened(table(schema, names[0])) as store:
        assert await save(store, record(epoch=(await claim(store)).epoch, body=b'{"gold":1}')) == [SAVED]
        with pytest.raises(StoreLayoutError, match="belongs to"):
            await table(schema, names[1]).open()


async def test_without_a_schema_the_search_path_says_where_the_table_is(schema):
    await players(schema)
    async with (
        asyncpg.create_pool(DSN, min_size=1, max_size=2, server_settings={"search_path": schema}) as pool,
        opened(PostgresTable(pool, "players", columns=["gold"], schema=schema)) as store,
    ):
        assert (await claim(store, 7)).record.value() == {"gold": 3}


@pytest.mark.parametrize("fence", FENCES)
async def test_a_partitioned_table_is_a_table(schema, fence):
    store = table(schema, fence=fence)
    await execute(
        f"SET search_path TO {schema}; CREATE TABLE players (id int PRIMARY KEY, gold int) PARTITION BY HASH (id); "
        "CREATE TABLE even PARTITION OF players FOR VALUES WITH (MODULUS 2, REMAINDER 0); "
        "CREATE TABLE odd PARTITION OF players FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
    )
    async with opened(store):
        epochs = await claimed(store, *range(20))
        for version in (1, 2):
            records = [record(each, version, epoch=epochs[each], body=b'{"gold":%d}' % version) for each in epochs]
            assert await save(store, *records) == [SAVED] * 20
        assert await fetch(f"SELECT count(*), min(gold) FROM {schema}.players") == [(20, 2)]


async def test_a_column_that_is_renamed_while_it_runs_costs_nothing_but_time(schema):
    async with opened(await players(schema)) as store:
        kept = record(7, 2, epoch=(await claim(store, 7)).epoch, body=body())
        await execute(f"ALTER TABLE {schema}.players RENAME gold TO silver")
        for call in (store.save_many([kept]), store.load(7), claim(store, 8)):
            with pytest.raises(StoreError, match="gold"):
                await call
        await execute(
            f"ALTER TABLE {schema}.players RENAME silver TO gold",
            f"ALTER TABLE {schema}.players ALTER gold TYPE bigint",
        )
        assert await save(store, kept) == [SAVED]
        assert (await store.load(7)).value() == ANN


async def test_domains_are_what_they_are_made_from(schema):
    await execute(
        f"SET search_path TO {schema}; CREATE DOMAIN short AS varchar(3); CREATE DOMAIN bag AS jsonb NOT NULL; "
        "CREATE DOMAIN coins AS int CHECK (VALUE >= 0); CREATE DOMAIN ident AS text; "
        "CREATE TABLE players (id ident PRIMARY KEY, name short, bag bag, gold coins)"
    )
    async with opened(table(schema, columns=["name", "bag", "gold"])) as store:
        epochs = await claimed(store, "a", "b", "c")
        data = {"a": {"name": "ann", "bag": None, "gold": 1}, "b": {"name": "anna", "bag": [], "gold": 1}}
        data["c"] = {"name": None, "bag": [], "gold": -1}
        records = [record(each, epoch=epochs[each], body=orjson.dumps(data[each])) for each in data]
        assert await save(store, *records) == [SAVED, INVALID, INVALID]
        assert (await store.load("a")).value() == data["a"]


# Where the fence is


async def test_the_side_table_of_a_table_of_the_same_name_is_left_alone(schema):
    other = f"{schema}_b"
    try:
        await execute(f"CREATE SCHEMA {other}", PLAYERS.format(schema=other))
        async with opened(await players(schema)):
            with pytest.raises(StoreLayoutError, match="belongs to"):
                await PostgresTable(DSN, (other, "players"), columns=["gold"], schema=schema).open()
    finally:
        await execute(f"DROP SCHEMA IF EXISTS {other} CASCADE")


async def test_a_schema_that_is_not_there_is_made_and_the_table_is_not_changed(schema):
    other = f"{schema}_b"
    look = f"SELECT attname, attnum FROM pg_attribute WHERE attrelid = '{schema}.players'::regclass ORDER BY attnum"
    try:
        await players(schema)
        before = await fetch(look)
        async with opened(PostgresTable(DSN, (schema, "players"), columns=["gold"], schema=other)) as store:
            assert (await claim(store, 7)).granted
        made = f"SELECT relname FROM pg_class WHERE relnamespace = '{other}'::regnamespace AND relkind = 'r' ORDER BY 1"
        assert await fetch(made) == [(SIDE,), ("cagey_sessions_nodes",)]
        assert await fetch(look) == before
    finally:
        await execute(f"DROP SCHEMA IF EXISTS {other} CASCADE")


async def test_without_create_ddl_makes_the_side_table(schema):
    await players(schema)
    store = table(schema, columns=COLUMNS, create=False)
    with pytest.raises(StoreLayoutError, match="ddl"):
        await store.open()
    await execute_each(store.ddl())
    async with opened(store, table(schema, columns=COLUMNS)) as (here, _):
        assert (await claim(here, 7)).granted


async def test_a_user_who_may_not_make_the_side_table_is_told_how_it_is_made(schema):
    await players(schema)
    other = f"{schema}_b"
    try:
        async with new_role(schema) as (role, dsn):
            await execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}", f"GRANT ALL ON {schema}.players TO {role}")
            store = PostgresTable(dsn, (schema, "players"), columns=["gold"], schema=other)
            with pytest.raises(StoreLayoutError, match=r"may not make it .*ddl"):
                await store.open()
            await execute(
                *store.ddl(),
                f"GRANT USAGE ON SCHEMA {other} TO {role}",
                f"GRANT ALL ON ALL TABLES IN SCHEMA {other} TO {role}",
            )
            async with opened(store):
                assert (await claim(store, 7)).granted
    finally:
        await drop_schema(other)


async def test_sixteen_that_open_at_once_make_one_side_table(schema):
    await players(schema)
    stores = [table(schema) for _ in range(16)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_side_table_of_another_shape_is_left_alone(schema):
    async with opened(await players(schema)):
        pass
    await execute(f"ALTER TABLE {schema}.{SIDE} DROP COLUMN absent")
    with pytest.raises(StoreLayoutError, match="shape"):
        await table(schema).open()


async def test_who_was_claimed_and_never_saved_leaves_nothing_in_the_side_table(schema):
    async with opened(await players(schema)) as store:
        assert await release(store, 8, (await claim(store, 8)).epoch, "a")
        assert await fetch(f"SELECT * FROM {schema}.{SIDE}") == []
        assert await release(store, 7, (await claim(store, 7)).epoch, "a")
        assert (await claim(store, 7)).record is not None


async def test_without_a_fence_it_is_a_store_for_one_process(schema):
    store = await players(schema, "none")
    assert not store.fenced and not store.shared and not store.keeps_schema
    assert store.ddl() == []
    async with SessionManager(store=store, user_id=int) as manager:
        old, new = await manager.open(7), await manager.open(8, default=ANN)
        old.user_data["gold"] = new.user_data["gold"] = 44
        await manager.persist_all_user_data()
        assert await fetch(f"SELECT id, gold FROM {schema}.players ORDER BY id") == [(7, 44), (8, 44)]
        async with manager.edit(9, default=ANN) as data:
            data["gold"] = 45
        assert await manager.erase(8)
        assert await manager.erase(9)
        assert not new.alive
        old.user_data["gold"] = 2**40
        with pytest.raises(UnsavableError, match="gold"):
            await old.persist_now()
        old.user_data["gold"] = 46
    assert await fetch(f"SELECT id, gold FROM {schema}.players") == [(7, 46)]
    ours = f"SELECT relname FROM pg_class WHERE relnamespace = '{schema}'::regnamespace AND relname LIKE 'cagey%'"
    assert await fetch(ours) == []


async def test_a_connection_that_dies_is_an_outage_and_not_an_answer(schema):
    async with opened(await players(schema)) as store:
        epoch = (await claim(store, 7)).epoch
        blocker = await asyncpg.connect(DSN)
        try:
            await blocker.execute(f"BEGIN; SELECT FROM {schema}.players FOR UPDATE")
            saving = asyncio.ensure_future(store.save_many([record(7, 2, epoch=epoch, body=body())]))
            await until_a_lock_is_waited_for(blocker)
            store.abort(saving)
            with pytest.raises(StoreUnavailableError):
                await saving
        finally:
            await blocker.close()
        assert await save(store, record(7, 2, epoch=epoch, body=body())) in ([SAVED], [ALREADY])
