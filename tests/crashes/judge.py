"""Whether a history can be true. What lives here: what is known of each user, and what contradicts it. What must not:
the library, any engine, and how the history came about.

Each user is a register with an epoch and a version. What has ended before something else begins comes first (Herlihy
and Wing, TOPLAS 1990); two that overlap may have happened in either order, unless the epochs say which: a save that was
accepted came before every later claim. By that order no epoch ever falls, what anybody finds is the highest version
before or a later one, and a version, once it has been seen, never has other contents.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .history import Event, is_whole

__all__ = ["Judge", "Violation"]

LOST = "lost"
WENT_BACK = "went back"
EPOCH_FELL = "epoch fell"
TWO_OWNERS = "two owners"
TWO_CONTENTS = "two contents"
INVENTED = "invented"
OF_ANOTHER = "of another"
TORN = "torn"
UNFOUNDED = "unfounded"
AFTER_RELEASE = "after release"
STOLEN = "stolen"
TWO_AT_A_TIME = "two at a time"
NEVER = (2**63, 0)
SLACK = 0.9
"""Of a lease: the engine has a clock of its own."""
EVENTS_KEPT = 200
"""Of each user, to be shown when something is wrong."""
NEAR = 16
"""More calls than one owner has under way at a time."""


class Violation(NamedTuple):
    """Something that cannot have happened to `user` if the promises hold."""

    kind: str
    user: str
    what: str


@dataclass
class _Register:
    """What is known of one user."""

    epoch: int = 0
    """The highest that anything before now has shown."""
    version: int = 0
    released: set[int] = field(default_factory=set)
    """Epochs that are over."""
    let_go: set[int] = field(default_factory=set)
    """Epochs that may be over: somebody has asked for it."""
    owners: dict[int, str] = field(default_factory=dict)
    claimed: set[int] = field(default_factory=set)
    sent: dict[tuple[int, int], int] = field(default_factory=dict)
    """What was asked to be saved, by epoch and version."""
    made: set[tuple[int, int]] = field(default_factory=set)
    """The same, as version and n."""
    contents: dict[int, int] = field(default_factory=dict)
    """What each version is known to be."""
    seen: set[int] = field(default_factory=set)
    """Versions that somebody has found."""
    acknowledged: set[int] = field(default_factory=set)
    highest: dict[int, int] = field(default_factory=dict)
    """By epoch, the highest version that was acknowledged."""
    confirmed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By n, when the store first said that it has it, and as which version."""
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))

    def floor(self, epoch: int) -> int:
        """What somebody has to find who begins now, or at the latest when this epoch began: then it was fenced off."""
        return max([self.version, *(version for earlier, version in self.highest.items() if earlier < epoch)])

    def forget(self) -> None:
        """What is older than what was there when nobody was at work is not heard of again, or is a loss."""
        self.highest.clear()
        self.sent = {key: n for key, n in self.sent.items() if key[1] >= self.version}
        self.made = {key for key in self.made if key[0] >= self.version}
        self.contents = {version: n for version, n in self.contents.items() if version >= self.version}
        self.confirmed = {n: known for n, known in self.confirmed.items() if known[1] >= self.version}


