"""What stores do at the edges of outages: engines that are replaced, closed at a bad moment, or know no command."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time

import pytest
import redis as driver

from cagey_sessions import StoreError, StoreUnavailableError
from cagey_sessions.stores import Outcome, Record, RedisStore, leases

needs_redis_server = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here")


def record(user, epoch, version, owner="a"):
    return Record(user, epoch, owner, version, 0, b'{"n": %d}' % version, 1.0)


class Server:
    """A Redis of one's own, on a Unix socket."""

    def __init__(self, folder, *settings):
        self.socket = str(folder / "socket")
        command = ["redis-server", "--port", "0", "--unixsocket", self.socket, "--save", "", "--dir", str(folder)]
        self._process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL)
        self.client = driver.Redis(unix_socket_path=self.socket)
        until = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return
            except (driver.ConnectionError, OSError):
                if self._process.poll() is not None or time.monotonic() > until:
                    self.stop()
                    raise
            time.sleep(0.01)  # there is no event to wait for

    def stop(self):
        self.client.close()
        self._process.kill()
        self._process.wait()


@pytest.fixture
def servers(tmp_path):
    """Makes an engine of one's own."""
    made = []

    def start(name, *settings):
        folder = tmp_path / name
        folder.mkdir()
        made.append(Server(folder, *settings))
        return made[-1]

    yield start
    for server in made:
        server.stop()


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
async def test_a_lease_that_is_asked_for_while_the_store_closes_is_not_given(servers, monkeypatch):
    server = servers("closing")
    store = RedisStore(f"unix://{server.socket}", prefix="cagey:")
    gate, made = asyncio.Event(), []
    await store.open()
    connect = store._connect

    async def connect_late():
        await gate.wait()
        made.append(await connect())
        return made[-1]

    monkeypatch.setattr(store, "_connect", connect_late)
    claiming = asyncio.ensure_future(store.claim_many([1], "late"))
    await asyncio.sleep(0)
    await store.close()
    gate.set()
    with pytest.raises(StoreUnavailableError):
        await claiming
    assert [connection.is_connected for connection in made] == [False], "its connection is closed"
    assert not server.client.exists("cagey:node:late")


async def test_a_lease_is_renewed_well_before_a_doubt_that_begins_just_after_a_renewal_ends(monkeypatch):
    sleeps, slept = [], asyncio.Event()

    async def sleep(seconds):
        sleeps.append(seconds)
        slept.set()
        await asyncio.get_running_loop().create_future()

    async def send(owner):
        pass

    lease = leases.Leases("TestStore", 15, send)
    monkeypatch.setattr(leases.asyncio, "sleep", sleep)
    await lease.hold("a")
    await slept.wait()
    monkeypatch.undo()
    await lease.end()
    assert sleeps[0] < 15 / 3 - 1, "a doubt lasts for a third"


async def test_a_lease_goes_on_being_renewed_after_somebody_has_cancelled_every_task():
    renewed = asyncio.Event()

    async def send(owner):
        renewed.set()

    lease = leases.Leases("TestStore", 0.2, send)
    await lease.hold("a")
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        if task.get_name() == "cagey-sessions lease":
            task.cancel()
            await asyncio.wait([task])
    async with asyncio.timeout(5):
        while not any(task.get_name() == "cagey-sessions lease" for task in asyncio.all_tasks()):
            await lease.hold("a")  # claims go on, and one of them finds the lease old
            await asyncio.sleep(0)
    renewed.clear()
    await asyncio.wait_for(renewed.wait(), 5)
    await lease.end()


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
