"""Redis as `RedisStore` uses it: the Lua scripts, how to connect, one call on a connection, and what errors mean.

Of the driver only connections are used, not its client and its pool, and only this module touches them. A connection
has one call at a time. If anything happens before its reply was read completely, the connection is closed: otherwise
every later call would get the answer to the one before it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from hashlib import sha1
from typing import Any
from urllib.parse import urlsplit

from ...errors import (
    CageySessionsError,
    MissingExtraError,
    OptionError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
)
from ..contract import MAX_NUMBER
from ..reasons import SettingsError, certificate_fault, reason_of
from ..rows import LAST_CLAIMED

try:
    from hiredis import pack_command
    from redis import exceptions as errors
    from redis.asyncio import ConnectionPool
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
    from redis.backoff import NoBackoff
except ImportError as _error:
    raise MissingExtraError(
        'RedisStore needs redis-py and hiredis: pip install "cagey-sessions[redis]"', extra="redis"
    ) from _error

__all__ = [
    "CLAIM",
    "ERASE",
    "FIELDS",
    "LOAD",
    "NAMES",
    "RELEASE",
    "RENEW",
    "SAVE",
    "Address",
    "Script",
    "append_fsync",
    "ask",
    "cut",
    "explained",
    "finish",
    "is_live",
    "loss_class",
    "parse_info",
    "run_script",
    "text_at",
]

SENTINEL_PORT = 26379
FORGET_NODES = 7 * 24 * 3600
"""After how many seconds without a renewal a lease is removed. An owner without a lease is put in doubt before others
get its users, like one whose lease has expired."""

# Scripts


FIELDS = ("epoch", "owner", "released", "version", "schema", "body", "saved_at", "erased")


class Script:
    """A Lua script, and the hash by which the engine names it; ``{fields}`` in it stands for the names of `FIELDS`."""

    def __init__(self, text: str) -> None:
        text = text.replace("{fields}", ", ".join(f"'{field}'" for field in FIELDS))
        self.text = text
        self.sha: str = sha1(text.encode(), usedforsecurity=False).hexdigest()


# Reads fields of a hash; of a key that is no hash it returns the error, and raises any other.
_READ = """
local function read(key, ...)
    local row = redis.pcall('HMGET', key, ...)
    if row['err'] and not string.find(row['err'], 'WRONGTYPE', 1, true) then return redis.call('HMGET', key, ...) end
    return row
end
"""
# The checks of `StoredRow`, in Lua, for a row that is to be changed: any client can write any field of a hash.
_IS_SOUND = (
    _READ
    + """
local function whole(text, least, most)
    if not text or #text > 16 or not (text == '0' or string.match(text, '^[1-9]%d*$')) then return false end
    return tonumber(text) >= least and tonumber(text) <= most
end
local function is_fence_sound(row, erased)
    local epoch, owner, released, version = row[1], row[2], row[3], row[4]
    if row['err'] or not whole(epoch, 1, {most}) or not whole(version, 0, {most}) then return false end
    if released == '1' then return not erased or erased == '1' end
    return released == '0' and owner and owner ~= '' and not erased
end
local function is_sound(row)
    if not is_fence_sound(row, row[8]) then return false end
    local version, schema, body, saved_at, erased = row[4], row[5], row[6], row[7], row[8]
    if not body then return version == '0' end
    return version ~= '0' and not erased and whole(schema, 0, {most}) and saved_at and #saved_at <= 32
        and (string.match(saved_at, '^%-?%d+%.?%d*$') or string.match(saved_at, '^%-?%d+%.?%d*e[-+]?%d+$'))
        and math.abs(tonumber(saved_at)) < math.huge
