"""What every fenced store has to do, written from the contract in `cagey_sessions.stores.Store` and not from any store.

What lives here: `StoreConformance`, one test for each line of the contract, and `StoreMachine`, random histories
against a dict. What must not: anything that only one engine does.

A store's test file subclasses both: it says how nodes on one backing are made and, if it is shared, how an owner dies.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import MissingExtraError, OwnedElsewhereError, StoreUnavailableError
from ..stores import Claim, Outcome, Record, Store, Verdict

try:
    import pytest
    from hypothesis import settings
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
except ImportError as _error:
    raise MissingExtraError(
        f'the tests for stores need {_error.name}: pip install "cagey-sessions[conformance]"', extra="conformance"
    ) from _error

__all__ = [
    "StoreConformance",
    "StoreMachine",
    "claim",
    "everything",
    "machine_test",
    "opened",
    "record",
    "save",
]

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

ODD_IDS: list[int | str] = [
    0,
    -1,
    2**63 - 1,
    -(2**63),
    "0",
    "-1",
    str(2**63 - 1),
    "1.0",
    "1e0",
    " 1",
    "01",
    "null",
    "NULL",
    "'; DROP TABLE cagey_sessions; --",
    '"quoted"',
    "back\\slash",
    "{curly}:*[brackets]?",
    "per%cent_under",
    "two\nlines\r\tand a tab",
    "Grüße",
    "gru\u0308ße",
    "日本語",
    "\U0001f409",
    "A",
    "a",
    "a ",
    "x" * 1024,
    "é" * 512,
]
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


async def claim(store: Store, user_id: int | str = 1, owner: str = "a") -> Claim:
    (answer,) = await store.claim_many([user_id], owner)
    return answer


async def save(store: Store, *records: Record) -> list[Outcome]:
    verdicts = await store.save_many(records)
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    return [verdict.outcome for verdict in verdicts]


async def stored(store: Store, user_id: int | str = 1) -> Record:
    found = await store.load(user_id)
    assert found is not None
    return found


async def loaded(store: Store, user_id: int | str = 1) -> Record:
    found = (await claim(store, user_id)).record
    assert found is not None
    return found


async def everything(store: Store) -> dict[tuple[type, int | str], Record]:
    found = [each async for each in store.scan()]
    by_user = {(type(each.user_id), each.user_id): each for each in found}
    assert len(by_user) == len(found), "a user came twice"
    return by_user


class StoreConformance:
    """The contract, line by line. Subclass it as ``Test…`` and override `make`, and `bury` where the store is shared:

        class TestMyStore(StoreConformance):
            @pytest.fixture
            def make(self, tmp_path):
                return lambda: MyStore(tmp_path / "users")

    Its tests are coroutines; each runs on an event loop of its own, whether a plugin for such tests is there or not.
    The store is to be `fenced`. The whole takes some seconds on an engine that answers within a millisecond.
    """

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

    # Claims

    async def test_the_first_claim_of_a_user_is_granted_and_finds_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            answer = await claim(store, 1)
            assert answer == Claim(1, answer.epoch, None)
            assert answer.granted
            assert 0 < answer.epoch < BIG
            assert await store.load(1) is None, "a claim is not data"
            assert await everything(store) == {}

    async def test_a_released_user_is_granted_to_anybody_with_what_was_saved(self, make: Make) -> None:
        async with opened(make()) as store:
            first = await claim(store, 1, "a")
            kept = record(epoch=first.epoch, body=b'{"gold":3}', schema=7, saved_at=1234.5, release=True)
            assert await save(store, kept) == [SAVED]
            second = await claim(store, 1, "b")
            assert second.granted
            assert second.epoch == first.epoch + 1
            assert second.record == kept._replace(epoch=second.epoch, owner="b", release=False)

    async def test_a_claim_by_the_same_owner_is_granted_under_a_new_epoch_and_fences_the_old(self, make: Make) -> None:
        async with opened(make()) as store:
            first = await claim(store)
            second = await claim(store)
            assert second.granted
            assert second.epoch == first.epoch + 1
            assert await save(store, record(epoch=first.epoch)) == [FENCED]
            assert await save(store, record(epoch=second.epoch)) == [SAVED]

    async def test_a_claim_of_another_live_owners_user_is_refused_and_changes_nothing(self, make: Make) -> None:
        first, second = make(), make()
        self.skip_unless_shared(first)
        async with opened(first, second) as (here, there):
            epoch = (await claim(here, 1, "a")).epoch
            assert await claim(there, 1, "b") == Claim(1, epoch, None, "a")
            assert await save(here, record(epoch=epoch, body=b"[1]")) == [SAVED]
            refused = await claim(there, 1, "b")
            assert refused == Claim(1, epoch, None, "a"), "what is stored is not for those who were refused"
            assert not refused.granted
            assert await there.load(1) == record(epoch=epoch, body=b"[1]"), "anybody may look"
            assert await save(here, record(version=2, epoch=epoch)) == [SAVED], "the refused claim fenced nobody"
            assert await save(there, record(version=3, epoch=epoch, owner="b")) == [FENCED]
            assert not await there.release(1, epoch, "b")
            assert (await stored(here, 1)).version == 2

    async def test_a_claim_of_a_dead_owners_user_is_granted_and_fences_the_dead(self, make: Make) -> None:
        first, second = make(), make()
        self.skip_unless_shared(first)
        async with opened(first, second) as (here, there):
            epoch = (await claim(here, 1, "a")).epoch
            assert await save(here, record(epoch=epoch, body=b"[1]")) == [SAVED]
            await self.bury(there, "a")
            taken = await claim(there, 1, "b")
            assert taken.granted
            assert taken.epoch == epoch + 1
            assert taken.record == record(epoch=epoch + 1, owner="b", body=b"[1]")
            assert await save(here, record(version=2, epoch=epoch, owner="a")) == [FENCED]
            assert not await here.release(1, epoch, "a")
            assert await save(there, record(version=2, epoch=epoch + 1, owner="b")) == [SAVED]

    async def test_a_claim_of_an_erased_user_is_granted_as_of_a_new_one(self, make: Make) -> None:
        async with opened(make()) as store:
            first = await claim(store)
            assert await save(store, record(version=9, epoch=first.epoch, release=True)) == [SAVED]
            assert await store.erase(1)
            again = await claim(store, 1, "b")
            assert again == Claim(1, again.epoch, None)
            assert again.epoch > first.epoch + 1, "the erasure itself raised the epoch"
            assert await save(store, record(version=1, epoch=again.epoch, owner="b")) == [SAVED], "versions begin again"

    async def test_epochs_rise_with_each_claim_whatever_happens_in_between(self, make: Make) -> None:
        async with opened(make()) as store:
            seen = []
            for happens in itertools.islice(itertools.cycle(["nothing", "release", "save", "last", "erase"]), 25):
                epoch = (await claim(store)).epoch
                seen.append(epoch)
                if happens == "release":
                    assert await store.release(1, epoch, "a")
                elif happens in ("save", "last"):
                    assert await save(store, record(version=50 + epoch, epoch=epoch, release=happens == "last")) == [
                        SAVED
                    ]
                elif happens == "erase":
                    assert await store.erase(1, "a")
            assert seen == sorted(set(seen))

    async def test_epochs_of_a_user_who_was_never_saved_rise_too(self, make: Make) -> None:
        """Else a write of long ago would be taken for one of the claim that holds now."""
        async with opened(make()) as store:
            seen = []
            for user_id in [1, 1, 2, 2, 1, 3, 2, 1]:
                epoch = (await claim(store, user_id)).epoch
                seen.append((user_id, epoch))
                assert await store.release(user_id, epoch, "a")
            for user_id in (1, 2, 3):
                own = [epoch for each, epoch in seen if each == user_id]
                assert own == sorted(set(own))
            now = (await claim(store, 1)).epoch
            late = max(epoch for each, epoch in seen if each == 1)
            assert await save(store, record(epoch=late)) == [FENCED]
            assert await save(store, record(epoch=now)) == [SAVED]

    async def test_claims_are_answered_in_their_order_each_for_itself(self, make: Make) -> None:
        first, second = make(), make()
        if not first.shared:
            second = first
        async with opened(*{id(node): node for node in (first, second)}.values()):
            users: list[int | str] = [5, "5", 3, "x", 1]
            theirs = (await claim(first, 3, "b")).epoch
            answers = await second.claim_many(users, "a")
            assert [(type(each.user_id), each.user_id) for each in answers] == [(type(each), each) for each in users]
            assert [each.owner for each in answers] == ["", "", "b" if first.shared else "", "", ""]
            assert answers[2].epoch == (theirs if first.shared else theirs + 1)

    async def test_no_users_no_answers(self, make: Make) -> None:
        async with opened(make()) as store:
            assert await store.claim_many([], "a") == []
            assert await store.save_many([]) == []

    async def test_of_sixteen_claims_at_once_one_wins(self, make: Make) -> None:
        nodes = [make() for _ in range(16)]
        if not nodes[0].shared:
            nodes = nodes[:1] * 16
        async with opened(*{id(node): node for node in nodes}.values()):
            answers = await asyncio.gather(*(claim(node, 1, f"n{place}") for place, node in enumerate(nodes)))
            granted = [(each.epoch, f"n{place}") for place, each in enumerate(answers) if each.granted]
            if nodes[0].shared:
                ((epoch, winner),) = granted
                assert {each.owner for each in answers} == {"", winner}
                assert {each.epoch for each in answers} == {epoch}
            else:
                assert len({epoch for epoch, _ in granted}) == 16
                epoch, winner = max(granted)
            records = [record(epoch=each.epoch, owner=f"n{place}") for place, each in enumerate(answers)]
            outcomes = [(await save(node, each))[0] for node, each in zip(nodes, records, strict=True)]
            assert outcomes.count(SAVED) == 1
            assert outcomes.count(FENCED) == 15
            assert (await stored(nodes[0], 1)).owner == winner

    # Saves

    async def test_a_save_is_there_for_load_and_scan_and_the_next_claim(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            kept = record(
                version=4, epoch=epoch, body=b'{"a":[1,2.5,null,"\xc3\xa9"]}', schema=3, saved_at=1700000000.25
            )
            assert await store.save_many([kept]) == [Verdict(SAVED)]
            assert await store.load(1) == kept
            assert await everything(store) == {(int, 1): kept}
            assert (await claim(store)).record == kept._replace(epoch=epoch + 1)

    @pytest.mark.parametrize("by", [-1, 1, 1000])
    async def test_a_save_under_another_epoch_is_fenced(self, make: Make, by: Any) -> None:
        async with opened(make()) as store:
            await claim(store)
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, body=b"1")) == [SAVED]
            assert await save(store, record(version=9, epoch=epoch + by, body=b"2", release=True)) == [FENCED]
            assert await store.load(1) == record(epoch=epoch, body=b"1")
            assert await save(store, record(version=2, epoch=epoch)) == [SAVED], "its release was not done either"

    async def test_a_save_by_another_owner_is_fenced(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, owner="b")) == [FENCED]
            assert await store.load(1) is None
            assert await save(store, record(epoch=epoch, body=b"1")) == [SAVED]
            for owner in ("b", "A", "a ", ""):
                late = record(version=9, epoch=epoch, owner=owner, body=b"2", release=True)
                assert await save(store, late) == [FENCED]
            assert await store.load(1) == record(epoch=epoch, body=b"1")

    async def test_another_owners_repeat_releases_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch)) == [SAVED]
            assert await save(store, record(epoch=epoch, owner="b", release=True)) == [FENCED]
            assert await save(store, record(version=2, epoch=epoch)) == [SAVED]

    async def test_another_owners_repeat_is_not_already_there_when_the_row_is_released(self, make: Make) -> None:
        """It was never written. Under its epoch may be somebody else's bytes, if the engine has lost the row before."""
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            last = record(epoch=epoch, version=2, release=True)
            assert await save(store, last) == [SAVED]
            for version in (1, 2, 3):
                assert await save(store, record(epoch=epoch, owner="b", version=version)) == [FENCED]
            assert await save(store, last) == [ALREADY]
            assert (await stored(store, 1)).owner == ""

    async def test_a_repeat_is_already_there_and_changes_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            kept = record(version=2, epoch=epoch, body=b"1", saved_at=5.0)
            assert await save(store, kept) == [SAVED]
            assert await save(store, kept) == [ALREADY]
            assert await save(store, kept._replace(saved_at=6.0)) == [ALREADY]
            assert await store.load(1) == kept

    async def test_a_lower_version_has_come_late_and_changes_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            kept = record(version=5, epoch=epoch, body=b"5")
            assert await save(store, kept) == [SAVED]
            assert await save(store, record(version=4, epoch=epoch, body=b"4", release=True)) == [ALREADY]
            assert await store.load(1) == kept
            assert await save(store, record(version=6, epoch=epoch, body=b"6")) == [SAVED], (
                "the late release was not done"
            )

    async def test_versions_go_on_over_claims(self, make: Make) -> None:
        """A claim changes the epoch only: the new owner's first version must lie above the one it was given."""
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(version=5, epoch=epoch, body=b"5", release=True)) == [SAVED]
            epoch = (await claim(store, 1, "b")).epoch
            assert await save(store, record(version=5, epoch=epoch, owner="b", body=b"x")) == [ALREADY]
            assert await save(store, record(version=6, epoch=epoch, owner="b", body=b"6")) == [SAVED]
            assert (await stored(store, 1)).body == b"6"

    async def test_versions_may_leave_gaps(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            for version in (3, 4, 90, BIG):
                assert await save(store, record(version=version, epoch=epoch)) == [SAVED]
                assert (await stored(store, 1)).version == version

    async def test_the_last_save_releases_in_the_same_write(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch)) == [SAVED]
            last = record(version=2, epoch=epoch, body=b"2", release=True)
            assert await save(store, last) == [SAVED]
            assert await store.load(1) == last._replace(owner="", release=False)
            assert not await store.release(1, epoch, "a"), "there was nothing left to let go of"
            assert (await claim(store, 1, "b")).granted

    async def test_the_last_save_may_be_repeated(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            last = record(version=2, epoch=epoch, release=True)
            assert await save(store, last) == [SAVED]
            assert await save(store, last) == [ALREADY]
            assert await save(store, last._replace(release=False)) == [ALREADY]
            assert await save(store, record(version=1, epoch=epoch)) == [ALREADY]
            assert (await claim(store, 1, "b")).granted

    async def test_a_repeat_with_release_releases(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch)) == [SAVED]
            assert await save(store, record(epoch=epoch, release=True)) == [ALREADY]
            assert not await store.release(1, epoch, "a")
            assert await save(store, record(version=2, epoch=epoch)) == [FENCED]
            assert (await claim(store, 1, "b")).granted

    @pytest.mark.parametrize("by", ["save", "release"])
    async def test_after_the_release_a_later_version_is_fenced(self, make: Make, by: Any) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, release=by == "save")) == [SAVED]
            if by == "release":
                assert await store.release(1, epoch, "a")
            for late in (record(version=2, epoch=epoch), record(version=3, epoch=epoch, release=True)):
                assert await save(store, late) == [FENCED]
            assert (await stored(store, 1)).version == 1

    async def test_a_user_who_is_not_there_is_missing_and_stays_so(self, make: Make) -> None:
        async with opened(make()) as store:
            assert await save(store, record(1), record("1", release=True)) == [MISSING, MISSING]
            assert await store.load(1) is None
            assert await store.load("1") is None
            assert await everything(store) == {}

    async def test_an_erased_user_is_not_written_to(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(version=3, epoch=epoch)) == [SAVED]
            assert await store.erase(1, "a")
            late = [
                record(version=4, epoch=epoch + by, release=release) for by in (-1, 0, 1) for release in (False, True)
            ]
            for each in [*late, record(version=3, epoch=epoch), record(version=4, epoch=epoch + 1, owner="")]:
                assert await save(store, each) == [ERASED]
            assert await store.load(1) is None

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
    async def test_of_several_records_of_one_user_the_latest_is_written(
        self, make: Make, order: tuple[int, ...]
    ) -> None:
        async with opened(make()) as store:
            await claim(store)
            epoch = (await claim(store)).epoch
            records = [
                record(version=9, epoch=epoch - 1, body=b"9", release=True),
                record(version=1, epoch=epoch, body=b"1"),
                record(version=2, epoch=epoch, body=b"2"),
            ]
            assert await save(store, *(records[place] for place in order)) == [SAVED] * 3
            assert await store.load(1) == records[2]

    async def test_several_records_of_one_user_get_the_verdict_of_the_latest(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            other = (await claim(store, "1")).epoch
            assert await save(store, record(version=2, epoch=epoch, body=b"2")) == [SAVED]
            batch = [
                record(version=3, epoch=epoch + 1),
                record("1", epoch=other),
                record(version=3, epoch=epoch),
                record("1", 2, epoch=other),
            ]
            assert await save(store, *batch) == [FENCED, SAVED, FENCED, SAVED]
            assert (await stored(store, 1)).version == 2
            assert (await stored(store, "1")).version == 2
            batch = [record(version=1, epoch=epoch, release=True), record(version=2, epoch=epoch)]
            assert await save(store, *batch) == [ALREADY, ALREADY]
            assert await save(store, record(version=4, epoch=epoch)) == [SAVED], "the release was not of the latest"

    async def test_one_call_with_every_verdict_answers_in_order(self, make: Make) -> None:
        async with opened(make()) as store:
            epochs = {
                each.user_id: each.epoch for each in await store.claim_many(["new", "kept", "taken", "gone"], "a")
            }
            assert await save(store, record("kept", 3, epoch=epochs["kept"])) == [SAVED]
            await claim(store, "taken", "a")
            await store.erase("gone", "a")
            batch = [
                record("nobody"),
                record("new", epoch=epochs["new"], release=True),
                record("taken", epoch=epochs["taken"]),
                record("kept", 3, epoch=epochs["kept"]),
                record("gone", epoch=epochs["gone"]),
                record("kept", 2, epoch=epochs["kept"]),
            ]
            assert await save(store, *batch) == [MISSING, SAVED, FENCED, ALREADY, ERASED, ALREADY]
            assert set(await everything(store)) == {(str, "new"), (str, "kept")}
            assert await save(store, *reversed(batch)) == [ALREADY, ERASED, ALREADY, FENCED, ALREADY, MISSING]

    # Release

    async def test_a_release_is_a_compare_and_set(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch)) == [SAVED]
            for user_id, wrong, owner in [(2, epoch, "a"), ("1", epoch, "a"), (1, epoch - 1, "a"), (1, epoch + 1, "a")]:
                assert not await store.release(user_id, wrong, owner)
            for owner in ("b", "A", ""):
                assert not await store.release(1, epoch, owner)
            assert await save(store, record(version=2, epoch=epoch)) == [SAVED], "nothing was released"
            assert await store.release(1, epoch, "a")
            assert not await store.release(1, epoch, "a")
            assert await store.load(1) == record(version=2, epoch=epoch, owner="")
            assert (await claim(store, 1, "b")).granted

    async def test_a_release_of_the_claim_before_lets_go_of_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            first = await claim(store)
            second = await claim(store)
            assert not await store.release(1, first.epoch, "a")
            assert await save(store, record(epoch=second.epoch)) == [SAVED]

    async def test_a_release_of_a_user_who_was_never_saved_leaves_no_data(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await store.release(1, epoch, "a")
            assert not await store.release(1, epoch, "a")
            assert set(await save(store, record(epoch=epoch))) <= NOT_THERE
            assert await store.load(1) is None
            again = await claim(store, 1, "b")
            assert again == Claim(1, again.epoch, None)
            assert again.epoch > epoch

    async def test_a_release_of_an_erased_user_does_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch)) == [SAVED]
            assert await store.erase(1, "a")
            for wrong in (epoch, epoch + 1):
                assert not await store.release(1, wrong, "a")
            assert await save(store, record(version=2, epoch=epoch + 1)) == [ERASED]

    # Erasure

    async def test_an_erasure_says_whether_there_was_anything(self, make: Make) -> None:
        async with opened(make()) as store:
            assert not await store.erase(1)
            epoch = (await claim(store)).epoch
            assert not await store.erase(1, "a"), "it was claimed and never saved"
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, release=True)) == [SAVED]
            assert await store.erase(1)
            assert not await store.erase(1)
            assert await store.load(1) is None
            assert await everything(store) == {}

    async def test_an_erasure_leaves_everybody_else_alone(self, make: Make) -> None:
        async with opened(make()) as store:
            for user_id in (1, "1", 11):
                assert await save(store, record(user_id, epoch=(await claim(store, user_id)).epoch)) == [SAVED]
            assert await store.erase(1, "a")
            assert set(await everything(store)) == {(str, "1"), (int, 11)}

    async def test_an_erasure_fences_whoever_had_the_user(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await store.erase(1, "a") is False
            assert await save(store, record(epoch=epoch)) == [ERASED]
            assert await save(store, record(epoch=epoch + 1)) == [ERASED]
            again = (await claim(store)).epoch
            assert again > epoch + 1
            assert await save(store, record(epoch=epoch)) == [FENCED]
            assert await save(store, record(epoch=epoch + 1)) == [FENCED]

    async def test_an_erasure_is_refused_while_another_live_owner_has_the_user(self, make: Make) -> None:
        first, second = make(), make()
        self.skip_unless_shared(first)
        async with opened(first, second) as (here, there):
            epoch = (await claim(here, 1, "a")).epoch
            for kept in (None, record(epoch=epoch)):
                if kept is not None:
                    assert await save(here, kept) == [SAVED]
                for owner in ("b", ""):
                    with pytest.raises(OwnedElsewhereError) as caught:
                        await there.erase(1, owner)
                    assert caught.value.owner == "a"
                    assert caught.value.user_id == 1
                assert await there.load(1) == kept
            assert await save(here, record(version=2, epoch=epoch)) == [SAVED]
            await self.bury(there, "a")
            assert await there.erase(1, "b")
            assert await save(here, record(version=3, epoch=epoch)) == [ERASED]

    # Users, bodies, numbers

    async def test_a_number_and_its_text_are_two_users_everywhere(self, make: Make) -> None:
        async with opened(make()) as store:
            number, text = await store.claim_many([1, "1"], "a")
            assert (type(number.user_id), type(text.user_id)) == (int, str)
            assert await save(store, record("1", 7, epoch=text.epoch, body=b'"text"')) == [SAVED]
            assert await store.load(1) is None
            assert await save(store, record(1, 3, epoch=number.epoch, body=b'"number"')) == [SAVED]
            assert type((await stored(store, 1)).user_id) is int
            assert type((await stored(store, "1")).user_id) is str
            assert {key: each.body for key, each in (await everything(store)).items()} == {
                (int, 1): b'"number"',
                (str, "1"): b'"text"',
            }
            assert await store.release("1", text.epoch, "a")
            assert await save(store, record(1, 4, epoch=number.epoch)) == [SAVED]
            assert await store.erase(1, "a")
            assert (await stored(store, "1")).body == b'"text"'
            assert (await loaded(store, "1")).version == 7
            assert (await claim(store, 1)).record is None

    async def test_odd_user_ids_are_kept_apart_and_come_back_as_they_were(self, make: Make) -> None:
        async with opened(make()) as store:
            answers = await store.claim_many(ODD_IDS, "a")
            assert [(type(each.user_id), each.user_id) for each in answers] == [(type(each), each) for each in ODD_IDS]
            records = [
                record(each.user_id, place + 1, epoch=each.epoch, body=b"%d" % place)
                for place, each in enumerate(answers)
            ]
            assert await save(store, *records) == [SAVED] * len(ODD_IDS)
            assert await everything(store) == {(type(each.user_id), each.user_id): each for each in records}
            for each in records:
                assert await store.load(each.user_id) == each
            for each in records[::2]:
                assert await store.release(each.user_id, each.epoch, "a")
            for each in records[1::2]:
                assert await store.erase(each.user_id, "a")
            assert len(await everything(store)) == len(records[::2])

    async def test_owners_are_compared_as_they_are(self, make: Make) -> None:
        async with opened(make()) as store:
            owner = "host-é'\"{}\n:1234:" + "f" * 64
            epoch = (await claim(store, 1, owner)).epoch
            assert await save(store, record(epoch=epoch, owner=owner)) == [SAVED]
            assert (await stored(store, 1)).owner == owner
            assert await store.release(1, epoch, owner)

    async def test_numbers_up_to_the_bound_come_back_exactly(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            for version, schema, saved_at in [(1, 0, 0.0), (BIG - 1, 2**31 - 1, 1e-3), (BIG, 1, 4102444800.123456)]:
                kept = record(version=version, epoch=epoch, schema=schema, saved_at=saved_at)
                assert await save(store, kept) == [SAVED]
                back = await store.load(1)
                assert back == kept
                assert [type(each) for each in back] == [type(each) for each in kept]

    @pytest.mark.parametrize(
        "body",
        [
            b"{}",
            b"null",
            b"0",
            b'""',
            b"[ 1 , 2 ]",
            b"1.0",
            b"123456789012345678901234567890",
            '{"é":"\U0001f409\u2028"}'.encode(),
            b'{"b":1,"a":2,"b":3}',
            b'"' + b"x" * 1_000_000 + b'"',
            b"[" + b"1," * 300_000 + b"1]",
        ],
        ids=lambda body: body[:12].decode(errors="replace"),
    )
    async def test_a_body_comes_back_byte_for_byte(self, make: Make, body: bytes) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, body=body)) == [SAVED]
            back = await store.load(1)
            assert type(back.body) is bytes
            assert back.body == body
            assert (await loaded(store)).body == body
            assert (await everything(store))[int, 1].body == body

    @pytest.mark.parametrize("poison", [b'"\\u0000"', b'"\0"', b"\xff", b'"\xed\xa0\x80"', b"{", b""], ids=repr)
    async def test_a_body_that_the_engine_refuses_makes_no_other_fail(self, make: Make, poison: bytes) -> None:
        """Whether it refuses is its own affair; what it takes comes back."""
        async with opened(make()) as store:
            epochs = {each.user_id: each.epoch for each in await store.claim_many(range(9), "a")}
            records = [
                record(user, epoch=epoch, body=poison if user == 4 else b"[7]") for user, epoch in epochs.items()
            ]
            verdicts = await store.save_many(records)
            assert [verdict.outcome for verdict in verdicts[:4] + verdicts[5:]] == [SAVED] * 8
            assert verdicts[4].outcome in (SAVED, INVALID)
            if verdicts[4].outcome == SAVED:
                assert (await stored(store, 4)).body == poison
            else:
                assert verdicts[4].detail
                assert await store.load(4) is None
                assert await save(store, records[4]._replace(body=b"[8]")) == [SAVED]
            assert len(await everything(store)) == 9

    # Looking

    async def test_load_claims_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            assert await store.load(1) is None
            assert await save(store, record()) == [MISSING], "it made no row"
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch)) == [SAVED]
            for _ in range(3):
                await store.load(1)
            assert await save(store, record(version=2, epoch=epoch)) == [SAVED]

    async def test_the_holder_of_a_user_is_told_and_claims_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            assert await store.holder(1) == ("", 0)
            epoch = (await claim(store)).epoch
            if store.shared:
                assert await store.holder(1) == ("a", epoch), "also of a user who was never saved"
            assert await save(store, record(epoch=epoch)) == [SAVED]
            assert await store.holder(1) == ("a", epoch)
            assert await store.holder("1") == ("", 0)
            assert await store.release(1, epoch, "a")
            assert await store.holder(1) == ("", epoch)
            assert (await claim(store)).epoch == epoch + 1
            assert await store.erase(1, "a")
            assert (await store.holder(1))[0] == ""

    async def test_scan_gives_everybody_with_a_body_once_while_saves_go_on(self, make: Make) -> None:
        async with opened(make()) as store:
            users = list(range(1200))
            epochs = {each.user_id: each.epoch for each in await store.claim_many(users, "a")}
            assert set(await save(store, *(record(each, epoch=epochs[each]) for each in users))) == {SAVED}
            await claim(store, "never saved")
            await store.erase(7, "a")
            seen: list[int | str] = []
            async for each in store.scan():
                seen.append(each.user_id)
                if each.user_id == 300:
                    assert await save(store, record(900, 2, epoch=epochs[900], body=b"2")) == [SAVED]
                if each.user_id == 900:
                    assert each.body in (b"{}", b"2")
            assert sorted(seen) == [each for each in users if each != 7]

    async def test_a_scan_that_is_left_early_holds_nothing_up(self, make: Make) -> None:
        async with opened(make()) as store:
            epochs = {each.user_id: each.epoch for each in await store.claim_many(range(3), "a")}
            await save(store, *(record(each, epoch=epochs[each]) for each in range(3)))
            scan = store.scan()
            assert (await anext(scan)).user_id in epochs
            assert await save(store, record(1, 2, epoch=epochs[1])) == [SAVED]
            await scan.aclose()

    # Calls

    async def test_calls_that_run_at_the_same_time_do_not_mix(self, make: Make) -> None:
        async with opened(make()) as store:

            async def life(user_id: int) -> None:
                epoch = (await claim(store, user_id)).epoch
                for version in (1, 2, 3):
                    kept = record(user_id, version, epoch=epoch, body=b'"%d/%d"' % (user_id, version))
                    assert await save(store, kept) == [SAVED]
                    assert await store.load(user_id) == kept
                assert await store.release(user_id, epoch, "a")

            await asyncio.gather(*(life(user_id) for user_id in range(60)))
            assert {each.body for each in (await everything(store)).values()} == {
                b'"%d/3"' % each for each in range(60)
            }

    async def test_a_cancelled_caller_breaks_nothing_for_the_others(self, make: Make) -> None:
        async with opened(make()) as store:
            epochs = {each.user_id: each.epoch for each in await store.claim_many(range(20), "a")}
            calls: list[asyncio.Future[Any]] = []
            calls += [asyncio.ensure_future(save(store, record(each, epoch=epochs[each]))) for each in range(20)]
            calls += [asyncio.ensure_future(claim(store, each)) for each in (20, 21)]
            await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            ended: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) or each == [SAVED] for each in ended[:20:2])
            assert ended[1:20:2] == [[SAVED]] * 10
            assert ended[21].granted
            for each in range(20):
                assert (await save(store, record(each, epoch=epochs[each]))) in ([SAVED], [ALREADY])
                assert (await store.load(each)) == record(each, epoch=epochs[each])
            assert (await claim(store, 20)).granted

    # Opening and closing

    async def test_a_store_that_is_not_open_says_so(self, make: Make) -> None:
        store = make()

        async def refused() -> None:
            for call in (
                store.claim_many([1], "a"),
                store.save_many([record()]),
                store.release(1, 1, "a"),
                store.erase(1),
                store.load(1),
                anext(store.scan()),
            ):
                with pytest.raises(StoreUnavailableError):
                    await call

        await refused()
        await store.close()
        await store.open()
        await claim(store)
        await store.close()
        await store.close()
        await refused()

    async def test_what_was_saved_is_there_when_it_is_opened_again(self, make: Make) -> None:
        first = make()
        for store in (first, first, make()):
            async with opened(store):
                found = await claim(store)
                before = 0 if found.record is None else found.record.version
                assert await save(store, record(version=before + 1, epoch=found.epoch, body=b"%d" % before)) == [SAVED]
        assert before == 2

    async def test_it_says_what_it_is(self, make: Make) -> None:
        store = make()
        async with opened(store):
            assert store.fenced
            assert store.keeps_schema
            assert store.name
            assert store.loss_class
            assert "\n" not in store.loss_class


