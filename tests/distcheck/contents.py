"""What a distribution holds. What lives here: the lists of files for the sdist and for a wheel, and what is wrong with
an archive by them. What must not: building, installing.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["read_sdist", "read_wheel", "wrong_in_sdist", "wrong_in_wheel"]

SOURCE = "src/"
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|src/[\w.]+\.egg-info/[\w.-]+")
"""What the build adds to an sdist."""
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
IN_WHEEL = (".py", ".pyi", "py.typed")
"""Of the sources; no .c, no .pyx, no .pxi."""
CORE = re.compile(r"cagey_sessions/_core\.[\w.-]+\.(?:so|pyd)")
MUST_BE_TRACKED = (
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "src/cagey_sessions/_core.pyx",
    "tests/wheel/test_wheel.py",
)
"""Without one of these the list itself is not to be trusted."""


def read_sdist(path: Path) -> list[str]:
    """The files of an sdist, without the folder that holds them all."""
    with tarfile.open(path) as archive:
        return [member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()]


def read_wheel(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def wrong_in_sdist(found: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """What is missing from an sdist or too much in it: it holds what git tracks, but for what begins with a dot."""
    expected = {name for name in tracked if not name.startswith(".")}
    absent = [name for name in MUST_BE_TRACKED if name not in expected]
    if absent:
        return [f"git does not track {name}" for name in absent]
    return _differences({name for name in found if not GENERATED.fullmatch(name)}, expected)


def wrong_in_wheel(found: Iterable[str], sdist: Iterable[str], name: str) -> list[str]:
    """What is missing from the wheel of the distribution `name` (``cagey_sessions-0.1.0``) or too much in it."""
    names = set(found)
    cores = {path for path in names if CORE.fullmatch(path)}
    expected = {path.removeprefix(SOURCE) for path in sdist if path.startswith(SOURCE) and path.endswith(IN_WHEEL)}
    expected |= {f"{name}.dist-info/{part}" for part in METADATA}
    wrong = _differences(names - cores, expected)
    return wrong if len(cores) == 1 else [*wrong, f"{len(cores)} compiled cores instead of one"]


def _differences(found: set[str], expected: set[str]) -> list[str]:
    missing = [f"missing: {name}" for name in sorted(expected - found)]
    return missing + [f"not to be there: {name}" for name in sorted(found - expected)]
