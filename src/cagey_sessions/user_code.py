"""What code of the program's may raise. What lives here: which of its exceptions are meant for the process or the event
loop, and go on, and which stay with the user whose hook or listener raised them. What must not: a call of such code.

A hook may raise anything: `task.result()` of a cancelled task raises `CancelledError`, a coroutine closed by hand
`GeneratorExit`, a test framework exceptions of its own that are no `Exception`. Let through, one such exception would
end a task of the library that is at work for many users. Only two are always let through: `KeyboardInterrupt` and
`SystemExit` end the process, and a program may raise them on purpose.

A plain function is called in one step, so a `CancelledError` out of it is never the cancellation of the task that calls
it. Out of an `await` it may be: then the task counts it (`Task.cancelling`). A `GeneratorExit` out of an `await` is the
loop's own if the coroutine is thrown away, which happens outside its task.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .errors import ListenerCancelledError

__all__ = ["END_OF_PROCESS", "as_exception", "current_task", "is_for_this_task"]

END_OF_PROCESS = (KeyboardInterrupt, SystemExit)
"""Raised by whatever code they come out of."""


def current_task() -> asyncio.Task[Any] | None:
    """The task that runs this code; None outside all tasks, also where no event loop runs."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def is_for_this_task(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether what came out of an await in `task` is meant for the task and not raised by the code it awaits."""
    if isinstance(error, asyncio.CancelledError):
        return task is None or task.cancelling() > 0
    if isinstance(error, GeneratorExit):
        return task is None or current_task() is not task
    return isinstance(error, END_OF_PROCESS)


def as_exception(error: BaseException) -> Exception:
    """What a listener has raised, as what may stand in an `ExceptionGroup`."""
    if isinstance(error, Exception):
        return error
    what = (
        "was cancelled from outside" if isinstance(error, asyncio.CancelledError) else f"raised {type(error).__name__}"
    )
    wrapped = ListenerCancelledError(f"a listener {what}")
    wrapped.__cause__ = error
    return wrapped
