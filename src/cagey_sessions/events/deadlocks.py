"""Deadlock detection: a listener may await a save or an end that is itself waiting for that listener.

A save waits for its listeners. An end waits for the listeners of its two events, and for every save of its session. The
turn with a user passes on only when the call that has it is done. Code that runs inside one of these and waits for a
save, an end or a turn may therefore close a circle, over any number of sessions and users. This module records who
waits for whom, and `would_deadlock`, which is called before each such wait, says whether the wait would close a circle;
the caller then refuses it. The waiting itself is done elsewhere.

Cost: outside such code nothing; inside, one step for each wait that is under way.

See also `listeners`, which calls the listeners, and `ownership.turns`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import Enum, auto
from typing import Any, NamedTuple

from ..user_code import current_task

__all__ = ["Frame", "Kind", "Wait", "listening", "saves_inside", "waiting_for", "within_host", "would_deadlock"]


class Kind(Enum):
    """What can be waited for."""

    SAVE = auto()
    """The next save of a session."""
    END = auto()
    """The end of a session, which waits for its saves, too."""
    TURN = auto()
    """The turn with a user, which one call of this process has at a time."""


class Wait(NamedTuple):
    """Something that can be waited for: a save or the end of a session, or the turn with a user."""

    subject: object
    kind: Kind


OnWaiting = Callable[[int], None]


class Frame:
    """Code that something waits for while it runs: the listeners of one emit, or a block that has a turn."""

    __slots__ = ("host", "on_waiting", "task", "wait", "waiting")

    def __init__(self, wait: Wait, host: object, on_waiting: OnWaiting | None) -> None:
        self.wait: Wait | None = wait
        self.host: object = host
        """The table of a manager, which stands for it; None for a turn."""
        self.on_waiting = on_waiting
        self.task: asyncio.Task[Any] | None = None
        """The only task whose code is inside; None if tasks that are started inside count as inside, too."""
        self.waiting: int = 0

    def confine(self) -> None:
        """Count only the current task as inside from now on.

        The frame is around a block of the program's own, which waits for none of the tasks that it starts.
        """
        self.task = current_task()

    def is_around(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether code that runs in `task` is inside."""
        return self.wait is not None and (self.task is None or self.task is task)

    def begin_waiting(self) -> None:
        self.waiting += 1
        if self.waiting == 1 and self.on_waiting is not None:
            self.on_waiting(1)

    def end_waiting(self) -> None:
        self.waiting -= 1
        if self.waiting == 0 and self.on_waiting is not None:
            self.on_waiting(-1)

    def close(self) -> None:
        """The listeners have returned. Tasks that they have started are waited for by nothing any more."""
        if self.waiting and self.on_waiting is not None:
            self.on_waiting(-1)  # a task that was left behind still waits, but no longer for the sake of a listener
        self.wait = self.host = self.on_waiting = None


_frames: ContextVar[tuple[Frame, ...]] = ContextVar("cagey_sessions_frames", default=())
_waits: dict[Wait, Counter[Wait]] = {}


@contextmanager
def listening(wait: Wait, host: object, on_waiting: OnWaiting | None = None) -> Iterator[Frame]:
    """Everything that runs in this block is something that `wait` waits for.

    Tasks that such code starts inherit the frame, because the code may wait for them. When the block is left the frame
    is emptied, so whatever still runs counts as outside. `on_waiting` is called with 1 when code inside begins to wait
    for something, and with -1 when no code inside waits any more.
    """
    frame = Frame(wait, host, on_waiting)
    # a task that was left behind still has frames that were closed since
    outer = tuple(other for other in _frames.get() if other.wait is not None)
    token = _frames.set((*outer, frame))
    try:
        yield frame
    finally:
        frame.close()
        with suppress(ValueError):  # a task that is collected as garbage is closed in another context
            _frames.reset(token)


def _inside() -> list[Wait]:
    """All that waits for the code that runs here."""
    return [frame.wait for frame in _around() if frame.wait is not None]


def _around() -> list[Frame]:
    frames = _frames.get()
    if not frames:
        return []
    task = current_task()
    return [frame for frame in frames if frame.is_around(task)]


def would_deadlock(target: Wait) -> bool:
    """Whether code that runs here and waits for `target` would, over any number of steps, wait for itself.

    O(waits under way).
    """
    inside = set(_inside())
    if not inside:
        return False
    seen: set[Wait] = set()
    ahead = [target]
    while ahead:
        wait = ahead.pop()
        if wait in inside:
            return True
        if wait not in seen:
            seen.add(wait)
            ahead += _waits.get(wait, ())
            if wait.kind is Kind.END:
                # an end waits for every save of its session, also for one that begins only later
                ahead.append(Wait(wait.subject, Kind.SAVE))
    return False


@contextmanager
def waiting_for(target: Wait) -> Iterator[None]:
    """In this block, everything that waits for the code that runs here also waits for `target`."""
    frames = _around()
    inside = [frame.wait for frame in frames if frame.wait is not None]
    for wait in inside:
        _waits.setdefault(wait, Counter())[target] += 1  # several tasks inside may wait for the same
    for frame in frames:
        frame.begin_waiting()
    try:
        yield
    finally:
        for frame in frames:
            frame.end_waiting()
        for wait in inside:
            targets = _waits[wait]
            targets[target] -= 1
            if not targets[target]:
                del targets[target]
                if not targets:
                    del _waits[wait]


def within_host(host: object) -> bool:
    """Whether this code runs inside a listener that a save or an end of a session of `host` waits for."""
    return any(frame.host is host for frame in _frames.get())


def saves_inside(host: object) -> int:
    """The number of listeners around this code that saves of sessions of `host` wait for."""
    return sum(
        frame.host is host and frame.wait is not None and frame.wait.kind is Kind.SAVE for frame in _frames.get()
    )
