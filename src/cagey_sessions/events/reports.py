"""Errors that no caller waits for: they go to the log, and to the listeners of ``error`` and ``unsavable``.

The log gets the whole text of our own errors. Of a foreign exception it gets the type and the places that it has passed
(file, line, function), but never the text, which may quote user data. What becomes of the session that an error is
about is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from itertools import islice
from traceback import walk_tb
from typing import Any

from .._core import SessionCore
from ..errors import CageySessionsError, ListenerError, UnsavableError
from ..user_code import END_OF_PROCESS
from ..wording import quote
from .listeners import Listeners, listener_error

__all__ = ["Reports", "drop_tracebacks", "fresh", "say"]

LONGEST_QUEUE = 1000
MOST_CAUSES = 10
MOST_FRAMES = 20
"""How many frames of an exception are logged, those nearest to where it was raised."""
LONGEST_WAY = 1000
"""How many frames are walked to find those: an exception object that is raised again and again gets ever more."""


class Reports:
    """The log and the error events of one manager. `spawn` starts a task of the manager's."""

    def __init__(
        self, log: Any, listeners: Listeners, spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    ) -> None:
        self._log = log
        self._listeners = listeners
        self._spawn = spawn
        self._queue: deque[tuple[str, tuple[object, ...]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def say(self, level: str, message: str, *args: object) -> None:
        """See `say`."""
        say(self._log, level, message, *args)

    def tell(self, what: str, error: Exception) -> None:
        """Log an error that no caller waits for: what it is about, what it is, and where it was raised."""
        self.say("error", "%s: %s%s", what, _summary(error), _origins(error))

    def error(self, error: Exception, session: SessionCore | None) -> None:
        """Log an error that no caller waits for, and emit ``error`` with it."""
        who = "" if session is None else f"user {quote(session.user_id)}: "
        self.say("error", "%s%s%s", who, _summary(error), _origins(error))
        self._announce("error", error, session)

    def unsavable(self, error: UnsavableError, session: SessionCore) -> None:
        """Log that data cannot be saved as it is, and emit ``unsavable``."""
        self.say("error", "%s%s", error, _origins(error))
        self._announce("unsavable", session, error)

    def close(self) -> None:
        """Emit no event from now on; errors still go to the log."""
        self._closed = True

    def _announce(self, name: str, *args: object) -> None:
        """Emit an event in a task, which no caller waits for. Past `LONGEST_QUEUE` waiting events it is left out."""
        # listeners that hang must not let the queue grow; the log has every error
        if self._closed or not self._listeners.has(name) or len(self._queue) >= LONGEST_QUEUE:
            return
        self._queue.append((name, args))
        if self._task is None or self._task.done():
            self._task = self._spawn(self._emit_all(), "error events")

    async def _emit_all(self) -> None:
        while self._queue:
            errors: list[Exception] = []
            name, args = self._queue.popleft()
            await self._listeners.call(name, args, errors)
            for error in errors:
                # not another ``error`` event: its listeners might raise again, and so on for ever
                self.tell(listener_error(name, [error]).message, error)


def say(log: Any, level: str, message: str, *args: object) -> None:
    """Write to the log; an exception of the program's logger is swallowed, because it must not stop a save.

    The text is put together here, because loggers differ in how they insert arguments, and all take a finished text.
    """
    try:
        getattr(log, level)(message % args)
    except END_OF_PROCESS:
        raise
    except BaseException:
        return  # there is no other place to report it


def fresh(error: Exception) -> Exception:
    """An error that can be raised to one of several callers without the tracebacks of the others.

    A `ListenerError` is copied. Of any other error the traceback is removed.
    """
    if isinstance(error, ListenerError):
        copy = error.derive(error.exceptions)
        for note in getattr(error, "__notes__", ()):
            copy.add_note(note)
        return copy
    return error.with_traceback(None)


def drop_tracebacks(error: BaseException) -> None:
    """Remove the tracebacks of an error and its parts, because they keep every local variable of their frames alive."""
    error.__traceback__ = None
    for part in getattr(error, "exceptions", ()):
        drop_tracebacks(part)


def _summary(error: BaseException) -> str:
    """One line for the log. Foreign exceptions are named by their types only, because their texts may quote data."""
    if not isinstance(error, CageySessionsError):
        return type(error).__name__
    if isinstance(error, BaseExceptionGroup):
        return f"{error.message} ({', '.join(type(part).__name__ for part in error.exceptions[:10])})"
    return f"{type(error).__name__}: {error}"


def _origins(error: BaseException) -> str:
    """Lines for the log that say where the foreign exceptions in an error, or among its causes, were raised."""
    lines: list[str] = []
    for other in _others(error, MOST_CAUSES):
        frames = deque(islice(walk_tb(other.__traceback__), LONGEST_WAY), MOST_FRAMES)
        if frames:
            lines.append(f"\n  {type(other).__name__}, raised in")
        for frame, line in frames:
            lines.append(f'\n    File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_qualname}')
    return "".join(lines)


def _others(error: BaseException, most: int) -> Iterator[BaseException]:
    """The foreign exceptions among an error, its parts and its causes; looks at `most` exceptions altogether."""
    seen: set[int] = set()
    waiting = deque([error])
    while waiting and len(seen) < most:
        each = waiting.popleft()
        if id(each) in seen:  # causes may form a circle
            continue
        seen.add(id(each))
        if not isinstance(each, CageySessionsError):
            yield each
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
        if each.__cause__ is not None:
            waiting.append(each.__cause__)
