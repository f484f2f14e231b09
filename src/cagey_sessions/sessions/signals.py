"""The end by a signal. What lives here: waiting for SIGTERM or SIGINT, and the exit status of the end that follows.
What must not: a handler that outlives the wait, or the steps of the end.

A process has one handler for each signal. Ours is installed for as long as somebody waits, calls the one it has found
there, and puts it back. A handler of `loop.add_signal_handler` is called by the loop itself, whoever has the slot.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ..errors import DrainError, NothingSavesError, UsageError
from ..records import DrainReport
from ..wording import name_some
from .ending import Endings
from .server import Server

__all__ = ["run_until_signal"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Handler:
    """What is installed for one signal while anybody waits for it."""

    def __init__(self, found: Any) -> None:
        self.found = found
        self.waiting: list[Callable[[int], object]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for notify in tuple(self.waiting):
            notify(number)
        if _is_hosts_own(self.found):
            self.found(number, frame)


def _is_hosts_own(handler: Any) -> bool:
    """Whether a handler is more than a way to end the process, which would end it in the middle of the saves."""
    if handler in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
        return False
    of_runner = isinstance(handler, functools.partial) and isinstance(
        getattr(handler.func, "__self__", None), asyncio.Runner
    )
    return not of_runner


def _require_main_thread(is_main: bool) -> None:
    if not is_main:
        raise UsageError("signals are handed to the main thread only: call this in a loop that runs there")


@contextmanager
def _calling_on_signals(notify: Callable[[int], object]) -> Iterator[None]:
    """Within this block `notify` is called with the number of each signal, between any two steps of the program."""
    installed: list[tuple[signal.Signals, _Handler]] = []
    try:
        for number in SIGNALS:
            handler: Any = signal.getsignal(number)
            if handler is None:
                raise UsageError(f"{number.name} has a handler that is not Python's, and could not be given back")
            if not isinstance(handler, _Handler):
                handler = _Handler(handler)
                try:
                    signal.signal(number, handler)
                except ValueError:  # as it is in a sub-interpreter
                    _require_main_thread(False)
            handler.waiting.append(notify)
            installed.append((number, handler))
        yield
    finally:
        for number, ours in installed:
            ours.waiting.remove(notify)
            is_there = signal.getsignal(number) is ours
            if is_there and not ours.waiting:
                signal.signal(number, ours.found)


async def run_until_signal(
    server: Server, endings: Endings, destroy: Callable[[bool], Awaitable[DrainReport]], persist: Callable[[], bool]
) -> int:
    """See `SessionManager.run_until_signal`; `persist` says whether users are saved, unless somebody else has."""
    server.table.require_thread()
    _require_main_thread(threading.current_thread() is threading.main_thread())
    loop = server.enter()

    def on_signal(number: int) -> None:
        name = signal.Signals(number).name
        if endings.end_wanted.is_set():
            server.reports.say(
                "warning", "%s while the manager is being destroyed: it goes on, users are being saved", name
            )
        else:
            server.reports.say("info", "%s: the manager is being destroyed", name)
            endings.end_wanted.set()

    def notify(number: int) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(on_signal, number)

    with _calling_on_signals(notify):
        await endings.end_wanted.wait()
        users = server.table.counters.identified
        errors: tuple[Exception, ...] = ()
        try:
            report = await destroy(endings.drain is None and persist())
        except DrainError as error:
            report = error.report
            errors = error.exceptions[len(report.unsaved) :]
        except NothingSavesError as error:
            server.reports.say("error", "%d users are not saved: %s", users, error)
            await destroy(False)
            return 1
        for raised in errors:
            server.reports.tell("at the end of the manager", raised)
        unsaved = [user.user_id for user in report.unsaved]
        if unsaved:
            server.reports.say(
                "error",
                "the manager has ended after %.1f s: %d users saved, %d not: %s",
                report.seconds,
                report.saved,
                len(unsaved),
                name_some(unsaved),
            )
            return 1
        server.reports.say("info", "the manager has ended after %.1f s: %d users saved", report.seconds, report.saved)
        return 0
