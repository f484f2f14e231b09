"""The judge of histories that were made up: it finds each thing that must not happen, and nothing else."""

from __future__ import annotations

import pytest

from crashes.history import Event, Pen, read_history, state
from crashes.judge import Judge, Violation

SECOND = 1_000_000_000


class Tale:
    """A history of one user that is made up as it is told: each thing takes a tick, and comes after the one before."""

    def __init__(self, user: str = "alice") -> None:
        self.user = user
        self.now = 0
        self.events: list[Event] = []

    def tell(self, kind, epoch=0, owner="", version=0, n=0, *, release=False, data=None, began=None, at=None):
        self.now += SECOND
        began, at = self.now if began is None else began, self.now + SECOND // 2 if at is None else at
        self.events.append(Event(kind, began, at, self.user, epoch, owner, version, n, release, data))
        return self

    def claim(self, epoch, owner, version=0, n=0, **rest):
        return self.tell("claimed", epoch, owner, version, n, data=self.data(version, n), **rest)

    def read(self, epoch, owner, version=0, n=0, **rest):
        rest.setdefault("data", self.data(version, n))
        return self.tell("read", epoch, owner, version, n, **rest)

    def send(self, epoch, owner, version, n, **rest):
        return self.tell("sent", epoch, owner, version, n, **rest)

    def save(self, epoch, owner, version, n, **rest):
        return self.send(epoch, owner, version, n, **rest).tell("saved", epoch, owner, version, n, **rest)

    def data(self, version, n):
        return state(self.user, n, "text") if version else None


def judged(tale: Tale, lease: float = 0) -> Judge:
    judge = Judge(lease)
    judge.hear(tale.events)
    return judge


def kinds(tale: Tale, lease: float = 0) -> list[str]:
    return [violation.kind for violation in judged(tale, lease).violations]


def begun() -> Tale:
    """A has the user, and has saved twice."""
    return Tale().claim(1, "A").save(1, "A", 1, 11).save(1, "A", 2, 12)


def a_good_one() -> Tale:
    """Two owners, a kill, a take-over, a release, a late save that is fenced off, and no violation."""
    tale = begun().tell("login", owner="A", n=0).tell("receipt", owner="A", version=2, n=12)
    tale.send(1, "A", 3, 13)  # applied, and never acknowledged: A is killed
    tale.tell("refused", 1, "A", data="B").read(1, "A", 3, 13).claim(2, "B", 3, 13).tell("login", owner="B", n=13)
    tale.tell("fenced", 1, "A", 4, 14).save(2, "B", 4, 21).tell("repeated", 2, "B", 4, 21)
    tale.save(2, "B", 5, 22, release=True).tell("left", owner="B", n=22).read(2, "", 5, 22, release=True)
    tale.claim(3, "C", 5, 22).tell("releasing", 3, "C").tell("released", 3, "C").read(3, "", 5, 22, release=True)
    return tale


def test_what_is_right_is_found_to_be_right():
    judge = judged(a_good_one(), lease=1)
    assert judge.violations == []
    assert judge.acknowledged == 4
    assert judge.unacknowledged == 1
    assert judge.take_overs == 1
    assert judge.lost == 0


def test_it_is_the_same_in_portions():
    judge, events = Judge(1), a_good_one().events
    for event in events:
        judge.hear([event])
    assert judge.violations == []
    assert (judge.acknowledged, judge.unacknowledged, judge.take_overs) == (4, 1, 1)
    assert judge.events_of("alice") == events


@pytest.mark.parametrize("found", [(1, "A", 1, 11), (0, "", 0, 0)], ids=["an older version", "no row"])
def test_an_acknowledged_version_that_is_not_there_is_lost(found):
    judge = judged(begun().read(*found))
    assert [violation.kind for violation in judge.violations] == ["lost"]
    assert judge.lost == (2 if not found[0] else 1)


def test_an_acknowledged_version_that_the_next_claim_does_not_bring_is_lost():
    assert kinds(begun().claim(2, "B", 1, 11)) == ["lost"]
    assert kinds(begun().claim(2, "B")) == ["lost"]