end
""".replace("{most}", f"{MAX_NUMBER - 1}")
)

# That a lease has expired does not make its owner dead: after an outage the leases of all servers have expired. A claim
# of such a user first puts the owner in doubt, for a third of a lease. Only an owner that has not renewed its lease by
# then is dead.
_IS_DEAD = """
local now = redis.call('TIME')
local micros = now[1] * 1000000 + now[2]
local judged = {}
local function is_dead(owner, nodes, doubt)
    if judged[owner] ~= nil then return judged[owner] end
    local key = nodes .. owner
    local node = redis.call('HMGET', key, 'alive_until', 'doubted')
    local ended = (tonumber(node[1] or '') or 0) < micros
    local dead = ended and node[2] == '1'
    if ended and not dead then
        redis.call('HSET', key, 'alive_until', string.format('%.0f', micros + doubt * 1000000), 'doubted', '1')
        redis.call('EXPIRE', key, {forget})
    end
    judged[owner] = dead
    return dead
end
""".replace("{forget}", str(FORGET_NODES))

RENEW = Script(
    """
local now = redis.call('TIME')
local until_when = now[1] * 1000000 + now[2] + ARGV[1] * 1000000
redis.call('HSET', KEYS[1], 'alive_until', string.format('%.0f', until_when), 'doubted', ARGV[2])
redis.call('EXPIRE', KEYS[1], {forget})
""".replace("{forget}", str(FORGET_NODES))
)

# A new row gets an epoch above all that were ever given, the clock in microseconds: the row of a user may have been
# deleted. The answer for a row that is damaged is nil.
CLAIM = Script(
    _IS_SOUND
    + _IS_DEAD
    + """
local owner, nodes, doubt = ARGV[1], ARGV[2], tonumber(ARGV[3])
local answers = {}
for place, key in ipairs(KEYS) do
    local row = read(key, {fields})
    if not row['err'] and not row[1] and redis.call('EXISTS', key) == 0 then
        local epoch = string.format('%.0f', micros)
        redis.call('HSET', key, 'epoch', epoch, 'owner', owner, 'released', '0', 'version', '0')
        answers[place] = {'', epoch}
    elseif not is_sound(row) or tonumber(row[1]) > {last} or tonumber(row[4]) > {last} then
        answers[place] = false
    elseif row[3] == '1' or row[2] == owner or is_dead(row[2], nodes, doubt) then
        local epoch = redis.call('HINCRBY', key, 'epoch', 1)
        redis.call('HSET', key, 'owner', owner, 'released', '0')
        redis.call('HDEL', key, 'erased')
        answers[place] = {'', epoch, row[4], row[5], row[6], row[7]}
    else
        answers[place] = {row[2], row[1]}
    end
end
return answers
""".replace("{last}", str(LAST_CLAIMED))
)

# Arguments are what takes the time of a call, so all numbers of a row are in one, and the body in another. The answer
# is one letter for each row; see `_ANSWERS` in `store.py`.
SAVE = Script(
    _IS_SOUND
    + """
local owner = ARGV[1]
local answers = {}
for place, key in ipairs(KEYS) do
    local epoch, version, schema, saved_at, release = string.match(ARGV[2 * place], '^(%S+) (%S+) (%S+) (%S+) (%S+)$')
    local row = read(key, 'epoch', 'owner', 'released', 'version', 'erased')
    local answer = 'A'
    if row['err'] then
        answer = 'W'
    elseif not row[1] and redis.call('EXISTS', key) == 0 then
        answer = 'M'
    elseif not is_fence_sound(row, row[5]) then
        answer = 'D'
    elseif row[5] then
        answer = 'E'
    elseif row[1] ~= epoch or row[2] ~= owner then
        answer = 'F'
    else
        local kept, new = tonumber(row[4]), tonumber(version)
        if new > kept and row[3] == '1' then
            answer = 'F'
        elseif new > kept then
            redis.call('HSET', key, 'version', version, 'schema', schema, 'body', ARGV[2 * place + 1],
                       'saved_at', saved_at, 'released', release)
            answer = 'S'
        elseif new == kept and release == '1' then
            redis.call('HSET', key, 'released', '1')
        end
    end
    answers[place] = answer
end
return table.concat(answers)
"""
)

# The row of a user who was never saved is deleted, unless it is a tombstone.
RELEASE = Script(
    _IS_SOUND
    + """
