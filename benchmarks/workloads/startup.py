"""What a program waits for before it begins. What lives here: the cost of importing the package. What must not: what a
manager does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from .base import Goal, Pair, Sizes, Workload, plain


def cost_of(script: str, bytecode: str) -> float:
    """Milliseconds of CPU time that a fresh interpreter takes for that, its own start and end included."""
    # what was compiled at the first time is kept, for both sides, whatever this machine is set to
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    child = os.posix_spawn(
        sys.executable, [sys.executable, "-c", script], environment | {"PYTHONPYCACHEPREFIX": bytecode}
    )
    used = os.wait4(child, 0)[2]
    return (used.ru_utime + used.ru_stime) * 1000


@contextmanager
def importing(sizes: Sizes) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory() as bytecode:
        yield Pair(
            lambda: cost_of("import cagey_sessions", bytecode), lambda: cost_of("import asyncio, orjson", bytecode)
        )


WORKLOADS = (
    Workload(
        "import",
        importing,
        Goal(ratio=1.5),
        plain("a fresh interpreter that imports the package vs one that imports asyncio and orjson"),
        unit="ms",
        is_there=lambda: hasattr(os, "wait4"),  # not on Windows
    ),
)
