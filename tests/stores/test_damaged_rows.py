"""Rows that no store has written: whoever asks for such a user is told, everybody else is served, the row stays."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions import CorruptRecordError, SessionManager, StoreError, UnsavableError
from cagey_sessions.stores import Claim, Outcome, Record
from cagey_sessions.testing.conformance.base import SAVED
from cagey_sessions.testing.store_conformance import claim, opened, record, save
from support.raw_rows import BODY, ENGINES, InSideTable, RawRows

LONG = int("1" * 40)
FENCE: list[dict[str, Any]] = [
    *({"epoch": each} for each in (None, 0, -1, 2**53, 2**63 - 1, LONG, "x", "", 1.5, b"\xff", "x" * 99)),
    *({"epoch": each} for each in ("007", "1e3", " 7")),
    *({"version": each} for each in (None, -1, 2**53, 2**63 - 1, LONG, "x", "", 2.5, b"\xff", "0x3", "03", "3.0")),
    *({"released": each} for each in (None, 2, -1, "x", "", "true", b"\xff")),
    *({"released": False, "owner": each} for each in (None, "")),
    *({"erased": each} for each in (2, "x", "", b"\xff")),
    {"released": False, "erased": True},
    {"epoch": None, "owner": None, "released": None, "version": None, "erased": None},
    {"epoch": None, "owner": None, "released": None, "version": None, "schema": None, "saved_at": None},
]
"""What makes it impossible to tell whose a row is, or what may be written to it."""
REST: list[dict[str, Any]] = [
    {"version": 0},
    {"body": None},
    {"erased": True},
    *({"schema": each} for each in (None, -1, 2**53, LONG, "x", "", 0.5, b"\xff", "0x1")),
    *({"saved_at": each} for each in (None, math.inf, -math.inf, math.nan, "x", "", "5,0", "0x5", b"\xff", "5" * 99)),
]
ROOM: list[dict[str, Any]] = [{"epoch": 2**53 - 1}, {"version": 2**53 - 1}]
"""Rows that can be read, and not be claimed: nothing could be written to them after that."""
NUMERIC = {"007", "1e3", " 7", "03", "3.0", "5" * 99}
"""Texts that a column of numbers takes for numbers."""


def is_damage(engine: str, fields: dict[str, Any]) -> bool:
    if engine == "sqlite":
        return not NUMERIC & {value for value in fields.values() if isinstance(value, str)}
    return engine != "side table" or fields not in ({"version": 0}, {"erased": True})  # with its data


@pytest.fixture(params=ENGINES)
def rows(request: Any, tmp_path: Any) -> Iterator[RawRows]:
    made = ENGINES[request.param](tmp_path)
    asyncio.run(made.begin())
    try:
        yield made
    finally:
        asyncio.run(made.end())


@pytest.fixture
def damages(rows: RawRows, request: Any) -> Callable[..., dict[str, dict[str, Any]]]:
    """What the engine can keep of some damages, each for a user of its own."""
    engine = request.node.callspec.params["rows"]

    def damages(*kinds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        found = [each for kind in kinds for each in kind if rows.holds(**each) and is_damage(engine, each)]
        return {f"u{number}": fields for number, fields in enumerate(found)}

    return damages


async def spoil(rows: RawRows, users: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Damage rows, and give what is there then."""
    for user_id, fields in users.items():
        await rows.put(user_id, **fields)
    return {user_id: await rows.get(user_id) for user_id in users}


async def test_whoever_wants_such_a_user_is_told_and_everybody_else_gets_in(rows, damages):
    users = damages(FENCE, REST)
    await rows.fill(*users, "bob")
    before = await spoil(rows, users)
    async with SessionManager(store=rows.make()) as manager:
        answers = await asyncio.gather(
            *(manager.open(user_id, default={"gold": 0}) for user_id in (*users, "bob")), return_exceptions=True
        )
        for user_id, error in zip(users, answers, strict=False):
            assert isinstance(error, CorruptRecordError) and error.user_id == user_id, (users[user_id], error)
            assert "damaged, and is left as it is" in str(error)
        assert answers[-1].user_data == {"gold": 3}
        for user_id in users:
            with pytest.raises(CorruptRecordError):
                await manager.read(user_id)
            with pytest.raises(CorruptRecordError):
                async with manager.edit(user_id, default={"gold": 0}):
                    raise AssertionError("there is nothing to edit")
        assert manager.health()
    assert {user_id: await rows.get(user_id) for user_id in users} == before


async def test_in_a_batch_a_damaged_row_is_refused_alone(rows, damages):
    users = damages(FENCE, REST)
    await rows.fill(*users, "bob")
    before = await spoil(rows, users)
    async with opened(rows.make()) as store:
        *errors, bob = await store.claim_many([*users, "bob"], "b")
        assert isinstance(bob, Claim) and bob.record is not None and bob.record.body == BODY
        for user_id, error in zip(users, errors, strict=True):
            assert isinstance(error, CorruptRecordError) and error.user_id == user_id, (users[user_id], error)
            with pytest.raises(CorruptRecordError):
                await store.load(user_id)
        found = [each async for each in store.scan()]
        assert [each.user_id for each in found if isinstance(each, Record)] == ["bob"]
        assert {each.user_id for each in found if isinstance(each, CorruptRecordError)} == set(users)
    assert {user_id: await rows.get(user_id) for user_id in users} == before


