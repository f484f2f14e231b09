"""The programs of docs/stores.md, docs/own-tables.md and docs/own-store.md, run as printed."""

from __future__ import annotations

import asyncio
import importlib.util
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
from cagey_sessions.stores.postgres.catalog import COLUMN_TYPES
from cagey_sessions.testing.store_conformance import StoreConformance
from support import POSTGRES, let_time_pass, skip_without

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("stores.md", "own-tables.md", "own-store.md")


def blocks(language: str = "python") -> dict[str, list[str]]:
    """The blocks of the pages by the heading above them."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for section in re.split(r"^##+ ", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            heading, _, text = section.partition("\n")
            if codes := re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
                assert heading not in found, f"{page}: {heading} is on another page, too"
                found[heading] = codes
    return found


def section(page: str, heading: str, end: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition(end)[0]


@pytest.fixture
def program(monkeypatch, tmp_path):
    """The program under some headings, imported as a module, with an empty folder to run in."""

    def load(*headings: str, change: tuple[str, str] | None = None) -> ModuleType:
        code = "\n\n".join(block for heading in headings for block in blocks()[heading])
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
TABLE_PAGE = "PostgresTable"
TABLE_SQLALCHEMY_PAGE = "PostgresTable and SQLAlchemy"
TABLE_DJANGO_PAGE = "PostgresTable and Django"
DATACLASS_PAGE = "Dataclasses, and a driver that blocks"
OWN_PAGE = ("A whole one", "Test it")


def test_every_block_is_run_here():
    assert {heading: len(codes) for heading, codes in blocks().items()} == {
        "SQLiteStore": 1,
        "MemoryStore": 1,
        "By a URL": 1,
        TABLE_PAGE: 1,
        TABLE_SQLALCHEMY_PAGE: 1,
        POSTGRES_PAGE: 2,
        SQLALCHEMY_PAGE: 1,
        DATACLASS_PAGE: 1,
        "One call per user": 1,
        **dict.fromkeys(OWN_PAGE, 1),
    }
    assert list(blocks("sql")) == [TABLE_PAGE, POSTGRES_PAGE]
    assert list(blocks("py")) == [TABLE_DJANGO_PAGE], "Django is not installed here: this one is only compiled"
    compile(*blocks("py")[TABLE_DJANGO_PAGE], "own-tables.md", "exec")


# PostgreSQL


@asynccontextmanager
async def postgres(sql: str = ""):
    """A schema of its own, with the table of the page: its address, and a connection to it."""
    skip_without(POSTGRES)
    connection = await asyncpg.connect(POSTGRES)
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


# PostgresTable


async def own_schema(connection):
    """What to change in a program, so that its side table is in the schema of the test."""
    schema = await connection.fetchval("SELECT current_schema()")
    return 'columns=["gold", "bag"])', f'columns=["gold", "bag"], schema="{schema}")'


async def test_the_program_with_a_table_runs(program, capsys, monkeypatch):
    (table,) = blocks("sql")[TABLE_PAGE]
    async with postgres(table) as (address, connection):
        monkeypatch.setenv("DATABASE_URL", address)
        await program(TABLE_PAGE, change=await own_schema(connection)).main()
        assert capsys.readouterr().out == "{'gold': 10, 'bag': []}\n"
        assert await connection.fetchval("SELECT (id, email, gold, bag)::text FROM players") == "(7,,10,[])"


async def test_the_program_with_a_table_of_sqlalchemy_runs(program, capsys, monkeypatch):
    async with postgres() as (address, connection):
        monkeypatch.setenv("DATABASE_URL", address)
        await program(TABLE_SQLALCHEMY_PAGE, change=await own_schema(connection)).main()
        assert capsys.readouterr().out == "ann@example.org 3 ['rope']\n"


def test_the_page_names_every_type_that_a_column_may_have():
    rows = re.findall(r"^\| (`.*?) \|", section("own-tables.md", TABLE_PAGE, "**The key**"), re.MULTILINE)
    named = {name.replace("varchar", "character varying") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == set(COLUMN_TYPES)


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
    module = program(SQLALCHEMY_PAGE, change=("sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql"))
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
        ("By a URL", "{'gold': 10}\n"),
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
    text = section("own-tables.md", "CallbackStore", "\n## ")
    assert set(re.findall(r'`"(\w+)"', text)) == {outcome.value for outcome in Outcome}


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


# A store of one's own


class TestFolderStore(StoreConformance):
    loops = ("asyncio",)  # all it does is done without waiting

    @pytest.fixture
    def make(self, program, tmp_path):
        store = program(*OWN_PAGE).FolderStore
        return lambda: store(tmp_path / "users")


async def test_a_manager_keeps_its_users_in_the_store_of_the_page(program):
    store = program(*OWN_PAGE).FolderStore
    for gold in (10, 20):
        async with SessionManager(store=store("users")) as manager:
            session = await manager.open("ann", default={"gold": 0})
            session.user_data["gold"] += 10
            await session.persist_now()
            assert session.user_data == {"gold": gold}
