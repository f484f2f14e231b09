"""User sessions for stateful asyncio servers.

A *manager* keeps every human on this server; a *session* is one of them; their *data* is a plain object in memory that
the program changes as it likes; a *save* brings it to where it survives.

>>> import asyncio
>>> from cagey_sessions import SessionManager
>>> async def main():
...     manager = SessionManager(interval="30s", persist_on=["shutdown"])
...     @manager.on("persist_user_data")
...     async def save(session):
...         print("saving", session.user_id, session.user_data)
...     async with manager:
...         session = await manager.create("cookie")
...         await session.set_user("alice", {"gold": 0})
...         session.user_data["gold"] += 10
>>> asyncio.run(main())
saving alice {'gold': 10}
"""

try:
    from . import _core as _core
except ImportError as _error:  # a checkout that was never built, or a wheel for another Python
    raise ImportError(
        f"the compiled core of cagey-sessions cannot be loaded ({_error}); install the package with pip "
        "(in a checkout: pip install -e .), with the same Python that runs this program"
    ) from _error

from . import errors
from ._core import SessionCall
from ._version import __version__
from .clock import Clock, TimerHandle
from .data import Codec, UserDataWarning, dataclass_codec, msgspec_codec
from .errors import *  # noqa: F403 - its __all__ is ours, see below
from .options import Duration
from .records import (
    DamagedEntry,
    DrainReport,
    EndReason,
    Health,
    Receipt,
    Snapshot,
    SnapshotEntry,
    SnapshotReport,
    SpillReport,
    Statistics,
    UnsavedUser,
)
from .sessions import Session, SessionManager, create, read_snapshot

__all__ = [
    "Clock",
    "Codec",
    "DamagedEntry",
    "DrainReport",
    "Duration",
    "EndReason",
    "Health",
    "Receipt",
    "Session",
    "SessionCall",
    "SessionManager",
    "Snapshot",
    "SnapshotEntry",
    "SnapshotReport",
    "SpillReport",
    "Statistics",
    "TimerHandle",
    "UnsavedUser",
    "UserDataWarning",
    "__version__",
    "create",
    "dataclass_codec",
    "msgspec_codec",
    "read_snapshot",
]
__all__ += errors.__all__


def __dir__() -> list[str]:
    """The public names, and not the modules that they come from."""
    return [*__all__, *({"stores", "testing"} & globals().keys())]
