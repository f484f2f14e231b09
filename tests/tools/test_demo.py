"""The demo: a short run of it, and that its reader finds what is missing."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

import cagey_sessions
from cagey_sessions.tools import cli
from cagey_sessions.tools.demo import verify
from cagey_sessions.tools.demo.view import Board, Check, show_checks, showing
from support import POSTGRES, REDIS, needs_server

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], text=True, env=ENVIRONMENT, **pipes, **options)


class Run(NamedTuple):
    status: int
    out: str
    err: str
    db: Path

    def ledgers(self, moment: str) -> dict[str, dict[str, Any]]:
        return verify.read_ledgers(self.db.with_name(f"{self.db.name}.{moment}.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short demo; its database and ledgers are kept."""
    db = tmp_path_factory.mktemp("demo") / "players.db"
    arguments = ["--bots", "20", "--seconds", "4", "--interval", "500ms", "--store", str(db)]
    with python("-m", "cagey_sessions", "demo", *arguments) as process:
        out, err = process.communicate()
    return Run(process.returncode, out, err, db)


@pytest.mark.slow
def test_a_short_demo_loses_nothing_that_was_acknowledged(finished: Run) -> None:
    """Exit status 0, nothing on stderr, and a last line of JSON that says so."""
    summary = json.loads(finished.out.splitlines()[-1])
    names = ["bots", "saves", "skipped", "receipts", "reconnects", "lost", "older_than_interval"]
    names += ["changes_lost_by_kill"]
    assert (finished.status, finished.err, list(summary)) == (0, "", names)
    assert (summary["bots"], summary["lost"], summary["older_than_interval"]) == (20, 0, 0)
    assert summary["changes_lost_by_kill"] > 0, "the kill hit no unsaved work"
    assert summary["saves"] > 20
    assert summary["skipped"] > 0
    assert summary["receipts"] > 0
    assert summary["reconnects"] >= 40, "every bot comes back after the stop and after the kill"
    assert "graceful stop" in finished.out
    while_playing = [int(number) for number in re.findall(r"playing again .* skipped (\d+)", finished.out)]
    assert while_playing, "skipped are not only the saves of the end, when all bots look and nobody plays"
    assert while_playing[-1] > 0


@pytest.mark.slow
def test_every_receipt_has_a_version_of_the_store(finished: Run) -> None:
    """And the file has that version, or a later one."""
    stored = verify.read_players(f"sqlite:///{finished.db}")
    versions = {user: ledger["version"] for user, ledger in finished.ledgers("kill").items() if ledger["receipt"]}
    assert len(versions) > 5
    assert all(0 < version <= stored[user].version for user, version in versions.items())


@pytest.mark.slow
def test_the_listener_loses_nothing_either(tmp_path: Path) -> None:
    """``--events``: the server saves by itself, in a listener; its file goes with the folder it is in."""
    command = [sys.executable, "-m", "cagey_sessions", "demo", "--bots", "10", "--seconds", "2"]
    with subprocess.Popen(
        [*command, "--interval", "300ms", "--events"],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        out, err = process.communicate()
    summary = json.loads(out.splitlines()[-1])
    assert (process.returncode, err) == (0, "")
    assert (summary["lost"], summary["older_than_interval"], summary["skipped"]) == (0, 0, 0)
    assert summary["saves"] > 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "server",
    [
        pytest.param(POSTGRES, id="postgres", marks=needs_server(POSTGRES)),
        pytest.param(REDIS, id="redis", marks=needs_server(REDIS)),
    ],
)
def test_on_a_server_nothing_is_lost_and_nothing_is_left(server: str, tmp_path: Path) -> None:
    """After the kill the players are the dead server's for a while; it is waited for."""
    command = [sys.executable, "-m", "cagey_sessions", "demo", "--bots", "10", "--seconds", "8", "--interval", "300ms"]
    done = subprocess.run(
        [*command, "--store", server],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        text=True,
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["lost"], summary["older_than_interval"]) == (0, 0)
    assert summary["saves"] > 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["redis+sentinel://127.0.0.1/main", "mysql://127.0.0.1", "memory://"])
