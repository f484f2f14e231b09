"""The executable specification of the compiled core in other algorithms: dicts, a heap with lazy deletion, plain lists.

It is written from the docstrings of `SessionTable` and from `SAVE_TRANSITIONS`, and is the oracle of `tests/core`.
Where the core promises no particular answer (the order of equal deadlines, which of several errors is raised) the model
says which answers are allowed and is then told the one that was given.

What the wheel promises, and how the model says it
    A row has an *effective* deadline: the one it was armed with or, if that had passed already, the tick the wheel had
    reached. Rows come out in the order of effective deadlines, whatever the strides and limits, and ties in any order;
    none comes out before its deadline is reached; and once `advance` has walked fewer rows than its limit, none that
    was due is left. Where the wheel has got to is known exactly then, and after an `advance` that stopped at its limit
    only roughly: hence effective deadlines and the wheel's place are intervals here, of a single tick otherwise.

When a session is due again
    Which place in the interval it has is the table's affair (`tests/core/test_places.py`), and the model is told it.
    It knows that a first deadline, and that of a session saved before its last one, lie in the interval that follows;
    all others in the last tenth of that.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from cagey_sessions import (
    AlreadyIdentifiedError,
    CageySessionsError,
    InvalidUserDataError,
    KeyTakenError,
    NotIdentifiedError,
    SessionEndedError,
    UsageError,
    UserActiveError,
)
from cagey_sessions._core import SAVE_TRANSITIONS

END_OF_TIME = 2**64 - 1
MOST_WALKS = 11
"""How often the wheel may walk over a row for one deadline: once to hand it out, and once a level above the lowest."""

NEXT = {(before, event): after for before, event, after in SAVE_TRANSITIONS}
LANES = ("urgent", "final", "periodic")
LANE_OF = {"asked": "urgent", "ending_asked": "final", "due": "periodic"}
IN_FLIGHT = {before for before, event in NEXT if event == "acknowledge"}


class Refused(Exception):
    """The core must refuse the call, with one of these errors."""

    def __init__(self, *errors: type[CageySessionsError]) -> None:
        super().__init__(errors)
        self.errors = errors


@dataclass(eq=False)
class Timer:
    """The effective deadline of a row in the wheel lies from `low` to `high`."""

    low: int
    high: int


@dataclass(eq=False)
class Person:
    """A session."""

    key: str | None
    age: int
    state: str = "none"
    user_id: int | str | None = None
    user_data: object = None
    version: int = 0
    acknowledged: int = 0
    failures: int = 0
    saved_at: int | None = None
    timer: Timer | None = None
    due: tuple[int, int] = (0, 0)
    """The last deadline, as it was set, lies somewhere between these."""
    end_reason: str | None = None
    changes: int = 0
    fixed_changes: int = 0
    stored_changes: int = 0
    digest: int = 0
    stored_digest: int = 0
    lost: bool = False
    final: bool = False
    released: bool = False
    silent: bool = False

    @property
    def gone(self) -> bool:
        return self.state == "gone"

    @property
    def ending(self) -> bool:
        return self.state.startswith("ending")

    @property
    def marked(self) -> bool:
        """Whether there is a change that no acknowledged bytes are known to hold."""
        return self.changes > self.stored_changes


@dataclass(eq=False)
class Waiting:
    """A place in a lane. Those who came in one and the same `advance` stand in the order of their deadlines."""

    person: Person
    arrival: int
    low: int = 0
    high: int = 0


@dataclass(eq=False)
class Walk:
    """A walk over the sessions by age: whom it has passed, and the age at which it stops."""

    identified: bool
    horizon: int | None
    passed: int = -1


@dataclass(eq=False)
class Model:
    stored: bool = False
    by_key: dict[str, Person] = field(default_factory=dict)
    by_user: dict[tuple[type, int | str], Person] = field(default_factory=dict)
    lanes: dict[str, list[Waiting]] = field(default_factory=lambda: {name: [] for name in LANES})
    anonymous: list[Person] = field(default_factory=list)
    identified: list[Person] = field(default_factory=list)
    served_last: str = "periodic"
    low: int = 0
    high: int = 0
    armed: int = 0
    arms: int = 0
    created: int = 0
    ended: int = 0
    saved: int = 0
    skipped: int = 0
    failed: int = 0
    bounded_walks: int = 0

    def __post_init__(self) -> None:
        self.people: set[Person] = set()
        self._number = itertools.count()
        self._heap: list[tuple[int, int, Person, Timer]] = []

    # What can be seen

    @property
    def due(self) -> int:
        return sum(map(len, self.lanes.values()))

    @property
    def in_flight(self) -> int:
        return sum(person.state in IN_FLIGHT for person in self.people)

    @property
    def oldest_save(self) -> int | None:
        return self.identified[0].saved_at if self.identified else None

    @property
    def first_deadline(self) -> int | None:
        """The latest moment at which the first row of the wheel may come out."""
        while self._heap and self._heap[0][2].timer is not self._heap[0][3]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def find_by_key(self, key: str) -> Person | None:
        return self.by_key.get(key)

    def active_session(self, user_id: int | str) -> Person | None:
        return self.by_user.get((type(user_id), user_id))

    def find_by_user(self, user_id: int | str) -> Person | None:
        person = self.active_session(user_id)
        return None if person is None or person.ending or person.silent else person

    def has_due(self, periodic: bool) -> bool:
        return self._next_lane(periodic) is not None

    # Moving

    def _require_row(self, person: Person) -> None:
        if person.gone:
            raise Refused(SessionEndedError)

    def _move(self, person: Person, event: str, place: Waiting | None = None) -> None:
        """One step of the save, and what follows from it: out of the wheel or the lane, into the lane."""
        before = person.state
        if (before, event) not in NEXT:
            raise Refused(UsageError)
        person.state = after = NEXT[before, event]
        if person.timer is not None:
            person.timer = None
            self.armed -= 1
        if before == after and after in LANE_OF:
            return  # it keeps its place
        for lane in self.lanes.values():
            lane[:] = [other for other in lane if other.person is not person]
        if after in LANE_OF:
            self.lanes[LANE_OF[after]].append(place or Waiting(person, next(self._number)))

    def _arm(self, person: Person, deadline: int) -> None:
        person.due = deadline, deadline
        self._wind(person, max(deadline, self.low), max(deadline, self.high))

    def _wind(self, person: Person, low: int, high: int) -> None:
        person.timer = Timer(low, high)
        heapq.heappush(self._heap, (person.timer.high, next(self._number), person, person.timer))
        self.armed += 1
        self.arms += 1

    def _grow_young(self, person: Person) -> None:
        for people in (self.anonymous, self.identified):
            if person in people:
                people.remove(person)
        person.age = next(self._number)
        if not person.silent:
            self.identified.append(person)

    # The calls

    def create(self, key: str | None) -> Person:
        if key in self.by_key:
            raise Refused(KeyTakenError)
        person = Person(key, next(self._number))
        self.people.add(person)
        self.anonymous.append(person)
        if key is not None:
            self.by_key[key] = person
        self.created += 1
        return person

    def hold(self, user_id: int | str, user_data: object) -> Person:
        wrong: list[type[CageySessionsError]] = []
        if user_data is None:
            wrong.append(InvalidUserDataError)
        if self.active_session(user_id) is not None:
            wrong.append(UserActiveError)
        if wrong:
            raise Refused(*wrong)
        person = Person(None, next(self._number), silent=True)
        self.people.add(person)
        self.identify(person, user_id, user_data, 0, 0)
        return person

    def identify(self, person: Person, user_id: int | str, user_data: object, now: int, interval: int) -> None:
        self._require_row(person)
        wrong: list[type[CageySessionsError]] = []
        if person.ending:
            wrong.append(SessionEndedError)
        elif person.state != "none":
            wrong.append(AlreadyIdentifiedError)
        if user_data is None:
            wrong.append(InvalidUserDataError)
        if self.active_session(user_id) is not None:
            wrong.append(UserActiveError)
        if now + interval >= END_OF_TIME:
            wrong.append(UsageError)
        if wrong:
            raise Refused(*wrong)
        self._move(person, "identify")
        person.user_id, person.user_data, person.saved_at = user_id, user_data, now
        self.by_user[type(user_id), user_id] = person
        self._grow_young(person)
        person.due = (0, 0)
        if interval:
            self._arm(person, now + interval)

    def due_after(self, person: Person, tick: int, interval: int) -> tuple[int, int]:
        """Between which ticks a session whose data of `tick` is stored is due again."""
        end = tick + interval
        if interval == 0 or end >= END_OF_TIME:
            raise Refused(UsageError)
        if person.gone:
            return 0, 0
        if person.user_id is None:
            raise Refused(UsageError)
        return tick + 1 if tick < person.due[1] else end - (interval - 1) // 10, end

    def learn_place(self, person: Person, deadline: int) -> None:
        """Hear the first deadline of a session: it is that and no other."""
        assert person.timer is not None
        person.timer = None
        self.armed -= 1
        self.arms -= 1
        self._arm(person, deadline)

    def ask(self, person: Person) -> None:
        self._require_row(person)
        if person.user_id is None:
            raise Refused(UsageError, NotIdentifiedError)
        self._move(person, "ask")

    def mark_changed(self, person: Person) -> None:
        wrong: list[type[CageySessionsError]] = []
        if person.gone:
            wrong.append(SessionEndedError)
        if person.user_id is None:
            wrong.append(NotIdentifiedError)
        if wrong:
            raise Refused(*wrong)
        person.changes += 1

    def set_data(self, person: Person, user_data: object) -> None:
        if person.end_reason is not None:
            raise Refused(SessionEndedError)
        if person.user_id is None:
            raise Refused(NotIdentifiedError)
        if user_data is None:
            raise Refused(InvalidUserDataError)
        person.user_data = user_data
        person.changes += 1

    def is_skipped(self, person: Person) -> bool:
        """Whether the timer passes over a user when it may."""
        return person.state == "idle" and person.acknowledged > 0 and not person.marked and self.bounded_walks == 0

    def advance(
        self, now: int, limit: int, walked: int, moved: set[Person], skipped: Sequence[Person] = (), interval: int = 0
    ) -> None:
        """Hear that `advance` has walked so many rows, who is due since, and who was passed over, in that order."""
        assert len(moved) + len(skipped) <= walked <= limit
        assert moved.isdisjoint(skipped)
        assert interval or not skipped
        assert all(self.is_skipped(person) for person in skipped), "passed over although it had to be saved"
        assert not interval or not any(self.is_skipped(person) for person in moved), (
            "saved although nothing had changed"
        )
        if limit == 0:
            return
        if now < self.low:
            assert walked == 0, "time never moves back"
            return
        arrival = next(self._number)
        places = {}
        for person in [*moved, *skipped]:
            assert person.timer is not None, "it was not in the wheel"
            assert person.timer.low <= now, "handed out before its deadline"
            places[person] = Waiting(person, arrival, person.timer.low, person.timer.high)
        for person in skipped:
            person.timer = None
            self.armed -= 1
        for person in moved:
            self._move(person, "become_due", places[person])
        first = self.first_deadline
        if places and first is not None:
            assert max(place.low for place in places.values()) <= first, "a later one came out before an earlier one"
        if walked < limit:
            assert first is None or first > now, "left in the wheel although its deadline has passed"
            self.low = max(self.low, now)
            self.high = max(self.high, now)
        else:
            self.low = max([self.low, *(place.low for place in places.values())])
            self.high = max(self.high, now)
            if first is not None:
                self.high = max(self.low, min(self.high, first))
        for person in skipped:
            last = END_OF_TIME - 1
            person.due = self.due_after(person, now, interval) if now + interval <= last else (last, last)
            self._wind(person, *person.due)
            person.saved_at = now
            self._grow_young(person)
            self.saved += 1
            self.skipped += 1

    def takeable(self, periodic: bool) -> list[Person]:
        """Whoever may be taken next; nobody if the answer has to be None."""
        name = self._next_lane(periodic)
        if name is None:
            return []
        lane = self.lanes[name]
        batch = [place for place in lane if place.arrival == lane[0].arrival]
        first = min(place.high for place in batch)
        return [place.person for place in batch if place.low <= first]

    def _next_lane(self, periodic: bool) -> str | None:
        """The lanes take turns: the first after the one served last that holds somebody."""
        served = LANES.index(self.served_last)
        for name in LANES[served + 1 :] + LANES[: served + 1]:
            if self.lanes[name] and (periodic or name != "periodic"):
                return name
        return None

    def take(self, periodic: bool, person: Person) -> int:
        """Hear that this one was taken; the version."""
        assert person in self.takeable(periodic), "taken out of turn"
        self.served_last = self._next_lane(periodic) or self.served_last
        self._move(person, "take")
        person.version += not self.stored
        return person.version

    def fix(self, person: Person, digest: int) -> int:
        self._require_row(person)
        if not self.stored or person.state not in IN_FLIGHT:
            raise Refused(UsageError)
        person.fixed_changes = person.changes
        if person.version == 0 or person.digest != digest:
            person.version += 1
            person.digest = digest
            return person.version
        return 0 if person.version == person.acknowledged else person.version

    def own(self, person: Person, version: int, digest: int, stored: int) -> None:
        """After a load."""
        self._require_row(person)
        if not self.stored:
            raise Refused(UsageError)
        person.version = person.acknowledged = version
        person.digest, person.stored_digest = digest, stored

    def acknowledge(self, person: Person, version: int, taken_at: int, deadline: int | None) -> bool:
        if not self._settle(person, version, "acknowledge", None if person.ending else deadline):
            return False
        person.failures = 0
        person.stored_changes = max(person.stored_changes, person.fixed_changes)
        if person.acknowledged != version:
            person.stored_digest = person.digest
        person.acknowledged = version
        person.saved_at = taken_at
        self._grow_young(person)
        self.saved += 1
        return True

    def fail(self, person: Person, version: int, deadline: int | None) -> bool:
        if not self._settle(person, version, "fail", deadline):
            return False
        person.failures = min(person.failures + 1, 255)
        person.changes += 1  # nobody knows what the store has now
        self.failed += 1
        return True

    def _settle(self, person: Person, version: int, event: str, deadline: int | None) -> bool:
        if person.gone:
            return False
        if person.state not in IN_FLIGHT or version != person.version:
            raise Refused(UsageError)
        self._move(person, event)
        if deadline is not None and person.state not in LANE_OF and not (person.silent and person.state == "idle"):
            self._arm(person, deadline)
        return True

    def begin_end(self, person: Person) -> None:
        self._require_row(person)
        if person.ending:
            return
        self._move(person, "end")
        if person.key is not None:
            del self.by_key[person.key]

    def lose(self, person: Person) -> None:
        self._require_row(person)
        person.lost = True

    def set_final(self, person: Person, final: bool) -> None:
        self._require_row(person)
        if final and not person.ending:
            raise Refused(UsageError)
        person.final = final

    def set_released(self, person: Person, released: bool) -> None:
        self._require_row(person)
        person.released = released

    def forget(self, person: Person) -> None:
        self._require_row(person)
        self._move(person, "forget")
        self.people.remove(person)
        if person.user_id is not None:
            del self.by_user[type(person.user_id), person.user_id]
        if not person.silent:
            (self.anonymous if person.user_id is None else self.identified).remove(person)
            self.ended += 1

    def end(self, person: Person, reason: str) -> None:
        person.end_reason = reason
        person.user_data = None

    # Walks

    def oldest_first(self, identified: bool, to_the_end: bool) -> Walk:
        self.bounded_walks += not to_the_end
        return Walk(identified, None if to_the_end else next(self._number))

    def close(self, walk: Walk) -> None:
        """A walk that is abandoned instead is under way for ever."""
        self.bounded_walks -= walk.horizon is not None

    def step(self, walk: Walk) -> Person | None:
        for person in self.identified if walk.identified else self.anonymous:
            if person.age > walk.passed and (walk.horizon is None or person.age < walk.horizon):
                walk.passed = person.age
                return person
        return None
