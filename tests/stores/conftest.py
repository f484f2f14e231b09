"""A file for SQLite, and the connection that a store writes to it by."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from watched_sqlite import Writer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.db"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    watched = Writer()
    monkeypatch.setattr(sqlite3, "connect", watched.connect)
    return watched
