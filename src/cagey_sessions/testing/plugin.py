"""Fixtures for pytest, which finds them by itself. What lives here: `cagey_world`. What must not: anything but pytest's
view of `world` and imports of the library outside functions: every test run of everybody loads this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .world import MakeManager, World

__all__ = ["cagey_world"]


@pytest.fixture
def cagey_world() -> Iterator[Callable[[MakeManager], World]]:
    """``cagey_world(make_manager)`` makes a `cagey_sessions.testing.World`, which ends with the test."""
    from .world import world  # noqa: PLC0415

    with ExitStack() as stack:

        def make_world(make_manager: MakeManager, *, seed: int = 0) -> World:
            return stack.enter_context(world(make_manager, seed=seed))

        yield make_world
