"""kill -9: whatever was acknowledged is in the file, whole, and belongs to its user."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import cagey_sessions

RUNS = int(os.environ.get("CAGEY_TEST_CRASHES", "20"))
WRITER = Path(__file__).with_name("crash_writer.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}


def killed_after(seconds: float, path: Path, seed: int) -> dict[str, tuple[int, int]]:
    """Let a server write for so long and kill it: the last receipt of each user, version and n."""
    command = [sys.executable, str(WRITER), str(path), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the file of a killed process opens at once"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read()
    assert process.returncode == -signal.SIGKILL, "it was still at work"
    receipts: dict[str, tuple[int, int]] = {}
    for line in said.splitlines(keepends=True):
        if line.endswith(b"\n"):
            user_id, version, n = line.decode().split()
            receipts[user_id] = int(version), int(n)
    return receipts


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_every_acknowledged_version_survives_kill_9(tmp_path):
    """Twenty servers one after the other on one file, each killed at a random moment."""
    chance = random.Random(20)
    path = tmp_path / "users.db"
    last: dict[str, tuple[int, int]] = {}
    acknowledged = unacknowledged = 0
    for run in range(RUNS):
        receipts = killed_after(chance.uniform(0.02, 0.3), path, run)
        acknowledged += len(receipts)
        last |= receipts
        with closing(sqlite3.connect(path)) as db:
            rows = db.execute("SELECT user_id, version, body FROM cagey_sessions WHERE body IS NOT NULL").fetchall()
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        stored = {user_id: (version, json.loads(body)) for user_id, version, body in rows}
        for user_id, (version, n) in last.items():
            assert user_id in stored, f"run {run}: {user_id} is gone"
            found, data = stored[user_id]
            assert found >= version, f"run {run}: version {version} of {user_id} was acknowledged, {found} is stored"
            assert data["n"] >= n, f"run {run}"
            assert (found == version) <= (data["n"] == n), f"run {run}: version {version} stands for other data"
        for user_id, (version, data) in stored.items():
            assert data["of"] in (user_id, None), f"run {run}: {user_id} has the data of {data['of']}"
            assert data["twice"] == 2 * data["n"], f"run {run}: torn"
            unacknowledged += version > last.get(user_id, (0, 0))[0]
    assert acknowledged > RUNS, "hardly anything was acknowledged"
    assert unacknowledged > 0, "no kill came between a save and its receipt: the test does not bite"
