"""Errors that no caller waits for. What lives here: where they are told, in the log and to listeners, and how much of
them. What must not: what becomes of a session that an error is about.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from ._core import SessionCore
from .errors import CageySessionsError, ListenerError, UnsavableError
from .events import Listeners, listener_error

__all__ = ["Reports", "drop_tracebacks", "fresh"]

LONGEST_QUEUE = 1000


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
        """Log, and let no logger that fails stop a save."""
        with suppress(Exception):
            getattr(self._log, level)(message, *args)

    def error(self, error: Exception, session: SessionCore | None) -> None:
        """Log an error that no caller waits for and hand it to the listeners of ``error``."""
        if session is None:
            self.say("error", "%s", error)
        else:
            self.say("error", "user %r: %s", session.user_id, _summary(error))
        self._announce("error", error, session)

    def unsavable(self, error: UnsavableError, session: SessionCore) -> None:
        """Log that data cannot be saved as it is and tell the listeners of ``unsavable``."""
        self.say("error", "%s", error)
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
                self.say("error", "%s: %s", listener_error(name, [error]).message, _summary(error))


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
    if isinstance(error, BaseExceptionGroup):
        return f"{error.message} ({', '.join(type(part).__name__ for part in error.exceptions[:10])})"
    return f"{type(error).__name__}: {error}" if isinstance(error, CageySessionsError) else type(error).__name__
