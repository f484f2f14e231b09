"""The tests of reading without a claim, of concurrent calls, and of opening and closing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ...errors import StoreUnavailableError
from .base import (
    ALREADY,
    MISSING,
    SAVED,
    Conformance,
    Make,
    claim,
    claims,
    every_call,
    everything,
    opened,
    record,
    release,
    save,
)

__all__ = ["Calls"]


class Calls(Conformance):
    """Reading without a claim, concurrent calls, opening and closing."""

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
            assert await release(store, 1, epoch, "a")
            assert await store.holder(1) == ("", epoch)
            assert (await claim(store)).epoch == epoch + 1
            assert await store.erase(1, "a")
            assert (await store.holder(1))[0] == ""

    async def test_scan_gives_everybody_with_a_body_once_while_saves_go_on(self, make: Make) -> None:
        async with opened(make()) as store:
            users = list(range(1200))
            epochs = {each.user_id: each.epoch for each in await claims(store, users)}
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
            epochs = {each.user_id: each.epoch for each in await claims(store, range(3))}
            await save(store, *(record(each, epoch=epochs[each]) for each in range(3)))
            scan = store.scan()
            assert (await anext(scan)).user_id in epochs
            assert await save(store, record(1, 2, epoch=epochs[1])) == [SAVED]
            await scan.aclose()

    async def test_calls_that_run_at_the_same_time_do_not_mix(self, make: Make) -> None:
        async with opened(make()) as store:

            async def life(user_id: int) -> None:
                epoch = (await claim(store, user_id)).epoch
                for version in (1, 2, 3):
                    kept = record(user_id, version, epoch=epoch, body=b'"%d/%d"' % (user_id, version))
                    assert await save(store, kept) == [SAVED]
                    assert await store.load(user_id) == kept
                assert await release(store, user_id, epoch, "a")

            await asyncio.gather(*(life(user_id) for user_id in range(60)))
            assert {each.body for each in (await everything(store)).values()} == {
                b'"%d/3"' % each for each in range(60)
            }

    async def test_a_cancelled_caller_breaks_nothing_for_the_others(self, make: Make) -> None:
        async with opened(make()) as store:
            epochs = {each.user_id: each.epoch for each in await claims(store, range(20))}
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

    async def test_a_store_that_is_not_open_says_so(self, make: Make) -> None:
        store = make()

        async def refused() -> None:
            for call in every_call(store):
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
