"""Users in an SQLite file. What lives here: the writer thread, its transactions, the table, the lock of the file. What
must not: SQL that is put together from values.

One thread has the one connection. It takes all jobs that wait and runs them in one transaction, so that whoever saves
at the same time shares one sync of the disk (group commit: DeWitt et al., SIGMOD 1984); what a job returns is told when
the transaction is committed. One process has the file: an OS lock on ``<path>.lock`` keeps every other out, so every
owner but ours is dead.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import queue
import sqlite3
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ..errors import (
    OptionError,
    StoreContractError,
    StoreError,
    StoreInUseError,
    StoreLayoutError,
    StoreUnavailableError,
    WrongLoopError,
)
from .base import Claim, Outcome, Record, Store, Verdict, latest_of, text_of

__all__ = ["SQLiteStore"]

T = TypeVar("T")

APPLICATION_ID = 0x63616765
"""What ``file`` and SQLite itself know our files by: "cage"."""
LAYOUT = 1
"""The number of the layout below, kept in ``user_version``."""
OLDEST_SQLITE = (3, 35, 0)
BUSY_SECONDS = 5.0
"""How long a transaction waits for another program that writes to the file."""
JOBS_IN_A_TRANSACTION = 64
ROWS_IN_A_SCAN = 500
ROWS_IN_A_STATEMENT = 200
MOST_COLUMNS = 8
"""Of a row below that is bound to parameters."""

CREATE = (
    # no affinity for user_id, so that 1 and '1' are two users
    """CREATE TABLE cagey_sessions (
        user_id UNIQUE NOT NULL,
        epoch INTEGER NOT NULL,
        owner TEXT NOT NULL,
        released INTEGER NOT NULL,
        version INTEGER NOT NULL,
        schema INTEGER NOT NULL,
        body TEXT,
        saved_at REAL,
        erased INTEGER NOT NULL
    )""",
    # rows that were claimed and never saved are deleted; a new row starts above the highest epoch of any of them
    "CREATE TABLE cagey_sessions_epochs (highest_deleted INTEGER NOT NULL)",
    "INSERT INTO cagey_sessions_epochs VALUES (0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {LAYOUT}",
)
TABLES = {"cagey_sessions", "cagey_sessions_epochs"}
COLUMNS = ["user_id", "epoch", "owner", "released", "version", "schema", "body", "saved_at", "erased"]

# Of the statements below that take many rows one text serves for all numbers of them up to the same power of two, so
# that few are prepared and kept; the rows that are left over are NULL.
CLAIM = """INSERT INTO cagey_sessions
    WITH batch (user_id, owner) AS (VALUES {rows})
    SELECT user_id, highest_deleted + 1, owner, 0, 0, 0, NULL, NULL, 0 FROM batch, cagey_sessions_epochs
        WHERE user_id IS NOT NULL
    ON CONFLICT (user_id) DO UPDATE SET epoch = epoch + 1, owner = excluded.owner, released = 0, erased = 0
    RETURNING user_id, epoch, version, schema, CAST(body AS BLOB), saved_at"""
LOOK = """WITH batch (user_id, epoch, owner, version) AS (VALUES {rows})
    SELECT batch.user_id, kept.epoch, kept.owner, kept.version, kept.erased
    FROM batch LEFT JOIN cagey_sessions AS kept ON kept.user_id = batch.user_id
    WHERE batch.user_id IS NOT NULL AND (kept.epoch = batch.epoch AND kept.owner = batch.owner
        AND kept.version < batch.version AND NOT kept.released AND NOT kept.erased) IS NOT TRUE"""
"""The rows that forbid a save. Commonly there are none."""
# An upsert, though every row is there: UPDATE FROM copies the bodies into a table of its own, and by statistics that
# are out of date it may read all of ours.
SAVE = """INSERT INTO cagey_sessions
    WITH batch (user_id, epoch, owner, released, version, schema, body, saved_at) AS (VALUES {rows})
    SELECT user_id, epoch, owner, released, version, schema, body, saved_at, 0 FROM batch WHERE user_id IS NOT NULL
    ON CONFLICT (user_id) DO UPDATE SET released = excluded.released, version = excluded.version,
        schema = excluded.schema, body = excluded.body, saved_at = excluded.saved_at"""
RELEASE = """UPDATE cagey_sessions SET released = 1
    WHERE user_id = ? AND epoch = ? AND owner = ? AND NOT released"""
REMEMBER_UNSAVED = """UPDATE cagey_sessions_epochs SET highest_deleted = max(highest_deleted, ?)
    WHERE EXISTS (SELECT 1 FROM cagey_sessions WHERE user_id = ? AND body IS NULL AND NOT erased)"""
DELETE_UNSAVED = "DELETE FROM cagey_sessions WHERE user_id = ? AND body IS NULL AND NOT erased"
ERASE = """UPDATE cagey_sessions
    SET epoch = epoch + 1, released = 1, version = 0, body = NULL, saved_at = NULL, erased = 1 WHERE user_id = ?"""
LOAD = """SELECT user_id, epoch, iif(released, '', owner), version, schema, CAST(body AS BLOB), saved_at
    FROM cagey_sessions WHERE user_id = ? AND body IS NOT NULL"""
SCAN = """SELECT rowid, user_id, epoch, iif(released, '', owner), version, schema, CAST(body AS BLOB), saved_at
    FROM cagey_sessions WHERE rowid > ? AND body IS NOT NULL ORDER BY rowid LIMIT ?"""


class _Job(NamedTuple):
    """Something to be done on the connection, and where its result goes."""

    work: Callable[[sqlite3.Connection], Any] | None  # None: close
    future: asyncio.Future[Any]


class SQLiteStore(Store):
    """Users in one SQLite file, for one process: no server, nothing to set up.

    `path` is the file; it is made if there is none. `synchronous` is SQLite's: under ``"FULL"`` what is acknowledged
    survives a crash of the machine; under ``"NORMAL"`` it survives the death of the process, and a crash of the machine
    may cost the last transactions. The file is in WAL mode: others may read it meanwhile, with any SQLite tool; `body`
    is JSON text.

    Raises `OptionError`. `open` raises `StoreInUseError` while another process, or another store of this one, has the
    file; `StoreLayoutError` for a file that is not ours or was made by a newer version; `StoreUnavailableError` for one
    that cannot be opened. Costs a thread, and one sync of the disk for all that is saved at the same time.
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or os.fspath(path) == ":memory:":
            raise OptionError("path is the name of a file; for users in memory there is MemoryStore")
        if synchronous not in ("FULL", "NORMAL"):
            raise OptionError(f"synchronous is 'FULL' or 'NORMAL', not {synchronous!r:.80}")
        self.path = Path(path)
        self._synchronous = synchronous
        self._writer: _Writer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    async def open(self) -> None:
        if self._writer is not None:
            raise StoreContractError("this SQLiteStore is open already; make one for each manager")
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreUnavailableError(f"SQLite {sqlite3.sqlite_version} is too old; 3.35 or newer is needed")
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._writer = writer = _Writer(self.path, self._synchronous)
        opening: asyncio.Future[str] = self._loop.create_future()
        writer.start(opening)
        try:
            self.loss_class = await opening
        except asyncio.CancelledError:
            self._writer = None
            writer.put(_Job(None, self._loop.create_future()))  # it closes when it is open
            raise
        except BaseException:
            self._writer = None
            raise

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and self._pid == os.getpid():
            closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            writer.put(_Job(None, closed))
            await closed

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> list[Claim]:
        return await self._run(lambda connection: _claim(connection, user_ids, owner))

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        latest = latest_of(records)

        def save(connection: sqlite3.Connection) -> list[Verdict]:
            return [
                verdict
                for portion in _portions(connection, list(latest.values()))
                for verdict in _save(connection, portion)
            ]

        verdicts = await self._run(save)
        if len(latest) == len(records):
            return verdicts
        verdict_of = dict(zip(latest, verdicts, strict=True))
        return [verdict_of[record.user_id] for record in records]

    async def release(self, user_id: int | str, epoch: int, owner: str) -> bool:
        def release(connection: sqlite3.Connection) -> bool:
            if not connection.execute(RELEASE, (user_id, epoch, owner)).rowcount:
                return False
            connection.execute(REMEMBER_UNSAVED, (epoch, user_id))
            connection.execute(DELETE_UNSAVED, (user_id,))
            return True

        return await self._run(release)

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        def erase(connection: sqlite3.Connection) -> bool:
            had_data = connection.execute(LOAD, (user_id,)).fetchone() is not None
            connection.execute(ERASE, (user_id,))
            return had_data

        return await self._run(erase)

    async def load(self, user_id: int | str) -> Record | None:
        row = await self._run(lambda connection: connection.execute(LOAD, (user_id,)).fetchone())
        return None if row is None else Record(*row)

    async def scan(self) -> AsyncIterator[Record]:
        last = -1
        while True:
            rows = await self._run(functools.partial(_scan, last))
            for rowid, *row in rows:
                last = rowid
                yield Record(*row)
            if len(rows) < ROWS_IN_A_SCAN:
                return

    def abort(self, call: asyncio.Task[Any]) -> None:
        """Interrupt the statement under way: its whole transaction is rolled back and told to have failed."""
        if self._writer is not None:
            self._writer.interrupt()

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        writer, loop = self._writer, asyncio.get_running_loop()
        if writer is None:
            raise StoreUnavailableError(f"{self.path} is not open")
        if loop is not self._loop or self._pid != os.getpid():
            raise WrongLoopError("this SQLiteStore was opened on another event loop, or before a fork")
        future: asyncio.Future[T] = loop.create_future()
        writer.put(_Job(work, future))
        return await future


