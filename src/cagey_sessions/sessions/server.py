"""`Server`: the parts that all sessions of one manager share, put together.

The server is built first, and knows nothing of how sessions begin and end; the modules that do are built on it. It
reports two things upwards, through functions that it is given: that a session has lost its user, and that a save of an
ending session has an outcome.

See also `manager`, which builds it and all that stands on it.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable
from typing import Any

from .._core import Counters, SessionCore, SessionTable
from ..clock import Clock, SystemClock
from ..data import Encoding, Sanitizer
from ..errors import FencedError, SessionEndedError, UserErasedError, WrongLoopError
from ..events import Listeners
from ..events.reports import Reports, say
from ..files import Spill
from ..loop import Loop
from ..options import Options
from ..ownership import Claims
from ..process import Identity, at_exit, is_forked_worker
from ..saving import Autosave, ListenerSaver, Requests, Saver, StoreSaver
from ..stores import Store
from ..stores.link import StoreLink
from ..threads import in_thread

__all__ = ["Server"]


class _Intent:
    """Whether a manager is meant to save at all. If not, there is no warning about unsaved users."""

    def __init__(self, is_there: bool) -> None:
        self.is_there: bool = is_there


class Server:
    """The parts of one manager. Saves go to `store`, encoded by `encoding`, or to listeners if there is no store.

    `host` becomes the manager that sessions know as theirs. `on_lost` is called when a session has lost its user, and
    `on_settled` when a save of an ending session has an outcome, with the error or None.
    """

    def __init__(
        self,
        session_type: type[SessionCore],
        host: object,
        options: Options,
        clock: Clock,
        store: Store | None,
        encoding: Encoding,
        spill: Spill | None,
        on_lost: Callable[[SessionCore, FencedError | UserErasedError], None],
        on_settled: Callable[[SessionCore, Exception | None], None],
    ) -> None:
        self.options = options
        self.clock = clock
        self.encoding = encoding
        self.spill = spill
        self.identity: Identity = Identity()
        self.loop: Loop = Loop(clock)
        self.table: SessionTable = SessionTable(session_type, host, stored=store is not None)
        self.sanitizer: Sanitizer | None = None
        if options.debug:
            self.sanitizer = Sanitizer(self.table, encoding, self._report)
            self._on_heard("destroy", False)
        self.listeners: Listeners = Listeners.of_manager(self.sanitizer, self._on_heard)
        self.reports: Reports = Reports(options.log, self.listeners, self.loop.spawn)
        self.link: StoreLink | None = None
        self.claims: Claims | None = None
        self.store_saver: StoreSaver | None = None
        self.saver: Saver
        if store is None:
            self.saver = ListenerSaver(self.table, self.listeners, encoding, self.sanitizer)
        else:
            link = self.link = StoreLink(
                store,
                clock,
                self.loop,
                options.save_timeout,
                self.identity,
                self.reports.say,
                None if spill is None else self._read_spill,
            )
            self.claims = Claims(link, self.loop, clock, self.table, self.identity, self.reports.tell)
            self.saver = self.store_saver = StoreSaver(
                self.table,
                self.loop,
                link,
                self.claims,
                encoding,
                clock,
                options,
                self.reports,
                self.identity,
                on_lost,
                self.sanitizer,
            )
        self.autosave: Autosave = Autosave(
            self.table, self.loop, clock, options, self.reports, self.saver, self.identity, on_settled
        )
        self.table.keep_time(
            # the core asks for the time in every call: a C function saves it a call of Python
            now=time.monotonic_ns if type(clock) is SystemClock else clock.now,
            tick=self.autosave.tick,
            interval=options.interval // self.autosave.tick if options.interval else 0,
            arm=self.autosave.arm,
            user_id_type=options.user_id,
        )
        self.requests: Requests = Requests(self.table, clock, self.autosave, self.saver, options.max_in_flight)
        self.intent: _Intent = _Intent(store is not None or options.interval is not None or bool(options.persist_on))
        self.warning: weakref.finalize[Any, Any] = weakref.finalize(
            self, _warn_of_unsaved, self.table.counters, self.intent, options.log, self.identity
        )
        """Runs when the manager is collected as garbage, or the process exits, without `SessionManager.destroy`."""
        self._spill_turn = asyncio.Lock()
        self.closed: bool = False

    def _on_heard(self, event: str, heard: bool) -> None:
        """Tell the core whether an event has listeners; with `debug` the end of a session always counts as heard."""
        self.table.hear(event, heard or (self.sanitizer is not None and event in ("before_destroy", "destroy")))

    def _report(self, error: Exception, session: SessionCore | None) -> None:
        self.reports.error(error, session)

    def enter(self) -> asyncio.AbstractEventLoop:
        """Called first by every awaited call: binds the loop at the first, and refuses another loop later."""
        loop = asyncio.get_running_loop()
        if loop is not self.loop.running:
            if self.loop.running is not None:
                raise WrongLoopError("this manager belongs to another event loop; make one manager for each loop")
            self._begin(loop)
        else:
            self.table.require_thread()  # a forked child has the same loop object, and is refused here
        return loop

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to this loop and this process. Not earlier, because a process may be forked after making a manager."""
        self.loop.bind(loop)
        self.identity.begin()
        self.table.reseed(self.identity.random.getrandbits(64))
        self.table.bind_thread()
        self.table.bind_loop(loop)
        self.saver.begin()
        if is_forked_worker():
            at_exit(self.warning)  # such a process exits without `atexit`, which `weakref.finalize` relies on

    async def _read_spill(self) -> None:
        """Read the spill file, before any user is claimed: what was spilled of a user has to be saved first."""
        spill = self.spill
        assert spill is not None
        if not spill.is_open:
            async with self._spill_turn:
                if not spill.is_open:  # another call may have opened it while this one waited
                    spill.open(await in_thread(spill.read))  # only what is still wanted becomes known

    @property
    def owner(self) -> str:
        """The name under which users are claimed; empty until the first awaited call."""
        return self.identity.owner

    def refuse_if_ending(self, session: SessionCore) -> None:
        if self.table.is_ending(session):
            raise SessionEndedError(f"the session has ended, or is ending ({session!r})")

    def close(self) -> None:
        """All sessions have ended: call no listener any more."""
        self.listeners.clear()
        self.reports.close()
        self.closed = True


def _warn_of_unsaved(counters: Counters, intent: _Intent, log: Any, identity: Identity) -> None:
    if intent.is_there and counters.identified and identity.is_this_process():
        say(
            log,
            "warning",
            "unsaved users: %d; `await manager.destroy(persist=True)` was not called, or did not finish",
            counters.identified,
        )
