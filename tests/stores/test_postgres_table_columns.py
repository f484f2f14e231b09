"""`PostgresTable` on a server: what columns, bodies and keys of every type take, refuse, and give back."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from cagey_sessions import CorruptRecordError, RecordError, SessionManager, StoreError, StoreLayoutError
from cagey_sessions.testing.conformance.base import INVALID, SAVED
from cagey_sessions.testing.store_conformance import claim, opened, record, release, save
from support import POSTGRES as DSN
from support import execute, needs_server
from support.players import ANN, COLUMNS, FENCES, SIDE, body, claimed, fetch, players, table

SORTED = orjson.OPT_SORT_KEYS
"""A jsonb has its members in an order of its own."""


pytestmark = needs_server(DSN)


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
    ({"silver": 1}, "another one, without a column"),
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
            speed double precision, name text, banned boolean, bag json, notes jsonb)"""
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


@pytest.mark.parametrize("fence", FENCES)
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


@pytest.mark.parametrize("how", ["body", "columns"])
@pytest.mark.parametrize("kind", ["json", "jsonb"])
async def test_numbers_come_back_of_the_same_type(schema, kind, how):
    """A jsonb keeps decimal numbers, and writes none with an exponent."""
    await execute(f"CREATE TABLE {schema}.players (id int PRIMARY KEY, data {kind})")
    numbers = [
        1e15,
        1e16,
        -1e16,
        1.5e16,
        1e20,
        1.8446744073709552e19,
        2.0**64,
        1e22,
        1e23,
        1e100,
        1.7976931348623157e308,
    ]
    numbers += [-number for number in numbers] + [
        1e-5,
        1e-7,
        5e-324,
        2.2250738585072014e-308,
        0.1,
        1.0,
        0.0,
        10,
        2**63 - 1,
    ]
    value = {"data": {"1e16": '1e16 \\ " 1e16', "numbers": numbers, "more": [{"x": 1e300}, "é", None]}}
    settings = {"body": "data"} if how == "body" else {"columns": ["data"]}
    async with SessionManager(store=table(schema, **settings), user_id=int) as manager:
        await (await manager.open(1, default=value)).destroy()
    async with SessionManager(store=table(schema, **settings), user_id=int) as manager:
        found = await manager.read(1)
        assert found == value
        assert [repr(each) for each in found["data"]["numbers"]] == [repr(each) for each in numbers]
        assert repr(found["data"]["more"][0]) == "{'x': 1e+300}"
        await manager.open(1)


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
    await execute(f"CREATE TABLE {schema}.players (id {kind} PRIMARY KEY, gold int)")
    async with opened(store):
        calls = [
            lambda: store.claim_many([good, user_id], "a"),
            lambda: release(store, user_id, 1, "a"),
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
    await execute(f"CREATE TABLE {schema}.players (id {kind} PRIMARY KEY, gold int)")
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
