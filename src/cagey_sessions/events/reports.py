"""Errors that no caller waits for. What lives here: where they are told, in the log and to listeners, and how much of
them. What must not: what becomes of a session that an error is about.

The log gets what our own errors say. Of an exception of somebody else's it gets the type and the places it has passed,
file, line and function; never its text, which may quote user data.
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
"""Of an exception in the log, those nearest to where it was raised."""
LONGEST_WAY = 1000
"""How many frames are looked at: an exception that is raised again and again gets longer each time."""


class Reports:
    """What one manager has to tell; `spawn` starts a task of the manager's."""

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
        """Log an error that no caller waits for: what it is about, what it is, and where it comes from."""
        self.say("error", "%s: %s%s", what, _summary(error), _origins(error))

    def error(self, error: Exception, session: SessionCore | None) -> None:
        """Log an error that no caller waits for and hand it to the listeners of ``error``."""
        who = "" if session is None else f"user {quote(session.user_id)}: "
        self.say("error", "%s%s%s", who, _summary(error), _origins(error))
        self._announce("error", error, session)

    def unsavable(self, error: UnsavableError, session: SessionCore) -> None:
        """Log that data cannot be saved as it is and tell the listeners of ``unsavable``."""
        self.say("error", "%s%s", error, _origins(error))
        self._announce("unsavable", session, error)

    def close(self) -> None:
        """From now on tell the log alone."""
        self._closed = True

    def _announce(self, name: str, *args: object) -> None:
        """Have a task emit an event that nobody waits for."""
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
                self.tell(listener_error(name, [error]).message, error)


def say(log: Any, level: str, message: str, *args: object) -> None:
    """Log, and let no logger that fails stop a save.

    The text is put together here: not every logger does that with ``%``, and all take one text as it is.
    """
    try:
        getattr(log, level)(message % args)
    except END_OF_PROCESS:
        raise
    except BaseException:
        return  # there is nowhere else to say it


def fresh(error: Exception) -> Exception:
    """A copy of a group that several callers may raise, so that their tracebacks do not pile up on one object."""
    if isinstance(error, ListenerError):
        copy = error.derive(error.exceptions)
        for note in getattr(error, "__notes__", ()):
            copy.add_note(note)
        return copy
    return error.with_traceback(None)


def drop_tracebacks(error: BaseException) -> None:
    """Let go of the frames an error and its parts have passed, and of all that those hold."""
    error.__traceback__ = None
    for part in getattr(error, "exceptions", ()):
        drop_tracebacks(part)


def _summary(error: BaseException) -> str:
    """One line for the log: the types of what was raised, without the texts, which may quote data."""
    if not isinstance(error, CageySessionsError):
        return type(error).__name__
    if isinstance(error, BaseExceptionGroup):
        return f"{error.message} ({', '.join(type(part).__name__ for part in error.exceptions[:10])})"
    return f"{type(error).__name__}: {error}"


def _origins(error: BaseException) -> str:
    """Where the exceptions of others that an error is made of, or comes from, were raised: lines for the log."""
    lines: list[str] = []
    for other in _others(error, MOST_CAUSES):
        frames = deque(islice(walk_tb(other.__traceback__), LONGEST_WAY), MOST_FRAMES)
        if frames:
            lines.append(f"\n  {type(other).__name__}, raised in")
        for frame, line in frames:
            lines.append(f'\n    File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_qualname}')
    return "".join(lines)


def _others(error: BaseException, most: int) -> Iterator[BaseException]:
    """The exceptions of others among an error, its parts and its causes; of so many at the most."""
    seen: set[int] = set()
    waiting = deque([error])
    while waiting and len(seen) < most:
        each = waiting.popleft()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if not isinstance(each, CageySessionsError):
            yield each
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
        if each.__cause__ is not None:
            waiting.append(each.__cause__)
