"""Async tests run on asyncio and on uvloop; each must leave nothing of ours behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import pytest
import pytest_timeout

from cagey_sessions import SessionManager, UserDataWarning
from cagey_sessions._core import living
from cagey_sessions.testing.plugin import cagey_world  # noqa: F401 - as pytest finds it where the package is installed
from support import Db, ManualClock, ScriptedStore, descriptors, end_of_threads, threads_of_ours
from support.cluster import Cluster


def _eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as in the background of a shell: the programs that tests interrupt would inherit it, and never end
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOOPS = {"asyncio": asyncio.new_event_loop}
if sys.platform != "win32":  # uvloop is not made for it
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop
    uvloop.new_event_loop().close()  # the first one opens a descriptor that all later ones share
    resource_tracker.ensure_running()  # so does the first process that is spawned
if sys.version_info >= (3, 12):
    LOOPS["eager"] = _eager_loop


PATIENCE = float(os.environ.get("PYTEST_TIMEOUT", "120")) / 2
"""Seconds that a test may take on a loop: half of what pytest gives it, so that it fails alone."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if inspect.iscoroutinefunction(metafunc.function):
        # a class may name its `loops`, where a sister of it runs on the others
        metafunc.fixturenames.append("loop_kind")
        metafunc.parametrize("loop_kind", getattr(metafunc.cls, "loops", None) or list(LOOPS))


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool | None:
    """No clock fails a random test in the middle of an example, as it does elsewhere.

    Hypothesis would take that for what the example does, try it again and, since it passes then, report that the data
    depends on something else than chance. One that hangs ends the process, and says where, after ten times as long.
    """
    if item.get_closest_marker("hypothesis") is None or settings.method == "thread":
        return None
    patient = settings._replace(method="thread", timeout=10 * settings.timeout)
    return bool(pytest_timeout.pytest_timeout_set_timer(item, patient))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run(pyfuncitem.obj(**arguments), pyfuncitem.callspec.params["loop_kind"])
    return True


def run(test: Any, loop_kind: str = "asyncio") -> Any:
    """Run a test on a loop of its own; whatever nobody observed, or of ours is left, fails it."""
    unobserved: list[str] = []

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: unobserved.append(f"{context['message']}: {context.get('exception')!r}")
        )
        async with asyncio.timeout(PATIENCE):
            result = await test
        for _ in range(5):
            await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task.get_name().startswith("cagey-sessions")]
        assert not left, f"tasks left behind: {left}"
        return result

    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        result = runner.run(main())
        gc.collect()
    assert not unobserved, unobserved
    return result


@pytest.fixture(autouse=True, scope="module")
def _collections_are_short() -> None:
    """Each test ends with a collection, which need not walk all that thousands of tests before it have left alive."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_of_the_core_stays(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """On a debug build, which counts them: a test leaves no session, table, counters or walk more than it found."""
    before = living()
    yield
    if living() != before:
        caplog.get_records("call").clear()  # they keep what they speak of, and pytest keeps what fixtures gave
        request.node.funcargs.clear()
        gc.collect()
    left = {name: count - before[name] for name, count in living().items() if count > before[name]}
    assert not left, f"objects of the core left behind: {left}"


@pytest.fixture(autouse=True)
def _no_thread_and_no_file_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves no thread of ours, no descriptor and, but where the machine goes down, no temporary file."""
    threads, before = threads_of_ours(), descriptors()
    yield
    end_of_threads(threads)
    left = {number: what for number, what in descriptors().items() if before.get(number) != what}
    if left:
        gc.collect()
        left = {number: what for number, what in descriptors().items() if before.get(number) != what}
    assert not left or request.node.get_closest_marker("keeps_files"), f"descriptors left open: {left}"
    folder = request.node.funcargs.get("tmp_path")
    if folder is not None and request.node.get_closest_marker("crashes") is None:
        assert not [*folder.rglob("*.tmp")], "temporary files left behind"


@pytest.fixture(autouse=True)
def _same_chances_each_time() -> None:
    """Deadlines are spread at random; CAGEY_TEST_SEED tries another spread."""
    random.seed(int(os.environ.get("CAGEY_TEST_SEED", "1")))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(start=1_000_000_000_000)


@pytest.fixture
def db(clock: ManualClock) -> Db:
    return Db(clock)


@pytest.fixture
def store(clock: ManualClock) -> ScriptedStore:
    return ScriptedStore(clock)


@pytest.fixture
def manager(clock: ManualClock, store: ScriptedStore) -> SessionManager:
    """A manager on the hand-turned clock, and on the store of the test's module if it has one of its own."""
    return SessionManager(store=store, clock=clock)


@pytest.fixture
def make_manager(clock: ManualClock, db: Db) -> Any:
    """A manager on the hand-turned clock whose users are saved to `db`."""

    def make(**options: Any) -> SessionManager:
        options.setdefault("interval", "30s")
        manager = SessionManager(clock=clock, **options)
        manager.on("persist_user_data", db.save)
        return manager

    return make


@pytest.fixture
def said() -> Any:
    """The texts of the warnings of a test, in place of the errors they are otherwise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def texts() -> list[str]:
            assert all(warning.category is UserDataWarning for warning in caught), [str(w.message) for w in caught]
            return [str(warning.message) for warning in caught]

        yield texts


@pytest.fixture
def cluster(clock, tmp_path):
    return Cluster(clock, tmp_path / "spill")
