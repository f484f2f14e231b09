"""The benchmarks measure what they say, and the command writes what it promises. No time is judged."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from benchmarks.asv import track_workloads
from benchmarks.harness import NOISY, Progress, measure
from benchmarks.rivals.heap import HeapTimers
from benchmarks.workloads import WORKLOADS, Figure, Goal, Pair, Sizes, Workload, caches, lifecycle, measurable, timers
from benchmarks.workloads.stored import SECOND, BenchClock, NoStore, Server, running, small_data

import cagey_sessions
from benchmarks import test_workloads

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cagey_sessions.__file__).resolve().parents[1])}


def test_benchmarks_can_be_imported_where_no_cache_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        assert importlib.reload(caches).WORKLOADS == ()
    finally:
        monkeypatch.undo()
        importlib.reload(caches)


TINY = Sizes(many=1_000, most=2_000)


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def show(self, row: str, round_: int, rounds: int) -> None:
        pass


IN_THIS_PROCESS = [workload for workload in WORKLOADS if workload.unit != "B" and not workload.id.startswith("gc")]
THE_ISSUE = """find_hot find_1e6 create identify destroy emit_none bag_get bag_set bytes timer_schedule timer_refresh
timer_cancel timer_expire tick_idle save_overhead save_total save_clean lag herd cascade down_memory gc"""


def as_tuple(costs: Any) -> tuple[float, ...]:
    return costs if isinstance(costs, tuple) else (costs,)


@pytest.mark.keeps_files  # theine makes an event loop when it is imported
@pytest.mark.parametrize("workload", IN_THIS_PROCESS, ids=lambda w: w.id)
def test_each_workload_runs_both_sides_and_fills_its_rows(workload):
    if not measurable(workload):
        # the engines, the caches compared with and /proc are what these rows measure: none can stand in for them
        pytest.skip(f"needs {workload.needs}")
    with workload.prepare(TINY) as pair:
        for side in (pair.ours, pair.base):
            costs = as_tuple(side())
            assert len(costs) == len(workload.figures)
            for figure, cost in zip(workload.figures, costs, strict=True):
                assert cost > 0 or (
                    side is pair.ours and figure.id.endswith("_rate")
                )  # nobody may be due in so short a time


def test_every_row_of_the_issue_is_there_and_every_id_is_another():
    ids = [figure.id for workload in WORKLOADS for figure in workload.figures]
    assert len(set(ids)) == len(ids)
    assert set(THE_ISSUE.split()) <= set(ids)
    assert all(workload.rounds >= 9 for workload in IN_THIS_PROCESS if workload not in LAG)


def test_the_events_that_a_row_takes_out_are_those_of_the_cycle_it_runs():
    """created, started, identified; before_destroy and destroy."""
    *_, found = lifecycle.kinds_of(muted=True)
    assert found == 5


async def test_a_session_without_events_lives_and_ends_like_any_other():
    manager = cagey_sessions.SessionManager()
    beginnings, endings = manager._beginnings, manager._endings
    beginnings.__class__, endings.__class__, _ = lifecycle.kinds_of(muted=True)
    heard = []
    manager.on("created", heard.append)
    session = await beginnings.create("k", False)
    await beginnings.start(session)
    await beginnings.set_user(session, 1, {})
    assert manager.find_by_key("k") is session
    await endings.end(session, None)
    assert not session.alive
    assert heard == []
    await manager.destroy()


async def test_the_clock_of_the_benchmarks_stands_until_it_is_set_going():
    clock, rung = BenchClock(), asyncio.Event()
    now = clock.now()
    clock.call_later(SECOND, rung.set, copy_context())
    await asyncio.sleep(0.005)
    assert clock.now() == now
    clock.go_on(now + SECOND - 1)
    await asyncio.wait_for(rung.wait(), 1)
    clock.stop()
    assert now + SECOND <= clock.now() < now + 2 * SECOND
    assert not clock.timers


def test_what_is_saved_in_a_save_row_is_a_change_each_time():
    """Else the rows would measure how fast nothing is saved."""
    store = NoStore()
    written = []

    async def save_many(records: Any) -> Any:
        written.extend(records)
        return [store.saved] * len(records)

    store.save_many = save_many
    with running(lambda: Server(60 * SECOND, store=store), 300, small_data) as (server, runner):
        runner.run(server.save_all())
        assert len(written) == 300
        tick = server.parts.autosave.now_tick() + 1
        server.arm([tick] * 300, 1)
        runner.run(server.save_all())
        assert len(written) == 600
        assert server.table.counters.failed == 0


def test_each_round_touches_timers_that_were_left_alone_for_longest():
    population = timers.Population(list(range(1000)))
    seen = []
    for _ in range(timers.TOUCHED):
        seen += population.take()
        population.give([-1] * population.size)
    assert sorted(seen) == list(range(1000))
    assert seen != sorted(seen)
    assert population.take() == [-1] * population.size


def test_asyncio_clears_its_heap_when_it_is_asked_to():
    armed = timers.ArmedLoop("asyncio", 1000)
    armed.take_back(armed.population.take())
    assert len(armed.loop._scheduled) == 1000
    armed.clear()
    assert len(armed.loop._scheduled) == 950
    armed.close()


@pytest.mark.parametrize("kind", [timers.Coming, timers.ComingLoop])
def test_a_tenth_comes_due_and_as_many_are_armed_again(kind):
    coming = kind("ours" if kind is timers.Coming else "asyncio", 1000)
    for _ in range(2 * timers.PARTS):
        assert coming.expire() > 0
        armed = coming.wheel if kind is timers.Coming else coming.loop._scheduled
        assert len(armed) == 1000
    coming.close()


def test_heap_timers_are_a_rival_that_works():
    heap = HeapTimers()
    first, second, third = heap.schedule(5), heap.schedule(3), heap.schedule(4)
    heap.refresh(second, 9)
    heap.cancel(third)
    assert heap.advance(8, 10) == [first]
    assert heap.advance(9, 10) == [second]
    assert len(heap) == 0


LAG = [workload for workload in WORKLOADS if workload.unit == "ms" and workload.collector]


def fake(ours: Any, base: Any, goal: Goal) -> Workload:
    """A workload whose sides cost what two lists say."""
    costs = (iter(ours), iter(base))
    pair = Pair(lambda: next(costs[0]), lambda: next(costs[1]))
    return Workload("fake", lambda sizes: nullcontext(pair), goal, lambda sizes: "", warm_ups=0)


@pytest.mark.parametrize(
    ("goal", "ratio", "holds"),
    [
        (Goal(ratio=2), 2.0, True),
        (Goal(ratio=1.9), 2.0, False),
        (Goal(faster=0.5), 0.5, True),
        (Goal(faster=0.6), 0.5, False),
        (Goal(ours=20, ratio=2), 2.0, True),
        (Goal(ours=19, ratio=2), 2.0, False),
        (Goal(at_least=20), 2.0, True),
        (Goal(at_least=21), 2.0, False),
    ],
)
def test_a_row_is_judged_by_the_median_of_its_rounds(goal, ratio, holds):
    [row] = measure(fake([20] * 8 + [500], [10] * 9, goal), TINY, Silent())
    assert (row.ours, row.base, row.ratio, row.holds) == (20, 10, ratio, holds)
    assert row.spread == 0


def test_a_noisy_row_is_run_again_and_then_not_judged():
    noisy, calm = [10, 20, 30] * 3, [20] * 9
    [again] = measure(fake(noisy + calm, [10] * 18, Goal(ratio=1)), TINY, Silent())
    assert again.holds is False
    [still] = measure(fake(noisy + noisy, [10] * 18, Goal(ratio=1)), TINY, Silent())
    assert still.holds is None
    assert still.verdict == "noisy"
    assert still.spread > NOISY


def test_only_the_noisy_rows_of_a_workload_are_taken_from_the_second_run():
    noisy, calm = [10.0, 20.0, 30.0] * 3, [20.0] * 9
    ours = iter([*zip(calm, noisy, strict=True), *zip(noisy, calm, strict=True)])
    pair = Pair(lambda: next(ours), lambda: (10.0, 10.0))
    other = Figure("other", Goal(ratio=2), lambda sizes: "")
    workload = Workload(
        "one", lambda sizes: nullcontext(pair), Goal(ratio=2), lambda sizes: "", warm_ups=0, more=(other,)
    )
    assert [row.holds for row in measure(workload, TINY, Silent())] == [True, True]


def test_a_row_about_lag_is_judged_by_what_is_added():
    [row] = measure(fake([1.5] * 9, [0.8, 1.0, 0.9] * 3, Goal(added=1)), TINY, Silent())
    assert row.holds is True
    assert "added 0.60" in row.note
    assert str(row.goal) == "<= 1 added"
    [row] = measure(fake([3.0] * 9, [0.8, 1.0, 0.9] * 3, Goal(added=1)), TINY, Silent())
    assert row.holds is False
    [row] = measure(fake([1.5] * 18, [0.1, 0.2, 1.0] * 6, Goal(added=1)), TINY, Silent())
    assert row.verdict == "noisy"


def test_a_row_without_a_goal_is_reported_and_run_once():
    [row] = measure(fake([10, 20, 30] * 3, [10] * 9, Goal()), TINY, Silent())
    assert (row.holds, row.verdict, row.goal) == (None, "reported", "")


def test_a_workload_may_fill_several_rows():
    pair = Pair(lambda: (4.0, 9.0), lambda: (2.0, 3.0))
    other = Figure("other", Goal(ratio=2), lambda sizes: "", "ms")
    workload = Workload("one", lambda sizes: nullcontext(pair), Goal(ratio=2), lambda sizes: "", more=(other,))
    rows = measure(workload, TINY, Silent())
    assert [(row.id, row.ratio, row.holds, row.unit) for row in rows] == [
        ("one", 2.0, True, "ns"),
        ("other", 3.0, False, "ms"),
    ]


@pytest.mark.parametrize("collector", [True, False])
def test_the_collector_is_on_where_a_row_says_so_and_off_elsewhere(collector):
    seen = []

    def look() -> float:
        seen.append(gc.isenabled())
        return 1.0

    pair = Pair(look, look)
    workload = Workload("gc", lambda sizes: nullcontext(pair), Goal(), lambda sizes: "", collector=collector)
    measure(workload, TINY, Silent())
    assert set(seen) == {collector}
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("only", "rows"),
    [("tick_idle_growth", ["tick_idle_growth"]), ("timer_cancel_heapq,bag_get", ["bag_get", "timer_cancel_heapq"])],
)
def test_a_row_that_comes_with_others_can_be_asked_for_alone(tmp_path, only, rows):
    file = tmp_path / "rows.json"
    run_benchmarks("--quick", "--size", "2000", "--only", only, "--json", str(file))
    assert [row["id"] for row in json.loads(file.read_text())["rows"]] == rows


def test_the_adapters_have_every_workload_that_can_be_measured():
    ids = {workload.id for workload in WORKLOADS if measurable(workload)}
    assert {name.removeprefix("track_") for name in vars(track_workloads) if name.startswith("track_")} == ids
    [workloads, _] = test_workloads.test_workload.pytestmark
    assert {workload.id for workload in workloads.args[1]} == ids
    assert track_workloads.track_bag_get("bag_get", "base") > 0


@pytest.mark.keeps_files  # matplotlib keeps the files of its fonts
def test_the_pictures_and_tables_show_what_the_files_say(tmp_path):
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("benchmarks.plots")
    done = run_benchmarks("--size", "2000", "--only", "bag_get,tick_idle", "--json", str(tmp_path / "results.json"))
    assert done.returncode in (0, 1), done.stderr
    (tmp_path / "growth-100.json").write_text((tmp_path / "results.json").read_text())
    figures = plots.Figures(tmp_path, 2000)
    assert list(figures.growth) == [100, 2000]
    for draw in (plots.draw_growth, plots.draw_lag, plots.draw_bytes, plots.draw_rivals, plots.draw_stores):
        draw(figures)
    assert len(list(tmp_path.glob("*.svg"))) == 5
    shown = plots.block(figures, "bag_.* tick_idle_growth")
    assert "| `bag_get` |" in shown
    assert "| `tick_idle_growth` |" in shown
    assert "`tick_idle`" not in shown
    assert f"{figures.machine}; `python -m benchmarks --size 2000 " in shown
    figures.rows = {"bytes": {"ours": 200.0, "unit": "B"}, "sqlite_batch": {"ours": 10_000.0}}
    sizes = plots.block(figures, "sizing").splitlines()
    assert sizes[0] == "| users | 10,000 | 100,000 | 1,000,000 |"
    assert sizes[2].endswith("| 333 | 3,333 | 33,333 |")
    assert sizes[3].endswith("200 B each (`bytes`) | 2.0 MB | 20.0 MB | 200.0 MB |")
    assert sizes[4].startswith("| SQLite, 100,000 rows a second")
    assert sizes[4].endswith("| 0.33%; 0.1 s | 3.3%; 1 s | 33%; 10 s |")
    short = plots.block(figures, "short").strip().splitlines()
    assert short[0] == "- An idle session takes 200 B besides its data ([`bytes`](#memory))."
    assert short[1] == "", "nothing is said of rows that were not run"


def test_without_any_cache_installed_the_other_rows_are_there():
    names = ["cachebox", "cachetools", "moka_py", "theine"]
    code = f"import sys; sys.modules.update(dict.fromkeys({names}))\nimport benchmarks.workloads as found\n"
    code += "print(len(found.WORKLOADS), [row.id for row in found.WORKLOADS if 'cache' in row.id])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    count, _, caches = done.stdout.strip().partition(" ")
    assert int(count) > 20
    assert caches == "[]"


def run_benchmarks(*arguments: str, module: str = "benchmarks") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_the_command_prints_a_table_and_writes_rows(tmp_path):
    file = tmp_path / "rows.json"
    done = run_benchmarks("--quick", "--only", "find_hot,create", "--json", str(file))
    assert done.returncode in (0, 1), done.stderr
    written = json.loads(file.read_text())
    assert set(written) == {"machine", "rows"}
    assert [row["id"] for row in written["rows"]] == ["find_hot", "create"]
    for row in written["rows"]:
        assert set(row) == {"id", "ours", "base", "ratio", "spread", "goal", "holds", "unit", "note"}
        assert row["ours"] > 0
        assert row["base"] > 0
        assert row["ratio"] > 0
        assert row["spread"] >= 0
        assert row["holds"] in (True, False, None)
        assert row["unit"] == "ns"
    assert (done.returncode == 1) == any(row["holds"] is False for row in written["rows"])
    assert "find_hot" in done.stdout
    assert re.search(r"^2 rows in \d+ s$", done.stdout, re.MULTILINE)
    assert written["machine"] in done.stdout
    assert "create" in done.stderr


def test_an_unknown_row_is_refused():
    done = run_benchmarks("--only", "find_hto")
    assert done.returncode == 2
    assert "'find_hto'" in done.stderr


# resident memory is read from /proc, which only Linux has; the other rows run on every system
@pytest.mark.skipif(not measurable(next(w for w in WORKLOADS if w.unit == "B")), reason="needs /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    workload = next(w for w in WORKLOADS if w.unit == "B")
    with workload.prepare(Sizes(many=1, most=20_000)) as pair:
        assert pair.ours() > 0
        assert pair.base() > 0


def test_the_shape_of_calls_and_sources_is_counted_and_compared(tmp_path):
    file = tmp_path / "shape.json"
    done = run_benchmarks("--json", str(file), module="benchmarks.shape")
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    calls, sources = written["calls"], written["sources"]
    assert {"login", "persist_now", "destroy", "listener: persist_now", "listener: destroy"} < set(calls)
    for name, row in calls.items():
        for figure in ("calls", "modules", "changes of module", "changes of package"):
            assert row[figure] >= row[f"{figure}, no stores"] > 0, f"{name}: {figure}"
        assert row["calls"] > row["changes of module"] >= row["changes of package"]
        assert name in done.stdout
    assert all(count > 0 for count in sources["lines"].values())
    assert sources["lines"]["all"] > sources["lines"]["outside stores"]
    assert all(
        row["number"] > 0 and row["arrows"] > 0 and row["floors"] > 0 for row in sources.values() if "arrows" in row
    )

    written["calls"]["login"]["calls"] += 7
    del written["calls"]["destroy"]
    file.write_text(json.dumps(written))
    done = run_benchmarks("--against", str(file), module="benchmarks.shape")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +before +now +change$", done.stdout, re.MULTILINE)
    assert re.search(r"^login: calls +(\d+) +\d+ +-\d+$", done.stdout, re.MULTILINE)
    assert re.search(r"^destroy: calls +- +\d+$", done.stdout, re.MULTILINE)
