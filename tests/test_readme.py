"""What the pages show is run as printed."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from cagey_sessions import SessionManager
from cagey_sessions.options import Options

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_the_quickstart_of_the_readme_runs():
    (code,) = blocks("README.md", "python")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == 'saved alice {"gold": 10}\n' * 2


def test_the_quickstart_has_about_twelve_lines_of_code():
    (code,) = blocks("README.md", "python")
    lines = [
        line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from", "asyncio.run"))
    ]
    assert len(lines) <= 12


def test_the_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in re.findall(r"^make (\w+)", readme, re.MULTILINE):
        assert re.search(rf"^{verb}:", makefile, re.MULTILINE)


def test_links_of_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_settings_is_complete_and_true():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE))
    parameters = inspect.signature(SessionManager).parameters.values()
    assert list(rows) == [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    defaults = Options()
    assert rows["max_in_flight"] == f"`{defaults.max_in_flight}`"
    assert (rows["interval"], defaults.interval) == ("none", None)
    assert (rows["persist_on"], defaults.persist_on) == ("`[]`", frozenset())
    deadline = inspect.signature(SessionManager.destroy).parameters["deadline"].default
    assert f'`"{deadline}"`' in page
