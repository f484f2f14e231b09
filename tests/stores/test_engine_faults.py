"""The stores of shared engines on a network that fails. Engines that end and come back: test_engine_restarts.py."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid

import asyncpg
import orjson
import pytest
import redis

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.stores import Outcome, PostgresStore
from cagey_sessions.testing.store_conformance import opened, record, release, save
from support import REDIS, execute
from support.proxied import (
    BOUND,
    DROP,
    TIMEOUT,
    Adapter,
    adapters,
    all_unavailable,
    cut_and_stall,
    drip,
    half_close_and_stall,
    refuse,
    stall,
    under,
    until_it_works,
)

SAVED, ALREADY = Outcome.SAVED, Outcome.ALREADY
PLACES = 6
"""How many connections either store has for calls."""


@pytest.fixture(params=adapters("postgres", "redis"))
def adapter(request):
    here = Adapter(request.param, f"cagey_{uuid.uuid4().hex}")
    yield here
    if here.kind == "postgres":
        asyncio.run(execute(DROP % here.mine))
    else:
        with redis.Redis.from_url(REDIS) as client:
            for key in client.scan_iter(f"{here.mine}*", count=1000):
                client.delete(key)


async def fill(store, users):
    """Users of owner `a` with a body each that says whose it is; gives their epochs."""
    claims = await store.claim_many(users, "a")
    epochs = {each.user_id: each.epoch for each in claims}
    assert set(await save(store, *(version_of(user, 1, epoch) for user, epoch in epochs.items()))) == {SAVED}
    return epochs


def version_of(user, version, epoch, **more):
    return record(user, version, epoch=epoch, body=orjson.dumps({"user": user, "version": version}), **more)


def is_of(user, found):
    """Whether a record is that user's, its body too."""
    return found is not None and found.user_id == user and found.value()["user"] == user


# A fault under each call

USERS = {name: f"{name}-the-user" for name in ("save", "claim", "release", "erase", "load", "holder")}


def calls_of(store, epochs):
    """One of each kind of call, each for a user of its own."""
    save_, claim_, release_, erase_, load_, holder_ = USERS.values()
    return {
        "save": lambda: store.save_many([version_of(save_, 2, epochs[save_])]),
        "claim": lambda: store.claim_many([claim_], "a"),
        "release": lambda: release(store, release_, epochs[release_], "a"),
        "erase": lambda: store.erase(erase_, "a"),
        "load": lambda: store.load(load_),
        "holder": lambda: store.holder(holder_),
    }


async def check_after(store, epochs):
    """What became of the calls is not known; whichever it was, this is how their repeats end."""
    calls = calls_of(store, epochs)
    ((outcome, _),) = await until_it_works(calls["save"])
    assert outcome in (SAVED, ALREADY)
    found = await store.load(USERS["save"])
    assert is_of(USERS["save"], found) and found.version == 2
    (claimed,) = await until_it_works(calls["claim"])
    assert claimed.granted and claimed.epoch > epochs[USERS["claim"]]
    assert is_of(USERS["claim"], claimed.record) and claimed.record.version == 1
    await until_it_works(calls["release"])
    assert await store.holder(USERS["release"]) == ("", epochs[USERS["release"]])
    assert is_of(USERS["release"], await store.load(USERS["release"]))
    await until_it_works(calls["erase"])
    assert await store.load(USERS["erase"]) is None
    assert is_of(USERS["load"], await store.load(USERS["load"]))
    assert await store.holder(USERS["holder"]) == ("a", epochs[USERS["holder"]])


async def test_whatever_is_asked_for_during_a_fault_ends_as_unavailable_and_works_soon_after(adapter):
    async def suffer(adapter, fault):
        async with adapter.proxy() as proxy, opened(adapter.store(proxy)) as store:
            epochs = await fill(store, list(USERS.values()))
            async with under(fault, proxy), asyncio.timeout(BOUND):
                answers = await asyncio.gather(
                    *(call() for call in calls_of(store, epochs).values()), return_exceptions=True
                )
            assert all_unavailable(answers), (fault, answers)
            await check_after(store, epochs)

    faults = stall, drip, refuse, cut_and_stall  # at the same time, for each takes its time
    await asyncio.gather(*(suffer(adapter.part(fault.__name__), fault) for fault in faults))


