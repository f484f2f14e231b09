"""`RedisStore`: users in Redis or Valkey.

A user is a hash under the prefix. A batch is one call of a Lua script, which the engine runs as one step: no other
client can come between the check of the fence and the write. Redis Cluster is refused, because a script may use only
keys of one slot there. A call whose outcome is unknown is not repeated here: the caller decides what to do.

The scripts, and what is done on a connection, are in `engine.py`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from ...errors import (
    CorruptRecordError,
    OptionError,
    OwnedElsewhereError,
    StoreContractError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
)
from ...options import SECOND, Duration, is_text, parse_duration
from ...wording import quote
from ..connections import Connections
from ..contract import Answers, Claim, Outcome, Record, Store, Verdict, latest_of, text_of
from ..layouts import check_layout
from ..leases import Leases
from ..reasons import SettingsError
from ..rows import StoredRow, damaged, key_of, no_id, user_id_of
from .engine import (
    CLAIM,
    ERASE,
    LOAD,
    NAMES,
    RELEASE,
    RENEW,
    SAVE,
    Address,
    append_fsync,
    ask,
    cut,
    explained,
    finish,
    is_live,
    loss_class,
    parse_info,
    run_script,
    text_at,
)

__all__ = ["RedisStore"]

T = TypeVar("T")

# numbers and flags as our scripts write them; anything else in a field is damaged
_WHOLE = re.compile(rb"0|[1-9]\d{0,15}")
_TIME = re.compile(rb"-?\d+\.?\d*(?:e[-+]?\d+)?")
_FLAGS = {b"0": False, b"1": True}

LAYOUT = 1
"""The number of the layout, kept under the prefix."""
OLDEST = 7
CONNECTIONS = 6
"""One for each batch in flight, of which there are 4 by default, and two for logins."""
ROWS_IN_A_CALL = 200
"""The engine serves no other client while a script runs."""
BYTES_IN_A_CALL = 1_048_576
NAMES_IN_A_SCAN = 1000
"""How many keys one step of a scan looks at. SCAN goes over all keys of the engine, also those of other programs."""
ROWS_IN_A_SCAN = 50
LONGEST_PREFIX = 256
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")


class RedisStore(Store):
    """Users in Redis 7 or newer, or Valkey, shared by any number of servers.

    `url` says where it is: ``redis://``, ``rediss://`` (TLS) or ``unix://``, as redis-py understands them, or
    ``redis+sentinel://host:port,host:port/service/database``, where the Sentinels say which server is the primary. All
    keys begin with `prefix`. A call that takes longer than `timeout` (seconds, or a text such as "10s") has its
    connection closed, and an unknown outcome. If a server dies, others cannot claim its users until its `lease` has run
    out, and then for another third of it, which begins when one of them first asks. With a shorter lease a server that
    only stalls loses its users sooner.

    Raises `MissingExtraError` without redis-py and hiredis, and `OptionError`. `open` raises `StoreUnavailableError` if
    the engine cannot be reached, refuses the user, or is a replica, and `StoreLayoutError` for Redis Cluster, for an
    engine that is set to evict keys, for one that this user may not write to, and for a prefix that another program
    uses. How safe acknowledged data is depends on the engine's settings: `loss_class` says what a crash may lose.

    Costs one call of a script for each 200 users, and about half a kilobyte of the engine's memory for a user, besides
    the body.
    """

    shared = True

    def __init__(
        self,
        url: str = "redis://127.0.0.1:6379/0",
        *,
        prefix: str = "cagey-sessions:",
        timeout: Duration = 10,
        lease: Duration = 15,
    ) -> None:
        if not is_text(url) or url.partition("://")[0] not in SCHEMES:
            raise OptionError(
                f"the URL of a RedisStore begins with one of {', '.join(f'{each}://' for each in SCHEMES)}"
            )
        if not is_text(prefix) or not 0 < len(prefix) <= LONGEST_PREFIX:
            raise OptionError(f"prefix is a text of 1 to {LONGEST_PREFIX} characters, not {quote(prefix)}")
        self._timeout = parse_duration(timeout, "timeout", shortest=SECOND // 10) / SECOND
        self._lease = parse_duration(lease, "lease", shortest=SECOND) / SECOND
        if self._lease < self._timeout:
            raise OptionError(f"lease is at least timeout ({self._timeout:g} s): else it runs out during a claim")
        self._users, self._nodes, self._layout = (f"{prefix}{kind}" for kind in ("user:", "node:", "layout"))
        self._address = Address(url, self._timeout)
        self._state = "closed"
        self._connections: Connections[Any] | None = None
        self._lease_connection: Any = None
        """A connection for leases alone, so that a renewal waits behind no save."""
        self._leases = Leases(self.name, self._lease, self._send_renewal)
        self._incarnations: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """The incarnation that each connection leads to; after a failover some may still lead to the old primary."""

    # Opening and closing

    async def open(self) -> None:
        if self._state != "closed":
            raise StoreContractError("this RedisStore is open already; make one for each manager")
        self._state = "opening"
        self._leases = Leases(self.name, self._lease, self._send_renewal)
        connection = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._connect()
                self.loss_class: str = await self._prepare(connection)
            if self._state != "opening":
                raise StoreUnavailableError("this RedisStore was closed while it was opened")
        except BaseException as error:
            self._state = "closed"
            cut(connection)
            if isinstance(error, SettingsError):
                raise OptionError(str(error)) from None
            raise explained(error) from None
        self._connections = Connections(
            self.name,
            most=CONNECTIONS,
            timeout=self._timeout,
            connect=self._connect,
            is_live=self._is_usable,
            cut=cut,
            finish=finish,
        )
        self._connections.add(connection)
        self._state = "open"

    async def _prepare(self, connection: Any) -> str:
        """Check the engine and the prefix, load the scripts, and return the `loss_class`."""
        info = parse_info(await ask(connection, "INFO"))
        version = info.get("redis_version", "0")
        if int(version.partition(".")[0]) < OLDEST:
            raise StoreUnavailableError(f"Redis {OLDEST} or newer is needed, and this is {version}")
        if info.get("cluster_enabled") == "1" or info.get("redis_mode") == "cluster":
            raise StoreLayoutError(
                "this is Redis Cluster, where one script cannot save users who lie on different nodes; use one "
                "primary, with Sentinel if it is to fail over"
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise StoreLayoutError(
                f"this Redis is set to throw keys away when its memory is full (maxmemory-policy {policy}), and users "
                "with them; set it to noeviction, or give them an engine of their own"
            )
        # NX: marks an unused prefix as ours, and leaves any other mark, which is checked next
        await ask(connection, "SET", self._layout, f"cagey-sessions {LAYOUT}", "NX")
        kept = await text_at(connection, self._layout)
        mark, _, layout = kept.partition(" ")
        check_layout(self._layout, mark, layout, kind="key", known=LAYOUT, setting="prefix")
        for script in (RENEW, CLAIM, SAVE, RELEASE, ERASE, LOAD, NAMES):
            await ask(connection, "SCRIPT", "LOAD", script.text)
        await run_script(connection, CLAIM, [], "", self._nodes, 1)  # fails now if this user may not run scripts
        return loss_class(info, await append_fsync(connection))

    async def close(self) -> None:
        self._state = "closed"
        connections = self._connections
        if connections is None:
            return
        try:
            await self._leases.end()
            with suppress(Exception):
                async with asyncio.timeout(self._timeout):
                    for owner in self._leases.owners:
                        # if a user was not released, other servers need not wait for the lease to run out
                        await self._end_lease(owner)
        finally:
            self._connections = None
            cut(self._lease_connection)
            self._lease_connection = None
            await connections.close()

    # Calls

    def abort(self, call: asyncio.Task[Any]) -> None:
        """Close the connection of a call. The outcome of its command is unknown."""
        if self._connections is not None:
            self._connections.abort(call)

    async def _run(self, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Await `work(connection)`, and raise errors of the store.

        If another engine has taken over meanwhile, its answer does not count: the new one may not have the write.
        """
        if self._connections is None:
            raise StoreUnavailableError("this RedisStore is not open")

        async def checked(connection: Any) -> T:
            result = await work(connection)
            if not self._is_current(connection):
                raise StoreUnavailableError("another Redis has taken over meanwhile; it may know nothing of this call")
            return result

        try:
            return await self._connections.run(checked)
        except Exception as error:
            raise explained(error) from None

    async def _connect(self) -> Any:
        """A new connection to the primary; also notes the engine's incarnation."""
        connection = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._address.make_connection()
                await connection.connect()
                info = parse_info(await ask(connection, "INFO", "server", "replication"))
        except BaseException:
            cut(connection)
            raise
        if info.get("role", "master") != "master":  # such as a primary that was just demoted
            cut(connection)
            raise StoreUnavailableError("this Redis is a replica, which takes no writes")
        self.incarnation: str = info.get("run_id", "")  # another one after each restart, and on each server
        self._incarnations[connection] = self.incarnation
        return connection

    def _is_current(self, connection: Any) -> bool:
        """Whether a connection leads to the engine that was connected to last, and not to one that it has replaced."""
        return self._incarnations.get(connection) == self.incarnation

    def _is_usable(self, connection: Any) -> bool:
        return is_live(connection) and self._is_current(connection)

    # Leases

    async def _send_renewal(self, owner: str) -> None:
        if self._state != "open":
            raise StoreUnavailableError("this RedisStore is not open")
        try:
            if self._lease_connection is None or not self._is_usable(self._lease_connection):
                cut(self._lease_connection)
                self._lease_connection = await self._connect()
                if self._state != "open":
                    raise StoreUnavailableError("this RedisStore was closed meanwhile")
            await run_script(self._lease_connection, RENEW, [self._nodes + owner], self._lease, 0)
        except BaseException as error:
            keeper, self._lease_connection = self._lease_connection, None
            cut(keeper)
            raise explained(error) from None

    async def _end_lease(self, owner: str) -> None:
        """End a lease, and put the owner in doubt at once, so that the next claim of its users is granted."""
        await self._run(lambda connection: run_script(connection, RENEW, [self._nodes + owner], -1, 1))

    # The contract

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        if not user_ids:
            return []
        await self._leases.hold(owner)  # before the claim: without a lease the users could be taken at once

        async def claim(connection: Any) -> list[Claim | StoreError]:
            claims: list[Claim | StoreError] = []
            for first in range(0, len(user_ids), ROWS_IN_A_CALL):
                some = user_ids[first : first + ROWS_IN_A_CALL]
                keys = [self._key(user_id) for user_id in some]
                answers = await run_script(connection, CLAIM, keys, owner, self._nodes, self._lease / 3)
                for user_id, answer in zip(some, answers, strict=True):
                    if answer is None:
                        claims.append(await refusal(connection, user_id))
                    else:
                        claims.append(_claim(user_id, answer, owner))
            return claims

        async def refusal(connection: Any, user_id: int | str) -> StoreError:
            (fields,) = await run_script(connection, LOAD, [self._key(user_id)])
            try:
                row = _row(user_id, fields)
            except CorruptRecordError as error:
                return error
            return (row and row.claim_refusal(user_id)) or StoreError(f"the row of user {quote(user_id)} has changed")

        return await self._run(claim)

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        latest = latest_of(records)
        verdicts: dict[int | str, Verdict] = {}
        by_owner: dict[str, list[Record]] = {}
        for record in latest.values():
            if text_of(record.body) is None:
                verdicts[record.user_id] = Verdict(Outcome.INVALID, "the body is not text")
            else:
                by_owner.setdefault(record.owner, []).append(record)

        async def save(connection: Any) -> None:
            for owner, theirs in by_owner.items():
                for some in _portions(theirs):
                    keys = [self._key(record.user_id) for record in some]
                    arguments: list[str | bytes] = [owner]
                    for _, epoch, _, version, schema, body, saved_at, release in some:
                        # repr of a float gives the same float again; the script stores the text as it is
                        arguments.append(f"{epoch} {version} {schema} {saved_at!r} {release:d}")
                        arguments.append(body)
                    answers = await run_script(connection, SAVE, keys, *arguments)
                    for record, answer in zip(some, answers, strict=True):
                        verdicts[record.user_id] = _ANSWERS[answer]

        if by_owner:
            await self._run(save)
        return [verdicts[record.user_id] for record in records]

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        async def release(connection: Any) -> list[bool]:
            released: list[bool] = []
            for first in range(0, len(claims), ROWS_IN_A_CALL):
                some = claims[first : first + ROWS_IN_A_CALL]
                keys = [self._key(user_id) for user_id, _ in some]
                answers = await run_script(connection, RELEASE, keys, owner, *(epoch for _, epoch in some))
                released += map(bool, answers)
            return released

        return await self._run(release)

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        key = self._key(user_id)
        holder, had_data = await self._run(
            lambda connection: run_script(connection, ERASE, [key], owner, self._nodes, self._lease / 3)
        )
        if holder:
            name = holder.decode()
            raise OwnedElsewhereError(
                f"user {quote(user_id)} is on another server ({name}) and cannot be erased now",
                user_id=user_id,
                owner=name,
            )
        return bool(had_data)

    async def load(self, user_id: int | str) -> Record | None:
        key = self._key(user_id)
        (fields,) = await self._run(lambda connection: run_script(connection, LOAD, [key]))
        row = _row(user_id, fields)
        return None if row is None else row.record(user_id)

    async def holder(self, user_id: int | str) -> tuple[str, int]:
        key = self._key(user_id)
        (fields,) = await self._run(lambda connection: run_script(connection, LOAD, [key]))
        row = _row(user_id, fields)
        return ("", 0) if row is None else row.holder(user_id)

    async def scan(self) -> AsyncIterator[Record | StoreError]:
        """As `Store.scan`. Redis may return a key twice, so all keys are remembered: about 100 bytes for each user."""
        # the prefix may have characters in it that mean something in a pattern
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._users) + "*"
        seen: set[bytes] = set()
        cursor = b"0"

        async def name_some(connection: Any) -> tuple[bytes, list[bytes]]:
            following, names = await run_script(connection, NAMES, [], cursor, pattern, NAMES_IN_A_SCAN)
            return following, names

        async def read(some: list[bytes], connection: Any) -> list[Record | StoreError | None]:
            rows = await run_script(connection, LOAD, some)
            start = len(self._users.encode())
            return [_found(name[start:], fields) for name, fields in zip(some, rows, strict=True)]

        while True:
            cursor, names = await self._run(name_some)
            new = [name for name in dict.fromkeys(names) if name not in seen]
            seen.update(new)
            for first in range(0, len(new), ROWS_IN_A_SCAN):
                for record in await self._run(partial(read, new[first : first + ROWS_IN_A_SCAN])):
                    if record is not None:
                        yield record
            if cursor == b"0":
                return

    def _key(self, user_id: int | str) -> str:
        return self._users + key_of(user_id)


