"""`CallbackStore`: what it makes of what the program's two functions return and raise."""

from __future__ import annotations

import asyncio
import decimal
import math
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions import CorruptRecordError, StoreContractError, StoreError, StoreUnavailableError
from cagey_sessions.stores import CallbackStore, Outcome, Record, Verdict
from support import turns

SECRET = "canary-7f3a"


def record(user_id: int | str = 1, version: int = 1, *, epoch: int = 1, value: Any = None) -> Record:
    return Record(user_id, epoch, "node", version, 0, orjson.dumps(value), 0.0)


def loading(data: Any) -> CallbackStore:
    return CallbackStore(lambda user_id: data, lambda records: None)


def saving(answer: Any) -> CallbackStore:
    return CallbackStore(lambda user_id: None, lambda records: answer)


# What load returns


@pytest.mark.parametrize(
    ("data", "body"),
    [
        ({"gold": 3, "bag": [1, 2.5, None, True, "x"]}, b'{"gold":3,"bag":[1,2.5,null,true,"x"]}'),
        ([], b"[]"),
        (0, b"0"),
        (False, b"false"),
        (b'{"gold": 3}', b'{"gold": 3}'),
        ('{"gold": "ü"}', '{"gold": "ü"}'.encode()),
        (b"not JSON", b"not JSON"),  # for the engine to find: it keeps the bytes
        ("", b""),
    ],
)
async def test_data_or_json_text_is_a_record(data, body):
    store = loading(data)
    assert (await store.load(1)).body == body
    (claim,) = await store.claim_many([1], "node")
    assert claim.record is not None
    assert claim.record.body == body


async def test_the_record_does_not_change_with_the_data():
    data = {"gold": 1}
    loaded = await loading(data).load(1)
    data["gold"] = 2
    assert loaded.value() == {"gold": 1}


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]


class Text(str):
    pass


@pytest.mark.parametrize(
    ("data", "says", "path"),
    [
        (("gold", 3), "user_data: tuple is not JSON", "user_data"),
        ({SECRET: [1, decimal.Decimal("1.5")]}, "Decimal", f'user_data["{SECRET}"][1]'),
        ({SECRET: (1,)}, "tuple", f'user_data["{SECRET}"]'),
        ({"a": {7: 1}}, "int", 'user_data["a"]'),
        ({"x": math.nan}, "a value in user_data: nan", 'user_data["x"]'),
        (math.inf, "user_data: inf", "user_data"),
        (DEEP, "deep", DEEP),
        (bytearray(b"{}"), "bytearray", "user_data"),
        (memoryview(b"{}"), "memoryview", "user_data"),
        (Text("{}"), "Text", "user_data"),
        (object(), "object", "user_data"),
        (Verdict(Outcome.SAVED), "Verdict", "user_data"),
        ({"x": 2**64}, "64", 'user_data["x"]'),
        ({"x": "\ud800"}, "lone surrogate", 'user_data["x"]'),
        ("\ud800" + SECRET, "lone surrogate", None),
        ({"a": [SECRET, {SECRET}]}, "set", 'user_data["a"][1]'),
    ],
    ids=range(16),
)
async def test_anything_else_breaks_the_contract(data, says, path):
    store = loading(data)
    for call in (store.load(7), store.claim_many([7], "node")):
        with pytest.raises(StoreContractError, match=says) as caught:
            await call
        assert "user 7" in str(caught.value)
        assert SECRET not in repr(caught.value)
        assert caught.value.path == path or path is DEEP
        assert caught.value.__context__ is None


async def test_a_generator_that_comes_back_is_no_data():
    with pytest.raises(StoreContractError, match="generator is not JSON"):
        await CallbackStore(lambda user_id: (x for x in "ab"), print).load(1)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('aü\0"\\', max_size=4), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_what_was_loaded_is_what_comes_back(data):
    loaded = asyncio.run(loading(data).load(1))
    assert (None if loaded is None else repr(loaded.value())) == (None if data is None else repr(data))


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.sampled_from([1, "x", 1.5, None, {1}, (1,), b"x", math.nan, decimal.Decimal(1)]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", 3]), inner, max_size=3),
        max_leaves=12,
    )
)
def test_data_is_either_kept_exactly_or_refused(data):
    try:
        loaded = asyncio.run(loading({"data": data}).load(1))
    except StoreContractError as error:
        assert error.path.startswith('user_data["data"]')
    else:
        assert loaded.value() == {"data": data}


# What load raises


@pytest.mark.parametrize("error", [OSError(SECRET), KeyError(SECRET), TimeoutError()])
async def test_a_read_that_fails_is_never_a_new_user(error):
    def load(user_id):
        raise error

    store = CallbackStore(load, print)
    for call in (store.load(7), store.claim_many([7], "node"), store.claim_many([7, 8], "node")):
        with pytest.raises(type(error)) as caught:
            await call
        assert caught.value is error


async def test_a_read_that_finds_nothing_with_next_has_failed():
    store = CallbackStore(lambda user_id: next(iter([])), print)
    for call in (store.load(7), store.claim_many([7], "node"), store.claim_many([7, 8], "node")):
        with pytest.raises(RuntimeError, match="StopIteration"):
            await call


async def test_an_error_of_a_store_is_raised_as_it_is():
    error = CorruptRecordError("cannot be read", user_id=7, body=b"?")

    async def load(user_id):
        raise error

    with pytest.raises(CorruptRecordError) as caught:
        await CallbackStore(load, print).claim_many([7], "node")
    assert caught.value is error