async def test_an_error_has_the_body_and_shows_nothing_of_the_row(rows, damages):
    users = {user_id: each for user_id, each in damages(FENCE, REST).items() if "body" not in each}
    await rows.fill(*users)
    await spoil(rows, users)
    body = b"" if isinstance(rows, InSideTable) else BODY  # a table of somebody's own is not read for that
    async with opened(rows.make()) as store:
        for error in await store.claim_many(list(users), "b"):
            assert isinstance(error, CorruptRecordError)
            assert error.body == body
            assert "gold" not in str(error) and "xxxx" not in str(error) and "1111" not in str(error)


async def test_nothing_is_written_to_a_row_whose_fence_is_damaged(rows, damages):
    users = damages(FENCE)
    async with opened(rows.make()) as store:
        claims = {each.user_id: each for each in await store.claim_many([*users, "bob"], "a")}
        first = [record(user_id, 3, epoch=each.epoch, body=BODY) for user_id, each in claims.items()]
        assert set(await save(store, *first)) == {SAVED}
        before = await spoil(rows, users)
        batch = [each._replace(version=4, body=b"[]", release=release) for each in first for release in (False, True)]
        for new in (batch[::2], batch[1::2]):
            verdicts = await store.save_many(new)
            for user_id, verdict in zip(users, verdicts, strict=False):
                assert verdict.outcome == Outcome.FAILED and verdict.detail, (users[user_id], verdict)
            assert verdicts[-1].outcome in (SAVED, Outcome.ALREADY)
        for user_id, claimed in claims.items():
            if user_id != "bob":
                assert await store.release_many([(user_id, claimed.epoch)], "a") == [False], users[user_id]
                with pytest.raises(CorruptRecordError):
                    await store.holder(user_id)
    assert {user_id: await rows.get(user_id) for user_id in users} == before


async def test_a_damaged_row_is_erased_by_whoever_asks_for_that(rows, damages):
    users = damages(FENCE, REST)
    await rows.fill(*users, "bob")
    await spoil(rows, users)
    async with opened(rows.make()) as store:
        for user_id in users:
            assert await store.erase(user_id), users[user_id]
            assert await store.load(user_id) is None
            assert (await store.holder(user_id))[0] == ""
            assert not await store.erase(user_id)
        claims = {each.user_id: each for each in await store.claim_many(list(users), "b")}
        assert all(each.granted and each.record is None for each in claims.values())
        new = [record(user_id, epoch=each.epoch, owner="b") for user_id, each in claims.items()]
        assert set(await save(store, *new)) == {SAVED}
        assert len([each async for each in store.scan()]) == len(users) + 1


async def test_a_row_that_leaves_no_room_for_the_next_is_read_and_not_claimed(rows, damages):
    users = damages(ROOM)
    await rows.fill(*users)
    before = await spoil(rows, users)
    async with SessionManager(store=rows.make()) as manager:
        for user_id in users:
            assert await manager.read(user_id) == {"gold": 3}
            with pytest.raises(CorruptRecordError, match="no epoch or no version is left"):
                await manager.open(user_id, default={"gold": 0})
    assert {user_id: await rows.get(user_id) for user_id in users} == before


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "when due"])
async def test_after_the_last_version_there_is_nothing_is_acknowledged(rows, clock, asked):
    await rows.fill("ann")
    await rows.put("ann", version=2**53 - 2)
    refused: list[Any] = []
    manager = SessionManager(store=rows.make(), clock=clock)
    manager.on("unsavable", lambda session, error: refused.append(error))
    session = await manager.open("ann")
    session.user_data["gold"] = 4
    receipt = await session.persist_now()
    assert (receipt.version, receipt.changed) == (2**53 - 1, True)
    session.user_data["gold"] = 5
    if asked:
        with pytest.raises(UnsavableError, match="last version"):
            await session.persist_now()
    else:
        await clock.advance("31s")
    assert [error.user_id for error in refused] == ["ann"]
    assert manager.statistics().unsavable == 1
    await session.destroy(persist=False)
    await manager.destroy()
    async with opened(rows.make()) as store:
        assert (await store.load("ann")).body == b'{"gold":4}'


async def test_a_row_that_is_mended_is_written_again(rows, damages):
    users = damages([{"version": None}, {"version": 2**53}])
    async with opened(rows.make()) as store:
        claims = {each.user_id: each for each in await store.claim_many(list(users), "a")}
        new = [record(user_id, 4, epoch=each.epoch) for user_id, each in claims.items()]
        assert set(await save(store, *(each._replace(version=3) for each in new))) == {SAVED}
        await spoil(rows, users)
        assert set(await save(store, *new)) == {Outcome.FAILED}
        for user_id in users:
            await rows.put(user_id, version=3)
        assert set(await save(store, *new)) == {SAVED}


