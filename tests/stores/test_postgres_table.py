"""`PostgresTable` on a real server against the contract, and what it does to a table that is somebody else's."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import orjson
import pytest

from cagey_sessions import (
    CorruptRecordError,
    OptionError,
    OwnedElsewhereError,
    RecordError,
    SessionManager,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
    UnsavableError,
)
from cagey_sessions.stores import PostgresTable
from cagey_sessions.testing.conformance.base import ALREADY, ERASED, FENCED, INVALID, MISSING, SAVED
from cagey_sessions.testing.store_conformance import (
    StoreConformance,
    StoreMachine,
    claim,
    machine_test,
    opened,
    record,
    save,
)
from support import POSTGRES as DSN
from support import drop_schema, execute, needs_server, new_role, until_a_lock_is_waited_for

SORTED = orjson.OPT_SORT_KEYS
"""A jsonb has its members in an order of its own."""


pytestmark = needs_server(DSN)


async def fetch(statement: str) -> list[tuple]:
    connection = await asyncpg.connect(DSN)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


@pytest.fixture
def schema():
    """The name of a schema of one's own."""
    name = f"cagey_{uuid.uuid4().hex}"
    asyncio.run(execute(f"CREATE SCHEMA {name}"))
    yield name
    asyncio.run(drop_schema(name))


# The contract: its users are numbers and texts, which one key column tells apart only if the keys say what they are


class Both(PostgresTable):
    """Numbers and texts in one column of text, as `key_of` and its inverse have them."""

    def key_of(self, user_id):
        return f"s{user_id}" if isinstance(user_id, str) else f"i{user_id}"

    def user_id_of(self, key):
        return key[1:] if key.startswith("s") else int(key[1:])


async def bury_in(schema, owner):
    await execute(
        f"UPDATE {schema}.cagey_sessions_nodes SET alive_until = now() - interval '1 s', doubted = true "
        f"WHERE owner = '{owner}'"
    )


class Contract(StoreConformance):
    fence = ""

    @pytest.fixture
    def make(self, schema):
        def make():
            return Both(DSN, (schema, "players"), body="data", fence=self.fence, schema=schema)

        self.schema = schema
        more = (make().ddl(),) if self.fence == "columns" else ()
        asyncio.run(execute(f"CREATE TABLE {schema}.players (id text PRIMARY KEY, data json, email text)", *more))
        return make

    async def bury(self, store, owner):
        await bury_in(self.schema, owner)


class TestSideTable(Contract):
    loops = ("asyncio",)
    fence = "side_table"


class TestFenceColumns(Contract):
    loops = ("uvloop",)
    fence = "columns"


class Machine(StoreMachine):
    """With the members of its bodies in columns; what is read back is put together from them."""

    fence = ""

    def make(self):
        self.schema = f"cagey_{uuid.uuid4().hex}"
        store = Both(DSN, (self.schema, "players"), columns=["epoch", "version"], fence=self.fence, schema=self.schema)
        table = (
            f"CREATE TABLE {self.schema}.players "
            "(id text PRIMARY KEY, epoch bigint NOT NULL DEFAULT 0, version int NOT NULL DEFAULT 0)"
        )
        more = (store.ddl(),) if self.fence == "columns" else ()
        self.runner.run(execute(f"CREATE SCHEMA {self.schema}", table, *more))
        return store

    # no rules here: a lease comes back to life with its owner's next claim, and ends with the store
    def die(self, owner):
        raise NotImplementedError

    def open_again(self):
        raise NotImplementedError

    def teardown(self):
        self.runner.run(execute(f"DROP SCHEMA {self.schema} CASCADE"))
        super().teardown()


class SideTableMachine(Machine):
    fence = "side_table"


class ColumnsMachine(Machine):
    fence = "columns"


TestSideTableHistories = machine_test(SideTableMachine, 10)
TestColumnsHistories = machine_test(ColumnsMachine, 10)


# Their table

PLAYERS = """CREATE TABLE {schema}.players (
    id bigint PRIMARY KEY,
    email text,
    gold int NOT NULL DEFAULT 0,
    name varchar(5),
    speed double precision,
    banned boolean,
    bag json NOT NULL DEFAULT '[]',
    notes jsonb
)"""
COLUMNS = ["gold", "name", "speed", "banned", "bag", "notes"]
ANN = {"gold": 3, "name": "ann", "speed": 0.5, "banned": False, "bag": ["rope", {"é": None}], "notes": {"b": 1, "a": 2}}
FENCES = ["side_table", "columns", "none"]


