"""`SQLiteStore`: users in an SQLite file, written by one thread.

The thread has the only connection. It takes all jobs that wait and runs them in one transaction, so that saves made at
the same time share one sync of the disk (group commit: DeWitt et al., SIGMOD 1984). The results of the jobs are
delivered once the transaction is committed, and not before: an acknowledged save has to survive.

One process has the file: an OS lock on ``<path>.lock`` keeps every other out. So every owner but ours is dead, and a
claim is never refused.

The statements about users are in `rows.py`.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ...errors import (
    OptionError,
    StoreContractError,
    StoreError,
    StoreLayoutError,
    StoreUnavailableError,
    WrongLoopError,
)
from ...options import one_of, path_text, yes_or_no
from ...threads import outlast
from ..contract import Answers, Record, Store, Verdict, latest_of
from ..file_lock import FileLock
from ..layouts import refuse_newer
from .rows import (
    APPLICATION_ID,
    COLUMNS,
    CREATE,
    HIGHEST_DELETED,
    LAYOUT,
    TABLES,
    claim_rows,
    erase_row,
    load_row,
    portions,
    release_rows,
    save_rows,
    scan_rows,
    text,
)

__all__ = ["SQLiteStore"]

T = TypeVar("T")

OLDEST_SQLITE = (3, 35, 0)
BUSY_SECONDS = 5.0
"""How long a transaction waits for another program that writes to the file."""
JOBS_IN_A_TRANSACTION = 64
LARGEST_LOG = 8 * 1024 * 1024
"""The size in bytes to which the write-ahead log, the ``-wal`` file, shrinks again. From 4 MB on SQLite starts it anew,
unless some program is still reading from it."""
LOG_PAUSE = 5.0
"""Seconds between two attempts to empty a log that is larger."""
LOG_WAIT = 0.1
"""How many seconds such an attempt waits for programs that read. Saves wait meanwhile, so it is short."""
HANGING_PATIENCE = 1.0
"""How many seconds a cancelled `open` or `close` still waits for the thread, which then goes on alone. It is short,
because it adds to the deadline of a manager that ends while the disk hangs."""
CACHE_KIB = 16 * 1024
"""SQLite's page cache. The users of a batch are spread over the whole file, and the default of 2 MB holds hardly more
than one batch."""


class _Job(NamedTuple):
    """Work to be done on the connection, and the future for its result."""

    work: Callable[[sqlite3.Connection], Any] | None  # None: close
    future: asyncio.Future[Any]


class SQLiteStore(Store):
    """Users in one SQLite file, for one process: no server, nothing to set up.

    `path` is the file; it is created if there is none. `synchronous` is SQLite's setting: with ``"FULL"`` acknowledged
    data survives a crash of the machine; with ``"NORMAL"`` it survives the death of the process, but a crash of the
    machine may lose the last transactions. The file is in WAL mode, so other programs may read it meanwhile, with any
    SQLite tool; `body` is JSON text. With `read_only` the file has to exist, and is neither changed nor locked: `load`,
    `holder` and `scan` work beside a running server, and a manager can only `read`.

    Raises `OptionError`. `open` raises `StoreInUseError` while another process, or another store of this one, has the
    file; `StoreLayoutError` for a file that is not ours or was made by a newer version; `StoreUnavailableError` for one
    that cannot be opened. Costs a thread, and one sync of the disk for all saves made at the same time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        read_only: bool = False,
    ) -> None:
        text = path_text("path", path)
        if text == ":memory:":
            raise OptionError("path is the name of a file; for users in memory there is MemoryStore")
        self.path: Path = Path(text)
        self._synchronous = one_of("synchronous", synchronous, ("FULL", "NORMAL"))
        self._read_only = yes_or_no("read_only", read_only)
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
        self._writer = writer = _Writer(self.path, self._synchronous, self._read_only)
        opening: asyncio.Future[str] = self._loop.create_future()
        try:
            writer.start(opening)
            self.loss_class: str = await outlast(opening, patience=HANGING_PATIENCE)
        except BaseException as error:
            self._writer = None
            if not (opening.done() and opening.exception()):
                # This call was cancelled, and the file is open, or will be soon: have the thread close it again.
                closed = writer.close(self._loop)
                if isinstance(error, asyncio.CancelledError):
                    with suppress(TimeoutError):
                        await outlast(closed, HANGING_PATIENCE)
            raise

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and self._pid == os.getpid():  # a forked child has no thread, and must not touch the file
            await outlast(writer.close(asyncio.get_running_loop()), patience=HANGING_PATIENCE)

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> Answers:
        return await self._write(lambda connection: claim_rows(connection, user_ids, owner))

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        latest = latest_of(records)

        def save(connection: sqlite3.Connection) -> list[Verdict]:
            return [
                verdict
                for portion in portions(connection, list(latest.values()))
                for verdict in save_rows(connection, portion)
            ]

        verdicts = await self._write(save)
        if len(latest) == len(records):
            return verdicts
        verdict_of = dict(zip(latest, verdicts, strict=True))
        return [verdict_of[record.user_id] for record in records]

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        return await self._write(lambda connection: release_rows(connection, claims, owner))

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        return await self._write(functools.partial(erase_row, user_id))

    async def load(self, user_id: int | str) -> Record | None:
        return await self._run(functools.partial(load_row, user_id))

    async def scan(self) -> AsyncIterator[Record | StoreError]:
        last: float | None = -math.inf
        while last is not None:
            last, found = await self._run(functools.partial(scan_rows, last))
            for each in found:
                yield each

    def abort(self, call: asyncio.Task[Any]) -> None:
        """Interrupt the statement under way: its whole transaction is rolled back, and all jobs in it fail."""
        if self._writer is not None:
            self._writer.interrupt()

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._read_only:
            raise StoreError("this SQLiteStore was made with read_only=True, and writes nothing")
        return await self._run(work)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Have the thread do some work in its next transaction, and return what it returns once that is committed."""
        writer, loop = self._writer, asyncio.get_running_loop()
        if writer is None:
            raise StoreUnavailableError(f"{self.path} is not open")
        if loop is not self._loop or self._pid != os.getpid():
            raise WrongLoopError("this SQLiteStore was opened on another event loop, or before a fork")
        future: asyncio.Future[T] = loop.create_future()
        writer.put(_Job(work, future))
        return await future


class _Writer:
    """The thread that has the connection and the lock of the file."""

    def __init__(self, path: Path, synchronous: str, read_only: bool) -> None:
        self._path = path
        self._synchronous = synchronous
        self._read_only = read_only
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._lock = FileLock()
        self._file_id: tuple[int, int] | None = None
        self._log_is_large = not read_only  # until it was measured: an earlier process may have left a large one
        self._next_emptying = 0.0

    def start(self, opening: asyncio.Future[str]) -> None:
        # a daemon, so that a manager that was never destroyed does not keep the process from ending
        thread = threading.Thread(target=self._run, args=(opening,), name="cagey-sessions sqlite", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise StoreUnavailableError(f"{self._path} needs a thread, and there are no more: {error}") from error

    def put(self, job: _Job) -> None:
        self._jobs.put(job)

    def close(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Have the thread close the file after the jobs that were put before; the future is done when it has."""
        closed: asyncio.Future[None] = loop.create_future()
        self.put(_Job(None, closed))
        return closed

    def interrupt(self) -> None:
        """Interrupt the statement under way, from another thread."""
        connection = self._connection
        if connection is not None:
            try:
                connection.interrupt()
            except sqlite3.ProgrammingError:
                return  # it was closed meanwhile

    def _run(self, opening: asyncio.Future[str]) -> None:
        """The life of the thread: open the file, run jobs until one says to close, close the file."""
        try:
            # Resolved once: the lock has to be the same through any symbolic link, and the process may change its
            # folder later.
            self._path = path = Path(os.path.realpath(self._path))
            if path.exists() and not path.is_file():
                raise StoreLayoutError(
                    f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; the path of an SQLiteStore is "
                    "that of a file"
                )
            if not self._read_only:
                self._lock.acquire(path.with_name(path.name + ".lock"))
            try:
                loss_class = self._prepare()
            except BaseException:
                self._close()
                raise
        except Exception as error:
            _deliver([(opening, None, self._explained(error))])
            return
        if not _deliver([(opening, loss_class, None)]):
            # the event loop was closed meanwhile, and no job will come
            self._close()
            return
        closing: asyncio.Future[Any] | None = None
        while closing is None:
            try:
                jobs = [self._jobs.get(timeout=self._until_next_emptying())]
            except queue.Empty:
                self._empty_large_log()
                continue
            # all that have come during the last transaction share the next one, and so its sync
            while len(jobs) < JOBS_IN_A_TRANSACTION and not self._jobs.empty():
                jobs.append(self._jobs.get())
            for place, job in enumerate(jobs):
                if job.work is None:  # what came after it fails below
                    closing = job.future
                    del jobs[place:]
                    break
            if jobs:
                _deliver(self._transact(jobs))
                self._empty_large_log()
        self._close()
        late: list[_Answer] = []
        while not self._jobs.empty():
            job = self._jobs.get()
            late.append(
                (job.future, None, None if job.work is None else StoreUnavailableError(f"{self._path} has been closed"))
            )
        _deliver(late)
        _deliver([(closing, None, None)])  # by itself: `close` may have been called on another loop than the jobs

    def _close(self) -> None:
        self._drop_connection()
        self._lock.release()

    # Transactions

    def _transact(self, jobs: list[_Job]) -> list[_Answer]:
        """Run jobs in one transaction, and commit it; returns their answers, to be delivered only then."""
        try:
            self._check_identity()
            connection = self._connect()
            # IMMEDIATE takes the write lock now: a transaction that reads first may be refused it later
            connection.execute("BEGIN" if self._read_only else "BEGIN IMMEDIATE")
            answers = [self._do(connection, job) for job in jobs]
            connection.execute("COMMIT")
        except Exception as error:
            self._drop_connection()
            return [(job.future, None, self._explained(error)) for job in jobs]
        return answers

    def _check_identity(self) -> None:
        """Raise `StoreUnavailableError` if the file was deleted or replaced: SQLite would go on writing to the old one.

        Everything written there would be lost when the process ends.
        """
        status = os.stat(self._path)
        if (status.st_dev, status.st_ino) != self._file_id:
            raise StoreUnavailableError(f"{self._path} has been replaced by another file while it was in use")

    def _do(self, connection: sqlite3.Connection, job: _Job) -> _Answer:
        """Run one job in a savepoint, so that it fails alone, unless SQLite gives up the whole transaction."""
        assert job.work is not None
        connection.execute("SAVEPOINT job")
        try:
            result = job.work(connection)
        except Exception as error:
            if not connection.in_transaction:
                raise  # a full disk, for example: SQLite has rolled back the jobs before this one, too
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
            return job.future, None, self._explained(error)
        connection.execute("RELEASE job")
        return job.future, result, None

    def _drop_connection(self) -> None:
        """Close the connection after a failure: its state is not known, and the next transaction opens a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            except sqlite3.Error:
                pass  # closing rolls back, too
            try:
                connection.close()
            except sqlite3.Error:
                return

    # The log

    def _until_next_emptying(self) -> float | None:
        """In how many seconds to try to empty the log even if no job comes; None if it is not large."""
        return max(0.0, self._next_emptying - time.monotonic()) if self._log_is_large else None

    def _empty_large_log(self) -> None:
        """Empty the write-ahead log if it is large; it becomes so while another program reads for a long time.

        SQLite appends to the log while any of it is being read. Once none is, the next save begins at its front again,
        and ``journal_size_limit`` makes the file shorter. That does not happen if no save comes any more, or if readers
        come and go so that there is always one. For these two cases a checkpoint here waits for readers, for a moment.
        """
        now = time.monotonic()
        self._log_is_large = not self._read_only and self._log_size() > LARGEST_LOG
        if not self._log_is_large or now < self._next_emptying:
            return
        self._next_emptying = now + LOG_PAUSE
        try:
            connection = self._connect()
            connection.execute(f"PRAGMA busy_timeout = {round(LOG_WAIT * 1000)}")
            # The row that it returns says whether readers prevented it; the size below says that, too.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            connection.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")
        except sqlite3.Error:
            self._drop_connection()  # the next save will report what is wrong with the file
        self._log_is_large = self._log_size() > LARGEST_LOG

    def _log_size(self) -> int:
        try:
            return os.stat(f"{self._path}-wal").st_size
        except OSError:
            return 0

    def _explained(self, error: Exception) -> Exception:
        """An error of SQLite or the system as an error of the store."""
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
            # not mode=ro: without the right to write, SQLite cannot remove the -wal and -shm files that it makes
            place = f"{self._path.as_uri()}?mode=rw" if self._read_only else self._path
            connection = sqlite3.connect(
                place, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=self._read_only
            )
            connection.text_factory = text
            try:
                connection.execute(f"PRAGMA synchronous = {self._synchronous}")
                # The pages that a statement or a savepoint may have to restore. Kept in a file, they cost more than all
                # else in a save except for the commit.
                connection.execute("PRAGMA temp_store = MEMORY")
                connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
                connection.execute(f"PRAGMA journal_size_limit = {LARGEST_LOG}")  # see `_empty_large_log`
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self) -> str:
        """Check the file, create our tables if it is empty, and return the `loss_class`."""
        if self._read_only:
            os.stat(self._path)  # if there is no file, its error says so; SQLite's would not
        try:
            connection = self._connect()
            self._check_layout(connection)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # about the disk or a lock, not about the content
            raise StoreLayoutError(f"{self._path} is not an SQLite database ({error}); it is left as it is") from error
        status = os.stat(self._path)
        self._file_id = (status.st_dev, status.st_ino)  # for `_check_identity`
        if self._read_only:
            return "opened for reading only: what a crash may cost depends on the process that writes"
        (journal_mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal_mode != "wal":
            raise StoreUnavailableError(f"{self._path} cannot be put into WAL mode; is it on a network drive?")
        if not connection.execute("PRAGMA user_version").fetchone()[0]:
            connection.execute("BEGIN IMMEDIATE")
            for statement in CREATE:
                connection.execute(statement)
            connection.execute("COMMIT")
        # read back, because SQLite ignores a setting that it does not understand
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
            if self._read_only:
                raise StoreLayoutError(f"{self._path} is empty: no server has kept users in it yet")
            return
        if application != APPLICATION_ID:
            raise StoreLayoutError(
                f"{self._path} holds something else; it is left as it is. Give SQLiteStore a file of its own, or keep "
                "users in your own tables with CallbackStore"
            )
        refuse_newer(str(self._path), version, LAYOUT)
        columns = [row[1] for row in connection.execute("PRAGMA table_info(cagey_sessions)")]
        if not tables >= TABLES or columns != COLUMNS or not connection.execute(HIGHEST_DELETED).fetchone()[0]:
            raise StoreLayoutError(
                f"the tables of {self._path} are not of the shape they were made with; it is left as it is"
            )


_Answer = tuple[asyncio.Future[Any], Any, Exception | None]


def _deliver(answers: list[_Answer]) -> bool:
    """Set futures, all of one event loop, from the thread. Returns False if the loop is closed."""

    def tell() -> None:
        for future, result, error in answers:
            if future.done():
                continue  # the waiting task was cancelled; the job is done all the same
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    try:
        if answers:
            answers[0][0].get_loop().call_soon_threadsafe(tell)
    except RuntimeError:
        return False
    return True
