"""`open_store`: which store a URL names, and which of its parameters are the store's own.

Nothing is connected to here but an SQLite file, and the engines at the end, where they are there.
"""

from __future__ import annotations

import asyncio
import os
import uuid

import asyncpg
import pytest
import redis
from redis.asyncio import ConnectionPool

from cagey_sessions import DurationError, OptionError, SessionManager, StoreError, StoreUnavailableError
from cagey_sessions.stores import MemoryStore, PostgresStore, RedisStore, SQLiteStore, open_store
from cagey_sessions.stores.memory import MemoryBacking
from cagey_sessions.testing.store_conformance import opened
from support import POSTGRES, REDIS, needs_server, python

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("sqlite:///players.db", SQLiteStore),
        ("postgresql://game@db/players", PostgresStore),
        ("postgres://game@db/players", PostgresStore),
        ("redis://db:6379/0", RedisStore),
        ("rediss://db:6379/0", RedisStore),
        ("unix:///run/redis.sock?db=1", RedisStore),
        ("redis+sentinel://one:26379,two/mymaster/0", RedisStore),
        ("rediss+sentinel://one/mymaster", RedisStore),
        ("memory:", MemoryStore),
        ("memory://", MemoryStore),
    ],
)
def test_each_scheme_makes_its_store(url, kind):
    assert type(open_store(url)) is kind


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///players.db", "players.db"),
        ("sqlite:///data/players.db", "data/players.db"),
        ("sqlite:////var/lib/players.db", "/var/lib/players.db"),
        ("sqlite:///a%20b#c.db", "a%20b#c.db"),
        ("sqlite:///players.db?synchronous=NORMAL", "players.db"),
    ],
)
def test_three_slashes_are_a_path_from_here_and_four_a_whole_one(url, path):
    store = open_store(url)
    assert isinstance(store, SQLiteStore)
    assert os.fspath(store.path) == path


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://players.db", "sqlite:///?synchronous=FULL"])
def test_a_file_that_is_not_named_is_explained(url):
    with pytest.raises(OptionError, match="three slashes"):
        open_store(url)


def test_memory_by_the_url_of_sqlalchemy_is_refused():
    with pytest.raises(OptionError, match="MemoryStore"):
        open_store("sqlite:///:memory:")


@pytest.mark.parametrize("url", ["mysql://db/players", "postgresql+asyncpg://db/players", "sqlit:///players.db"])
def test_an_unknown_scheme_is_told_the_known_ones(url):
    with pytest.raises(OptionError) as caught:
        open_store(url)
    for known in ("sqlite", "postgresql", "redis", "rediss", "unix", "redis+sentinel", "memory"):
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "meant"), [("postgresq", "postgresql"), ("postgresql+asyncpg", "postgresql"), ("redi", "redis")]
)
def test_an_unknown_scheme_is_told_what_was_meant(scheme, meant):
    with pytest.raises(OptionError, match=f"there is no store for .* did you mean '{meant}'"):
        open_store(f"{scheme}://db/players")


@pytest.mark.parametrize("url", ["", "players.db", "/var/lib/players.db", "redis:db", "memory:players", None, 7])
def test_what_is_no_url_is_told_how_one_begins(url):
    with pytest.raises(OptionError, match="begins with one of sqlite://"):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        f"game:{SECRET}@db/players",
        f"{SECRET}:game@db",
        f"mysql://game:{SECRET}@db/players",
        f"sqlite://game:{SECRET}@db/players",
        f"memory://game:{SECRET}@db?schema=players",
        f"postgresql://game:{SECRET}@db/players?schema=",
        f"postgresql://game:{SECRET}@db/players?lease=soon",
        f"redis://game:{SECRET}@db/0?prefix=",
        f"redis://game:{SECRET}@db/0?socket_timeout=soon&password={SECRET}",
        f"redis+sentinel://game:{SECRET}@db",
    ],
)
def test_no_error_holds_a_password(url):
    with pytest.raises(OptionError) as caught:
        open_store(url)
    error = caught.value
    assert SECRET not in f"{error!r} {error} {error.__cause__!r}"


# Parameters


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///players.db?synchronous=SOON",
        "postgresql://db/players?lease=1s",
        "postgresql://db/players?timeout=never",
        "redis://db/0?timeout=0",
        "redis://db/0?lease=5&timeout=10",
    ],
)
def test_a_bad_value_of_a_parameter_is_refused_at_once(url):
    with pytest.raises(OptionError):
        open_store(url)


def test_a_bare_number_in_a_url_is_in_seconds():
    open_store("postgresql://db/players?timeout=20&lease=20")
    with pytest.raises(OptionError, match=r"at least timeout \(20 s\)"):
        open_store("postgresql://db/players?timeout=20&lease=19.5")
    with pytest.raises(DurationError, match="'soon'"):
        open_store("redis://db?timeout=soon")


@pytest.mark.parametrize("url", ["sqlite:///players.db?synchronos=FULL", "memory:?schema=x", "memory://?schema=x"])
def test_a_parameter_that_nobody_takes_is_refused(url):
    with pytest.raises(OptionError):
        open_store(url)


