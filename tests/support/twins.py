"""The core beside the model: each call goes to both, and all that can be seen of either is compared. No tests here."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cagey_sessions import KeyTakenError, NotIdentifiedError, Session, SessionEndedError
from cagey_sessions._core import DEBUG, OldestFirst, SessionTable
from support.model import MOST_WALKS, Model, Person, Refused, Walk

KEYS = [
    "key",
    "KEY",
    "__class__",
    "__proto__",
    "constructor",
    "by_key",
    "\0",
    "key\0",
    " ",
    "\ud800",
    "\u00e9",
    "e\u0301",
    "long" * 25_000,
    "long" * 25_000 + "er",
]
USERS = [1, "1", 2, "2", 0, -1, 2**63 - 1, -(2**63), "__class__", "\u00e9", "e\u0301", "u" * 1024]


class Data:
    """User data that is nothing but itself."""


class Clingy(Data):
    """Data that uses the table while it is freed: a visitor comes and goes, and leaves no trace.

    A traceback may keep it until the collector runs, and when that is no history says: so no rule may depend on it.
    """

    def __init__(self, twins: Twins) -> None:
        self.twins = twins

    def __del__(self) -> None:
        twins = self.twins
        if twins.over or Moody.before is not None:
            return
        visitor = twins.table.create()
        twins.table.begin_end(visitor)
        twins.table.forget(visitor)
        twins.model.created += 1
        twins.model.ended += 1


class Unruly(RuntimeError):
    """What the objects of users raise here."""


class Text(str):
    """A key or an id that raises when it is hashed for the second time, or compared."""

    __slots__ = ("hashed",)

    def __hash__(self) -> int:
        if getattr(self, "hashed", False):
            raise Unruly
        self.hashed = True
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        raise Unruly


class Moody(Session):
    """Sessions whose making may run code of the user, and fail."""

    __slots__ = ()
    before: Callable[[], object] | None = None

    def __new__(cls) -> Any:
        session = super().__new__(cls)
        if Moody.before is not None:
            before, Moody.before = Moody.before, None
            before()
        return session


def fail() -> None:
    raise Unruly


class Twins:
    """A table and its model: each call goes to both, and both must answer alike."""

    def __init__(self, seed: int, start: int, stored: bool = False) -> None:
        self.table = SessionTable(Moody, object(), seed=seed, stored=stored)
        self.model = Model(stored)
        self.meddling = 0
        self.over = False
        """Its history is: what the collector frees now, in the middle of another one, does nothing."""
        self.now = start
        self.person: dict[Session, Person] = {}
        self.session: dict[Person | None, Session | None] = {None: None}
        self.live: list[Session] = []
        self.gone: list[Session] = []
        self.flights: list[tuple[Session, int]] = []
        self.settled: list[tuple[Session, int]] = []
        self.walks: list[tuple[OldestFirst, Walk]] = []
        self.walked = 0

    def agree(self, model: Callable[[], Any], table: Callable[[], Any]) -> tuple[bool, Any]:
        """Whether the call was accepted, and the table's answer; the model's must be the same."""
        try:
            expected = model()
        except Refused as refused:
            with pytest.raises(refused.errors) as caught:
                table()
            assert type(caught.value) in refused.errors
            return False, None
        with self.meddled():
            answer = table()
        if not isinstance(expected, Person):
            assert answer == expected
        return True, (expected, answer)

    @contextlib.contextmanager
    def meddled(self) -> Iterator[None]:
        """If so wished, with visitors who come and go whenever the collector runs, and leave no trace."""
        visitors = []

        def visit(phase: str, _: object) -> None:
            if phase == "stop":
                guests = [self.table.create() for _ in range(self.meddling)]
                for guest in guests:
                    self.table.begin_end(guest)
                    self.table.forget(guest)
                    visitors.append(1)

        if not self.meddling:
            yield
            return
        thresholds = gc.get_threshold()
        gc.callbacks.append(visit)
        gc.set_threshold(1, 1000, 1000)
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)
            gc.callbacks.remove(visit)
            self.meddling = 0
            self.model.created += len(visitors)
            self.model.ended += len(visitors)

    # The calls

    def create(self, key: str | None) -> bool:
        accepted, made = self.agree(lambda: self.model.create(key), lambda: self.table.create(key))
        if accepted:
            self.meet(*made)
        return accepted

    def meet(self, person: Person, session: Session) -> None:
        assert session not in self.person, "a handle was given twice"
        self.person[session] = person
        self.session[person] = session
        self.live.append(session)

    def create_within_create(self, outer: str | None, inner: str | None) -> None:
        """The making of a session makes another one, which may take its key: hence the table's answer comes first."""
        Moody.before = lambda: self.create(inner)
        try:
            session = self.table.create(outer)
        except KeyTakenError:
            with pytest.raises(Refused):
                self.model.create(outer)
        else:
            self.meet(self.model.create(outer), session)
        finally:
            Moody.before = None

    def hold(self, user_id: int | str, user_data: object) -> None:
        accepted, made = self.agree(
            lambda: self.model.hold(user_id, user_data), lambda: self.table.hold(user_id, user_data)
        )
        if accepted:
            self.meet(*made)

    def identify(self, session: Session, user_id: int | str, interval: int, user_data: object) -> None:
        person = self.person[session]
        accepted, _ = self.agree(
            lambda: self.model.identify(person, user_id, user_data, self.now, interval),
            lambda: self.table.identify(session, user_id, user_data, self.now, interval),
        )
        if accepted and interval:
            self.model.learn_place(person, self.due_after(session, self.now, interval))

    def due_after(self, session: Session, tick: int, interval: int) -> int:
        try:
            low, high = self.model.due_after(self.person[session], tick, interval)
        except Refused as refused:
            with pytest.raises(refused.errors):
                self.table.due_after(session, tick, interval)
            return 0
        deadline = self.table.due_after(session, tick, interval)
        assert low <= deadline <= high, "due outside of the interval, or too early in it"
        return deadline

    def ask(self, session: Session) -> None:
        self.agree(lambda: self.model.ask(self.person[session]), lambda: self.table.ask(session))

    def mark(self, session: Session, user_data: object = None) -> None:
        """By hand, or by other data."""
        person = self.person[session]
        if user_data is None:
            self.agree(lambda: self.model.mark_changed(person), session.mark_changed)
        else:
            self.agree(lambda: self.model.set_data(person, user_data), lambda: setattr(session, "user_data", user_data))

    def own(self, session: Session, version: int, digest: int, stored: int) -> None:
        self.agree(
            lambda: self.model.own(self.person[session], version, digest, stored),
            lambda: self.table.own(session, 1, version, digest, stored),
        )

    def fix(self, place: int, digest: int) -> None:
        """The bytes of a flight, which may be those of another version from now on."""
        session, version = self.flights[place]
        accepted, answers = self.agree(
            lambda: self.model.fix(self.person[session], digest), lambda: self.table.fix(session, digest)
        )
        if accepted:
            self.flights[place] = session, answers[1] or version

    def advance(self, now: int, limit: int, interval: int = 0) -> bool:
        """Whether all that was due has been handed out."""
        skipped_before = self.table.counters.skipped
        with self.meddled():
            walked = self.table.advance(now, limit, interval)
        skipped: list[Person] = []
        if count := self.table.counters.skipped - skipped_before:
            with self.table.oldest_first(to_the_end=True) as walk:
                skipped = [self.person[session] for session in walk][-count:]
        armed = [person for person in self.model.people if person.timer is not None]
        moved = {person for person in armed if self.table.state(self.session[person]) != person.state}
        self.model.advance(now, limit, walked, moved, skipped, interval)
        self.walked += walked
        assert self.walked <= MOST_WALKS * self.model.arms
        return walked < limit

    def finish(self, limit: int) -> None:
        """What the engine does: advance until nothing that is due is left."""
        for _ in range(MOST_WALKS * self.model.armed + 1):
            if self.advance(self.now, limit):
                return
        raise AssertionError("no end to what is due")

    def take(self, periodic: bool) -> None:
        possible = self.model.takeable(periodic)
        with self.meddled():
            taken = self.table.take(periodic)
        if taken is None:
            assert not possible
            return
        session, version = taken
        assert self.model.take(periodic, self.person[session]) == version
        self.flights.append((session, version))

    def settle(self, flight: tuple[Session, int], success: bool, deadline: int | None, interval: int = 0) -> None:
        """With an interval a save that has succeeded is due again within it, and not at the deadline."""
        session, version = flight
        person = self.person[session]
        if success:
            taken_at = max(self.now - 1, 0)
            if interval:
                deadline = self.due_after(session, taken_at, interval)
            self.agree(
                lambda: self.model.acknowledge(person, version, taken_at, deadline),
                lambda: self.table.acknowledge(session, version, taken_at, deadline),
            )
        else:
            self.agree(
                lambda: self.model.fail(person, version, deadline),
                lambda: self.table.fail(session, version, deadline),
            )
        self.settled = [*self.settled, flight][-5:]

    def begin_end(self, session: Session) -> None:
        self.agree(lambda: self.model.begin_end(self.person[session]), lambda: self.table.begin_end(session))

    def lose(self, session: Session) -> None:
        self.agree(lambda: self.model.lose(self.person[session]), lambda: self.table.lose(session))

    def set_final(self, session: Session, final: bool) -> None:
        self.agree(
            lambda: self.model.set_final(self.person[session], final), lambda: self.table.set_final(session, final)
        )

    def set_released(self, session: Session, released: bool) -> None:
        self.agree(
            lambda: self.model.set_released(self.person[session], released),
            lambda: self.table.set_released(session, released),
        )

    def forget(self, session: Session) -> None:
        accepted, _ = self.agree(lambda: self.model.forget(self.person[session]), lambda: self.table.forget(session))
        if accepted:
            self.live.remove(session)
            self.gone.append(session)

    def let_go(self, session: Session) -> None:
        """The handle's end, which comes after the row's."""
        self.model.end(self.person[session], "destroyed")
        session._end("destroyed")

    def start_walk(self, identified: bool, to_the_end: bool) -> None:
        walk = self.model.oldest_first(identified, to_the_end)
        self.walks.append((self.table.oldest_first(identified, to_the_end=to_the_end), walk))

    def step_walk(self, walks: tuple[OldestFirst, Walk]) -> bool:
        met = next(walks[0], None)
        assert met is self.session[self.model.step(walks[1])], "a walk met somebody else"
        return met is not None

    def stop_walk(self, walks: tuple[OldestFirst, Walk]) -> None:
        walks[0].close()
        self.model.close(walks[1])
        assert next(walks[0], None) is None
        walks[0].close()

    def everything_ends(self) -> None:
        """Wait until all is over: nobody may be stranded in the wheel or in a lane, and the table is empty."""
        self.now = max(self.now, *(person.timer.high for person in self.model.people if person.timer), 0)
        self.finish(1000)
        for _ in range(2):  # a second time for those who were asked while in flight
            while self.model.due:
                self.take(True)
            for flight in self.flights:
                self.settle(flight, True, None)
            self.flights.clear()
        assert self.table.armed == self.table.counters.due == self.table.counters.in_flight == 0
        for session in list(self.live):
            self.begin_end(session)
            self.forget(session)
        assert len(self.table) == self.table.counters.identified == 0

    # Comparing

    def compare(self) -> None:
        table, model = self.table, self.model
        assert table._check() is DEBUG
        counters = table.counters
        assert counters.created == model.created
        assert counters.ended == model.ended
        assert counters.identified == len(model.identified)
        assert counters.silent == sum(person.silent for person in model.people)
        assert counters.in_flight == model.in_flight
        assert counters.due == model.due
        assert counters.saved == model.saved
        assert counters.skipped == model.skipped
        assert counters.failed == model.failed
        counted = {person for person in model.people if not person.silent}
        assert len(table) == len(counted)
        assert table.armed == model.armed
        assert table.oldest_save == model.oldest_save
        for periodic in (False, True):
            assert table.has_due(periodic) == model.has_due(periodic)
        self.compare_next_deadline()
        for key in KEYS:
            assert table.find_by_key(key) is self.session[model.find_by_key(key)]
        for user_id in USERS:
            assert table.find_by_user(user_id) is self.session[model.find_by_user(user_id)]
            assert table.active_session(user_id) is self.session[model.active_session(user_id)]
        everybody = table.sessions_now()
        assert len(everybody) == len(counted)
        assert {self.person[session] for session in everybody} == counted
        for session in self.live:
            self.compare_live(session)
        for session in self.gone[-5:]:
            self.compare_gone(session)

    def compare_next_deadline(self) -> None:
        """Never late, checked against all rows; and past the clock as soon as all that is due is out."""
        tick, first = self.table.next_deadline(), self.model.first_deadline
        assert (tick is None) == (first is None)
        if tick is not None:
            assert tick <= first, "next_deadline is late"
            assert tick >= self.model.low, "next_deadline lies behind"

    def compare_handle(self, session: Session, person: Person) -> None:
        assert self.table.state(session) == person.state
        assert self.table.is_ending(session) == (person.ending or person.gone)
        assert self.table.is_silent(session) == (person.silent and not person.gone)
        assert self.table.is_lost(session) == (person.lost or person.gone)
        assert self.table.is_final(session) == (person.final and not person.gone)
        assert self.table.is_released(session) == (person.released or person.gone)
        assert session.key == person.key
        assert session.user_id == person.user_id
        assert type(session.user_id) is type(person.user_id)
        assert session.end_reason == person.end_reason
        assert session.alive == (person.end_reason is None)
        if person.end_reason is None and person.user_id is None:
            with pytest.raises(NotIdentifiedError):
                session.user_data  # noqa: B018 - to read it is refused
        elif person.end_reason is None:
            assert session.user_data is person.user_data

    def compare_live(self, session: Session) -> None:
        table, person = self.table, self.person[session]
        self.compare_handle(session, person)
        assert table.versions(session) == (person.version, person.acknowledged)
        assert table.failures(session) == person.failures
        if person.user_id is not None:
            assert table.saved_at(session) == person.saved_at
        assert table.is_marked(session) == (person.marked or person.acknowledged == 0)
        if self.model.stored:
            assert table.stored(session) == (person.acknowledged, person.stored_digest)
            is_settled = person.version == person.acknowledged != 0
            for digest in (1, person.digest):
                assert table.is_current(session, digest) == (is_settled and digest == person.digest)
                assert table.is_stored(session, person.acknowledged, digest) == (
                    person.acknowledged != 0 and digest == person.stored_digest
                )

    def compare_gone(self, session: Session) -> None:
        self.compare_handle(session, self.person[session])
        for ask in (self.table.versions, self.table.failures, self.table.saved_at):
            with pytest.raises(SessionEndedError):
                ask(session)
