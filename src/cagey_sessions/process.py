"""The identity of this process: its owner id, its digest key, its random numbers, and callbacks at its exit.

A fork copies memory. If a manager had an owner id from the moment it is created, and it was created at import, all
forked workers of a server would claim users under the same id, and the store would take them for one process. So the
identity is made when a manager begins to work on an event loop, which it does in one process only.
"""

from __future__ import annotations

import atexit
import os
import random
import socket
import sys
from collections.abc import Callable
from functools import partial

from ._core import Digest

__all__ = ["Identity", "at_exit", "is_forked_worker"]


class Identity:
    """Who a manager is, for its store and its files. All fields are empty until `begin`."""

    def __init__(self) -> None:
        self.owner: str = ""
        """The id under which users are claimed; a new one for each manager, also within one process."""
        self.pid: int = 0
        self.digest_key: bytes = b""
        self.digest: Digest
        self.random: random.Random
        """Spreads retries, so that many processes do not all try again at the same instant."""

    def begin(self) -> None:
        """Make this process the manager's own. Called once, when the event loop is known."""
        self.pid = os.getpid()
        # Host and process id are not enough: an earlier process may have had the same (in a container it always has),
        # and the users that it claimed are not ours.
        self.owner = f"{socket.gethostname()}-{self.pid}-{os.urandom(8).hex()}"
        self.digest_key = os.urandom(16)
        self.digest = Digest(self.digest_key)
        self.random = random.Random(random.getrandbits(64))  # Python seeds its own anew in a forked child

    def is_this_process(self) -> bool:
        """False in a child that was forked since, and before `begin`."""
        return self.pid == os.getpid()


def at_exit(callback: Callable[[], object]) -> Callable[[], object]:
    """Register a callback for the normal exit of this process. Returns a function that unregisters it."""
    if not is_forked_worker():
        atexit.register(callback)
        return partial(atexit.unregister, callback)
    # a worker of multiprocessing ends with os._exit, which skips the callbacks of atexit
    finalizer = sys.modules["multiprocessing.util"].Finalize(None, callback, exitpriority=0)
    cancel: Callable[[], object] = finalizer.cancel
    return cancel


def is_forked_worker() -> bool:
    """Whether `multiprocessing` started this process, so that it may end without the callbacks of `atexit`."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None and "multiprocessing.util" in sys.modules
