"""A tool to run, and places of one's own in each engine."""

from __future__ import annotations

import io
import sys

import pytest

from cagey_sessions.tools import cli
from tools.running import ENGINES, Done


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a tool in an empty folder, with this as its stdin."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            status = cli.main(["store", *arguments])
        except SystemExit as end:
            status = end.code
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def url() -> str:
    return "sqlite:///players.db"


@pytest.fixture(params=["postgres", "redis"])
def shared(request, tmp_path, monkeypatch):
    """The URL of a place of one's own in an engine that servers share."""
    yield from ENGINES[request.param]()


@pytest.fixture(params=list(ENGINES))
def anywhere(request):
    """The URL of a place of one's own in each engine."""
    yield from ENGINES[request.param]()
