"""`PostgresTable` on a server against the contract: new users, rows that others delete, erasure, writers at once."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import orjson
import pytest

from cagey_sessions import OwnedElsewhereError, SessionManager, StoreError
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
from support import execute, needs_server, until_a_lock_is_waited_for
from support.players import ANN, COLUMNS, FENCES, SIDE, body, claimed, fetch, players, table

pytestmark = needs_server(DSN)


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
    @pytest.fixture
    def make(self, schema):
        def make():
            return Both(DSN, (schema, "players"), body="data", schema=schema)

        self.schema = schema
        asyncio.run(execute(f"CREATE TABLE {schema}.players (id text PRIMARY KEY, data json, email text)"))
        return make

    async def bury(self, store, owner):
        await bury_in(self.schema, owner)

    async def damage(self, store, user_id):
        await execute(f"UPDATE {self.schema}.{SIDE} SET version = -1 WHERE user_id = '{store.key_of(user_id)}'")


class TestPostgresTable(Contract):
    """With its fence in a side table."""


class Machine(StoreMachine):
    """With the members of its bodies in columns; what is read back is put together from them."""

    def make(self):
        self.schema = f"cagey_{uuid.uuid4().hex}"
        store = Both(DSN, (self.schema, "players"), columns=["epoch", "version"], schema=self.schema)
        table = (
            f"CREATE TABLE {self.schema}.players "
            "(id text PRIMARY KEY, epoch bigint NOT NULL DEFAULT 0, version int NOT NULL DEFAULT 0)"
        )
        self.runner.run(execute(f"CREATE SCHEMA {self.schema}", table))
        return store

    # no rules here: a lease comes back to life with its owner's next claim, and ends with the store
    def die(self, owner):
        raise NotImplementedError

    def open_again(self):
        raise NotImplementedError

    def teardown(self):
        self.runner.run(execute(f"DROP SCHEMA {self.schema} CASCADE"))
        super().teardown()


TestPostgresTableHistories = machine_test(Machine, 10)


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


# New users


@pytest.mark.parametrize("fence", FENCES)
async def test_a_new_user_whose_row_takes_more_than_we_know_is_told_so(schema, fence):
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, email text NOT NULL UNIQUE, gold int)")
    async with opened(table(schema, fence=fence)) as store:
        epoch = (await claim(store)).epoch
        (verdict,) = await store.save_many([record(epoch=epoch, body=b'{"gold":1}')])
        assert verdict.outcome == INVALID
        assert "email" in verdict.detail and "insert=" in verdict.detail
        await execute(f"INSERT INTO {schema}.players VALUES (1, 'a@b')")
        assert await save(store, record(epoch=epoch, body=b'{"gold":1}')) == [SAVED], "somebody has made the row"


@pytest.mark.parametrize("fence", FENCES)
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
        last = f"UPDATE players SET gold = 77; UPDATE {SIDE} SET released = true, version = 5, saved_at = 1.5"
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
