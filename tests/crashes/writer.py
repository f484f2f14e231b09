"""A server to be killed: ``python -m crashes.writer URL SPACE HISTORY NUMBER``. What lives here: users who come,
change, are saved and leave, and the telling of it. What must not: any look at whether it is right.

`URL` is ``sqlite:PATH``, or that of a server, where `SPACE` is a schema or a prefix; `HISTORY` is the file of its
events. `NUMBER` seeds what it does, and makes its data unlike that of any other writer.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import uvloop

from cagey_sessions import Session, SessionEndedError, SessionManager, StoreError
from cagey_sessions.stores import Claim, Outcome, PostgresStore, Record, RedisStore, SQLiteStore, Store, Verdict

from .history import Event, Pen, n_of, state

USERS = 24
INTERVAL = "20ms"
BUSY = 0.01
SLOW_ANSWERS = 0.2
SLOWEST_ANSWER = 0.02
LEASE = 1
"""In seconds, the shortest there is: so long nobody gets the users of a writer that was killed."""
MOST_CHANGES = 60
MADE_BY_ONE = 1_000_000_000
"""More states than one writer makes."""
KINDS = {Outcome.SAVED: "saved", Outcome.ALREADY: "repeated", Outcome.FENCED: "fenced"}


class Telling(Store):
    """Before the class of a store: whoever asks for something, the answer passes here before anybody acts on it."""

    pen: Pen
    chance: random.Random
    owner = ""

    async def dawdle(self) -> None:
        """Some answers are long under way, and a kill comes between what is stored and what is known."""
        if self.chance.random() < SLOW_ANSWERS:
            await asyncio.sleep(self.chance.random() * SLOWEST_ANSWER)

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        began = self.pen.now()
        self.pen.tell(_saves("sent", began, record) for record in records)
        try:
            verdicts = await super().save_many(records)  # type: ignore[safe-super]
        except BaseException:
            self.pen.tell(_saves("failed", began, record) for record in records)
            raise
        await self.dawdle()
        self.pen.tell(
            _saves(KINDS.get(verdict.outcome, "failed"), began, record)
            for record, verdict in zip(records, verdicts, strict=True)
        )
        return verdicts

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> list[Claim]:
        began, self.owner = self.pen.now(), owner
        claims = await super().claim_many(user_ids, owner)  # type: ignore[safe-super]
        await self.dawdle()
        self.pen.tell(_claims(began, claim, owner) for claim in claims)
        return claims

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        began = self.pen.now()
        self.pen.tell(Event("releasing", began, began, str(user), epoch, owner, 0, 0) for user, epoch in claims)
        released = await super().release_many(claims, owner)  # type: ignore[safe-super]
        await self.dawdle()
        now = self.pen.now()
        self.pen.tell(
            Event("released", began, now, str(user), epoch, owner, 0, 0)
            for (user, epoch), was_released in zip(claims, released, strict=True)
            if was_released
        )
        return released


def _saves(kind: str, began: int, record: Record) -> Event:
    user_id, epoch, owner, version, _, _, _, release = record
    return Event(kind, began, Pen.now(), str(user_id), epoch, owner, version, record.value()["n"], release)


def _claims(began: int, claim: Claim, owner: str) -> Event:
    user, now = str(claim.user_id), Pen.now()
    if not claim.granted:
        return Event("refused", began, now, user, claim.epoch, claim.owner, 0, 0, data=owner)
    if claim.record is None:
        return Event("claimed", began, now, user, claim.epoch, owner, 0, 0)
    data = claim.record.value()
    return Event("claimed", began, now, user, claim.epoch, owner, claim.record.version, n_of(data), data=data)


class TellingSQLiteStore(Telling, SQLiteStore):
    pass


class TellingPostgresStore(Telling, PostgresStore):
    pass


class TellingRedisStore(Telling, RedisStore):
    pass


def telling_store(url: str, space: str, pen: Pen, chance: random.Random) -> Telling:
    """The store for a URL."""
    scheme, _, path = url.partition(":")
    store: Telling
    if scheme == "sqlite":
        store = TellingSQLiteStore(path)
    elif scheme in ("postgresql", "postgres"):
        store = TellingPostgresStore(url, schema=space, timeout=LEASE, lease=LEASE)
    else:
        store = TellingRedisStore(url, prefix=space, timeout=LEASE, lease=LEASE)
    store.pen, store.chance = pen, chance
    return store


class Player:
    """A human who comes again and again, here or on the other server."""

    def __init__(
        self, manager: SessionManager, store: Telling, user: str, chance: random.Random, numbers: Iterator[int]
    ) -> None:
        self.manager = manager
        self.store = store
        self.user = user
        self.chance = chance
        self.numbers = numbers

    async def play(self) -> NoReturn:
        while True:
            session = await self.manager.create()
            try:
                await session.login(self.user, default=state(self.user, 0, ""))
                self.tell("login", Pen.now(), 0, session.user_data["n"])
                await self.change(session)
                await self.leave(session)
            except (SessionEndedError, StoreError):
                # a server that was held up for longer than its lease has lost its users, and the other one has them
                with suppress(StoreError):
                    await session.destroy(persist=False)
            await asyncio.sleep(self.chance.random() * 0.2)

    async def change(self, session: Session) -> None:
        for _ in range(self.chance.randrange(1, MOST_CHANGES)):
            n = next(self.numbers)
            session.user_data.update(state(self.user, n, "x" * self.chance.randrange(200)))
            if self.chance.random() < 0.2:
                began = Pen.now()
                receipt = await session.persist_now()
                assert receipt is not None
                self.tell("receipt", began, receipt.version, n)
            else:
                await asyncio.sleep(self.chance.random() * 0.02)  # and wait for a periodic save

    async def leave(self, session: Session) -> None:
        n, began = session.user_data["n"], Pen.now()
        if self.chance.random() < 0.2:
            await session.destroy(persist=False)
            return
        await session.destroy()
        if session.end_reason == "destroyed":
            self.tell("left", began, 0, n)

    def tell(self, kind: str, began: int, version: int, n: int) -> None:
        store = self.store
        store.pen.tell([Event(kind, began, Pen.now(), self.user, 0, store.owner, version, n)])


async def compute() -> NoReturn:
    """Keep the loop busy, as games do: what is stored by then is acknowledged later, and a kill comes between."""
    while True:
        until = time.perf_counter() + BUSY
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(BUSY / 2)


async def main(url: str, space: str, history: str, number: int) -> None:
    chance = random.Random(number)
    store = telling_store(url, space, Pen(history), chance)
    numbers = itertools.count(number * MADE_BY_ONE + 1)
    # nobody is left behind to write for ever when those who kill are killed themselves
    asyncio.get_running_loop().add_reader(sys.stdin, os._exit, 3)
    async with SessionManager(store=store, interval=INTERVAL) as manager:
        os.write(1, b"open\n")
        async with asyncio.TaskGroup() as group:
            group.create_task(compute())
            for each in range(USERS):
                player = Player(manager, store, f"user-{each}", random.Random(chance.random()), numbers)
                group.create_task(player.play())


if __name__ == "__main__":
    url, space, history, number = sys.argv[1:]
    loops: list[Callable[[], Any]] = [asyncio.new_event_loop, uvloop.new_event_loop]
    with asyncio.Runner(loop_factory=loops[int(number) % 2]) as runner:
        runner.run(main(url, space, history, int(number)))