def body(**changed):
    return orjson.dumps({**ANN, **changed})


def table(schema, name="players", *, pool=DSN, **settings):
    if "body" not in settings:
        settings = {"columns": ["gold"], **settings}
    return PostgresTable(pool, (schema, name), schema=schema, **settings)


async def players(schema, fence="side_table", **settings):
    """The table above, as it has always been, with one user."""
    settings = {"columns": COLUMNS, "fence": fence, **settings}
    store = table(schema, **settings)
    await execute(
        PLAYERS.format(schema=schema),
        *([store.ddl()] if fence == "columns" else []),
        f"INSERT INTO {schema}.players (id, email, gold, bag) VALUES (7, 'ann@example.org', 3, '[\"rope\"]')",
    )
    return store


async def claimed(store, *user_ids, owner="a"):
    return {each.user_id: each.epoch for each in await store.claim_many(user_ids, owner)}


@pytest.mark.parametrize("fence", FENCES)
async def test_a_user_who_was_there_before_is_loaded_from_the_columns(schema, fence):
    async with opened(await players(schema, fence)) as store:
        answer = await claim(store, 7)
        expected = {"gold": 3, "name": None, "speed": None, "banned": None, "bag": ["rope"], "notes": None}
        assert answer.granted and answer.record.value() == expected
        assert answer.record.version == 1
        assert (await store.load(7)).value() == expected
        assert [each.value() async for each in store.scan()] == [expected]
        assert (await claim(store, 8)).record is None
        if fence != "none":
            assert answer.epoch > 1_600_000_000_000_000, "the clock, in microseconds"


@pytest.mark.parametrize("fence", FENCES)
async def test_only_the_listed_columns_are_written(schema, fence):
    async with opened(await players(schema, fence)) as store:
        epochs = await claimed(store, 7, 8)
        await execute(f"UPDATE {schema}.players SET email = 'new@example.org' WHERE id = 7")
        records = [record(each, 2, epoch=epochs[each], body=body(gold=each)) for each in (7, 8)]
        assert await save(store, *records) == [SAVED, SAVED]
        rows = await fetch(
            f"SELECT id, email, gold, name, speed, banned, bag->>0, notes FROM {schema}.players ORDER BY id"
        )
        assert rows == [
            (7, "new@example.org", 7, "ann", 0.5, False, "rope", '{"a": 2, "b": 1}'),
            (8, None, 8, "ann", 0.5, False, "rope", '{"a": 2, "b": 1}'),
        ]
        for each in (7, 8):
            assert (await store.load(each)).value() == {**ANN, "gold": each}
            assert list((await store.load(each)).value()) == COLUMNS


async def test_a_batch_of_users_who_are_there_is_one_statement(schema):
    statements = []

    async def listen(connection):
        connection.add_query_logger(lambda done: statements.append(done.query))

    await players(schema)
    await execute(f"INSERT INTO {schema}.players (id) SELECT * FROM generate_series(100, 299)")
    async with asyncpg.create_pool(DSN, min_size=1, max_size=2, init=listen) as pool:
        async with opened(table(schema, pool=pool)) as store:
            epochs = await claimed(store, *range(100, 300))
            statements.clear()
            records = [record(each, 2, epoch=epoch, body=b'{"gold":5}') for each, epoch in epochs.items()]
            assert set(await save(store, *records)) == {SAVED}
            mine = [each for each in statements if "players" in each]
            assert len(mine) == 1 and "held" in mine[0]
        assert await pool.fetchval("SELECT 1") == 1, "a pool of yours stays open"


async def test_a_pool_with_a_codec_for_json_is_as_good(schema):
    async def set_up(connection):
        for kind in ("json", "jsonb"):
            await connection.set_type_codec(kind, schema="pg_catalog", encoder=orjson.dumps, decoder=orjson.loads)

    await players(schema)
    async with (
        asyncpg.create_pool(DSN, min_size=1, max_size=2, init=set_up) as pool,
        opened(table(schema, pool=pool, columns=COLUMNS)) as store,
    ):
        epoch = (await claim(store, 7)).epoch
        assert await save(store, record(7, 2, epoch=epoch, body=body())) == [SAVED]
        assert (await store.load(7)).value() == ANN


