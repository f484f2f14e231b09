"""Whether what is published can be used: ``python -m distcheck`` (`make dist`).

What lives here: building the sdist, and a wheel from it for each Python of this machine; installing each wheel into an
environment of its own outside the checkout, running the README's programs and the wheel tests there; the table at the
end. What must not: what an archive has to hold (`contents`), where a Python is (`pythons`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .contents import read_sdist, read_wheel, wrong_in_sdist, wrong_in_wheel
from .pythons import Python, find, newest_of_each, supported, without

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""How long one step may take, in seconds."""
BARE = {"cagey-sessions", "orjson", "pip", "pytimeparse", "setuptools"}
"""What an environment holds after the wheel was installed; setuptools is brought by the venv of Python 3.11."""
NOT_OURS = re.compile(r"PYTHON(?!DONTWRITEBYTECODE|UTF8).*|VIRTUAL_ENV|CAGEY_.*|PIP_(REQUIRE_VIRTUALENV|TARGET|USER)")
"""Variables of whoever started this that would reach into the environments."""
PRINTS = "alice has 10 gold, saved as version 1\n", "alice has 20 gold, saved as version 2\n"
"""What the README's first program prints, run twice."""

_printing = threading.Lock()


class StepError(Exception):
    """A step has failed: its name, and what to read."""

    def __init__(self, step: str, output: str) -> None:
        super().__init__(step)
        self.step = step
        self.output = output


class Row(NamedTuple):
    """One line of the table at the end."""

    what: str
    passed: bool
    summary: str
    seconds: float


def say(who: str, what: str) -> None:
    with _printing:
        print(f"{who:>6}  {what}", flush=True)


def run(step: str, command: list[str | Path], folder: Path) -> str:
    """What a command has written on its standard output; `StepError` if its status is not 0."""
    environment = {name: value for name, value in os.environ.items() if not NOT_OURS.fullmatch(name)}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise StepError(step, f"no end within {PATIENCE} s") from None
    if done.returncode:
        raise StepError(step, f"{done.stdout}{done.stderr}\nstatus {done.returncode}")
    return done.stdout


def require(step: str, wrong: list[str]) -> None:
    if wrong:
        raise StepError(step, "\n".join(wrong))


def make_environment(step: str, python: str, folder: Path) -> Path:
    """A new virtual environment; returns its Python."""
    run(step, [python, "-m", "venv", folder], folder.parent)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def build_sdist(out: Path) -> Path:
    run("build", [sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT], ROOT)
    (sdist,) = out.glob("*.tar.gz")
    tracked = run("git", ["git", "ls-files", "--cached"], ROOT).splitlines()
    require("contents", wrong_in_sdist(read_sdist(sdist), tracked))
    check_metadata(sdist)
    return sdist


def check_metadata(path: Path) -> None:
    run("metadata", [sys.executable, "-m", "twine", "check", "--strict", path], path.parent)


def build_wheel(python: Python, sdist: Path, out: Path, work: Path) -> Path:
    """The wheel for one Python, from the sdist, checked against its list."""
    builder = make_environment("environment", python.path, work / "builder")
    run("environment", [builder, "-m", "pip", "install", "--quiet", "build"], work)
    (work / "wheel").mkdir()
    run("build", [builder, "-m", "build", "--wheel", "--outdir", work / "wheel", sdist], work)
    (built,) = (work / "wheel").glob("*.whl")
    wheel = Path(shutil.move(built, out / built.name))
    name = sdist.name.removesuffix(".tar.gz")
    require("contents", wrong_in_wheel(read_wheel(wheel), read_sdist(sdist), name))
    check_metadata(wheel)
    return wheel


