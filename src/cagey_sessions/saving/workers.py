"""Workers: the tasks that save. Counts them, so that there are never more than `max_in_flight`.

What a worker does, and when another one is wanted, is decided in `autosave`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

from ..loop import Loop

__all__ = ["Worker", "WorkerPool"]


class Worker:
    """A task that saves. It is counted as starting until `start`, and has its slot until `WorkerPool.finish`."""

    __slots__ = ("_pool", "finished", "started")

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.started: bool = False
        self.finished: bool = False

    def start(self) -> None:
        """It has taken what it could: what is due from now on is for another worker."""
        if not self.started:
            self.started = True
            self._pool.starting -= 1


class WorkerPool:
    """At most `most` workers, each a task of its own."""

    def __init__(self, most: int, work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
        self._work = work
        self.free: int = most
        """How many more workers there may be; below zero, how many of them have to end."""
        self.starting: int = 0
        """How many have not taken anything yet."""

    def hire(self, loop: Loop, context: Context) -> None:
        """Start another worker."""
        self.free -= 1
        self.starting += 1
        worker = Worker(self)
        task = loop.spawn(self._work(worker), "autosave", context.copy())
        task.add_done_callback(lambda _: self._dismiss(worker))
        # the callback frees the slot also of a task that was cancelled before its first step

    def finish(self, worker: Worker) -> None:
        """The worker does nothing more: free its slot. Only the first call has an effect."""
        worker.start()  # a worker that was cancelled early still counts as starting
        self.free += not worker.finished
        worker.finished = True

    def _dismiss(self, worker: Worker) -> None:
        """The task is done, perhaps because it was cancelled from outside."""
        self.finish(worker)
