"""The pages that are held true by the code: guarantees, and pictures."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_guarantee_names_a_test_that_exists():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and "---" not in line and "promise |" not in line
    ]
    assert len(rows) > 25
    for row in rows:
        cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert cited or "the simulation" in row, f"no test in: {row}"
        for file, name in cited:
            assert name in functions(ROOT / file), f"{file} has no {name}"


def test_the_simulation_checks_the_laws_that_are_said_to_be_in_it():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    said = set(re.findall(r"^\| (I\d+) \|.*the simulation", page, re.MULTILINE))
    folder = ROOT / "tests" / "simulation"
    sources = (folder / "laws.py").read_text(encoding="utf-8") + (folder / "driver.py").read_text(encoding="utf-8")
    assert said - set(re.findall(r"\bI\d+\b", sources)) == set()


def test_pictures_are_drawn_from_the_code():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    page = draw.DESIGN.read_text(encoding="utf-8")
    assert draw.drawn(page) == page, "python docs/draw.py"
    assert "saving --> saving_asked: ask" in page