def test_where_the_demo_cannot_look_it_does_not_play(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--store", where])
    assert caught.value.code == 2
    assert "--store" in capsys.readouterr().err


@pytest.fixture
def stored(finished: Run, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the database: nobody played after the kill, so it is still as the kill left it."""
    with closing(sqlite3.connect(tmp_path / "copy.db", isolation_level=None)) as copy:
        with closing(sqlite3.connect(finished.db)) as db:
            db.backup(copy)
        yield copy


def players(db: sqlite3.Connection) -> dict[str, verify.Stored]:
    return verify.read_players(f"sqlite:///{db.execute('PRAGMA database_list').fetchone()[2]}")


VICTIM = "bot-00007"


def drop(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM cagey_sessions WHERE user_id = ?", (VICTIM,))


def roll_back(db: sqlite3.Connection) -> None:
    db.execute("UPDATE cagey_sessions SET body = json_set(body, '$.seq', 0, '$.gold', 0) WHERE user_id = ?", (VICTIM,))


def falsify(db: sqlite3.Connection) -> None:
    db.execute("UPDATE cagey_sessions SET body = json_set(body, '$.gold', 1000000) WHERE user_id = ?", (VICTIM,))


def swap(db: sqlite3.Connection) -> None:
    (body,) = db.execute("SELECT body FROM cagey_sessions WHERE user_id = 'bot-00001'").fetchone()
    db.execute("UPDATE cagey_sessions SET body = ? WHERE user_id = ?", (body, VICTIM))


@pytest.mark.parametrize("harm", [drop, roll_back, falsify, swap])
def test_the_reader_finds_one_harmed_player(
    finished: Run, stored: sqlite3.Connection, harm: Callable[[sqlite3.Connection], None]
) -> None:
    """Where states must be equal, as after the graceful stop, and where the kill may have taken some."""
    shown, killed = finished.ledgers("end"), finished.ledgers("kill")
    killed_at = max(at for ledger in killed.values() for at, _ in ledger["known"])
    assert verify.different(players(stored), shown) == set()
    assert verify.after_kill(players(stored), killed, killed_at, 1.5).lost == set()
    assert verify.mixed_up(players(stored), killed) == set()
    harm(stored)
    assert verify.different(players(stored), shown) == {VICTIM}
    found = verify.after_kill(players(stored), killed, killed_at, 1.5)
    if harm is roll_back and killed[VICTIM]["receipt"] is None:
        assert found.older_than_allowed > 0, "no purchase of this bot was confirmed: its age alone tells"
    else:
        assert found.lost == {VICTIM}
    assert verify.mixed_up(players(stored), killed) == ({VICTIM} if harm is swap else set())


def state(seq: int, gold: int = 0, name: str = "ada") -> dict[str, Any]:
    return {"name": name, "seq": seq, "gold": gold, "items": {}}


def ledger(*known: tuple[float, dict[str, Any]], **more: Any) -> dict[str, dict[str, Any]]:
    return {"ada": {"known": list(known), "awaited": None, "receipt": None, "version": None, "shown": []} | more}


def stored_as(seq: int, version: int = 1) -> dict[str, verify.Stored]:
    return {"ada": verify.Stored(state(seq), version)}


def test_a_graceful_stop_loses_not_even_the_last_change() -> None:
    """One change back is a loss; the change that was asked for and never answered is not."""
    told = ledger((1.0, state(1)), (2.0, state(2)), awaited=state(3))
    assert verify.different(stored_as(1), told) == {"ada"}
    assert verify.different(stored_as(2), told) == set()
    assert verify.different(stored_as(3), told) == set()
    assert verify.different(stored_as(2) | {"eve": verify.Stored(state(9), 1)}, told) == {"eve"}
    assert verify.different({}, told) == {"ada"}


def test_a_kill_may_take_the_youngest_changes_only() -> None:
    """What is missing is counted, and what is older than allowed a second time."""
    told = ledger((10.0, state(1)), (12.0, state(2)), (14.0, state(3)))
    found = verify.after_kill(stored_as(2), told, killed_at=15.0, allowed_age=2.5)
    assert found == verify.AfterKill(lost=set(), older_than_allowed=0, changes=1, oldest=1.0)
    found = verify.after_kill(stored_as(1), told, killed_at=15.0, allowed_age=2.5)
    assert found == verify.AfterKill(lost=set(), older_than_allowed=1, changes=2, oldest=3.0)
    found = verify.after_kill(stored_as(3), told, killed_at=15.0, allowed_age=2.5)
    assert found == verify.AfterKill()


def test_a_kill_may_not_take_a_confirmed_purchase() -> None:
    """However young it is."""
    told = ledger((14.9, state(3)), receipt=state(3), awaited=state(4))
    assert verify.after_kill(stored_as(2), told, 15.0, 2.5).lost == {"ada"}
    assert verify.after_kill(stored_as(3), told, 15.0, 2.5).lost == set()
    assert verify.after_kill(stored_as(4), told, 15.0, 2.5).lost == set()


def test_a_confirmed_version_is_there_with_the_data_that_was_confirmed() -> None:
    """Or a later version, with later data; a number alone proves nothing, and nor does the data alone."""
    told = ledger((14.8, state(3)), (14.9, state(4)), receipt=state(3), version=7)
    fine, wrong = [(3, 7), (4, 8), (4, 9)], [(3, 6), (4, 6), (4, 7), (3, 8)]
    assert [verify.after_kill(stored_as(*each), told, 15.0, 2.5).lost for each in fine] == [set()] * 3
    assert [verify.after_kill(stored_as(*each), told, 15.0, 2.5).lost for each in wrong] == [{"ada"}] * 4
    assert verify.different(stored_as(4, 8), told) == set()
    assert verify.different(stored_as(4, 7), told) == {"ada"}


def test_nobody_has_the_data_of_somebody_else() -> None:
    """Neither in the database nor on their screen."""
    eves, told = state(1, name="eve"), ledger((1.0, state(1)), shown=[[state(1), None, state(1)]])
    assert verify.mixed_up(stored_as(1), told) == set()
    assert verify.mixed_up({"ada": verify.Stored(eves, 1)}, told) == {"ada"}
    assert verify.mixed_up(stored_as(1), ledger((1.0, eves))) == {"ada"}
    assert verify.mixed_up(stored_as(1), ledger((1.0, state(1)), shown=[[eves, None, eves]])) == {"ada"}


def test_who_comes_back_must_find_what_they_left() -> None:
    """Or what they had asked for when they left; nothing else."""
    shown = [[state(1), None, state(1)], [state(1), state(2), state(2)]]
    assert verify.contradicted(ledger(shown=shown)) == set()
    assert verify.contradicted(ledger(shown=[*shown, [state(2), None, state(1)]])) == {"ada"}


def test_the_reader_shares_no_code_with_the_library() -> None:
    """Its imports are the standard library's."""
    code = f"import runpy, sys; runpy.run_path({verify.__file__!r}); print('cagey_sessions' in sys.modules)"
    with python("-c", code) as process:
        assert process.communicate() == ("False\n", "")


def test_the_command_line_needs_no_extra_until_the_demo_runs() -> None:
    code = "import sys, cagey_sessions.tools.cli; print({'rich', 'websockets', 'uvloop'} & sys.modules.keys())"
    with python("-c", code) as process:
        assert process.communicate() == ("set()\n", "")


def test_a_missing_extra_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else object())
    assert cli.main(["demo"]) == 2
    expected = 'cagey-sessions: the demo needs rich: pip install "cagey-sessions[demo]"\n'
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: COMMAND"),
        (["demo", "--bots", "0"], "--bots: '0' is not a whole number from 1 to"),
        (["demo", "--interval", "soon"], "--interval: time: cannot read 'soon' as a duration"),
        (["demo", "--interval", "1ms"], "--interval: time: '1ms' is too short"),
        (["demo", "--seconds", "nan"], "--seconds: time: nan is not a finite duration"),
        (["demo", "--port", "70000"], "--port: '70000' is not a whole number"),
        (["demo", "--store", __file__], "exists already"),
        (["demo", "--store", "/no/such/folder/players.db"], "a folder that does not exist"),
        (["demo", "--store", "players.db", "--events"], "--events: not allowed with argument --store"),
    ],
)
def test_wrong_arguments_are_quoted(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"cagey-sessions {cagey_sessions.__version__}\n"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True

    def cells(self) -> list[list[str]]:
        """What is on it, row by row, without frames."""
        return [re.split("  +", line.strip(" │")) for line in self.getvalue().splitlines()]


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal without colours."""
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=Screen(), width=100, color_system=None, legacy_windows=False)


async def drawn(board: Board, console: Console) -> list[list[str]]:
    with redirect_stdout(console.file):
        async with showing(board, console):
            pass
    return console.file.cells()


async def test_at_a_terminal_the_board_shows_how_it_goes(console: Console) -> None:
    board = Board(bots=20, seconds=8, interval=0.5, events=False, phase="playing", played_before=6)
    board.online, board.oldest, board.pending, board.in_flight = 19, 0.44, 7, 2
    board.latency, board.health, board.reason = 0.0031, "degraded", "a call hangs"
    board.rates.extend([20, 60])
    board.count(120, 30)
    rows = await drawn(board, console)
    assert ["joining", "playing", "graceful stop", "playing again", "kill", "checking"] in rows
    assert any(row[0].startswith("━") and row[-1] == "6.0 of 8 s" for row in rows)
    assert ["players online", "19", "of 20"] in rows
    assert ["saves/s", "60", "▁▃█"] in rows
    assert ["oldest unsaved", "0.4 s", "at most 0.5 s and one save"] in rows
    assert ["pending", "7", "saves due, and 2 in flight"] in rows
    assert ["saves", "120"] in rows
    assert ["skipped", "30", "due, but nothing had changed"] in rows
    assert ["store", "3.1 ms", "a call"] in rows
    assert ["health", "degraded", "a call hangs"] in rows


async def test_what_a_server_has_done_is_shown_when_it_is_away(console: Console) -> None:
    """The next one counts from 0."""
    board = Board(bots=20, seconds=8, interval=0.5, events=True, phase="graceful stop", online=20, oldest=0.4)
    board.count(120, 0)
    board.server_is_away()
    board.count(5, 0)
    rows = await drawn(board, console)
    assert ["players online", "0", "of 20"] in rows
    assert ["oldest unsaved", "-", "at most 0.5 s and one save"] in rows
    assert ["saves", "125"] in rows
    assert ["skipped", "0", "needs a store"] in rows
    assert ["store", "-", "none: the server saves in a listener"] in rows
    assert ["health", "-", "there is no server"] in rows


def test_the_table_at_the_end_shows_what_was_lost(console: Console) -> None:
    show_checks([Check("players", "20", "20", True), Check("gold", "100", "90", False)], console)
    assert console.file.cells()[3:5] == [["players", "20", "20", "ok"], ["gold", "100", "90", "LOST"]]


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C: no process and no folder remains."""
    environment = ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "cagey_sessions", "demo", "--bots", "5"]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert "joining" in process.stdout.readline()
        assert any("playing" in line for line in process.stdout), "it may take several lines until all have joined"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    # The children have the same standard error: it is at its end only now that they are all gone.
    assert (process.returncode, err) == (130, "cagey-sessions: interrupted\n")
    assert list(tmp_path.iterdir()) == []
