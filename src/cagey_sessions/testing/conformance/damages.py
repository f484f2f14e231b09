"""The tests of damaged rows, and of other users' rows beside them. A subclass says how to damage a row."""

from __future__ import annotations

from typing import Any

import pytest

from ...errors import CorruptRecordError
from ...stores import Claim, Outcome, Record, Store
from .base import SAVED, Conformance, Make, claim, claims, opened, record, release, save

__all__ = ["Damages"]


class Damages(Conformance):
    """Damaged rows; skipped unless `damage` is overridden."""

    async def damage(self, store: Store, user_id: int | str) -> None:
        """Set the version in the row of a saved user to something that is not a number from 0 up, past the store."""
        # only the author of a store knows how to write past it; a store that keeps objects in memory has no such rows
        pytest.skip("this suite does not say how a row is damaged")

    async def _saved(self, store: Any, *users: int | str, is_last: bool) -> dict[int | str, Record]:
        records = {
            each.user_id: record(each.user_id, 3, epoch=each.epoch, body=b"[3]", release=is_last)
            for each in await claims(store, users)
        }
        assert set(await save(store, *records.values())) == {SAVED}
        return records

    async def test_a_damaged_row_is_refused_alone_and_is_never_new(self, make: Make) -> None:
        async with opened(make()) as store:
            await self._saved(store, 1, "1", 2, is_last=True)
            await self.damage(store, 1)
            for _ in range(2):
                answers = await store.claim_many(["1", 1, 2, "new"], "a")
                assert [type(each) for each in answers] == [Claim, CorruptRecordError, Claim, Claim]
                assert answers[1].user_id == 1
                assert answers[1].body == b"[3]" or not answers[1].body
                assert [each.record and each.record.body for each in answers if each is not answers[1]] == [
                    b"[3]",
                    b"[3]",
                    None,
                ]
            with pytest.raises(CorruptRecordError) as caught:
                await store.load(1)
            assert caught.value.user_id == 1

    async def test_a_damaged_row_is_told_by_a_scan_which_goes_on(self, make: Make) -> None:
        async with opened(make()) as store:
            await self._saved(store, *range(9), is_last=True)
            await self.damage(store, 4)
            found = [each async for each in store.scan()]
            assert {each.user_id for each in found if isinstance(each, Record)} == set(range(9)) - {4}
            assert [each.user_id for each in found if isinstance(each, CorruptRecordError)] == [4]
            assert len(found) == 9

    async def test_nothing_is_written_to_a_damaged_row(self, make: Make) -> None:
        async with opened(make()) as store:
            first = await self._saved(store, 1, 2, is_last=False)
            await self.damage(store, 1)
            for is_last in (False, True):
                version = 4 + is_last
                batch = [each._replace(version=version, body=b"[4]", release=is_last) for each in first.values()]
                verdicts = await store.save_many(batch)
                assert [each.outcome for each in verdicts] == [Outcome.FAILED, SAVED]
                assert verdicts[0].detail
            assert not await release(store, 1, first[1].epoch, "a")
            assert isinstance((await store.claim_many([1], "a"))[0], CorruptRecordError)

    async def test_a_damaged_row_is_erased_and_its_user_is_new_then(self, make: Make) -> None:
        async with opened(make()) as store:
            first = await self._saved(store, 1, is_last=True)
            await self.damage(store, 1)
            assert await store.erase(1)
            assert await store.load(1) is None
            assert not await store.erase(1)
            again = await claim(store)
            assert again.record is None
            assert again.epoch > first[1].epoch
            assert await save(store, record(epoch=again.epoch)) == [SAVED]