local owner = ARGV[1]
local answers = {}
for place, key in ipairs(KEYS) do
    local row = read(key, {fields})
    answers[place] = 0
    if is_fence_sound(row, row[8]) and row[1] == ARGV[place + 1] and row[2] == owner and row[3] == '0' then
        if row[4] ~= '0' or row[6] or row[7] then
            redis.call('HSET', key, 'released', '1')
        else
            redis.call('DEL', key)
        end
        answers[place] = 1
    end
end
return answers
"""
)

# In a damaged row the owner and the epoch may be unusable; the erasure then needs no owner, and takes a new epoch.
ERASE = Script(
    _IS_SOUND
    + _IS_DEAD
    + """
local key = KEYS[1]
if redis.call('EXISTS', key) == 0 then return {'', 0} end
local row = read(key, {fields})
local epoch = string.format('%.0f', micros)
local had_data = row[6] or not is_sound(row)
if is_fence_sound(row, row[8]) then
    if row[3] ~= '1' and row[2] ~= ARGV[1] and not is_dead(row[2], ARGV[2], tonumber(ARGV[3])) then
        return {row[2], 0}
    end
    if tonumber(row[1]) <= {last} then epoch = redis.call('HINCRBY', key, 'epoch', 1) end
end
local owner = not row['err'] and row[2] or ''
redis.call('DEL', key)
redis.call('HSET', key, 'epoch', epoch, 'owner', owner, 'released', '1', 'version', '0', 'erased', '1',
           'saved_at', string.format('%.6f', micros / 1000000))
return {'', had_data and 1 or 0}
""".replace("{last}", str(LAST_CLAIMED - 1))
)

# These only read, but they are not flagged as such, so that a replica refuses them: a replica that is behind could
# answer that a user is new, or leave users out of a scan.
LOAD = Script(
    "#!lua flags=allow-oom\n"
    + _READ
    + """
local rows = {}
for place, key in ipairs(KEYS) do
    local row = read(key, {fields})
    if row['err'] then
        row = row['err']
    elseif not row[1] and redis.call('EXISTS', key) == 0 then
        row = false
    end
    rows[place] = row