BAD = [
    ({"gold": 2**31}, "gold"),
    ({"gold": "much"}, "gold"),
    ({"gold": True}, "gold"),
    ({"gold": 1.0}, "gold"),
    ({"gold": None}, "gold"),
    ({"name": "longer"}, "name"),
    ({"name": "a\0"}, "name"),
    ({"name": 1}, "name"),
    ({"speed": "fast"}, "speed"),
    ({"speed": 2**53 + 1}, "speed"),
    ({"banned": 0}, "banned"),
    ({"notes": {"secret\0": 1}}, "notes"),
    ({"silver": 1}, "silver"),
]


@pytest.mark.parametrize("fence", FENCES)
async def test_data_that_a_column_cannot_take_is_invalid_and_makes_no_other_fail(schema, fence):
    async with opened(await players(schema, fence)) as store:
        epochs = await claimed(store, *range(100 + len(BAD) + 3))
        records = [
            record(100 + place, 2, epoch=epochs[100 + place], body=body(**bad)) for place, (bad, _) in enumerate(BAD)
        ]
        records += [record(each, 2, epoch=epochs[each], body=body()) for each in range(100)]
        odd = [b"[]", b'{"gold":1}', b'{"gold":NaN}']
        records += [record(100 + len(BAD) + place, 2, epoch=1, body=each) for place, each in enumerate(odd)]
        verdicts = await store.save_many(records)
        for (_, name), verdict in zip(BAD, verdicts, strict=False):
            assert verdict.outcome == INVALID and name in verdict.detail
        assert {each.outcome for each in verdicts[len(BAD) : -3]} == {SAVED}
        assert [each.outcome for each in verdicts[-3:]] == [INVALID] * 3


VALUES = {
    "gold": [0, 2**31 - 1, -(2**31), None],
    "big": [2**63 - 1, -(2**63)],
    "small": [2**15 - 1, -(2**15)],
    "speed": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1e22, 123456789.123456789, 3.0],
    "name": ["", "é\u0301", "\U0001f409", "'; DROP TABLE players; --", 'a\nb\t"\\', "{id}%s$1", "null", "NULL"],
    "banned": [True, False],
    "bag": [None, [], {}, "", 0, 1.0, {"z": 1, "a": ["\\u0000", 2**63 - 1, 1e100, -0.0]}, "null"],
    "notes": [None, [], {}, "", 0, 1.5, {"z": 1, "a": ["\\u0000", 2**63 - 1]}, True, "null"],
}


@pytest.mark.parametrize("fence", FENCES)
async def test_what_a_column_takes_comes_back_with_its_type(schema, fence):
    store = table(schema, columns=list(VALUES), fence=fence)
    await execute(
        f"""CREATE TABLE {schema}.players (id int PRIMARY KEY, gold int, big bigint, small smallint,
            speed double precision, name text, banned boolean, bag json, notes jsonb)""",
        *([store.ddl()] if fence == "columns" else []),
    )
    data = [{name: each[place % len(each)] for name, each in VALUES.items()} for place in range(9)]
    async with opened(store):
        epochs = await claimed(store, *range(9))
        for version in (1, 2):  # inserted, and updated
            records = [record(each, version, epoch=epochs[each], body=orjson.dumps(data[each])) for each in range(9)]
            assert await save(store, *records) == [SAVED] * 9
            for each in range(9):
                found = (await store.load(each)).value()
                assert orjson.dumps(found, option=SORTED) == orjson.dumps(data[each], option=SORTED)


@pytest.mark.parametrize("fence", FENCES)
async def test_what_a_constraint_or_a_trigger_refuses_is_invalid_and_the_value_is_not_told(schema, fence):
    async with opened(await players(schema, fence)) as store:
        await execute(
            f"ALTER TABLE {schema}.players ADD CONSTRAINT rich CHECK (gold < 100)",
            f"""CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'hunter2 %', NEW.name; END $$""",
            f"""CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {schema}.players
                FOR EACH ROW WHEN (NEW.name = 'eve') EXECUTE FUNCTION {schema}.refuse()""",
        )
        epochs = await claimed(store, 1, 2, 3, 7)
        bodies = {1: body(gold=123), 2: body(name="eve"), 3: body(), 7: body(gold=555)}
        verdicts = await store.save_many([record(each, 2, epoch=epochs[each], body=bodies[each]) for each in bodies])
        assert [each.outcome for each in verdicts] == [INVALID, INVALID, SAVED, INVALID]
        assert "rich" in verdicts[0].detail and "rich" in verdicts[3].detail and "trigger" in verdicts[1].detail
        assert not any(word in each.detail for each in verdicts for word in ("123", "555", "hunter2", "eve"))
        assert await save(store, record(7, 3, epoch=epochs[7], body=body())) == [SAVED], "the fence had not moved on"


