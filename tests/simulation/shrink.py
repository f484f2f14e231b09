"""The smallest part of a plan that still fails. What lives here: delta debugging (Zeller, Hildebrandt, IEEE TSE 2002).
What must not: how a plan is played.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["shrink"]


def shrink(count: int, fails: Callable[[list[int]], bool], attempts: int = 400) -> list[int]:
    """The numbers of the steps, out of ``range(count)``, that are needed for a failure."""
    kept = list(range(count))
    size = max(1, count // 2)
    while attempts > 0:
        start = 0
        while start < len(kept) and attempts > 0:
            attempts -= 1
            fewer = kept[:start] + kept[start + size :]
            if fails(fewer):
                kept = fewer
            else:
                start += size
        if size == 1:
            break
        size //= 2
    return kept
