"""The pytest plugin: the fixture `cagey_world`, and the running of `store_conformance`'s coroutines.

pytest loads this file in every test run of every project that has this library installed. So it must import nothing of
the library outside of functions.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .world import MakeManager, World

__all__ = ["cagey_world"]

pytest.register_assert_rewrite("cagey_sessions.testing.conformance")


@pytest.fixture
def cagey_world() -> Iterator[Callable[[MakeManager], World]]:
    """``cagey_world(make_manager)`` makes a `cagey_sessions.testing.World`, which is closed at the end of the test."""
    from .world import world  # noqa: PLC0415

    with ExitStack() as stack:

        def make_world(make_manager: MakeManager, *, seed: int = 0) -> World:
            return stack.enter_context(world(make_manager, seed=seed))

        yield make_world


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the coroutines of `store_conformance`, each on an event loop of its own, if no other plugin does."""
    if not getattr(pyfuncitem.cls, "runs_coroutines", False) or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True
