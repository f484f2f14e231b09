"""`CallbackStore`: what it makes of what the program's two functions return and raise."""

from __future__ import annotations

import asyncio
import decimal
import functools
import math
import subprocess
import sys
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions import (
    CorruptRecordError,
    OptionError,
    StoreContractError,
    StoreError,
    StoreModeError,
    StoreUnavailableError,
)
from cagey_sessions.stores import CallbackStore, Claim, Outcome, Record, Store, Verdict
from support import turns

SECRET = "canary-7f3a"


def record(user_id: int | str = 1, version: int = 1, *, epoch: int = 1, value: Any = None) -> Record:
    return Record(user_id, epoch, "node", version, 0, orjson.dumps(value), 0.0)


def loading(data: Any) -> CallbackStore:
    return CallbackStore(lambda user_id: data, lambda records: None)


def saving(answer: Any) -> CallbackStore:
    return CallbackStore(lambda user_id: None, lambda records: answer)


class Table:
    """A table that is written to by functions of every kind."""

    def __init__(self) -> None:
        self.rows: dict[int | str, Any] = {}

    def load(self, user_id):
        return self.rows.get(user_id)

    def save_many(self, records):
        self.rows.update((each.user_id, each.value()) for each in records)

    def erase(self, user_id):
        return self.rows.pop(user_id, None) is not None

    async def load_async(self, user_id):
        await asyncio.sleep(0)
        return self.load(user_id)

    async def save_async(self, records):
        await asyncio.sleep(0)
        self.save_many(records)

    async def erase_async(self, user_id):
        await asyncio.sleep(0)
        return self.erase(user_id)


