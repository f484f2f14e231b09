"""The lists of `make dist` see what is missing and what is too much."""

from __future__ import annotations

import pytest

from distcheck.contents import MUST_BE_TRACKED, wrong_in_sdist, wrong_in_wheel
from distcheck.pythons import Python, newest_of_each, without

TRACKED = [
    *MUST_BE_TRACKED,
    ".github/workflows/ci.yml",
    "src/cagey_sessions/__init__.py",
    "src/cagey_sessions/_core.pyi",
]
TRACKED += ["src/cagey_sessions/py.typed", "src/cagey_sessions/core/rows.pxi", "tests/crashes/shim.c"]
SDIST = [name for name in TRACKED if not name.startswith(".")]
MADE = ["PKG-INFO", "setup.cfg", "src/cagey_sessions.egg-info/PKG-INFO", "src/cagey_sessions.egg-info/SOURCES.txt"]
CORE = "cagey_sessions/_core.cpython-313-x86_64-linux-gnu.so"
INFO = "cagey_sessions-0.1.0.dist-info/"
WHEEL = ["cagey_sessions/__init__.py", "cagey_sessions/_core.pyi", "cagey_sessions/py.typed", CORE]
WHEEL += [
    INFO + name for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
]


def of_wheel(found: list[str]) -> list[str]:
    return wrong_in_wheel(found, SDIST + MADE, "cagey_sessions-0.1.0")


def test_an_sdist_holds_what_is_tracked_and_what_the_build_makes():
    assert wrong_in_sdist(SDIST + MADE, TRACKED) == []


@pytest.mark.parametrize("name", SDIST)
def test_a_file_that_an_sdist_lacks_is_named(name):
    assert wrong_in_sdist([other for other in SDIST if other != name], TRACKED) == [f"missing: {name}"]


@pytest.mark.parametrize("name", ["src/cagey_sessions/_core.c", "players.db", ".github/workflows/ci.yml"])
def test_a_file_that_does_not_belong_into_an_sdist_is_named(name):
    assert wrong_in_sdist([*SDIST, name], TRACKED) == [f"not to be there: {name}"]


def test_a_list_that_cannot_be_right_is_refused():
    assert wrong_in_sdist([], []) == [f"git does not track {name}" for name in MUST_BE_TRACKED]


def test_a_wheel_holds_the_modules_the_types_the_core_and_its_metadata():
    assert of_wheel(WHEEL) == []


@pytest.mark.parametrize("name", [name for name in WHEEL if name != CORE])
def test_a_file_that_a_wheel_lacks_is_named(name):
    assert of_wheel([other for other in WHEEL if other != name]) == [f"missing: {name}"]


@pytest.mark.parametrize("name", ["cagey_sessions/_core.c", "cagey_sessions/_core.pyx", "cagey_sessions/core/rows.pxi"])
def test_sources_of_the_core_do_not_belong_into_a_wheel(name):
    assert of_wheel([*WHEEL, name]) == [f"not to be there: {name}"]


def test_a_wheel_has_one_core():
    assert of_wheel([name for name in WHEEL if name != CORE]) == ["0 compiled cores instead of one"]
    assert of_wheel([*WHEEL, "cagey_sessions/_core.cp313-win_amd64.pyd"]) == ["2 compiled cores instead of one"]


def python(version: str, *, path: str = "python", threaded: bool = False, lacks: str = "") -> Python:
    return Python(path, tuple(map(int, version.split("."))), threaded, lacks)


def test_the_newest_python_of_each_version_is_taken():
    found = [
        python("3.13.0", path="a"),
        python("3.11.2", path="b"),
        python("3.11.7", path="c"),
        python("3.11.5", path="d"),
    ]
    assert [each.path for each in newest_of_each(found)] == ["c", "a"]


def test_an_older_python_that_can_build_is_taken_before_a_newer_one_that_cannot():
    found = [python("3.11.9", path="a", lacks="Python.h"), python("3.11.2", path="b")]
    assert [each.path for each in newest_of_each(found)] == ["b"]


def test_a_python_that_is_left_out_has_a_reason():
    supported = {"3.11", "3.14"}
    assert without(python("3.11.7"), supported) == ""
    assert "pyproject.toml" in without(python("3.15.0"), supported)
    assert "free-threaded" in without(python("3.14.0", threaded=True), supported)
    assert without(python("3.11.7", lacks="Python.h"), supported) == "it lacks Python.h"
