"""``python docs/shots.py``: plays the demo in a terminal and draws it for the pages. What lives here: the terminal, the
recording, and its SVG. What must not: anything of the demo that its own command does not show.

The recording is one SVG that moves by CSS alone: every half second is a picture of the screen, and rows that are the
same are kept once. Who has asked for less motion sees one picture.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from html import escape
from pathlib import Path
from typing import TypeAlias

import pyte

PICTURES = Path(__file__).with_name("pictures")
COLUMNS, LINES = 80, 48
EVERY = 0.5
"""Seconds between two pictures."""
LAST_STAYS = 5.0
WIDE, HIGH, SIZE = 8.43, 18, 14
MARGIN = 16

COLOURS = {
    "default": "#d7dde3",
    "black": "#20262c",
    "red": "#f2777a",
    "green": "#8fc98b",
    "brown": "#e6c36a",
    "blue": "#6fa8dc",
    "magenta": "#c39bd3",
    "cyan": "#67c5cf",
    "white": "#ffffff",
    "brightblack": "#8a949e",
}
PAPER = "#1c2228"

Run: TypeAlias = tuple[str, str, str | None, bool]
"""A text, its colour, the colour behind it, whether it is bold."""
Row: TypeAlias = tuple[tuple[int, Run], ...]
Frame: TypeAlias = tuple[Row, ...]

_STYLE = re.compile(r"\x1b\[([\d;]*)m")


def play(command: list[str]) -> list[Frame]:
    """Run a command in a terminal and return a picture of the screen for each half second."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.Stream(screen)
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    environment.pop("COLORTERM", None)
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, close_fds=True)
    os.close(its)
    decoder = codecs.getincrementaldecoder("utf-8")()
    frames: list[Frame] = []
    following = time.monotonic() + EVERY
    while True:
        if select.select([ours], [], [], max(0.0, following - time.monotonic()))[0]:
            try:
                heard = os.read(ours, 65536)
            except OSError:  # as Linux says that nobody has the other end any more
                heard = b""
            if not heard:
                break
            stream.feed(_STYLE.sub(_faint, decoder.decode(heard)))
        if time.monotonic() >= following:
            frames.append(look(screen))
            following += EVERY
    os.close(ours)
    if process.wait() != 0:
        sys.exit("\n".join(screen.display).rstrip() + f"\nthe command ended with status {process.returncode}")
    return [*(frame for frame in frames if frame), look(screen)]


def _faint(found: re.Match[str]) -> str:
    """The terminal below knows no faint text; grey looks the same."""
    return f"\x1b[{';'.join('90' if part == '2' else part for part in found[1].split(';'))}m"


def look(screen: pyte.Screen) -> Frame:
    """What is on the screen, without the empty rows below it."""
    rows = [_row(screen, number) for number in range(LINES)]
    while rows and not rows[-1]:
        rows.pop()
    return tuple(rows)


def _row(screen: pyte.Screen, number: int) -> Row:
    runs: list[tuple[int, Run]] = []
    for column in range(COLUMNS):
        cell = screen.buffer[number][column]
        front, behind = COLOURS.get(cell.fg, COLOURS["default"]), None if cell.bg == "default" else COLOURS.get(cell.bg)
        if cell.reverse:
            front, behind = PAPER, front
        style = (front, behind, cell.bold)
        if runs and runs[-1][1][1:] == style:
            start, run = runs[-1]
            runs[-1] = (start, (run[0] + cell.data, *style))
        else:
            runs.append((column, (cell.data, *style)))
    return tuple((start, run) for start, run in runs if run[0].strip() or run[2])


class Drawing:
    """An SVG of frames, in which each row is kept once."""

    def __init__(self) -> None:
        self.rows: dict[Row, str] = {}

    def frame(self, frame: Frame, height: int) -> str:
        parts = [f'<rect width="{width_of():g}" height="{height}" fill="{PAPER}"/>']
        for number, row in enumerate(frame):
            if row:
                name = self.rows.setdefault(row, f"r{len(self.rows)}")
                parts.append(f'<use href="#{name}" y="{MARGIN + number * HIGH}"/>')
        return "".join(parts)

    def defined(self) -> str:
        return "\n".join(f'<g id="{name}">{_drawn(row)}</g>' for row, name in self.rows.items())


