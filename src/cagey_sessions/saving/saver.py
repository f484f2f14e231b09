# ruff: noqa: B027 - an empty method is what a saver does for which there is nothing to do
"""`Saver`, the interface of what performs the saves: `to_store.StoreSaver` or `to_listeners.ListenerSaver`.

`saving` has a saver perform saves. `sessions` asks it what differs between the two: whether data is refused, whether
the data of an ending session is saved, and whether its user has to be released. The methods that only a store needs do
nothing here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

from .._core import SessionCore
from ..errors import UnsavableError
from .workers import Worker

if TYPE_CHECKING:
    from .autosave import Autosave

__all__ = ["Saver"]


class Saver(ABC):
    """Performs the saves of one manager."""

    is_store: bool
    """Whether saves go to a store; if not, listeners make them."""
    one_at_a_time: bool
    """Whether one worker takes all that is due before another one is of use."""
    timeout: int | None
    """How many nanoseconds a caller waits while attempts fail; None if it gets the first failure."""
    unchanged: int = 0
    """How many saves have found that the store has the data already."""

    @property
    def fenced(self) -> int:
        """How many sessions have lost their users to others."""
        return 0

    @property
    def unsavable(self) -> Collection[SessionCore]:
        """Sessions whose data cannot be saved as it is."""
        return ()

    @abstractmethod
    def bind(self, autosave: Autosave) -> None:
        """Perform the saves of `autosave` from now on."""

    def begin(self) -> None:
        """Called at the first awaited call of the manager, when its event loop and its process are known."""

    @abstractmethod
    async def serve(self, worker: Worker) -> bool:
        """Take some sessions and save them. False if there were none.

        Calls `Worker.start` as soon as all are taken. When it returns or raises, every session that it took is settled.
        """

    # What may be done now

    @abstractmethod
    def can_save(self) -> bool:
        """Whether saves can be performed at all."""

    def require(self) -> None:
        """Raise `NothingSavesError` if saves cannot be performed."""

    def may_start(self) -> bool:
        """Whether a worker may begin now. If not, the saver calls `Autosave.kick` when it may."""
        return True

    @abstractmethod
    def serves_periodic(self) -> bool:
        """Whether sessions may be taken now that only the timer wants saved."""

    def outage(self) -> Exception | None:
        """Why no save can be made at the moment; None if saves can be made."""
        return None

    # The last save of a session

    def refusal(self, session: SessionCore) -> UnsavableError | None:
        """Why the data of a session cannot be saved as it is, as far as can be told without a save; None if it can."""
        return None

    @abstractmethod
    def is_saved(self, session: SessionCore) -> bool:
        """Whether the data of an ending session is known to be saved as it is now. O(size of the data)."""

    def forget_unseen(self, session: SessionCore) -> None:
        """Drop the record of a save of data whose later changes cannot be detected."""

    def has_to_release(self, session: SessionCore) -> bool:
        """Whether the user has to be released so that other processes can have them."""
        return False

    async def release(self, session: SessionCore) -> None:
        """Release a user whom no save has released. Raises what the first attempt raised."""

    def release_later(self, session: SessionCore) -> None:
        """Let go of a user whom no save has let go of; the caller does not wait for it."""

    def forget(self, session: SessionCore) -> None:
        """A session has ended: drop what is kept of it."""

    # The end of a manager

    def drain(self, draining: bool) -> None:
        """The manager is being destroyed; with False, that was called off."""

    async def close(self, until: int) -> None:
        """Stop, and close the store. Waits for what is under way at most until `until`, in nanoseconds of the clock."""
