"""What the command makes of a fault: found, not found, not to be tried. What must not be here: faults of the list."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mutants import __main__ as command
from mutants.faults import Fault

pytestmark = pytest.mark.slow

VERSION = Path(command.ROOT / "src/cagey_sessions/_version.py").read_text(encoding="utf-8")
SUITE = """\
import logging
import os
import cagey_sessions

def test_a_version_has_two_dots():
    if cagey_sessions.__version__ == "crash":
        os.abort()
    if cagey_sessions.__version__ == "killed":
        os.kill(os.getpid(), 9)
    logging.error("what a test logs before it fails is not the name of a test")
    assert cagey_sessions.__version__.count(".") == 2
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "test_version.py"
    path.write_text(SUITE)
    monkeypatch.setattr(command, "SIMULATION", str(path))
    return str(path)


def version(after: str) -> Fault:
    return Fault("another version", "_version.py", VERSION, after)


def tried(fault: Fault, builder: Path | None = None) -> tuple[int, str]:
    """The status of a run with this fault alone, and what it prints."""
    said = io.StringIO()
    return command.report([command.attempt(fault, builder)], Console(file=said, width=300)), said.getvalue()


def test_a_fault_that_a_test_sees_is_found(suite):
    status, said = tried(version('__version__ = "7"\n'))
    assert status == 0
    assert "test_version.py::test_a_version_has_two_dots" in said
    assert "logs before" not in said
    assert "1 of 1 faults were found, 0 could not be tried" in said


def test_a_fault_that_no_test_sees_fails_the_run(suite):
    status, said = tried(version('__version__ = "7.7.7"\n'))
    assert status == 1
    assert "NOT FOUND" in said
    assert "0 of 1 faults were found, 0 could not be tried" in said


def test_a_random_test_without_end_finds_a_fault(suite, monkeypatch):
    said = "+++++ Timeout +++++"
    ended = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(command, "run", lambda *_: ended)
    assert command.run_tests(command.ROOT, [suite]) == (command.ENDLESS, "")


def test_a_process_that_ends_has_not_said_what_is_wrong(suite):
    status, said = tried(version('__version__ = "crash"\n'))
    assert status == 1
    assert f"NOT FOUND: the process ended in {suite}" in said


def test_a_process_that_somebody_else_ends_has_tried_nothing(suite):
    status, said = tried(version('__version__ = "killed"\n'))
    assert status == 1
    assert "COULD NOT BE TRIED: another version: pytest ended with status -9" in said


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (version("__version__ = \n"), "it cannot be imported"),
        (Fault("a text that is not there", "_version.py", "no such text", ""), "the text is there 0 times"),
    ],
    ids=["no Python", "no such text"],
)
def test_a_fault_that_cannot_be_tried_fails_the_run_and_says_why(suite, fault, why):
    status, said = tried(fault)
    assert status == 1
    assert f"COULD NOT BE TRIED: {fault.name}: {why}" in said
    assert "0 of 1 faults were found, 1 could not be tried" in said


def test_a_core_that_cannot_be_built_fails_the_run_and_says_what_the_build_says(suite):
    line = "# The table of all sessions: by key and by user, from `create` to `forget`.\n"
    status, said = tried(Fault("no Cython", "core/table.pxi", line, "cdef no such thing\n"), Path(sys.executable))
    assert status == 1
    assert "COULD NOT BE TRIED: no Cython: it cannot be built" in said
    assert "error" in said.split("it cannot be built")[1].lower()


def test_a_suite_that_is_not_there_finds_nothing(suite, monkeypatch):
    monkeypatch.setattr(command, "SIMULATION", f"{suite}.missing")
    status, said = tried(version('__version__ = "7"\n'))
    assert status == 1
    assert "pytest ended with status 4" in said


def test_a_name_that_no_fault_has_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants", "--only", "no such fault"])
    assert command.main() == 1
    assert "no fault is named like 'no such fault'" in capsys.readouterr().out
