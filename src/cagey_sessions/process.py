"""This process, and no other. What lives here: the owner of its users, the key of its digests, the generator that
spreads its retries, and what is called at its exit. What must not: users, saves or files.

A fork copies memory. Had a manager that was made at import an owner id, then all workers of a server that forks would
claim users under the same one, and a store would take what they write for the work of one process. So all of this is
made when a manager begins to work on an event loop, which it does in one process only.
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
    """Who a manager is, for its stores and for its files. Nothing of it is known before `begin`."""

    def __init__(self) -> None:
        self.owner: str = ""
        """The name under which users are claimed; another one at each start, also of the same process."""
        self.pid: int = 0
        self.digest_key: bytes = b""
        self.digest: Digest
        self.random: random.Random
        """Spreads retries, so that the processes of one server do not try again at the same instant."""

    def begin(self) -> None:
        """This process is the one. Called once, when the event loop is known."""
        self.pid = os.getpid()
        # not the host and the process id alone: the process before this one may have had both, and what it has claimed
        # is not ours
        self.owner = f"{socket.gethostname()}-{self.pid}-{os.urandom(8).hex()}"
        self.digest_key = os.urandom(16)
        self.digest = Digest(self.digest_key)
        self.random = random.Random(random.getrandbits(64))  # Python seeds its own anew in a forked child

    def is_this_process(self) -> bool:
        """False in a child that was forked since, and before `begin`."""
        return self.pid == os.getpid()


def at_exit(callback: Callable[[], object]) -> Callable[[], object]:
    """Have something called when this process exits in good order. Returns a function that takes that back."""
    if not is_forked_worker():
        atexit.register(callback)
        return partial(atexit.unregister, callback)
    finalizer = sys.modules["multiprocessing.util"].Finalize(None, callback, exitpriority=0)
    cancel: Callable[[], object] = finalizer.cancel
    return cancel


def is_forked_worker() -> bool:
    """Whether `multiprocessing` has started this process, which may then end without the callbacks of `atexit`."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None and "multiprocessing.util" in sys.modules
