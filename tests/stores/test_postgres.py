"""`PostgresStore` on a real server against the contract, and what is only its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid

import asyncpg
import pytest

from cagey_sessions import (
    OptionError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
)
from cagey_sessions.stores import PostgresStore
from cagey_sessions.testing.conformance.base import ALREADY, FENCED, INVALID, SAVED
from cagey_sessions.testing.store_conformance import claim, opened, record, release, save
from support import POSTGRES as DSN
from support import drop_schema, execute, execute_each, needs_server, new_role, until_a_lock_is_waited_for
from support.shared_stores import SharedStoreConformance

pytestmark = needs_server(DSN)


async def fetch(query: str):
    connection = await asyncpg.connect(DSN)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


@pytest.fixture
def schema():
    """The name of a schema of one's own."""
    name = f"cagey_{uuid.uuid4().hex}"
    yield name
    asyncio.run(drop_schema(name))


class TestPostgresStore(SharedStoreConformance):
    @pytest.fixture
    def make(self, schema):
        self.nodes = f"{schema}.cagey_sessions_nodes"
        return functools.partial(PostgresStore, DSN, schema=schema)

    async def expire(self):
        await execute(f"UPDATE {self.nodes} SET alive_until = now() - interval '1 ms'")

    async def lose_leases(self):
        await execute(f"DELETE FROM {self.nodes}")

    async def alive_until(self):
        return await fetch(f"SELECT alive_until FROM {self.nodes}")

    async def seconds_left(self):
        left = f"SELECT extract(epoch FROM alive_until - clock_timestamp()) FROM {self.nodes} WHERE owner = 'a'"
        return float(await fetch(left))

    async def bury(self, store, owner):
        await execute(
            f"UPDATE {store._names['nodes']} SET alive_until = now() - interval '1 s', doubted = true "
            f"WHERE owner = '{owner}'"
        )

    async def damage(self, store, user_id):
        await execute(f"UPDATE {store._users} SET version = -1 WHERE user_id = '{user_id}'")

    async def test_a_lease_is_renewed_after_whatever_failure(self, make, schema, caplog):
        async with opened(make(timeout=1, lease=1)) as store:
            await claim(store, 1, "a")
            nodes = f"{schema}.cagey_sessions_nodes"
            await execute(f"ALTER TABLE {nodes} RENAME TO gone")
            async with asyncio.timeout(20):
                while "could not be renewed" not in caplog.text:  # noqa: ASYNC110 - a log sets no event
                    await asyncio.sleep(0.05)
            await execute(f"ALTER TABLE {schema}.gone RENAME TO cagey_sessions_nodes")
            await self.renewal()

    async def test_calls_that_wait_for_a_locked_row_hold_up_no_lease(self, make, schema):
        async with opened(make(timeout=3, lease=3)) as store:
            epoch = (await claim(store, 1, "a")).epoch
            blocker = await asyncpg.connect(DSN)
            try:
                await blocker.execute(f"BEGIN; SELECT FROM {schema}.cagey_sessions FOR UPDATE")
                waiting = [asyncio.ensure_future(store.save_many([record(epoch=epoch)])) for _ in range(12)]
                await self.renewal()
            finally:
                await blocker.close()
            for each in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(each, (list, StoreError))


# Opening


@pytest.mark.parametrize("dsn", ["mysql://127.0.0.1/test", "", "127.0.0.1"])
def test_what_is_no_dsn_is_refused_at_once(dsn):
    with pytest.raises(OptionError):
        PostgresStore(dsn)


def test_a_dsn_and_a_pool_are_not_taken_together():
    with pytest.raises(OptionError):
        PostgresStore(DSN, pool=object())


@pytest.mark.parametrize(
    "setting",
    [
        {"schema": ""},
        {"schema": 7},
        {"timeout": 0},
        {"lease": "soon"},
        {"lease": 0.1},
        {"lease": 5},
        {"schema": "x" * 64},
    ],
)
def test_bad_settings_are_refused_at_once(setting):
    with pytest.raises(OptionError):
        PostgresStore(DSN, **setting)


async def test_a_server_that_is_not_there_is_unavailable():
    with pytest.raises(StoreUnavailableError, match=r"cannot be reached .*onnect"):
        await PostgresStore("postgresql://127.0.0.1:1/test").open()


async def test_a_database_that_is_not_there_is_told_without_its_name():
    with pytest.raises(
        StoreUnavailableError, match=r"database … does not exist; check the user, password and database"
    ):
        await PostgresStore(DSN.rpartition("/")[0] + "/no_such_database").open()