class Call:
    """An object that is called like a function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, argument):
        return self.function(argument)


class AsyncCall(Call):
    async def __call__(self, argument):
        await asyncio.sleep(0)
        return self.function(argument)


def first_of_two(argument, function):
    return function(argument)


FORMS = {
    "sync methods": lambda table: (table.load, table.save_many, table.erase),
    "async methods": lambda table: (table.load_async, table.save_async, table.erase_async),
    "objects": lambda table: (Call(table.load), Call(table.save_many), Call(table.erase)),
    "async objects": lambda table: (AsyncCall(table.load), AsyncCall(table.save_many), AsyncCall(table.erase)),
    "partials": lambda table: tuple(
        functools.partial(first_of_two, function=function)
        for function in (table.load_async, table.save_many, table.erase_async)
    ),
    "lambdas that return an awaitable": lambda table: (
        lambda user_id: table.load_async(user_id),
        lambda records: asyncio.ensure_future(table.save_async(records)),
        lambda user_id: table.erase_async(user_id),
    ),
    "threads": lambda table: tuple(
        functools.partial(asyncio.to_thread, function) for function in (table.load, table.save_many, table.erase)
    ),
}


@pytest.mark.parametrize("form", FORMS)
async def test_functions_of_every_kind(form):
    table = Table()
    load, save_many, erase = FORMS[form](table)
    store = CallbackStore(load, save_many, erase=erase)
    await store.open()
    assert await store.claim_many([7], "node") == [Claim(7, 1, None)]
    assert await store.save_many([record(7, value={"gold": 1})]) == [Verdict(Outcome.SAVED)]
    assert table.rows == {7: {"gold": 1}}
    (claim,) = await store.claim_many([7], "node")
    assert claim.granted
    assert claim.record == Record(7, 2, "node", 1, 0, b'{"gold":1}', 0.0)
    assert (await store.load(7)).value() == {"gold": 1}
    assert await store.erase(7) is True
    assert await store.erase(7) is False
    assert await store.load(7) is None
    await store.close()


def test_what_the_store_says_of_itself():
    store = loading(None)
    assert isinstance(store, Store)
    assert (store.fenced, store.shared, store.name) == (False, False, "CallbackStore")
    assert store.loss_class == "as your functions and their database give"


async def test_one_and_its_text_are_two_users():
    table = Table()
    store = CallbackStore(table.load, table.save_many)
    await store.save_many([record(1, value="int"), record("1", value="str")])
    assert table.rows == {1: "int", "1": "str"}


# Arguments


def generator(argument):
    yield


async def async_generator(argument):
    yield


class GeneratorCall:
    def __call__(self, argument):
        yield


@pytest.mark.parametrize("name", ["load", "save_many", "erase"])
@pytest.mark.parametrize("wrong", ["load", 7, {}, None])
def test_an_argument_that_cannot_be_called_is_named(name, wrong):
    arguments: dict[str, Any] = {"load": print, "save_many": print, "erase": print, name: wrong}
    if (name, wrong) == ("erase", None):
        CallbackStore(**arguments)
        return
    with pytest.raises(OptionError, match=f"^{name} is a function .*{type(wrong).__name__}"):
        CallbackStore(**arguments)


@pytest.mark.parametrize("name", ["load", "save_many", "erase"])
@pytest.mark.parametrize(
    "wrong",
    [generator, async_generator, functools.partial(generator), GeneratorCall()],
)
def test_a_generator_function_is_refused(name, wrong):
    arguments: dict[str, Any] = {"load": print, "save_many": print, "erase": print, name: wrong}
    with pytest.raises(OptionError, match=f"^{name} has a `yield`"):
        CallbackStore(**arguments)


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
    ("data", "says"),
    [
        (("gold", 3), "user_data: tuple is not JSON"),
        ({"bag": [1, decimal.Decimal("1.5")]}, r'user_data\["bag"\]\[1\]: .*Decimal'),
        ({"bag": (1,)}, r'user_data\["bag"\]: tuple'),
        ({"a": {7: 1}}, r'user_data\["a"\].*int'),
        ({"x": math.nan}, r'user_data\["x"\]: nan'),
        (math.inf, "user_data: inf"),
        (DEEP, "deep"),
        (bytearray(b"{}"), "bytearray"),
        (memoryview(b"{}"), "memoryview"),
        (Text("{}"), "Text"),
        (object(), "object"),
        (Verdict(Outcome.SAVED), "Verdict"),
        ({"x": 2**64}, "64"),
        ({"x": "\ud800"}, "lone surrogate"),
        ("\ud800" + SECRET, "lone surrogate"),
        ({"a": [SECRET, {SECRET}]}, r'user_data\["a"\]\[1\]: set'),
    ],
    ids=range(16),
)
async def test_anything_else_breaks_the_contract(data, says):
    store = loading(data)
    for call in (store.load(7), store.claim_many([7], "node")):
        with pytest.raises(StoreContractError, match=says) as caught:
            await call
        assert "user 7" in str(caught.value)
        assert SECRET not in repr(caught.value)
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
        assert 'user_data["data"]' in str(error)
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


async def test_a_function_cancelled_from_within_has_failed():
    store = CallbackStore(cancelled_inside, cancelled_inside, erase=cancelled_inside)
    for call in (
        store.load(1),
        store.claim_many([1], "node"),
        store.claim_many([1, 2, 3], "node"),
        store.save_many([record()]),
        store.erase(1),
    ):
        with pytest.raises(StoreUnavailableError, match="cancelled from outside") as caught:
            await call
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


# Claims


async def test_the_epoch_rises_with_every_claim():
    table = Table()
    table.rows = {2: {}}
    store = CallbackStore(table.load, table.save_many)
    epochs = []
    for _ in range(3):
        claims = await store.claim_many([1, 2], "node")
        assert [claim.user_id for claim in claims] == [1, 2]
        assert claims[1].record.epoch == claims[1].epoch
        assert claims[1].record.owner == "node"
        epochs += [claim.epoch for claim in claims]
        assert await store.release(1, claims[0].epoch, "node") is True
    assert len(set(epochs)) == 6
    assert epochs[::2] == sorted(epochs[::2])
    assert epochs[1::2] == sorted(epochs[1::2])


async def test_nothing_is_kept_of_users_who_are_gone():
    store = CallbackStore(lambda user_id: {"gold": user_id}, lambda records: None)

    async def serve(users):
        for first in range(0, users, 100):
            users_now = range(first, first + 100)
            claims = await store.claim_many(users_now, "node")
            await store.save_many([claim.record for claim in claims])

    await serve(100)
    before = [sys.getsizeof(value) for value in vars(store).values()]
    await serve(2000)
    assert [sys.getsizeof(value) for value in vars(store).values()] == before


class Gate:
    """A load that waits until it is let through."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.let: dict[int, asyncio.Future[Any]] = {}

    async def load(self, user_id):
        self.begun.append(user_id)
        self.let[user_id] = asyncio.get_running_loop().create_future()
        try:
            return await self.let[user_id]
        finally:
            del self.let[user_id]


