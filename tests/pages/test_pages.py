"""The pages that are held true by the code: guarantees, and pictures."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

import cagey_sessions
import cagey_sessions.stores
import cagey_sessions.testing

ROOT = Path(__file__).parents[2]


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_guarantee_names_a_test_that_exists():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and "---" not in line and not line.endswith("| test |")
    ]
    assert len(rows) > 25
    for row in rows:
        cited = re.findall(r"`((?:tests|src/cagey_sessions/testing)/[\w/]+\.py)::(\w+)`", row)
        assert cited or "the simulation" in row, f"no test in: {row}"
        for file, name in cited:
            assert name in functions(ROOT / file), f"{file} has no {name}"


def marked(path: Path) -> set[tuple[str, str]]:
    """The guarantees that the tests of a file are marked with, each with the name of the test."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        (str(ast.literal_eval(guarantee)), node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for mark in node.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.guarantee"
        for guarantee in mark.args
    }


def test_the_tests_of_a_guarantee_are_marked_with_it():
    """Those of the conformance suite are not: its users have no such marker."""
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = {
        (guarantee, file, name)
        for guarantee, row in re.findall(r"^\| (I\d+) \|(.*)$", page, re.MULTILINE)
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
    }
    assert len(named) > 25
    assert named == {
        (guarantee, path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for guarantee, name in marked(path)
    }


def test_the_simulation_checks_the_laws_that_are_said_to_be_in_it():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    said = set(re.findall(r"^\| (I\d+) \|.*the simulation", page, re.MULTILINE))
    folder = ROOT / "tests" / "simulation"
    sources = (folder / "laws.py").read_text(encoding="utf-8") + (folder / "driver.py").read_text(encoding="utf-8")
    assert said - set(re.findall(r"\bI\d+\b", sources)) == set()


def load(name: str) -> Any:
    """A program of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_drawn_from_the_code():
    draw = load("draw")
    for name, picture in draw.PICTURE_OF.items():
        assert (draw.PICTURES / name).read_text(encoding="utf-8") == picture(), "make diagrams"
    page = draw.ARCHITECTURE.read_text(encoding="utf-8")
    assert draw.drawn(page) == page, "make diagrams"
    assert "\n| `sessions/` |" in page


@pytest.mark.parametrize(
    ("here", "link", "there", "without"),
    [
        ("docs/stores.md", "[a](own-tables.md#programs)", "[a](own-tables.md#programs)", None),
        ("docs/stores.md", "[a](#sqlitestore)", "[a](#sqlitestore)", None),
        ("docs/stores.md", "[a](https://example.org/x.md)", "[a](https://example.org/x.md)", None),
        ("docs/stores.md", "[a](../SECURITY.md)", "[a](security-policy.md)", None),
        ("docs/index.md", "[a](../README.md#more)", "[a](index.md#more)", None),
        ("CONTRIBUTING.md", "[a](docs/api.md)", "[a](api.md)", None),
        ("SECURITY.md", "[a](CHANGELOG.md)", "[a](changelog.md)", None),
        ("docs/stores.md", "[a](../no/such.py)", "[a](../no/such.py)", None),
        ("README.md", "[the file](Makefile)", "[the file](https://host/x/blob/main/Makefile)", "the file (`Makefile`)"),
        (
            "docs/a.md",
            "[`b.py`](../tests/support/model.py)",
            "[`b.py`](https://host/x/blob/main/tests/support/model.py)",
            "`b.py` (`tests/support/model.py`)",
        ),
        (
            "docs/a.md",
            "[model.py](../tests/support/model.py)",
            "[model.py](https://host/x/blob/main/tests/support/model.py)",
            "`tests/support/model.py`",
        ),
        ("docs/a.md", "![a](pictures/a.svg)", "![a](pictures/a.svg)", None),
        ("docs/a.md", "```\n[a](../Makefile)\n```", "```\n[a](../Makefile)\n```", None),
    ],
)
def test_a_link_of_the_repository_on_the_site(here, link, there, without):
    hooks = load("hooks")
    assert hooks.links_of_the_site(f"\n{link}\n", here, "https://host/x/") == f"\n{there}\n"
    assert hooks.links_of_the_site(f"\n{link}\n", here, None) == f"\n{without or there}\n"


def test_pages_are_read_alike_on_github_and_on_the_site():
    """The site takes a list, or a block in one, for text where GitHub does not: without an empty line, or 4 spaces."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for before, line in pairwise(text.splitlines()):
            block = not before and re.match(r" {1,3}\S", line)
            begins = re.match(r"- |\d+\. ", line) and before and not re.match(r"- |\d+\. |  ", before)
            assert not block and not begins, f"{page.name}: {line}"


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: (cagey_sessions[\w.]*)$", page, re.MULTILINE)
    there = [resolve_name(name) for name in described]
    wholly = {name for name, found in zip(described, there, strict=True) if inspect.ismodule(found)}
    assert {name.rpartition(".")[2] for name in wholly} == {"contract", "errors", "store_conformance"}
    there += [getattr(module, name) for module in there if inspect.ismodule(module) for name in module.__all__]
    for module in (cagey_sessions, cagey_sessions.stores, cagey_sessions.testing):
        for name in set(module.__all__) - {"__version__"}:
            assert any(getattr(module, name) is found for found in there), f"{module.__name__}.{name}"


def test_every_page_of_the_folder_is_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    beside = {"contributing.md", "security-policy.md", "changelog.md"}
    assert set(re.findall(r"([\w-]+\.md)$", nav, re.MULTILINE)) == beside | {
        path.name for path in (ROOT / "docs").glob("*.md")
    }