@pytest.mark.parametrize("fence", ["side_table", "none"])
async def test_a_trigger_that_holds_a_row_back_moves_no_fence(schema, fence):
    async with opened(await players(schema, fence)) as store:
        await execute(
            f"CREATE FUNCTION {schema}.hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
            f"CREATE TRIGGER hold BEFORE UPDATE OR INSERT OR DELETE ON {schema}.players "
            f"FOR EACH ROW EXECUTE FUNCTION {schema}.hold()",
        )
        epochs = await claimed(store, 7, 8)
        records = [record(each, 2, epoch=epochs[each], body=body()) for each in epochs]
        verdicts = await store.save_many(records)
        assert [each.outcome for each in verdicts] == ["failed", "failed"] and "trigger" in verdicts[0].detail
        with pytest.raises(StoreError, match="trigger"):
            await store.erase(7, "a")
        await execute(f"DROP TRIGGER hold ON {schema}.players")
        assert await save(store, *records) == [SAVED, SAVED]


async def test_columns_that_the_table_makes_itself_stay_its_own(schema):
    await execute(
        f"""CREATE TABLE {schema}.players (id int PRIMARY KEY, gold int NOT NULL,
            twice int GENERATED ALWAYS AS (gold * 2) STORED, changed int NOT NULL DEFAULT 0)""",
        f"""CREATE FUNCTION {schema}.count() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.changed = OLD.changed + 1; RETURN NEW; END $$""",
        f"CREATE TRIGGER c BEFORE UPDATE ON {schema}.players FOR EACH ROW EXECUTE FUNCTION {schema}.count()",
    )
    async with opened(table(schema)) as store:
        epoch = (await claim(store)).epoch
        for version in (1, 2, 3):
            assert await save(store, record(1, version, epoch=epoch, body=b'{"gold":%d}' % version)) == [SAVED]
        assert await fetch(f"SELECT gold, twice, changed FROM {schema}.players") == [(3, 6, 2)]
    with pytest.raises(StoreLayoutError, match=r"twice .* generated"):
        await table(schema, columns=["gold", "twice"]).open()


# New users


@pytest.mark.parametrize("fence", ["side_table", "none"])
async def test_a_new_user_whose_row_takes_more_than_we_know_is_told_so(schema, fence):
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, email text NOT NULL UNIQUE, gold int)")
    async with opened(table(schema, fence=fence)) as store:
        epoch = (await claim(store)).epoch
        (verdict,) = await store.save_many([record(epoch=epoch, body=b'{"gold":1}')])
        assert verdict.outcome == INVALID
        assert "email" in verdict.detail and "insert=" in verdict.detail
        await execute(f"INSERT INTO {schema}.players VALUES (1, 'a@b')")
        assert await save(store, record(epoch=epoch, body=b'{"gold":1}')) == [SAVED], "somebody has made the row"


@pytest.mark.parametrize("fence", ["side_table", "none"])
async def test_a_function_of_the_program_makes_the_row_of_a_new_user(schema, fence):
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, email text NOT NULL UNIQUE, gold int)")
    sql = f"INSERT INTO {schema}.players (id, email) VALUES ($1, $2)"

    async def insert(connection, user_id, value):
        if value["gold"] == 0:
            raise KeyError("no such account")
        if value["gold"] == 9:
            raise TimeoutError("of a service of the program's own")
        if value["gold"] > 1:
            await connection.execute(sql, user_id, "same@example.org" if value["gold"] > 5 else f"{user_id}@b")

    async with opened(table(schema, fence=fence, insert=insert)) as store:
        epochs = await claimed(store, 1, 2, 3, 4, 5, 6)
        gold = {1: 0, 2: 1, 3: 2, 4: 6, 5: 7, 6: 9}
        records = [record(each, epoch=epochs[each], body=b'{"gold":%d}' % gold[each]) for each in gold]
        verdicts = await store.save_many(records)
        assert [each.outcome for each in verdicts] == ["failed", "failed", SAVED, SAVED, INVALID, "failed"]
        assert "KeyError" in verdicts[0].detail and "made no row" in verdicts[1].detail
        assert "TimeoutError" in verdicts[5].detail
        assert await fetch(f"SELECT * FROM {schema}.players ORDER BY id") == [(3, "3@b", 2), (4, "same@example.org", 6)]
        assert await save(store, records[1]._replace(body=b'{"gold":3}', version=2)) == [SAVED]
        assert await save(store, records[2]._replace(body=b'{"gold":0}', version=2)) == [SAVED], (
            "it is not new any more"
        )