def _found(key: bytes, fields: Any) -> Record | StoreError | None:
    """What a scan yields for one key: a record, an error, or None for a user without data."""
    try:
        user_id = user_id_of(key.decode())
        row = _row(user_id, fields)
        return None if row is None else row.record(user_id)
    except UnicodeDecodeError:
        return no_id(key)
    except StoreError as error:
        return error


def _row(user_id: int | str, fields: Any) -> StoredRow | None:
    """The answer of LOAD for one key as a row; None if there is no such key.

    A field that our scripts would not have written so stays bytes, which the checks of `StoredRow` take for damage.
    """
    if fields is None:
        return None
    if isinstance(fields, bytes):
        raise damaged(user_id, "under its key is something else than a hash")
    epoch, owner, released, version, schema, body, saved_at, erased = fields
    return StoredRow(
        _number(epoch),
        owner and owner.decode(errors="replace"),
        _FLAGS.get(released, released),
        _number(version),
        _number(schema),
        body,
        float(saved_at) if saved_at and len(saved_at) <= 32 and _TIME.fullmatch(saved_at) else saved_at,
        False if erased is None else erased == b"1" or erased,
    )


def _number(field: bytes | None) -> int | bytes | None:
    return int(field) if field is not None and _WHOLE.fullmatch(field) else field