class Judge:
    """Hears histories, and keeps what is wrong with them in `violations`.

    Where owners have a lease, of so many seconds, it is renewed before each claim if a third of it is over.
    """

    def __init__(self, lease: float = 0.0) -> None:
        self._lease = int(lease * 1e9)
        self.violations: list[Violation] = []
        self.lost = 0
        """Versions that were acknowledged, and are not there when somebody looks."""
        self.counts: Counter[str] = Counter()
        self._registers: dict[str, _Register] = {}
        self._loaded: dict[tuple[str, str], int] = {}
        """By owner and user, what the last claim has brought."""

    @property
    def users(self) -> list[str]:
        return list(self._registers)

    @property
    def acknowledged(self) -> int:
        """Versions that the store said it has."""
        return sum(len(register.acknowledged) for register in self._registers.values())

    @property
    def unacknowledged(self) -> int:
        """Versions that somebody has found, and whose writers were never told."""
        return sum(len(register.seen - register.acknowledged) for register in self._registers.values())

    @property
    def take_overs(self) -> int:
        """Claims of users whom another owner had, and had not let go of."""
        return sum(
            bool(_robbed(register, epoch)) for register in self._registers.values() for epoch in register.claimed
        )

    def events_of(self, user: str) -> list[Event]:
        """What was last heard of a user, in the order of time."""
        return list(self._registers[user].events)

    def hear(self, events: Sequence[Event]) -> list[Violation]:
        """Judge events, which may come in any order, but whose writers are all at rest: what is wrong with them.

        Everything that is heard later has begun later.
        """
        before = len(self.violations)
        by_user: dict[str, list[Event]] = {}
        for event in sorted(events, key=lambda event: event.at):
            by_user.setdefault(event.user, []).append(event)
        claims = _claims_by_owner(events)
        for user, theirs in by_user.items():
            register = self._registers.setdefault(user, _Register())
            register.events += theirs
            self._see_facts(register, theirs)
            self._see_turns(theirs)
            self._see_order(register, theirs)
            self._see_promises(register, theirs)
            self._see_thefts(register, theirs, claims)
            register.forget()
            self.counts.update(event.kind for event in theirs)
        return self.violations[before:]

    def _blame(self, kind: str, event: Event, what: str) -> None:
        self.violations.append(Violation(kind, event.user, f"{what}: {describe(event)}"))

    # What is true whenever it happened

    def _see_facts(self, register: _Register, events: list[Event]) -> None:
        for event in events:
            if event.kind == "sent":
                if register.sent.setdefault((event.epoch, event.version), event.n) != event.n:
                    self._blame(TWO_CONTENTS, event, "one version of an epoch was sent twice, with different data")
                register.made.add((event.version, event.n))
            if event.kind == "releasing" or event.release:
                register.let_go.add(event.epoch)
        for event in events:
            if event.kind == "claimed":
                if event.epoch in register.claimed:
                    self._blame(TWO_OWNERS, event, "one epoch was granted twice")
                register.claimed.add(event.epoch)
            if event.kind in ("claimed", "refused") or (event.kind == "read" and event.owner):
                self._see_owner(register, event)
        for event in events:
            if event.kind in ("sent", "saved", "repeated", "releasing", "released"):
                if event.epoch not in register.claimed:
                    self._blame(TWO_OWNERS, event, "under an epoch that was granted to nobody")
                self._see_owner(register, event)
            if event.kind in ("claimed", "read"):
                self._see_found(register, event)
            elif event.kind in ("saved", "repeated"):
                register.acknowledged.add(event.version)
                register.highest[event.epoch] = max(event.version, register.highest.get(event.epoch, 0))
                if (event.version, event.n) not in register.made:
                    self._blame(INVENTED, event, "acknowledged, and never sent")
                # of a repeat that comes late a later version is there, and this one perhaps never was
                self._see_content(register, event)
            if event.kind in ("saved", "repeated", "claimed") and event.version:
                register.confirmed.setdefault(event.n, (event.at, event.version))

    def _see_owner(self, register: _Register, event: Event) -> None:
        if register.owners.setdefault(event.epoch, event.owner) != event.owner:
            self._blame(TWO_OWNERS, event, f"this epoch is of {register.owners[event.epoch]}")

    def _see_found(self, register: _Register, event: Event) -> None:
        """Data that somebody has found in the store."""
        if not event.version:
            if event.data is not None:
                self._blame(INVENTED, event, "data without a version")
            return
        register.seen.add(event.version)
        if not is_whole(event.data):
            self._blame(TORN, event, f"this is not of one moment ({event.data!r:.200})")
        elif event.data["of"] != event.user:
            self._blame(OF_ANOTHER, event, f"the data of {event.data['of']}")
        elif (event.version, event.n) not in register.made:
            self._blame(INVENTED, event, "nobody has sent this as this version")
        self._see_content(register, event)

    def _see_content(self, register: _Register, event: Event) -> None:
        if register.contents.setdefault(event.version, event.n) != event.n:
            self._blame(TWO_CONTENTS, event, f"this version has been {register.contents[event.version]} before")

    def _see_turns(self, events: list[Event]) -> None:
        under_way: set[str] = set()
        for event in events:
            if event.kind == "sent":
                if event.owner in under_way:
                    self._blame(TWO_AT_A_TIME, event, "another save of the same user is under way")
                under_way.add(event.owner)
            elif event.kind in ("saved", "repeated", "fenced", "failed"):
                under_way.discard(event.owner)

    # What follows from the order of time

    def _see_order(self, register: _Register, events: list[Event]) -> None:
        points = []
        for event in events:
            if event.kind in ("saved", "repeated", "claimed", "refused", "released", "read"):
                # what begins when something else ends is taken to overlap it
                points += [(event.began, 0, event), (event.at, 1, event)]
        for _, is_end, event in sorted(points, key=lambda point: point[:2]):
            if is_end:
                self._see_end(register, event)
            else:
                self._see_beginning(register, event)

    def _see_beginning(self, register: _Register, event: Event) -> None:
        """Whether an event fits to everything that has ended before it began."""
        kind, is_there = event.kind, event.epoch > 0
        if is_there and (event.epoch < register.epoch or (kind == "claimed" and event.epoch == register.epoch)):
            self._blame(EPOCH_FELL, event, f"epoch {register.epoch} came before")
        if kind in ("claimed", "read") and event.version < (floor := register.floor(event.epoch)):
            lost = sum(event.version < version <= floor for version in register.acknowledged)
            self.lost += lost
            said = "acknowledged" if floor in register.acknowledged else "found"
            self._blame(LOST, event, f"version {floor} was {said} before, {lost} acknowledged ones are gone")
            register.version = event.version  # once is enough
            register.highest.clear()
        if kind == "saved" and event.version <= register.version:
            self._blame(WENT_BACK, event, f"version {register.version} came before")
        if kind == "saved" and event.epoch in register.released:
            self._blame(AFTER_RELEASE, event, "the user had been let go of under this epoch")

    def _see_end(self, register: _Register, event: Event) -> None:
        register.epoch = max(register.epoch, event.epoch)
        if event.kind != "refused":
            register.version = max(register.version, event.version)
        if event.kind == "released" or (event.release and event.kind in ("saved", "repeated")):
            register.released.add(event.epoch)

    # What the leases say

    def _see_thefts(self, register: _Register, events: list[Event], claims: dict[str, list[tuple[int, int]]]) -> None:
        for event in events:
            owner = _robbed(register, event.epoch) if event.kind == "claimed" else ""
            earlier = claims.get(owner, [])
            place = bisect_right(earlier, (event.began, 0))
            if not place or not self._lease:
                continue
            # two thirds of a lease were left then, and an owner in doubt has another third
            held_since = max(began for _, began in earlier[:place][-NEAR:])
            if event.at < held_since + SLACK * self._lease:
                self._blame(STOLEN, event, f"{owner} had a lease, it has claimed somebody at {held_since / 1e9:.6f}")

    # What the program was told

    def _see_promises(self, register: _Register, events: list[Event]) -> None:
        for event in events:
            if event.kind == "claimed":
                self._loaded[event.owner, event.user] = event.n
            elif event.kind == "login" and self._loaded.get((event.owner, event.user), event.n) != event.n:
                self._blame(LOST, event, f"the claim had brought {self._loaded[event.owner, event.user]}")
            elif event.kind in ("receipt", "left") and register.confirmed.get(event.n, NEVER)[0] > event.at:
                self._blame(UNFOUNDED, event, "the program was told so, and the store had not said so")
            elif event.kind == "receipt" and register.contents.get(event.version) != event.n:
                self._blame(UNFOUNDED, event, f"this version is {register.contents.get(event.version)}")


def _robbed(register: _Register, epoch: int) -> str:
    """From whom the owner of an epoch took the user over, who had not let go of it; empty if from nobody."""
    before = register.owners.get(epoch - 1, "")
    if not before or before == register.owners.get(epoch) or epoch - 1 in register.let_go:
        return ""
    return before


def _claims_by_owner(events: Sequence[Event]) -> dict[str, list[tuple[int, int]]]:
    """When the calls of each owner for a claim had their answers, in order, and when they began."""
    calls: dict[str, set[tuple[int, int]]] = {}
    for event in events:
        if event.kind in ("claimed", "refused"):
            calls.setdefault(event.data if event.kind == "refused" else event.owner, set()).add((event.at, event.began))
    return {owner: sorted(theirs) for owner, theirs in calls.items()}


def describe(event: Event) -> str:
    """An event in one line, with times in seconds."""
    took = f"{event.began / 1e9:.6f}..{event.at / 1e9:.6f}"
    let_go = ", let go of" if event.release else ""
    what = f"{event.user} epoch {event.epoch} version {event.version} n {event.n}{let_go}"
    return f"{took} {event.kind} {what} {event.owner}".rstrip()