end
return rows
"""
)
NAMES = Script("#!lua flags=allow-oom\nreturn redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])")


# Connections


class Address:
    """Where the engine is, by its URL, and how to connect to it. Raises `OptionError` for a URL with a fault."""

    def __init__(self, url: str, timeout: float) -> None:
        scheme, sentinel, rest = url.partition("+sentinel://")
        self._timeout = timeout
        self._sentinels: list[tuple[str, int]] = []
        self._service = ""
        try:
            if sentinel:
                path = rest.partition("?")[0]
                place, _, path = path.partition("/")
                user, at, hosts = place.rpartition("@")
                self._service, _, database = path.partition("/")
                self._sentinels = [_host_and_port(host) for host in hosts.split(",")]
                if not self._service:
                    raise ValueError("no service")
                url = f"{scheme}://{user}{at}primary/{database or 0}{rest[len(rest.partition('?')[0]) :]}"
            if not url.startswith("unix:") and not re.fullmatch(r"/?\d*", urlsplit(url).path):
                raise ValueError("no number of a database")  # the driver would silently take database 0
            self._pool = ConnectionPool.from_url(url)
        except ValueError as error:
            known = _IMPOSSIBLE.match(str(error))
            raise OptionError(f"the URL has an impossible value of {known[1]}" if known else _NO_URL) from None
        self._pool.connection_kwargs.update(
            socket_timeout=None,  # deadlines are enforced by `Connections`, which cuts the connection
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # the driver must not repeat a call by itself
            decode_responses=False,
            protocol=2,
            health_check_interval=0,
            client_name="cagey-sessions",
        )
        # the driver checks the settings only when it makes a connection; nothing is connected to yet
        try:
            self._pool.make_connection()  # type: ignore[no-untyped-call]
        except TypeError:
            raise OptionError("the URL has a setting that redis-py does not know") from None
        except (errors.RedisError, ValueError):
            raise OptionError(
                "the URL has an impossible value of a setting; ssl_cert_reqs is none, optional or required"
            ) from None

    async def make_connection(self) -> Any:
        """Make a connection to the primary, which is not connected yet. With Sentinel, ask which server that is.

        Raises `SettingsError` if the files of TLS cannot be used, and the driver's errors.
        """
        if self._sentinels:
            patience = {"socket_timeout": self._timeout / 3, "socket_connect_timeout": self._timeout / 3}
            sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
                self._sentinels, sentinel_kwargs=patience | {"retry": Retry(NoBackoff(), 0)}
            )
            try:
                host, port = await sentinel.discover_master(self._service)
            finally:
                for each in sentinel.sentinels:
                    await each.aclose()
            self._pool.connection_kwargs.update(host=host, port=port)
        connection: Any = self._pool.make_connection()  # type: ignore[no-untyped-call]
        if hasattr(connection, "ssl_context"):
            try:
                connection.ssl_context.get()
            except (OSError, ValueError, TypeError):
                raise SettingsError(self._tls_fault()) from None
        return connection

    def _tls_fault(self) -> str:
        """What is wrong with the files and settings of TLS."""
        given = {name: self._pool.connection_kwargs.get(name) for name in _TLS_SETTINGS}
        authorities = {"ssl_ca_certs": path} if (path := given["ssl_ca_certs"]) else {}
        certificate, key = ((name, path) if (path := given[name]) else None for name in ("ssl_certfile", "ssl_keyfile"))
        if key is not None and certificate is None:
            return "ssl_keyfile needs ssl_certfile"
        return certificate_fault(authorities, certificate, key, given["ssl_password"] or "") or (
            f"one of {', '.join(_TLS_SETTINGS)} cannot be used"
        )


_NO_URL = (
    "the URL cannot be understood: the port and the database are numbers, and in a password what is not a letter or a "
    "digit is percent-encoded. With Sentinel it is redis+sentinel://host:port,host:port/service/database"
)
_IMPOSSIBLE = re.compile(r"Invalid value for '(\w+)'")
_TLS_SETTINGS = tuple(
    f"ssl_{name}"
    for name in ("ca_certs", "ca_path", "ca_data", "certfile", "keyfile", "password", "ciphers", "min_version")
)


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    return (host.strip("[]"), int(port)) if colon and not text.endswith("]") else (text.strip("[]"), SENTINEL_PORT)


def is_live(connection: Any) -> bool:
    """Whether a connection can take a call: it is connected, and there is no part of an unread reply in it."""
    reader, writer = connection._reader, connection._writer
    if reader is None or writer is None or writer.is_closing():
        return False
    if reader.at_eof() or reader.exception() is not None:
        return False
    return not reader._buffer and not connection._parser._reader.has_data()  # bytes after the last reply


def cut(connection: Any) -> None:
    """Close a connection at once. The driver's own way would wait until everything is sent, which may be never."""
    if connection is not None and connection._writer is not None:
        connection._writer.transport.abort()
        connection._reader = connection._writer = None


async def finish(connection: Any) -> None:
    """Close a connection on which nothing is under way."""
    cut(connection)


async def ask(connection: Any, *command: Any) -> Any:
    """Send a command and read its reply; raises the driver's error if it is one."""
    try:
        await connection.send_packed_command([pack_command(command)], check_health=False)
        return await connection.read_response(disable_decoding=True)
    except errors.ResponseError as error:
        if isinstance(error, _GONE):
            cut(connection)
        raise
    except BaseException:
        cut(connection)  # the reply may still come, and would be taken for that of the next call
        raise


async def run_script(connection: Any, script: Script, keys: Sequence[str | bytes], *arguments: Any) -> Any:
    """Run a script, and return its answer; raises the driver's errors."""
    try:
        return await ask(connection, "EVALSHA", script.sha, len(keys), *keys, *arguments)
    except errors.NoScriptError:
        # Nothing was done: the engine was restarted, or its scripts were flushed. Send the text in the call itself, as
        # they may be flushed again.
        return await ask(connection, "EVAL", script.text, len(keys), *keys, *arguments)


# What the engine says

