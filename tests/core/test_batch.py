"""Saves in batches: whatever happens, they are what saving one session after the other comes to.

Two tables live through the same history. One takes, fixes and settles its saves in batches, and one by one what a batch
leaves over; the other does all of it one by one.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cagey_sessions import EncodingError, Session, UsageError
from cagey_sessions._core import Digest, SaveBatch, SaveBatches, SessionTable, encode_plain
from cagey_sessions.stores import Outcome, Record, Verdict

KEY = bytes(range(16))
INTERVAL = 10
USERS = 4


class OneByOne:
    """A table, and the engine's way with one session."""

    def __init__(self) -> None:
        self.table = SessionTable(Session, None, seed=1, stored=True)
        self.sessions: list[Any] = []
        self.digest = Digest(KEY)
        self.flying: dict[Any, tuple[int, int]] = {}  # the version, and when it was taken

    def fix(self, session: Any, version: int, now: int) -> tuple[Any, ...] | None:
        """What is sent of a session that was taken; None if there is nothing to send."""
        try:
            body = encode_plain(session.user_data)
        except EncodingError:
            self.table.fail(session, version, now + 1)
            return None
        fixed = self.table.fix(session, self.digest(body))
        if not fixed:
            self.table.acknowledge(session, version, now, self.table.due_after(session, now, INTERVAL))
            return None
        self.flying[session] = fixed, now
        return session.user_id, self.table.epoch(session), "me", fixed, 7, body, 0.5, False

    def settle(self, session: Any, outcome: Outcome) -> None:
        version, taken_at = self.flying.pop(session)
        if outcome is Outcome.FAILED:
            self.table.fail(session, version, taken_at + 1)
        else:
            self.table.acknowledge(session, version, taken_at, self.table.due_after(session, taken_at, INTERVAL))


def state_of(table: SessionTable, session: Any) -> tuple[Any, ...]:
    if table.state(session) == "gone":
        return ("gone",)
    return (
        table.state(session),
        table.versions(session),
        table.saved_at(session),
        table.failures(session),
        table.stored(session),
        table.is_marked(session),
    )


