"""`StoreMachine`: compares a store with a dict over random histories.

`Row` is the contract once more, in a few lines; it has nothing that only one engine does.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ...errors import OwnedElsewhereError
from ...stores import Claim, Outcome, Record, Store
from .base import ALREADY, ERASED, FENCED, MISSING, NOT_THERE, SAVED, claims, everything

__all__ = ["OWNERS", "StoreMachine", "machine_test"]

USERS: tuple[int | str, ...] = (1, "1", -5, "é'")
OWNERS = ("a", "b", "c")
Key = tuple[type, "int | str"]


@dataclass
class Row:
    """The contract for one user. `forgotten` says that the store may have removed the row, or kept it."""

    epoch: int = 0
    claimant: str = ""
    released: bool = True
    kept: Record | None = None
    erased: bool = False
    forgotten: bool = True

    @property
    def owner(self) -> str:
        return "" if self.released else self.claimant

    @property
    def version(self) -> int:
        return 0 if self.kept is None else self.kept.version

    def as_stored(self) -> Record | None:
        return None if self.kept is None else self.kept._replace(epoch=self.epoch, owner=self.owner, release=False)

    def expected(self, record: Record) -> set[Outcome]:
        """The verdicts that a record may get; writes it if that is `SAVED`."""
        if self.erased:
            return {ERASED}
        if self.forgotten:
            return {MISSING} if self.epoch == 0 else NOT_THERE
        if (record.epoch, record.owner) != (self.epoch, self.claimant):
            return {FENCED}
        if record.version > self.version:
            if self.released:
                return {FENCED}
            self.kept = record
        if record.version == self.version and record.release:
            self.released = True
        return {SAVED} if record is self.kept else {ALREADY}


class StoreMachine(RuleBasedStateMachine):
    """Random claims, saves, releases, erasures and deaths of owners, compared with a dict after each step.

    Subclass it, override `make` and, if the store is shared, `bury`, and give it to `machine_test`. Each call of `make`
    has to return a store without users: each history begins with none.
    """

    def make(self) -> Store:
        """Make a store, not opened, on a backing without users."""
        raise NotImplementedError

    def bury(self, owner: str) -> None:
        """Make `owner` dead by the store's own rule; `self.runner` runs coroutines."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner: asyncio.Runner = asyncio.Runner()
        self.rows: dict[Key, Row] = {}
        self.dead: set[str] = set()
        self.store: Store = self.make()

    @initialize()
    def open(self) -> None:
        self.runner.run(self.store.open())

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def row(self, user_id: int | str) -> Row:
        return self.rows.setdefault((type(user_id), user_id), Row())

    def owned_by_another(self, row: Row, owner: str) -> bool:
        return self.store.shared and row.owner not in ("", owner) and row.owner not in self.dead

    @rule(users=st.lists(st.sampled_from(USERS), unique_by=repr, max_size=4), owner=st.sampled_from(OWNERS))
    def claim(self, users: list[int | str], owner: str) -> None:
        answers = self.runner.run(claims(self.store, users, owner))
        assert [repr(each.user_id) for each in answers] == [repr(each) for each in users]
        for answer in answers:
            row = self.row(answer.user_id)
            if self.owned_by_another(row, owner):
                assert answer == Claim(answer.user_id, row.epoch, None, row.owner)
                continue
            assert answer.granted
            assert answer.epoch > row.epoch if row.forgotten else answer.epoch == row.epoch + 1
            row.epoch, row.claimant, row.released = answer.epoch, owner, False
            row.erased = row.forgotten = False
            assert answer.record == row.as_stored()

    @rule(
        picks=st.lists(
            st.tuples(
                st.sampled_from(USERS),
                st.sampled_from([0, 0, 0, 0, -1, 1]),
                st.sampled_from([1, 1, 1, 0, -1, 3]),
                st.sampled_from(["its", "its", "its", *OWNERS]),
                st.booleans(),
            ),
            max_size=6,
        )
    )
    def save(self, picks: list[tuple[int | str, int, int, str, bool]]) -> None:
        records: dict[tuple[Key, int, int], Record] = {}
        order = []
        for user_id, by_epoch, by_version, owner, release in picks:
            row = self.row(user_id)
            epoch, version = max(row.epoch + by_epoch, 1), max(row.version + by_version, 1)
            body = b'{"epoch":%d,"version":%d}' % (epoch, version)
            made = Record(
                user_id,
                epoch,
                (row.claimant or "a") if owner == "its" else owner,
                version,
                2,
                body,
                version / 4,
                release,
            )
            # a version stands for one write, so a repeat of it has the same bytes and the same release
            order.append(records.setdefault(((type(user_id), user_id), epoch, version), made))
        verdicts = self.runner.run(self.store.save_many(order))
        assert len(verdicts) == len(order)
        latest: dict[Key, Record] = {}
        for each in sorted(order, key=lambda each: (each.epoch, each.version)):
            latest[type(each.user_id), each.user_id] = each
        allowed = {key: self.rows[key].expected(each) for key, each in latest.items()}
        answered: dict[Key, set[Outcome]] = {}
        for each, verdict in zip(order, verdicts, strict=True):
            key = (type(each.user_id), each.user_id)
            assert verdict.outcome in allowed[key]
            answered.setdefault(key, set()).add(verdict.outcome)
        assert all(len(each) == 1 for each in answered.values())

    @rule(
        picks=st.dictionaries(st.sampled_from(USERS), st.sampled_from([0, 0, 0, -1, 1]), max_size=4),
        owner=st.sampled_from(["its", *OWNERS]),
    )
    def release(self, picks: dict[int | str, int], owner: str) -> None:
        rows = [self.row(user_id) for user_id in picks]
        if owner == "its":
            owner = next((row.claimant for row in rows if row.owner), "a")
        claims = [(user_id, self.row(user_id).epoch + by) for user_id, by in picks.items()]
        were_its = [
            not row.forgotten and row.owner == owner and by == 0 for row, by in zip(rows, picks.values(), strict=True)
        ]
        assert self.runner.run(self.store.release_many(claims, owner)) == were_its
        for row, was_its in zip(rows, were_its, strict=True):
            if was_its:
                row.released = True
                row.forgotten = row.kept is None

    @rule(user_id=st.sampled_from(USERS), owner=st.sampled_from(["", *OWNERS]))
    def erase(self, user_id: int | str, owner: str) -> None:
        row = self.row(user_id)
        if self.owned_by_another(row, owner):
            with pytest.raises(OwnedElsewhereError):
                self.runner.run(self.store.erase(user_id, owner))
            return
        assert self.runner.run(self.store.erase(user_id, owner)) is (row.kept is not None)
        if not row.forgotten:
            row.epoch += 1
            row.released, row.kept, row.erased = True, None, True
        elif row.epoch:
            # If the store had kept the row it now has a tombstone, otherwise nothing. A claim is granted in both cases.
            (again,) = self.runner.run(claims(self.store, [user_id]))
            assert again.granted
            assert again.epoch > row.epoch
            row.epoch, row.claimant, row.released, row.forgotten = again.epoch, "a", False, False

    @precondition(lambda self: self.store.shared)
    @rule(owner=st.sampled_from(OWNERS[:2]))
    def die(self, owner: str) -> None:
        self.dead.add(owner)
        self.bury(owner)

    @rule()
    def open_again(self) -> None:
        self.runner.run(self.store.close())
        self.runner.run(self.store.open())

    @invariant()
    def everything_is_as_the_contract_says(self) -> None:
        if not self.rows:
            return
        expected = {key: row.as_stored() for key, row in self.rows.items()}
        found = self.runner.run(everything(self.store))
        assert found == {key: each for key, each in expected.items() if each is not None}
        for (_, user_id), each in expected.items():
            assert self.runner.run(self.store.load(user_id)) == each


def machine_test(machine: type[StoreMachine], examples: int = 30) -> Any:
    """The test case for a machine: ``TestMine = machine_test(MyMachine)``. CAGEY_TEST_EXAMPLES overrides `examples`."""
    case = machine.TestCase
    case.settings = settings(
        max_examples=int(os.environ.get("CAGEY_TEST_EXAMPLES", examples)), stateful_step_count=30, deadline=None
    )
    return case