async def cancelled_inside(argument):
    inner = asyncio.ensure_future(asyncio.sleep(60))
    inner.cancel()
    await inner


async def test_no_users_no_call():
    store = CallbackStore(cancelled_inside, cancelled_inside)
    assert await store.claim_many([], "node") == []
    assert await store.save_many([]) == []


async def test_a_function_cancelled_from_within_has_failed():
    store = CallbackStore(cancelled_inside, cancelled_inside, erase=cancelled_inside)
    for call in (
        store.load(1),
        store.claim_many([1], "node"),
        store.claim_many([1, 2, 3], "node"),
        store.save_many([record()]),
        store.erase(1),
    ):
        with pytest.raises(Exception, match="cancelled from outside") as caught:
            await call
        assert not isinstance(caught.value, StoreUnavailableError), "it says nothing about other users"
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)


async def test_the_cancellation_of_a_call_stays_one():
    """What a loop does with its tasks when it ends."""
    ended = []

    async def hang(argument):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(argument)

    store = CallbackStore(hang, hang, erase=hang)
    for call in (store.load(1), store.claim_many([1, 2], "node"), store.save_many([record()]), store.erase(1)):
        task = asyncio.ensure_future(call)
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(ended) == 5


# What save_many returns


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (None, Verdict(Outcome.SAVED)),
        (True, Verdict(Outcome.SAVED)),
        (False, Verdict(Outcome.FAILED)),
        (OSError(SECRET), Verdict(Outcome.FAILED, "OSError")),
        (asyncio.CancelledError(), Verdict(Outcome.FAILED, "CancelledError")),
        *((outcome, Verdict(outcome)) for outcome in Outcome),
        *((outcome.value, Verdict(outcome)) for outcome in Outcome),
        (Verdict(Outcome.INVALID, "too large"), Verdict(Outcome.INVALID, "too large")),
        (Verdict("missing"), Verdict(Outcome.MISSING)),  # type: ignore[arg-type]
    ],
    ids=range(21),
)
@pytest.mark.parametrize("kind", [list, tuple])
async def test_answers(kind, answer, verdict):
    given = await saving(kind([answer, None, answer])).save_many([record(1), record(2), record(3)])
    assert given == [verdict, Verdict(Outcome.SAVED), verdict]
    assert all(type(each.outcome) is Outcome for each in given)


async def test_what_gather_returns_is_an_answer():
    async def save(each):
        if each.user_id == 2:
            raise OSError("locked")

    async def save_many(records):
        return await asyncio.gather(*map(save, records), return_exceptions=True)

    given = await CallbackStore(print, save_many).save_many([record(1), record(2)])
    assert given == [Verdict(Outcome.SAVED), Verdict(Outcome.FAILED, "OSError")]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([], "0 answers for 2 records"),
        ([True], "1 answers for 2 records"),
        ([True] * 3, "3 answers for 2 records"),
        (True, "type bool"),
        (False, "type bool"),
        (2, "type int"),
        (SECRET[:2], "type str"),
        (b"ab", "type bytes"),
        ({1: True, 2: True}, "type dict"),
        ({True}, "type set"),
        (iter([True, True]), "iterator"),
        (OSError(SECRET), "type OSError"),
        (Outcome.SAVED, "Outcome"),
        (Verdict(Outcome.SAVED, "saved"), "Verdict; return None"),  # a tuple of two
        ([True, 1], "type int for a record"),
        ([True, "SAVED"], "a str that is no outcome"),
        ([True, SECRET], "a str that is no outcome"),
        ([True, OSError], "type type for a record"),
        ([True, Verdict(SECRET)], "Verdict for a record"),  # type: ignore[arg-type]
        ([True, Verdict(Outcome.FAILED, OSError(SECRET))], "Verdict for a record"),  # type: ignore[arg-type]
        ([True, ("saved", "")], "type tuple for a record"),
        ([True, ["saved"]], "type list for a record"),
    ],
    ids=range(22),
)
async def test_answers_that_cannot_be_understood(answer, says):
    with pytest.raises(StoreContractError, match=says) as caught:
        await saving(answer).save_many([record(1), record(2)])
    assert "save_many returned" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("error", [OSError("down"), StoreError("no"), ValueError("poison"), KeyboardInterrupt()])
async def test_what_save_many_raises_reaches_the_caller(error):
    async def save_many(records):
        raise error

    with pytest.raises(type(error)) as caught:
        await CallbackStore(print, save_many).save_many([record()])
    assert caught.value is error


async def test_of_one_user_only_the_latest_record_is_handed_over():
    handed = []

    def save_many(records):
        handed.extend(records)
        return [False if each.user_id == 1 else "already" for each in records]

    store = CallbackStore(print, save_many)
    given = await store.save_many(
        [
            record(1, 4),
            record("1", 9),
            record(1, 6),
            record(1, 5),
            record(2, 1, epoch=3),
            record(2, 8, epoch=2),
        ]
    )
    assert {(each.user_id, each.epoch, each.version) for each in handed} == {(1, 1, 6), ("1", 1, 9), (2, 3, 1)}
    failed, already = Verdict(Outcome.FAILED), Verdict(Outcome.ALREADY)
    assert given == [failed, already, failed, failed, already, already]


async def test_a_function_may_do_what_it_likes_with_its_list():
    given = await CallbackStore(print, lambda records: records.clear()).save_many([record(1), record(2)])
    assert given == [Verdict(Outcome.SAVED)] * 2
