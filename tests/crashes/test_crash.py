"""kill -9: whatever was acknowledged is stored, whole, and belongs to its user (`make crash` kills many more).

A kill takes nothing that SQLite has handed to the operating system. What a machine that fails would take is seen in the
order of its system calls, and by `test_nobody_is_told_before_the_commit`, among the tests of the store.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crashes.__main__ import main
from crashes.engines import Engine, MissingEngineError, Postgres, Redis, SQLite
from crashes.points import build_shim, calls_of, is_synced, kill_at_each_call
from crashes.runs import Result, kill_writers

KILLS = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL"),
]


@contextmanager
def opened(engine: Engine) -> Iterator[Engine]:
    try:
        engine.open()
    except MissingEngineError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    try:
        yield engine
    finally:
        engine.remove()


@pytest.mark.guarantee("I5", "I20")
@pytest.mark.parametrize("kind", [SQLite, Postgres, Redis])
def test_every_acknowledged_version_survives_kill_9(tmp_path: Path, record_property: Any, kind: Any) -> None:
    with opened(kind(tmp_path) if kind is SQLite else kind()) as engine:
        result = kill_writers(kind.__name__, engine, KILLS, tmp_path, seed=20)
    record_property("acknowledged", result.acknowledged)
    record_property("applied but not acknowledged", result.unacknowledged)
    assert not result.problems, "\n".join(result.problems[:5])
    assert result.kills == KILLS
    assert result.lost == 0
    assert result.acknowledged > KILLS, "hardly anything was acknowledged"


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    try:
        return build_shim(tmp_path)
    except MissingEngineError as error:
        if os.environ.get("CI") and sys.platform == "linux":
            raise
        pytest.skip(str(error))


@pytest.mark.guarantee("I5")
def test_a_save_killed_at_any_system_call_leaves_the_old_state_or_the_new_one(tmp_path: Path, shim: Path) -> None:
    result = kill_at_each_call(tmp_path, ["save"])
    assert not result.problems, "\n".join(result.problems[:5])
    assert result.kills >= 6, "a save is at least two writes and a sync"


def test_a_save_is_acknowledged_after_its_log_was_synced(tmp_path: Path, shim: Path) -> None:
    assert is_synced(calls_of("save", shim, tmp_path / "save"))
    assert not is_synced([])
    assert not is_synced(["pwrite64 -wal", "fdatasync -wal", "pwrite64 -wal", "acknowledged"])


def test_an_engine_that_is_not_there_is_told_by_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr("crashes.engines.Postgres.open", _missing)
    monkeypatch.setattr("sys.argv", ["crashes", "--only", "postgres"])
    assert main() == 2
    assert "could not run: no PostgreSQL" in capsys.readouterr().out


def test_a_server_that_does_not_answer_is_named_without_its_password():
    for engine in (Postgres("postgresql://me:secret@127.0.0.1:1/test"), Redis("redis://me:secret@127.0.0.1:1/0")):
        with pytest.raises(MissingEngineError, match=r"at 127\.0\.0\.1:1/") as raised:
            engine.open()
        assert "secret" not in str(raised.value)


def test_what_is_wrong_is_told_by_the_exit_status_with_the_history(tmp_path, monkeypatch, capsys):
    """One row looks as if it had been taken back."""
    rows = SQLite.rows
    monkeypatch.setattr(
        "crashes.engines.SQLite.rows",
        lambda self: [row._replace(version=0, body=None) if row.user == "user-7" else row for row in rows(self)],
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["crashes", "--only", "sqlite", "--kills", "9", "--seed", "20"])
    assert main() == 1
    said = capsys.readouterr().out
    assert "lost: user-7" in said
    assert "saved user-7" in said


def test_kills_that_prove_nothing_are_wrong():
    result = Result("an engine", acknowledged=1000)
    result.require_bite()
    assert result.problems == ["it did not bite: no kill came between a save and its acknowledgement"]
    shared = Result("a shared one", acknowledged=1000, unacknowledged=1)
    shared.require_bite(shared=True)
    assert len(shared.problems) == 2, "no take-over, and nobody who was fenced off"
    shared = Result("a shared one", unacknowledged=1, take_overs=1, fenced=1)
    shared.require_bite(shared=True)
    assert shared.problems == []


def _missing(self: Engine) -> None:
    raise MissingEngineError("no PostgreSQL at all")
