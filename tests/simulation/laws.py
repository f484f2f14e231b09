"""What must hold in every run. What lives here: the invariants of docs/guarantees.md, as far as a simulation sees them.
What must not: the driving.

They are looked at from outside: what the servers send, what the database carries out, what calls return.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cagey_sessions import SessionEndedError
from cagey_sessions.saving.to_store import MOST_BYTES, MOST_ROWS
from cagey_sessions.stores import Outcome
from support import inside

if TYPE_CHECKING:
    from cagey_sessions.testing.world import Server

    from .driver import Run

__all__ = ["Laws"]

SECOND = 1_000_000_000
TICK_AND_SAVE = 1.5
"""What a save may come late by on a healthy store, in seconds: a tick, a batch before it, and its own calls."""


LITTLE = 0.5
"""What a call may take besides waiting for the store, in seconds: a listener that dawdles, the grid of deadlines."""


class Laws:
    """The invariants of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.database = run.database
        self.sent: dict[tuple[str, int | str], Any] = {}
        self.granted: dict[tuple[str, int | str, int], float] = {}
        """Claims, and when they were granted."""
        self.vanished: dict[int | str, float] = {}
        """When a row was last erased or lost."""
        self.lost: dict[int | str, float] = {}
        self.unaware: set[tuple[str, int | str]] = set()
        """Owners whose user's row was lost, until they load or write it again: before that they cannot know."""
        self.has_dropped: dict[int | str, list[Server]] = {}
        self.dead: dict[Server, list[Any]] = {}
        self.broken: list[str] = []
        """What was seen in the middle of a call, where raising would only look like a store that fails."""
        self.seen = 0
        self.latest: dict[int | str, tuple[int, str, int, int]] = {}
        self.database.watchers.append(self.see_carried_out)

    # What the servers send

    def watch(self, server: Server) -> None:
        """Look at each call a server makes."""
        store = server.store
        life = inside(server.manager)
        save_many, abort = store.save_many, store.abort
        in_flight: dict[int | str, Any] = {}
        users_of: dict[Any, list[int | str]] = {}
        open_calls = [0]

        async def checked(records: Any) -> Any:
            records = list(records)
            users = users_of[asyncio.current_task()] = [record.user_id for record in records]
            self.look_at_losses()
            try:
                assert len(set(users)) == len(users), "I1: a user is twice in a batch"
                assert len(records) <= MOST_ROWS, "I7: rows in a batch"
                assert sum(len(record.body) for record in records[:-1]) <= MOST_BYTES, "I7: bytes in a batch"
                for record in records:
                    other = in_flight.get(record.user_id)  # a call under an older epoch is fenced off
                    assert other is None or (store.fenced and other.epoch < record.epoch), "I1: two saves in flight"
                    self.look_at(record)
                    in_flight[record.user_id] = record
                open_calls[0] += 1
                most = self.run.settings["max_in_flight"] + len(self.run.users)
                assert open_calls[0] <= most, "I7: calls in flight"
            except AssertionError as error:
                self.broken.append(str(error))
            try:
                return await save_many(records)
            finally:
                open_calls[0] -= 1
                for user_id in users_of.pop(asyncio.current_task(), ()):
                    in_flight.pop(user_id, None)

        def given_up(call: Any) -> None:
            if store.fenced:  # its users may be saved again before it has returned
                for user_id in users_of.pop(call, ()):
                    in_flight.pop(user_id, None)
            abort(call)

        ownership = server.manager._logins
        identify = ownership._identify

        def identified(session: Any, loaded: Any) -> None:
            identify(session, loaded)
            self.see_identified(store.owner, loaded)

        ownership._identify = identified  # type: ignore[method-assign]
        release_many = store.release_many

        async def released(claims: Any, owner: str) -> list[bool]:
            answers = await release_many(claims, owner)
            for (user_id, epoch), was_released in zip(claims, answers, strict=True):
                session = life.table.active_session(user_id)
                is_live = session is not None and not life.table.is_ending(session)
                if was_released and is_live and life.table.epoch(session) == epoch:
                    self.broken.append(f"I14: user {user_id!r} was let go of while a session has them")
            return answers

        store.release_many = released  # type: ignore[method-assign]
        store.abort = given_up  # type: ignore[method-assign]
        store.save_many = checked  # type: ignore[method-assign]
        link = life.link
        start = link.start
        probes: list[Any] = []

        def probe(method: Any, *arguments: Any) -> Any:
            was_down = link.down
            call = start(method, *arguments)
            if was_down:
                probes[:] = [other for other in probes if not other.task.done()]
                probes.append(call)
                patient = [other for other in probes if self.run.universe.now < other.started + link.timeout]
                if len(patient) > 1:
                    self.broken.append("I32: more than one probe at a time")
            return call

        link.start = probe

    def see_identified(self, owner: str, loaded: Any) -> None:
        """A session gets its user, by a claim that may have been granted when the row was still there."""
        self.look_at_losses()
        if self.granted[owner, loaded.user_id, loaded.epoch] <= self.lost.get(loaded.user_id, -1.0):
            self.unaware.add((owner, loaded.user_id))

    def look_at(self, record: Any) -> None:
        if self.run.settings["fenced"]:
            claim = (record.owner, record.user_id, record.epoch)
            assert claim in self.granted, "I8: a save for a user who was never loaded under this epoch"
        last = self.sent.get((record.owner, record.user_id))
        if last is not None and last.epoch == record.epoch:
            assert record.version >= last.version, "I1: versions reach the store in rising order"
            assert record.version > last.version or record.body == last.body, "I1: a version stands for other bytes"
        self.sent[record.owner, record.user_id] = record
        data = record.value()
        assert data["twice"] == 2 * data["n"], "I15: a torn state was saved"

    # What the database does

    def see_carried_out(self, name: str, answer: Any) -> None:
        if name == "claim" and isinstance(answer, list):
            for claim in answer:
                if claim.granted:
                    owner = self.database.owner_of(claim.user_id)
                    self.granted[owner, claim.user_id, claim.epoch] = self.run.universe.seconds
                    self.sent.pop((owner, claim.user_id), None)
                    if not self.has_session(owner, claim.user_id):  # else it is a claim that was given up on
                        self.unaware.discard((owner, claim.user_id))
        now = self.run.universe.seconds
        for user_id in [user_id for when, user_id in self.database.erased if when == now]:
            self.vanish(user_id)
        self.look_at_log()

    def vanish(self, user_id: int | str) -> None:
        self.vanished[user_id] = self.run.universe.seconds
        self.run.promised[user_id] = 0
        self.latest.pop(user_id, None)

    def has_vanished(self, server: Server, user_id: int | str, since: float) -> bool:
        """Whether a server cannot know of what was acknowledged of a user: it is cut off, or the row was removed."""
        self.look_at_losses()
        session = inside(server.manager).table.active_session(user_id)
        row = self.database.backing.rows.get(user_id)
        if session is not None and (row is None or row.epoch != inside(server.manager).table.epoch(session)):
            return True  # taken over, and nobody has told it yet
        return (server.store.owner, user_id) in self.unaware or self.vanished.get(user_id, -1.0) >= since

    def look_at_log(self) -> None:
        """I20: accepted writes have rising epochs, one owner each, rising versions, and never go back in content."""
        for applied in self.database.log[self.seen :]:
            if applied.verdict.outcome != Outcome.SAVED:
                continue
            record = applied.record
            if not self.run.settings["fenced"] and record.owner not in self.run.owners():
                continue  # nothing fences off what a process that was killed had sent
            self.unaware.discard((record.owner, record.user_id))
            n = record.value()["n"]
            epoch, owner, version, before = self.latest.get(record.user_id, (0, record.owner, 0, 0))
            if self.run.settings["fenced"]:
                claim = (record.owner, record.user_id, record.epoch)
                assert claim in self.granted, "I4: a write of who does not own the user was accepted"
                assert record.epoch >= epoch, "I20: an older epoch was accepted"
                assert record.epoch > epoch or owner == record.owner, "I20: two owners in one epoch"
                assert record.epoch > epoch or record.version > version, "I13, I20: a version was accepted twice"
            assert n >= before, f"I1: user {record.user_id!r}: {n} was written over {before}"
            self.latest[record.user_id] = (record.epoch, record.owner, record.version, n)
        self.seen = len(self.database.log)

    # What the program is told

    def see_promise(self, user_id: int | str, n: int) -> None:
        stored = self.database.stored(user_id)
        assert stored is not None, "I3: acknowledged, and there is nothing"
        assert stored["n"] >= n, f"I3: {n} was acknowledged, and {stored['n']} is stored"

    def see_patience(self, name: str, seconds: float) -> None:
        """A store that does not answer makes nobody wait for longer than the settings say."""
        calls = 2 if name == "destroy" else 1  # a user whose save was refused is let go of by a call of its own
        if seconds > calls * self.run.settings["save_timeout"] + LITTLE:
            self.broken.append(f"I3: {name} has taken {seconds:.2f} s")

    def see_end(self, session: Any) -> None:
        for server in self.run.servers:
            if server is not None and server.manager is session._host:
                self.dead.setdefault(server, []).append(session)

    # After each step

    def check(self) -> None:
        assert not self.broken, self.broken[0]
        self.look_at_losses()
        for server in self.run.servers:
            if server is not None:
                self.check_server(server)
        for user_id, n in self.run.promised.items():
            if n:
                stored = self.database.stored(user_id)
                assert stored is not None, f"I3: user {user_id!r} is gone"
                assert stored["n"] >= n, f"I3: user {user_id!r} has gone back"

    def look_at_losses(self) -> None:
        while self.database.lost:
            when, user_id = self.database.lost.pop()
            self.lost[user_id] = max(when, self.lost.get(user_id, -1.0))
            self.vanish(user_id)
            for owner in self.run.owners():
                if self.has_session(owner, user_id):
                    self.unaware.add((owner, user_id))

    def has_session(self, owner: str, user_id: int | str) -> bool:
        """Whether a server that is there has a session of a user."""
        lives = [inside(server.manager) for server in self.run.servers if server is not None]
        return any(life.owner == owner and life.table.active_session(user_id) is not None for life in lives)

    def check_server(self, server: Server) -> None:
        manager = server.manager
        table = inside(manager).table
        statistics = manager.statistics()
        there = manager.sessions()
        assert statistics.created == statistics.live + statistics.ended, "I29"
        assert statistics.live == len(there) == len(manager), "I29"
        live = [session for session in there if not table.is_ending(session)]
        users = [session.user_id for session in there if session.user_id is not None]
        assert len(users) == len(set(users)), "I9: one session of a user"
        keys = [session.key for session in live if session.key is not None]
        assert len(keys) == len(set(keys)), "I9: one session of a key"
        for session in live:
            if session.user_id is not None:
                assert manager.find_by_user(session.user_id) is session, "I9"
            if session.key is not None:
                assert manager.find_by_key(session.key) is session, "I9"
        if self.run.settings["tick"] <= 1000:
            assert statistics.slice_overruns == 0, "I27"
        for session in there:
            taken, acknowledged = table.versions(session)
            assert taken >= acknowledged, "I29"

    def counts(self, server: Server) -> tuple[int, ...]:
        """What no refused call may change."""
        found = server.manager.statistics()
        return found.live, found.created, found.ended, found.pending, found.in_flight, found.saved, found.failed

    def use_dead_handles(self, server: Server) -> None:
        """I11: a dead handle swallows no write, and is in no list."""
        for session in self.dead.get(server, ()):
            if session.alive:
                continue  # its last event is under way
            assert session not in server.manager.sessions(), "I11"
            for use in (getattr, session.set):
                try:
                    use(*((session, "user_data") if use is getattr else ("a", 1)))
                except SessionEndedError:
                    continue
                raise AssertionError("I11: a dead handle was used")

    # At the end

    def check_saved(self) -> None:
        """I2, I12, I32: on a healthy store everything is saved within the interval."""
        for server in self.run.servers:
            if server is None:
                continue
            assert not server.store.under_way, "I14: a call of the store was left behind"
            statistics = server.manager.statistics()
            oldest, limit = statistics.oldest_unsaved, self.run.settings["interval"] + TICK_AND_SAVE
            assert statistics.unsavable or oldest is None or oldest <= limit, f"I12: unsaved for {oldest} s"
            for session in self.run.sessions(server):
                stored = self.database.stored(session.user_id)
                assert stored is not None, "I2"
                assert stored["n"] == session.user_data["n"], "I2: a change was never saved"

    def check_closed(self, server: Server) -> None:
        """I29: a manager that has ended has nothing left."""
        statistics = server.manager.statistics()
        assert (statistics.live, statistics.in_flight, statistics.pending) == (0, 0, 0), "I29"
        assert statistics.created == statistics.ended, "I29"
        assert not server.store.under_way, "I14: a call of the store was left behind"

    def judge(self, wanted: dict[int | str, int], owners: set[str]) -> None:
        """After the last drain, on a healthy store; `owners` are those who were there until then."""
        self.check()
        for user_id in self.run.users:
            stored = self.database.stored(user_id)
            if user_id in wanted:
                assert stored is not None, "I3"
                assert stored["n"] >= wanted[user_id], f"I3: user {user_id!r}: the last save is not the last state"
            owner = self.database.owner_of(user_id)
            assert not self.run.settings["fenced"] or owner not in owners, f"I14: user {user_id!r} is not let go of"
