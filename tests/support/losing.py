"""A store that loses calls, and an edit of one user. What must not be here: tests."""

from __future__ import annotations

import asyncio
from typing import Any

from cagey_sessions import StoreUnavailableError
from support import ManualClock, ScriptedStore


class Losing(ScriptedStore):
    """A store that loses the calls whose numbers are in `lost`, counted from the moment it is set: they hang, and write
    nothing. Unlike ``"hang"`` that is no reason for it not to take the same users again: it is fenced.
    """

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.lost: set[int] = set()
        self.count = 0
        self.let_go = asyncio.Event()

    def lose(self, *numbers: int) -> None:
        self.count = 0
        self.lost = set(numbers)

    async def save_many(self, records: Any) -> Any:
        self.count += 1
        if self.count in self.lost:
            await self.let_go.wait()
            raise StoreUnavailableError("let go")
        return await super().save_many(records)


async def edit(manager: Any, user_id: int = 1) -> None:
    async with manager.edit(user_id, default={"n": 0}) as data:
        data["n"] = 1
