"""Who waits for whom. What lives here: frames, which tell that code runs inside something that others wait for, and the
graph of those waits. What must not: the waiting itself.

A save waits for its listeners; an end waits for the listeners of its two events and for every save of its session; the
turn with a user passes to the next call when the code that has it is done. Code inside one of them that waits for
a save, an end or a turn may close a circle, over any number of sessions and users; `would_deadlock`, asked before the
wait, finds that out. Cost: one look at each wait under way, and none outside such code.
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
    """The turn with a user."""


class Wait(NamedTuple):
    """A save or an end of a session, or the turn with a user: something that can be waited for."""

    subject: object
    kind: Kind


OnWaiting = Callable[[int], None]


class Frame:
    """The listeners of one emit, or a block that has a turn: under way."""

    __slots__ = ("host", "on_waiting", "task", "wait", "waiting")

    def __init__(self, wait: Wait, host: object, on_waiting: OnWaiting | None) -> None:
        self.wait: Wait | None = wait
        self.host: object = host
        self.on_waiting = on_waiting
        self.task: asyncio.Task[Any] | None = None
        """The only task that is inside, if so."""
        self.waiting: int = 0

    def confine(self) -> None:
        """From now on the tasks that are started inside are outside: this is a block of the program's, in its task."""
        self.task = current_task()

    def is_around(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether code that runs in that task is inside."""
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
        """The listeners have returned; tasks they have left behind wait for themselves."""
        if self.waiting and self.on_waiting is not None:
            self.on_waiting(-1)
        self.wait = self.host = self.on_waiting = None


_frames: ContextVar[tuple[Frame, ...]] = ContextVar("cagey_sessions_frames", default=())
_waits: dict[Wait, Counter[Wait]] = {}


@contextmanager
def listening(wait: Wait, host: object, on_waiting: OnWaiting | None = None) -> Iterator[Frame]:
    """Within this block code runs that `wait` waits for.

    Tasks that such code starts inherit the frame, for it may well wait for them; once the block is left the frame is
    empty, and what is still running counts as outside. While anything inside waits for something here, `on_waiting` is
    told so, once with 1 and then with -1.
    """
    frame = Frame(wait, host, on_waiting)
    outer = tuple(other for other in _frames.get() if other.wait is not None)
    token = _frames.set((*outer, frame))
    try:
        yield frame
    finally:
        frame.close()
        with suppress(ValueError):  # a task that is thrown away is closed in another context
            _frames.reset(token)


def _inside() -> list[Wait]:
    """What waits for the code that runs here."""
    return [frame.wait for frame in _around() if frame.wait is not None]


def _around() -> list[Frame]:
    frames = _frames.get()
    if not frames:
        return []
    task = current_task()
    return [frame for frame in frames if frame.is_around(task)]


def would_deadlock(target: Wait) -> bool:
    """Whether waiting for `target` here would, over however many steps, be waiting for oneself. O(waits under way)."""
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
                ahead.append(Wait(wait.subject, Kind.SAVE))
    return False


@contextmanager
def waiting_for(target: Wait) -> Iterator[None]:
    """Within this block all that this code runs inside of waits for `target`."""
    frames = _around()
    inside = [frame.wait for frame in frames if frame.wait is not None]
    for wait in inside:
        _waits.setdefault(wait, Counter())[target] += 1
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
    """Whether this code runs inside a listener that a save or an end within `host` waits for."""
    return any(frame.host is host for frame in _frames.get())


def saves_inside(host: object) -> int:
    """Inside how many listeners this code runs that saves within `host` wait for."""
    return sum(
        frame.host is host and frame.wait is not None and frame.wait.kind is Kind.SAVE for frame in _frames.get()
    )