def test_what_somebody_has_seen_is_not_taken_back_even_if_nobody_was_told():
    assert kinds(begun().send(1, "A", 3, 13).read(1, "A", 3, 13).read(1, "A", 2, 12)) == ["lost"]


def test_a_loss_is_told_once():
    assert kinds(begun().read(1, "A", 1, 11).read(1, "A", 1, 11)) == ["lost"]


def test_what_overlaps_may_have_come_in_either_order():
    tale = begun().send(1, "A", 3, 13)
    long = {"began": tale.now, "at": tale.now + 10 * SECOND}
    tale.tell("saved", 1, "A", 3, 13, **long).read(1, "A", 2, 12).read(1, "A", 3, 13)
    assert kinds(tale) == []


def test_an_accepted_save_came_before_every_later_claim_even_if_they_overlap():
    for kind, found in (("saved", ["lost"]), ("fenced", [])):
        tale = begun().send(1, "A", 3, 13)
        tale.tell(kind, 1, "A", 3, 13, began=tale.now, at=tale.now + 10 * SECOND).claim(2, "B", 2, 12)
        judge = judged(tale)
        assert [violation.kind for violation in judge.violations] == found
        assert judge.lost == len(found)


def test_an_older_version_that_is_written_over_a_newer_one_is_found():
    tale = begun().claim(2, "B", 2, 12).save(2, "B", 3, 21)
    assert "went back" in kinds(tale.save(2, "B", 2, 12))


def test_a_save_of_an_owner_who_has_lost_the_user_is_found():
    tale = begun().claim(2, "B", 2, 12)
    assert kinds(tale.save(1, "A", 3, 13)) == ["lost", "epoch fell"], "its claim did not bring what A saved later"
    assert kinds(begun().claim(2, "B", 2, 12).tell("repeated", 1, "A", 2, 12)) == ["epoch fell"]


def test_a_release_by_an_owner_who_has_lost_the_user_is_found():
    assert kinds(begun().claim(2, "B", 2, 12).tell("released", 1, "A")) == ["epoch fell"]


def test_an_epoch_that_falls_is_found_whoever_sees_it():
    high = begun().claim(5, "B", 2, 12)
    assert kinds(high.read(4, "", 2, 12)) == ["epoch fell"]
    assert "epoch fell" in kinds(begun().claim(5, "B", 2, 12).claim(4, "C", 2, 12))
    assert kinds(begun().claim(5, "B", 2, 12).tell("refused", 4, "C", data="D")) == ["epoch fell"]


def test_one_epoch_for_two_owners_is_found():
    assert "two owners" in kinds(begun().claim(1, "B", 2, 12))
    assert "two owners" in kinds(begun().read(1, "B", 2, 12))
    assert "two owners" in kinds(begun().tell("refused", 1, "B", data="C"))
    assert "two owners" in kinds(begun().save(1, "B", 3, 21))


def test_one_epoch_that_is_granted_to_one_owner_twice_is_found():
    assert "two owners" in kinds(begun().claim(1, "A", 2, 12))


def test_a_save_without_a_claim_is_found():
    assert "two owners" in kinds(begun().save(2, "A", 3, 13))


def test_one_version_with_two_contents_is_found():
    sent = begun().send(1, "A", 3, 13).tell("failed", 1, "A", 3, 13).send(1, "A", 3, 14)
    assert kinds(sent) == ["two contents"]
    seen = begun().send(1, "A", 3, 13).read(1, "A", 3, 13).claim(2, "B", 3, 13)
    assert "two contents" in kinds(seen.save(2, "B", 3, 21))


def test_data_of_another_user_is_found_in_a_row_and_in_a_claim():
    other = state("bob", 12, "text")
    assert kinds(begun().read(1, "A", 2, 12, data=other)) == ["of another"]
    tale = begun()
    tale.tell("claimed", 2, "B", 2, 12, data=other)
    assert kinds(tale) == ["of another"]