@pytest.mark.parametrize("fault", ["cut", "half_close"])
async def test_connections_that_fail_under_calls_make_them_unavailable_and_the_next_ones_work(adapter, fault):
    async with adapter.proxy() as proxy, opened(adapter.store(proxy, timeout=5)) as store:
        epochs = await fill(store, list(USERS.values()))
        proxy.latency = 0.05
        calls = [asyncio.ensure_future(call()) for call in calls_of(store, epochs).values()]
        await asyncio.sleep(0.02)  # they are under way: nothing has come back yet
        getattr(proxy, fault)()
        async with asyncio.timeout(BOUND):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        # whoever was still connecting when it happened has got a good connection
        assert StoreUnavailableError in map(type, answers)
        assert {type(each) for each in answers if isinstance(each, Exception)} == {StoreUnavailableError}
        proxy.latency = 0
        await check_after(store, epochs)


async def test_calls_that_are_aborted_while_they_connect_end_at_once(adapter):
    async with adapter.proxy() as proxy, opened(adapter.store(proxy, timeout=60, lease=60)) as store:
        await fill(store, [1])
        async with under(cut_and_stall, proxy):
            calls = [asyncio.ensure_future(store.load(1)) for _ in range(PLACES)]
            await asyncio.sleep(0.1)
            for call in calls * 2:  # a second time makes no difference
                store.abort(call)
            async with asyncio.timeout(BOUND):
                assert all_unavailable(await asyncio.gather(*calls, return_exceptions=True))
        assert is_of(1, await until_it_works(lambda: store.load(1)))


@pytest.mark.parametrize("how", ["abort", "cancel"])
async def test_calls_that_are_given_up_in_a_stall_end_at_once(adapter, how):
    """Also where the engine is not to be reached by a request to cancel something."""
    async with adapter.proxy() as proxy, opened(adapter.store(proxy, timeout=60, lease=60)) as store:
        epochs = await fill(store, list(USERS.values()))
        await asyncio.gather(*(store.load(user) for user in USERS.values()))  # each has a connection by now
        proxy.stall()
        calls = [asyncio.ensure_future(call()) for call in calls_of(store, epochs).values()]
        await asyncio.sleep(0.02)
        for call in calls:
            store.abort(call) if how == "abort" else call.cancel()
        async with asyncio.timeout(BOUND):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        ended = StoreUnavailableError if how == "abort" else asyncio.CancelledError
        assert [type(each) for each in answers] == [ended] * len(answers), answers
        proxy.resume()
        await check_after(store, epochs)


async def test_a_slow_network_is_only_slow(adapter):
    async with adapter.proxy() as proxy, opened(adapter.store(proxy, timeout=10)) as store:
        epochs = await fill(store, list(USERS.values()))
        proxy.latency = 0.02
        proxy.bytes_per_second = 20_000
        answers = await asyncio.gather(*(call() for call in calls_of(store, epochs).values()))
        saved, (claimed,), released, erased, loaded, holder = answers
        assert saved[0].outcome is SAVED
        assert is_of(USERS["claim"], claimed.record)
        assert released and erased
        assert is_of(USERS["load"], loaded)
        assert holder[0] == "a"


async def test_a_store_opens_neither_in_a_stall_nor_where_it_is_refused_and_opens_after(adapter):
    async with adapter.proxy() as proxy:
        store = adapter.store(proxy)
        for fault in (stall, refuse):
            async with under(fault, proxy), asyncio.timeout(BOUND):
                with pytest.raises(StoreUnavailableError):
                    await store.open()
        async with opened(store):
            await fill(store, [1])


