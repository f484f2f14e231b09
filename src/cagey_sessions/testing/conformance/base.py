"""What the tests of all rooms have at hand. What lives here: records, opened stores, calls in few words, and what a
subclass says of its store. What must not: tests.
"""

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
"""A row that was never saved and has no owner is new again; the store need not know its epoch any more."""

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
    """One store, or a tuple of several, open for the length of a block."""
    try:
        for store in stores:
            await store.open()
        yield stores[0] if len(stores) == 1 else stores
    finally:
        for store in stores:
            await store.close()


def sound(answer: T | StoreError) -> T:
    """What a store has answered of one user, if that is no error."""
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
    """One of each, to be awaited."""
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
    """A store, and how an owner of its users dies: what the tests of all rooms have in common."""

    runs_coroutines = True
    """Seen by the pytest plugin of this package, which runs those that nobody else runs."""

    @pytest.fixture
    def make(self, tmp_path: Any) -> Make:
        """A function that makes a store, not opened; each further call makes another one on the same backing."""
        raise NotImplementedError

    async def bury(self, store: Store, owner: str) -> None:
        """Make `owner` dead by the store's own rule."""
        raise NotImplementedError

    def skip_unless_shared(self, store: Store) -> None:
        # what these tests claim as somebody else would be granted, and rightly: there is nothing to refuse
        if not store.shared:
            pytest.skip("one process has this store, so every other owner is dead")