# Random histories

USERS: tuple[int | str, ...] = (1, "1", -5, "é'")
OWNERS = ("a", "b", "c")
Key = tuple[type, "int | str"]


@dataclass
class Row:
    """What the contract says about one user. `forgotten`: the store may have kept a row, or not."""

    epoch: int = 0
    claimant: str = ""
    released: bool = True
    kept: Record | None = None
    erased: bool = False
    forgotten: bool = True

    @property
    def owner(self) -> str:
        return "" if self.released else self.claimant

    @property
    def version(self) -> int:
        return 0 if self.kept is None else self.kept.version

    def as_stored(self) -> Record | None:
        return None if self.kept is None else self.kept._replace(epoch=self.epoch, owner=self.owner, release=False)

    def expected(self, record: Record) -> set[Outcome]:
        """What may be answered to one record; writes it where that is `SAVED`."""
        if self.erased:
            return {ERASED}
        if self.forgotten:
            return {MISSING} if self.epoch == 0 else NOT_THERE
        if (record.epoch, record.owner) != (self.epoch, self.claimant):
            return {FENCED}
        if record.version > self.version:
            if self.released:
                return {FENCED}
            self.kept = record
        if record.version == self.version and record.release:
            self.released = True
        return {SAVED} if record is self.kept else {ALREADY}


