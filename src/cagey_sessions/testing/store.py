"""A simulated database at the other end of a network, with faults, and a log of what was written.

A call travels to the database, is carried out there in one step, and its answer travels back. Every part of that takes
time and may go wrong, as the universe's seed decides. A call that a crashed server has sent may still arrive.
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
    """What goes wrong between a server and its database; most fields are the chance of it for each call, from 0 to 1.

    All fields may be changed during a run.
    """

    latency: tuple[int, int] = (1 * MILLISECOND, 5 * MILLISECOND)
    """The shortest and the longest time of one way, in nanoseconds."""
    failing: float = 0.0
    """The call is not carried out, and raises."""
    losing_replies: float = 0.0
    """The call is carried out, and raises all the same."""
    hanging: float = 0.0
    """The call does not arrive, and gets no answer, until the caller's deadline."""
    late: float = 0.0
    """The call gets no answer, and is carried out up to 20 seconds later, even if the caller has given up by then."""
    partial: float = 0.0
    """Only some records of a batch are written, or only some users released, and the call raises."""
    refusing: float = 0.0
    """A record gets the verdict `failed`."""
    invalid: frozenset[int | str] = frozenset()
    """Users whose every record gets the verdict `invalid`."""
    down: str = ""
    """``"refusing"``: every call raises at once; ``"silent"``: every call hangs; empty: it is up."""


class Applied(NamedTuple):
    """One record that reached the database, and the verdict."""

    when: float
    """Seconds since the start."""
    record: Record
    verdict: Verdict


@dataclass
class SimulatedDatabase:
    """The database that the servers of one universe share: rows, faults, and the log of everything written."""

    universe: Universe
    faults: Faults = field(default_factory=Faults)
    fenced: bool = True
    """Whether it refuses writes that come late, or are not by the owner."""
    backing: MemoryBacking = field(default_factory=MemoryBacking)
    log: list[Applied] = field(default_factory=list)
    lost: list[tuple[float, int | str]] = field(default_factory=list)
    """The rows that `lose` removed, and when."""
    erased: list[tuple[float, int | str]] = field(default_factory=list)
    watchers: list[Callable[[str, Any], None]] = field(default_factory=list)
    """Functions that are called with the name and the answer of each call that is carried out."""

    def stored(self, user_id: int | str) -> Any:
        """The data of a user as plain values; None if there is none. A copy."""
        row = self.backing.rows.get(user_id)
        return None if row is None or row.record is None else row.record.value()

    def everything(self) -> dict[int | str, Any]:
        """The data of all users who have any. A copy."""
        return {user_id: value for user_id in self.backing.rows if (value := self.stored(user_id)) is not None}

    def owner_of(self, user_id: int | str) -> str:
        """The owner of a user; empty if the user has none."""
        row = self.backing.rows.get(user_id)
        return "" if row is None else row.owner

    def lose(self, user_ids: Iterable[int | str]) -> None:
        """Remove rows, as an engine loses them when it fails over to a replica. Their epochs are not given again."""
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
        """The owner id that it has claimed users under; empty before the first claim."""
        self.is_cut: bool = False
        self.under_way: dict[asyncio.Task[Any], asyncio.Future[Any]] = {}
        """The tasks of calls that wait for an answer, and the futures for that."""

    def cut(self) -> None:
        """Cut the connection because the server is dead: calls that were sent may arrive, no answer comes back."""
        self.is_cut = True

    async def close(self) -> None:
        """Close the connections; calls under way end with an unknown outcome."""
        await super().close()
        for reply in self.under_way.values():
            if not reply.done():
                reply.set_exception(StoreUnavailableError("the connection was closed"))

    def abort(self, call: asyncio.Task[Any]) -> None:
        """End a call with an unknown outcome; in an unfenced store, where a late write would do harm, do nothing."""
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
        """Send a call to the database, and wait for its answer, with the faults that chance decides."""
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
                return  # the call had not left the machine when the server was killed
            result, error = _at_once(work())
            for watcher in self.database.watchers:
                watcher(name, result if error is None else error)
            if replies:
                universe.call_later(self._way(), lambda: answer(result, error))

        way = self._way()
        if faults.down == "refusing" or chance() < faults.failing:
            fail("the connection was refused")
        elif faults.down == "silent" or chance() < faults.hanging:
            if not self.fenced:  # such a call cannot be aborted, so it has to end by itself
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
    """Run a coroutine that waits for nothing; returns its result, or what it raised."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value, None
    except Exception as error:
        return None, error
    raise AssertionError("a step in the database waits for something")