async def test_nobody_else_makes_keys_that_are_generated_always(schema):
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, gold int)")
    async with opened(table(schema)) as store:
        (verdict,) = await store.save_many([record(epoch=(await claim(store)).epoch, body=b'{"gold":1}')])
        assert verdict.outcome == INVALID and "insert=" in verdict.detail


@pytest.mark.parametrize("fence", FENCES)
async def test_who_has_a_row_without_data_is_new(schema, fence):
    """The web site has signed them up; the game begins with its default."""
    store = table(schema, body="data", fence=fence)
    await execute(
        f"CREATE TABLE {schema}.players (id int PRIMARY KEY, email text, data jsonb)",
        *([store.ddl()] if fence == "columns" else []),
        f"INSERT INTO {schema}.players (id, email) VALUES (1, 'ann@example.org')",
    )
    async with SessionManager(store=store, user_id=int) as manager:
        session = await manager.open(1, default={"gold": 5})
        await session.persist_now()
        await session.destroy()
        assert await fetch(f"SELECT id, email, data FROM {schema}.players") == [(1, "ann@example.org", '{"gold": 5}')]
        await execute(f"UPDATE {schema}.players SET data = NULL")
        session = await manager.open(1, default={"gold": 6})
        await session.persist_now()
        await session.destroy()
        assert await manager.read(1) == {"gold": 6}, "data that was taken away begins anew, its versions too"


# A row that somebody deletes


@pytest.mark.parametrize("fence", FENCES)
async def test_a_row_that_is_deleted_is_missing_and_claimed_and_inserted_again(schema, fence):
    async with opened(await players(schema, fence)) as store:
        epoch = (await claim(store, 7)).epoch
        assert await save(store, record(7, 2, epoch=epoch, body=body())) == [SAVED]
        await execute(f"DELETE FROM {schema}.players")
        assert await save(store, record(7, 3, epoch=epoch, body=body(gold=4))) == [MISSING]
        again = await claim(store, 7)
        assert again.granted and again.record is None
        assert await save(store, record(7, 3, epoch=again.epoch, body=body(gold=4))) == [SAVED]
        assert await fetch(f"SELECT id, email, gold FROM {schema}.players") == [(7, None, 4)]


@pytest.mark.parametrize("fence", FENCES)
async def test_a_manager_reports_a_row_that_was_deleted_and_saves_it_again(schema, fence):
    reported = []
    async with SessionManager(store=await players(schema, fence), user_id=int) as manager:
        manager.on("error", lambda error, _: reported.append(type(error).__name__))
        session = await manager.open(7)
        await execute(f"DELETE FROM {schema}.players")
        session.user_data["gold"] = 9
        assert (await session.persist_now()).changed
        assert reported == ["LostRecordError"]
        assert await fetch(f"SELECT id, gold FROM {schema}.players") == [(7, 9)]


# Erasing


@pytest.mark.parametrize("fence", FENCES)
async def test_erasing_deletes_the_row_with_all_its_columns(schema, fence):
    async with opened(await players(schema, fence)) as store:
        assert await store.erase(7), "also one that was never claimed"
        assert not await store.erase(7)
        assert not await store.erase(8)
        assert await store.load(7) is None
        assert await fetch(f"SELECT email, gold FROM {schema}.players WHERE email IS NOT NULL OR gold > 0") == []
        epoch = (await claim(store, 9)).epoch
        assert await save(store, record(9, epoch=epoch, body=body())) == [SAVED]
        assert await store.erase(9, "a")
        late = await save(store, record(9, 2, epoch=epoch, body=body()))
        assert late == [MISSING if fence == "none" else ERASED]
        assert [each async for each in store.scan()] == []


