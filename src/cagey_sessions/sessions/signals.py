"""`run_until_signal`: waits for SIGTERM or SIGINT, ends the manager, and returns an exit status.

A process has one handler for each signal. Ours is installed only while a manager waits. It also calls the handler that
it has replaced, and puts that back at the end. A handler of `loop.add_signal_handler` needs no such call: the loop
calls it itself, whichever handler is installed.

See also `draining`, for the end itself.
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
    """The handler of one signal while a manager waits for it."""

    def __init__(self, found: Any) -> None:
        self.found = found
        self.waiting: list[Callable[[int], object]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for notify in tuple(self.waiting):
            notify(number)
        if _is_hosts_own(self.found):
            self.found(number, frame)


def _is_hosts_own(handler: Any) -> bool:
    """Whether a handler does more than end the process; it must not be called if it would do just that during saves."""
    if handler in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
        return False
    # `asyncio.run` installs a handler for SIGINT that cancels the main task, in which this very end may run
    of_runner = isinstance(handler, functools.partial) and isinstance(
        getattr(handler.func, "__self__", None), asyncio.Runner
    )
    return not of_runner


def _require_main_thread(is_main: bool) -> None:
    if not is_main:
        raise UsageError("signals are handed to the main thread only: call this in a loop that runs there")


@contextmanager
def _calling_on_signals(notify: Callable[[int], object]) -> Iterator[None]:
    """In this block `notify` is called with the number of each signal, between any two steps of the program."""
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
                except ValueError:  # raised in any other thread, and in a sub-interpreter
                    _require_main_thread(False)
            handler.waiting.append(notify)
            installed.append((number, handler))
        yield
    finally:
        for number, ours in installed:
            ours.waiting.remove(notify)
            # somebody may have installed another handler since, which has to stay
            is_there = signal.getsignal(number) is ours
            if is_there and not ours.waiting:
                signal.signal(number, ours.found)


async def run_until_signal(
    server: Server, endings: Endings, destroy: Callable[[bool], Awaitable[DrainReport]], persist: Callable[[], bool]
) -> int:
    """See `SessionManager.run_until_signal`. `persist` says whether users are saved, unless a drain has begun."""
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
        # the handler may run between any two steps, so it only wakes the loop
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
