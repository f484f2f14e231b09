"""The conformance suite, as somebody runs it who writes a store."""

from __future__ import annotations

import os
import subprocess
import sys

FORGETFUL = """\
import pytest
from cagey_sessions.stores import MemoryStore
from cagey_sessions.testing.store_conformance import StoreConformance


class Forgetful(MemoryStore):
    async def load(self, user_id):
        return None


class TestForgetful(StoreConformance):
    @pytest.fixture
    def make(self):
        return Forgetful
"""


def test_a_store_that_breaks_the_contract_is_told_what_it_answered(tmp_path):
    """With this package's plugin and no other: its coroutines are run, and its assertions show both sides."""
    (tmp_path / "test_forgetful.py").write_text(FORGETFUL)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "cagey_sessions.testing.plugin"]
    done = subprocess.run(
        [*command, "-k", "is_there_for_load or no_users", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "assert None == Record(user_id=1," in done.stdout