async def test_a_store_closes_in_a_stall(adapter):
    async with adapter.proxy() as proxy:
        store = adapter.store(proxy)
        await store.open()
        await fill(store, [1])
        proxy.stall()
        async with asyncio.timeout(BOUND):
            await store.close()


async def test_the_first_claims_of_an_owner_in_a_stall_are_unavailable_too(adapter):
    """They ask for a lease before."""
    async with adapter.proxy() as proxy, opened(adapter.store(proxy, lease=1.5)) as store:
        await fill(store, [1])
        proxy.stall()
        async with asyncio.timeout(BOUND):
            answers = await asyncio.gather(
                *(store.claim_many([number], f"owner {number}") for number in (2, 3)), return_exceptions=True
            )
        assert all_unavailable(answers), answers
        proxy.resume()
        assert (await until_it_works(lambda: store.claim_many([2], "owner 2")))[0].granted


@pytest.mark.parametrize("adapter", adapters("postgres"), indirect=True)
async def test_a_pool_of_yours_in_a_stall_holds_up_neither_claims_nor_the_end(adapter):
    async with adapter.proxy() as proxy:
        pool = await asyncpg.create_pool(adapter.url(proxy), min_size=2, max_size=2)
        try:
            store = PostgresStore(pool=pool, schema=adapter.mine, timeout=TIMEOUT, lease=1)
            await store.open()
            await fill(store, [1])
            proxy.stall()
            async with asyncio.timeout(BOUND):
                calls = store.claim_many([2], "b"), store.load(1), store.claim_many([3], "c")
                assert all_unavailable(await asyncio.gather(*calls, return_exceptions=True))
                await store.close()
        finally:
            proxy.resume()
            pool.terminate()


async def test_connections_that_the_engine_has_ended_are_let_go_of(adapter):
    """The one of a call, and the one of the lease."""
    async with adapter.proxy() as proxy, opened(adapter.store(proxy, timeout=1, lease=1)) as store:
        await fill(store, [1])
        for _ in range(3):
            proxy.half_close()
            assert is_of(1, await until_it_works(lambda: store.load(1)))
            await asyncio.sleep(0.4)  # longer than until the lease is renewed
        async with asyncio.timeout(BOUND):
            while proxy.connections > 3:  # noqa: ASYNC110 - the proxy sets no event; asyncpg may keep one more
                await asyncio.sleep(0.01)


# A reply that is lost


async def test_what_was_done_though_its_reply_was_lost_is_done_once(adapter):
    async with adapter.proxy() as proxy, opened(adapter.store(proxy)) as store:
        epochs = await fill(store, list(USERS.values()))
        calls = calls_of(store, epochs)
        for name, call in calls.items():
            proxy.drop_reply(USERS[name].encode())
            with pytest.raises(StoreUnavailableError):
                await call()
        assert proxy.dropped == len(USERS)
        assert [verdict.outcome for verdict in await calls["save"]()] == [ALREADY]
        assert (await calls["claim"]())[0].epoch == epochs[USERS["claim"]] + 2
        assert not await calls["release"]()
        assert not await calls["erase"]()
        await check_after(store, epochs)


async def test_a_save_of_a_manager_whose_reply_was_lost_is_one_version(adapter):
    async with adapter.proxy() as proxy:
        async with SessionManager(store=adapter.store(proxy), interval="1h") as manager:
            session = await manager.open("ann", default={"gold": 0})
            before = await session.persist_now()
            session.user_data["gold"] = 31_415
            proxy.drop_reply(b'{"gold":31415}')
            async with asyncio.timeout(BOUND):
                receipt = await session.persist_now()
            assert proxy.dropped == 1
            assert receipt.version == before.version + 1
            assert not (await session.persist_now()).changed
        async with opened(adapter.store()) as store:
            found = await store.load("ann")
            assert (found.version, found.value()) == (receipt.version, {"gold": 31_415})


