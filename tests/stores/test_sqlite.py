"""`SQLiteStore` against the contract, and what is only its own: its transactions, its thread, calls that end early."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cagey_sessions import (
    CorruptRecordError,
    OptionError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
    WrongLoopError,
)
from cagey_sessions.stores import Outcome, Record, SQLiteStore
from cagey_sessions.stores.sqlite import rows as sqlite_rows
from cagey_sessions.testing.conformance.base import ALREADY, ERASED, FENCED, INVALID, MISSING, SAVED, every_call
from cagey_sessions.testing.store_conformance import (
    StoreConformance,
    StoreMachine,
    claim,
    everything,
    machine_test,
    opened,
    record,
    release,
    save,
)
from support import turns
from support.watched_sqlite import blocking, reading, saved

ENDLESS = "(WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n)"


class TestSQLiteStore(StoreConformance):
    @pytest.fixture
    def make(self, tmp_path):
        self.file = tmp_path / "users.db"
        return lambda: SQLiteStore(self.file)

    async def damage(self, store, user_id):
        with closing(sqlite3.connect(self.file)) as connection, connection:
            connection.execute("UPDATE cagey_sessions SET version = 'x' WHERE user_id = ?", (user_id,))


class SQLiteMachine(StoreMachine):
    def make(self):
        self.folder = tempfile.TemporaryDirectory()
        return SQLiteStore(Path(self.folder.name) / "users.db", synchronous="NORMAL")

    def teardown(self):
        super().teardown()
        self.folder.cleanup()


TestSQLiteMachine = pytest.mark.slow(machine_test(SQLiteMachine, 40))


@pytest.fixture
def store(path: Path) -> SQLiteStore:
    return SQLiteStore(path)


async def gathered(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


# Group commit


async def test_calls_that_wait_share_a_transaction(store, path, writer):
    async with opened(store):
        epochs = await saved(store, *range(101))
        writer.statements.clear()
        with blocking(path) as let_go:
            calls = [asyncio.ensure_future(save(store, record(each, 2, epoch=epochs[each]))) for each in epochs]
            await turns()
            let_go()
            assert await asyncio.gather(*calls) == [[SAVED]] * 101
        # the first may have gone alone, 64 at a time come after it
        assert 1 <= writer.statements.count("COMMIT") <= 3
        assert writer.statements.count("COMMIT") == writer.statements.count("BEGIN IMMEDIATE")


async def test_nobody_is_told_before_the_commit(store, path, writer):
    loop = asyncio.get_running_loop()
    async with opened(store):
        epochs = await saved(store, 1)
        calls: list[asyncio.Future[Any]] = []
        seen: list[Any] = []

        def at_commit() -> None:
            asyncio.run_coroutine_threadsafe(turns(), loop).result(10)
            with reading(path) as reader:
                (version,) = reader.execute("SELECT version FROM cagey_sessions WHERE user_id = 1").fetchone()
            seen.append((version, [call.done() for call in calls]))

        writer.at["COMMIT"] = at_commit
        calls += [
            asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1]))),
            asyncio.ensure_future(claim(store, 2)),
            asyncio.ensure_future(store.load(1)),
        ]
        await asyncio.gather(*calls)
        del writer.at["COMMIT"]
        assert seen[0] == (1, [False] * 3)
        with reading(path) as reader:
            assert reader.execute("SELECT version FROM cagey_sessions WHERE user_id = 1").fetchone() == (2,)


async def test_a_commit_that_fails_is_nobodys_success(store, path, writer):
    async with opened(store):
        epochs = await saved(store, 1)
        writer.connection.fail = "COMMIT"
        with blocking(path) as let_go:
            calls = [
                asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1]))),
                asyncio.ensure_future(claim(store, 2)),
                asyncio.ensure_future(store.erase(1, "a")),
            ]
            await turns()
            let_go()
            answers = await gathered(*calls)
        failed = [each for each in answers if isinstance(each, StoreUnavailableError)]
        assert failed and "disk is full" in str(failed[0])
        assert isinstance(answers[0], StoreUnavailableError), "it was in the first transaction"
        # what was not in that transaction came after it, on a connection of its own
        after = await store.load(1)
        assert after is None if answers[2] is True else after == record(epoch=epochs[1])


async def test_a_job_that_fails_in_a_transaction_fails_alone(store, path):
    async with opened(store):
        epochs = await saved(store, 1)
        with blocking(path) as let_go:
            calls = [
                asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1]))),
                asyncio.ensure_future(store.claim_many([7, 2**63, 8], "a")),  # more than SQLite can bind
                asyncio.ensure_future(claim(store, 2)),
            ]
            await turns()
            let_go()
            first, second, third = await gathered(*calls)
        assert first == [SAVED]
        assert isinstance(second, OverflowError)
        assert third.granted
        assert await save(store, record(7), record(8)) == [MISSING, MISSING], "a call is done as a whole, or not at all"


# Many rows


FATES = {
    # what becomes of a record for a row of version 5: what is sent, the outcome, whether it is written or releases
    "next": ({"version": 6}, SAVED, True, False),
    "last": ({"version": 9, "release": True}, SAVED, True, True),
    "repeated": ({"version": 5}, ALREADY, False, False),
    "last repeated": ({"version": 5, "release": True}, ALREADY, False, True),
    "late": ({"version": 4, "release": True}, ALREADY, False, False),
    "of a claim before": ({"version": 6, "epoch": 0, "release": True}, FENCED, False, False),
    "of another owner": ({"version": 6, "owner": "b", "release": True}, FENCED, False, False),
    "not text": ({"version": 6, "body": b"\xff", "release": True}, INVALID, False, False),
    "not there": ({"version": 6}, MISSING, False, False),
    "erased": ({"version": 6}, ERASED, False, False),
    "next for a name": ({"version": 6, "body": '"é\U0001f409"'.encode()}, SAVED, True, False),
}


@pytest.mark.parametrize("variables", [None, 60])
@pytest.mark.parametrize("number", [1, 2, 199, 200, 201, 3000])
async def test_of_many_rows_each_has_its_own_verdict(path, writer, number, variables):
    fates = dict(zip(range(number), itertools.cycle(FATES), strict=False))
    users = {each: str(each) if fate == "next for a name" else each for each, fate in fates.items()}
    async with opened(SQLiteStore(path, synchronous="NORMAL")) as store:
        if variables:
            writer.connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, variables)
        there = [users[each] for each, fate in fates.items() if fate != "not there"]
        claims = await store.claim_many(there, "a")
        assert [(type(each.user_id), each.user_id, each.record) for each in claims] == [
            (type(each), each, None) for each in there
        ]
        epochs = {each.user_id: each.epoch for each in claims}
        first = [record(each, 5, epoch=epochs[each], body=b'"%d"' % len(str(each))) for each in there]
        assert await save(store, *first) == [SAVED] * len(there)
        gone = {users[each] for each, fate in fates.items() if fate == "erased"}
        assert all(await asyncio.gather(*(store.erase(each, "a") for each in gone)))
        model = {each.user_id: each for each in first if each.user_id not in gone}
        batch, expected = [], []
        for each, fate in fates.items():
            changes, outcome, written, released = FATES[fate]
            made = record(users[each], epoch=epochs.get(users[each], 1), body=b'"%d"' % each)._replace(**changes)
            batch.append(made)
            expected.append(outcome)
            if written:
                model[users[each]] = made._replace(release=False)
            if released:
                model[users[each]] = model[users[each]]._replace(owner="")
        assert await save(store, *batch) == expected
        assert await everything(store) == {(type(each), each): kept for each, kept in model.items()}
        known = {each: kept._replace(epoch=kept.epoch + 1, owner="c") for each, kept in model.items()}
        assert [each.record for each in await store.claim_many(there, "c")] == [known.get(each) for each in there]


# Durability


@pytest.mark.parametrize(("synchronous", "number"), [("FULL", 2), ("NORMAL", 1)])
async def test_synchronous_is_what_was_asked_for_on_every_connection(path, writer, synchronous, number):
    store = SQLiteStore(path, synchronous=synchronous)
    async with opened(store):
        for _ in range(2):
            assert writer.connection.execute("PRAGMA synchronous").fetchone() == (number,)
            assert writer.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            writer.connection.fail = "COMMIT"
            with pytest.raises(StoreUnavailableError):
                await store.load(1)
            await store.load(1)
        assert len(writer.connections) == 3
        assert f"synchronous={synchronous}" in store.loss_class
        assert "journal_mode=wal" in store.loss_class
        assert ("the last transactions when the machine does" in store.loss_class) is (synchronous == "NORMAL")


async def test_full_is_the_default(store):
    async with opened(store):
        assert "synchronous=FULL" in store.loss_class


@pytest.mark.parametrize("synchronous", ["OFF", "full", "", None, 2])
def test_other_kinds_of_synchronous_are_refused(path, synchronous):
    with pytest.raises(OptionError):
        SQLiteStore(path, synchronous=synchronous)


@pytest.mark.parametrize("path", ["", ":memory:", None, 7])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(OptionError):
        SQLiteStore(path)


# What is left behind


async def test_a_user_who_was_never_saved_leaves_nothing_behind(path, store):
    async with opened(store):
        epochs = await saved(store, 1)
        for user_id in range(100, 130):
            assert await release(store, user_id, (await claim(store, user_id)).epoch, "a")
        assert await release(store, 1, epochs[1], "a")
        with reading(path) as reader:
            assert reader.execute("SELECT user_id FROM cagey_sessions").fetchall() == [(1,)]
        assert await save(store, record(100)) == [MISSING]


async def test_epochs_rise_over_a_new_open(path, store):
    seen = []
    for _ in range(3):
        async with opened(store):
            epoch = (await claim(store)).epoch
            seen.append(epoch)
            assert await release(store, 1, epoch, "a")
    async with opened(store):
        epoch = (await claim(store)).epoch
        assert seen == sorted({*seen}) and epoch > seen[-1]
        assert await save(store, record(epoch=seen[0])) == [FENCED]


async def test_the_owner_of_before_is_dead_when_the_file_is_opened_again(path, store):
    async with opened(store):
        epochs = await saved(store, 1)
    async with opened(SQLiteStore(path)) as again:
        taken = await claim(again, 1, "b")
        assert taken.granted
        assert taken.epoch == epochs[1] + 1
        assert await again.erase(1, "c")


# Calls that end early


@pytest.mark.parametrize("reads", [True, False])
async def test_abort_ends_a_statement_that_does_not_end(store, writer, monkeypatch, reads):
    async with opened(store):
        epochs = await saved(store, 1)
        running = threading.Event()
        writer.at["SELECT 1, " if reads else "INSERT"] = running.set
        with monkeypatch.context() as patch:
            if reads:
                patch.setattr(sqlite_rows, "LOAD", f"SELECT 1, ?, ?, {ENDLESS}")
                call = asyncio.ensure_future(store.load(1))
            else:
                patch.setattr(sqlite_rows, "SAVE", f"{sqlite_rows.SAVE} WHERE {ENDLESS} > 0")
                call = asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1])))
            assert await asyncio.to_thread(running.wait, 10)
            assert not call.done()
            store.abort(call)
            with pytest.raises(StoreUnavailableError, match="interrupted"):
                await call
        assert await store.load(1) == record(1, epoch=epochs[1])
        assert await save(store, record(1, 2, epoch=epochs[1])) == [SAVED]


async def test_abort_when_nothing_runs_does_nothing(store):
    async def nothing() -> None:
        return

    call = asyncio.ensure_future(nothing())
    store.abort(call)
    async with opened(store):
        await saved(store, 1)
        store.abort(call)
        assert (await store.load(1)) is not None
    store.abort(call)
    await call


async def test_a_call_that_is_cancelled_while_it_waits_is_done_or_not_and_harms_nobody(path, store):
    async with opened(store):
        epochs = await saved(store, 1, 2, 3)
        with blocking(path) as let_go:
            calls = [asyncio.ensure_future(save(store, record(each, 2, epoch=epochs[each]))) for each in (1, 2, 3)]
            await turns()
            calls[1].cancel()
            await turns()
            let_go()
            first, second, third = await gathered(*calls)
        assert (first, third) == ([SAVED], [SAVED])
        assert isinstance(second, asyncio.CancelledError)
        assert await save(store, record(2, 2, epoch=epochs[2])) in ([SAVED], [ALREADY])
        assert (await store.load(2)).version == 2


async def test_close_finishes_what_waits(path, store):
    async with opened(store):
        epochs = await saved(store, *range(100))
        with blocking(path) as let_go:
            calls = [asyncio.ensure_future(save(store, record(each, 2, epoch=epochs[each]))) for each in epochs]
            await turns()
            ending = asyncio.ensure_future(store.close())
            await turns()
            assert not ending.done()
            with pytest.raises(StoreUnavailableError):
                await store.load(1)
            await store.close()  # the second has nothing to do
            let_go()
            assert await asyncio.gather(*calls) == [[SAVED]] * 100
            await ending
    async with opened(store):
        assert {each.version async for each in store.scan()} == {2}


async def test_a_close_that_is_cancelled_goes_on(path, store):
    await store.open()
    epochs = await saved(store, 1)
    with blocking(path) as let_go:
        call = asyncio.ensure_future(save(store, record(1, 2, epoch=epochs[1])))
        await turns()
        ending = asyncio.ensure_future(store.close())
        await turns()
        ending.cancel()
        await turns()
        let_go()
        assert await call == [SAVED]
    with pytest.raises(asyncio.CancelledError):
        await ending
    async with opened(store):
        assert (await store.load(1)).version == 2


async def test_close_leaves_one_file_and_an_empty_log(tmp_path, path, store):
    async with opened(store):
        await saved(store, 1)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, path.name + ".lock"}


def test_another_loop_is_refused_and_may_close(path):
    store = SQLiteStore(path)

    async def on_another() -> None:
        for call in every_call(store):
            with pytest.raises(WrongLoopError):
                await call
        async with asyncio.timeout(10):
            await store.close()
            await store.open()
            await saved(store, 1)
            await store.close()

    with asyncio.Runner() as one, asyncio.Runner() as other:
        one.run(store.open())
        other.run(on_another())
        one.run(store.open())
    asyncio.run(on_another_after_all(store))


async def on_another_after_all(store: SQLiteStore) -> None:
    """The loop it was opened on is closed."""
    async with asyncio.timeout(10):
        await store.close()
        async with opened(store):
            assert (await store.load(1)) is not None


# What another program may have written


async def test_a_row_whose_id_is_only_equal_to_an_id_is_of_nobody(store, path):
    async with opened(store):
        epochs = await saved(store, 1, 2)
        await store.release_many([(1, epochs[1])], "a")
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE cagey_sessions SET user_id = 1.0 WHERE user_id = 1")
        refused, granted = await store.claim_many([1, 2], "a")
        assert isinstance(refused, CorruptRecordError) and "of another type" in str(refused)
        assert granted.granted
        with pytest.raises(CorruptRecordError, match="of another type"):
            await store.load(1)
        assert [type(each) for each in [each async for each in store.scan()]] == [StoreError, Record]
        assert await store.erase(1)
        assert (await claim(store, 1)).record is None


@pytest.mark.parametrize("user_id", ["x'ff'", "CAST(x'ff' AS TEXT)", "''", "1.5", "CAST(x'610062' AS TEXT)", "1e30"])
async def test_an_id_that_is_none_is_told_by_a_scan_which_goes_on(store, path, user_id):
    async with opened(store):
        await saved(store, 1, 2)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(f"UPDATE cagey_sessions SET user_id = {user_id} WHERE user_id = 1")
        found = [each async for each in store.scan()]
        assert sorted(type(each).__name__ for each in found) == ["Record", "StoreError"]


async def test_an_owner_that_is_no_text_makes_no_other_fail(store, path):
    async with opened(store):
        epochs = await saved(store, 1, 2)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE cagey_sessions SET owner = CAST(x'ff' AS TEXT) WHERE user_id = 1")
        with pytest.raises(CorruptRecordError):
            await store.holder(1)
        assert await save(store, *(record(user, 2, epoch=epoch) for user, epoch in epochs.items())) == [
            Outcome.FAILED,
            SAVED,
        ]
        assert [type(each) for each in [each async for each in store.scan()]] == [CorruptRecordError, Record]


async def test_rows_with_any_number_of_their_own_are_scanned(store, path):
    async with opened(store):
        await saved(store, 1, 2)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE cagey_sessions SET rowid = -7 WHERE user_id = 1")
        assert {each.user_id async for each in store.scan()} == {1, 2}


@pytest.mark.parametrize("change", ["DELETE FROM", "INSERT INTO", "x", "-1", "1.5", "9007199254740991"])
async def test_a_file_that_does_not_say_where_epochs_begin_is_left_alone(store, path, change):
    async with opened(store):
        await saved(store, 1)
    table = "cagey_sessions_epochs"
    statement = {"DELETE FROM": f"DELETE FROM {table}", "INSERT INTO": f"INSERT INTO {table} VALUES (1)"}.get(
        change, f"UPDATE {table} SET highest_deleted = '{change}'"
    )
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)
    with pytest.raises(StoreLayoutError, match="not of the shape"):
        await store.open()


async def test_without_an_epoch_to_begin_with_nobody_is_new(store, path):
    async with opened(store):
        await saved(store, 1)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("DELETE FROM cagey_sessions_epochs")
        with pytest.raises(StoreLayoutError, match="which epoch"):
            await store.claim_many([2], "a")
