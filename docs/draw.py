"""Draws what the pages show of the code: ``python docs/draw.py`` writes the pictures, and the table of the rooms.

What lives here: pictures made from tables and imports of the code, and where things stand in them. What must not:
pictures of which the code does not say what is in them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import mean

import cagey_sessions
from cagey_sessions import EndReason
from cagey_sessions._core import SAVE_STATES, SAVE_TRANSITIONS
from cagey_sessions.events.listeners import MANAGER_EVENTS, SESSION_EVENTS

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
PACKAGE = Path(cagey_sessions.__file__).parent
ARCHITECTURE = DOCS / "architecture.md"
PACKAGES = re.compile(r"(?<=<!-- packages -->\n).*?(?=<!-- /packages -->)", re.DOTALL)
MODULES = re.compile(r"(?<=<!-- modules -->\n).*?(?=<!-- /modules -->)", re.DOTALL)

INK, SOFT, PAPER = "#22303c", "#7d8b97", "#ffffff"
LIVE, LEAVING, SAVING = "#e8f1f8", "#f8ece4", "#d9ead9"

Box = tuple[float, float, float, float]
"""The middle, the width and the height."""


class Picture:
    """An SVG that grows: boxes, texts and arrows."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="DejaVu Sans, Verdana, sans-serif" font-size="13" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(self, box: Box, text: str, fill: str, *, round_: float = 6, size: float = 13) -> None:
        x, y, width, height = box
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="{round_:g}" '
            f'fill="{fill}" stroke="{INK}"/>'
        )
        self.text(x, y, text, size=size)

    def text(
        self, x: float, y: float, text: str, *, size: float = 13, anchor: str = "middle", halo: bool = False
    ) -> None:
        lines = text.split("\n")
        for number, line in enumerate(lines):
            height = y + size * 0.36 + (number - (len(lines) - 1) / 2) * size * 1.3
            begin = f'<text x="{x:g}" y="{height:.1f}" font-size="{size:g}" text-anchor="{anchor}" '
            if halo:
                self.parts.append(f'{begin}fill="{PAPER}" stroke="{PAPER}" stroke-width="4">{escape(line)}</text>')
            self.parts.append(f'{begin}fill="{INK}">{escape(line)}</text>')

    def path(
        self, path: str, *, colour: str = INK, dashed: bool = False, width: float = 1.2, head: bool = True
    ) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        end = ' marker-end="url(#head)"' if head else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dash}{end}/>')

    def whole(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def edge(box: Box, towards: tuple[float, float]) -> tuple[float, float]:
    """Where a line from the middle of a box leaves it."""
    x, y, width, height = box
    dx, dy = towards[0] - x, towards[1] - y
    scale = min(width / 2 / abs(dx) if dx else 1e9, height / 2 / abs(dy) if dy else 1e9)
    return x + dx * scale, y + dy * scale


# The life of a save

ROWS = (
    ("none", "idle", "due", "asked", "saving", "saving_asked"),
    (None, "ending", None, "ending_asked", "ending_saving", "ending_saving_asked"),
    (None, None, None, "gone", None, None),
)
COLUMNS = (70, 200, 330, 470, 620, 800)
HEIGHTS = (130, 320, 450)


def life_of_a_save() -> str:
    """Each state a box, each pair of states with the events between them an arrow."""
    picture = Picture(900, 500, "The life of a save: its states, and the events between them")
    boxes: dict[str, Box] = {
        name: (COLUMNS[column], HEIGHTS[row], 24 + 7.6 * len(name), 34)
        for row, names in enumerate(ROWS)
        for column, name in enumerate(names)
        if name
    }
    assert set(boxes) == set(SAVE_STATES)
    arrows: dict[tuple[str, str], list[str]] = {}
    for before, event, after in SAVE_TRANSITIONS:
        arrows.setdefault((before, after), []).append(event)
    places: list[tuple[float, float, str]] = []
    for (before, after), events in arrows.items():
        places.append(draw_arrow(picture, boxes, before, after, " / ".join(events)))
    for name, box in boxes.items():
        fill = SAVING if "saving" in name else LEAVING if name in ROWS[1] else LIVE
        picture.box(box, name, PAPER if name in ("none", "gone") else fill, round_=17)
    for x, y, text in places:
        picture.text(x, y, text, size=11, halo=True)
    picture.text(20, 22, "green: a save is under way", size=11, anchor="start")
    picture.text(20, 40, "blue: the session lives; red: it is ending, and hidden", size=11, anchor="start")
    return picture.whole()


def draw_arrow(picture: Picture, boxes: dict[str, Box], before: str, after: str, text: str) -> tuple[float, float, str]:
    """Draw one arrow, and say where its text goes: above a row what leads back, below it what skips a box."""
    start, end = boxes[before], boxes[after]
    (x, y, width, height), (to_x, to_y, to_width, _) = start, end
    if before == after:
        picture.path(f"M{x - 12:g},{y + height / 2:g} c-14,30 38,30 24,1")
        return x + 28, y + height / 2 + 14, text
    if y != to_y:
        a, b = edge(start, (to_x, to_y)), edge(end, (x, y))
        picture.path(f"M{a[0]:.1f},{a[1]:.1f} L{b[0]:.1f},{b[1]:.1f}", dashed=True)
        share = 0.52 if x == to_x else 0.55
        return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, text
    between = [box for box in boxes.values() if box[1] == y and min(x, to_x) < box[0] < max(x, to_x)]
    if to_x > x and not between:
        picture.path(f"M{x + width / 2:g},{y:g} L{to_x - to_width / 2:g},{to_y:g}")
        return (x + width / 2 + to_x - to_width / 2) / 2, y - 12, text
    up = -1 if to_x < x else 1
    lift = up * (26 + 20 * len(between) + (8 if up < 0 else 14))
    a_x, b_x = x + (14 if to_x > x else -14), to_x + (-14 if to_x > x else 14)
    side = up * height / 2
    picture.path(f"M{a_x:g},{y + side:g} Q{(a_x + b_x) / 2:g},{y + side + 2 * lift:g} {b_x:g},{y + side:g}")
    return a_x + (b_x - a_x) * (0.5 if up < 0 else 0.3), y + side + lift * (1 if up < 0 else 0.84), text


# The life of a session

STEPS = (
    # what is called, what is emitted by then, what is true from then on
    ("manager.create(key)", "created", "anonymous\nfound by its key"),
    ("session.start()", "started", "the program talks\nto this human"),
    ("session.login(user_id)", "identified", "has user and data\nsaved every interval"),
    ("session.destroy()", "before_destroy", "hidden\nno longer found"),
    ("the last save", None, "acknowledged\nuser let go of"),
    (None, "destroy", "ended\nend_reason says why"),
)


def life_of_a_session() -> str:
    emitted = [event for _, event, _ in STEPS if event]
    assert set(emitted) == {"created", *SESSION_EVENTS} <= set(MANAGER_EVENTS), "the events of the code"
    picture = Picture(1050, 300, "The life of a session: what is called, what is emitted, what holds from then on")
    lefts = [160 + 162 * number for number in range(len(STEPS))]
    for label, y in (("call", 48), ("event", 98), ("from then on", 162)):
        picture.text(4, y, label, size=11, anchor="start")
    for x, (call, event, then) in zip(lefts, STEPS, strict=True):
        if call:
            picture.box((x, 48, 150, 26), call, PAPER, round_=3, size=11)
            picture.path(f"M{x:g},61 L{x:g},{85 if event else 137}", width=1)
        if event:
            picture.box((x, 98, 118, 24), event, SAVING, round_=12, size=12)
            picture.path(f"M{x:g},110 L{x:g},137", width=1)
        picture.box((x, 162, 138, 48), then, LEAVING if x > lefts[2] else LIVE, size=11)
    for x, to_x in pairwise(lefts):
        picture.path(f"M{x + 69:g},162 L{to_x - 70:g},162", width=1.6)
    saving = lefts[2]
    picture.path(f"M{saving - 30:g},186 c-34,52 94,52 62,1", width=1.6)
    picture.text(saving, 240, "changed, and due or asked for:\nbytes fixed, written, acknowledged", size=11)
    picture.path(f"M{lefts[4] + 30:g},186 c34,52 -94,52 -62,1", width=1.6)
    picture.text(lefts[4], 240, "tried again until\nthe store has it", size=11)
    reasons = ", ".join(repr(reason.value) for reason in EndReason)
    picture.text(525, 284, f"end_reason: {reasons}", size=11)
    return picture.whole()


# The rooms

NAMES_ONLY = {"__init__", "__main__", "_version"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it, for type checkers too."""
    here = path.relative_to(PACKAGE).parts[:-1]
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = tuple(node.module.split(".")) if node.module else ()
        if node.level == 0 and module[0] == "cagey_sessions":
            module = module[1:]
        elif node.level:
            module = here[: len(here) - node.level + 1] + module
        else:
            continue
        rooms |= {module[0]} if module else {home_of(alias.name) for alias in node.names}
    return rooms


def home_of(name: str) -> str:
    """The room of what is imported from the package itself: a room, or a public name of one."""
    there = getattr(getattr(cagey_sessions, name, None), "__module__", "")
    return there.split(".")[1] if there.startswith("cagey_sessions.") else name


def imports() -> dict[str, set[str]]:
    """Each room, and the rooms that it imports."""
    found: dict[str, set[str]] = {"_core": set()}
    for path in sorted(PACKAGE.rglob("*.py")):
        if room_of(path) not in NAMES_ONLY:
            found.setdefault(room_of(path), set()).update(imported(path))
    found["_core"] = {
        name
        for source in [PACKAGE / "_core.pyx", *PACKAGE.glob("core/*.pxi")]
        for name in re.findall(r"^from cagey_sessions\.(\w+) import", source.read_text(encoding="utf-8"), re.MULTILINE)
    }
    return {room: {other for other in others if other in found} - {room} for room, others in found.items()}


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms stand below each, on the longest way down."""
    known: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in known:
            known[room] = 1 + max((floor(other) for other in rooms[room]), default=-1)
        return known[room]

    for room in rooms:
        floor(room)
    return known


def needed(rooms: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others."""

    def below(room: str) -> set[str]:
        return set().union(*({other} | below(other) for other in rooms[room])) if rooms[room] else set()

    return [
        (room, other)
        for room, others in rooms.items()
        for other in sorted(others)
        if not any(other in below(third) for third in others - {other})
    ]


WIDTH = 980
BEND = 14
"""How much room a line takes that passes between two boxes."""


def architecture() -> str:
    """Every room on its floor; a line that is longer than a floor passes between the boxes of the others."""
    rooms = imports()
    levels = floors(rooms)
    top = max(levels.values())
    rows: list[list[str]] = [sorted(room for room in rooms if levels[room] == level) for level in range(top + 1)]
    chains: list[list[str]] = []
    for room, other in needed(rooms):
        between = range(levels[room] - 1, levels[other], -1)
        chains.append([room, *(f"{room}>{other}@{level}" for level in between), other])
        for level, place in zip(between, chains[-1][1:-1], strict=True):
            rows[level].append(place)
    neighbours: dict[str, list[str]] = {}
    for chain in chains:
        for upper, lower in pairwise(chain):
            neighbours.setdefault(upper, []).append(lower)
            neighbours.setdefault(lower, []).append(upper)
    places = {name: x for row in rows for name, x in spread(row)}
    for _ in range(24):
        for row in [*rows, *reversed(rows)]:
            row.sort(key=lambda name: (mean(places[other] for other in neighbours.get(name, [name])), name))
            places.update(spread(row))

    picture = Picture(WIDTH, 64 + 64 * (top + 1), "The modules, and what each imports")
    heights = {name: 34 + 64 * (top - level) for level, row in enumerate(rows) for name in row}
    for chain in chains:
        path = f"M{places[chain[0]]:.0f},{heights[chain[0]] + 14:g}"
        for upper, lower in pairwise(chain):
            start, end = heights[upper] + 14, heights[lower] - 14
            middle = (start + end) / 2
            path += f" C{places[upper]:.0f},{middle:g} {places[lower]:.0f},{middle:g} {places[lower]:.0f},{end:g}"
            if lower != chain[-1]:
                path += f" L{places[lower]:.0f},{end + 28:g}"
        picture.path(path, colour=SOFT)
    for room in rooms:
        box = (places[room], heights[room], width_of(room), 28)
        picture.box(box, shown(room), SAVING if room == "_core" else LEAVING if is_folder(room) else LIVE)
    caption = "an arrow: imports; those that follow from others are left out. Red: a folder. Green: compiled"
    picture.text(WIDTH / 2, 38 + 64 * (top + 1), caption, size=11)
    return picture.whole()


def width_of(name: str) -> float:
    return BEND if "@" in name else 26 + 7.8 * len(shown(name))


def spread(row: list[str]) -> list[tuple[str, float]]:
    """Where the boxes and lines of a floor stand: with the same gap between all of them."""
    gap = (WIDTH - sum(map(width_of, row))) / (len(row) + 1)
    found, x = [], 0.0
    for name in row:
        x += gap + width_of(name)
        found.append((name, x - width_of(name) / 2))
    return found


def is_folder(room: str) -> bool:
    return (PACKAGE / room).is_dir()


def shown(room: str) -> str:
    return f"{room}/" if is_folder(room) else room


def packages_table() -> str:
    """Each room from the top down: what lives there, and what it imports."""
    rooms = imports()
    levels = floors(rooms)
    lines = ["| package or module | what lives there | what must not | imports |", "|---|---|---|---|"]
    for room in sorted(rooms, key=lambda room: (-levels[room], room)):
        lives, must_not = told(room)
        others = ", ".join(f"`{other}`" for other in sorted(rooms[room], key=lambda other: (-levels[other], other)))
        lines.append(f"| `{shown(room)}` | {lives} | {must_not} | {others or '-'} |")
    return "\n".join([*lines, ""])


def modules_table() -> str:
    """The modules of each package but the public ones, from the top down: what each does."""
    levels = floors(imports())
    packages = [path.parent for path in PACKAGE.glob("*/__init__.py") if path.parent.name not in ("testing", "tools")]
    lines = ["| module | what it does |", "|---|---|"]
    for package in sorted(packages, key=lambda path: (-levels[path.name], path.name)):
        for path in sorted(package.rglob("*.py")):
            if path.stem != "__init__":
                text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                name = path.relative_to(PACKAGE).with_suffix("").as_posix()
                lines.append(f"| `{name}` | {first_sentence(text)} |")
    return "\n".join([*lines, ""])


def first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) ", " ".join(text.split()))[0]


def told(room: str) -> tuple[str, str]:
    """What the docstring of a room says: what lives there and what must not, or else its first sentence."""
    if room == "_core":
        text = (PACKAGE / "_core.pyx").read_text(encoding="utf-8").split('"""')[1]
    else:
        path = PACKAGE / room / "__init__.py" if is_folder(room) else PACKAGE / f"{room}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = " ".join(text.split())
    found = re.search(r"What lives here: (.*?)\.? What must not: (.*?)\.(?: |$)", text)
    if found is None:
        return first_sentence(text), "-"
    return sentence(found[1]), sentence(found[2])


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


PICTURE_OF = {
    "life-of-a-save.svg": life_of_a_save,
    "life-of-a-session.svg": life_of_a_session,
    "architecture.svg": architecture,
}


def drawn(page: str) -> str:
    """The page about the architecture with its tables written anew."""
    return MODULES.sub(lambda _: modules_table(), PACKAGES.sub(lambda _: packages_table(), page))


def main(names: Iterable[str] = PICTURE_OF) -> None:
    for name in names:
        (PICTURES / name).write_text(PICTURE_OF[name](), encoding="utf-8")
    ARCHITECTURE.write_text(drawn(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
