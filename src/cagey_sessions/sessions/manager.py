"""The public `SessionManager` class: the docstrings and the types of its calls, and the checks of its settings.

The work is done in the other modules of this package; `__init__` puts them together. Calls that are made for every user
are in the compiled `ManagerCore`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, cast, overload

from .._core import ManagerCore, SessionCall, direct
from ..clock import Clock, SystemClock
from ..data import MAX_BYTES, Encoding
from ..errors import OptionError, UnknownEventError, UnsavableError
from ..events import Listener, ManagerEvent
from ..files import Spill
from ..options import PERSIST_EVENTS, Duration, known_event, lacks, parse_duration, read_options, suggest, yes_or_no
from ..records import DrainReport, Health, SnapshotReport, SpillReport, Statistics
from ..stores import Store
from ..wording import quote
from . import health
from .beginning import Beginnings
from .draining import Draining
from .ending import Endings
from .loading import NO_DEFAULT, Loading
from .login import Logins
from .server import Server
from .session import Session, T
from .signals import run_until_signal
from .snapshot import take_snapshot
from .spilling import Spilling
from .users import Users

__all__ = ["SessionManager", "create"]

R = TypeVar("R")
# What a decorated listener may be. It keeps its own type, so it is a variable, whose bound cannot hold the variable T.
OfSession = TypeVar("OfSession", bound=Callable[[Session[Any]], object])
OfIdentified = TypeVar("OfIdentified", bound=Callable[[Session[Any], int | str, Any], object])
OfError = TypeVar("OfError", bound=Callable[[Exception, Session[Any] | None], object])
OfUnsavable = TypeVar("OfUnsavable", bound=Callable[[Session[Any], UnsavableError], object])


@direct
class SessionManager(ManagerCore, Generic[T]):
    """All sessions on this server. It loads and saves their users' data, by a store or by the program's own listeners.

    Parameters
    ----------
    options
        The settings of the Node package in snake case, as one mapping:
        ``{"user_data": {"persistence": {"interval": "30s", "events": ["disconnect", "shutdown"]}}}``.
        They mean the same as `interval` and `persist_on`.
    store
        Where user data is loaded from and saved to, such as ``SQLiteStore("players.db")``. Without one the program
        loads, and saves in a listener of ``persist_user_data``.
    interval
        How old an unsaved change may become: each user is saved at least this often, at times spread evenly.
        Seconds, a `timedelta`, or text (``"30s"``, ``"1h30m"``, ``"500ms"``); from 10 ms to 100 years. The default is
        30 seconds with a store. Without a store there is none: nothing is saved unless a call asks for it.
    persist_on
        When else to save: any of ``"disconnect"`` and ``"shutdown"``; with a store both by default. Leaving
        ``async with session`` saves if ``"disconnect"`` is in it, leaving ``async with manager`` if ``"shutdown"`` is;
        a program that ends sessions itself asks `will_persist_user_data_on`.
    max_in_flight
        How many saves may be under way at a time: calls of the listener (by default 50), or batches for the store (4).
        A call that never returns keeps its place; a listener that waits for the save of another session gives up its
        place meanwhile.
    encode
        With a store: a plain function from your data to a JSON value, for data that is more than JSON values.
        `dataclass_codec` and `msgspec_codec` make it and its inverse.
    decode
        With a store: the inverse of `encode`. If it has a parameter named ``schema``, it gets the number that the body
        was written with, so that it can read data of older versions of the program.
    schema
        With a store: the number of the shape in which data is written now, 0 by default. A stored body with a higher
        number, written by a newer version of the program, is refused and never overwritten.
    max_bytes
        With a store: the largest size of a user's data, in bytes of JSON; 1 MiB by default.
    before_save
        With a store: a plain function that is called with the session right before its data is encoded, to copy live
        state into `user_data`.
    save_timeout
        With a store: how long `persist_now`, `Session.destroy`, `login`, `open`, `read`, `edit`, `erase` and a single
        call of the store may take; 10 seconds by default.
    tracking
        With a store: how the timer detects a change. ``"content"``, the default, encodes each user's data once per
        interval and compares the bytes. ``"marked"`` skips users unless the program has called `Session.mark_changed`,
        or assigned `user_data`, since their last save. `persist_now`, `destroy` and `persist_all_user_data` compare the
        bytes in either case.
    user_id
        ``int`` or ``str`` to accept user ids of that type only.
    spill
        With a store: the path of a file for data that is still unsaved at the deadline of `destroy`, or when the
        interpreter exits without `destroy`. The next start with the same path saves it, unless the user was saved by
        another server since; see `spill_report`. Only one manager at a time may use the file.
    log
        A logger; ``logging.getLogger("cagey_sessions")`` by default. Its methods ``debug``, ``info``, ``warning`` and
        ``error`` are called with one text, formatted already. It gets ids and counts, and of errors that functions of
        yours raise the type and the traceback's lines; never data or keys.
    debug
        True to report mistakes with user data, each as a `UserDataWarning`: objects that two users share, changes after
        the end of a session or without a mark, values that `encode` and `decode` change, and listeners that block the
        event loop. It walks all data at each save, so it is for development and tests.
    clock
        A `Clock`, for tests; by default the system's.

    Notes
    -----
    The manager belongs to the event loop of its first awaited call, or of ``async with``. In another loop or thread, or
    in the child of a fork, every call of the manager and of its sessions raises `WrongLoopError`. This includes
    `statistics` and `health`: what they read may be in the middle of a change. To call from a thread, use
    `asyncio.run_coroutine_threadsafe`. Only `key`, `user_id`, `alive` and `end_reason` of a session can be read
    anywhere. A manager that is made before a fork, and first used after it, is a separate one in each process.

    A manager that has users to save lives on, and saves them, until its loop ends, even if the program has dropped all
    references to it; only `destroy`, or leaving ``async with``, ends it. Wrong settings raise `OptionError`.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        /,
        *,
        store: Store | None = None,
        interval: Duration | None = None,
        persist_on: Iterable[Literal["disconnect", "shutdown"]] | None = None,
        max_in_flight: int | None = None,
        encode: Callable[[T], Any] | None = None,
        decode: Callable[..., T] | None = None,
        schema: int | None = None,
        max_bytes: int | None = None,
        before_save: Callable[[Session[T]], None] | None = None,
        save_timeout: Duration | None = None,
        tracking: Literal["content", "marked"] | None = None,
        user_id: type[int] | type[str] | None = None,
        spill: str | os.PathLike[str] | None = None,
        log: Any = None,
        debug: bool = False,
        clock: Clock | None = None,
    ) -> None:
        if store is not None and not isinstance(store, Store):
            what = f"{type(store).__name__}; open_store(url) makes one" if isinstance(store, str) else quote(store)
            raise OptionError(f"store is a store, such as SQLiteStore('players.db'), not {what}")
        codec = {"encode": encode, "decode": decode, "schema": schema, "max_bytes": max_bytes}
        if store is None:
            for name, value in codec.items():
                if value is not None:
                    raise OptionError(f"{name} needs a store; without one the program turns its data into bytes itself")
        most = max_bytes if max_bytes is not None else MAX_BYTES if store is not None else sys.maxsize
        encoding = Encoding(encode, decode, 0 if schema is None else schema, most)
        if spill is not None and store is None:
            raise OptionError("spill needs a store; without one, a listener of 'persist_user_data' does the saving")
        checked = read_options(
            options,
            stored=store is not None,
            interval=interval,
            persist_on=persist_on,
            max_in_flight=max_in_flight,
            before_save=before_save,
            save_timeout=save_timeout,
            tracking=tracking,
            user_id=user_id,
            log=log,
            debug=debug,
        )
        if clock is not None and (missing := lacks(clock, ("now", "call_later"))):
            raise OptionError(f"clock has the methods now and call_later; {quote(clock)} has no {missing}")
        endings: Endings  # it is made of the server, which reports to it
        server = self._server = Server(
            Session,
            self,
            checked,
            clock or SystemClock(),
            store,
            encoding,
            None if spill is None else Spill(spill),
            on_lost=lambda session, error: endings.on_lost(session, error),
            on_settled=lambda session, error: endings.on_settled(session, error),
        )
        endings = self._endings = Endings(server)
        self._spilling = Spilling(server, endings)
        self._draining = Draining(server, endings, self._spilling)
        self._beginnings = Beginnings(server, endings)
        loading = Loading(server, endings, self._beginnings, self._spilling)
        self._logins = Logins(server, endings, self._beginnings, loading)
        self._users = Users(server, endings, self._beginnings, loading, self._spilling)
        self._attend(server.table)
        self._is_over = False

    if TYPE_CHECKING:

        def create(self, key: str | None = None, *, replace: bool = False) -> SessionCall[Session[T]]: ...
        def find_by_key(self, key: str) -> Session[T] | None: ...

    def open(
        self,
        user_id: int | str,
        *,
        default: T | Callable[[], T] = NO_DEFAULT,
        when_active: Literal["join", "replace", "refuse"] = "join",
    ) -> SessionCall[Session[T]]:
        """Return the live session of a user, or a new session without a key, with the data from the store.

        Await the call, or enter it: ``async with manager.open("alice") as session:`` ends the session with the block,
        also one that was live before. `default` is the data of a user whom the store does not know, as in
        `Session.login`. `when_active` says what to do if the user has a live session: ``"join"`` returns it,
        ``"replace"`` saves and ends it, ``"refuse"`` raises `UserActiveError`. Calls for a user who is being loaded get
        the same session. Cancelling the call ends the session unless another call waits for it.

        Otherwise it is `create` and `Session.login` in one, and raises what they raise, such as `UserNotFoundError` for
        a user whom the store does not know if there is no `default`. O(size of the data), and a call of the store.
        """
        return self._open(user_id, default, when_active)

    async def read(self, user_id: int | str) -> T:
        """Return a private copy of a user's data: the live data if they are on this server, otherwise the stored data.

        It claims nothing, so another server may be changing the data meanwhile. If the user's session here is ending,
        and servers share the store, the store is asked first who has the user. Raises `InvalidUserIdError`,
        `UserNotFoundError`, `EncodingError` for live data that cannot be saved, `CorruptRecordError`,
        `NewerSchemaError`, `StoreUnavailableError`, and `StoreModeError` without a store. O(size of the data).
        """
        return cast(T, await self._users.read(user_id))

    def edit(self, user_id: int | str, *, default: T | Callable[[], T] = NO_DEFAULT) -> AbstractAsyncContextManager[T]:
        """Change a user's data in place, connected or not: ``async with manager.edit("alice") as data: ...``.

        For a user on this server `data` is the live object, and leaving the block saves it as `persist_now` does. A
        user who is not here is claimed and loaded, and written and released when the block is left; a login of the same
        user waits for that. If the block raises, nothing is written, but its changes to live data stay. `default` is as
        in `Session.login`.

        Raises what `Session.login` and `Session.persist_now` raise, and `UsageError` if the program has assigned
        another `user_data` meanwhile: the object that the block changed is then no longer the user's data.
        """
        return self._users.edit(user_id, default)

    async def erase(self, user_id: int | str) -> bool:
        """Remove a user's data from the store for good, and end their session unsaved; returns whether there was any.

        A tombstone stays in the store, so that no late write brings the data back (with `CallbackStore` that is up to
        its `erase`). At the next login the user is new. Raises `OwnedElsewhereError` while the user is on another
        server, `InvalidUserIdError`, `StoreUnavailableError`, `StoreModeError` without a store or with one that cannot
        erase, and `WouldDeadlockError` inside a listener of the end of their session. One call of the store.
        """
        return await self._users.erase(user_id)

    def find_by_user(self, user_id: int | str) -> Session[T] | None:
        """Return the live session of a user, or None. Raises `InvalidUserIdError`. O(1)."""
        return cast("Session[T] | None", self._server.table.find_by_user(user_id))

    def sessions(self) -> list[Session[T]]:
        """Return all sessions, including ending ones, in no order. O(n), so do not call it for every message."""
        return cast("list[Session[T]]", self._server.table.sessions_now())

    def __len__(self) -> int:
        """How many sessions there are, including ending ones. O(1)."""
        self._server.table.require_thread()
        return len(self._server.table)

    def __bool__(self) -> bool:
        """A manager is always true, also without sessions."""
        return True

    def will_persist_user_data_on(self, name: Literal["disconnect", "shutdown"]) -> bool:
        """Whether `persist_on` has ``"disconnect"`` or ``"shutdown"``.

        For a program that calls `destroy` itself:
        ``await session.destroy(manager.will_persist_user_data_on("disconnect"))``. Raises `UnknownEventError`.
        """
        self._server.table.require_thread()
        return known_event(name, PERSIST_EVENTS) in self._server.options.persist_on

    async def persist_all_user_data(self) -> None:
        """Save every user who is on this server now, each once, oldest save first; with a store in batches.

        Users who join meanwhile are not included; users who are leaving are saved by their own `destroy`. If some
        cannot be saved it raises `UnsavedError`, with their `user_ids`, after all others are saved. Raises
        `NothingSavesError` without a store and without a listener that saves. O(users), in slices that let the event
        loop do other work in between.
        """
        self._server.enter()
        await self._server.requests.save_all()

    async def snapshot(self, path: str | os.PathLike[str]) -> SnapshotReport:
        """Write all users on this server to a file, for a backup or for inspection; `read_snapshot` reads it.

        Each user's data is that of one moment, encoded as for a save; users later in the file are of later moments.
        Users who leave meanwhile are not in it, users who join may be. Users whose data cannot be encoded are left out,
        and named in the report. The file can be read by its owner only (mode 0600), and contains all data as JSON. It
        replaces an earlier file as a whole, once it is safe on the disk; if that fails, the earlier file stays.

        If the call is cancelled it first waits for its thread, up to 10 seconds if the disk hangs; then the earlier
        file is as it was. A cancellation during the last step, the rename, comes too late for that: the new file is
        there, and the call raises `asyncio.CancelledError` all the same.

        `path` may be a symbolic link made by this user or by root: the file that it leads to is replaced.

        Raises `SnapshotError` if the file cannot be written, and for a link made by another user; `ManagerClosedError`
        after the end. O(users), in slices; a thread waits for the disk.
        """
        return await take_snapshot(self._server, path)

    @property
    def spill_report(self) -> SpillReport | None:
        """What has become so far of the users that an earlier process spilled; None without `spill`. O(these users).

        It is also None until the store was opened for the first time.
        """
        self._server.table.require_thread()
        spill = self._server.spill
        return spill.report() if spill is not None and spill.is_open else None

    def statistics(self) -> Statistics:
        """Return what the manager is doing at this instant. O(1), plus one step for each save under way."""
        self._server.table.require_thread()
        return health.statistics(self._server, self._endings)

    def health(self) -> Health:
        """Return whether users are being saved as they should: ``"ok"``, ``"degraded"`` or ``"down"``, and why.

        - ``"down"``: the store does not answer, there is neither a store nor a listener that saves, or the manager was
          destroyed. The result is then false in a condition.
        - ``"degraded"``: an unsaved change is older than two intervals, saves take longer than the interval, or some
          data cannot be saved as it is.

        The reason lists all that applies, and names up to ten users whose data cannot be saved, so do not publish it.
        O(1), plus one step for each save under way.
        """
        self._server.table.require_thread()
        return health.health(self._server, self._endings)

    async def destroy(self, persist: bool | None = None, *, deadline: Duration = "25s") -> DrainReport:
        """End all sessions, and the manager itself; returns a report.

        No new session is admitted from now on, and calls under way are awaited. With `persist` (by default True with a
        store, False without) every user's last save is made, oldest first, and repeated while it fails. Then the store
        is closed.

        Users who are not saved by the `deadline` are ended unsaved. The call then raises `DrainError`, which names
        them; its ``report`` is the `DrainReport`. With `spill` their data is kept in that file. Listeners of
        ``destroy`` may run for one second more; a save that is still under way then is abandoned.

        Later calls join the first one, and its `deadline`. One that asks for saves gets those that are still possible,
        and raises `ManagerClosedError` if a session had ended without one by then. Inside a listener that this end
        waits for, or in a task that such a listener has started, the call returns at once, with the report so far.
        Cancelling the call stops the waiting, not the end. Raises `NothingSavesError` and `OptionError` before anything
        changes. O(users), in slices.
        """
        longest = parse_duration(deadline, "deadline", shortest=0)
        persist = self._server.saver.is_store if persist is None else yes_or_no("persist", persist)
        report = await self._draining.drain(persist, longest)
        if self._server.closed:
            self._server.warning.detach()
        return report

    async def run_until_signal(self, *, deadline: Duration = "25s") -> int:
        """Wait for SIGTERM or SIGINT, then `destroy` the manager; returns 0, or 1 if a user is unsaved.

        Users are saved if `persist_on` has ``"shutdown"``. `deadline` is that of `destroy`. The result is meant to be
        the exit status. The call also returns when the manager was destroyed by other code. The report goes to the log,
        and leaving ``async with`` does not raise its errors again:

            async def main() -> int:
                async with manager:
                    ...
                    return await manager.run_until_signal()

            raise SystemExit(asyncio.run(main()))

        The handlers are installed from the call to its return. Handlers that the program has set before, with
        `signal.signal` or `loop.add_signal_handler`, are called as well, but not Python's own and those of
        `asyncio.run`. All are restored afterwards, unless others were set meanwhile. Further signals are logged, and
        interrupt nothing. Cancelling the call stops the waiting, not an end that has begun.

        Raises `UsageError` outside the main thread, and `DurationError`, before anything changes.
        """
        parse_duration(deadline, "deadline", shortest=0)
        status = await run_until_signal(
            self._server,
            self._endings,
            lambda persist: self.destroy(persist, deadline=deadline),
            lambda: self.will_persist_user_data_on("shutdown"),
        )
        self._is_over = True
        return status

    def estimate_drain_seconds(self) -> float:
        """Estimate how many seconds `destroy(persist=True)` would take now; 0.0 without users to save.

        It assumes full batches, `max_in_flight` of them at a time, at the average time of a call of the store (without
        a store one save for each user, at the average time of the listeners), plus 0.1 ms of work on the event loop for
        each user. Before any call was measured it counts that work alone. It does not account for a store that is down,
        large data, failed attempts, or other listeners. O(1).
        """
        self._server.table.require_thread()
        return health.drain_seconds(self._server)

    async def __aenter__(self) -> Self:
        """Bind the manager to this event loop, and open the store; raises what `Store.open` raises."""
        self._server.enter()
        if self._server.link is not None:
            await self._server.link.open()
            self._spilling.begin()
            await self._spilling.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Destroy the manager. Users are saved if `persist_on` has ``"shutdown"``: by default it has with a store."""
        if self._is_over:
            return  # `run_until_signal` has destroyed the manager, and logged the report
        begun = self._endings.drain is not None  # the call that began it has said whether to save
        await self.destroy(not begun and self.will_persist_user_data_on("shutdown"))

    @overload
    def on(
        self,
        name: Literal["created", "started", "persist_user_data", "before_destroy", "destroy"],
        listener: Callable[[Session[T]], R],
    ) -> Callable[[Session[T]], R]: ...
    @overload
    def on(
        self, name: Literal["identified"], listener: Callable[[Session[T], int | str, T], R]
    ) -> Callable[[Session[T], int | str, T], R]: ...
    @overload
    def on(
        self, name: Literal["error"], listener: Callable[[Exception, Session[T] | None], R]
    ) -> Callable[[Exception, Session[T] | None], R]: ...
    @overload
    def on(
        self, name: Literal["unsavable"], listener: Callable[[Session[T], UnsavableError], R]
    ) -> Callable[[Session[T], UnsavableError], R]: ...
    @overload
    def on(
        self, name: Literal["created", "started", "persist_user_data", "before_destroy", "destroy"]
    ) -> Callable[[OfSession], OfSession]: ...
    @overload
    def on(self, name: Literal["identified"]) -> Callable[[OfIdentified], OfIdentified]: ...
    @overload
    def on(self, name: Literal["error"]) -> Callable[[OfError], OfError]: ...
    @overload
    def on(self, name: Literal["unsavable"]) -> Callable[[OfUnsavable], OfUnsavable]: ...
    def on(self, name: ManagerEvent, listener: Listener | None = None) -> object:
        """Call a listener, sync or async, each time an event is emitted. Without a listener, return a decorator.

        The events and what their listeners receive: ``created`` (session), ``started`` (session), ``identified``
        (session, user_id, user_data), ``persist_user_data`` (session), ``before_destroy`` (session), ``destroy``
        (session), ``error`` (error, session or None), ``unsavable`` (session, error). With a store there is no
        ``persist_user_data``; use ``before_save=`` instead. Listeners run one at a time in the order of registration,
        each awaited before the next; one that raises does not stop the others.

        A ``persist_user_data`` listener has to turn `session.user_data` into bytes before its first await, and then
        write them: the data goes on changing while the write is under way.

        Raises `UnknownEventError`, `InvalidListenerError`.
        """
        if listener is None:
            return lambda function: self._add(name, function, once=False)
        return self._add(name, listener, once=False)

    @overload
    def once(
        self,
        name: Literal["created", "started", "persist_user_data", "before_destroy", "destroy"],
        listener: Callable[[Session[T]], R],
    ) -> Callable[[Session[T]], R]: ...
    @overload
    def once(
        self, name: Literal["identified"], listener: Callable[[Session[T], int | str, T], R]
    ) -> Callable[[Session[T], int | str, T], R]: ...
    @overload
    def once(
        self, name: Literal["error"], listener: Callable[[Exception, Session[T] | None], R]
    ) -> Callable[[Exception, Session[T] | None], R]: ...
    @overload
    def once(
        self, name: Literal["unsavable"], listener: Callable[[Session[T], UnsavableError], R]
    ) -> Callable[[Session[T], UnsavableError], R]: ...
    @overload
    def once(
        self, name: Literal["created", "started", "persist_user_data", "before_destroy", "destroy"]
    ) -> Callable[[OfSession], OfSession]: ...
    @overload
    def once(self, name: Literal["identified"]) -> Callable[[OfIdentified], OfIdentified]: ...
    @overload
    def once(self, name: Literal["error"]) -> Callable[[OfError], OfError]: ...
    @overload
    def once(self, name: Literal["unsavable"]) -> Callable[[OfUnsavable], OfUnsavable]: ...
    def once(self, name: ManagerEvent, listener: Listener | None = None) -> object:
        """As `on`, for the next event only, even if the listener raises or causes the event again."""
        if listener is None:
            return lambda function: self._add(name, function, once=True)
        return self._add(name, listener, once=True)

    def off(self, name: ManagerEvent, listener: Listener) -> None:
        """Remove a listener; does nothing if it is not registered. Raises `UnknownEventError`."""
        self._server.table.require_thread()
        self._server.listeners.remove(name, listener)

    def _add(self, name: ManagerEvent, listener: Listener, *, once: bool) -> Listener:
        self._server.table.require_thread()
        if type(name) is str and name == "persist_user_data" and self._server.saver.is_store:
            raise UnknownEventError(
                "a manager with a store saves by itself and emits no 'persist_user_data'; to copy live state into the "
                "data right before it is saved, give SessionManager a function before_save="
            )
        self._server.listeners.add(name, listener, once=once)
        if name == "persist_user_data":
            self._server.intent.is_there = True
            self._server.autosave.kick()
        return listener


def create(apis: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> SessionManager[Any]:
    """Make a `SessionManager` with the arguments of the Node package.

    `apis` may have ``"log"``, a logger; `options` is the nested mapping of `SessionManager`. Raises `OptionError`.
    """
    if apis is not None and not isinstance(apis, Mapping):
        raise OptionError(f"apis is a mapping like {{'log': logger}}, not {quote(apis)}")
    for name in apis or ():
        if not isinstance(name, str) or name != "log":
            raise OptionError(f"there is no api {quote(name)}{suggest(name, ('log',))}")
    return SessionManager(options, log=(apis or {}).get("log"))