async def test_a_user_whose_row_others_refer_to_is_not_erased(schema):
    async with opened(await players(schema)) as store:
        await execute(f"CREATE TABLE {schema}.orders (player bigint REFERENCES {schema}.players)")
        await execute(f"INSERT INTO {schema}.orders VALUES (7)")
        epoch = (await claim(store, 7)).epoch
        with pytest.raises(StoreError, match="orders"):
            await store.erase(7, "a")
        assert await save(store, record(7, 2, epoch=epoch, body=body())) == [SAVED], "nothing has changed"


async def test_who_signs_up_again_after_an_erasure_is_there_again(schema):
    async with opened(await players(schema)) as store:
        assert await store.erase(7)
        await execute(f"INSERT INTO {schema}.players (id, gold) VALUES (7, 1)")
        assert (await store.load(7)).value()["gold"] == 1
        again = await claim(store, 7)
        assert again.record.value()["gold"] == 1
        assert await save(store, record(7, 2, epoch=again.epoch, body=body())) == [SAVED]


# At the same moment


async def while_locked(schema, statement, call):
    """What becomes of a call that has to wait for the end of a transaction with this statement."""
    blocker = await asyncpg.connect(DSN)
    try:
        await blocker.execute(f"SET search_path TO {schema}; BEGIN; {statement}")
        calling = asyncio.ensure_future(call)
        await until_a_lock_is_waited_for(blocker)
        await blocker.execute("COMMIT")
        return await calling
    finally:
        await blocker.close()


SIDE = "cagey_sessions_fence_players"


async def test_a_save_that_waits_for_a_claim_is_fenced_and_writes_nothing(schema):
    async with opened(await players(schema)) as store:
        epoch = (await claim(store, 7)).epoch
        late = record(7, 2, epoch=epoch, body=body(gold=99))
        statement = f"UPDATE {SIDE} SET epoch = epoch + 1, owner = 'b'"
        assert await while_locked(schema, statement, save(store, late)) == [FENCED]
        assert await fetch(f"SELECT gold FROM {schema}.players") == [(3,)]


async def test_a_save_that_waits_for_the_fence_goes_on_if_that_still_holds(schema):
    async with opened(await players(schema)) as store:
        epoch = (await claim(store, 7)).epoch
        kept = record(7, 2, epoch=epoch, body=body())
        assert await while_locked(schema, f"UPDATE {SIDE} SET saved_at = 7", save(store, kept)) == [SAVED]
        assert await store.load(7) == kept
        assert await save(store, kept) == [ALREADY]


@pytest.mark.parametrize("fence", FENCES)
async def test_a_save_that_waits_for_a_change_of_another_column_keeps_that(schema, fence):
    async with opened(await players(schema, fence)) as store:
        kept = record(7, 2, epoch=(await claim(store, 7)).epoch, body=body())
        change = "UPDATE players SET email = 'new@example.org', gold = 50"
        assert await while_locked(schema, change, save(store, kept)) == [SAVED]
        assert await fetch(f"SELECT email, gold FROM {schema}.players") == [("new@example.org", 3)]


async def test_a_claim_that_waits_for_a_release_loads_what_was_saved_by_it(schema):
    async with opened(await players(schema)) as store:
        await claim(store, 7)
        last = f"UPDATE players SET gold = 77; UPDATE {SIDE} SET released = true, version = 5"
        taken = await while_locked(schema, last, claim(store, 7, "b"))
        assert taken.granted
        assert (taken.record.version, taken.record.value()["gold"]) == (5, 77)


async def test_an_erasure_that_waits_for_the_first_save_deletes_that_row(schema):
    async with opened(await players(schema)) as store:
        await claim(store, 8)
        first = f"INSERT INTO players (id, gold) VALUES (8, 1); UPDATE {SIDE} SET version = 1, absent = false"
        assert await while_locked(schema, first, store.erase(8, "a"))
        assert await store.load(8) is None
        assert await fetch(f"SELECT id FROM {schema}.players") == [(7,)]


async def test_two_servers_share_the_table_and_a_user_is_on_one(schema):
    store = await players(schema)
    async with SessionManager(store=store, user_id=int) as here:
        session = await here.open(7)
        session.user_data["gold"] = 4
        async with SessionManager(store=table(schema, columns=COLUMNS), user_id=int) as there:
            with pytest.raises(OwnedElsewhereError):
                await there.open(7)
            await session.destroy()
            assert (await there.open(7)).user_data["gold"] == 4


# Bytes


