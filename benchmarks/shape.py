"""How the library is laid out, and how far a call travels in it: ``python -m benchmarks.shape``.

Two kinds of figures. The first are of calls that are really made, on a SQLite store and on a manager whose listener
saves: how many Python functions of the package run, in how many modules, and how often the next function that runs is
in another module or in another package. The second are of the sources: lines, imports, circles and comments.

How calls are counted:

- One for each time that Python enters a function of the package. A coroutine that goes on after it has waited counts
  again. Comprehensions and generator expressions do not count: newer Pythons no longer run them as functions.
- From the call until it returns, the tasks and callbacks that the library runs for it included. Other threads and the
  compiled core are not seen.
- A change is counted when a function belongs to another module, or package, than the one entered before it. Returning
  into a caller is no change. Modules directly in the package count as one package.
- The clock stands still meanwhile, so that no call is cut in two because the machine is slow. Each call is made several
  times, and the most common result is reported.

Nothing here imports anything but the public names of the library, so the script also measures older layouts: run it
with ``PYTHONPATH`` leading to the sources of another checkout, write ``--json FILE`` there, and compare with
``--against FILE``. "No stores" leaves out what lies in ``stores/``: a module that has moved there is
missing on one side of such a comparison only.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib
import importlib.util
import io
import json
import os
import platform
import re
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import cagey_sessions
from cagey_sessions import SessionManager
from cagey_sessions.clock import SystemClock, TimerHandle
from cagey_sessions.stores import Record, SQLiteStore, Verdict

__all__ = ["Figures", "calls", "main", "sources"]

PACKAGE = Path(cagey_sessions.__file__).parent
CORE = [*PACKAGE.glob("_core.pyx"), *PACKAGE.glob("core/*.pxi")]
ROOT = "(root)"
"""The package of modules that lie directly in `cagey_sessions`."""
ASIDE = {"testing", "tools", "cli", "demo"}
"""Folders and modules that no server runs, by their names in the layouts there have been."""
NAMES_ONLY = {"__init__", "__main__", "_version"}
"""Modules directly in the package that only pass names on: they would close a circle through all of it, and are no room
of the picture in docs/architecture.md."""

INTERVAL = 3600
USERS = (50, 200)
"""How many users one tick saves, in one batch: few are taken at one go, and more in several steps."""
WARM_UPS = 2
ROUNDS = 7

Figures: TypeAlias = dict[str, dict[str, int | float]]
"""For each row of the table its figures, by name."""
Graph: TypeAlias = dict[str, set[str]]


# Calls


class _Timer:
    """A wake-up by the clock that stands still; `handle` is the one of the event loop, set again when time is moved."""

    def __init__(self, when: int, callback: Callable[[], None], context: Context) -> None:
        self.when = when
        self.callback = callback
        self.context = context
        self.handle: TimerHandle | None = None
        self.is_over = False

    def run(self) -> None:
        self.is_over = True
        self.callback()

    def cancel(self) -> None:
        self.is_over = True
        if self.handle is not None:
            self.handle.cancel()


class StillClock(SystemClock):
    """The system's clock, standing still until it is moved. It calls the system's, so that this is counted, too."""

    def __init__(self) -> None:
        self._now = super().now()
        self._timers: list[_Timer] = []

    def now(self) -> int:
        super().now()
        return self._now

    def call_later(self, delay: int, callback: Callable[[], None], context: Context) -> TimerHandle:
        timer = _Timer(self._now + delay, callback, context)
        timer.handle = super().call_later(delay, timer.run, context)
        self._timers.append(timer)
        return timer

    def move(self, delay: int) -> None:
        """Let so many nanoseconds pass at once; what comes due by that runs in the next turn of the loop."""
        self._now += delay
        self._timers = [timer for timer in self._timers if not timer.is_over]
        for timer in self._timers:
            if timer.handle is not None:
                timer.handle.cancel()
            timer.handle = super().call_later(max(0, timer.when - self._now), timer.run, timer.context)


class CountingStore(SQLiteStore):
    """Counts the users saved, and the batches, so that a run can tell whether a save took place."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.saved = 0
        self.batches = 0
        self.has_saved = asyncio.Event()

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        verdicts = await super().save_many(records)
        self.saved += len(records)
        self.batches += 1
        self.has_saved.set()
        return verdicts


