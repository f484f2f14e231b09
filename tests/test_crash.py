"""kill -9: whatever was acknowledged is in the file, whole, and belongs to its user.

A kill takes nothing that SQLite has handed to the operating system, so an answer only just ahead of its commit is not
seen here: that is `test_nobody_is_told_before_the_commit`, among the tests of the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cagey_sessions
from cagey_sessions import SessionManager
from cagey_sessions.stores import SQLiteStore

RUNS = int(os.environ.get("CAGEY_TEST_CRASHES", "20"))
LONGEST = 0.4
WRITER = Path(__file__).with_name("crash_writer.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}


class Told(NamedTuple):
    """One acknowledgement."""

    user_id: str
    version: int
    n: int


class Stored(NamedTuple):
    version: int
    data: Any


def killed_after(seconds: float, path: Path, seed: int) -> list[Told]:
    """Let a server write for so long and kill it: every acknowledgement it told of, in order."""
    command = [sys.executable, str(WRITER), str(path), str(seed)]
    with subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n", "the file of a killed process opens at once"
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=seconds)
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was still at work"
    whole = [line.decode().split() for line in said.splitlines(keepends=True) if line.endswith(b"\n")]
    return [Told(user_id, int(version), int(n)) for user_id, version, n in whole]


def read(path: Path) -> dict[str, Stored]:
    """The users in the file, without the library."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = db.execute("SELECT user_id, version, body FROM cagey_sessions WHERE body IS NOT NULL").fetchall()
    return {user_id: Stored(version, json.loads(body)) for user_id, version, body in rows}


async def open_all(path: Path, user_ids: list[str]) -> dict[str, Stored]:
    """The same users, opened by a fresh manager."""
    async with SessionManager(store=SQLiteStore(path)) as manager:
        sessions = await asyncio.gather(*map(manager.open, user_ids))
        receipts = await asyncio.gather(*(session.persist_now() for session in sessions))
        assert not any(receipt is None or receipt.changed for receipt in receipts), "what is loaded is what is stored"
        versions = [receipt.version for receipt in receipts if receipt is not None]
        data = [session.user_data for session in sessions]
    return dict(zip(user_ids, map(Stored, versions, data), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_every_acknowledged_version_survives_kill_9(tmp_path: Path, record_property: Any) -> None:
    """Servers one after the other on one file, each killed at a random moment, that of its first claims included."""
    chance = random.Random(20)
    path = tmp_path / "users.db"
    n_of: dict[tuple[str, int], int] = {}  # of each version ever acknowledged
    latest: dict[str, int] = {}
    acknowledged = unacknowledged = 0
    for run in range(RUNS):
        told = killed_after(chance.uniform(0, LONGEST), path, run)
        acknowledged += len(told)
        for user_id, version, n in told:
            assert n_of.setdefault((user_id, version), n) == n, f"run {run}: one version, two states"
            latest[user_id] = max(latest.get(user_id, 0), version)
        stored = read(path)
        assert asyncio.run(open_all(path, list(stored))) == stored, f"run {run}"
        assert latest.keys() <= stored.keys(), f"run {run}: users are gone"
        for user_id, (version, data) in stored.items():
            known = latest.get(user_id, 0)
            assert version >= known, f"run {run}: version {known} of {user_id} was acknowledged, {version} is stored"
            assert version <= known + 1, f"run {run}: two saves of {user_id} were under way at a time"
            assert n_of.setdefault((user_id, version), data["n"]) == data["n"], (
                f"run {run}: other data was acknowledged"
            )
            assert data["of"] in (user_id, None), f"run {run}: {user_id} has the data of {data['of']}"
            assert data["twice"] == 2 * data["n"], f"run {run}: torn"
            unacknowledged += version - known
            latest[user_id] = version
    record_property("acknowledged", acknowledged)
    record_property("applied but not acknowledged", unacknowledged)
    print(f"{acknowledged} acknowledged, {unacknowledged} applied but not acknowledged")
    assert acknowledged > 10 * RUNS, "hardly anything was acknowledged"
    assert unacknowledged > 0, "no kill came between a save and its acknowledgement: the test does not bite"