@pytest.mark.parametrize("kind", ["json", "jsonb", "text"])
async def test_a_body_comes_back_equal_and_byte_for_byte_unless_it_is_jsonb(schema, kind):
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, data {kind})")
    given = b'{"b":1.0,"aa":[null,true],"a":{"z":1,"y":2}}'
    async with opened(table(schema, body="data")) as store, opened(table(schema, body="data")) as other:
        epoch = (await claim(store)).epoch
        assert await save(store, record(epoch=epoch, body=given, release=True)) == [SAVED]
        found = await other.load(1)
        assert found.value() == orjson.loads(given)
        assert (found.body == given) == (kind != "jsonb")


async def test_members_in_the_order_of_the_columns_come_back_byte_for_byte_without_jsonb(schema):
    """For whoever else reads them: a spill of an earlier process goes by the bytes."""
    columns = ["name", "bag", "speed", "banned", "gold"]
    await players(schema)
    bag = {"z": 1.0, "a": [1e100, None, 2**63 - 1]}
    given = orjson.dumps({"name": "é", "bag": bag, "speed": 0.1, "banned": None, "gold": -5})
    async with opened(table(schema, columns=columns)) as here, opened(table(schema, columns=columns)) as there:
        epoch = (await claim(here)).epoch
        assert await save(here, record(epoch=epoch, body=given, release=True)) == [SAVED]
        assert (await claim(there, 1, "b")).record.body == given


@pytest.mark.parametrize("settings", [{"columns": COLUMNS}, {"body": "notes", "columns": None}])
async def test_who_claims_again_finds_the_bytes_it_has_written_unless_somebody_has_changed_them(schema, settings):
    """A session goes on only if they are the same: else a claim of its own that came late would end it unsaved."""
    async with opened(await players(schema, **settings)) as store:
        given = orjson.dumps(dict(reversed(ANN.items())) | {"speed": 1})
        epoch = (await claim(store, 7)).epoch
        assert await save(store, record(7, 2, epoch=epoch, body=given, release=True)) == [SAVED]
        assert (await claim(store, 7)).record.body == given
        change = "gold = 4" if settings["columns"] else "notes = '{\"gold\": 4}'"
        await execute(f"UPDATE {schema}.players SET {change}")
        assert (await claim(store, 7)).record.value()["gold"] == 4


async def test_a_change_during_the_last_save_is_saved_too(schema):
    """By then the last save has released the user, and they are claimed again: by the bytes that were written."""
    store = await players(schema)
    async with SessionManager(store=store, user_id=int) as manager:
        session = await manager.open(8, default=dict(reversed(ANN.items())))
        real, changed = store.save_many, []

        async def save_many(records):
            verdicts = await real(records)
            if not changed:
                changed.append(records[0].release)
                session.user_data["gold"] = 99
            return verdicts

        store.save_many = save_many
        await session.destroy()
        assert changed == [True]
        assert session.end_reason == "destroyed"
    assert await fetch(f"SELECT gold FROM {schema}.players WHERE id = 8") == [(99,)]


async def test_a_number_that_is_no_json_is_not_taken_for_data(schema):
    store = await players(schema)
    await execute(f"UPDATE {schema}.players SET speed = 'NaN'")
    async with SessionManager(store=store, user_id=int) as manager:
        with pytest.raises(CorruptRecordError):
            await manager.open(7)
    assert str(await fetch(f"SELECT speed FROM {schema}.players")) == "[(nan,)]"


# Ids


WRONG = [("bigint", 7, "7"), ("int", 7, 2**31), ("text", "ann", 7), ("varchar(3)", "ann", "anna")]


@pytest.mark.parametrize(("kind", "good", "user_id"), WRONG)
@pytest.mark.parametrize("fence", FENCES)
async def test_an_id_that_the_key_cannot_hold_is_an_error_before_anything_changes(schema, fence, kind, good, user_id):
    store = table(schema, fence=fence)
    more = [store.ddl()] if fence == "columns" else []
    await execute(f"CREATE TABLE {schema}.players (id {kind} PRIMARY KEY, gold int)", *more)
    async with opened(store):
        calls = [
            lambda: store.claim_many([good, user_id], "a"),
            lambda: store.release(user_id, 1, "a"),
            lambda: store.erase(user_id),
            lambda: store.load(user_id),
        ]
        for call in calls:
            with pytest.raises(RecordError, match="column id") as caught:
                await call()
            assert caught.value.user_id == user_id
        if fence == "side_table":
            assert await fetch(f"SELECT * FROM {schema}.{SIDE}") == []
        epoch = (await claim(store, good)).epoch
        records = [record(good, epoch=epoch, body=b'{"gold":1}'), record(user_id, epoch=epoch, body=b'{"gold":1}')]
        assert await save(store, *records) == [SAVED, INVALID]


