"""The programs of docs/stores.md, run as printed."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import sqlite3
import sys
import uuid
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import ModuleType
from typing import Any

import asyncpg
import orjson
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from cagey_sessions.stores import CallbackStore, Outcome, Record, Verdict

PAGE = Path(__file__).parent.parent / "docs" / "stores.md"
POSTGRES = os.environ.get("CAGEY_TEST_POSTGRES", "postgresql://root@127.0.0.1:5432/test")


def blocks(language: str = "python") -> dict[str, list[str]]:
    """The blocks of the page by the heading above them."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^##+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if codes := re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            found[heading] = codes
    return found


@pytest.fixture
def program(monkeypatch, tmp_path):
    """The program under a heading, imported as a module, with an empty folder to run in."""

    def load(heading: str, change: tuple[str, str] | None = None) -> ModuleType:
        code = "\n\n".join(blocks()[heading])
        if change is not None:
            assert code.count(change[0]) == 1
            code = code.replace(*change)
        path = tmp_path / "program.py"
        path.write_text(code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("program", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "program", module)
        monkeypatch.chdir(tmp_path)
        spec.loader.exec_module(module)
        return module

    return load


def record(user_id: int | str, value: Any, version: int = 2) -> Record:
    return Record(user_id, 1, "node", version, 0, orjson.dumps(value), 0.0)


SAVED = Verdict(Outcome.SAVED)

POSTGRES_PAGE = "PostgreSQL with asyncpg"
SQLALCHEMY_PAGE = "A model of SQLAlchemy"
DATACLASS_PAGE = "Dataclasses, and a driver that blocks"


def test_every_block_is_run_here():
    assert {heading: len(codes) for heading, codes in blocks().items()} == {
        "SQLiteStore": 1,
        "MemoryStore": 1,
        POSTGRES_PAGE: 2,
        SQLALCHEMY_PAGE: 1,
        DATACLASS_PAGE: 1,
        "One call per user": 1,
    }
    assert list(blocks("sql")) == [POSTGRES_PAGE]


# PostgreSQL


@asynccontextmanager
async def postgres(sql: str = ""):
    """A schema of its own, with the table of the page: its address, and a connection to it."""
    try:
        connection = await asyncpg.connect(POSTGRES, timeout=5)
    except (OSError, asyncpg.PostgresError) as error:
        reason = f"no PostgreSQL at CAGEY_TEST_POSTGRES: {type(error).__name__}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    schema = f"docs_{uuid.uuid4().hex}"
    try:
        await connection.execute(f"CREATE SCHEMA {schema}; SET search_path TO {schema}; {sql}")
        yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}search_path={schema}", connection
    finally:
        await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        await connection.close()


(TABLE,) = blocks("sql")[POSTGRES_PAGE]


async def test_tables_of_postgresql(program):
    players_type = program(POSTGRES_PAGE).Players
    async with postgres(TABLE) as (address, connection), asyncpg.create_pool(address, min_size=1, max_size=4) as pool:
        await connection.execute("INSERT INTO players VALUES (7, 'ann@example.org', 3, '[\"rope\"]')")
        players = players_type(pool)
        store = CallbackStore(players.load, players.save_many, erase=players.erase)
        claims = await store.claim_many([7, 8], "node")
        assert claims[0].record.value() == {"gold": 3, "bag": ["rope"]}
        assert claims[1].record is None
        records = [record(7, {"gold": 4, "bag": []}), record(8, {"gold": 1, "bag": [{"é": None}]})]
        assert await store.save_many(records) == [SAVED, SAVED]
        assert await store.save_many(records) == [SAVED, SAVED], "again does no harm"
        assert (await store.load(7)).value() == {"gold": 4, "bag": []}
        assert (await store.load(8)).value() == {"gold": 1, "bag": [{"é": None}]}
        assert await connection.fetchval("SELECT email FROM players WHERE id = 7") == "ann@example.org"
        with pytest.raises(asyncpg.DataError):
            await store.save_many([record(7, {"gold": 5, "bag": []}), record(8, {"gold": 2**31, "bag": []})])
        assert (await store.load(7)).value() == {"gold": 4, "bag": []}, "one statement, one transaction"
        assert await store.save_many([record(7, {"gold": 5, "bag": []})]) == [SAVED]
        assert await store.erase(8) is True
        assert await store.erase(8) is False
        assert await store.load(8) is None


async def test_tables_of_postgresql_that_are_only_updated(program):
    players_type = program(POSTGRES_PAGE).KnownPlayers
    async with postgres(TABLE) as (address, connection), asyncpg.create_pool(address, min_size=1, max_size=4) as pool:
        await connection.execute("INSERT INTO players (id) VALUES (1), (3)")
        players = players_type(pool)
        store = CallbackStore(players.load, players.save_many)
        records = [record(user_id, {"gold": user_id, "bag": []}) for user_id in (1, 2, 3)]
        assert await store.save_many(records) == [SAVED, Verdict(Outcome.MISSING), SAVED]
        rows = await connection.fetch("SELECT id, gold FROM players ORDER BY id")
        assert [tuple(row) for row in rows] == [(1, 1), (3, 3)]


