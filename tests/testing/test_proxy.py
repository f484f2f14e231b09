"""`FaultProxy` between a client and a server that says everything again."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from cagey_sessions import OptionError
from cagey_sessions.errors import UsageError
from cagey_sessions.testing import FaultProxy

LONG = 30
"""Seconds, for what should take no time: whoever waits so long has been forgotten."""


class Echo:
    """A server that answers each line with itself, and counts lines and connections."""

    def __init__(self, path=None):
        self.path = path
        self.lines: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.ends: list[str] = []
        self.changed = asyncio.Event()

    async def __aenter__(self):
        if self.path is None:
            self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            self.port = self.server.sockets[0].getsockname()[1]
        else:
            self.server = await asyncio.start_unix_server(self.serve, self.path)
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for writer in self.writers:
            writer.close()
        while self.writers:
            await self.change()

    async def serve(self, reader, writer):
        self.writers.append(writer)
        try:
            while line := await reader.readline():
                self.lines.append(line)
                self.tell()
                writer.write(line)
                await writer.drain()
            self.ends.append("end")
        except ConnectionError:
            self.ends.append("reset")
        finally:
            writer.close()
            self.writers.remove(writer)
            self.tell()

    def tell(self):
        self.changed.set()

    async def change(self):
        self.changed.clear()
        async with asyncio.timeout(LONG):
            await self.changed.wait()

    async def until(self, condition):
        while not condition():
            await self.change()


class Client:
    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def connect(self, proxy):
        self.reader, self.writer = await asyncio.open_connection(proxy.host, proxy.port)
        return self

    def send(self, line):
        self.writer.write(line)

    async def hear(self):
        async with asyncio.timeout(LONG):
            return await self.reader.readline()

    async def ask(self, line):
        self.send(line)
        return await self.hear()


@contextlib.asynccontextmanager
async def client_of(proxy):
    async with await Client().connect(proxy) as client:
        yield client


@contextlib.asynccontextmanager
async def echo_and_proxy():
    async with Echo() as echo, FaultProxy("127.0.0.1", echo.port) as proxy:
        yield echo, proxy


async def is_silent(client):
    """Whether nothing comes, for as long as an answer takes many times over."""
    hearing = asyncio.ensure_future(client.reader.read(1))
    done, _ = await asyncio.wait([hearing], timeout=0.1)
    hearing.cancel()
    await asyncio.wait([hearing])
    return not done


# Without faults


async def test_what_is_said_passes_both_ways():
    async with echo_and_proxy() as (_, proxy), client_of(proxy) as one, client_of(proxy) as other:
        assert await one.ask(b"one\n") == b"one\n"
        assert await other.ask(b"other\n") == b"other\n"
        assert proxy.connections == 2


async def test_many_bytes_come_whole_and_in_order():
    text = b"".join(b"%07d\n" % number for number in range(100_000))
    async with echo_and_proxy() as (_, proxy), client_of(proxy) as client:
        client.send(text)
        assert await client.reader.readexactly(len(text)) == text


async def test_a_client_that_has_said_everything_still_hears_the_rest():
    async with echo_and_proxy() as (echo, proxy), client_of(proxy) as client:
        client.send(b"last\n")
        client.writer.write_eof()
        assert await client.hear() == b"last\n"
        assert await client.hear() == b""
        await echo.until(lambda: echo.ends == ["end"])


async def test_a_server_behind_a_unix_socket_is_reached(tmp_path):
    path = tmp_path / "echo.sock"
    async with Echo(path) as echo, FaultProxy(path=path) as proxy, client_of(proxy) as client:
        assert await client.ask(b"hello\n") == b"hello\n"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await client.hear()
        await echo.until(lambda: len(echo.ends) == 1)


async def test_a_server_that_is_not_there_is_a_reset():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with FaultProxy("127.0.0.1", nobody.getsockname()[1]) as proxy, client_of(proxy) as client:
            with pytest.raises(ConnectionResetError):
                await client.hear()


# Faults


async def test_latency_comes_on_top_each_way():
    async with echo_and_proxy() as (_, proxy), client_of(proxy) as client:
        clock = asyncio.get_running_loop().time
        begun = clock()
        proxy.latency = 0.1
        assert await client.ask(b"late\n") == b"late\n"
        assert clock() - begun >= 0.19  # uvloop counts whole milliseconds
        proxy.latency = 0
        client.send(b"one\n")
        assert await client.hear() == b"one\n"


async def test_latency_delays_each_piece_by_itself_and_keeps_their_order():
    async with echo_and_proxy() as (_, proxy), client_of(proxy) as client:
        proxy.latency = 0.2
        for number in range(5):
            client.send(b"%d\n" % number)
            await asyncio.sleep(0.01)
        proxy.latency = 0
        client.send(b"5\n")
        assert [await client.hear() for _ in range(6)] == [b"%d\n" % number for number in range(6)]


async def test_nothing_passes_a_stall_until_it_is_resumed():
    async with echo_and_proxy() as (echo, proxy), client_of(proxy) as client:
        await client.ask(b"before\n")
        proxy.stall()
        client.send(b"meanwhile\n")
        assert await is_silent(client)
        async with client_of(proxy) as another:
            another.send(b"another\n")
            assert await is_silent(another)
            assert echo.lines == [b"before\n"]
            proxy.resume()
            assert await client.hear() == b"meanwhile\n"
            assert await another.hear() == b"another\n"


async def test_what_was_sent_into_a_stall_arrives_late_though_the_sender_is_gone():
    async with echo_and_proxy() as (echo, proxy):
        async with client_of(proxy) as client:
            await client.ask(b"before\n")
            proxy.stall()
            client.send(b"late\n")
            await client.writer.drain()
        proxy.resume()
        await echo.until(lambda: echo.lines == [b"before\n", b"late\n"])


async def test_a_cut_resets_both_sides_and_the_next_connection_works():
    async with echo_and_proxy() as (echo, proxy):
        async with client_of(proxy) as client:
            await client.ask(b"before\n")
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                await client.hear()
            await echo.until(lambda: echo.ends == ["reset"])
        async with client_of(proxy) as client:
            assert await client.ask(b"after\n") == b"after\n"


async def test_a_cut_ends_what_is_stalled():
    async with echo_and_proxy() as (echo, proxy), client_of(proxy) as client:
        await client.ask(b"before\n")
        proxy.stall()
        client.send(b"lost\n")
        assert await is_silent(client)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await client.hear()
        proxy.resume()
        await echo.until(lambda: echo.ends == ["reset"])
        assert echo.lines == [b"before\n"]


async def test_after_a_half_close_the_client_may_go_on_and_is_not_heard():
    async with echo_and_proxy() as (echo, proxy), client_of(proxy) as client:
        await client.ask(b"before\n")
        proxy.half_close()
        assert await client.hear() == b""
        await echo.until(lambda: len(echo.ends) == 1)
        for _ in range(10):
            client.send(b"into the void\n")
            await client.writer.drain()
            await asyncio.sleep(0.01)
        assert proxy.connections == 1
        assert echo.lines == [b"before\n"]


async def test_bytes_drip():
    async with echo_and_proxy() as (_, proxy), client_of(proxy) as client:
        clock = asyncio.get_running_loop().time
        proxy.bytes_per_second = 200
        begun = clock()
        client.send(b"x" * 39 + b"\n")
        for _ in range(40):
            assert len(await client.reader.read(1000)) <= 10
            if clock() - begun > 0.15:
                break
        else:
            raise AssertionError("forty bytes at 200 a second came at once")
        proxy.bytes_per_second = None
        await client.hear()
        assert await client.ask(b"at once\n") == b"at once\n"


async def test_new_connections_are_refused_at_the_same_port_and_old_ones_stay():
    async with echo_and_proxy() as (_, proxy), client_of(proxy) as client:
        await client.ask(b"before\n")
        port = proxy.port
        for _ in range(2):
            await proxy.refuse()
            with pytest.raises(ConnectionRefusedError):
                await Client().connect(proxy)
        assert await client.ask(b"still here\n") == b"still here\n"
        for _ in range(2):
            await proxy.accept()
        assert proxy.port == port
        async with client_of(proxy) as another:
            assert await another.ask(b"new\n") == b"new\n"


async def test_the_port_is_not_given_to_anybody_while_connections_are_refused():
    """Else a client that goes on trying is connected to itself one day."""
    async with echo_and_proxy() as (_, proxy):
        await proxy.refuse()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((proxy.host, proxy.port))


async def test_a_reply_is_dropped_once_after_the_request_went_through():
    async with echo_and_proxy() as (echo, proxy):
        async with client_of(proxy) as client:
            assert await client.ask(b"before\n") == b"before\n"
            proxy.drop_reply()
            client.send(b"lost\n")
            with pytest.raises(ConnectionResetError):
                await client.hear()
        assert echo.lines == [b"before\n", b"lost\n"]
        assert proxy.dropped == 1
        async with client_of(proxy) as client:
            assert await client.ask(b"lost\n") == b"lost\n"


async def test_the_request_whose_reply_is_dropped_may_be_told_by_its_bytes():
    async with echo_and_proxy() as (echo, proxy), client_of(proxy) as one, client_of(proxy) as other:
        proxy.drop_reply(b"save 7")
        assert await one.ask(b"save 1\n") == b"save 1\n"
        assert await other.ask(b"save 3\n") == b"save 3\n"
        one.send(b"sav")
        await one.writer.drain()
        assert await is_silent(one)
        one.send(b"e 7\n")
        with pytest.raises(ConnectionResetError):
            await one.hear()
        assert await other.ask(b"save 7\n") == b"save 7\n", "once"
        assert echo.lines.count(b"save 7\n") == 2


# The block


async def test_leaving_closes_everything_whatever_the_fault():
    for fault in ("none", "stall", "drip", "latency", "refuse", "half_close"):
        async with Echo() as echo:
            async with FaultProxy("127.0.0.1", echo.port) as proxy:
                client = await Client().connect(proxy)
                await client.ask(b"before\n")
                match fault:
                    case "stall":
                        proxy.stall()
                    case "drip":
                        proxy.bytes_per_second = 1
                    case "latency":
                        proxy.latency = 60
                    case "refuse":
                        await proxy.refuse()
                    case "half_close":
                        proxy.half_close()
                client.send(b"under way\n" * 1000)
                await asyncio.sleep(0)
            with contextlib.suppress(ConnectionError):
                while await client.hear():
                    pass
            client.writer.close()
            await echo.until(lambda here=echo: len(here.ends) == 1)
            assert proxy.connections == 0
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "cagey-sessions proxy"], fault


async def test_a_proxy_may_be_opened_again():
    async with Echo() as echo:
        proxy = FaultProxy("127.0.0.1", echo.port)
        for _ in range(2):
            async with proxy, client_of(proxy) as client:
                assert await client.ask(b"hello\n") == b"hello\n"
                proxy.stall()


def test_a_proxy_may_be_opened_again_on_another_loop(tmp_path):
    proxy = FaultProxy(path=tmp_path / "echo.sock")

    async def stall_for_a_moment():
        async with Echo(tmp_path / "echo.sock"), proxy, client_of(proxy) as client:
            proxy.stall()
            client.send(b"hello\n")
            assert await is_silent(client)
            proxy.resume()
            assert await client.hear() == b"hello\n"

    for _ in range(2):
        asyncio.run(stall_for_a_moment())


async def test_connections_that_come_and_go_under_faults_leave_nothing():
    async with echo_and_proxy() as (echo, proxy):
        for number in range(40):
            async with client_of(proxy) as client:
                await client.ask(b"%d\n" % number)
                proxy.stall()
                client.send(b"more\n")
                if number % 2:
                    proxy.cut()
                proxy.resume()
        async with asyncio.timeout(LONG):
            while proxy.connections:  # noqa: ASYNC110 - the proxy sets no event
                await asyncio.sleep(0.01)
        await echo.until(lambda: len(echo.ends) == 40)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"host": 5432, "port": 5432},
        {"port": 0},
        {"port": "5432"},
        {"port": 65_536},
        {"port": True},
        {"port": 1, "path": "engine.sock"},
    ],
)
def test_a_target_that_is_none_is_refused(arguments):
    with pytest.raises(OptionError):
        FaultProxy(**arguments)


@pytest.mark.parametrize(
    ("fault", "value"),
    [("latency", each) for each in (-1, float("nan"), None, True)]
    + [("bytes_per_second", each) for each in (0, -1, 1.5, "fast", True)],
)
def test_a_fault_that_makes_no_sense_is_refused_and_changes_nothing(fault, value):
    proxy = FaultProxy(port=1)
    before = getattr(proxy, fault)
    with pytest.raises(OptionError):
        setattr(proxy, fault, value)
    assert getattr(proxy, fault) == before


async def test_outside_of_the_block_faults_are_refused():
    proxy = FaultProxy(port=1)
    for use in (lambda: proxy.port, proxy.stall, proxy.resume, proxy.drop_reply):
        with pytest.raises(UsageError):
            use()
    with pytest.raises(UsageError):
        await proxy.accept()


async def test_a_proxy_is_opened_once_at_a_time():
    async with echo_and_proxy() as (_, proxy):
        with pytest.raises(UsageError):
            await proxy.__aenter__()
        async with client_of(proxy) as client:
            assert await client.ask(b"hello\n") == b"hello\n"


async def test_a_request_is_bytes():
    async with echo_and_proxy() as (_, proxy):
        with pytest.raises(OptionError):
            proxy.drop_reply("save")
