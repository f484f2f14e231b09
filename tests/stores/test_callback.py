"""`CallbackStore`: which functions it takes, what it calls when, and whom it lets have a user."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
from typing import Any

import orjson
import pytest

from cagey_sessions import (
    CorruptRecordError,
    OptionError,
    SessionManager,
    StoreContractError,
    StoreModeError,
    StoreUnavailableError,
)
from cagey_sessions.stores import CallbackStore, Claim, Outcome, Record, Store, Verdict
from cagey_sessions.testing.store_conformance import release
from support import turns

SECRET = "canary-7f3a"


def record(user_id: int | str = 1, version: int = 1, *, epoch: int = 1, value: Any = None) -> Record:
    return Record(user_id, epoch, "node", version, 0, orjson.dumps(value), 0.0)


def loading(data: Any) -> CallbackStore:
    return CallbackStore(lambda user_id: data, lambda records: None)


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
        assert await release(store, 1, claims[0].epoch, "node") is True
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


async def test_a_load_that_fails_is_the_answer_for_its_user_alone():
    gate = Gate()
    store = CallbackStore(gate.load, print)
    claiming = asyncio.ensure_future(store.claim_many(range(3), "node"))
    await turns()
    failed = OSError("no such file")
    gate.let[1].set_exception(failed)
    await turns()
    assert not claiming.done()
    for user_id in (0, 2):
        gate.let[user_id].set_result(None)
    one, two, three = await claiming
    assert (one.user_id, three.user_id) == (0, 2) and one.granted and three.granted
    assert isinstance(two, StoreUnavailableError) and two.__cause__ is failed
    assert "no such file" not in str(two), "it may quote data"


async def test_where_all_loads_fail_the_claim_raises_what_the_first_has_raised():
    def load(user_id):
        raise OSError(f"down {user_id}")

    with pytest.raises(OSError, match="down 0"):
        await CallbackStore(load, print).claim_many(range(40), "node")


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


@pytest.mark.parametrize("kind", [str, str.encode])
async def test_json_text_that_no_value_can_hold_is_not_loaded_and_never_saved_over(kind):
    saved: list[Any] = []
    store = CallbackStore(lambda user_id: kind('{"gold":18446744073709551616}'), saved.extend)
    async with SessionManager(store=store) as manager:
        for call in (manager.open("ann", default={"gold": 0}), manager.read("ann")):
            with pytest.raises(CorruptRecordError, match="does not fit into 64 bits") as caught:
                await call
            assert caught.value.body == b'{"gold":18446744073709551616}'
    assert saved == []