# SQLAlchemy


async def use_model(module, engine):
    async with engine.begin() as transaction:
        await transaction.run_sync(module.Base.metadata.create_all)
        await transaction.exec_driver_sql("INSERT INTO players VALUES ('ann', 'ann@example.org', 3, '[\"rope\"]')")
    players = module.Players(engine)
    store = CallbackStore(players.load, players.save_many, erase=players.erase)
    claims = await store.claim_many(["ann", "bob"], "node")
    assert claims[0].record.value() == {"gold": 3, "bag": ["rope"]}
    assert claims[1].record is None
    records = [record("ann", {"gold": 4, "bag": []}), record("bob", {"gold": 1, "bag": ["é"]})]
    assert await store.save_many(records) == [SAVED, SAVED]
    assert await store.save_many(records) == [SAVED, SAVED], "again does no harm"
    assert (await store.load("ann")).value() == {"gold": 4, "bag": []}
    assert (await store.load("bob")).value() == {"gold": 1, "bag": ["é"]}
    async with engine.connect() as transaction:
        rows = await transaction.exec_driver_sql("SELECT id, email FROM players ORDER BY id")
        assert [tuple(row) for row in rows] == [("ann", "ann@example.org"), ("bob", None)]
    assert await store.erase("bob") is True
    assert await store.erase("bob") is False
    assert await store.load("bob") is None


async def test_a_model_of_sqlalchemy(program):
    module = program(SQLALCHEMY_PAGE)
    engine = create_async_engine("sqlite+aiosqlite:///game.db")
    try:
        await use_model(module, engine)
    finally:
        await engine.dispose()


async def test_a_model_of_sqlalchemy_on_postgresql(program):
    module = program(SQLALCHEMY_PAGE, ("sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql"))
    async with postgres() as (address, _):
        engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(address), pool_size=2, max_overflow=0
        )
        try:
            await use_model(module, engine)
        finally:
            await engine.dispose()


# A driver that blocks


async def test_dataclasses_and_a_driver_that_blocks(program):
    module = program(DATACLASS_PAGE)
    with closing(sqlite3.connect("game.db")) as connection:
        connection.execute(module.CREATE)
    store = CallbackStore(module.load, module.save_many)
    assert await store.load("ann") is None
    value = module.asdict(module.Player(gold=3, bag=["é"]))
    assert await store.save_many([record("ann", value), record("bob", {"gold": 0})]) == [SAVED, SAVED]
    assert await store.save_many([record("ann", value)]) == [SAVED], "again does no harm"
    assert module.Player(**(await store.load("ann")).value()) == module.Player(3, ["é"])
    assert module.Player(**(await store.load("bob")).value()) == module.Player(0, [])


# One call per user


async def test_one_call_per_user(program):
    module = program("One call per user")
    stored = {}

    async def put(user_id, body):
        await asyncio.sleep(0)
        if user_id == 2:
            raise OSError("down")
        stored[user_id] = body

    module.put = put
    given = await CallbackStore(print, module.save_many).save_many([record(each, each) for each in (1, 2, 3)])
    assert given == [SAVED, Verdict(Outcome.FAILED, "OSError"), SAVED]
    assert stored == {1: b"1", 3: b"3"}


# With a manager


@pytest.mark.parametrize(
    ("heading", "printed"),
    [
        ("SQLiteStore", "{'gold': 10}\n"),
        ("MemoryStore", "{'gold': 10}\n"),
        (SQLALCHEMY_PAGE, "{'gold': 0, 'bag': ['rope']}\n"),
    ],
)
async def test_the_programs_run(program, capsys, heading, printed):
    await program(heading).main()
    assert capsys.readouterr().out == printed


async def test_the_program_with_dataclasses_runs(program, capsys):
    module = program(DATACLASS_PAGE)
    with closing(sqlite3.connect("game.db")) as connection:
        connection.execute(module.CREATE)
    await module.save_many([record("bob", {"gold": 1, "bag": []})])
    await module.main()
    assert capsys.readouterr().out == '{"gold":10,"bag":[]} {"gold":1,"bag":["rope"]}\n'


async def test_the_program_with_postgresql_runs(program, capsys, monkeypatch):
    async with postgres(TABLE) as (address, _):
        monkeypatch.setenv("DATABASE_URL", address)
        await program(POSTGRES_PAGE).main()
    assert capsys.readouterr().out == "{'gold': 10, 'bag': []}\n"