async def test_without_create_a_missing_table_is_an_error_and_ddl_makes_it(schema):
    store = PostgresStore(DSN, schema=schema, create=False)
    with pytest.raises(StoreLayoutError, match="ddl"):
        await store.open()
    await execute_each(store.ddl())
    async with opened(store):
        assert (await claim(store)).granted
    assert not any("CREATE SCHEMA" in statement for statement in PostgresStore(DSN).ddl()), "public is there"


async def test_sixteen_that_open_at_once_make_one_table(schema):
    stores = [PostgresStore(DSN, schema=schema) for _ in range(16)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_table_that_is_not_ours_is_left_alone(schema):
    await execute(f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.cagey_sessions (mine text)")
    with pytest.raises(StoreLayoutError, match="not a table of cagey-sessions"):
        await PostgresStore(DSN, schema=schema).open()


async def test_a_table_of_a_newer_version_is_left_alone(schema):
    async with opened(PostgresStore(DSN, schema=schema)):
        pass
    await execute(f"COMMENT ON TABLE {schema}.cagey_sessions IS 'cagey-sessions, layout 99'")
    with pytest.raises(StoreLayoutError, match="newer version"):
        await PostgresStore(DSN, schema=schema).open()


@pytest.mark.parametrize(
    "change", ["RENAME COLUMN saved_at TO at", "DROP CONSTRAINT cagey_sessions_pkey", "ALTER COLUMN body TYPE jsonb"]
)
async def test_a_table_of_another_shape_is_left_alone(schema, change):
    async with opened(PostgresStore(DSN, schema=schema)):
        pass
    await execute(f"ALTER TABLE {schema}.cagey_sessions {change}")
    with pytest.raises(StoreLayoutError, match="shape"):
        await PostgresStore(DSN, schema=schema).open()


async def test_a_user_who_may_only_read_is_told_so(schema):
    async with opened(PostgresStore(DSN, schema=schema)):
        pass
    async with new_role(schema) as (role, dsn):
        await execute(
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}",
        )
        with pytest.raises(StoreLayoutError, match="may not"):
            await PostgresStore(dsn, schema=schema).open()


async def test_a_server_that_is_read_only_is_unavailable(schema):
    store = PostgresStore(f"{DSN}?options=-c%20default_transaction_read_only%3Don", schema=schema)
    with pytest.raises(StoreUnavailableError, match="no writes"):
        await store.open()


async def test_the_settings_of_the_server_are_read(schema):
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        assert store.loss_class.startswith("synchronous_commit=on, synchronous_standby_names=")
    store = PostgresStore(f"{DSN}?options=-c%20synchronous_commit%3Doff", schema=schema)
    async with opened(store):
        assert "the last transactions are lost" in store.loss_class


async def test_a_schema_with_any_name_is_as_good_as_another():
    odd = 'Odd "name"; {drop}'
    quoted = '"' + odd.replace('"', '""') + '"'
    try:
        async with opened(PostgresStore(DSN, schema=odd)) as store:
            assert await save(store, record(epoch=(await claim(store)).epoch)) == [SAVED]
    finally:
        await execute(f"DROP SCHEMA IF EXISTS {quoted} CASCADE")


# Your pool


async def test_a_pool_of_yours_is_used_and_left_open(schema):
    """With a codec for JSON, as many programs set it."""

    async def set_up(connection):
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=lambda text: {"parsed": text})

    pool = await asyncpg.create_pool(DSN, min_size=1, max_size=2, init=set_up)
    try:
        async with opened(PostgresStore(pool=pool, schema=schema)) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, body=b'{"gold":1}')) == [SAVED]
            assert (await store.load(1)).body == b'{"gold":1}'
        assert await pool.fetchval("SELECT 1") == 1
    finally:
        await pool.close()


# Leases


async def test_a_claim_that_has_waited_sees_who_has_renewed_meanwhile(schema):
    """What its statement saw of the leases when it began may be seconds old."""
    async with opened(PostgresStore(DSN, schema=schema), PostgresStore(DSN, schema=schema)) as (here, there):
        await here.claim_many([1, 2], "a")
        await mark_dead(schema)
        blocker = await asyncpg.connect(DSN)
        try:
            await blocker.execute(f"BEGIN; SELECT FROM {schema}.cagey_sessions WHERE user_id = '1' FOR UPDATE")
            claiming = asyncio.ensure_future(there.claim_many([1, 2], "b"))
            await until_a_lock_is_waited_for(blocker)
            await here._leases.renew("a")
            await blocker.execute("COMMIT")
        finally:
            await blocker.close()
        assert [each.granted for each in await claiming] == [False, False]


async def mark_dead(schema):
    await execute(f"UPDATE {schema}.cagey_sessions_nodes SET alive_until = now() - interval '1 ms', doubted = true")