class StoreMachine(RuleBasedStateMachine):
    """Random claims, saves, releases, erasures and deaths, compared with a dict after each step.

    Subclass it, override `make` and, if the store is shared, `bury`, and hand it to `machine_test`. What `make` opens
    has to be empty: each history begins anew.
    """

    def make(self) -> Store:
        """A store, not opened, on a backing without users."""
        raise NotImplementedError

    def bury(self, owner: str) -> None:
        """Make `owner` dead by the store's own rule; `self.runner` runs coroutines."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner: asyncio.Runner = asyncio.Runner()
        self.rows: dict[Key, Row] = {}
        self.dead: set[str] = set()
        self.store: Store = self.make()

    @initialize()
    def open(self) -> None:
        self.runner.run(self.store.open())

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def row(self, user_id: int | str) -> Row:
        return self.rows.setdefault((type(user_id), user_id), Row())

    def owned_by_another(self, row: Row, owner: str) -> bool:
        return self.store.shared and row.owner not in ("", owner) and row.owner not in self.dead

    @rule(users=st.lists(st.sampled_from(USERS), unique_by=repr, max_size=4), owner=st.sampled_from(OWNERS))
    def claim(self, users: list[int | str], owner: str) -> None:
        answers = self.runner.run(self.store.claim_many(users, owner))
        assert [repr(each.user_id) for each in answers] == [repr(each) for each in users]
        for answer in answers:
            row = self.row(answer.user_id)
            if self.owned_by_another(row, owner):
                assert answer == Claim(answer.user_id, row.epoch, None, row.owner)
                continue
            assert answer.granted
            assert answer.epoch > row.epoch if row.forgotten else answer.epoch == row.epoch + 1
            row.epoch, row.claimant, row.released = answer.epoch, owner, False
            row.erased = row.forgotten = False
            assert answer.record == row.as_stored()

    @rule(
        picks=st.lists(
            st.tuples(
                st.sampled_from(USERS),
                st.sampled_from([0, 0, 0, 0, -1, 1]),
                st.sampled_from([1, 1, 1, 0, -1, 3]),
                st.sampled_from(["its", "its", "its", *OWNERS]),
                st.booleans(),
            ),
            max_size=6,
        )
    )
    def save(self, picks: list[tuple[int | str, int, int, str, bool]]) -> None:
        records: dict[tuple[Key, int, int], Record] = {}
        order = []
        for user_id, by_epoch, by_version, owner, release in picks:
            row = self.row(user_id)
            epoch, version = max(row.epoch + by_epoch, 1), max(row.version + by_version, 1)
            body = b'{"epoch":%d,"version":%d}' % (epoch, version)
            made = Record(
                user_id,
                epoch,
                (row.claimant or "a") if owner == "its" else owner,
                version,
                2,
                body,
                version / 4,
                release,
            )
            # one version is one write: the same bytes, the same release
            order.append(records.setdefault(((type(user_id), user_id), epoch, version), made))
        verdicts = self.runner.run(self.store.save_many(order))
        assert len(verdicts) == len(order)
        latest: dict[Key, Record] = {}
        for each in sorted(order, key=lambda each: (each.epoch, each.version)):
            latest[type(each.user_id), each.user_id] = each
        allowed = {key: self.rows[key].expected(each) for key, each in latest.items()}
        answered: dict[Key, set[Outcome]] = {}
        for each, verdict in zip(order, verdicts, strict=True):
            key = (type(each.user_id), each.user_id)
            assert verdict.outcome in allowed[key]
            answered.setdefault(key, set()).add(verdict.outcome)
        assert all(len(each) == 1 for each in answered.values())

    @rule(user_id=st.sampled_from(USERS), by=st.sampled_from([0, 0, 0, -1, 1]), owner=st.sampled_from(["its", *OWNERS]))
    def release(self, user_id: int | str, by: int, owner: str) -> None:
        row = self.row(user_id)
        owner = (row.claimant or "a") if owner == "its" else owner
        was_its = not row.forgotten and row.owner == owner and by == 0
        assert self.runner.run(self.store.release(user_id, row.epoch + by, owner)) is was_its
        if was_its:
            row.released = True
            row.forgotten = row.kept is None

    @rule(user_id=st.sampled_from(USERS), owner=st.sampled_from(["", *OWNERS]))
    def erase(self, user_id: int | str, owner: str) -> None:
        row = self.row(user_id)
        if self.owned_by_another(row, owner):
            with pytest.raises(OwnedElsewhereError):
                self.runner.run(self.store.erase(user_id, owner))
            return
        assert self.runner.run(self.store.erase(user_id, owner)) is (row.kept is not None)
        if not row.forgotten:
            row.epoch += 1
            row.released, row.kept, row.erased = True, None, True
        elif row.epoch:
            # a store that has kept the row now has a tombstone: a claim tells them apart, and both are new
            again = self.runner.run(self.store.claim_many([user_id], "a"))[0]
            assert again.granted
            assert again.epoch > row.epoch
            row.epoch, row.claimant, row.released, row.forgotten = again.epoch, "a", False, False

    @precondition(lambda self: self.store.shared)
    @rule(owner=st.sampled_from(OWNERS[:2]))
    def die(self, owner: str) -> None:
        self.dead.add(owner)
        self.bury(owner)

    @rule()
    def open_again(self) -> None:
        self.runner.run(self.store.close())
        self.runner.run(self.store.open())

    @invariant()
    def everything_is_as_the_contract_says(self) -> None:
        if not self.rows:
            return
        expected = {key: row.as_stored() for key, row in self.rows.items()}
        found = self.runner.run(everything(self.store))
        assert found == {key: each for key, each in expected.items() if each is not None}
        for (_, user_id), each in expected.items():
            assert self.runner.run(self.store.load(user_id)) == each


def machine_test(machine: type[StoreMachine], examples: int = 30) -> Any:
    """The test case of a machine: ``TestMine = machine_test(MyMachine)``. CAGEY_TEST_EXAMPLES overrides `examples`."""
    case = machine.TestCase
    case.settings = settings(
        max_examples=int(os.environ.get("CAGEY_TEST_EXAMPLES", examples)), stateful_step_count=30, deadline=None
    )
    return case
