"""The indexes of keys and users, where hashes collide and entries lie around the end of the array."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cagey_sessions import KeyTakenError, Session, UserActiveError
from cagey_sessions._core import SessionTable

SEED = 7
MASK = 2**64 - 1
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LARGEST = 2**61 - 2
"""The hash of an int up to here is the int."""


def unshift(number: int, shift: int) -> int:
    """The number that, with itself moved to the right taken from it, is this one."""
    result = number
    while number := number >> shift:
        result ^= number
    return result


def mixed(number: int) -> int:
    number = (number ^ number >> 30) * FIRST & MASK
    number = (number ^ number >> 27) * SECOND & MASK
    return number ^ number >> 31


def unmixed(number: int) -> int:
    number = unshift(number, 31) * pow(SECOND, -1, 2**64) & MASK
    number = unshift(number, 27) * pow(FIRST, -1, 2**64) & MASK
    return unshift(number, 30)


def users_of(hashes: list[int], count: int) -> list[int]:
    """Users for each of these hashes of 32 bits, as the index of a table with this seed counts them."""
    salt, chance = mixed(SEED), random.Random(1)
    users = []
    for hash_ in hashes:
        found: set[int] = set()
        while len(found) < count:
            number = unmixed(hash_ << 32 | chance.getrandbits(32)) ^ salt
            number -= (number >> 63) << 64
            if -LARGEST <= number <= LARGEST and number not in (-1, 0):
                found.add(number)
        users += sorted(found)
    return users


HASHES = {
    "one hash": [5],
    "one home": [5 | number << 20 for number in range(8)],
    "around the end": [62, 63, 0, 1, 0xFFFFFFFF, 0xFFFFFFFE, 62 | 1 << 30, 1 << 30],
    "homes one after the other": list(range(24)),
}


def test_a_session_that_is_ending_is_not_found_by_its_key_and_its_key_is_free():
    """And when it is forgotten, whoever has the key by then keeps it."""
    table = SessionTable(Session, None, seed=SEED)
    ending = table.create("key")
    table.begin_end(ending)
    assert table.find_by_key("key") is None
    newer = table.create("key")
    assert table.find_by_key("key") is newer
    table.forget(ending)
    assert table.find_by_key("key") is newer


def test_the_hashes_are_what_the_tests_take_them_for():
    assert mixed(unmixed(12345)) == 12345
    salt = mixed(SEED)
    for user_id in users_of([5, 0xFFFFFFFF], 3):
        assert mixed(hash(user_id) & MASK ^ salt) >> 32 in (5, 0xFFFFFFFF)


@pytest.mark.parametrize("hashes", HASHES.values(), ids=HASHES)
@pytest.mark.parametrize("at_most", [20, 46, 200], ids=["few", "as full as it gets", "growing"])
def test_users_whose_hashes_collide_are_told_apart(hashes, at_most):
    """Whoever comes and goes, each is found exactly while they are there: a removal moves what lies behind it."""
    table = SessionTable(Session, None, seed=SEED)
    users = users_of(hashes, 240 // len(hashes))
    chance = random.Random(at_most)
    there: dict[int, Any] = {}
    for step in range(3000):
        user_id = chance.choice(users)
        if user_id in there:
            with pytest.raises(UserActiveError):
                table.identify(table.create(), user_id, {}, 0)
            session = there.pop(user_id)
            table.begin_end(session)
            table.forget(session)
        elif len(there) < at_most:
            there[user_id] = session = table.create()
            table.identify(session, user_id, {}, 0)
        if step % 50 == 0:
            assert all(table.active_session(each) is there.get(each) for each in users)
    assert all(table.active_session(each) is there.get(each) for each in users)
    table._check()


def test_keys_come_and_go_while_the_index_is_as_full_as_it_gets():
    table = SessionTable(Session, None, seed=SEED)
    keys = [f"key {number}" for number in range(96)]
    chance = random.Random(2)
    there: dict[str, Any] = {}
    for step in range(20_000):
        key = chance.choice(keys)
        if key in there:
            with pytest.raises(KeyTakenError):
                table.create(key)
            session = there.pop(key)
            table.begin_end(session)
            table.forget(session)
        elif len(there) < 46:
            there[key] = table.create(key)
        if step % 100 == 0:
            assert all(table.find_by_key(each) is there.get(each) for each in keys)
    table._check()
