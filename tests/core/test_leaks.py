"""Whether the leak scripts leave out an operation of the core, and whether they would find a leak. What must not be
here: running them all (`make check-core`).
"""

from __future__ import annotations

import ctypes
import os

import pytest

from cagey_sessions import _core
from corecheck import leaks, operations
from corecheck.operations import OPERATIONS, World

weighing = pytest.mark.skipif(
    os.environ.get("PYTHONMALLOC") == "malloc", reason="a sanitizer's allocator counts nothing and keeps what is freed"
)

operations.a_loop()  # before a test counts the descriptors that are open

BASES = ("SessionRows", "SessionLanes")
"""Whose operations are those of `SessionTable`."""


def public_names() -> set[str]:
    names = set()
    for name, value in vars(_core).items():
        if getattr(value, "__module__", None) != _core.__name__ or name.startswith("_"):
            continue
        if name in BASES:
            continue
        names.add(name)
        if name in ("SessionCore", "SessionTable", "OldestFirst", "TimingWheel"):
            kinds = [kind for kind in value.__mro__ if kind.__module__ == _core.__name__]
            names |= {f"{name}.{each}" for kind in kinds for each in vars(kind) if not each.startswith("__")}
    return names


def test_every_operation_of_the_core_has_a_leak_script():
    assert {name.partition(":")[0] for name in OPERATIONS} - {"SessionCore.__reduce__", "SessionTable.__reduce__"} == (
        public_names()
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_can_be_done_over_and_over(name):
    world = World()
    for _ in range(3):
        OPERATIONS[name](world)
    assert world.table.find_by_user(world.user_id) is world.session
    assert len(world.table) == 1
    world.table._check()


@weighing
@pytest.mark.parametrize(
    ("leak", "found"),
    [
        (lambda kept, world: kept.append(object()), "blocks"),
        (lambda kept, world: kept.append(bytearray(1 << 15)), "bytes"),
        (lambda kept, world: kept.append([]), "of list"),
        (lambda kept, world: ctypes.pythonapi.Py_IncRef(ctypes.py_object(world.data)), "references: dict +"),
    ],
    ids=["blocks", "bytes", "objects", "references"],
)
def test_a_leak_is_found(leak, found, monkeypatch):
    kept: list[object] = []
    monkeypatch.setitem(OPERATIONS, "leaking", lambda world: leak(kept, world))
    done, said = leaks.leaks("leaking", 0.01)
    assert done >= leaks.FEWEST
    assert any(found in each for each in said), said


@weighing
def test_an_operation_that_keeps_nothing_is_not_accused():
    assert leaks.leaks("SessionTable.create", 0.01)[1] == []
