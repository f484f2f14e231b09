"""What an installed wheel has to do on every system: no extra, no engine and no checkout is needed, only pytest."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import cagey_sessions
from cagey_sessions import SessionManager, read_snapshot
from cagey_sessions.stores import MemoryStore, SQLiteStore

PACKAGE = Path(cagey_sessions.__file__).parent
POSIX_ONLY = ("fcntl", "grp", "posix", "pwd", "resource", "termios", "uvloop")
EXTRAS = (
    "aiosqlite",
    "asyncpg",
    "hiredis",
    "hypothesis",
    "msgspec",
    "redis",
    "rich",
    "sqlalchemy",
    "uvloop",
    "websockets",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)


def python_without(missing: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, where these modules cannot be imported, installed or not."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
    return run(sys.executable, "-W", "error", "-c", hide + code)


def test_the_version_is_that_of_the_distribution():
    assert cagey_sessions.__version__ == importlib.metadata.version("cagey-sessions")


def test_the_core_is_compiled_for_this_python():
    core = importlib.import_module("cagey_sessions._core")
    assert core.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    assert not core.DEBUG


def test_what_type_checkers_need_is_there():
    assert (PACKAGE / "py.typed").is_file()
    assert "class SessionTable" in (PACKAGE / "_core.pyi").read_text(encoding="utf-8")


def test_the_test_kit_and_the_demo_are_there():
    modules = {name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "cagey_sessions.", onerror=lambda _: None)}
    assert {"cagey_sessions.testing.world", "cagey_sessions.testing.store_conformance"} <= modules
    assert {
        "cagey_sessions.tools.demo.server",
        "cagey_sessions.tools.demo.bots",
        "cagey_sessions.tools.demo.run",
    } <= modules


def test_it_needs_orjson_and_pytimeparse_and_nothing_else():
    requires = importlib.metadata.requires("cagey-sessions") or []
    assert {text.split(">")[0] for text in requires if "extra ==" not in text} == {"orjson", "pytimeparse"}


def test_a_session_lives_and_ends():
    async def main() -> list[str]:
        told = []
        manager = SessionManager(persist_on=["disconnect"])
        for event in ("created", "identified", "persist_user_data", "destroy"):
            manager.on(event, lambda session, *_, event=event: told.append(f"{event} {session.user_id}"))
        async with manager:
            session = await manager.create("cookie-value")
            await session.set_user("alice", {"gold": 0})
            session.user_data["gold"] += 10
            assert manager.find_by_key("cookie-value") is session
            assert session.user_data == {"gold": 10}
            await session.destroy(True)
            assert manager.find_by_key("cookie-value") is None
        return told

    assert asyncio.run(main()) == ["created None", "identified alice", "persist_user_data alice", "destroy alice"]


def test_what_is_saved_to_sqlite_is_read_back_by_the_next_server(tmp_path):
    path = tmp_path / "players.db"

    async def play() -> tuple[int, int]:
        async with SessionManager(store=SQLiteStore(path)) as manager:
            session = await manager.create()
            await session.login("alice", default={"gold": 0})
            session.user_data["gold"] += 10
            receipt = await session.persist_now()
            return session.user_data["gold"], receipt.version

    assert [asyncio.run(play()) for _ in range(3)] == [(10, 1), (20, 2), (30, 3)]


def test_a_snapshot_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "players.snapshot"

    async def main() -> dict[object, bytes]:
        async with SessionManager(store=MemoryStore()) as manager:
            await (await manager.create()).login("alice", default={"gold": 10})
            await manager.snapshot(path)
        return {entry.user_id: entry.body for entry in read_snapshot(path).entries}

    assert asyncio.run(main()) == {"alice": b'{"gold":10}'}


def test_the_world_of_tests_turns():
    from cagey_sessions.testing import world  # noqa: PLC0415 - what a program's own tests import

    with world(lambda store=None, clock=None: SessionManager(store=store, clock=clock)) as here:
        here.open("alice", default={"gold": 0}).user_data["gold"] = 1
        here.advance("31s")
        here.crash()
        here.restart()
        assert here.open("alice").user_data == {"gold": 1}


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("postgres", "from cagey_sessions.stores import open_store; open_store('postgresql://game@db/game')"),
        ("postgres", "from cagey_sessions.stores import PostgresStore"),
        ("redis", "from cagey_sessions.stores import open_store; open_store('redis://127.0.0.1/0')"),
        ("redis", "from cagey_sessions.stores import RedisStore"),
        ("msgspec", "from cagey_sessions import msgspec_codec; msgspec_codec(dict)"),
        ("conformance", "import cagey_sessions.testing.store_conformance"),
    ],
)
def test_a_missing_extra_is_named(extra, code):
    check = f"""\
from cagey_sessions import MissingExtraError
try:
    {code}
except MissingExtraError as error:
    print(error.extra, "cagey-sessions[{extra}]" in str(error))
"""
    done = python_without(EXTRAS, check)
    assert (done.stdout, done.stderr) == (f"{extra} True\n", "")


def test_the_demo_says_what_it_needs():
    done = python_without(EXTRAS, "from cagey_sessions.tools.cli import main; sys.exit(main(['demo']))")
    assert done.returncode == 2
    assert ("does not run on Windows" if sys.platform == "win32" else "cagey-sessions[demo]") in done.stderr


def test_nothing_but_the_demo_imports_what_only_posix_has():
    """And only SQLite's file lock takes `fcntl`, where there is no `msvcrt`. What the standard library needs is its own
    matter: it is imported before the modules are hidden."""
    names = [
        name
        for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "cagey_sessions.", onerror=lambda _: None)
        if ".demo" not in name and not name.endswith(("__main__", "._core"))
    ]
    assert "cagey_sessions.stores.sqlite.store" in names
    code = f"""\
import importlib, sys, types
def import_all():
    for name in {names!r}:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if type(error).__name__ != "MissingExtraError":
                raise
import_all()
for name in [name for name in sys.modules if name.startswith("cagey_sessions") and not name.endswith("._core")]:
    del sys.modules[name]
sys.platform = "win32"
sys.modules |= dict.fromkeys({POSIX_ONLY!r}) | {{"msvcrt": types.ModuleType("msvcrt")}}
import_all()
print("imported")
"""
    done = run(sys.executable, "-c", code)
    assert (done.stdout, done.stderr) == ("imported\n", "")


def test_the_command_explains_itself():
    script = Path(sysconfig.get_path("scripts")) / ("cagey-sessions" + (".exe" if sys.platform == "win32" else ""))
    done = run(str(script), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "demo" in done.stdout
    assert "store" in done.stdout
    version = run(sys.executable, "-m", "cagey_sessions", "--version")
    assert version.stdout.split() == ["cagey-sessions", cagey_sessions.__version__]


def test_the_store_tools_read_what_a_server_has_saved(tmp_path):
    async def play() -> None:
        async with SessionManager(store=SQLiteStore(tmp_path / "players.db")) as manager:
            await (await manager.create()).login("alice", default={"gold": 0})

    asyncio.run(play())
    url = f"sqlite:///{(tmp_path / 'players.db').as_posix()}"
    done = run(sys.executable, "-m", "cagey_sessions", "store", "show", url, "alice")
    assert (done.returncode, done.stderr) == (0, "")
    assert '"gold": 0' in done.stdout
