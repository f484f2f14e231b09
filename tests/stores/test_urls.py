"""`open_store`: which store a URL names, and which of its parameters are the store's own.

Nothing is connected to here but an SQLite file, and the engines at the end, where they are there.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
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


PLACE = "127.0.0.1:1"
"""Where nobody listens."""


@pytest.mark.guarantee("I24")
@pytest.mark.parametrize(
    "url",
    [
        f"game:{SECRET}@db/players",
        f"{SECRET}:game@db",
        f"mysql://game:{SECRET}@db/players",
        f"sqlite://game:{SECRET}@db/players",
        f"sqlite:///players.db?{SECRET}=FULL",
        f"sqlite:///players.db?synchronous={SECRET}",
        f"memory://game:{SECRET}@db?schema=players",
        f"memory:?{SECRET}",
        f"postgresql://game:{SECRET}@{PLACE}/players?schema=",
        f"postgresql://game:{SECRET}@{PLACE}/players?schema=\0{SECRET}",
        f"postgresql://game:{SECRET}@{PLACE}/players?lease=soon",
        f"postgresql://game@{PLACE}/players?lease={SECRET}",
        f"postgresql://game@{PLACE}/players?timeout={SECRET}",
        f"postgresql://game:{SECRET}@{PLACE}/players",
        f"postgresql://game:a/{SECRET}@{PLACE}/players",
        f"postgresql://game:1/{SECRET}@{PLACE}/players",
        f"postgresql://game:a#{SECRET}@{PLACE}/players",
        f"postgresql://game:a?{SECRET}@{PLACE}/players",
        f"postgresql://game:a@{SECRET}@{PLACE}/players",
        f"postgresql://127.0.0.1:1/{SECRET}@{PLACE}/players",
        f"postgresql://127.0.0.1:1?{SECRET}=7",
        f"postgresql://{SECRET}@{PLACE}/players",
        f"postgresql://game@{PLACE}/{SECRET}",
        f"postgresql://game@{PLACE}:{SECRET}/players",
        f"postgresql://[{SECRET}/players",
        f"postgresql://game@/players?host=/{SECRET}",
        f"postgresql://game@{PLACE}/players?{SECRET}",
        *(f"postgresql://game@{PLACE}/players?{name}={SECRET}" for name in ("sslmode", "sslnegotiation", "gsslib")),
        *(f"postgresql://game@{PLACE}/players?{name}={SECRET}" for name in ("target_session_attrs", "passfile")),
        *(f"postgresql://game@{PLACE}/players?ssl_{name}_protocol_version={SECRET}" for name in ("min", "max")),
        *(f"postgresql://game@{PLACE}/players?sslmode=require&{name}={SECRET}" for name in ("sslcert", "sslrootcert")),
        f"postgresql://game@/players?host=127.0.0.1&port={SECRET}",
        f"redis://game:{SECRET}@{PLACE}/0?prefix=",
        f"redis://{PLACE}/0?prefix={SECRET * 99}",
        f"redis://{PLACE}/0?lease={SECRET}",
        f"redis://game:{SECRET}@{PLACE}/0?socket_timeout=soon&password={SECRET}",
        f"redis://{PLACE}/0?socket_timeout={SECRET}",
        f"redis://{PLACE}/0?{SECRET}=7",
        f"redis://game:{SECRET}@{PLACE}/0",
        f"redis://game:a/{SECRET}@{PLACE}/0",
        f"redis://127.0.0.1:1/{SECRET}@{PLACE}/0",
        f"redis://game:a#{SECRET}@{PLACE}/0",
        f"redis://game:a?{SECRET}@{PLACE}/0",
        f"redis://127.0.0.1:1?{SECRET}@{PLACE}/0",
        f"redis://127.0.0.1:1#{SECRET}@{PLACE}/0",
        f"redis://{SECRET}@{PLACE}/0",
        f"redis://{PLACE}/{SECRET}",
        f"redis://{PLACE}:{SECRET}/0",
        f"redis://[{SECRET}/0",
        f"unix://u:a/{SECRET}@/sock",
        f"unix://u:{SECRET}@/no/sock",
        f"unix:///{SECRET}?db=1",
        f"unix:///no/sock?db={SECRET}",
        f"unix:///no/sock?password={SECRET}",
        f"rediss://{PLACE}/0?ssl_cert_reqs={SECRET}",
        *(
            f"rediss://{PLACE}/0?ssl_{name}={SECRET}"
            for name in ("ca_certs", "certfile", "keyfile", "ciphers", "ca_data")
        ),
        *(f"rediss://{PLACE}/0?ssl_{name}={SECRET}" for name in ("min_version", "include_verify_flags", "password")),
        f"redis+sentinel://game:{SECRET}@db",
        f"redis+sentinel://game:{SECRET}@{PLACE}/main",
        f"redis+sentinel://game:a/{SECRET}@{PLACE}/main",
        f"redis+sentinel://{PLACE}/{SECRET}",
        f"redis+sentinel://{PLACE}/main/{SECRET}",
        f"redis+sentinel://{PLACE},127.0.0.1:{SECRET}/main",
    ],
)
async def test_nothing_after_the_scheme_is_in_an_error_a_log_or_a_repr(url, caplog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = ""
    with pytest.raises((OptionError, StoreError)) as caught:
        store = open_store(url, **({"timeout": 2} if url.startswith(("p", "r", "u")) and "timeout=" not in url else {}))
        shown = repr(store) + store.name
        await store.open()
    error = caught.value
    assert SECRET not in f"{shown} {error!r} {error} {error.__cause__!r} {caplog.text}"
    assert error.__suppress_context__ or error.__context__ is None


# Reasons

KNOWN = "tls/known.pem", "tls/known.key"
"""A certificate of its own authority, and its key; for a host of the name known."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files for TLS, right and wrong."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl here")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "tls" / "folder").mkdir(parents=True)
    (folder / "tls" / "rubbish").write_text("no certificate")
    for name in ("known", "other"):
        files = ["-out", f"tls/{name}.pem", "-keyout", f"tls/{name}.key", "-subj", f"/CN={name}"]
        how = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "9"]
        subprocess.run([openssl, "req", "-x509", *how, *files], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def certificates(folder, monkeypatch):
    """They are in `tls`, and none at home."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))


REASONS = [
    (
        "sslmode=verify-full",
        "sslmode=verify-full needs the certificate of the .* no file ~/.postgresql/root.crt",
    ),
    ("sslmode=verify-ca", "no file ~/.postgresql/root.crt; name one by sslrootcert="),
    (
        "sslmode=verify-full&sslrootcert=tls/none",
        "the file of sslrootcert cannot be read: No such file",
    ),
    (
        "sslmode=require&sslrootcert=tls/none",
        "the file of sslrootcert cannot be read: No such file",
    ),
    ("sslmode=verify-ca&sslrootcert=tls/folder", "the file of sslrootcert cannot be read: Is a directory"),
    ("sslmode=verify-ca&sslrootcert=tls/rubbish", "the file of sslrootcert has no certificate in it"),
    ("sslmode=require&sslcrl=tls/none", "the file of sslcrl cannot be read: No such file or directory"),
    ("sslcert=tls/none", "the file of sslcert cannot be read: No such file or directory"),
    ("sslcert=tls/rubbish", "sslcert: these files are no certificate with its key"),
    (
        f"sslcert={KNOWN[0]}&sslkey=tls/other.key",
        "sslcert and sslkey: these files are no certificate",
    ),
    (f"sslcert={KNOWN[0]}&sslkey=tls/none", "the file of sslkey cannot be read: No such file or directory"),
    (
        "sslmode=bogus",
        "sslmode of the DSN, or PGSSLMODE, is one of disable, allow, prefer, require, verify-ca",
    ),
    ("sslnegotiation=bogus", "sslnegotiation of the DSN, or PGSSLNEGOTIATION, is one of postgres, direct"),
    ("target_session_attrs=bogus", "target_session_attrs of the DSN, or PGTARGETSESSIONATTRS, is one of any, primary"),
    ("ssl_min_protocol_version=SSLv3", "ssl_min_protocol_version .* is one of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3"),
    ("ssl_max_protocol_version=9", "ssl_max_protocol_version of the DSN, or PGSSLMAXPROTOCOLVERSION, is one of TLSv1"),
    ("gsslib=bogus", "gsslib of the DSN, or PGGSSLIB, is one of gssapi, sspi"),
    ("bogus", "the DSN cannot be understood: a port is a number, a parameter has a value"),
    ("sslmode=disable&sslrootcert=tls/none", "cannot be reached .ConnectionRefusedError: Connection refused"),
]


@pytest.mark.parametrize(("query", "reason"), REASONS, ids=[query for query, _ in REASONS])
async def test_what_is_wrong_with_a_dsn_of_postgresql_is_told(certificates, query, reason):
    with pytest.raises((OptionError, StoreUnavailableError), match=reason):
        await open_store(f"postgresql://game:{SECRET}@{PLACE}/players?{query}").open()


async def test_what_is_wrong_with_the_environment_of_postgresql_is_told(certificates, monkeypatch):
    monkeypatch.setenv("PGSSLMODE", "bogus")
    with pytest.raises(OptionError, match="or PGSSLMODE, is one of"):
        await PostgresStore(f"postgresql://game@{PLACE}/players").open()
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", "tls/none")
    with pytest.raises(OptionError, match="the file of sslrootcert cannot be read"):
        await PostgresStore(f"postgresql://game@{PLACE}/players").open()


REASONS_OF_REDIS = [
    ("rediss", "ssl_ca_certs=tls/none", "the file of ssl_ca_certs cannot be read: No such file or directory"),
    ("rediss", "ssl_ca_certs=tls/folder", "the file of ssl_ca_certs cannot be read: Is a directory"),
    ("rediss", "ssl_ca_certs=tls/rubbish", "the file of ssl_ca_certs has no certificate in it"),
    ("rediss", "ssl_certfile=tls/none", "the file of ssl_certfile cannot be read: No such file or directory"),
    (
        "rediss",
        f"ssl_certfile={KNOWN[0]}&ssl_keyfile=tls/other.key",
        "ssl_certfile and ssl_keyfile: these",
    ),
    ("rediss", f"ssl_keyfile={KNOWN[1]}", "ssl_keyfile needs ssl_certfile"),
    ("rediss", "ssl_ciphers=bogus", "one of ssl_ca_certs, .*ssl_ciphers, ssl_min_version cannot be used"),
    ("rediss", "ssl_min_version=999", "one of ssl_ca_certs, .*ssl_ciphers, ssl_min_version cannot be used"),
    ("rediss", "ssl_cert_reqs=bogus", "ssl_cert_reqs is none, optional or required"),
    ("redis", "bogus=1", "the URL has a setting that redis-py does not know"),
    ("redis", "ssl_ca_certs=tls/known.pem", "the URL has a setting that redis-py does not know"),
    ("redis", "socket_connect_timeout=soon", "the URL has an impossible value of socket_connect_timeout"),
    ("redis", "db=first", "the URL has an impossible value of db"),
    ("redis", "", "cannot be reached .ConnectionError: Connection refused"),
    ("redis+sentinel", "", "no Sentinel that answers knows a primary of that name"),
]


@pytest.mark.parametrize(
    ("scheme", "query", "reason"), REASONS_OF_REDIS, ids=[f"{scheme} {query}" for scheme, query, _ in REASONS_OF_REDIS]
)
async def test_what_is_wrong_with_a_url_of_redis_is_told(certificates, scheme, query, reason):
    place = f"{PLACE}/main" if "sentinel" in scheme else f"{PLACE}/0"
    with pytest.raises((OptionError, StoreUnavailableError), match=reason):
        await open_store(f"{scheme}://game:{SECRET}@{place}?{query}").open()


async def test_a_database_of_redis_that_is_no_number_is_not_taken_for_the_first():
    with pytest.raises(OptionError, match="the port and the database are numbers"):
        open_store(f"redis://{PLACE}/first")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "the certificate of the server is refused: self-signed certificate"),
        ("ssl_ca_certs=tls/known.pem", "the certificate of the server is refused: IP address mismatch"),
        ("ssl_ca_certs=tls/other.pem", "the certificate of the server is refused: self-signed certificate"),
    ],
)
async def test_why_a_server_is_refused_by_its_certificate_is_told_without_its_address(certificates, query, reason):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*KNOWN)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # of the other end of a failed handshake
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises((OptionError, StoreUnavailableError), match=reason) as caught:
            await open_store(f"rediss://127.0.0.1:{port}/0?{query}").open()
    assert "127.0.0.1" not in str(caught.value)


@needs_server(POSTGRES)
async def test_a_server_without_tls_says_so():
    with pytest.raises(StoreUnavailableError, match="it does no TLS"):
        await open_store(joined(POSTGRES, "sslmode=require")).open()


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
    with pytest.raises(DurationError, match="timeout: cannot read"):
        open_store("redis://db?timeout=soon")


@pytest.mark.parametrize("url", ["sqlite:///players.db?synchronos=FULL", "memory:?schema=x", "memory://?schema=x"])
def test_a_parameter_that_nobody_takes_is_refused(url):
    with pytest.raises(OptionError):
        open_store(url)


def test_a_parameter_that_is_misspelt_is_told_what_was_meant():
    with pytest.raises(OptionError, match=r"has a parameter that there is not; did you mean 'synchronous'"):
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
        with pytest.raises(OptionError, match="unrecognized configuration parameter …"):
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
