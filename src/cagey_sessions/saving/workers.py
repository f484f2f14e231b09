"""The tasks that save. What lives here: how many of them there may be, and what each leaves behind when it ends. What
must not: what they do, or when another is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

from ..loop import Loop

__all__ = ["Worker", "WorkerPool"]


class Worker:
    """A task that saves, and what is still to be accounted for when it ends."""

    __slots__ = ("_pool", "finished", "started")

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.started: bool = False
        self.finished: bool = False

    def start(self) -> None:
        """It has taken what it could; what is left is for another."""
        if not self.started:
            self.started = True
            self._pool.starting -= 1


class WorkerPool:
    """At most so many workers, each a task of its own."""

    def __init__(self, most: int, work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
        self._work = work
        self.free: int = most
        """How many more there may be; below zero, how many there are too many."""
        self.starting: int = 0
        """How many have not looked for work yet."""

    def hire(self, loop: Loop, context: Context) -> None:
        """Put another to work."""
        self.free -= 1
        self.starting += 1
        worker = Worker(self)
        task = loop.spawn(self._work(worker), "autosave", context.copy())
        task.add_done_callback(lambda _: self._dismiss(worker))

    def finish(self, worker: Worker) -> None:
        """It does no more; its place is free."""
        worker.start()
        self.free += not worker.finished
        worker.finished = True

    def _dismiss(self, worker: Worker) -> None:
        """The task is done, perhaps because somebody cancelled it, perhaps before its first step."""
        self.finish(worker)
