"""Processes on one database, each with a spill, and how one fails. What must not be here: tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cagey_sessions import DrainError, SessionManager, read_snapshot
from cagey_sessions.stores.memory import MemoryBacking
from support import ScriptedStore, inside, let_time_pass


class Cluster:
    """Processes, one after the other or at the same time, on one database and each with a spill file."""

    def __init__(self, clock: Any, path: Path) -> None:
        self.clock = clock
        self.path = path
        self.backing = MemoryBacking()
        self.store: Any = None
        self.errors: list[Exception] = []

    def manager(self, **options: Any) -> SessionManager[Any]:
        self.store = options.pop("store", None) or ScriptedStore(self.clock, backing=self.backing)
        options.setdefault("spill", self.path)
        manager: SessionManager[Any] = SessionManager(store=self.store, clock=self.clock, **options)
        manager.on("error", lambda error, session: self.errors.append(error))
        return manager

    async def start(self, **options: Any) -> SessionManager[Any]:
        """A process begins; whoever had users before is dead."""
        self.backing.dead |= {row.owner for row in self.backing.rows.values()}
        manager = self.manager(**options)
        await manager.__aenter__()
        return manager

    async def fail(self, manager: SessionManager[Any]) -> DrainError:
        """The process ends, and the store is down."""
        inside(manager).link.store.down = True
        with pytest.raises(DrainError) as raised:
            await let_time_pass(self.clock, manager.destroy(deadline="1s"))
        return raised.value

    def stored(self, user_id: int | str) -> Any:
        row = self.backing.rows.get(user_id)
        return None if row is None or row.record is None else row.record.value()

    def spilled(self) -> dict[int | str, bytes]:
        return {entry.user_id: entry.body for entry in read_snapshot(self.path).entries} if self.path.exists() else {}


async def spill_gold(cluster: Cluster, gold: int = 2, **users: int) -> None:
    """Ann has 1 in the store, and 2 in the spill."""
    manager = await cluster.start()
    session = await manager.open("ann", default={"gold": 0})
    session.user_data["gold"] = 1
    await session.persist_now()
    session.user_data["gold"] = gold
    for user_id, each in users.items():
        await manager.open(user_id, default={"gold": each})
    error = await cluster.fail(manager)
    assert all(user.spilled for user in error.report.unsaved)
