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

from cagey_sessions import (
    FencedError,
    SessionManager,
    StoreModeError,
    StoreUnavailableError,
    UnsavableError,
    UserErasedError,
)
from cagey_sessions.stores import CallbackStore, Outcome, Record, Verdict
from support import let_time_pass

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


# What the page says of answers


def test_the_page_names_every_answer():
    section = PAGE.read_text(encoding="utf-8").partition("\n## CallbackStore\n")[2].partition("\n## ")[0]
    assert set(re.findall(r'`"(\w+)"', section)) == {outcome.value for outcome in Outcome}


@pytest.mark.parametrize(
    ("answer", "raised", "reported", "calls"),
    [
        ("invalid", UnsavableError, "unsavable", 1),
        (Verdict(Outcome.INVALID, "the name is taken"), UnsavableError, "unsavable", 1),
        ("erased", UserErasedError, "UserErasedError", 1),
        ("missing", StoreUnavailableError, "LostRecordError", 3),
        ("fenced", FencedError, "FencedError", 1),
    ],
)
async def test_what_becomes_of_a_user_by_the_answer(clock, answer, raised, reported, calls):
    handed_over: list[int] = []
    answers: list[Any] = [answer] * 1000
    events: list[str] = []

    def save_many(records):
        handed_over.append(clock.now())
        return [answers.pop(0)] if answers else None

    manager = SessionManager(store=CallbackStore(lambda _: {"gold": 0}, save_many), clock=clock)
    manager.on("error", lambda error, _: events.append(type(error).__name__))
    manager.on("unsavable", lambda session, error: events.append("unsavable"))
    session = await manager.open("ann")
    session.user_data["gold"] = 1
    with pytest.raises(raised):
        await let_time_pass(clock, session.persist_now())
    assert handed_over.count(handed_over[0]) == calls, "so often at once"
    if answer in ("erased", "fenced"):
        assert await session.wait_ended() == answer
    else:
        assert session.alive
        before = len(handed_over)
        await clock.advance("60s")
        assert (len(handed_over) == before) == (raised is UnsavableError), "tried again unless it is unsavable"
        answers.clear()
        session.user_data["gold"] = 2
        assert (await let_time_pass(clock, session.persist_now())).changed
    assert events[0] == reported
    await let_time_pass(clock, manager.destroy())


def fail(user_id):
    raise KeyError(user_id)


@pytest.mark.parametrize(("erase", "raised"), [(None, StoreModeError), (fail, StoreUnavailableError)])
async def test_what_becomes_of_a_user_who_cannot_be_erased(clock, erase, raised):
    """As the page says; if it is the other way round one day, the page has to say that."""
    written: list[Record] = []
    store = CallbackStore(lambda _: {"gold": 0}, lambda records: written.extend(records), erase=erase)
    manager = SessionManager(store=store, clock=clock)
    session = await manager.open("ann")
    session.user_data["gold"] = 1
    with pytest.raises(raised):
        await let_time_pass(clock, manager.erase("ann"))
    if erase is None:
        assert session.alive
        await let_time_pass(clock, manager.destroy())
        assert [record.value() for record in written] == [{"gold": 1}]
    else:
        assert session.end_reason == "erased"
        await let_time_pass(clock, manager.destroy())
        assert written == []


async def test_a_load_that_raises_is_repeated_for_whoever_reads(clock):
    loads: list[Any] = []

    def load(user_id):
        loads.append(user_id)
        raise KeyError(user_id)

    manager = SessionManager(store=CallbackStore(load, print), clock=clock)
    for call in (manager.read("ann"), manager.open("ann", default={})):
        loads.clear()
        with pytest.raises(StoreUnavailableError) as caught:
            await let_time_pass(clock, call)
        assert isinstance(caught.value.__cause__, KeyError)
        assert len(loads) > 1
    await manager.destroy()
