"""One save on its way to a store: a row of a call, from the moment its bytes are fixed until its outcome is known.

The stages of a row, and what moves it:

    OPEN       its bytes are fixed; it is to be written, or is being written
    UNOWNED    the store says that the user is not ours: it is claimed again, and then open, or else settled
    ORPHANED   its worker was cancelled, but its call is still out; when that returns, the row is open again
    SETTLED    acknowledged, failed, refused or lost; its callers have been answered

Only `verdicts` settles a row, and only once. The one exception is a row of a session that has lost its user, which
`to_store` settles before anything is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .._core import SessionCore
from ..stores import Record
from .in_flight import Save

__all__ = ["TRANSITIONS", "Row", "Stage"]


class Stage(Enum):
    """How far a row has come."""

    OPEN = "open"
    UNOWNED = "unowned"
    ORPHANED = "orphaned"
    SETTLED = "settled"


TRANSITIONS: dict[Stage, tuple[Stage, ...]] = {
    Stage.OPEN: (Stage.UNOWNED, Stage.ORPHANED, Stage.SETTLED),
    Stage.UNOWNED: (Stage.OPEN, Stage.ORPHANED, Stage.SETTLED),
    Stage.ORPHANED: (Stage.OPEN,),
    Stage.SETTLED: (),
}
"""The stages that may follow each."""


@dataclass(slots=True, eq=False)
class Row:
    """One save on its way to the store."""

    session: SessionCore
    version: int
    save: Save
    record: Record | None = None
    changed: bool = True
    """Whether the bytes differ from those that the store has acknowledged."""
    was_fenced: bool = False
    """Whether the store has refused it as fenced under our epoch."""
    claims: int = 0
    """How often the user was claimed again for it."""
    stage: Stage = Stage.OPEN

    @property
    def user_id(self) -> int | str:
        assert self.record is not None
        return self.record.user_id

    @property
    def is_pending(self) -> bool:
        """Whether it has yet to be settled by its worker."""
        return self.stage is Stage.OPEN or self.stage is Stage.UNOWNED

    def move(self, stage: Stage) -> None:
        """Go on to another stage."""
        assert stage in TRANSITIONS[self.stage], f"a row that is {self.stage.value} cannot become {stage.value}"
        self.stage = stage
