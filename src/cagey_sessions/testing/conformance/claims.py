"""The tests of claims, and of their epochs. Releases are in `endings.py`."""

from __future__ import annotations

import asyncio
import itertools

from ...stores import Claim
from .base import (
    BIG,
    FENCED,
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

__all__ = ["Claims"]


class Claims(Conformance):
    """Claims, and their epochs."""

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
            assert not await release(there, 1, epoch, "b")
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
            assert not await release(here, 1, epoch, "a")
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
                    assert await release(store, 1, epoch, "a")
                elif happens in ("save", "last"):
                    assert await save(store, record(version=50 + epoch, epoch=epoch, release=happens == "last")) == [
                        SAVED
                    ]
                elif happens == "erase":
                    assert await store.erase(1, "a")
            assert seen == sorted(set(seen))

    async def test_epochs_of_a_user_who_was_never_saved_rise_too(self, make: Make) -> None:
        """Otherwise an old write that comes late would be accepted under the current claim."""
        async with opened(make()) as store:
            seen = []
            for user_id in [1, 1, 2, 2, 1, 3, 2, 1]:
                epoch = (await claim(store, user_id)).epoch
                seen.append((user_id, epoch))
                assert await release(store, user_id, epoch, "a")
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
            answers = await claims(second, users)
            assert [(type(each.user_id), each.user_id) for each in answers] == [(type(each), each) for each in users]
            assert [each.owner for each in answers] == ["", "", "b" if first.shared else "", "", ""]
            assert answers[2].epoch == (theirs if first.shared else theirs + 1)

    async def test_no_users_no_answers(self, make: Make) -> None:
        async with opened(make()) as store:
            assert await store.claim_many([], "a") == []
            assert await store.save_many([]) == []
            assert await store.release_many([], "a") == []

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
