"""The tools with somebody at a terminal: a question, progress, and an interrupt at any time."""

from __future__ import annotations

import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tools.running import COMMAND, ENVIRONMENT, Done, line, posix, put, users

with suppress(ImportError):
    import pty


# Terminals


class Terminal:
    """A tool with a terminal as its stdin and stderr."""

    def __init__(self, *arguments: str, prelude: str = "") -> None:
        self._master, slave = pty.openpty()
        code = f"import sys\n{prelude}\nfrom cagey_sessions.tools.cli import main\nsys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "store", *arguments],
            env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"},
            stdin=slave,
            stderr=slave,
            stdout=subprocess.PIPE,
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()
        os.close(self._master)

    def see(self, text: str) -> None:
        """Wait until it shows a text."""
        while text not in self.shown:
            assert self._read(), f"{text!r} is not in {self.shown!r}"

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], 20)
        assert ready, f"nothing more than {self.shown!r}"
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self.shown += data.decode()
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> Done:
        while self._read():
            pass
        out = self.process.stdout.read().decode()
        return Done(self.process.wait(20), out, self.shown)


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "status", "left"), [("y", 0, {}), ("yes", 0, {}), ("", 1, {"ann": 1}), ("n", 1, {"ann": 1})]
)
def test_erase_asks_at_a_terminal(run, url, answer, status, left):
    put(url, ("ann", b"1"))
    with Terminal("erase", url, "ann") as terminal:
        terminal.see("Erase user 'ann' for good? [y/N] ")
        terminal.type(f"{answer}\n")
        assert terminal.end().status == status
    assert users(run("export", url)) == left


SLOW = "import cagey_sessions.tools.store as t; t.SHOW_AFTER = t.SHOW_EVERY = 0"
WITHOUT_RICH = f"{SLOW}; sys.modules['rich'] = sys.modules['rich.console'] = None"


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("prelude", "shown"), [(SLOW, "━"), (WITHOUT_RICH, "\r600 of 600 users imported")])
def test_long_work_shows_how_far_it_is_at_a_terminal(run, url, tmp_path, prelude, shown):
    (tmp_path / "players.jsonl").write_bytes(b"".join(line(number, number) for number in range(600)))
    with Terminal("import", url, "players.jsonl", prelude=prelude) as terminal:
        done = terminal.end()
    assert done.status == 0
    assert shown in done.err
    assert "imported 600, refused 0" in done.err
    with Terminal("export", url, prelude=prelude) as terminal:
        done = terminal.end()
    assert len(done.lines) == 600, "stdout has the lines, and nothing else"
    assert "users exported" in done.err.rpartition("exported 600, left out 0")[0]


@posix
@pytest.mark.slow
def test_short_work_shows_nothing_but_its_end(run, url, tmp_path):
    (tmp_path / "players.jsonl").write_bytes(line("ann", 1))
    with Terminal("import", url, "players.jsonl") as terminal:
        assert terminal.end().err == "imported 1, refused 0\r\n"


# Interrupts


def wait_until(seconds: float, test: Any) -> None:
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


def count_users(path: Path) -> int:
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM cagey_sessions WHERE body IS NOT NULL").fetchone()[0]
        except sqlite3.OperationalError:
            return 0  # the table is not made yet


@posix
@pytest.mark.slow
def test_an_interrupted_import_says_what_it_has_written(run, url, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, "import", url, "-"], env=ENVIRONMENT, **pipes) as process:
        process.stdin.write(b"".join(line(number, number) for number in range(300)))
        process.stdin.flush()
        wait_until(20, lambda: count_users(tmp_path / "players.db") == 200)
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr.read() == b"200 users had been written by then, and stay\n"
    assert process.returncode == 130
    assert run("stats", url).json["users"] == 200
    assert run("import", url, "-", stdin=line("ann", 1)).status == 0, "the file is free again"


@posix
@pytest.mark.slow
def test_a_batch_that_is_being_written_is_finished_before_an_interrupt_ends_it(run, url, tmp_path):
    (tmp_path / "players.jsonl").write_bytes(b"".join(line(number, number) for number in range(300)))
    code = f"""
import asyncio, sys
from cagey_sessions.tools import cli
from cagey_sessions.stores import SQLiteStore
save_many = SQLiteStore.save_many
async def slow(self, records):
    print("saving", flush=True)
    while not any(task.cancelling() for task in asyncio.all_tasks()):
        await asyncio.sleep(0.01)
    return await save_many(self, records)
SQLiteStore.save_many = slow
sys.exit(cli.main(["store", "import", {url!r}, "players.jsonl"]))
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"saving\n"
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr.read() == b"200 users had been written by then, and stay\n"
    assert process.returncode == 130
    assert run("stats", url).json["users"] == 200
    with closing(sqlite3.connect("players.db")) as connection:
        assert connection.execute("SELECT count(*) FROM cagey_sessions WHERE NOT released").fetchone() == (0,)


@posix
@pytest.mark.slow
def test_an_interrupted_export_leaves_no_file(run, url, tmp_path):
    put(url, ("ann", b"1"))
    code = f"""
import asyncio, signal, sys
from cagey_sessions.tools import cli
from cagey_sessions.stores import SQLiteStore
scan = SQLiteStore.scan
async def slow(self):
    async for each in scan(self):
        yield each
        print("there", flush=True)
        await asyncio.sleep(60)
SQLiteStore.scan = slow
sys.exit(cli.main(["store", "export", {url!r}, "players.jsonl"]))
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr.read() == b""
    assert process.returncode == 130
    assert sorted(each.name for each in tmp_path.iterdir()) == ["players.db", "players.db.lock"]


@posix
@pytest.mark.slow
def test_whoever_reads_an_export_may_stop(run, url):
    put(url, *[(number, b'"%b"' % (b"x" * 1000)) for number in range(3000)])
    with subprocess.Popen(
        [*COMMAND, "export", url], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith(b'{"user_id":0,')
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 2