@pytest.mark.parametrize("kind", ['text COLLATE "C"', 'varchar(20) COLLATE "POSIX"', "text", "smallint"])
@pytest.mark.parametrize("fence", FENCES)
async def test_keys_of_every_type_and_collation_are_found_again(schema, fence, kind):
    store = table(schema, fence=fence)
    await execute(
        f"CREATE TABLE {schema}.players (id {kind} PRIMARY KEY, gold int)",
        *([store.ddl()] if fence == "columns" else []),
    )
    users = [3, -4, 100] if kind == "smallint" else ["b", "B", "é", "a "]
    async with opened(store):
        epochs = await claimed(store, *users)
        records = [record(each, epoch=epochs[each], body=b'{"gold":1}') for each in users]
        assert await save(store, *records) == [SAVED] * len(users)
        assert {each.user_id async for each in store.scan()} == set(users)
        assert {each: (await store.load(each)).value() for each in users} == {each: {"gold": 1} for each in users}
        assert await store.erase(users[0], "a")
        assert {each.user_id async for each in store.scan()} == set(users[1:])


async def test_a_login_with_such_an_id_raises_at_once_and_nobody_else_is_kept_out(schema):
    async with SessionManager(store=await players(schema)) as manager:
        answers = await asyncio.gather(
            manager.open("ann", default=ANN), manager.open(8, default=ANN), return_exceptions=True
        )
        assert isinstance(answers[0], RecordError) and answers[0].user_id == "ann"
        assert answers[1].user_id == 8
        with pytest.raises(RecordError):
            await manager.read("ann")


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
        (DSN, "players", {**good, "insert": print, "fence": "columns"}),
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
    await execute(
        f"CREATE TABLE {schema}.{quoted[0]} ({quoted[1]} int PRIMARY KEY, {quoted[2]} int)",
        *([store.ddl()] if fence == "columns" else []),
    )
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
        f"CREATE TABLE {schema}.players (user_id int PRIMARY KEY, {', '.join(f'{each} int' for each in columns)})",
        *([store.ddl()] if fence == "columns" else []),
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
        "CREATE TABLE odd PARTITION OF players FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        *([store.ddl()] if fence == "columns" else []),
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
    await execute(store.ddl())
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
                store.ddl(),
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
        assert await store.release(8, (await claim(store, 8)).epoch, "a")
        assert await fetch(f"SELECT * FROM {schema}.{SIDE}") == []
        assert await store.release(7, (await claim(store, 7)).epoch, "a")
        assert (await claim(store, 7)).record is not None


async def test_fence_columns_that_are_not_there_are_named(schema):
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, gold int)")
    with pytest.raises(StoreLayoutError, match=r"cagey_epoch.*ddl"):
        await table(schema, fence="columns").open()


async def test_fence_columns_need_a_table_that_takes_a_row_of_the_key_alone(schema):
    store = table(schema, fence="columns")
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, gold int, email text NOT NULL)", store.ddl())
    with pytest.raises(StoreLayoutError, match="email"):
        await store.open()


async def test_with_fence_columns_a_claim_of_somebody_new_makes_a_row_that_is_no_data(schema):
    async with opened(await players(schema, "columns")) as store:
        assert (await claim(store, 8)).record is None
        assert await fetch(f"SELECT id, cagey_absent FROM {schema}.players ORDER BY id") == [(7, False), (8, True)]
        assert await store.load(8) is None
        await execute(f"UPDATE {schema}.players SET email = 'bob@example.org' WHERE id = 8")
        await store.release(8, (await claim(store, 8)).epoch, "a")
        assert await fetch(f"SELECT email FROM {schema}.players WHERE id = 8") == [("bob@example.org",)]
        await execute(f"UPDATE {schema}.players SET gold = 5, cagey_absent = false WHERE id = 8")
        assert (await claim(store, 8)).record.value()["gold"] == 5, "somebody else has filled it"


async def test_without_a_fence_it_is_a_store_for_one_process(schema):
    store = await players(schema, "none")
    assert not store.fenced and not store.shared and not store.keeps_schema
    assert store.ddl() == ""
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
