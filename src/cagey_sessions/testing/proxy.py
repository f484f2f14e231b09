"""`FaultProxy`: a TCP proxy between a store and its engine, with faults of the network.

It knows nothing of the protocol: it passes on bytes, late, slowly, or not at all.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Self

from ..errors import OptionError, UsageError
from ..options import SECOND, is_text, parse_duration, path_text
from ..wording import quote

__all__ = ["FaultProxy"]

HOST = "127.0.0.1"
CHUNK = 65_536
CHUNKS_UNDER_WAY = 64
"""How many chunks wait in each direction of a connection before nothing more is read from the sender."""
PIECES = 20
"""In how many pieces the bytes of a second pass, if `bytes_per_second` limits them."""
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultProxy:
    """A proxy for TCP between a client and a server, with faults that you switch on and off.

    ``async with FaultProxy("127.0.0.1", 5432) as proxy`` listens on ``proxy.host`` and ``proxy.port``, for this machine
    only, and passes everything on to that server; `path` in place of `host` and `port` names a Unix socket. For each
    connection of a client it opens one to the server. Leaving the block closes all of them, and ends every fault.

    Raises `OptionError`, and `UsageError` if it is used outside of the block. It runs on the event loop of the block,
    asyncio's or uvloop's. A round trip through it takes about a tenth of a millisecond.
    """

    host = HOST
    """The address on which it listens."""

    def __init__(
        self, host: str = HOST, port: int | None = None, *, path: str | os.PathLike[str] | None = None
    ) -> None:
        if (port is None) == (path is None):
            raise OptionError("FaultProxy takes the port of a server, or the path of its Unix socket")
        if not is_text(host):
            raise OptionError(f"host is a text, not {quote(host)}")
        if port is not None and (type(port) is not int or not 0 < port < 65_536):
            raise OptionError(f"port is a number from 1 to 65535, not {quote(port)}")
        self._target = (host, port)
        self._path = None if path is None else path_text("path", path)
        self._reserved: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._flowing = asyncio.Event()
        self._latency = 0.0
        self._bytes_per_second: int | None = None
        self._wanted: bytes | None = None
        self.dropped = 0
        """How many replies were dropped so far."""

    async def __aenter__(self) -> Self:
        if self._reserved is not None:
            raise UsageError("this FaultProxy is open already")
        self._flowing = asyncio.Event()
        self._flowing.set()
        # This socket never listens. It keeps the port during a `refuse`: otherwise another program may take it, or a
        # client may get it as its own port, and so connect to itself.
        self._reserved = _bound(0)
        try:
            await self.accept()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()
        await _let_arrive()
        if self._links:
            await asyncio.wait(self._links.values())

    def _close(self) -> None:
        reserved, self._reserved = self._reserved, None
        server, self._server = self._server, None
        if server is not None:
            server.close()
        if reserved is not None:
            reserved.close()
        self.cut()
        self._flowing.set()
        self._wanted = None
        self._latency, self._bytes_per_second = 0.0, None

    @property
    def port(self) -> int:
        """The port on which it listens; the same during the whole block."""
        return int(self._open().getsockname()[1])

    @property
    def connections(self) -> int:
        """How many connections of clients are open now."""
        return len(self._links)

    def _open(self) -> socket.socket:
        if self._reserved is None:
            raise UsageError("a FaultProxy is used inside of `async with`")
        return self._reserved

    # Faults

    @property
    def latency(self) -> float:
        """How many seconds everything that is sent from now on is delayed, each way; 0 at first."""
        return self._latency

    @latency.setter
    def latency(self, seconds: float) -> None:
        self._latency = parse_duration(seconds, "latency", shortest=0) / SECOND

    @property
    def bytes_per_second(self) -> int | None:
        """How many bytes pass in a second, each way of each connection; None for no limit."""
        return self._bytes_per_second

    @bytes_per_second.setter
    def bytes_per_second(self, count: int | None) -> None:
        if count is not None and (type(count) is not int or count < 1):
            raise OptionError(f"bytes_per_second is a whole number from 1 upwards, or None, not {quote(count)}")
        self._bytes_per_second = count

    def stall(self) -> None:
        """Let nothing pass until `resume`. Connections stay open, and new ones are accepted."""
        self._open()
        self._flowing.clear()

    def resume(self) -> None:
        """End a `stall`: what was sent meanwhile passes, even if the sender has closed its connection."""
        self._open()
        self._flowing.set()

    def cut(self) -> None:
        """Reset all connections that are open now, on both sides; what was under way is lost."""
        for link, task in self._links.items():
            link.reset()
            task.cancel()

    def half_close(self) -> None:
        """Close the server's side of all connections that are open now.

        Clients read the end of the stream. What they still send is accepted and thrown away.
        """
        for link in self._links:
            link.close_server()

    async def refuse(self) -> None:
        """Refuse new connections until `accept`; those that are open stay."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await _let_arrive()

    async def accept(self) -> None:
        """End a `refuse`."""
        port = self.port
        if self._server is None:
            listener = _bound(port)
            try:
                self._server = await asyncio.start_server(self._welcome, sock=listener, limit=CHUNK)
            except BaseException:
                listener.close()
                raise

    def drop_reply(self, request: bytes = b"") -> None:
        """Pass on the next request that contains these bytes, and drop the reply to it; once.

        As soon as the server begins to reply, the connection is reset on both sides, so that the client cannot know
        what became of its request. A request is all that a client sends before the server sends something.
        """
        self._open()
        if not isinstance(request, bytes):
            raise OptionError(f"request is bytes, not {type(request).__name__}")
        self._wanted = request

    # Connections

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # the connection was accepted just before `refuse`
            _reset(writer)
            return
        link = _Link(self, reader, writer)
        task = self._links[link] = asyncio.get_running_loop().create_task(link.run(), name="cagey-sessions proxy")
        task.add_done_callback(lambda _: self._links.pop(link))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._path is not None:
            return await asyncio.open_unix_connection(self._path, limit=CHUNK)
        return await asyncio.open_connection(*self._target, limit=CHUNK)