def _claim(user_id: int | str, answer: Sequence[Any], owner: str) -> Claim:
    """The answer of CLAIM for one user as a claim."""
    holder, epoch, *stored = answer
    if holder:
        return Claim(user_id, int(epoch), None, holder.decode(errors="replace"))
    if not stored or stored[2] is None:
        return Claim(user_id, int(epoch), None)
    version, schema, body, saved_at = stored
    return Claim(
        user_id, int(epoch), Record(user_id, int(epoch), owner, int(version), int(schema), body, float(saved_at))
    )


def _portions(records: list[Record]) -> list[list[Record]]:
    """Split records into lists that are short enough for one call of a script, by their number and by their bytes."""
    portions: list[list[Record]] = []
    size = BYTES_IN_A_CALL
    for record in records:
        if size >= BYTES_IN_A_CALL or len(portions[-1]) >= ROWS_IN_A_CALL:
            portions.append([])
            size = 0
        portions[-1].append(record)
        size += len(record.body)
    return portions


_ANSWERS = {
    ord("S"): Verdict(Outcome.SAVED),
    ord("A"): Verdict(Outcome.ALREADY),
    ord("F"): Verdict(Outcome.FENCED),
    ord("M"): Verdict(Outcome.MISSING),
    ord("E"): Verdict(Outcome.ERASED),
    ord("W"): Verdict(Outcome.FAILED, "something else is kept under the key of this user"),
    ord("D"): Verdict(Outcome.FAILED, "the row of this user is damaged, and is left as it is"),
}
