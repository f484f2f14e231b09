"""Who waits for whom. What lives here: frames, which tell that code runs inside a listener that something waits for,
and the graph of those waits. What must not: the waiting itself.

A save waits for its listeners; an end waits for the listeners of its two events and for every save of its session. A
listener that waits in turn for a save or an end may close a circle, over any number of sessions; `would_deadlock`,
asked before the wait, finds that out. Cost: one look at each wait under way, and none outside listeners.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

__all__ = ["Wait", "ends_inside", "listening", "saves_inside", "waiting_for", "within_host", "would_deadlock"]


class Wait(NamedTuple):
    """Something that can be waited for: the next save of a session, or its end."""

    session: object
    is_save: bool


Lend = Callable[[int], None]


class _Frame:
    """The listeners of one emit, under way."""

    __slots__ = ("host", "lend", "wait", "waiting")

    def __init__(self, wait: Wait, host: object, lend: Lend | None) -> None:
        self.wait: Wait | None = wait
        self.host: object = host
        self.lend = lend
        self.waiting = 0

    def begin_waiting(self) -> None:
        self.waiting += 1
        if self.waiting == 1 and self.lend is not None:
            self.lend(1)

    def end_waiting(self) -> None:
        self.waiting -= 1
        if self.waiting == 0 and self.lend is not None:
            self.lend(-1)

    def close(self) -> None:
        """The listeners have returned; tasks they have left behind wait for themselves."""
        if self.waiting and self.lend is not None:
            self.lend(-1)
        self.wait = self.host = self.lend = None


_frames: ContextVar[tuple[_Frame, ...]] = ContextVar("cagey_sessions_frames", default=())
_waits: dict[Wait, Counter[Wait]] = {}


@contextmanager
def listening(wait: Wait, host: object, lend: Lend | None = None) -> Iterator[None]:
    """Within this block listeners run that `wait` waits for.

    Tasks that a listener starts inherit the frame, for it may well wait for them; once the block is left the frame is
    empty, and what is still running counts as outside. While anything inside waits for a save or an end, `lend` is told
    so, once with 1 and then with -1.
    """
    frame = _Frame(wait, host, lend)
    outer = tuple(other for other in _frames.get() if other.wait is not None)
    token = _frames.set((*outer, frame))
    try:
        yield
    finally:
        frame.close()
        with suppress(ValueError):  # a task that is thrown away is closed in another context
            _frames.reset(token)


def _inside() -> list[Wait]:
    """The waits for the listeners this code runs inside."""
    return [frame.wait for frame in _frames.get() if frame.wait is not None]


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
            if not wait.is_save:
                ahead.append(Wait(wait.session, is_save=True))
    return False


@contextmanager
def waiting_for(target: Wait) -> Iterator[None]:
    """Within this block the listeners this code runs inside wait for `target`."""
    frames = [frame for frame in _frames.get() if frame.wait is not None]
    inside = _inside()
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


def ends_inside() -> list[object]:
    """The sessions whose ends wait for the listeners this code runs inside."""
    return [wait.session for wait in _inside() if not wait.is_save]


def saves_inside(host: object) -> int:
    """Inside how many listeners this code runs that saves within `host` wait for."""
    return sum(frame.host is host and frame.wait is not None and frame.wait.is_save for frame in _frames.get())
