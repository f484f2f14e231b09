"""Which exceptions of the program's hooks and listeners are let through, and which stay with the user concerned.

A hook may raise anything: `task.result()` of a cancelled task raises `CancelledError`, a coroutine closed by hand
raises `GeneratorExit`, and a test framework raises exceptions that are not an `Exception`. If one of these were let
through, it would end a task of the library that works for many users. So only `KeyboardInterrupt` and `SystemExit` are
always let through: they end the process, and a program may raise them on purpose.

- A plain function is called in one step, so a `CancelledError` that it raises is never a cancellation of the task that
  called it.
- A `CancelledError` raised by an `await` may be that: then the task counts it (`Task.cancelling`).
- A `GeneratorExit` raised by an `await` comes from the loop if the coroutine was thrown away, which happens outside of
  its task.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .errors import ListenerCancelledError

__all__ = ["END_OF_PROCESS", "as_exception", "current_task", "is_for_this_task"]

END_OF_PROCESS = (KeyboardInterrupt, SystemExit)
"""Always let through, whatever code raised them."""


def current_task() -> asyncio.Task[Any] | None:
    """The task that runs this code; None outside of a task, and also where no event loop runs."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def is_for_this_task(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether an exception raised by an await in `task` is meant for that task, not raised by the awaited code."""
    if isinstance(error, asyncio.CancelledError):
        return task is None or task.cancelling() > 0
    if isinstance(error, GeneratorExit):
        return task is None or current_task() is not task
    return isinstance(error, END_OF_PROCESS)


def as_exception(error: BaseException) -> Exception:
    """What a listener raised, wrapped if it is not an `Exception`: only those may be put in an `ExceptionGroup`."""
    if isinstance(error, Exception):
        return error
    what = (
        "was cancelled from outside" if isinstance(error, asyncio.CancelledError) else f"raised {type(error).__name__}"
    )
    wrapped = ListenerCancelledError(f"a listener {what}")
    wrapped.__cause__ = error
    return wrapped
