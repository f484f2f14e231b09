"""A database at the other end of a network. What lives here: the simulated store, the faults it can be given, and the
log of what it did. What must not: checks of that log, managers.

A call travels to the database, is carried out there in one step, and its answer travels back. Every part of that can
take time or go wrong, as the universe's seed decides; what a crashed server has sent may still arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from ..errors import StoreError, StoreUnavailableError
from ..options import SECOND
from ..stores import MemoryStore, Outcome, Record, Verdict
from ..stores.contract import Answers
from ..stores.memory import MemoryBacking, Row
from .universe import Universe

__all__ = ["MILLISECOND", "Applied", "Faults", "SimulatedDatabase", "SimulatedStore"]

T = TypeVar("T")

MILLISECOND = SECOND // 1000


@dataclass
class Faults:
    """What goes wrong between a server and its database, as chances from 0 to 1 of each call.

    All of them may be changed while a run goes on.
    """

    latency: tuple[int, int] = (1 * MILLISECOND, 5 * MILLISECOND)
    """The shortest and the longest time that one way takes, in nanoseconds."""
    failing: float = 0.0
    """The call raises, and nothing has happened."""
    losing_replies: float = 0.0
    """The call is carried out, and raises."""
    hanging: float = 0.0
    """Nothing arrives and nothing comes back, until the caller's deadline."""
    late: float = 0.0
    """Nothing comes back; the call is carried out up to 20 seconds later, whoever has given it up by then."""
    partial: float = 0.0
    """Of a batch only some records are written, or only some users released, and the call raises."""
    refusing: float = 0.0
    """A record gets the verdict `failed`."""
    invalid: frozenset[int | str] = frozenset()
    """Users whose every record gets the verdict `invalid`."""
    down: str = ""
    """``"refusing"``: every call raises at once; ``"silent"``: every call hangs; empty: it is up."""


class Applied(NamedTuple):
    """One record that reached the database, and what it said."""

    when: float
    """Seconds since the start."""
    record: Record
    verdict: Verdict


@dataclass
class SimulatedDatabase:
    """What the servers of one universe share: rows, faults, and the log of everything that was written."""

    universe: Universe
    faults: Faults = field(default_factory=Faults)
    fenced: bool = True
    """Whether it refuses what comes late, or from who is not the owner."""
    backing: MemoryBacking = field(default_factory=MemoryBacking)
    log: list[Applied] = field(default_factory=list)
    lost: list[tuple[float, int | str]] = field(default_factory=list)
    """The rows lost by `lose`, and when."""
    erased: list[tuple[float, int | str]] = field(default_factory=list)
    watchers: list[Callable[[str, Any], None]] = field(default_factory=list)
    """Called with the name of a call and its answer each time one is carried out."""

    def stored(self, user_id: int | str) -> Any:
        """The data of a user as plain values; None if there is none. A copy."""
        row = self.backing.rows.get(user_id)
        return None if row is None or row.record is None else row.record.value()

    def everything(self) -> dict[int | str, Any]:
        """The data of all users who have any. A copy."""
        return {user_id: value for user_id in self.backing.rows if (value := self.stored(user_id)) is not None}

    def owner_of(self, user_id: int | str) -> str:
        """Who has a user; empty if nobody."""
        row = self.backing.rows.get(user_id)
        return "" if row is None else row.owner

    def lose(self, user_ids: Iterable[int | str]) -> None:
        """Forget rows, as an engine does that has failed over to a replica. Their epochs do not come again."""
        for user_id in user_ids:
            row = self.backing.rows.pop(user_id, None)
            if row is not None:
                self.backing.highest_lost = max(self.backing.highest_lost, row.epoch)
                self.lost.append((self.universe.seconds, user_id))


