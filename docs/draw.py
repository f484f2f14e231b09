"""Draws what the pages show of the code: ``python docs/draw.py`` writes it into them.

What lives here: pictures made from tables of the code. What must not: pictures made by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from cagey_sessions._core import SAVE_TRANSITIONS

DESIGN = Path(__file__).with_name("design.md")
BLOCK = re.compile(r"(?<=<!-- states -->\n).*?(?=<!-- /states -->)", re.DOTALL)


def states() -> str:
    """The life of a save as a Mermaid diagram, one arrow for each pair of states."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for before, event, after in SAVE_TRANSITIONS:
        arrows.setdefault((before, after), []).append(event)
    lines = [f"    {before} --> {after}: {', '.join(events)}" for (before, after), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> none", *lines, "    gone --> [*]", "```", ""])


def drawn(page: str) -> str:
    """The page with its pictures drawn anew."""
    return BLOCK.sub(lambda _: states(), page)


if __name__ == "__main__":
    DESIGN.write_text(drawn(DESIGN.read_text(encoding="utf-8")), encoding="utf-8")