# Erasing


async def test_who_has_lost_an_erased_user_never_finds_them_missing(schema):
    """A missing row would be claimed again, and the erased data written again."""
    async with opened(PostgresStore(DSN, schema=schema), PostgresStore(DSN, schema=schema)) as (here, there):
        epoch = (await claim(here, 1, "a")).epoch
        assert await save(here, record(epoch=epoch)) == [SAVED]
        await mark_dead(schema)
        assert await there.erase(1, "b")
        again = await claim(there, 1, "b")
        assert await release(there, 1, again.epoch, "b")
        assert await save(here, record(version=2, epoch=epoch)) == [FENCED]


async def test_an_erasure_that_has_waited_for_the_release_is_carried_out(schema):
    async with opened(PostgresStore(DSN, schema=schema), PostgresStore(DSN, schema=schema)) as (here, there):
        epoch = (await claim(here, 1, "a")).epoch
        assert await save(here, record(epoch=epoch)) == [SAVED]
        blocker = await asyncpg.connect(DSN)
        try:
            await blocker.execute(f"BEGIN; UPDATE {schema}.cagey_sessions SET released = true")
            erasing = asyncio.ensure_future(there.erase(1, "b"))
            await until_a_lock_is_waited_for(blocker)
            await blocker.execute("COMMIT")
        finally:
            await blocker.close()
        assert await erasing


# Faults


async def test_bodies_that_are_no_json_are_refused_and_make_no_other_fail(schema):
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        epochs = {each.user_id: each.epoch for each in await store.claim_many(range(9), "a")}
        bodies = {3: b"{", 5: b"\0", 7: b"\xff"}
        verdicts = await store.save_many(
            [record(user, epoch=epoch, body=bodies.get(user, b"{}")) for user, epoch in epochs.items()]
        )
        assert [verdict.outcome for verdict in verdicts] == [INVALID if user in bodies else SAVED for user in range(9)]
        assert all(verdicts[user].detail for user in bodies)


async def test_a_call_that_is_aborted_is_unknown_and_the_store_goes_on(schema):
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        epoch = (await claim(store)).epoch
        blocker = await asyncpg.connect(DSN)
        try:
            await blocker.execute("BEGIN")
            await blocker.execute(f"SELECT FROM {schema}.cagey_sessions FOR UPDATE")
            saving = asyncio.ensure_future(store.save_many([record(epoch=epoch)]))
            await until_a_lock_is_waited_for(blocker)
            store.abort(saving)
            with pytest.raises(StoreUnavailableError):
                await saving
            await blocker.execute("ROLLBACK")
        finally:
            await blocker.close()
        assert await save(store, record(epoch=epoch)) in ([SAVED], [ALREADY])
        assert (await store.load(1)).version == 1


@pytest.mark.parametrize("pooled", [False, True], ids=["own", "pool"])
async def test_a_call_that_is_aborted_between_two_of_its_messages_is_unknown(schema, monkeypatch, pooled):
    """The driver has prepared its statement and not yet executed it: it looks for a connection it has given up."""
    prepare = asyncpg.Connection._get_statement
    aborting = False

    async def prepare_and_abort(connection, *args, **options):
        statement = await prepare(connection, *args, **options)
        if aborting:
            store.abort(asyncio.current_task())
        return statement

    monkeypatch.setattr(asyncpg.Connection, "_get_statement", prepare_and_abort)
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(asyncpg.create_pool(DSN, min_size=1, max_size=2)) if pooled else None
        settings = {"pool": pool} if pooled else {"dsn": DSN}
        store = await stack.enter_async_context(opened(PostgresStore(**settings, schema=schema)))
        epoch = (await claim(store)).epoch
        new = record(epoch=epoch)
        for call in (lambda: store.load(1), lambda: store.save_many([new]), lambda: store.claim_many([2], "b")):
            aborting = True
            with pytest.raises(StoreUnavailableError):
                await call()
            aborting = False
        assert await save(store, new) == [SAVED]


async def test_connections_that_the_server_has_ended_are_replaced(schema):
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        epoch = (await claim(store)).epoch
        await execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cagey-sessions' "
            f"AND query LIKE '%{schema}%'"
        )
        outcomes = []
        async with asyncio.timeout(10):
            while outcomes != [SAVED] and outcomes != [ALREADY]:
                try:
                    outcomes = await save(store, record(epoch=epoch))
                except StoreUnavailableError:
                    await asyncio.sleep(0.01)
        assert (await store.load(1)).version == 1