def run_readme(python: Path, readme: Path, folder: Path) -> int:
    """Run the README's programs as they are printed; returns how many there are."""
    blocks = re.findall(r"^```python\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    require("quickstart", [] if blocks else ["the README has no program"])
    for expected in PRINTS:
        printed = run("quickstart", [python, "-W", "error", "-c", blocks[0]], folder)
        require("quickstart", [] if printed == expected else [f"printed {printed!r} instead of {expected!r}"])
    for block in blocks[1:]:
        run("quickstart", [python, "-W", "error", "-c", block], folder)
    return len(blocks)


def try_wheel(python: Python, wheel: Path, source: Path, work: Path) -> str:
    """Install a wheel where nothing else is, and use it; returns what to say of it. `source` is the unpacked sdist."""
    bare = make_environment("install", python.path, work / "bare")
    run("install", [bare, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wheel], work)
    run("install", [bare, "-m", "pip", "check"], work)
    listed = json.loads(run("install", [bare, "-m", "pip", "list", "--format", "json"], work))
    require("install", [f"not to be there: {name}" for name in sorted({each["name"] for each in listed} - BARE)])
    say(python.name, "running the README's programs")
    programs = run_readme(bare, source / "README.md", work)
    say(python.name, "running the wheel tests")
    settings = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    run("tests", [bare, "-m", "pip", "install", "--quiet", *settings["dependency-groups"]["test-wheel"]], work)
    shutil.copytree(source / "tests" / "wheel", work / "tests" / "wheel")
    tests = [bare, "-m", "pytest", "-W", "error", "-ra", "-p", "no:cacheprovider", "tests/wheel"]
    said = run("tests", tests, work)
    passed = re.search(r"(\d+) passed.*?(?= in )", said)
    require("tests", [] if passed else [said])
    assert passed
    return f"{programs} programs of the README; {passed[0]}"


def check_python(python: Python, sdist: Path, source: Path, out: Path, work: Path) -> Row:
    started = time.monotonic()
    try:
        work.mkdir()
        say(python.name, "building the wheel from the sdist")
        wheel = build_wheel(python, sdist, out, work)
        say(python.name, f"installing {wheel.name}")
        said = try_wheel(python, wheel, source, work)
    except StepError as error:
        return failed(python.name, error, started)
    summary = f"{wheel.name}, {wheel.stat().st_size / 1000:.0f} kB; {said}"
    return Row(python.name, True, summary, time.monotonic() - started)


def failed(who: str, error: StepError, started: float) -> Row:
    say(who, f"FAILED: {error.step}\n{error.output}")
    return Row(who, False, f"{error.step}: see above", time.monotonic() - started)


def check(out: Path, pythons: list[Python], work: Path) -> list[Row]:
    """Build into `out`, and use what was built under `work`."""
    started = time.monotonic()
    say("sdist", "building")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        sdist = build_sdist(out)
    except StepError as error:
        return [failed("sdist", error, started)]
    with tarfile.open(sdist) as archive:
        archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # not in 3.11.2
    source = work / sdist.name.removesuffix(".tar.gz")
    summary = f"{sdist.name}, {sdist.stat().st_size / 1000:.0f} kB; {len(read_sdist(sdist))} files"
    rows = [Row("sdist", True, summary, time.monotonic() - started)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tried = pool.map(lambda python: check_python(python, sdist, source, out, work / python.name), pythons)
        return [*rows, *tried]


def main() -> int:
    """The exit status: 1 if anything is wrong, 2 if there is nothing to do."""
    parser = argparse.ArgumentParser(prog="python -m distcheck", description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", default="", help="which, apart by spaces (default: all that this machine has)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where to; emptied first (default: dist)")
    given = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = supported(project)
    try:
        found = newest_of_each(find(given.pythons))
    except ValueError as error:
        print(f"distcheck: {error}", file=sys.stderr)
        return 2
    left_out = {python.name: without(python, versions) for python in found if python.version >= (3, 11)}
    pythons = [python for python in found if left_out.get(python.name) == ""]
    if not pythons:
        print("distcheck: no Python here that a wheel can be built for; name one with --pythons", file=sys.stderr)
        return 2
    for python in pythons:
        say(python.name, ".".join(map(str, python.version)))
    with tempfile.TemporaryDirectory(prefix="cagey-sessions-", ignore_cleanup_errors=True) as work:
        rows = check(given.out.absolute(), pythons, Path(work).resolve())
    print()
    for row in rows:
        print(f"{'ok  ' if row.passed else 'FAIL'}  {row.what:<5}  {row.summary}  ({row.seconds:.0f} s)")
    for name, reason in left_out.items():
        if reason:
            print(f"--    {name:<5}  no wheel: {reason}")
    absent = set() if given.pythons else versions - {python.name for python in found}
    for version in sorted(absent, key=lambda name: int(name[2:])):
        print(f"--    {version:<5}  not on this machine")
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