def _drawn(row: Row) -> str:
    parts = []
    for start, (text, front, behind, bold) in row:
        x = MARGIN + start * WIDE
        if behind:
            parts.append(f'<rect x="{x:.1f}" width="{len(text) * WIDE:.1f}" height="{HIGH}" fill="{behind}"/>')
        kept = text.rstrip()
        if not kept.strip():
            continue
        lead = len(kept) - len(kept.lstrip())
        x, kept = x + lead * WIDE, kept.lstrip()
        weight = ' font-weight="bold"' if bold else ""
        parts.append(
            f'<text x="{x:.1f}" y="{SIZE}" fill="{front}"{weight} textLength="{len(kept) * WIDE:.1f}" '
            f'xml:space="preserve">{escape(kept)}</text>'
        )
    return "".join(parts)


def width_of() -> float:
    return COLUMNS * WIDE + 2 * MARGIN


def height_of(frames: list[Frame]) -> int:
    return max(map(len, frames)) * HIGH + 2 * MARGIN


def svg(height: int, title: str, parts: list[str]) -> str:
    family = "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width_of():g} {height}" width="{width_of():g}" '
            f'height="{height}" font-family="{family}" font-size="{SIZE}" role="img">',
            f"<title>{escape(title)}</title>",
            *parts,
            "</svg>",
            "",
        ]
    )


def still(frame: Frame, title: str) -> str:
    drawing, height = Drawing(), height_of([frame])
    shown = drawing.frame(frame, height)
    return svg(height, title, [f"<defs>{drawing.defined()}</defs>", shown])


def moving(frames: list[Frame], title: str) -> str:
    """All frames, one after the other, again and again. Where nothing moves the one in the middle is seen."""
    drawing, height = Drawing(), height_of(frames)
    frames = [*frames, *[frames[-1]] * round(LAST_STAYS / EVERY)]
    shown = drawing.frame(frames[len(frames) // 3], height)
    groups, begins = [], 0
    for number, frame in enumerate(frames):
        if number + 1 < len(frames) and frames[number + 1] == frame:
            continue
        share = (number + 1 - begins) / len(frames) * 100
        groups.append((begins, share, drawing.frame(frame, height)))
        begins = number + 1
    whole = len(frames) * EVERY
    shares = sorted({round(share, 3) for _, share, _ in groups})
    styles = [
        f"@keyframes k{number} {{ 0% {{ visibility: visible }} {share:g}%, 100% {{ visibility: hidden }} }}"
        for number, share in enumerate(shares)
    ]
    style = (
        ".f { visibility: hidden; animation-timing-function: step-end; animation-iteration-count: infinite;"
        f" animation-duration: {whole:g}s }}\n"
        + "\n".join(styles)
        + "\n@media (prefers-reduced-motion: reduce) { .f { animation: none } }"
    )
    body = [
        f'<g class="f" style="animation-name:k{shares.index(round(share, 3))};animation-delay:{begins * EVERY:g}s">'
        f"{drawn}</g>"
        for begins, share, drawn in groups
    ]
    return svg(height, title, [f"<style>{style}</style>", f"<defs>{drawing.defined()}</defs>", shown, *body])


def main() -> None:
    parser = argparse.ArgumentParser(description="Play the demo and draw it for the pages.")
    parser.add_argument("--bots", default="500")
    parser.add_argument("--seconds", default="20s")
    arguments = parser.parse_args()
    options = ["--bots", arguments.bots, "--seconds", arguments.seconds]
    frames = play([sys.executable, "-m", "cagey_sessions", "demo", *options])
    board = max(map(len, frames[: len(frames) // 2]))
    end = frames[-1][board:]
    while end and not end[0]:
        end = end[1:]
    recording = [frame[:board] for frame in frames[:-1]]
    PICTURES.mkdir(exist_ok=True)
    title = f"cagey-sessions demo {' '.join(options)}"
    (PICTURES / "demo.svg").write_text(moving(recording, title), encoding="utf-8")
    (PICTURES / "demo-end.svg").write_text(still(end, f"{title}: what was checked"), encoding="utf-8")


if __name__ == "__main__":
    main()
