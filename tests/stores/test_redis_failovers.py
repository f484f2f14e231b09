"""`RedisStore` behind an address that leads to another engine later, and on connections that answer wrongly."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from cagey_sessions import StoreError, StoreUnavailableError
from cagey_sessions.stores import Outcome, Record, RedisStore

needs_redis_server = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here")


def record(user, epoch, version, owner="a"):
    return Record(user, epoch, owner, version, 0, b'{"n": %d}' % version, 1.0)


class Failover:
    """An address that leads to one engine, and then to another, while the first one lives on."""

    def __init__(self, servers, folder):
        self.old, self.new = servers("old"), servers("new")
        self._link = folder / "address"
        self._link.symlink_to(self.old.socket)
        self.store = RedisStore(f"unix://{self._link}", prefix="cagey:")

    async def happen(self):
        """The new engine has what the old one has; whoever connects from now on gets to it."""
        for key in self.old.client.scan_iter():
            self.new.client.restore(key, 0, self.old.client.dump(key))
        self._link.unlink()
        self._link.symlink_to(self.new.socket)


@needs_redis_server
async def test_after_a_failover_nothing_is_written_to_the_old_primary(servers, tmp_path):
    failover = Failover(servers, tmp_path)
    store = failover.store
    await store.open()
    claims = await store.claim_many([1, 2, 3], "a")
    await failover.happen()
    await asyncio.gather(*(store.load(1) for _ in range(3)), return_exceptions=True)  # more connections are made
    saves = [store.save_many([record(claim.user_id, claim.epoch, 1)]) for claim in claims]
    assert [verdict.outcome for (verdict,) in await asyncio.gather(*saves)] == [Outcome.SAVED] * 3
    assert [failover.new.client.hget(f"cagey:user:{user}", "version") for user in (1, 2, 3)] == [b"1"] * 3
    await store.close()


@needs_redis_server
async def test_what_the_old_primary_takes_once_the_new_one_is_known_is_not_acknowledged(servers, tmp_path):
    failover = Failover(servers, tmp_path)
    store = failover.store
    await store.open()
    (claim,) = await store.claim_many([1], "a")
    await failover.happen()
    failover.old.client.client_pause(60_000, all=False)
    saving = asyncio.ensure_future(store.save_many([record(1, claim.epoch, 1)]))
    await asyncio.sleep(0)
    assert await store.load(1) is None  # on a new connection, that is from the new engine
    failover.old.client.client_unpause()
    with pytest.raises(StoreUnavailableError, match="taken over"):
        await saving
    (verdict,) = await store.save_many([record(1, claim.epoch, 1)])
    assert verdict.outcome == Outcome.SAVED
    assert failover.new.client.hget("cagey:user:1", "version") == b"1"
    await store.close()


@needs_redis_server
async def test_an_engine_that_knows_no_auth_does_not_have_the_password_told(servers):
    server = servers("bare", "--rename-command", "AUTH", "")
    store = RedisStore(f"unix://somebody:a-canary@{server.socket}", prefix="cagey:")
    with pytest.raises(StoreError) as caught:
        await store.open()
    assert "canary" not in str(caught.value)


@needs_redis_server
async def test_a_connection_on_which_more_came_than_was_asked_for_is_not_used_again(servers, tmp_path):
    server, links = servers("behind"), []

    async def relay(reader, writer):
        there, back = await asyncio.open_unix_connection(server.socket)
        links.append(asyncio.gather(pump(reader, back, doubles=False), pump(there, writer, doubles=True)))

    async def pump(reader, writer, doubles):
        while data := await reader.read(1 << 16):
            if doubles and data.startswith(b"*7") and b"canary" in data:
                data += data  # in one piece with the reply before it
            writer.write(data)
        writer.close()

    middle = await asyncio.start_unix_server(relay, str(tmp_path / "middle"))
    store = RedisStore(f"unix://{tmp_path / 'middle'}", prefix="cagey:")
    await store.open()
    claims = await store.claim_many([1, 2], "a")
    await store.save_many(
        [
            record(1, claims[0].epoch, 1)._replace(body=b'"canary"'),
            record(2, claims[1].epoch, 1)._replace(body=b'"of another user"'),
        ]
    )
    assert (await store.load(1)).body == b'"canary"'
    assert (await store.load(2)).body == b'"of another user"'
    await store.close()
    middle.close()
    await asyncio.gather(*links)