class Batches(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now = 0
        self.plain, self.batched = OneByOne(), OneByOne()
        self.batches = SaveBatches(
            self.batched.table,
            self.batched.digest,
            record=Record,
            verdict=Verdict,
            saved=(Outcome.SAVED, Outcome.ALREADY),
            owner="me",
            schema=7,
        )
        self.under_way: list[SaveBatch] = []
        for side in (self.plain, self.batched):
            for user in range(USERS):
                session = side.table.create()
                side.table.identify(session, user, {"n": 0}, 0, INTERVAL)
                side.table.own(session, 1)
                side.sessions.append(session)

    def both(self, user: int) -> list[tuple[OneByOne, Any]]:
        return [(side, side.sessions[user]) for side in (self.plain, self.batched)]

    @rule(user=st.integers(0, USERS - 1), value=st.sampled_from([0, 1, 2, {1}]), marks=st.booleans())
    def change(self, user: int, value: object, marks: bool) -> None:
        for side, session in self.both(user):
            if side.table.state(session) != "gone":
                session.user_data["n"] = value
                if marks:
                    session.mark_changed()

    @rule(user=st.integers(0, USERS - 1))
    def ask(self, user: int) -> None:
        for side, session in self.both(user):
            if side.table.state(session) in ("saving", "idle"):
                side.table.ask(session)

    @rule(user=st.integers(0, USERS - 1))
    def begin_end(self, user: int) -> None:
        for side, session in self.both(user):
            if side.table.state(session) != "gone" and not side.table.is_ending(session):
                side.table.begin_end(session)

    @rule(user=st.integers(0, USERS - 1))
    def forget(self, user: int) -> None:
        for side, session in self.both(user):
            if side.table.is_ending(session) and side.table.state(session) != "gone":
                side.table.forget(session)

    @rule(ticks=st.integers(1, INTERVAL))
    def pass_time(self, ticks: int) -> None:
        self.now += ticks
        for side in (self.plain, self.batched):
            side.table.advance(self.now, 1000)

    @rule(outcome=st.sampled_from([Outcome.SAVED, Outcome.SAVED, Outcome.FAILED]))
    def save_those_asked_for(self, outcome: Outcome) -> None:
        """One by one on both sides: no batch takes them."""
        while self.plain.table.has_due(False):
            for side in (self.plain, self.batched):
                session, version = side.table.take(False)
                if side.fix(session, version, self.now):
                    side.settle(session, outcome)

    @rule(rows=st.integers(1, USERS))
    def save(self, rows: int) -> None:
        """Those whose time has come, as long as nobody among them has failed before."""
        self.save_those_asked_for(Outcome.SAVED)
        batch = self.batches.batch()
        taken = batch.fill(rows, 10_000, self.now, INTERVAL, 0.5)
        expected = []
        for _ in range(taken):
            session, version = self.plain.table.take()
            assert self.plain.table.failures(session) == 0
            if record := self.plain.fix(session, version, self.now):
                expected.append(record)
        odd = [self.batched.fix(session, version, self.now) for session, version in batch.left_out()]
        assert odd == [None] * len(odd), "what cannot be encoded"
        assert batch.records == expected
        assert all(type(each) is Record for each in batch.records)
        if taken < rows and self.plain.table.has_due():
            (session, version) = self.plain.table.take()
            assert self.plain.table.failures(session) > 0
            self.plain.table.fail(session, version, self.now + 1)
            self.batched.table.fail(*self.batched.table.take(), self.now + 1)
        self.under_way.append(batch)

    @precondition(lambda self: self.under_way)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([Outcome.SAVED, Outcome.SAVED, Outcome.ALREADY, Outcome.FAILED]),
        watches=st.booleans(),
    )
    def settle(self, data: st.DataObject, outcome: Outcome, watches: bool) -> None:
        batch = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        sessions = batch.under_way()
        places = {session.user_id: place for place, session in enumerate(self.batched.sessions)}
        users = [places[session.user_id] for session in sessions]
        watched = dict.fromkeys(sessions[:1]) if watches else {}
        verdicts = [Verdict(Outcome.SAVED)] * (len(batch.records) - 1) + [Verdict(outcome)]
        left = batch.settle(verdicts[: len(batch.records)], INTERVAL, watched)
        if outcome is Outcome.FAILED and batch.records:
            assert left is None
            assert len(batch) == len(sessions)
        else:
            assert left is not None
            assert set(watched) <= {*left} | {each for each in sessions if self.batched.table.state(each) == "gone"}
        for session, version, digest, place in batch.hand_over():
            verdict = verdicts[place]
            assert batch.records[place].version == version
            assert digest == 0 or digest == self.batched.digest(batch.records[place].body)
            taken_at = self.plain.flying[self.plain.sessions[places[session.user_id]]][1]
            if verdict.outcome is Outcome.FAILED:
                self.batched.table.fail(session, version, taken_at + 1)
            else:
                again = self.batched.table.due_after(session, taken_at, INTERVAL)
                self.batched.table.acknowledge(session, version, taken_at, again)
        assert len(batch) == 0
        # in the same order: who is due at the same tick is taken in it
        handed = [] if left == [] else [places[session.user_id] for session in (sessions if left is None else left)]
        for user in [*(user for user in users if user not in handed), *handed]:
            self.plain.settle(self.plain.sessions[user], verdicts[users.index(user)].outcome)

    @invariant()
    def they_are_alike(self) -> None:
        for one, other in zip(self.plain.sessions, self.batched.sessions, strict=True):
            assert state_of(self.plain.table, one) == state_of(self.batched.table, other)
        for name in ("saved", "failed", "due", "in_flight", "ended", "identified"):
            assert getattr(self.plain.table.counters, name) == getattr(self.batched.table.counters, name)
        assert self.plain.table.armed == self.batched.table.armed
        assert self.plain.table.next_deadline() == self.batched.table.next_deadline()
        self.batched.table._check()


TestBatches = Batches.TestCase
TestBatches.settings = settings(TestBatches.settings, stateful_step_count=60)


class Due:
    """Sessions that are all due now, and the batches of their table."""

    def __init__(self, number: int, **options: Any) -> None:
        self.table = SessionTable(Session, None, seed=1, stored=True)
        self.sessions = [self.table.create() for _ in range(number)]
        for user, session in enumerate(self.sessions):
            self.table.identify(session, user, {"n": user}, 0, 1)
        self.table.advance(1, 1000)
        self.batches = SaveBatches(
            self.table,
            Digest(KEY),
            record=Record,
            verdict=Verdict,
            saved=(Outcome.SAVED, Outcome.ALREADY),
            owner="me",
            schema=7,
            **options,
        )


def test_a_batch_stops_at_its_rows_and_at_its_bytes():
    due = Due(5)
    batch = due.batches.batch()
    assert batch.fill(2, 1000, 1, 9, 0.0) == 2
    assert batch.fill(9, 1, 1, 9, 0.0) == 1, "the body that goes over it is the last"
    assert (len(batch), batch.size) == (3, 3 * len(b'{"n":0}'))
    assert batch.fill(9, 1000, 1, 9, 0.0) == 2
    assert batch.fill(9, 1000, 1, 9, 0.0) == 0
    assert set(batch.under_way()) == set(due.sessions)