class Trace:
    """The modules whose functions were entered, in order, from `begin` to `end`."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._prefix = f"{PACKAGE}{os.sep}"

    def begin(self) -> None:
        self._files.clear()
        sys.setprofile(self._see)

    def end(self) -> list[str]:
        sys.setprofile(None)
        return [module_of(Path(file)) for file in self._files]

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        # as little as can be: whatever is called here takes its time from the call that is measured
        if event == "call":
            code = frame.f_code
            if code.co_filename.startswith(self._prefix) and not code.co_name.endswith(("comp>", "genexpr>")):
                self._files.append(code.co_filename)


def module_of(path: Path) -> str:
    """The dotted name of a module within the package: `stores.memory`, or `stores` for what is in its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    """The package, or the module directly in `cagey_sessions`, that a module belongs to: a room of the picture."""
    return module.split(".")[0]


def package_of(module: str) -> str:
    """The package that a module belongs to; packages within packages are part of those."""
    room = room_of(module)
    return room if (PACKAGE / room).is_dir() else ROOT


def changes(places: Sequence[str]) -> int:
    return sum(before != after for before, after in pairwise(places))


def counted(modules: Sequence[str]) -> dict[str, int]:
    outside = [module for module in modules if room_of(module) != "stores"]
    return {
        f"{figure}{where}": count
        for where, chosen in (("", modules), (", no stores", outside))
        for figure, count in (
            ("calls", len(chosen)),
            ("modules", len(set(chosen))),
            ("changes of module", changes(chosen)),
            ("changes of package", changes([package_of(module) for module in chosen])),
        )
    }


async def quiet() -> None:
    """Wait until what an earlier call has left behind has run, what another thread reports included."""
    for _ in range(3):
        await asyncio.sleep(0.002)
        for _ in range(10):
            await asyncio.sleep(0)


class Counts:
    """What each call came to, in each round."""

    def __init__(self) -> None:
        self._trace = Trace()
        self._seen: dict[str, list[dict[str, int]]] = {}

    async def count(
        self, name: str, call: Callable[[], Awaitable[object]], just_before: Callable[[], None] | None = None
    ) -> None:
        await quiet()
        if just_before is not None:
            just_before()
        self._trace.begin()
        try:
            await call()
        finally:
            modules = self._trace.end()
        self._seen.setdefault(name, []).append(counted(modules))

    def most_common(self) -> Figures:
        """Without the rounds that only warm up."""
        found: Figures = {}
        for name, seen in self._seen.items():
            rounds = Counter(tuple(counts.items()) for counts in seen[WARM_UPS:])
            [(counts, times)] = rounds.most_common(1)
            found[name] = {**dict(counts), "rounds": rounds.total(), "rounds like this": times}
        return found


@asynccontextmanager
async def managed(store: CountingStore | None, clock: StillClock) -> AsyncIterator[SessionManager]:
    manager = SessionManager(store=store, clock=clock, interval=INTERVAL, persist_on=["disconnect", "shutdown"])
    try:
        yield manager
    finally:
        await manager.destroy()


def check(holds: bool, problem: str) -> None:
    """Figures of a call that did something else would mislead, so there are none then."""
    if not holds:
        raise RuntimeError(f"this is not the call that was to be measured: {problem}")


async def count_store(counts: Counts, folder: Path) -> None:
    """A user whom the store knows comes, is saved, changes again and goes."""
    store = CountingStore(folder / "one.db")
    async with managed(store, StillClock()) as manager:
        for number in range(WARM_UPS + ROUNDS):
            session = await manager.create(f"key{number}")

            async def login(session: Any = session) -> None:
                await session.login("alice", default={"gold": 0})

            await counts.count("login", login)
            session.user_data["gold"] += 1
            saved = store.saved
            await counts.count("persist_now", session.persist_now)
            check(store.saved == saved + 1, "persist_now saved nothing")
            session.user_data["gold"] += 1
            await counts.count("destroy", session.destroy)
            check(store.saved == saved + 2, "destroy saved nothing")
            check(manager.find_by_user("alice") is None, "the session has not ended")


