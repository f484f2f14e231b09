# ruff: noqa: B027 - an empty method is what a saver does for which there is nothing to do
"""What a saver is: `to_store` and `to_listeners` are the two that there are.

Saving asks a saver to perform saves. Sessions ask it what differs with a store and without: what is refused, whether
the data of an ending session is saved, and whether its user has to be released. What only a store has does nothing
here.
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
    """Whether a worker takes all there is before another is needed."""
    timeout: int | None
    """For how many nanoseconds a caller waits while attempts fail; None if the first failure is the answer."""
    unchanged: int = 0
    """How many saves found the data as it was stored already."""
    fenced: int = 0
    """How many sessions have lost their users to others."""
    unsavable: Collection[SessionCore] = ()
    """Sessions whose data cannot be saved as it is."""

    @abstractmethod
    def bind(self, autosave: Autosave) -> None:
        """Save for this one from now on."""

    def begin(self) -> None:
        """The event loop and the process are known."""

    @abstractmethod
    async def serve(self, worker: Worker) -> bool:
        """Take a load of work and save it: False if there was none.

        Between `Worker.start`, called as soon as all is taken, and the end every session taken is settled.
        """

    # What may be done now

    @abstractmethod
    def can_save(self) -> bool:
        """Whether anybody would perform a save."""

    def require(self) -> None:
        """Raise `NothingSavesError` unless anybody would perform a save."""

    def may_start(self) -> bool:
        """Whether a worker may begin now; if not, `Autosave.employ` is called when it may."""
        return True

    @abstractmethod
    def serves_periodic(self) -> bool:
        """Whether those may be taken now whose time has come."""

    def outage(self) -> Exception | None:
        """Why no save can be made at the moment, if so."""
        return None

    # The last save of a session

    def refusal(self, session: SessionCore) -> UnsavableError | None:
        """Why the data of a session cannot be saved as it is, as far as can be told without saving it."""
        return None

    @abstractmethod
    def is_saved(self, session: SessionCore) -> bool:
        """Whether the data of a session that is being ended is known to be saved as it is now. O(size)."""

    def forget_unseen(self, session: SessionCore) -> None:
        """Do not count a save of data whose changes since cannot be seen."""

    def has_to_release(self, session: SessionCore) -> bool:
        """Whether other processes wait for this one to let go of the user."""
        return False

    async def release(self, session: SessionCore) -> None:
        """Let go of a user whom no save has let go of. Raises what the first attempt raised."""

    def forget(self, session: SessionCore) -> None:
        """A session has ended: nothing is kept of it."""

    # The end of everybody

    def drain(self, draining: bool) -> None:
        """The manager is being destroyed, or is not after all."""

    async def close(self, until: int) -> None:
        """Stop, and close the store; what is under way is waited for until then, in nanoseconds of the clock."""