async def test_a_released_row_needs_no_owner(rows, damages):
    users = damages([{"owner": None}, {"owner": ""}])
    await rows.fill(*users)
    await spoil(rows, users)
    async with opened(rows.make()) as store:
        for user_id in users:
            assert (await store.load(user_id)).body == BODY
            assert (await claim(store, user_id, "b")).record.body == BODY


INEXACT = [
    b'{"gold":18446744073709551616,"id":123456789012345678901}',
    b'{"gold":-9223372036854775809}',
    b'[{"gold": 1e-400}]',
    b'{"gold":12345678901234567.89}',
    b'{"gold":9007199254740993.0}',
    b'{"gold":1,"silver":2,"gold":3}',
]
"""What other programs write, and no value here can hold."""


async def test_a_body_that_no_value_can_hold_is_not_loaded_and_stays_as_it_is(rows):
    users = {f"u{number}": body for number, body in enumerate(INEXACT)}
    await rows.fill(*users, "bob")
    for user_id, body in users.items():
        await rows.put_body(user_id, body)
    async with SessionManager(store=rows.make()) as manager:
        for user_id, body in users.items():
            for _ in range(2):
                with pytest.raises(CorruptRecordError, match="cannot be read, and is left as it is") as caught:
                    await manager.open(user_id, default={"gold": 0})
                assert (caught.value.user_id, caught.value.body) == (user_id, body)
            with pytest.raises(CorruptRecordError):
                await manager.read(user_id)
            with pytest.raises(CorruptRecordError):
                async with manager.edit(user_id, default={"gold": 0}):
                    raise AssertionError("there is nothing to edit")
            session = await manager.create()
            with pytest.raises(CorruptRecordError):
                await session.login(user_id, default={"gold": 0})
        assert (await manager.open("bob")).user_data == {"gold": 3}
    async with opened(rows.make()) as store:
        for user_id, body in users.items():
            loaded = await store.load(user_id)
            assert (loaded.body, loaded.version) == (body, 3)
            with pytest.raises(CorruptRecordError) as caught:
                loaded.value()
            assert (caught.value.user_id, caught.value.body) == (user_id, body)


numbers = st.sampled_from([-1, 0, 1, 2, 3, 2**53 - 2, 2**53 - 1, 2**53, 2**63 - 1, 2**63]) | st.integers(-5, 2**54)
texts = st.text("0123456789.e+-x ", max_size=20) | numbers.map(str) | st.floats().map(repr) | st.just("a")
anything = st.none() | numbers | texts | st.floats() | st.binary(max_size=4)
flags = st.sampled_from([False, True, False, True, None, 2, "x", ""])
garbage = st.fixed_dictionaries(
    {},
    optional={
        "epoch": anything,
        "owner": st.sampled_from([None, "", "a", "b"]),
        "released": flags,
        "version": anything,
        "schema": anything,
        "body": st.sampled_from([None, b"[]"]),
        "saved_at": anything,
        "erased": flags,
    },
)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sqlite", "redis", "postgres", "memory"])
def test_what_a_claim_takes_is_what_a_load_takes_and_all_else_stays_as_it_is(engine, tmp_path):
    rows = ENGINES[engine](tmp_path)
    seen: set[str] = set()
    with asyncio.Runner() as runner:
        runner.run(rows.begin())
        store = rows.make()
        runner.run(store.open())

        @settings(max_examples=int(os.environ.get("CAGEY_TEST_EXAMPLES", 250)), deadline=None, database=None)
        @given(garbage)
        def test(fields: dict[str, Any]) -> None:
            if rows.holds(**fields):
                runner.run(check(fields))

        users = itertools.count()

        async def check(fields: dict[str, Any]) -> None:
            user = next(users)
            epoch = (await claim(store, user, "a")).epoch
            assert await save(store, record(user, 3, epoch=epoch, body=BODY, saved_at=5.0, release=True)) == [SAVED]
            await rows.put(user, **fields)
            before = await rows.get(user)
            loaded: Record | CorruptRecordError | None
            try:
                loaded = await store.load(user)
            except CorruptRecordError as error:
                loaded = error
            (answer,) = await store.claim_many([user], "a")
            seen.add(type(answer).__name__)
            if isinstance(answer, StoreError):
                assert isinstance(answer, CorruptRecordError)
                assert await rows.get(user) == before
                assert isinstance(loaded, CorruptRecordError) or "is left for what" in str(answer)
            elif not answer.granted:
                assert await rows.get(user) == before
                assert (answer.owner, fields["released"]) == ("b", False)
            else:
                assert not isinstance(loaded, CorruptRecordError)
                assert (answer.record is None) == (loaded is None)
                if loaded is not None:
                    assert answer.record == loaded._replace(epoch=loaded.epoch + 1, owner="a")

        try:
            test()
        finally:
            runner.run(store.close())
            runner.run(rows.end())
    assert seen == {"Claim", "CorruptRecordError"}