class Player:
    def __init__(self) -> None:
        self.bag: list[Any] = ["rope", 1, None]
        self.place: dict[str, Any] = {}


SHAPES = {
    "lists": [[], [[]], [[1, [2, [3, [4]]]], {}]],
    "a list longer than what is looked ahead at": [[str(n)] for n in range(3000)],
    "a dict larger than that": {str(n): {} for n in range(3000)},
    "a dict that shares its keys": vars(Player()),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_what_is_looked_ahead_at_is_sent_as_it_is(shape):
    due = Due(40)
    for session in due.sessions:
        session.user_data["shape"] = shape
    batch = due.batches.batch()
    assert batch.fill(40, 1 << 30, 1, 9, 0.0) == 40
    assert {record.user_id: record.value() for record in batch.records} == {
        user: {"n": user, "shape": shape} for user in range(40)
    }


def test_data_without_keys_are_looked_ahead_at_too():
    due = Due(2)
    due.sessions[0].user_data, due.sessions[1].user_data = [], ["rope", []]
    batch = due.batches.batch()
    assert batch.fill(2, 1000, 1, 9, 0.0) == 2
    assert sorted(record.body for record in batch.records) == [b'["rope",[]]', b"[]"]


def test_a_batch_stops_before_whoever_has_failed():
    due = Due(3)
    failed, version = due.table.take()
    due.table.fail(failed, version, 2)
    due.table.advance(2, 100)
    batch = due.batches.batch()
    assert batch.fill(9, 1000, 2, 9, 0.0) == 2
    assert failed not in batch.under_way()
    assert not due.batches.has_due()


def test_a_session_that_somebody_waits_for_is_left_to_be_handed_over():
    due = Due(3)
    batch = due.batches.batch()
    batch.fill(3, 1000, 1, 9, 0.0)
    waited_for, asked, nobody = batch.under_way()
    due.table.ask(asked)
    assert batch.settle([Verdict(Outcome.SAVED)] * 3, 9, {waited_for: None}) == [waited_for, asked]
    assert (due.table.state(waited_for), due.table.state(nobody)) == ("saving", "idle")
    assert [session for session, *_ in batch.hand_over()] == [waited_for, asked]


def test_what_an_encoder_does_meanwhile_is_seen():
    def dump(data: Any) -> bytes:
        session = due.sessions[data["n"]]
        match data["n"]:
            case 0:
                due.table.ask(session)
            case 1:
                due.table.begin_end(session)
            case 2:
                due.table.begin_end(session)
                due.table.forget(session)
            case 3:
                raise ValueError("no")
            case 4:
                for _ in range(1000):
                    due.table.create()  # the rows move to another place in memory
        return b"{}"

    due = Due(6, dump=dump)
    batch = due.batches.batch()
    assert batch.fill(6, 1000, 1, 9, 0.0) == 6
    assert {session.user_id for session, _ in batch.left_out()} == {0, 1, 3}
    assert {record.user_id for record in batch.records} == {4, 5}
    assert batch.settle([Verdict(Outcome.SAVED)] * 2, 9, {}) == []
    assert due.table.counters.in_flight == 3
    due.table._check()


def test_an_encoder_that_is_interrupted_loses_nobody():
    def dump(data: Any) -> bytes:
        raise KeyboardInterrupt

    due = Due(2, dump=dump)
    batch = due.batches.batch()
    with pytest.raises(KeyboardInterrupt):
        batch.fill(2, 1000, 1, 9, 0.0)
    assert len(batch.left_out()) == due.table.counters.in_flight == 1


@pytest.mark.parametrize("verdicts", [[], [None], [("saved",)], [Verdict("saved-ish")], [Verdict(Outcome.SAVED)] * 2])
def test_a_batch_settles_nobody_on_a_verdict_that_does_not_say_saved(verdicts):
    due = Due(1)
    batch = due.batches.batch()
    batch.fill(1, 1000, 1, 9, 0.0)
    assert batch.settle(verdicts, 9, {}) is None
    assert len(batch) == 1
    assert due.table.state(due.sessions[0]) == "saving"


def test_batches_are_made_by_their_plan_and_of_named_tuples():
    with pytest.raises(UsageError):
        SaveBatch()
    with pytest.raises(UsageError):
        SaveBatches(
            SessionTable(Session, None, stored=True),
            Digest(KEY),
            record=dict,
            verdict=Verdict,
            saved=(),
            owner="",
            schema=0,
        )
    with pytest.raises(UsageError, match="without a store"):
        SaveBatches(
            SessionTable(Session, None), Digest(KEY), record=Record, verdict=Verdict, saved=(), owner="", schema=0
        )
