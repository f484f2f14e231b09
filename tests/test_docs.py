"""Every program of the pages runs, and prints what the page says."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cagey_sessions

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}


def programs(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=60,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("number", range(5))
def test_the_programs_about_user_data_print_what_the_page_says(tmp_path, number):
    page = (ROOT / "docs" / "user-data.md").read_text(encoding="utf-8")
    code = programs("user-data.md")[number]
    printed, complaints = run(code, tmp_path)
    if number == 0:  # nobody listens to 'unsavable', so the log says it
        assert complaints.strip().endswith('user_data["bag"][0]["price"]: nan is not JSON; a number is finite')
    else:
        assert complaints == ""
    said = re.search(r"^```\n\nprints (.*?)\.(?:\s|$)", page[page.index(code) + len(code) :], re.DOTALL)
    assert said is not None
    assert re.findall(r"`([^`]+)`", said[1]) == printed.splitlines()


def test_all_programs_about_user_data_are_run():
    assert len(programs("user-data.md")) == 5


def test_watching_as_in_the_quickstart(tmp_path):
    assert run(programs("quickstart.md")[1], tmp_path) == ("1 True 0 0 True\nok True\n", "")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def converse(port: int, *lines: str) -> str:
    """Say lines to the game, hang up, and return all it has said."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("".join(f"{line}\n" for line in lines).encode() + b"\n")
        said = b""
        while chunk := connection.recv(4096):
            said += chunk
        return said.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="loops have no signal handlers there")
def test_the_game_of_the_quickstart_remembers(tmp_path):
    """Played, stopped with SIGTERM, killed, and played again."""
    port = free_port()
    code = programs("quickstart.md")[0].replace("4000", str(port))
    (tmp_path / "game.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-W", "error", "game.py"]
    for round_number, (sign, ending) in enumerate([(signal.SIGTERM, "everybody is saved\n"), (signal.SIGKILL, "")]):
        with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as game:
            assert game.stdout is not None
            assert game.stdout.readline() == f"playing on port {port}\n"
            said = converse(port, "ada", "+gold", "+gold", "bank")
            gold = 2 * (round_number + 1)
            assert said.startswith("who are you? ")
            assert f"{{'gold': {gold}, 'visits': {round_number + 1}}}" in said
            assert "saved as version" in said
            game.send_signal(sign)
            assert game.stdout.read() == ending
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as game:
        assert game.stdout is not None
        game.stdout.readline()
        assert "{'gold': 4, 'visits': 3}" in converse(port, "ada", "look")
        assert "who are you?" in converse(port, "")
        game.terminate()
        game.wait(10)
