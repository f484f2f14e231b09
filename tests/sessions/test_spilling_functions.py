"""The spill of a program whose own functions load and save its users."""

from __future__ import annotations

import os
from typing import Any

import pytest

from cagey_sessions import DrainError, SessionManager
from cagey_sessions.stores import CallbackStore
from support import let_time_pass


class Program:
    """A program around a dict, whose saves fail until `takes` is set."""

    def __init__(self, path) -> None:
        self.path = path
        self.stored: dict = {}
        self.takes = False

    def load(self, user_id):
        return self.stored.get(user_id)

    def save_many(self, records):
        if self.takes:
            self.stored.update({record.user_id: record.value() for record in records})
        return [self.takes] * len(records)

    async def start(self, **options) -> SessionManager:
        store = CallbackStore(self.load, self.save_many)
        manager = SessionManager(store=store, spill=self.path, save_timeout="200ms", **options)
        await manager.__aenter__()
        return manager

    def has_file(self):
        return os.path.exists(self.path)

    async def end(self, manager) -> None:
        with pytest.raises(DrainError):
            await manager.destroy(deadline="50ms")


@pytest.fixture
def program(tmp_path):
    return Program(tmp_path / "players.spill")


async def test_a_replay_that_fails_leaves_a_new_user_in_the_file(program):
    first = await program.start()
    await first.open("ann", default={"gold": 7})
    await program.end(first)
    second = await program.start()
    assert second.spill_report.pending == ("ann",)
    await second.destroy()
    assert program.has_file()
    program.takes = True
    third = await program.start()
    assert third.spill_report.replayed == ("ann",)
    assert program.stored == {"ann": {"gold": 7}}
    await third.destroy()


async def test_spilled_data_of_an_older_schema_is_converted(program):
    program.stored = {"ann": {"gold": 1}}
    first = await program.start(schema=1)
    (await first.open("ann")).user_data["gold"] = 7
    await program.end(first)
    program.takes = True

    def decode(value, schema):
        return {"coins": value["gold"]} if schema < 2 else value

    second = await program.start(schema=2, decode=decode)
    assert program.stored == {"ann": {"coins": 7}}
    await second.destroy()


async def test_spilled_data_of_a_newer_schema_is_kept(program):
    program.stored = {"ann": {"gold": 1}}
    first = await program.start(schema=2)
    (await first.open("ann")).user_data["gold"] = 7
    await program.end(first)
    program.takes = True
    second = await program.start(schema=1)
    assert second.spill_report.conflicts == ("ann",)
    assert program.stored == {"ann": {"gold": 1}}
    await second.destroy()
    assert program.has_file()


@pytest.mark.parametrize("changed", [False, True])
async def test_functions_of_the_program(cluster, changed):
    rows: dict[Any, bytes] = {}
    down = False

    async def save_many(records):
        if down:
            raise OSError
        rows.update((record.user_id, record.body) for record in records)

    async def load(user_id):
        body = rows.get(user_id)
        return None if body is None else body.decode()

    async def start():
        manager = SessionManager(
            store=CallbackStore(load, save_many), spill=cluster.path, clock=cluster.clock, schema=3
        )
        await manager.__aenter__()
        return manager

    manager = await start()
    session = await manager.open("ann", default={"gold": 0})
    await session.persist_now()
    session.user_data["gold"] = 1
    await session.persist_now()
    session.user_data["gold"] = 2
    await manager.open("new", default={"gold": 3})
    down = True
    with pytest.raises(DrainError):
        await let_time_pass(cluster.clock, manager.destroy(deadline="1s"))
    down = False
    if changed:
        rows["ann"] = b'{"gold":77}'
    kept = cluster.path.read_bytes()
    for _ in range(2):
        manager = await start()
        assert set(manager.spill_report.replayed) == ({"new"} if changed else {"ann", "new"})
        assert rows == {"ann": b'{"gold":77}' if changed else b'{"gold":2}', "new": b'{"gold":3}'}
        await manager.destroy()
        cluster.path.write_bytes(kept)  # a crash between the write and the file: it is done already