def test_a_parameter_that_is_misspelt_is_told_what_was_meant():
    with pytest.raises(OptionError, match=r"no 'synchronos'; did you mean 'synchronous'"):
        open_store("sqlite:///players.db?synchronos=FULL")


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("sqlite:///players.db", {"schema": "players"}),
        ("postgresql://db/players", {"prefix": "players:"}),
        ("postgresql://db/players", {"pool": object()}),
        ("redis://db", {"schema": "players"}),
        ("memory:", {"timeout": 3}),
    ],
)
def test_an_option_that_the_store_does_not_have_is_refused_by_name(url, options):
    with pytest.raises(OptionError, match=f"has no '{next(iter(options))}'"):
        open_store(url, **options)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("sqlite:///players.db?synchronous=FULL", {"synchronous": "FULL"}),
        ("postgresql://db/players?schema=a", {"schema": "a"}),
        ("redis://db?prefix=a&prefix=b", {}),
    ],
)
def test_an_option_given_twice_is_refused(url, options):
    with pytest.raises(OptionError, match="given twice"):
        open_store(url, **options)


def test_what_is_the_drivers_goes_to_the_driver_byte_for_byte(monkeypatch):
    """And what is ours does not."""
    given: list[str] = []
    pool = ConnectionPool.from_url

    def from_url(url):
        given.append(url)
        return pool(url)

    monkeypatch.setattr(ConnectionPool, "from_url", from_url)
    store = open_store("redis://:p%3Fss@db:6379/2?socket_keepalive=yes&prefix=a%26b%3A&lease=30s&client_name=a+b&x")
    assert isinstance(store, RedisStore)
    assert given == ["redis://:p%3Fss@db:6379/2?socket_keepalive=yes&client_name=a+b&x"]
    open_store("redis://db:6379/2?prefix=a")
    assert given[1:] == ["redis://db:6379/2"]


async def test_the_dsn_of_asyncpg_is_what_is_left(monkeypatch):
    given: list[str] = []

    def connect(dsn, **options):
        given.append(dsn)
        raise OSError("not today")

    monkeypatch.setattr(asyncpg, "connect", connect)
    store = open_store(
        "postgresql://u:p@/db?host=/run/pg&schema=players&sslmode=prefer&timeout=5&application_name=a%20b"
    )
    with pytest.raises(StoreUnavailableError):
        await store.open()
    assert given == ["postgresql://u:p@/db?host=/run/pg&sslmode=prefer&application_name=a%20b"]


async def test_options_by_name_reach_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with opened(open_store("sqlite:///players.db", synchronous="NORMAL")) as store:
        assert "synchronous=NORMAL" in store.loss_class
    async with opened(open_store("sqlite:///players.db?synchronous=NORMAL")) as store:
        assert "synchronous=NORMAL" in store.loss_class
    backing = MemoryBacking()
    assert open_store("memory:", backing=backing).backing is backing


def test_nothing_is_opened(tmp_path):
    open_store(f"sqlite:///{tmp_path}/players.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "driver", "extra"), [("postgresql://db", "asyncpg", "postgres"), ("redis://db", "redis", "redis")]
)
def test_a_driver_that_is_missing_names_the_extra(url, driver, extra):
    python(
        f"""
        import sys
        sys.modules[{driver!r}] = None
        from cagey_sessions import MissingExtraError
        from cagey_sessions.stores import open_store
        open_store("sqlite:///players.db")
        try:
            open_store({url!r})
        except MissingExtraError as error:
            assert error.extra == {extra!r}, error.extra
            assert "cagey-sessions[{extra}]" in str(error)
        else:
            raise AssertionError("not missed")
        """
    )


def test_no_driver_but_its_own_is_imported():
    done = python(
        """
        import sys
        from cagey_sessions.stores import open_store
        print(sorted({"asyncpg", "redis", "sqlite3"} & set(sys.modules)))
        open_store("memory:")
        print(sorted({"asyncpg", "redis", "sqlite3"} & set(sys.modules)))
        """
    )
    assert done.stdout == "[]\n[]\n"


# On real engines


async def test_a_manager_on_a_file(tmp_path):
    async with SessionManager(store=open_store(f"sqlite:///{tmp_path}/players.db")) as manager:
        await manager.open("ann", default={"gold": 1})
    async with SessionManager(store=open_store(f"sqlite:///{tmp_path}/players.db")) as manager:
        assert await manager.read("ann") == {"gold": 1}


def joined(url: str, parameter: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{parameter}"


@needs_server(POSTGRES)
async def test_the_schema_of_a_url_is_where_the_tables_are():
    schema = f"cagey_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(POSTGRES)
    try:
        async with opened(open_store(joined(POSTGRES, f"schema={schema}&timeout=5"))):
            assert await connection.fetchval("SELECT to_regclass($1)", f"{schema}.cagey_sessions") is not None
        with pytest.raises(StoreError, match="shcema"):  # not ours, so a setting of the server
            await open_store(joined(POSTGRES, f"shcema={schema}")).open()
    finally:
        await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        await connection.close()


@needs_server(REDIS)
async def test_the_prefix_of_a_url_is_where_the_keys_are():
    prefix = f"cagey-{uuid.uuid4().hex}:"
    client = await asyncio.to_thread(redis.Redis.from_url, REDIS)
    try:
        async with opened(open_store(joined(REDIS, f"prefix={prefix}&lease=20s"))):
            assert await asyncio.to_thread(client.keys, f"{prefix}*")
    finally:
        for key in client.keys(f"{prefix}*"):
            client.delete(key)
        client.close()
