"""`world`: a server with a database in virtual time, for tests of the program's own logic.

The test is a plain function that moves the time from outside. Nothing happens at random except for how long the
database takes; for random faults and crashes see `crash.py`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from .._core import check_user_id, encode_plain
from ..clock import Clock
from ..errors import UsageError
from ..options import SECOND, Duration, parse_duration
from ..records import DrainReport
from ..sessions import NO_DEFAULT, Session, SessionManager
from ..stores import Record, Store
from ..stores.memory import Row
from ..wording import quote
from .store import SimulatedDatabase, SimulatedStore
from .universe import Universe, VirtualClock, VirtualLoop

__all__ = ["LIMIT", "MakeManager", "Server", "World", "WorldError", "world"]

T = TypeVar("T")

MakeManager = Callable[..., SessionManager[Any]]
"""``make_manager(store=..., clock=...)`` builds the program's manager on the given store and clock."""

LIMIT = 3600 * SECOND
"""How much virtual time a call may take before it counts as stuck."""
ROUNDS_AT_THE_END = 20
"""How often tasks of a dead server are cancelled, and how many turns they get each time."""


class WorldError(UsageError):
    """The world was asked for something that makes no sense now, such as a session of a server that has crashed."""


class Server:
    """One process: an event loop, a connection to the database, and the program's manager."""

    def __init__(self, database: SimulatedDatabase, make_manager: MakeManager) -> None:
        self.universe: Universe = database.universe
        self.loop: VirtualLoop = self.universe.add_loop()
        self.store: SimulatedStore = SimulatedStore(database)
        self.clock: Clock = VirtualClock(self.loop)
        try:
            self.manager: SessionManager[Any] = _call(make_manager, self.store, self.clock)
        except BaseException:
            self.universe.remove_loop(self.loop)
            self.loop.close()
            raise
        self.is_alive: bool = True
        self.unobserved: list[str] = []
        """Errors that nothing caught, as the event loop reported them."""
        self.loop.set_exception_handler(self._observe)

    def _observe(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if self.is_alive:
            self.unobserved.append(f"{context['message']}: {context.get('exception')!r}")

    def run(self, work: Coroutine[Any, Any, T], limit: int = LIMIT) -> T:
        """Run a coroutine on this server, let time pass until it is done, and return its result."""
        return self.universe.run(self.loop.start(work), limit)

    def kill(self) -> None:
        """End the process as SIGKILL does: none of its code runs any more, and its owner id is dead."""
        self.is_alive = False
        self.universe.remove_loop(self.loop)
        self.store.cut()
        if self.store.owner:
            self.store.backing.dead.add(self.store.owner)

    def bury(self) -> None:
        """Free what a dead process has left in memory. Its clean-up code runs, but without effect on the world."""
        self.is_alive = False
        self.store.cut()
        self.manager._server.warning.detach()
        self.manager._spilling._unguard_exit()
        for _ in range(ROUNDS_AT_THE_END):  # some clean-up waits for other tasks, some starts new ones
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            for _ in range(ROUNDS_AT_THE_END):
                if not self.loop.is_ready():
                    break
                self.loop.turn()
        self.loop.close()


class World:
    """One server, its database, and their virtual time. Made by `world`."""

    def __init__(self, make_manager: MakeManager, universe: Universe) -> None:
        self.universe = universe
        self.database: SimulatedDatabase = SimulatedDatabase(universe)
        self._make_manager = make_manager
        self._server: Server | None = None
        self._graves: list[Server] = []

    # The server

    @property
    def server(self) -> Server:
        """The server that runs now. Raises `WorldError` while it is down."""
        if self._server is None:
            raise WorldError("the server is down; `restart()` starts it again")
        return self._server

    @property
    def manager(self) -> SessionManager[Any]:
        """The manager of the server that runs now; a new one after each `restart`."""
        return self.server.manager

    @property
    def now(self) -> float:
        """How many seconds of virtual time have passed since the world began."""
        return self.universe.seconds

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server, for as long in virtual time as it takes, and return its result.

        Raises what it raises, and `StuckError` if it waits for something that can never happen.
        """
        try:
            _refuse_inside()
        except WorldError:
            work.close()
            raise
        return self.server.run(work)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a coroutine on the server as a task; it runs whenever time passes."""
        return self.server.loop.start(work)

    def open(
        self,
        user_id: int | str,
        *,
        default: Any = NO_DEFAULT,
        when_active: Literal["join", "replace", "refuse"] = "join",
    ) -> Session[Any]:
        """`SessionManager.open`, run to its end."""
        return self.run(self.manager.open(user_id, default=default, when_active=when_active))

    def advance(self, duration: Duration) -> None:
        """Let virtual time pass, such as ``advance("31s")``; all that is due by then happens."""
        _refuse_inside()
        self.universe.advance(parse_duration(duration, "duration", shortest=0))

    def crash(self) -> None:
        """End the server as a kill -9 or a power cut does: no handler runs, and nothing more is saved.

        Calls that it has sent may still reach the database. Its sessions are lost; `restart` starts a new server.
        """
        _refuse_inside()
        server = self.server
        server.kill()
        self._graves.append(server)
        self._server = None

    def stop(self, persist: bool | None = None, *, deadline: Duration = "25s") -> DrainReport:
        """Run `SessionManager.destroy` to its end, and end the server; returns the report."""
        _refuse_inside()
        server = self.server
        try:
            return self.run(server.manager.destroy(persist, deadline=deadline))
        finally:
            self.universe.advance(0)
            self._server = None
            self._graves.append(server)
            server.kill()

    def restart(self) -> SessionManager[Any]:
        """Start a server with a new manager on the same database, and return the manager."""
        if self._server is not None:
            raise WorldError("the server is running; `crash()` or `stop()` it first")
        self._server = Server(self.database, self._make_manager)
        return self.run(self._server.manager.__aenter__())

    # The database

    def stored(self, user_id: int | str) -> Any:
        """The data of a user in the database, as plain values; None if there is none. A copy."""
        check_user_id(user_id)
        return self.database.stored(user_id)

    def put(self, user_id: int | str, data: Any) -> None:
        """Put a user with this data, JSON values, into the database. Raises `WorldError` if a server has the user."""
        check_user_id(user_id)
        body = encode_plain(data)
        row = self.database.backing.rows.setdefault(user_id, Row())
        if row.owner:
            raise WorldError(f"user {quote(user_id)} is on a server; end the session first")
        version = 1 if row.record is None else row.record.version + 1
        row.epoch += 1
        row.record = Record(user_id, row.epoch, "", version, 0, body, 0.0)

    def store_down(self, duration: Duration | None = None, *, silent: bool = False) -> None:
        """Make the database unreachable, for `duration` or until `store_up`.

        Calls fail at once; with `silent` they get no answer instead.
        """
        self.database.faults.down = "silent" if silent else "refusing"
        if duration is not None:
            self.universe.call_later(parse_duration(duration, "duration"), self.store_up)

    def store_up(self) -> None:
        """Make the database reachable again."""
        self.database.faults.down = ""

    def store_slow(self, latency: Duration) -> None:
        """Make each call of the database take `latency` from now on, there and back together."""
        there_and_back = parse_duration(latency, "latency", shortest=0)
        self.database.faults.latency = (there_and_back // 2, there_and_back // 2)

    # The end

    def close(self) -> None:
        """End everything, without a save."""
        if self._server is not None:
            self.crash()
        logging.disable(logging.CRITICAL)
        try:
            for server in self._graves:
                server.bury()
        finally:
            logging.disable(logging.NOTSET)
        self._graves.clear()

    @property
    def unobserved(self) -> list[str]:
        """Errors of tasks and callbacks that nothing caught, on all servers so far."""
        servers = [*self._graves] if self._server is None else [*self._graves, self._server]
        return [line for server in servers for line in server.unobserved]


@contextmanager
def world(make_manager: MakeManager, *, seed: int = 0) -> Iterator[World]:
    """A context manager: a server with a database in virtual time. A test of hours takes milliseconds, nothing sleeps.

    Parameters
    ----------
    make_manager
        Called as ``make_manager(store=store, clock=clock)`` at each start of the server; returns the program's
        `SessionManager`, with its listeners, on that store and clock.
    seed
        Decides how long the database takes for each call; the same seed gives the same run.

    Notes
    -----
    A test is a plain function and drives the world from outside: `run` runs a coroutine, `advance` lets time pass.
    Errors in tasks and callbacks that nothing caught raise `WorldError` at the end, unless the test failed already.
    """
    state = random.getstate()
    random.seed(seed)
    here = World(make_manager, Universe(seed))
    try:
        here.restart()
        yield here
        here.universe.advance(0)
        if here.unobserved:
            raise WorldError("nobody caught what went wrong on the server: " + "; ".join(here.unobserved))
    finally:
        here.close()
        random.setstate(state)


def _refuse_inside() -> None:
    """Raise `WorldError` inside an event loop, where virtual time cannot be moved."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise WorldError(
        "a world is driven from outside, by a plain function: what runs on its server cannot move its time, or end it"
    )


def _call(make_manager: MakeManager, store: Store, clock: Clock) -> SessionManager[Any]:
    manager = make_manager(store=store, clock=clock)
    if not isinstance(manager, SessionManager):
        raise WorldError(f"make_manager returned {type(manager).__name__}, not a SessionManager")
    if manager._server.link is None or manager._server.link.store is not store or manager._server.clock is not clock:
        raise WorldError(
            "make_manager has to build its manager on what it is given: "
            "def make_manager(store, clock): return SessionManager(store=store, clock=clock, ...)"
        )
    return manager