async def test_a_login_and_an_end_whose_replies_were_lost_are_a_login_and_an_end(adapter):
    async with adapter.proxy() as proxy:
        async with SessionManager(store=adapter.store(proxy), interval="1h") as manager:
            async with manager.edit("bob-the-user", default={"gold": 7}):
                pass
            for number in range(3):
                proxy.drop_reply(b"bob-the-user")
                async with asyncio.timeout(BOUND):
                    session = await manager.open("bob-the-user", default={"gold": 0})
                    assert session.user_data == {"gold": 7 + number}, "never taken for new"
                    session.user_data["gold"] += 1
                    proxy.drop_reply(b"bob-the-user")
                    await session.destroy()
                assert proxy.dropped == 2 * (number + 1)
        async with opened(adapter.store()) as store:
            found = await store.load("bob-the-user")
            assert (found.version, found.owner, found.value()) == (4, "", {"gold": 10})


# Nobody gets anybody else's reply


async def all_places_are_free(store, proxy, users):
    """Fill every place a store has, after its connections were lost: a place that leaked would stay empty."""
    proxy.cut()
    async with asyncio.timeout(BOUND):
        while proxy.connections > 1:  # noqa: ASYNC110 - the proxy sets no event; asyncpg keeps one
            await asyncio.sleep(0.01)
        proxy.stall()
        loads = [asyncio.ensure_future(store.load(user)) for user in users[: 2 * PLACES]]
        while proxy.connections < PLACES:  # noqa: ASYNC110 - the proxy sets no event
            await asyncio.sleep(0.01)
        proxy.resume()
        answers = await asyncio.gather(*loads)
    for user, found in zip(users, answers, strict=False):
        assert is_of(user, found)


async def test_calls_that_are_cancelled_aborted_or_cut_never_give_a_reply_to_the_next(adapter):
    chance = random.Random(79)
    users = [f"user-{number}" for number in range(24)]
    async with adapter.proxy() as proxy, opened(adapter.store(proxy, timeout=20, lease=60)) as store:
        epochs = await fill(store, users)
        versions = dict.fromkeys(users, 1)
        right = ended = 0
        for number in range(100):
            proxy.latency = chance.choice((0, 0, 0.001))
            loading = chance.sample(users, 6)
            saving = chance.sample([user for user in users if user not in loading], 2)
            for user in saving:
                versions[user] += 1
            calls = [asyncio.ensure_future(store.load(user)) for user in loading]
            batch = [version_of(user, versions[user], epochs[user]) for user in saving]
            calls.append(asyncio.ensure_future(store.save_many(batch)))
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.004)
            victims = chance.sample(calls, 2)
            match chance.choice(("cancel", "abort", "stall", "cut" if number % 4 == 0 else "cancel")):
                case "cancel":
                    for call in victims:
                        call.cancel()
                case "abort":
                    for call in victims:
                        store.abort(call)
                case "stall":
                    proxy.stall()
                    await asyncio.sleep(0.001)
                    for call in victims:
                        store.abort(call)
                    proxy.resume()
                case "cut":
                    proxy.cut()
            async with asyncio.timeout(BOUND):
                await asyncio.wait(calls)
            for user, call in zip(loading, calls, strict=False):
                if call.cancelled() or call.exception() is not None:
                    ended += 1
                    assert call.cancelled() or isinstance(call.exception(), StoreUnavailableError), call
                else:
                    right += 1
                    assert is_of(user, call.result()), f"round {number}: {user} got {call.result()}"
            if not calls[-1].cancelled() and calls[-1].exception() is None:
                assert {each.outcome for each in calls[-1].result()} <= {SAVED, ALREADY}
        assert right > 200 and ended > 60
        proxy.latency = 0
        await all_places_are_free(store, proxy, users)
        for user in users:
            found = await store.load(user)
            assert is_of(user, found)
            assert found.value()["version"] == found.version <= versions[user]


# A whole manager

EVERYBODY = [f"user-{number}" for number in range(20)]