async def count_tick(counts: Counts, file: Path, users: int) -> None:
    """Users who have changed are saved because their time has come.

    For the first time: later, the watch for saves that are overdue comes due in the same moment, and would be counted.
    """
    store, clock = CountingStore(file), StillClock()
    async with managed(store, clock) as manager:
        sessions = [await manager.create(f"key{number}") for number in range(users)]
        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(sessions):
                group.create_task(session.login(f"user{number}", default={"gold": 0}))
        for session in sessions:
            session.user_data["gold"] += 1

        async def saved() -> None:
            await store.has_saved.wait()
            for _ in range(10):  # until those who wait for the batch have heard of it
                await asyncio.sleep(0)

        await counts.count(f"tick, {users} users", saved, lambda: clock.move(INTERVAL * 1_000_000_000))
        check((store.saved, store.batches) == (users, 1), f"{store.saved} users in {store.batches} batches were saved")


async def count_listener(counts: Counts) -> None:
    """The same without a store: a listener of the program saves."""
    saved = 0
    async with managed(None, StillClock()) as manager:

        @manager.on("persist_user_data")
        async def save(session: Any) -> None:
            nonlocal saved
            saved += 1

        for number in range(WARM_UPS + ROUNDS):
            session = await manager.create(f"key{number}")
            await session.set_user("alice", {"gold": number})
            before = saved
            await counts.count("listener: persist_now", session.persist_now)
            check(saved == before + 1, "persist_now called no listener")
            session.user_data["gold"] += 1

            async def destroy(session: Any = session) -> None:
                await session.destroy(persist=True)

            await counts.count("listener: destroy", destroy)
            check(saved == before + 2, "destroy called no listener")


async def count_all() -> Figures:
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        await count_store(counts, Path(folder))
        for users in USERS:
            for number in range(WARM_UPS + ROUNDS):
                await count_tick(counts, Path(folder, f"tick-{users}-{number}.db"), users)
    await count_listener(counts)
    return counts.most_common()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop where it is installed: the counts are the same."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory


def calls() -> Figures:
    """What the calls of a session come to, measured by making them."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(count_all())


# Sources


def home_of(name: str) -> str:
    """The module that a public name of the package comes from, or the package's own `__init__`."""
    there = getattr(getattr(cagey_sessions, name, None), "__module__", None) or ""
    return there.removeprefix("cagey_sessions.") if there.startswith("cagey_sessions.") else "__init__"


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports, anywhere in it, for type checkers too."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("cagey_sessions.")]
            found.update(name.removeprefix("cagey_sessions.") for name in names)
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = [*folder[: len(folder) + 1 - node.level], *parts]
            elif parts[:1] == ["cagey_sessions"]:
                parts = parts[1:]
            else:
                continue
            base = ".".join(parts)
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                found.add(name if name in modules else base or home_of(alias.name))
    return found & modules