_GONE = (errors.ReadOnlyError, errors.MasterDownError)
"""Replies of an engine that is not a primary, or cannot act as one now. A new connection may reach another engine."""
_FOR_NOW = (*_GONE, errors.OutOfMemoryError, errors.ClusterDownError, errors.TryAgainError)
"""Replies about the state of the engine, not about what was asked for."""
_BEGINNINGS = ("MISCONF", "NOREPLICAS", "BUSY", "UNKILLABLE")
"""The beginnings of more such replies, for which the driver has no class of error."""


def explained(error: BaseException) -> BaseException:
    """An error of the driver as an error of the store.

    The driver's own error is not passed on, also not as a cause: what it says about a connection quotes the URL.
    """
    if isinstance(error, (CageySessionsError, asyncio.CancelledError)):
        return error
    if isinstance(error, SettingsError):
        return StoreUnavailableError(str(error))
    # an engine that does not know a command quotes its arguments: a password, or a script with data
    text = str(error).partition(", with args beginning with")[0]
    text = _USER.sub("this user has", text)
    if isinstance(error, (errors.AuthenticationError, errors.AuthorizationError)) or text.startswith("NOAUTH"):
        return StoreUnavailableError(f"Redis refuses the connection: {text}; check the user and password")
    if isinstance(error, errors.NoPermissionError):
        return StoreLayoutError(f"Redis: this user may not do what a RedisStore does: {text}")
    if isinstance(error, errors.ResponseError) and not isinstance(error, _FOR_NOW) and not text.startswith(_BEGINNINGS):
        return StoreError(f"Redis: {text}")
    if isinstance(error, (errors.RedisError, OSError, TimeoutError)):
        reason = _reason(error, text)
        return StoreUnavailableError(f"Redis cannot be reached ({f'{type(error).__name__}: {reason}'.rstrip(': ')})")
    return error


_USER = re.compile(r"\b(User|user) \S+ has\b")
_REPLIES = (errors.ResponseError, errors.BusyLoadingError)
"""Errors whose text is a reply of the engine, and quotes nothing of the URL."""


def _reason(error: BaseException, text: str) -> str:
    """The reason why the engine cannot be reached, without its address."""
    if isinstance(error, _REPLIES):
        return text
    if isinstance(error, MasterNotFoundError):
        return "no Sentinel that answers knows a primary of that name"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return reason_of(cause)
    return _PLACE.split(text)[0] if error.__cause__ is None else type(error.__cause__).__name__


_PLACE = re.compile(r"\.? (?:connecting to|reading from|writing to|while reading|while writing)\b")


def parse_info(reply: bytes) -> dict[str, str]:
    """The fields of a reply to INFO."""
    pairs = (line.partition(":") for line in reply.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}


async def text_at(connection: Any, key: str) -> str:
    """The text under a key; empty if there is none, or if something else than a text is there."""
    try:
        return (await ask(connection, "GET", key) or b"").decode(errors="replace")
    except errors.ResponseError as error:
        if "WRONGTYPE" in str(error):
            return ""
        raise


async def append_fsync(connection: Any) -> str:
    """How often the engine syncs its log to the disk, by its own setting."""
    try:
        reply = await ask(connection, "CONFIG", "GET", "appendfsync")
    except errors.ResponseError:
        return "unknown"  # hosted engines forbid it
    return reply[1].decode() if len(reply) == 2 else "unknown"


def loss_class(info: dict[str, str], fsync: str) -> str:
    """What a crash may lose, by the settings of the engine."""
    failover = "; a failover loses what had not reached the replica"
    if info.get("aof_enabled") != "1":
        return f"appendonly=no: a crash of Redis loses everything since its last snapshot{failover}"
    lost = {
        "always": "nothing acknowledged is lost when Redis or its machine dies",
        "everysec": "when its machine dies, about the last second is lost",
        "no": "when its machine dies, about the last half minute is lost",
    }.get(fsync, "when its machine dies, what was not yet on the disk is lost")
    return f"appendonly=yes, appendfsync={fsync}: {lost}{failover}"
