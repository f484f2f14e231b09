"""Timers on `heapq`, as one would write them by hand. What lives here: lazy cancelling and lazy putting off. What must
not: measuring.

The heap holds (deadline, id) and is never searched: what counts is a dict of the deadlines that are still wanted. An
entry whose timer was cancelled, or put off, stays where it is, and is seen to when it comes to the top.
"""

from __future__ import annotations

import heapq

__all__ = ["HeapTimers"]


class HeapTimers:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []
        self._deadlines: dict[int, int] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._deadlines)

    def schedule(self, deadline: int) -> int:
        self._last = timer = self._last + 1
        self._deadlines[timer] = deadline
        heapq.heappush(self._heap, (deadline, timer))
        return timer

    def refresh(self, timer: int, deadline: int) -> None:
        """Put a timer off."""
        self._deadlines[timer] = deadline

    def cancel(self, timer: int) -> None:
        del self._deadlines[timer]

    def advance(self, now: int, limit: int) -> list[int]:
        heap, deadlines, due = self._heap, self._deadlines, []
        while heap and heap[0][0] <= now and len(due) < limit:
            _, timer = heap[0]
            deadline = deadlines.get(timer)
            if deadline is not None and deadline > now:
                heapq.heapreplace(heap, (deadline, timer))
                continue
            heapq.heappop(heap)
            if deadline is not None:
                del deadlines[timer]
                due.append(timer)
        return due