async def come_in(manager):
    sessions = [await manager.open(user, default={"user": user, "count": 0}) for user in EVERYBODY]
    await manager.persist_all_user_data()
    return sessions


async def until_saved(session):
    """Wait until the last state of a session is stored, without asking for it more than once at a time."""
    async with asyncio.timeout(BOUND):
        while True:
            with contextlib.suppress(StoreUnavailableError):
                return await session.persist_now()


async def ride_out(adapter, fault):
    async with adapter.proxy() as proxy:
        async with SessionManager(store=adapter.store(proxy), interval="100ms", save_timeout=TIMEOUT) as manager:
            sessions = await come_in(manager)
            async with under(fault, proxy), asyncio.timeout(BOUND):
                for session in sessions:
                    session.user_data["count"] += 1
                calls = (
                    sessions[0].persist_now(),
                    sessions[1].destroy(),
                    manager.open("somebody-new", default={}),
                    manager.read("somebody-else"),
                    manager.erase("somebody-third"),
                )
                answers = await asyncio.gather(*calls, return_exceptions=True)
                assert all_unavailable(answers), answers
                assert manager.health().state == "down"
            for session in sessions[2:]:
                session.user_data["count"] += 1
            assert all([await until_saved(session) for session in sessions[2:]])
            again = await until_it_works(lambda: manager.open(EVERYBODY[1]))
            assert again.user_data == {"user": EVERYBODY[1], "count": 1}
            assert manager.health().state != "down"
        async with opened(adapter.store()) as store:
            for user in EVERYBODY:
                found = await store.load(user)
                assert is_of(user, found) and found.owner == ""
                assert found.value()["count"] == (2 if user in EVERYBODY[2:] else 1)


async def test_a_manager_rides_out_a_fault_and_loses_nothing(adapter):
    faults = stall, half_close_and_stall, refuse
    await asyncio.gather(*(ride_out(adapter.part(fault.__name__), fault) for fault in faults))


async def test_callers_who_are_cancelled_under_faults_never_cross_users(adapter):
    chance = random.Random(80)
    async with adapter.proxy() as proxy:
        async with SessionManager(store=adapter.store(proxy), interval="50ms", save_timeout=0.6) as manager:
            sessions = await come_in(manager)
            acknowledged = dict.fromkeys(EVERYBODY, 0)
            offline = [f"offline-{number}" for number in range(12)]
            for user in offline:
                async with manager.edit(user, default={"user": user}):
                    pass

            async def persist(session):
                count = session.user_data["count"]
                if await session.persist_now():
                    acknowledged[session.user_id] = max(count, acknowledged[session.user_id])

            async def read(user):
                assert (await manager.read(user))["user"] == user

            answered = 0
            for number in range(70):
                for session in chance.sample(sessions, 5):
                    session.user_data["count"] += 1
                calls = [asyncio.ensure_future(read(user)) for user in chance.sample(offline, 4)]
                calls += [asyncio.ensure_future(persist(session)) for session in chance.sample(sessions, 4)]
                await asyncio.sleep(chance.random() * 0.004)
                for call in chance.sample(calls, 3):
                    call.cancel()
                if number % 10 == 0:
                    proxy.cut()
                elif number % 25 == 5:
                    proxy.stall()
                    await asyncio.sleep(0.8)  # longer than a call may take
                    proxy.resume()
                async with asyncio.timeout(BOUND):
                    done, _ = await asyncio.wait(calls)
                for call in done:
                    if not call.cancelled():
                        assert isinstance(call.exception(), (type(None), StoreUnavailableError)), call.exception()
                        answered += call.exception() is None
            assert answered > 70
            for session in sessions:
                await until_saved(session)
                acknowledged[session.user_id] = session.user_data["count"]
        async with opened(adapter.store()) as store:
            for user in EVERYBODY:
                found = await store.load(user)
                assert is_of(user, found)
                assert found.value()["count"] >= acknowledged[user]
            for user in offline:
                assert is_of(user, await store.load(user))