def _scan(last: int, connection: sqlite3.Connection) -> list[Any]:
    return connection.execute(SCAN, (last, ROWS_IN_A_SCAN)).fetchall()


@functools.cache
def _statement(template: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return template.format(rows=", ".join([row] * rows))


def _execute(connection: sqlite3.Connection, template: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """For many rows at once: with each step Python gives the GIL away, and a busy loop is slow to give it back."""
    columns, size = len(rows[0]), min(1 << (len(rows) - 1).bit_length(), _most_rows(connection))
    parameters = [*itertools.chain.from_iterable(rows), *[None] * (columns * (size - len(rows)))]
    return connection.execute(_statement(template, columns, size), parameters).fetchall()


def _most_rows(connection: sqlite3.Connection) -> int:
    return min(ROWS_IN_A_STATEMENT, connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // MOST_COLUMNS)


def _portions(connection: sqlite3.Connection, everything: Sequence[T]) -> Iterator[Sequence[T]]:
    most = _most_rows(connection)
    for start in range(0, len(everything), most):
        yield everything[start : start + most]


def _claim(connection: sqlite3.Connection, user_ids: Sequence[int | str], owner: str) -> list[Claim]:
    claims = {}
    for portion in _portions(connection, user_ids):
        for user_id, epoch, version, schema, body, saved_at in _execute(
            connection, CLAIM, [(user_id, owner) for user_id in portion]
        ):
            record = None if body is None else Record(user_id, epoch, owner, version, schema, body, saved_at)
            claims[user_id] = Claim(user_id, epoch, record)
    return [claims[user_id] for user_id in user_ids]


def _save(connection: sqlite3.Connection, records: Sequence[Record]) -> list[Verdict]:
    keys = [(record.user_id, record.epoch, record.owner, record.version) for record in records]
    texts = [text_of(record.body) for record in records]
    try:
        forbidding = {user_id: row for user_id, *row in _execute(connection, LOOK, keys)}
        verdicts = [
            Verdict(Outcome.INVALID, "the body is not text")
            if text is None
            else _verdict(record, forbidding.get(record.user_id))
            for record, text in zip(records, texts, strict=True)
        ]
        rows = [
            (user_id, epoch, owner, release, version, schema, text, saved_at)
            for (user_id, epoch, owner, version, schema, _, saved_at, release), text, verdict in zip(
                records, texts, verdicts, strict=True
            )
            if verdict.outcome is Outcome.SAVED
        ]
        if rows:
            _execute(connection, SAVE, rows)
    except (sqlite3.DataError, OverflowError):
        # nothing of the statement is left; one record is the cause, and SQLite does not say which
        if len(records) == 1:
            return [Verdict(Outcome.INVALID, "the body is larger than SQLite takes")]
        middle = len(records) // 2
        return _save(connection, records[:middle]) + _save(connection, records[middle:])
    for record, verdict in zip(records, verdicts, strict=True):
        # only of the version that is there: a repeat that comes late releases nothing
        if verdict.outcome is Outcome.ALREADY and record.release and record.version == forbidding[record.user_id][2]:
            connection.execute(RELEASE, (record.user_id, record.epoch, record.owner))
    return verdicts


def _verdict(record: Record, forbidding: list[Any] | None) -> Verdict:
    if forbidding is None:
        return Verdict(Outcome.SAVED)
    epoch, owner, version, erased = forbidding
    if epoch is None:
        return Verdict(Outcome.MISSING)
    if erased:
        return Verdict(Outcome.ERASED)
    if epoch != record.epoch or owner != record.owner or record.version > version:
        return Verdict(Outcome.FENCED)
    return Verdict(Outcome.ALREADY)


class _Writer:
    """The thread that has the connection."""

    def __init__(self, path: Path, synchronous: str) -> None:
        self._path = path
        self._synchronous = synchronous
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._lock = _FileLock()
        self._file_id: tuple[int, int] | None = None

    def start(self, opening: asyncio.Future[str]) -> None:
        # a daemon: a manager that was forgotten must not keep the process from its end
        threading.Thread(target=self._run, args=(opening,), name="cagey-sessions sqlite", daemon=True).start()

    def put(self, job: _Job) -> None:
        self._jobs.put(job)

    def interrupt(self) -> None:
        connection = self._connection
        if connection is not None:
            try:
                connection.interrupt()
            except sqlite3.ProgrammingError:
                return  # it has been closed meanwhile

    def _run(self, opening: asyncio.Future[str]) -> None:
        try:
            # a symbolic link and what it leads to are one file, and stay so wherever the process changes its folder to
            self._path = path = Path(os.path.realpath(self._path))
            if path.is_dir():
                raise StoreLayoutError(f"{path} is a folder; the path of an SQLiteStore is that of a file")
            self._lock.acquire(path.with_name(path.name + ".lock"))
            try:
                loss_class = self._prepare()
            except BaseException:
                self._close()
                raise
        except Exception as error:
            _deliver([(opening, None, self._explained(error))])
            return
        _deliver([(opening, loss_class, None)])
        closing: asyncio.Future[Any] | None = None
        while closing is None:
            jobs = [self._jobs.get()]
            while len(jobs) < JOBS_IN_A_TRANSACTION and not self._jobs.empty():
                jobs.append(self._jobs.get())
            for place, job in enumerate(jobs):
                if job.work is None:
                    closing = job.future
                    del jobs[place:]
                    break
            if jobs:
                _deliver(self._transact(jobs))
        self._close()
        late: list[_Answer] = []
        while not self._jobs.empty():
            job = self._jobs.get()
            late.append(
                (job.future, None, None if job.work is None else StoreUnavailableError(f"{self._path} has been closed"))
            )
        _deliver(late)
        _deliver([(closing, None, None)])  # perhaps on another loop than theirs

    def _close(self) -> None:
        self._abandon()
        self._lock.release()

    # Transactions

    def _transact(self, jobs: list[_Job]) -> list[_Answer]:
        """Run jobs in one transaction. None of them has an answer before it is committed."""
        try:
            self._check_identity()
            connection = self._connect()
            connection.execute("BEGIN IMMEDIATE")
            answers = [self._do(connection, job) for job in jobs]
            connection.execute("COMMIT")
        except Exception as error:
            self._abandon()
            return [(job.future, None, self._explained(error)) for job in jobs]
        return answers

    def _check_identity(self) -> None:
        """SQLite goes on writing to a file that has been deleted or moved away, and nobody would ever read that."""
        status = os.stat(self._path)
        if (status.st_dev, status.st_ino) != self._file_id:
            raise StoreUnavailableError(f"{self._path} has been replaced by another file while it was in use")

    def _do(self, connection: sqlite3.Connection, job: _Job) -> _Answer:
        """Run one job so that it fails alone, unless SQLite has given up the whole transaction."""
        assert job.work is not None
        connection.execute("SAVEPOINT job")
        try:
            result = job.work(connection)
        except Exception as error:
            if not connection.in_transaction:
                raise
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
            return job.future, None, self._explained(error)
        connection.execute("RELEASE job")
        return job.future, result, None

    def _abandon(self) -> None:
        """After a failure begin with a fresh connection: what the old one still holds is not known."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            except sqlite3.Error:
                pass  # closing it does the same
            try:
                connection.close()
            except sqlite3.Error:
                return

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, StoreError):
            return error
        if isinstance(error, sqlite3.Error):
            explained = StoreUnavailableError(f"SQLite cannot use {self._path}: {error}")
        elif isinstance(error, OSError):
            explained = StoreUnavailableError(f"cannot use {self._path}: {error.strerror or type(error).__name__}")
        else:
            return error
        explained.__cause__ = error
        return explained

    # Opening

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self) -> str:
        """Look at the file, make our tables if it is empty, and say what a crash may cost."""
        try:
            connection = self._connect()
            self._check_layout(connection)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise StoreLayoutError(f"{self._path} is not an SQLite database ({error}); it is left as it is") from error
        (journal_mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal_mode != "wal":
            raise StoreUnavailableError(f"{self._path} cannot be put into WAL mode; is it on a network drive?")
        if not connection.execute("PRAGMA user_version").fetchone()[0]:
            connection.execute("BEGIN IMMEDIATE")
            for statement in CREATE:
                connection.execute(statement)
            connection.execute("COMMIT")
        status = os.stat(self._path)
        self._file_id = (status.st_dev, status.st_ino)
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
        what = f"journal_mode={journal_mode}, synchronous={ {1: 'NORMAL', 2: 'FULL'}.get(synchronous, synchronous) }"
        if synchronous >= 2:
            return f"{what}: nothing acknowledged is lost when the process or the machine dies"
        return (
            f"{what}: nothing acknowledged is lost when the process dies, the last transactions when the machine does"
        )

    def _check_layout(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not version and not application and not tables:
            return  # empty
        if application != APPLICATION_ID:
            raise StoreLayoutError(
                f"{self._path} holds something else; it is left as it is. Give SQLiteStore a file of its own, or keep "
                "users in your own tables with CallbackStore"
            )
        if version > LAYOUT:
            raise StoreLayoutError(
                f"{self._path} was made by a newer version of cagey-sessions (layout {version}, and this one knows "
                f"{LAYOUT}); it is left as it is"
            )
        columns = [row[1] for row in connection.execute("PRAGMA table_info(cagey_sessions)")]
        if not tables >= TABLES or columns != COLUMNS:
            raise StoreLayoutError(
                f"the tables of {self._path} are not of the shape they were made with; it is left as it is"
            )


_Answer = tuple[asyncio.Future[Any], Any, Exception | None]


def _deliver(answers: list[_Answer]) -> None:
    """Tell those who wait, all on one loop."""

    def tell() -> None:
        for future, result, error in answers:
            if future.done():
                continue  # whoever waited has been cancelled; it is done all the same
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    if not answers:
        return
    try:
        answers[0][0].get_loop().call_soon_threadsafe(tell)
    except RuntimeError:
        return  # the loop is closed: nobody is left to be told


class _FileLock:
    """An OS lock that ends with the process, on a file that says whose it is."""

    def __init__(self) -> None:
        self._file: int | None = None

    def acquire(self, path: Path) -> None:
        """Raises `StoreInUseError`, `OSError`."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            try:
                _lock(file)
            except OSError:
                pid = _read_pid(file)
                raise StoreInUseError(
                    f"{path.name.removesuffix('.lock')} is in use by process {pid or 'of unknown id'}; an SQLite "
                    "store has one process at a time, end that one first",
                    pid=pid,
                ) from None
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, str(os.getpid()).encode())
        except BaseException:
            os.close(file)
            raise
        self._file = file
        _held.add(self)

    def release(self) -> None:
        """The lock file stays: to remove it would let two processes lock two files of one name."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def _read_pid(file: int) -> int | None:
    try:
        os.lseek(file, 0, os.SEEK_SET)
        return int(os.read(file, 20))
    except (OSError, ValueError):
        return None


if sys.platform == "win32":
    import msvcrt

    LOCKED_BYTE = 1 << 20
    """Beyond the process id, which others must be able to read."""

    def _lock(file: int) -> None:
        os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_held: weakref.WeakSet[_FileLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A child of a fork shares the locks; it must not keep them when the parent is gone."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
