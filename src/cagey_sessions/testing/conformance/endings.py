"""The tests of releases and erasures. A last save, which releases in the same write, is in `saves.py`."""

from __future__ import annotations

import pytest

from ...errors import OwnedElsewhereError
from ...stores import Claim
from .base import ERASED, FENCED, NOT_THERE, SAVED, Conformance, Make, claim, everything, opened, record, release, save

__all__ = ["Endings"]


class Endings(Conformance):
    """Releases and erasures."""

    async def test_a_release_is_a_compare_and_set(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch)) == [SAVED]
            wrong: list[tuple[int | str, int]] = [(2, epoch), ("1", epoch), (1, epoch - 1), (1, epoch + 1)]
            for user_id, other in wrong:
                assert not await release(store, user_id, other, "a")
            for owner in ("b", "A", ""):
                assert not await release(store, 1, epoch, owner)
            assert await save(store, record(version=2, epoch=epoch)) == [SAVED], "nothing was released"
            assert await release(store, 1, epoch, "a")
            assert not await release(store, 1, epoch, "a")
            assert await store.load(1) == record(version=2, epoch=epoch, owner="")
            assert (await claim(store, 1, "b")).granted

    async def test_a_release_of_the_claim_before_lets_go_of_nothing(self, make: Make) -> None:
        async with opened(make()) as store:
            first = await claim(store)
            second = await claim(store)
            assert not await release(store, 1, first.epoch, "a")
            assert await save(store, record(epoch=second.epoch)) == [SAVED]

    async def test_many_are_released_in_one_call_each_for_itself(self, make: Make) -> None:
        async with opened(make()) as store:
            users: list[int | str] = [*range(450), *map(str, range(450))]
            epochs = {(type(each.user_id), each.user_id): each.epoch for each in await store.claim_many(users, "a")}
            saved = [each for each in users if isinstance(each, int)]
            records = [record(each, epoch=epochs[int, each]) for each in saved]
            assert set(await save(store, *records)) == {SAVED}
            theirs = users[::3]
            pairs = [(each, epochs[type(each), each] + (each not in theirs)) for each in reversed(users)]
            assert await store.release_many(pairs, "b") == [False] * len(users)
            assert await store.release_many(pairs, "a") == [each in theirs for each in reversed(users)]
            assert await store.release_many(pairs, "a") == [False] * len(users)
            left = {user_id for _, user_id in await everything(store)}
            assert left == set(saved), "no data came, and none went"
            kept = [each for each in users if each not in theirs]
            later = [record(each, 2, epoch=epochs[type(each), each]) for each in kept]
            assert set(await save(store, *later)) == {SAVED}, "they were not let go of"
            again = [(type(each.user_id), each.user_id, each.epoch) for each in await store.claim_many(theirs, "b")]
            assert all(epoch > epochs[kind, user_id] for kind, user_id, epoch in again)

    async def test_a_release_of_a_user_who_was_never_saved_leaves_no_data(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await release(store, 1, epoch, "a")
            assert not await release(store, 1, epoch, "a")
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
            for each in (epoch, epoch + 1):
                assert not await release(store, 1, each, "a")
            assert await save(store, record(version=2, epoch=epoch + 1)) == [ERASED]

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