@pytest.mark.parametrize(
    "torn",
    [
        state("alice", 12, "text") | {"twice": 23},
        state("alice", 12, "text") | {"text": "other"},
        {"n": 12},
        "'{\"n\": 12'",
        None,
        [],
    ],
)
def test_torn_data_is_found(torn):
    assert "torn" in kinds(begun().read(1, "A", 2, 12, data=torn))


def test_data_that_nobody_has_sent_is_found():
    assert kinds(begun().read(1, "A", 3, 13)) == ["invented"]
    assert kinds(begun().tell("saved", 1, "A", 3, 13)) == ["invented"]
    assert kinds(Tale().read(1, "A", 0, 0, data=state("alice", 0, ""))) == ["invented"]


def test_a_promise_to_the_program_without_an_answer_of_the_store_is_found():
    for kind in ("receipt", "left"):
        tale = begun().send(1, "A", 3, 13).tell(kind, owner="A", version=3, n=13)
        assert "unfounded" in kinds(tale)
        assert "unfounded" in kinds(tale.tell("saved", 1, "A", 3, 13)), "an answer that comes later does not help"


def test_a_receipt_for_another_version_is_found():
    assert kinds(begun().tell("receipt", owner="A", version=1, n=12)) == ["unfounded"]


def test_a_session_that_begins_with_something_older_than_its_claim_is_found():
    assert kinds(begun().claim(2, "B", 2, 12).tell("login", owner="B", n=11)) == ["lost"]


def test_a_save_after_the_release_is_found():
    assert kinds(begun().save(1, "A", 3, 13, release=True).save(1, "A", 4, 14)) == ["after release"]
    released = begun().tell("releasing", 1, "A").tell("released", 1, "A")
    assert kinds(released.save(1, "A", 3, 13)) == ["after release"]


def test_a_user_who_is_taken_from_an_owner_with_a_lease_is_found():
    asked = Tale("bob")
    asked.now = 10 * SECOND
    asked.tell("refused", 7, "B", data="A")
    robbed = begun().claim(2, "C", 2, 12, began=12 * SECOND, at=13 * SECOND)
    for lease, found in ((10, ["stolen"]), (2, [])):
        judge = Judge(lease)
        judge.hear(asked.events + robbed.events)
        assert [violation.kind for violation in judge.violations] == found
    assert kinds(begun().claim(2, "C", 2, 12), lease=1) == []
    let_go = begun().tell("releasing", 1, "A")
    assert kinds(let_go.claim(2, "C", 2, 12), lease=10) == []


def test_two_saves_of_a_user_at_a_time_are_found():
    twice = begun().send(1, "A", 3, 13).send(1, "A", 4, 14)
    assert kinds(twice) == ["two at a time"]
    for kind in ("saved", "fenced", "failed"):
        assert kinds(begun().send(1, "A", 3, 13).tell(kind, 1, "A", 3, 13).send(1, "A", 4, 14)) == []
    assert kinds(begun().send(1, "A", 3, 13).claim(2, "B", 2, 12).send(2, "B", 3, 21)) == [], "A has been killed"


def test_users_are_judged_apart():
    judge = Judge()
    assert judge.hear(begun().events + Tale("bob").claim(1, "A").save(1, "A", 1, 11).events) == []
    assert judge.hear([Event("read", 100 * SECOND, 101 * SECOND, "bob", 0, "", 0, 0)]) == [judge.violations[0]]
    assert [violation.user for violation in judge.violations] == ["bob"]
    assert isinstance(judge.violations[0], Violation)
    assert sorted(judge.users) == ["alice", "bob"]


def test_what_was_told_is_read_but_for_a_line_that_was_cut(tmp_path):
    path = tmp_path / "history"
    events = a_good_one().events
    pen = Pen(path)
    pen.tell(events)
    pen.close()
    assert read_history(path) == events
    path.write_bytes(path.read_bytes()[:-1])
    assert read_history(path) == events[:-1]