async def test_a_row_that_somebody_has_locked_is_no_outage(schema):
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        epoch = (await claim(store)).epoch
        blocker = await asyncpg.connect(DSN)
        try:
            await blocker.execute(f"BEGIN; SELECT FROM {schema}.cagey_sessions FOR UPDATE")
            with pytest.raises(StoreError) as caught:
                await store.save_many([record(epoch=epoch)])
            assert not isinstance(caught.value, StoreUnavailableError)
        finally:
            await blocker.close()


async def test_a_row_that_a_constraint_refuses_is_invalid_and_its_body_is_not_told(schema):
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        await execute(f"ALTER TABLE {schema}.cagey_sessions ADD CHECK (body->>'secret' IS NULL)")
        claims = await store.claim_many([1, 2], "a")
        bodies = [b'{"secret":"hunter2"}', b"{}"]
        verdicts = await store.save_many(
            [record(each.user_id, epoch=each.epoch, body=body) for each, body in zip(claims, bodies, strict=True)]
        )
        assert [verdict.outcome for verdict in verdicts] == [INVALID, SAVED]
        assert "hunter2" not in verdicts[0].detail


@pytest.mark.parametrize("password", ["sec/ret", "sec#ret", "se?cret"])
async def test_a_password_that_spoils_the_dsn_is_not_told(password):
    with pytest.raises(OptionError, match="percent-encoded") as caught:
        await PostgresStore(f"postgresql://root:{password}@127.0.0.1/test").open()
    assert "sec" not in str(caught.value) and "cret" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


async def test_a_store_that_is_closed_while_it_opens_keeps_no_connection(schema):
    store = PostgresStore(DSN, schema=schema)
    opening = asyncio.ensure_future(store.open())
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(StoreUnavailableError):
        await opening
    async with opened(store):
        assert (await claim(store)).granted


async def test_closing_ends_with_everything_closed_whatever_happens(schema):
    store = PostgresStore(DSN, schema=schema)
    mine = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cagey-sessions%' AND query LIKE "
    await store.open()
    await claim(store)
    assert await fetch(f"{mine} '%{schema}%'") > 0
    await execute(f"DROP SCHEMA {schema} CASCADE")
    await store.close()
    async with asyncio.timeout(10):
        while await fetch(f"{mine} '%{schema}%'"):  # noqa: ASYNC110 - the server sets no event
            await asyncio.sleep(0.01)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "cagey-sessions lease"]


async def test_a_table_that_a_crash_empties_makes_each_life_of_the_server_another(schema):
    """Also where one process of the server is killed: then the time at which it was started stays the same."""
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        await claim(store, 1)
        timeline = store.incarnation
    await execute(f"ALTER TABLE {schema}.cagey_sessions SET UNLOGGED")
    async with opened(PostgresStore(DSN, schema=schema)) as store:
        await claim(store, 1)
        assert store.incarnation.startswith(timeline)
        assert await fetch("SELECT coalesce(stats_reset::text, '') FROM pg_stat_bgwriter") in store.incarnation
        assert store.incarnation != timeline


async def test_a_lease_that_is_asked_for_while_the_store_closes_keeps_no_connection(schema, monkeypatch):
    gate, made = asyncio.Event(), []
    connect = asyncpg.connect

    async def connect_late(*args, **settings):
        await gate.wait()
        made.append(await connect(*args, **settings))
        return made[-1]

    store = PostgresStore(DSN, schema=schema)
    await store.open()
    monkeypatch.setattr(asyncpg, "connect", connect_late)
    claiming = asyncio.ensure_future(store.claim_many([1], "late"))
    await asyncio.sleep(0)
    await store.close()
    gate.set()
    with pytest.raises(StoreUnavailableError):
        await claiming
    assert [connection.is_closed() for connection in made] == [True]
    monkeypatch.undo()
    assert await fetch(f"SELECT count(*) FROM {schema}.cagey_sessions_nodes WHERE owner = 'late'") == 0


@pytest.mark.parametrize("is_pooled", [False, True])
async def test_in_another_life_of_the_server_no_connection_of_the_one_before_is_used(schema, is_pooled):
    """After a failover the old primary may live on for a while, and take what is then lost."""

    async def pid(connection):
        return await connection.fetchval("SELECT pg_backend_pid()")

    pool = await asyncpg.create_pool(DSN, min_size=1, max_size=3) if is_pooled else None
    async with opened(PostgresStore(None if pool else DSN, pool=pool, schema=schema)) as store:
        await claim(store, 1)
        before = await store._run(pid)
        store.incarnation = "another"
        await store._leases.renew("a")
        assert await store._run(pid) != before
        assert await store.load(1) is None
    if pool is not None:
        await pool.close()
