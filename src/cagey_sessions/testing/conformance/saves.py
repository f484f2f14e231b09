"""The tests of `save_many`, and of each of its verdicts. The bounds of bodies are in `values.py`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ...stores import Verdict
from .base import (
    ALREADY,
    BIG,
    ERASED,
    FENCED,
    MISSING,
    SAVED,
    Conformance,
    Make,
    claim,
    claims,
    everything,
    opened,
    record,
    release,
    save,
    stored,
)

__all__ = ["Saves"]


class Saves(Conformance):
    """Saves, their verdicts, and several records of one user."""

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
        """The record was never written: if the engine has lost the row before, another owner may have its epoch."""
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
        """A claim changes the epoch only: the new owner's first version has to be above the one that it was given."""
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
            assert not await release(store, 1, epoch, "a"), "there was nothing left to let go of"
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
            assert not await release(store, 1, epoch, "a")
            assert await save(store, record(version=2, epoch=epoch)) == [FENCED]
            assert (await claim(store, 1, "b")).granted

    async def test_many_last_saves_that_are_repeats_release_in_one_call(self, make: Make) -> None:
        """As at the end of a server, when the data of most users is stored already, and others are still written."""
        async with opened(make()) as store:
            users = range(450)
            epochs = {each.user_id: each.epoch for each in await store.claim_many(users, "a")}
            first = [record(each, 2, epoch=epochs[each]) for each in users]
            assert set(await save(store, *first)) == {SAVED}
            last = [
                [
                    each._replace(release=True),
                    each._replace(release=True, version=3, body=b"3"),
                    each._replace(release=True, version=1, body=b"1"),
                    each._replace(release=True, epoch=each.epoch - 1),
                    each,
                ][place % 5]
                for place, each in enumerate(first)
            ]
            outcomes = await save(store, *last)
            assert outcomes == [[ALREADY, SAVED, ALREADY, FENCED, ALREADY][each % 5] for each in users]
            released = [each.user_id for each in (await everything(store)).values() if not each.owner]
            assert sorted(released) == [each for each in users if each % 5 < 2]
            assert {each.body for each in (await everything(store)).values()} == {b"{}", b"3"}

    @pytest.mark.parametrize("by", ["save", "release"])
    async def test_after_the_release_a_later_version_is_fenced(self, make: Make, by: Any) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, release=by == "save")) == [SAVED]
            if by == "release":
                assert await release(store, 1, epoch, "a")
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
            epochs = {each.user_id: each.epoch for each in await claims(store, ["new", "kept", "taken", "gone"])}
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
