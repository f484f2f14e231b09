"""Helpers of all tests of the contract: records, opened stores, short calls, and what a subclass says of its store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from ...errors import StoreError
from ...stores import Claim, Outcome, Record, Store, Verdict

__all__ = [
    "ALREADY",
    "BIG",
    "ERASED",
    "FENCED",
    "INVALID",
    "MISSING",
    "NOT_THERE",
    "SAVED",
    "Conformance",
    "Make",
    "claim",
    "claims",
    "every_call",
    "everything",
    "loaded",
    "opened",
    "record",
    "release",
    "save",
    "sound",
    "stored",
]

T = TypeVar("T")

ALREADY, ERASED, FENCED, INVALID, MISSING, SAVED = (
    Outcome.ALREADY,
    Outcome.ERASED,
    Outcome.FENCED,
    Outcome.INVALID,
    Outcome.MISSING,
    Outcome.SAVED,
)
NOT_THERE = {FENCED, MISSING}
"""The possible verdicts if a user who was never saved has been released: the store may have removed the row, or not."""

BIG = 2**53 - 1

Make = Callable[[], Store]


def record(
    user_id: int | str = 1,
    version: int = 1,
    *,
    epoch: int = 1,
    owner: str = "a",
    body: bytes = b"{}",
    schema: int = 0,
    saved_at: float = 1.5,
    release: bool = False,
) -> Record:
    return Record(user_id, epoch, owner, version, schema, body, saved_at, release)


@asynccontextmanager
async def opened(*stores: Store) -> AsyncIterator[Any]:
    """One store, or a tuple of several, open within the block."""
    try:
        for store in stores:
            await store.open()
        yield stores[0] if len(stores) == 1 else stores
    finally:
        for store in stores:
            await store.close()


def sound(answer: T | StoreError) -> T:
    """The answer of a store for one user; raises it if it is an error."""
    if isinstance(answer, StoreError):
        raise answer
    return answer


async def claims(store: Store, user_ids: Sequence[int | str], owner: str = "a") -> list[Claim]:
    return [sound(answer) for answer in await store.claim_many(user_ids, owner)]


async def claim(store: Store, user_id: int | str = 1, owner: str = "a") -> Claim:
    (answer,) = await claims(store, [user_id], owner)
    return answer


async def save(store: Store, *records: Record) -> list[Outcome]:
    verdicts = await store.save_many(records)
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    return [verdict.outcome for verdict in verdicts]


async def release(store: Store, user_id: int | str, epoch: int, owner: str) -> bool:
    (released,) = await store.release_many([(user_id, epoch)], owner)
    assert type(released) is bool
    return released


async def stored(store: Store, user_id: int | str = 1) -> Record:
    found = await store.load(user_id)
    assert found is not None
    return found


async def loaded(store: Store, user_id: int | str = 1) -> Record:
    found = (await claim(store, user_id)).record
    assert found is not None
    return found


def every_call(store: Store) -> list[Awaitable[Any]]:
    """One call of each method of a store, to be awaited."""
    return [
        store.claim_many([1], "a"),
        store.save_many([record()]),
        store.release_many([(1, 1)], "a"),
        store.erase(1),
        store.load(1),
        anext(store.scan()),
    ]


async def everything(store: Store) -> dict[tuple[type, int | str], Record]:
    found = [sound(each) async for each in store.scan()]
    by_user = {(type(each.user_id), each.user_id): each for each in found}
    assert len(by_user) == len(found), "a user came twice"
    return by_user


class Conformance:
    """What a subclass says of its store: how to make one, and how an owner dies."""

    runs_coroutines = True
    """Tells the pytest plugin of this package to run the coroutines, if no other plugin does."""

    @pytest.fixture
    def make(self, tmp_path: Any) -> Make:
        """Return a function that makes a store, not opened. Each call of it makes another one on the same backing."""
        raise NotImplementedError

    async def bury(self, store: Store, owner: str) -> None:
        """Make `owner` dead by the store's own rule."""
        raise NotImplementedError

    def skip_unless_shared(self, store: Store) -> None:
        if not store.shared:
            # in a store for one process every other owner is dead, so the claims that these tests want refused are
            # granted, as its contract says
            pytest.skip("one process has this store, so every other owner is dead")
