"""A file for SQLite and the connection that a store writes to it by, and a schema of PostgreSQL's."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from pathlib import Path

import pytest

from support import drop_schema, execute
from support.watched_sqlite import Writer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.db"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    watched = Writer()
    monkeypatch.setattr(sqlite3, "connect", watched.connect)
    return watched


@pytest.fixture
def schema():
    """The name of a schema of one's own."""
    name = f"cagey_{uuid.uuid4().hex}"
    asyncio.run(execute(f"CREATE SCHEMA {name}"))
    yield name
    asyncio.run(drop_schema(name))