def imports() -> Graph:
    """Each module, and the modules that it imports; the compiled core is one."""
    files = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    modules = {*files, "_core"}
    graph = {module: imported(path, modules) - {module} for module, path in files.items()}
    graph["_core"] = {
        name
        for path in CORE
        for name in re.findall(
            r"^from cagey_sessions\.([\w.]+) c?import", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        if name in modules
    }
    return graph


def merged(graph: Graph, part_of: Callable[[str], str]) -> Graph:
    """The graph of the parts that modules belong to."""
    found: Graph = {part_of(module): set() for module in graph}
    for module, others in graph.items():
        found[part_of(module)] |= {part_of(other) for other in others} - {part_of(module)}
    return found


def reachable(graph: Graph) -> Graph:
    """All that each imports, by way of others too."""
    found = {}
    for start in graph:
        seen: set[str] = set()
        ahead = [*graph[start]]
        while ahead:
            place = ahead.pop()
            if place not in seen:
                seen.add(place)
                ahead += graph[place]
        found[start] = seen
    return found


def form(graph: Graph) -> dict[str, int | float]:
    """How many parts and arrows a graph has, circles, parts that lie on one, and floors."""
    below = reachable(graph)
    circle = {place: frozenset({place} | {other for other in below[place] if place in below[other]}) for place in graph}
    level: dict[frozenset[str], int] = {}

    def floor(parts: frozenset[str]) -> int:
        if parts not in level:
            others = {circle[other] for part in parts for other in graph[part]} - {parts}
            level[parts] = 1 + max(map(floor, others), default=0)
        return level[parts]

    circles = {parts for parts in circle.values() if len(parts) > 1}
    return {
        "number": len(graph),
        "arrows": sum(map(len, graph.values())),
        "circles": len(circles),
        "in circles": sum(map(len, circles)),
        "floors": max(map(floor, circle.values())),
    }


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def code_and_comments(path: Path) -> tuple[int, int]:
    """How many lines of a file have code, docstrings aside, and how many have a comment."""
    text = path.read_text(encoding="utf-8")
    code: set[int] = set()
    comments: set[int] = set()
    nothing = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in nothing:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code), len(comments)


def sources() -> Figures:
    """What the sources of the package that is imported look like."""
    paths = sorted(PACKAGE.rglob("*.py"))
    first = {path: room_of(module_of(path)) for path in paths}
    code, comments = map(sum, zip(*map(code_and_comments, paths), strict=True))
    graph = imports()
    inner = {module: others - NAMES_ONLY for module, others in graph.items() if module not in NAMES_ONLY}
    return {
        "lines": {
            "all": lines(paths),
            "outside stores": lines(path for path in paths if first[path] != "stores"),
            "outside stores, testing, tools": lines(path for path in paths if first[path] not in ASIDE | {"stores"}),
            "compiled core": lines(CORE),
            "with code": code,
            "with a comment": comments,
            "comments per 100 of code": round(100 * comments / code, 1),
        },
        "packages": form(merged(inner, package_of)),
        "rooms": form(merged(inner, room_of)),
        "modules": form(graph),
    }


# The command


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def report(found: dict[str, Figures]) -> str:
    """Two tables: of the calls, everything and without the stores; and of the sources."""
    figures = ("calls", "modules", "changes of module", "changes of package")
    rows = [["", *figures, "rounds alike"]]
    for where in ("", ", no stores"):
        for name, row in found["calls"].items():
            alike = f"{row['rounds like this']} of {row['rounds']}"
            rows.append([name + where, *(shown(row[figure + where]) for figure in figures), alike])
    parts = [table(rows)]
    sections = found["sources"]
    parts.append(table([["lines", ""], *([name, shown(value)] for name, value in sections["lines"].items())]))
    graphs = ("packages", "rooms", "modules")
    parts.append(
        table([["imports", *sections["modules"]], *([name, *map(shown, sections[name].values())] for name in graphs)])
    )
    return "\n\n".join(parts)


def compared(before: dict[str, Figures], now: dict[str, Figures]) -> str:
    """Every figure before and now, and what has changed."""
    rows = [["", "before", "now", "change"]]
    for kind in ("calls", "sources"):
        for name in {**before.get(kind, {}), **now[kind]}:
            old, new = before.get(kind, {}).get(name, {}), now[kind].get(name, {})
            for figure in {**old, **new}:
                if figure.startswith("rounds"):
                    continue
                a, b = old.get(figure), new.get(figure)
                change = "" if a is None or b is None else f"{round(b - a, 1):+,}" if a != b else "="
                rows.append([f"{name}: {figure}", shown(a), shown(b), change])
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shape", description="Count the calls and the imports of cagey-sessions."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--against", type=Path, metavar="FILE", help="figures of --json to show beside those of now")
    options = parser.parse_args(arguments)
    before = None if options.against is None else json.loads(options.against.read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "version": cagey_sessions.__version__,
        "python": platform.python_version(),
        "calls": calls(),
        "sources": sources(),
    }
    print(f"cagey-sessions {found['version']}, Python {found['python']}")
    print(report(found) if before is None else compared(before, found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
