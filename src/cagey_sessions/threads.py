"""Work that a thread does for the event loop. What lives here: handing it over, and waiting for it. What must not: what
the work is, or who wants it.

A task that hands work to a thread waits until the thread has returned, however often the task is cancelled meanwhile,
and only then raises the cancellation. So what comes after may clean up without a thread at work in the same place. How
long the wait may take:

- **nobody cancels**: as long as the work takes, or the `limit` that the caller gives;
- **cancelled**, by a caller or by the end of `asyncio.run`: up to `PATIENCE` from the first cancellation on. A thread
  that has not returned by then hangs in the system, mostly because a disk does not answer, and nothing in this process
  can end it;
- **the loop is closed** without a cancellation: no wait is possible, and the task is thrown away (`GeneratorExit`);
- **the interpreter exits**: threads are daemons, so it waits for none, and cuts off what is still at work.

In the last three cases the thread goes on alone for a while. So the work must own what it opens, and close and remove
it itself; what others tell it to give up, it gives up when it returns. Nobody hears of its outcome.
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
"""For how many seconds a cancelled caller still waits for its thread."""


async def in_thread(work: Callable[..., T], *args: object, limit: float | None = None) -> T:
    """Have a thread of its own do work that may block, and wait for it as `outlast` does.

    The threads of the loop's own executor may all be taken by calls of a database that never return, and are not to be
    had any more once it has been shut down.
    """
    loop = asyncio.get_running_loop()
    return await outlast(loop.run_in_executor(_OwnThread(), work, *args), limit)


async def outlast(work: asyncio.Future[T], limit: float | None = None, patience: float | None = None) -> T:
    """Wait until `work` is done, through any number of cancellations; return its result, or raise what it raises.

    Cancelled meanwhile, it raises `asyncio.CancelledError`: when the work is done, whatever came of it, or `patience`
    seconds (`PATIENCE` by default) after the first cancellation. It raises `TimeoutError` if the work is not done
    within `limit` seconds. Work that is not waited for any longer goes on.
    """
    work.add_done_callback(_look_at)
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
            cancelled = None  # its traceback has this frame, which would have it: a circle
    if not work.done():
        raise TimeoutError(f"not done within {limit:g} s")
    return work.result()


def _look_at(work: asyncio.Future[Any]) -> None:
    """Whoever waited may be gone; an error that nobody looks at is noise on stderr."""
    if not work.cancelled():
        work.exception()


class _Outcome(Future[T]):
    """What comes of a thread."""

    def add_done_callback(self, fn: Callable[[Future[T]], Any]) -> None:
        def tell(outcome: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop has been closed meanwhile: nobody is left to be told
                fn(outcome)

        super().add_done_callback(tell)


class _OwnThread(Executor):
    """A thread for one piece of work. As a daemon it holds up no exit of the interpreter, which cuts it off."""

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
        except RuntimeError:  # there are too many, or the interpreter exits: better late on the loop than never
            run()
        return outcome
