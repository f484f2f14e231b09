"""The Pythons of a machine. What lives here: where they may be, what each one is, and which of them get a wheel. What
must not: what is done with them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Python", "find", "newest_of_each", "supported", "without"]

FOLDERS = (
    ("PYENV_ROOT", "~/.pyenv", "versions/*"),
    ("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python", "*"),
    ("ASDF_DATA_DIR", "~/.asdf", "installs/python/*"),
)
"""Of tools that keep several: the variable that says where, where it is otherwise, and the folders of the versions."""
ASK = """\
import importlib.util, json, os, platform, sys, sysconfig
lacks = [name for name in ("ensurepip", "venv") if importlib.util.find_spec(name) is None]
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    lacks.append("Python.h")
threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
if platform.python_implementation() == "CPython":
    print(json.dumps([os.path.realpath(sys.executable), sys.version_info[:3], threaded, ", ".join(lacks)]))
"""


class Python(NamedTuple):
    path: str
    version: tuple[int, ...]
    threaded: bool
    """Built without the GIL."""
    lacks: str
    """What it needs and has not, or nothing."""

    @property
    def name(self) -> str:
        return f"{self.version[0]}.{self.version[1]}{'t' * self.threaded}"


def supported(project: dict[str, Any]) -> set[str]:
    """The versions that pyproject.toml names."""
    found = re.findall(r"Python :: (3\.\d+)\b", "\n".join(project["classifiers"]))
    return set(found)


def find(named: str) -> list[Python]:
    """The Pythons that `named` names, apart by spaces, or all that the machine is known to have.

    Raises `ValueError` for a name that is no CPython.
    """
    if named:
        pythons = []
        for name in named.split():
            python = _ask(shutil.which(name) or name)
            if python is None:
                raise ValueError(f"{name} is no CPython that runs")
            pythons.append(python)
        return pythons
    paths = dict.fromkeys(map(os.path.realpath, [sys.executable, *_on_path(), *_in_folders()]))
    return [python for python in map(_ask, paths) if python]


def newest_of_each(pythons: Iterable[Python]) -> list[Python]:
    """One for each version, the newest of those that can build."""
    best: dict[str, Python] = {}
    for python in sorted(pythons, key=lambda each: (not each.lacks, each.version)):
        best[python.name] = python
    return sorted(best.values(), key=lambda each: (each.version, each.threaded))


def without(python: Python, versions: set[str]) -> str:
    """Why there is no wheel for this one, or nothing."""
    if python.threaded:
        return "free-threaded: orjson has no wheels for it yet"
    if f"{python.version[0]}.{python.version[1]}" not in versions:
        return "pyproject.toml does not name it"
    return f"it lacks {python.lacks}" if python.lacks else ""


def _on_path() -> Iterator[str]:
    for folder in os.get_exec_path():
        for path in sorted(Path(folder).glob("python3*")):
            if re.fullmatch(r"python3(\.\d+t?)?(\.exe)?", path.name):
                yield str(path)


def _in_folders() -> Iterator[str]:
    for variable, home, pattern in FOLDERS:
        root = Path(os.environ.get(variable) or home).expanduser()
        for folder in sorted(root.glob(pattern)):
            for path in (folder / "bin" / "python3", folder / "python.exe"):
                if path.exists():
                    yield str(path)


def _ask(path: str) -> Python | None:
    """What a Python says of itself; None for one that does not run, as a shim that leads nowhere, or is no CPython."""
    try:
        done = subprocess.run([path, "-I", "-c", ASK], capture_output=True, text=True, check=True, timeout=30)
        real, version, threaded, lacks = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Python(real, tuple(version), threaded, lacks)