_Queue = asyncio.Queue[tuple[float, bytes]]
"""What has arrived, and when it is to be sent on; no bytes mean the end of the stream."""
_Look = Callable[[bytes], None]


def _look_away(_: bytes) -> None:
    return


class _Link:
    """The connection of a client, and the one to the server for it."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = reader, writer
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._last_sent = b""
        self._is_dropping = False
        self._is_half_closed = False

    async def run(self) -> None:
        pumps: list[asyncio.Task[None]] = []
        try:
            self._server = await self._proxy._connect()
            requests, replies = _Queue(CHUNKS_UNDER_WAY), _Queue(CHUNKS_UNDER_WAY)
            pumps = [
                asyncio.get_running_loop().create_task(pump, name="cagey-sessions proxy")
                for pump in (
                    self._take(self._client[0], requests),
                    self._pass_on(requests, self._server[1], self._see_request),
                    self._take(self._server[0], replies, self._see_reply),
                    self._pass_on(replies, self._client[1]),
                )
            ]
            await asyncio.gather(*pumps)
        except OSError:
            self.reset()  # one side is gone, and the other has to learn it
        finally:
            for task in pumps:
                task.cancel()
            if pumps:
                await asyncio.wait(pumps)
            for side in (self._client, self._server):
                if side is not None:
                    side[1].close()

    async def _take(self, reader: asyncio.StreamReader, queue: _Queue, look: _Look = _look_away) -> None:
        """Read what arrives, and queue it with the time at which it is to be sent on."""
        clock = asyncio.get_running_loop().time
        due = 0.0
        data = b"-"
        while data:
            data = await reader.read(CHUNK)
            look(data)
            due = max(due, clock() + self._proxy.latency)  # never before earlier bytes, also after the latency fell
            await queue.put((due, data))

    async def _pass_on(self, queue: _Queue, writer: asyncio.StreamWriter, look: _Look = _look_away) -> None:
        clock = asyncio.get_running_loop().time
        flowing = self._proxy._flowing
        while True:
            due, data = await queue.get()
            if due > clock():
                await asyncio.sleep(due - clock())
            await flowing.wait()
            look(data)
            if not data:
                if writer.can_write_eof() and not writer.is_closing():
                    writer.write_eof()
                return
            while data:
                rate = self._proxy.bytes_per_second
                piece = data if rate is None else data[: max(1, rate // PIECES)]
                data = data[len(piece) :]
                await self._write(writer, piece)
                if rate is not None:
                    await asyncio.sleep(len(piece) / rate)
                    await flowing.wait()

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if writer.is_closing():
            return
        try:
            writer.write(data)
            await writer.drain()
        except OSError:
            if not self._is_half_closed:
                raise

    def _see_request(self, data: bytes) -> None:
        wanted = self._proxy._wanted
        if wanted is not None:
            begun = self._last_sent[-(len(wanted) - 1) :] if len(wanted) > 1 else b""
            if wanted in begun + data:
                self._proxy._wanted = None
                self._is_dropping = True
        self._last_sent = data

    def _see_reply(self, data: bytes) -> None:
        if self._is_dropping and data:
            self._proxy.dropped += 1
            raise ConnectionResetError

    def reset(self) -> None:
        for side in (self._client, self._server):
            if side is not None:
                _reset(side[1])

    def close_server(self) -> None:
        self._is_half_closed = True
        if self._server is not None:
            self._server[1].transport.abort()


async def _let_arrive() -> None:
    """Wait as long as a connection that the system has accepted takes until `_welcome` is called for it."""
    for _ in range(3):
        await asyncio.sleep(0)


def _bound(port: int) -> socket.socket:
    """A socket bound to a port that several sockets of ours share."""
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_REUSEPORT", socket.SO_REUSEADDR), 1)
        bound.bind((HOST, port))
    except BaseException:
        bound.close()
        raise
    return bound


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other end sees a failure, not the end of the stream."""
    transport = writer.transport
    if not transport.is_closing():
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as same:
            if same.family != getattr(socket, "AF_UNIX", None):
                same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    transport.abort()
