"""Runs blocking work in a thread and waits for it, even if the waiting task is cancelled.

The task waits until the thread has returned, however often the task is cancelled meanwhile, and raises the cancellation
only then. So the code after the wait may clean up, and no thread is still at work in the same place. How long the wait
may take:

- **not cancelled**: as long as the work takes, or the `limit` that the caller gives;
- **cancelled**, by a caller or by the end of `asyncio.run`: up to `PATIENCE` from the first cancellation on. A thread
  that has not returned by then hangs in the system, mostly because a disk does not answer, and nothing in this process
  can end it;
- **the loop is closed** without a cancellation: no wait is possible, and the task is thrown away (`GeneratorExit`);
- **the interpreter exits**: the threads are daemons, so it waits for none of them and stops them where they are.

In the last three cases the thread may go on alone. So the work must own what it opens, and close and remove it itself;
its result or error is discarded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, TypeVar

__all__ = ["PATIENCE", "in_thread", "outlast"]

T = TypeVar("T")

PATIENCE = 10.0
"""How many seconds a cancelled caller still waits for its thread."""


async def in_thread(work: Callable[..., T], *args: object, limit: float | None = None) -> T:
    """Run `work(*args)`, which may block, in a new thread, and wait for it as `outlast` does.

    `limit` is in seconds. The loop's own executor is not used: calls of a database that never return may occupy all of
    its threads, and it takes no work after it was shut down, when spill files are still to be written.
    """
    loop = asyncio.get_running_loop()
    return await outlast(loop.run_in_executor(_OwnThread(), work, *args), limit)


async def outlast(work: asyncio.Future[T], limit: float | None = None, patience: float | None = None) -> T:
    """Wait until `work` is done, through any number of cancellations; return its result, or raise what it raises.

    If the waiting task is cancelled meanwhile, `asyncio.CancelledError` is raised when the work is done, whatever its
    outcome, or `patience` seconds (`PATIENCE` by default) after the first cancellation. Raises `TimeoutError` if the
    work is not done within `limit` seconds. Work that is given up on is not stopped.
    """
    work.add_done_callback(_mark_retrieved)
    loop = asyncio.get_running_loop()
    until = None if limit is None else loop.time() + limit
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        left = None if until is None else until - loop.time()
        if left is not None and left <= 0:
            break
        try:
            await asyncio.wait([work], timeout=left)
        except asyncio.CancelledError as error:
            if cancelled is None:
                cancelled = error
                end_of_patience = loop.time() + (PATIENCE if patience is None else patience)
                until = end_of_patience if until is None else min(until, end_of_patience)
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            cancelled = None  # its traceback refers to this frame, which would refer to it: a cycle
    if not work.done():
        raise TimeoutError(f"not done within {limit:g} s")
    return work.result()


def _mark_retrieved(work: asyncio.Future[Any]) -> None:
    """Mark the error as retrieved: if the waiting task is gone, asyncio would print it as never retrieved."""
    if not work.cancelled():
        work.exception()


class _Outcome(Future[T]):
    """The outcome of a thread, which may come after the loop was closed."""

    def add_done_callback(self, fn: Callable[[Future[T]], Any]) -> None:
        def tell(outcome: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile, and no task waits any more
                fn(outcome)

        super().add_done_callback(tell)


class _OwnThread(Executor):
    """A thread for one piece of work; a daemon, so that a thread that hangs cannot hold up the exit."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        outcome: Future[T] = _Outcome()

        def run() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)

        try:
            threading.Thread(target=run, name="cagey-sessions thread", daemon=True).start()
        except RuntimeError:  # too many threads, or the interpreter exits: blocking the loop beats not writing at all
            run()
        return outcome
