"""What the tests of the core's objects share: a session with a user, and a fresh interpreter. No tests here."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

from cagey_sessions._core import SessionTable


def identified(table: SessionTable, user_id: int | str = 1, data: object = None, interval: int = 10) -> Any:
    session = table.create()
    table.identify(session, user_id, {} if data is None else data, 0, interval)
    return session


PRELUDE = """
import asyncio, gc, logging, os, sys, threading, weakref
from cagey_sessions import *
from cagey_sessions._core import DEBUG, SessionCore, SessionTable

logging.getLogger("asyncio").setLevel("ERROR")  # a slow machine is no fault
MANY = 100 if DEBUG else 5000  # enough to move the rows in memory; a debug build looks at each after every call
"""


def python(script: str, last_words: str = "", *, stderr: str = "") -> str:
    """Run a script in a fresh interpreter: it must exit cleanly and say only this on stderr; its output."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PRELUDE + textwrap.dedent(script) + last_words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, stderr)
    return done.stdout