async def test_loads_go_on_side_by_side_but_not_without_bound():
    gate = Gate()
    store = CallbackStore(gate.load, print)
    claiming = asyncio.ensure_future(store.claim_many(range(40), "node"))
    await turns()
    assert gate.begun == list(range(16))
    gate.let[3].set_result({"user": 3})
    await turns()
    assert gate.begun == list(range(17))
    while gate.let:
        assert len(gate.let) <= 16
        newest = max(gate.let)
        gate.let[newest].set_result({"user": newest} if newest % 2 else None)
        await turns()
    claims = await claiming
    assert gate.begun == list(range(40))
    assert [claim.user_id for claim in claims] == list(range(40))
    assert [claim.record and claim.record.value() for claim in claims] == [
        {"user": user_id} if user_id % 2 else None for user_id in range(40)
    ]


async def test_one_user_is_loaded_once_a_claim():
    loaded = []
    store = CallbackStore(loaded.append, print)
    claims = await store.claim_many([1, 2, 1], "node")
    assert loaded == [1, 2]
    assert claims[0] == claims[2]


async def test_no_users_no_call():
    store = CallbackStore(cancelled_inside, cancelled_inside)
    assert await store.claim_many([], "node") == []
    assert await store.save_many([]) == []


async def test_after_a_failed_load_none_is_begun_and_none_is_cut():
    gate = Gate()
    store = CallbackStore(gate.load, print)
    claiming = asyncio.ensure_future(store.claim_many(range(40), "node"))
    await turns()
    gate.let[5].set_exception(OSError("down"))
    await turns()
    assert not claiming.done()
    for waiting in list(gate.let.values())[:-1]:
        assert not waiting.cancelled()
        waiting.set_result(None)
    await turns()
    assert not claiming.done(), "the last one is still under way"
    next(iter(gate.let.values())).set_exception(ValueError("late"))
    with pytest.raises(OSError, match="down"):
        await claiming
    assert gate.begun == list(range(16))


async def test_a_plain_function_that_fails_is_not_called_again():
    called = []

    def load(user_id):
        called.append(user_id)
        raise OSError("down")

    with pytest.raises(OSError, match="down"):
        await CallbackStore(load, print).claim_many(range(40), "node")
    assert called == [0]


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


# Erasing and listing


@pytest.mark.parametrize(("answer", "there_was_one"), [(None, True), (True, True), (False, False)])
async def test_erase(answer, there_was_one):
    erased = []

    def erase(user_id):
        erased.append(user_id)
        return answer

    assert await CallbackStore(print, print, erase=erase).erase("ann", "node") is there_was_one
    assert erased == ["ann"]


async def test_erase_that_goes_wrong():
    error = OSError(SECRET)

    async def erase(user_id):
        raise error

    with pytest.raises(OSError) as caught:
        await CallbackStore(print, print, erase=erase).erase("ann")
    assert caught.value is error
    for answer in (0, 1, "DELETE 1", []):
        with pytest.raises(StoreContractError, match=f"erase returned a value of type {type(answer).__name__}"):
            await CallbackStore(print, print, erase=lambda user_id, answer=answer: answer).erase(1)


async def test_what_two_functions_cannot_do_names_the_remedy():
    store = CallbackStore(print, print)
    with pytest.raises(StoreModeError, match=r"CallbackStore\(load, save_many, erase=\.\.\.\)"):
        await store.erase(1)
    with pytest.raises(StoreModeError, match="your own tables"):
        async for _ in store.scan():
            raise AssertionError("there is nothing to list")


# The name


def test_the_store_is_imported_when_it_is_named():
    script = (
        "import sys\n"
        "import cagey_sessions.stores as stores\n"
        "print('cagey_sessions.stores.callback' in sys.modules)\n"
        "print(set(stores.__all__) <= set(dir(stores)), stores.CallbackStore.__name__)\n"
        "try:\n"
        "    from cagey_sessions.stores import NoSuchStore\n"
        "except ImportError as error:\n"
        "    print('NoSuchStore' in str(error), hasattr(stores, 'NoSuchStore'))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == ["False", "True", "CallbackStore", "True", "False"]
