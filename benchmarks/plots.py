"""`python -m benchmarks.plots docs/plots [SIZE]`. What lives here: pictures of figures, and their tables in the pages.
What must not: measuring, and any figure that is not in a file written by `python -m benchmarks --json`.

The folder holds ``results.json``, a whole run (with ``--size SIZE``, if that was not a million), and ``growth-N.json``,
runs with ``--size N``. The pictures go beside them, and the tables into the pages named
below: what stands there between ``<!-- figures: NAME -->`` and ``<!-- end -->`` is written anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

Rows: TypeAlias = dict[str, dict[str, Any]]

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("performance.md", "gc-and-memory.md", "stores.md", "operations.md")
MILLION = 1_000_000
GROWTH = {
    "find_1e6": "find_by_key",
    "timer_schedule": "arm a timer",
    "timer_refresh": "put it off",
    "timer_cancel": "cancel it",
    "timer_expire": "have it come due",
    "tick_idle": "a tick, nothing due",
}
LAG = {"lag_p50": "p50", "lag": "p99", "lag_p999": "p99.9", "lag_max": "longest"}
CACHES = ("cachebox", "cachetools", "moka_py", "theine")
OURS, BASE, OTHER = "#1b6ca8", "#c8553d", ("#e0a458", "#7d8597", "#588157")

STYLE = {
    "svg.hashsalt": "cagey-sessions",  # the same figures give the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


class Figures:
    """What the files of a folder say."""

    def __init__(self, folder: Path, size: int = MILLION) -> None:
        self.folder = folder
        self.size = size
        results = json.loads((folder / "results.json").read_text())
        self.machine: str = results["machine"]
        self.rows: Rows = {row["id"]: row for row in results["rows"]}
        self.growth: dict[int, Rows] = {}
        for file in sorted(folder.glob("growth-*.json")):
            smaller = int(file.stem.partition("-")[2])
            self.growth[smaller] = {row["id"]: row for row in json.loads(file.read_text())["rows"]}
        self.growth[size] = self.rows

    def caption(self, more: Sequence[str] = ()) -> str:
        size = "" if self.size == MILLION else f" --size {self.size}"
        command = f"`python -m benchmarks{size} --json docs/plots/results.json`"
        return f"<sub>{'; '.join([self.machine, command, *more])}</sub>"


def save(figures: Figures, figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(figures.folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_growth(figures: Figures) -> None:
    shown = [row for row in GROWTH if sum(row in rows for rows in figures.growth.values()) > 1]
    figure, grid = pyplot.subplots(2, 3, figsize=(9, 5.4), sharex=True)
    for axes, row in zip(grid.flat, shown, strict=False):
        sizes = [size for size in sorted(figures.growth) if row in figures.growth[size]]
        rival = "dict" if row == "find_1e6" else "asyncio"
        for side, colour, label in (("base", BASE, rival), ("ours", OURS, "ours")):
            costs = [figures.growth[size][row][side] for size in sizes]
            axes.loglog(sizes, costs, "o-", color=colour, label=label, markersize=4)
        uvloop = [figures.growth[size].get(f"{row}_uvloop") for size in sizes]
        if all(uvloop):
            axes.loglog(sizes, [other["base"] for other in uvloop if other], "o--", color=OTHER[0], label="uvloop")
            axes.lines[-1].set_markersize(4)
        axes.set_title(GROWTH[row], loc="left")
        axes.set_ylim(10, 20_000)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("sessions or timers")
    for axes in grid[:, 0]:
        axes.set_ylabel("ns of CPU for one")
    save(figures, figure, "growth")


def draw_lag(figures: Figures) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    rows = [row for row in LAG if row in figures.rows]
    for side, colour, shift, label in (("base", "#9aa5b1", -0.2, "nothing due"), ("ours", OURS, 0.2, "33,333 saves/s")):
        values = [figures.rows[row][side] for row in rows]
        bars = axes.bar([place + shift for place in range(len(rows))], values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(rows)), [LAG[row] for row in rows])
    axes.set_ylabel("lag of a 1 ms ticker, ms")
    axes.legend()
    save(figures, figure, "lag")


def draw_bytes(figures: Figures) -> None:
    rows, bars = figures.rows, []
    if "bytes" in rows:
        bars += [("session", rows["bytes"]["ours"], OURS), ("session, port", rows["bytes"]["base"], BASE)]
    if "timer_bytes" in rows:
        bars += [("timer", rows["timer_bytes"]["ours"], OURS), ("timer, asyncio", rows["timer_bytes"]["base"], BASE)]
    if "timer_bytes_uvloop" in rows:
        bars.append(("timer, uvloop", rows["timer_bytes_uvloop"]["base"], OTHER[0]))
    figure, axes = pyplot.subplots(figsize=(6, 2.6))
    drawn = axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=[bar[2] for bar in bars])
    axes.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bytes of resident memory for one")
    save(figures, figure, "bytes")


def draw_rivals(figures: Figures) -> None:
    figure, grid = pyplot.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    rivals = [rival for rival in CACHES if rival in figures.rows]
    for axes, (suffix, title) in zip(grid, (("", "put"), ("_get", "get"), ("_expire", "end / expire")), strict=True):
        names = ["a session", *rivals]
        costs = [figures.rows[rivals[0] + suffix]["ours"]] if rivals else []
        costs += [figures.rows[rival + suffix]["base"] for rival in rivals]
        drawn = axes.barh(names, costs, color=[OURS, *["#9aa5b1"] * len(rivals)])
        axes.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(10, 30_000)
        axes.set_title(title, loc="left")
        axes.set_xlabel("ns of CPU for one")
    grid[0].invert_yaxis()
    save(figures, figure, "rivals")


def draw_stores(figures: Figures) -> None:
    """Users a second on one connection, in batches of 200; log scale, for single rows are far below."""
    rows = figures.rows
    bars = (
        ("ours, a batch", OURS, [(row, "ours") for row in ENGINES.values()]),
        (
            "by hand, a batch",
            BASE,
            [("sqlite_batch_bare", "base"), ("pg_batch_bare", "base"), ("redis_batch_wall", "base")],
        ),
        ("ours, one by one", OTHER[1], [("sqlite_batch", "base"), ("pg_batch", "base")]),
    )
    figure, axes = pyplot.subplots(figsize=(8.4, 3.4))
    for number, (label, colour, sources) in enumerate(bars):
        rates = [1e9 / rows[row][side] if row in rows else nan for row, side in sources]
        places = [place + number * 0.27 for place in range(len(rates))]
        shown = axes.bar(places, rates, 0.25, color=colour, label=label)
        axes.bar_label(shown, [f"{rate:,.0f}" for rate in rates], size=7)
    axes.set_xticks([place + 0.27 for place in range(len(ENGINES))], list(ENGINES))
    axes.set_yscale("log")
    axes.set_ylim(bottom=1000)
    axes.set_ylabel("users a second")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figures, figure, "stores")


def amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def verdict(row: dict[str, Any]) -> str:
    if not row["goal"]:
        return "reported"
    return {True: "holds", False: "**missed**", None: "noisy"}[row["holds"]]


def table(figures: Figures, ids: Sequence[str]) -> str:
    lines = ["| row | ours | base | ratio | spread | goal | verdict | what |", "|---|--:|--:|--:|--:|---|---|---|"]
    for row in (figures.rows[name] for name in ids if name in figures.rows):
        ratio = f"{row['ratio']:.2f}x faster" if "x faster" in row["goal"] else f"{row['ratio']:.2f}"
        lines.append(
            f"| `{row['id']}` | {amount(row['ours'], row['unit'])} | {amount(row['base'], row['unit'])} | {ratio} "
            f"| {row['spread']:.0%} | {row['goal'] or 'none'} | {verdict(row)} | {row['note']} |"
        )
    return "\n".join(lines)


SIZES = (10_000, 100_000, MILLION)
INTERVAL = 30
"""Seconds, the default of a manager."""
ENGINES = {"SQLite": "sqlite_batch", "PostgreSQL": "pg_batch", "Redis": "redis_batch_wall"}


def percent(share: float) -> str:
    return f"{share * 100:.2g}%"


def sizing(figures: Figures) -> str:
    """What so many users take, by the figures of one; every user changes in each interval."""
    lines = ["| users | " + " | ".join(f"{users:,}" for users in SIZES) + " |", "|---|" + "--:|" * len(SIZES)]

    def line(what: str, values: Sequence[str]) -> None:
        lines.append(f"| {what} | {' | '.join(values)} |")

    def one(row: str) -> float | None:
        return figures.rows[row]["ours"] if row in figures.rows else None

    rates = [users / INTERVAL for users in SIZES]
    line(f"saves a second, users / {INTERVAL} s", [f"{rate:,.0f}" for rate in rates])
    if size := one("bytes"):
        line(f"sessions in memory, {size:.0f} B each (`bytes`)", [f"{size * users / 1e6:,.1f} MB" for users in SIZES])
    if (cost := one("save_total")) and (skip := one("save_clean")):
        line(f"of one core, {cost / 1000:.1f} µs a save (`save_total`)", [percent(rate * cost / 1e9) for rate in rates])
        what = f'of one core, nobody changes, `tracking="marked"`, {skip:.0f} ns (`save_clean`)'
        line(what, [percent(rate * skip / 1e9) for rate in rates])
    if most := one("herd_drain"):
        what = f"all at once, if the store took it, {most:,.0f} a second (`herd_drain`)"
        line(what, [f"{users / most:.2g} s" for users in SIZES])
    if full := one("gc"):
        what = f"a full pass of the collector, {full:,.0f} ms a million (`gc`)"
        line(what, [f"{full * users / MILLION:,.0f} ms" for users in SIZES])
    for engine, row in ENGINES.items():
        if each := one(row):
            what = f"{engine}, {1e9 / each:,.0f} rows a second (`{row}`): busy; and for everybody's last save"
            line(
                what, [f"{percent(r * each / 1e9)}; {n * each / 1e9:.2g} s" for r, n in zip(rates, SIZES, strict=True)]
            )
    return "\n".join(lines)


def short(figures: Figures) -> str:
    """The answers that most readers come for, of the rows that were run."""
    rows, lines = figures.rows, []

    def cost(row: str, side: str = "ours") -> str:
        return amount(rows[row][side], rows[row]["unit"])

    if "bytes" in rows:
        lines.append(f"An idle session takes {cost('bytes')} besides its data ([`bytes`](#memory)).")
    if "save_total" in rows:
        share = percent(MILLION / INTERVAL * rows["save_total"]["ours"] / 1e9)
        lines.append(
            f"A save takes {cost('save_total')} of the event loop, encoding included ([`save_total`](#saves)): for a "
            f"million users {share} of a core."
        )
    if "lag" in rows:
        lines.append(
            f"The p99 lag of the loop is {cost('lag')} while {MILLION / INTERVAL:,.0f} users a second are saved to a "
            f"store that does nothing, and {cost('lag', 'base')} in an idle loop ([`lag`](#lag))."
        )
    if all(row in rows for row in ENGINES.values()):
        rates = [f"{1e9 / rows[row]['ours']:,.0f} to {engine}" for engine, row in ENGINES.items()]
        lines.append(f"Users written a second on one connection: {', '.join(rates)} ([stores](#stores)).")
    if "gc" in rows:
        lines.append(
            f"A full pass of Python's collector over a million sessions stops everything for {cost('gc')}, unless they "
            "are [frozen](gc-and-memory.md)."
        )
    return "\n".join(f"- {line}" for line in lines)


PICTURES = {
    "growth": "CPU time of an operation among 10,000, 100,000 and 1,000,000 sessions or timers",
    "lag": "Lag of a 1 ms ticker in an idle loop, and in one that saves",
    "stores": "Users written a second, in batches and one by one",
    "bytes": "Resident memory of a session and of a timer",
    "rivals": "CPU time of a session beside that of an entry of a cache",
}
"""What each shows, for whoever cannot see it."""
BLOCK = re.compile(r"(<!-- figures: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def block(figures: Figures, what: str) -> str:
    """The contents of one block: a picture, or the table of the rows whose ids match."""
    names = what.split()
    if names[0] == "plot":
        others = [f"`growth-{size}.json` with `--size {size}`" for size in figures.growth if size != figures.size]
        caption = figures.caption(others if names[1] == "growth" else ())
        return f"![{PICTURES[names[1]]}](plots/{names[1]}.svg)\n\n{caption}\n"
    if names[0] == "short":
        return f"\n{short(figures)}\n\n{figures.caption()}\n"
    if names[0] == "sizing":
        return f"{sizing(figures)}\n\n{figures.caption()}\n"
    ids = [row for name in names for row in figures.rows if re.fullmatch(name, row)]
    return f"{table(figures, list(dict.fromkeys(ids)))}\n\n{figures.caption()}\n"


def main(folder: Path, size: int = MILLION) -> None:
    figures = Figures(folder, size)
    with pyplot.rc_context(STYLE):
        for draw in (draw_growth, draw_lag, draw_bytes, draw_rivals, draw_stores):
            draw(figures)
    for page in PAGES:
        path = DOCS / page
        text = path.read_text()
        path.write_text(BLOCK.sub(lambda found: found[1] + block(figures, found[2]) + found[3], text))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
