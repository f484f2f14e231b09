"""Tests of game logic in virtual time, and of stores on a bad network. What lives here: the public test kit. What must
not: anything that a running server needs, because `cagey_sessions` never imports this package.
"""

from .crash import CrashTestError, crash_test
from .proxy import FaultProxy
from .universe import StuckError
from .world import World, WorldError, world

__all__ = ["CrashTestError", "FaultProxy", "StuckError", "World", "WorldError", "crash_test", "world"]
