"""What the pages show is run as printed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cagey_sessions
from cagey_sessions import Session, SessionManager, dataclass_codec, stores, testing
from cagey_sessions.data.encoding import Encoding
from cagey_sessions.options import PERSIST_EVENTS, SECOND, read_options

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).parents[1])}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


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


def test_the_program_of_the_readme_runs_and_remembers(tmp_path):
    stored, _, _ = blocks("README.md", "python")
    for gold in (10, 20):
        assert run(stored, tmp_path) == (f"alice has {gold} gold, saved as version {gold // 10}\n", "")


def test_the_program_without_a_store_runs(tmp_path):
    _, code, _ = blocks("README.md", "python")
    assert run(code, tmp_path) == ('saved alice {"gold": 10}\n' * 2, "")


def test_the_test_of_the_readme_passes(tmp_path):
    *_, code = blocks("README.md", "python")
    assert run(code, tmp_path) == ("", "")


def test_the_programs_have_about_twelve_lines_of_code():
    for code in blocks("README.md", "python"):
        lines = [
            line
            for line in code.splitlines()
            if line.strip() and not line.startswith(("import", "from", "asyncio.run"))
        ]
        assert len(lines) <= 12


def test_the_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in re.findall(r"^make (\w+)", readme, re.MULTILINE):
        assert re.search(rf"^{verb}:", makefile, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("https://"):
                continue
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {link}"


def test_the_table_of_settings_is_complete_and_true():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    rows = {name: (stored, without) for name, stored, without in found}
    parameters = inspect.signature(SessionManager).parameters.values()
    assert list(rows) == [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    stored, without = read_options(None, stored=True), read_options(None)
    assert rows["max_in_flight"] == (f"`{stored.max_in_flight}`", f"`{without.max_in_flight}`")
    assert (rows["interval"], stored.interval, without.interval) == (('`"30s"`', "none"), 30 * SECOND, None)
    assert rows["persist_on"] == ("both", "`[]`")
    assert (stored.persist_on, without.persist_on) == (frozenset(PERSIST_EVENTS), frozenset())
    assert (rows["save_timeout"][0], stored.save_timeout) == ('`"10s"`', 10 * SECOND)
    assert rows["max_bytes"][0] == f"`{Encoding().max_bytes}`"
    assert rows["schema"][0] == f"`{Encoding().schema}`"
    deadline = inspect.signature(SessionManager.destroy).parameters["deadline"].default
    assert f'`"{deadline}"`' in page
    for method, name in ((Session.login, "session.login"), (SessionManager.open, "manager.open")):
        default = inspect.signature(method).parameters["when_active"].default
        assert f'`{name}(when_active=…)` | `"{default}"`' in page


CALLS = {
    "manager.create": SessionManager.create,
    "manager.destroy": SessionManager.destroy,
    "manager.open": SessionManager.open,
    "manager.run_until_signal": SessionManager.run_until_signal,
    "session.destroy": Session.destroy,
    "session.login": Session.login,
    "dataclass_codec": dataclass_codec,
    "world": testing.world,
    "crash_test": testing.crash_test,
    **{
        name: getattr(stores, name)
        for name in ("SQLiteStore", "PostgresStore", "PostgresTable", "RedisStore", "MemoryStore", "CallbackStore")
    },
}
SAID_ELSEWHERE = {
    ("manager.create", "key"),  # what a key is: below the table
    ("manager.open", "default"),  # the row of session.login says that it is the same
}


@pytest.mark.parametrize("call", CALLS)
def test_every_argument_with_a_default_is_in_the_table_of_settings(call):
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(rf"^\| `{call}\((\w+)[=…]*\)`.*? \| (.*?) \|", page, re.MULTILINE))
    rows |= dict.fromkeys(re.findall(rf"^\| `{call}\(\w+=…\)`, `\((\w+)=…\)`", page, re.MULTILINE), "")
    parameters = inspect.signature(CALLS[call]).parameters.values()
    optional = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and (call, parameter.name) not in SAID_ELSEWHERE
    }
    assert set(rows) == set(optional)
    for name, default in optional.items():
        if isinstance(default, str):
            assert rows[name] == f'`"{default}"`'
        elif isinstance(default, bool | int):
            assert rows[name].split(" ")[0] == f"`{default}`"