class SimulatedStore(MemoryStore):
    """One server's connection to a `SimulatedDatabase`."""

    def __init__(self, database: SimulatedDatabase) -> None:
        super().__init__(database.backing)
        self.fenced: bool = database.fenced
        self.shared: bool = database.fenced
        self.database = database
        self.faults: Faults = database.faults
        self.owner: str = ""
        """In whose name it has claimed users; empty before the first claim."""
        self.is_cut: bool = False
        self.under_way: dict[asyncio.Task[Any], asyncio.Future[Any]] = {}
        """The calls that wait for an answer."""

    def cut(self) -> None:
        """The server is gone: what it has sent may arrive, nothing comes back to it."""
        self.is_cut = True

    async def close(self) -> None:
        """Close the connections; what is under way ends as an unknown."""
        await super().close()
        for reply in self.under_way.values():
            if not reply.done():
                reply.set_exception(StoreUnavailableError("the connection was closed"))

    def abort(self, call: asyncio.Task[Any]) -> None:
        """End a call as an unknown; where late writes do harm, leave it to come to its end."""
        reply = self.under_way.get(call)
        if reply is not None and self.fenced and not reply.done():
            reply.set_exception(StoreUnavailableError("the connection was closed"))

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        self.owner = owner
        return await self._send("claim", partial(super().claim_many, list(user_ids), owner))

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        records = list(records)
        if len(records) > 1 and self._breaks_in_the_middle():
            some = records[: self.database.universe.random.randrange(1, len(records))]
            await self._send("save", partial(self._write, some))
            raise StoreUnavailableError("the connection broke in the middle of a batch")
        return await self._send("save", partial(self._write, records))

    def _breaks_in_the_middle(self) -> bool:
        return self.database.universe.random.random() < self.faults.partial

    async def _write(self, records: list[Record]) -> list[Verdict]:
        database = self.database
        faults = self.faults
        verdicts = []
        for record in records:
            if record.user_id in faults.invalid:
                verdict = Verdict(Outcome.INVALID, "the engine does not take it")
            elif database.universe.random.random() < faults.refusing:
                verdict = Verdict(Outcome.FAILED, "locked")
            elif self.fenced:
                (verdict,) = await super().save_many([record])
            else:
                self.backing.rows.setdefault(record.user_id, Row(record.epoch)).record = record
                verdict = Verdict(Outcome.SAVED)
            database.log.append(Applied(database.universe.seconds, record, verdict))
            verdicts.append(verdict)
        return verdicts

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        claims = list(claims)
        if len(claims) > 1 and self._breaks_in_the_middle():
            some = claims[: self.database.universe.random.randrange(1, len(claims))]
            await self._send("release", partial(super().release_many, some, owner))
            raise StoreUnavailableError("the connection broke in the middle of a batch")
        return await self._send("release", partial(super().release_many, claims, owner))

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        return await self._send("erase", partial(self._erase, user_id, owner))

    async def _erase(self, user_id: int | str, owner: str) -> bool:
        there_was = await super().erase(user_id, owner)
        self.database.erased.append((self.database.universe.seconds, user_id))
        return there_was

    async def load(self, user_id: int | str) -> Record | None:
        return await self._send("load", partial(super().load, user_id))

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        return await self._send("holder", partial(super().holder, user_id))

    async def scan(self) -> AsyncIterator[Record | StoreError]:
        for record in await self._send("scan", self._scan):
            yield record

    async def _scan(self) -> list[Record | StoreError]:
        records = super().scan()
        return [record async for record in records]

    async def _send(self, name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Have the database do something, and wait for its answer."""
        self._require_open()
        universe, faults = self.database.universe, self.faults
        chance = universe.random.random
        task = asyncio.current_task()
        assert task is not None
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.under_way[task] = reply
        reply.add_done_callback(lambda _: self.under_way.pop(task, None))

        def answer(result: T | None, error: Exception | None) -> None:
            if reply.done() or self.is_cut:
                return
            if error is not None:
                reply.set_exception(error)
            else:
                reply.set_result(cast(T, result))

        def fail(why: str) -> None:
            universe.call_later(self._way(), lambda: answer(None, StoreUnavailableError(why)))

        def carry_out(replies: bool) -> None:
            if self.is_cut and universe.random.random() < 0.5:
                return  # it had not left the machine
            result, error = _at_once(work())
            for watcher in self.database.watchers:
                watcher(name, result if error is None else error)
            if replies:
                universe.call_later(self._way(), lambda: answer(result, error))

        way = self._way()
        if faults.down == "refusing" or chance() < faults.failing:
            fail("the connection was refused")
        elif faults.down == "silent" or chance() < faults.hanging:
            if not self.fenced:  # a call that cannot be aborted has to end some day
                universe.call_later(20 * SECOND, partial(fail, "the connection timed out"))
        elif self.fenced and chance() < faults.late:
            universe.call_later(universe.random.randrange(20 * SECOND), lambda: carry_out(False))
        elif chance() < faults.losing_replies:

            def carry_out_and_fail() -> None:
                carry_out(False)
                fail("the connection broke before the answer came")

            universe.call_later(way, carry_out_and_fail)
        else:
            universe.call_later(way, lambda: carry_out(True))
        return await reply

    def _way(self) -> int:
        shortest, longest = self.faults.latency
        return shortest if longest <= shortest else self.database.universe.random.randrange(shortest, longest)


def _at_once(work: Coroutine[Any, Any, T]) -> tuple[T | None, Exception | None]:
    """Run a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value, None
    except Exception as error:
        return None, error
    raise AssertionError("a step in the database waits for something")
