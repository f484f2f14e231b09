"""Every operation of the core, as something that can be done over and over: afterwards all is as it was before.

What lives here: one function for each public name of `_core`, and one for each way in which it refuses. What must not:
measuring (`leaks`), and any claim about what an operation does (`tests/core`). It is one list, which is looked through
for a name of `_core` from its beginning to its end, and so it is one module.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cagey_sessions import InvalidUserDataError, Session, UsageError
from cagey_sessions import _core as core
from cagey_sessions.errors import CageySessionsError
from cagey_sessions.stores import Outcome, Record, Verdict

Operation = Callable[["World"], object]
OPERATIONS: dict[str, Operation] = {}
"""By the name of what is called; a variant has its own name behind a colon."""


class Host:
    """Whoever a table belongs to."""


class Broken(Session):
    """A session that cannot be made."""

    def __new__(cls) -> Any:
        super().__new__(cls)
        raise RuntimeError("no session today")


class World:
    """A table with one user in it, kept from one round to the next; what is here must be held as often as before."""

    def __init__(self) -> None:
        self.host = Host()
        self.table = core.SessionTable(Session, self.host, stored=True)
        self.unsaved = core.SessionTable(Session, self.host)
        self.stranger = self.unsaved.create()
        self.broken = core.SessionTable(Broken, self.host)
        self.digest = core.Digest(b"16 bytes of key.")
        self.key = "a key that is nobody else's"
        self.user_id = 10**15 + 7
        self.data = {"gold": [1.5, None, "\u00e9"], "deep": {"er": [True]}}
        self.bag = Host()
        self.body = core.encode_plain(self.data)
        self.session = self.table.create(self.key)
        self.table.identify(self.session, self.user_id, self.data, 0)
        self.session.set("bag", self.bag)
        self.table.own(self.session, 1, 1, 5)
        self.steps = Steps()
        self.called = self.steps.table = core.SessionTable(Session, self.steps)
        self.manager = core.ManagerCore()
        self.manager._attend(self.called)
        self.raw = core.SessionCore.__new__(core.SessionCore)

    def watched(self) -> list[object]:
        """What an operation may hold on to by mistake."""
        errors = [value for value in vars(core).values() if isinstance(value, type) and issubclass(value, Exception)]
        kinds = [core.SessionTable, core.SessionCore, core.OldestFirst, core.Counters, core.Digest, Session, Broken]
        return [*vars(self).values(), self.table.counters, *self.data.values(), *errors, *kinds]

    def flight(self) -> Any:
        self.table.ask(self.session)
        return self.table.take()

    def leave(self, session: Any) -> None:
        self.table.begin_end(session)
        self.table.forget(session)
        session._end("destroyed")


def operation(name: str) -> Callable[[Operation], Operation]:
    def note(call: Operation) -> Operation:
        assert name not in OPERATIONS
        OPERATIONS[name] = call
        return call

    return note


def refused(name: str, call: Operation) -> None:
    """An operation that has to raise."""

    def attempt(world: World) -> None:
        try:
            call(world)
        except (CageySessionsError, RuntimeError, TypeError, ValueError, OverflowError):
            return
        raise AssertionError(f"{name} was not refused")

    operation(name)(attempt)


# Values and digests

operation("is_plain")(lambda world: core.is_plain(world.data))
operation("is_plain: not")(lambda world: core.is_plain({"a": [0, {"b": world.host}]}))
operation("encode_plain")(lambda world: core.encode_plain(world.data))
operation("path_of")(lambda world: core.path_of(["bag", 3, "x" * 100] * 10))
operation("refusal")(lambda world: core.refusal('user_data["bag"]', "no"))
operation("Digest")(lambda world: core.Digest(b"16 bytes of key.")(world.body))
refused("Digest: a short key", lambda world: core.Digest(b"short"))
ITSELF: list[Any] = []
ITSELF.append({"again": ITSELF})
for why, value in {
    "not plain": {"a": [0, {"b": {1, 2}}]},
    "not finite": {"a": [0, {"b": float("nan")}]},
    "too wide": {"a": [0, {"b": 2**64}]},
    "not text": {"a": [0, {"b": "\ud800"}]},
    "a key that is no str": {"a": [0, {5: 1}]},
    "a key that is not text": {"a": [0, {"\udc00": 1}]},
    "inside itself": ITSELF,
}.items():
    refused(f"encode_plain: {why}", lambda world, value=value: core.encode_plain(value))  # type: ignore[misc]
operation("decode_plain")(lambda world: core.decode_plain(world.body))
operation("decode_plain: of another writer")(
    lambda world: core.decode_plain(b'{"a": [1, 0.1000000000000000055511, {}]}')
)
for text in (b"[", b"[18446744073709551616]", b"[0.12345678901234567]", b'{"a":1,"a":2}'):
    refused(f"decode_plain: {text.decode()}", lambda world, text=text: core.decode_plain(text))  # type: ignore[misc]
refused("encode_plain: too large", lambda world: core.encode_plain(world.data, 10))
refused("encode_plain: too large when written", lambda world: core.encode_plain({"a": "\x01" * 50}, 100))


# Keys and ids


operation("check_key")(lambda world: core.check_key(world.key))
refused("check_key: of another type", lambda world: core.check_key(world.user_id))
operation("check_user_id")(lambda world: core.check_user_id(world.key, str))
refused("check_user_id: a lone surrogate", lambda world: core.check_user_id("\ud800"))
operation("living")(lambda world: core.living())


# Sessions


@operation("SessionCore")
def make_a_raw_session(world: World) -> None:
    """And use it: each attempt is refused."""
    raw = core.SessionCore.__new__(core.SessionCore)
    repr(raw)
    with contextlib.suppress(UsageError):
        raw.user_data  # noqa: B018
    raw._listeners = [raw.alive, raw.key, raw.user_id, raw.end_reason]


refused("SessionCore: by hand", lambda world: core.SessionCore())


@operation("SessionCore: a cycle")
def a_cycle(world: World) -> None:
    """Which only the collector can break."""
    session = world.table.create()
    session.set("me", [session])
    world.leave(session)


operation("SessionCore.key")(lambda world: world.session.key)
operation("SessionCore.user_id")(lambda world: world.session.user_id)
operation("SessionCore.end_reason")(lambda world: world.session.end_reason)
operation("SessionCore.alive")(lambda world: world.session.alive)
operation("SessionCore.get")(lambda world: (world.session.get("bag"), world.session.get("nothing", world.host)))
operation("SessionCore._host")(lambda world: world.session._host)
operation("SessionCore._require_alive")(lambda world: world.session._require_alive())
operation("SessionCore._listeners")(lambda world: setattr(world.session, "_listeners", [world.host]))
operation("SessionCore.mark_changed")(lambda world: world.session.mark_changed())
operation("SessionCore.set")(lambda world: world.session.set("name", [world.host]))
refused("SessionCore.set: not by a str", lambda world: world.session.set(world.user_id, world.host))  # type: ignore[arg-type]
refused("SessionCore._host: of a raw one", lambda world: world.raw._host)
refused("SessionCore.__reduce__", lambda world: world.session.__reduce__())


@operation("SessionCore.user_data")
def assign_data(world: World) -> None:
    world.session.user_data = [world.host]
    world.session.user_data = world.data


@operation("SessionCore.user_data: none")
def assign_nothing(world: World) -> None:
    with contextlib.suppress(InvalidUserDataError):
        world.session.user_data = None


@operation("SessionCore._end")
def end(world: World) -> None:
    """With data, listeners and a bag."""
    session = world.table.create("key")
    world.table.identify(session, "user", [world.host], 0, 10)
    session._listeners = [world.host]
    session.set("bag", [world.host])
    world.leave(session)


# The table


@operation("SessionTable")
def make_a_table(world: World) -> None:
    table = core.SessionTable(Session, world.host, seed=1, stored=True)
    for number in range(70 if not core.DEBUG else 3):
        table.identify(table.create(f"key {number}"), number, [world.host], 0, 10)
    table.advance(5, 10)
    table.take()
    table.oldest_first()


operation("SessionTable.reseed")(lambda world: core.SessionTable(Session, world.host).reseed(7))
refused("SessionTable.reseed: with a session", lambda world: world.table.reseed(7))
refused("SessionTable: of no sessions", lambda world: core.SessionTable(Host, world.host))  # type: ignore[arg-type]
refused("SessionTable.__reduce__", lambda world: world.table.__reduce__())
operation("Counters")(lambda world: [getattr(world.table.counters, name) for name in dir(world.table.counters)])
operation("SessionTable.counters")(lambda world: world.table.counters)
operation("SessionTable.host")(lambda world: world.table.host)
operation("SessionTable.armed")(lambda world: world.table.armed)
operation("SessionTable.oldest_save")(lambda world: world.table.oldest_save)
operation("SessionTable.require_thread")(lambda world: world.table.require_thread())
operation("SessionTable.bind_thread")(lambda world: world.table.bind_thread())
operation("SessionTable._check")(lambda world: world.table._check())
operation("SessionTable.find_by_key")(lambda world: (world.table.find_by_key(world.key), world.table.find_by_key("?")))
refused("SessionTable.find_by_key: of another type", lambda world: world.table.find_by_key([]))  # type: ignore[arg-type]
operation("SessionTable.find_by_user")(lambda world: world.table.find_by_user(world.user_id))
refused("SessionTable.find_by_user: of another type", lambda world: world.table.find_by_user(1.0))  # type: ignore[arg-type]
operation("SessionTable.active_session")(lambda world: world.table.active_session(world.user_id))
operation("SessionTable.sessions_now")(lambda world: world.table.sessions_now())
OF_ONE = ("state", "failures", "versions", "saved_at", "is_ending", "epoch", "is_marked", "stored")
FLAGS = ("lose", "is_lost", "is_final", "is_released", "is_silent")
for name in (*OF_ONE, *FLAGS):
    operation(f"SessionTable.{name}")(lambda world, name=name: getattr(world.table, name)(world.session))  # type: ignore[misc]
    refused(
        f"SessionTable.{name}: of another table", lambda world, name=name: getattr(world.unsaved, name)(world.session)
    )  # type: ignore[misc]


@operation("SessionTable.hold")
def hold(world: World) -> None:
    world.leave(world.table.hold("held", [world.host]))


refused("SessionTable.hold: of a user who is there", lambda world: world.table.hold(world.user_id, [world.host]))
operation("SessionTable.set_released")(lambda world: world.table.set_released(world.session, True))
operation("SessionTable.set_final")(lambda world: world.table.set_final(world.session, False))
refused("SessionTable.set_final: of a live one", lambda world: world.table.set_final(world.session, True))
operation("SessionTable.is_current")(lambda world: world.table.is_current(world.session, 2**63 + 1))
operation("SessionTable.is_stored")(lambda world: world.table.is_stored(world.session, 2**62, 2**63 + 1))
operation("SessionTable.own")(lambda world: world.table.own(world.session, 2**40, 2**41, 2**63 + 1, 2**63 + 2))
operation("SessionTable.doubt")(lambda world: world.table.doubt(0, 1000))
refused("SessionTable.own: without a store", lambda world: world.unsaved.own(world.stranger, 1))
refused("SessionTable.fix: nothing in flight", lambda world: world.table.fix(world.session, 1))
operation("SessionTable.next_deadline")(lambda world: world.table.next_deadline())
operation("SessionTable.has_due")(lambda world: world.table.has_due())


@operation("SessionTable.create")
def create(world: World) -> None:
    """With a key and without, and so many at once that rows move, in all but a debug build."""
    sessions = [world.table.create(f"key {number}") for number in range(2)]
    sessions += [world.table.create() for _ in range(2)]
    for session in sessions:
        world.leave(session)


refused("SessionTable.create: the key is taken", lambda world: world.table.create(world.key))
refused("SessionTable.create: no key", lambda world: world.table.create(b"key"))  # type: ignore[arg-type]
refused("SessionTable.create: it cannot be made", lambda world: world.broken.create(world.key))


@operation("SessionTable.identify")
def identify(world: World) -> None:
    session = world.table.create()
    world.table.identify(session, world.key, [world.host], 2**40, 2**41)
    world.leave(session)


def identify_twice(world: World) -> None:
    session = world.table.create()
    try:
        world.table.identify(session, world.user_id, world.data, 0)
    finally:
        world.leave(session)


refused("SessionTable.identify: the user is active", identify_twice)
refused("SessionTable.identify: again", lambda world: world.table.identify(world.session, 5, world.data, 0))


@operation("SessionTable.ask")
def ask(world: World) -> None:
    world.table.ask(world.session)
    world.table.ask(world.session)
    world.table.acknowledge(*world.table.take(), 2**40)  # type: ignore[misc]


refused("SessionTable.ask: of a raw one", lambda world: world.table.ask(world.raw))


@operation("SessionTable.advance")
def advance(world: World) -> None:
    """Out of the wheel, cascades and all, and passed over."""
    now = 1 if (tick := world.table.next_deadline()) is None else tick
    world.table.acknowledge(*world.flight(), now, now + 5000)
    for _ in range(2):
        world.table.advance(now + 5000, 1)
    while (flight := world.table.take()) is not None:
        world.table.acknowledge(*flight, now)


refused("SessionTable.advance: back before time", lambda world: world.table.advance(-1, 1))


@operation("SessionTable.take")
def take(world: World) -> None:
    session, version = world.flight()
    world.table.fix(session, version & 1 or 2)
    world.table.acknowledge(session, world.table.versions(session)[0], 2**40)
    assert world.table.take() is None


@operation("SessionTable.fix")
def fix(world: World) -> None:
    session, version = world.flight()
    world.table.acknowledge(session, world.table.fix(session, 2**63 + version % 2) or version, 5)


@operation("SessionTable.due_after")
def due_after(world: World) -> None:
    assert 2**40 < world.table.due_after(world.session, 2**40, 2**41) <= 2**40 + 2**41


refused("SessionTable.due_after: no interval", lambda world: world.table.due_after(world.session, 1, 0))


@operation("SessionTable.acknowledge")
def acknowledge(world: World) -> None:
    world.table.acknowledge(*world.flight(), 2**40, 2**41)


def acknowledge_another(world: World) -> None:
    flight = world.flight()
    try:
        world.table.acknowledge(world.session, 2**60, 0)
    finally:
        world.table.acknowledge(*flight, 0)


refused("SessionTable.acknowledge: another version", acknowledge_another)


@operation("SessionTable.fail")
def fail(world: World) -> None:
    world.table.fail(*world.flight(), 2**41)


refused("SessionTable.fail: nothing in flight", lambda world: world.table.fail(world.session, 1))


@operation("SessionTable.begin_end")
def begin_end(world: World) -> None:
    session = world.table.create("key")
    world.table.identify(session, "user", [world.host], 0, 10)
    world.table.begin_end(session)
    world.table.begin_end(session)
    world.table.forget(session)


@operation("SessionTable.forget")
def forget(world: World) -> None:
    """With a save in flight, which is disowned."""
    session = world.table.create("key")
    world.table.identify(session, "user", [world.host], 0)
    world.table.ask(session)
    flight = world.table.take()
    world.table.begin_end(session)
    world.table.forget(session)
    assert flight is not None
    assert not world.table.acknowledge(*flight, 0)


refused("SessionTable.forget: a live one", lambda world: world.table.forget(world.session))


# Walks


@operation("SessionTable.oldest_first")
def walk(world: World) -> None:
    with world.table.oldest_first() as people:
        assert list(people) == [world.session]


@operation("OldestFirst")
def walk_to_the_end(world: World) -> None:
    walk = core.OldestFirst(world.table, True, True)  # type: ignore[call-arg]
    next(walk)
    walk.close()
    walk.close()
    assert next(walk, None) is None


@operation("OldestFirst.close")
def walk_and_leave(world: World) -> None:
    """A session goes while a walk stands before it."""
    session = world.table.create()
    people = world.table.oldest_first(False)
    world.leave(session)
    assert list(people) == []
    people.close()


# Batches


def make_batches(world: World, dump: Any = None) -> Any:
    return core.SaveBatches(
        world.table,
        world.digest,
        record=Record,
        verdict=Verdict,
        saved=(Outcome.SAVED,),
        owner="me",
        schema=1,
        dump=dump,
    )


def fill(world: World, dump: Any = None) -> Any:
    """A batch that has taken a user who was not there before."""
    session = world.table.create()
    world.table.identify(session, 5, {"n": 1}, 0, 1)
    batch = make_batches(world, dump).batch()
    for tick in range(1, 10**9):
        world.table.advance(max(tick, world.table.next_deadline() or 0), 100)
        if batch.fill(1, 1000, 1, 9, 0.0):
            return session, batch
    raise AssertionError("nobody was due")


@operation("SaveBatches")
def _(world: World) -> None:
    batches = make_batches(world)
    batches.has_due()
    batches.fixed(world.session)


@operation("SaveBatch")
def _(world: World) -> None:
    session, batch = fill(world)
    assert len(batch) == 1
    assert batch.under_way() == [session]
    assert batch.settle([Verdict(Outcome.SAVED)], 9, {}) == []
    world.leave(session)


@operation("SaveBatch: a verdict that says no")
def _(world: World) -> None:
    session, batch = fill(world)
    assert batch.settle([Verdict(Outcome.FAILED)], 9, {}) is None
    ((_, version, _, _),) = batch.hand_over()
    world.table.fail(session, version)
    world.leave(session)


@operation("SaveBatch: somebody waits")
def _(world: World) -> None:
    session, batch = fill(world)
    assert batch.settle([Verdict(Outcome.SAVED)], 9, {session: None}) == [session]
    ((_, version, _, _),) = batch.hand_over()
    world.table.acknowledge(session, version, 1)
    world.leave(session)


def fail_to_dump(data: object) -> bytes:
    raise ValueError("no")


@operation("SaveBatch: data that cannot be encoded")
def _(world: World) -> None:
    session, batch = fill(world, fail_to_dump)
    ((_, version),) = batch.left_out()
    world.table.fail(session, version)
    world.leave(session)


@operation("SaveBatch: a session that is gone")
def _(world: World) -> None:
    session, batch = fill(world)
    world.leave(session)
    assert batch.settle([Verdict(Outcome.SAVED)], 9, {}) == []


refused("SaveBatch: by hand", lambda world: core.SaveBatch())
refused(
    "SaveBatches: a record that is no tuple",
    lambda world: core.SaveBatches(
        world.table, world.digest, record=dict, verdict=Verdict, saved=(), owner="", schema=0
    ),
)


# Calls that are awaited


class Owner:
    """A manager without an event loop, and whoever does what takes more than a step."""

    def __init__(self, kind: type[Any] = core.ManagerCore) -> None:
        self.table = core.SessionTable(Session, self)
        self.manager = kind()
        self.manager._attend(self.table)
        attend(self.table)

    async def create(self, key: str | None, replace: bool) -> Any:
        return self.table.create(key)

    async def start(self, session: Any) -> None:
        return

    async def set_user(self, session: Any, user_id: Any, data: object) -> None:
        self.table.identify(session, user_id, data, 0)

    async def end(self, session: Any, persist: bool | None) -> None:
        self.table.begin_end(session)
        self.table.forget(session)
        session._end("destroyed")


def attend(table: Any) -> None:
    table.keep_time(now=lambda: 5, tick=1, interval=10, arm=int)
    table.attend_ends(ending={}, waited_for={}, destroyed="destroyed")


def come_and_go(world: World, *, quietly: bool) -> None:
    """The whole life of a session, in calls of one step each, or by way of the host's coroutines."""

    def done(call: Any) -> Any:
        try:
            call.send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("it waits")

    async def live() -> None:
        table, manager, before = world.called, world.manager, world.steps.steps
        attend(table)
        table.bind_loop(asyncio.get_running_loop())
        for event in ("created", "started", "identified", "destroy"):
            table.hear(event, not quietly)
        table.admit(False)
        table.admit(True)
        session = done(manager.create(world.key))
        done(session.start())
        done(session.set_user(world.user_id, world.data))
        assert manager.find_by_key(world.key) is session
        done(session.destroy())
        assert len(table) == 0
        assert world.steps.steps - before == (0 if quietly else 4)

    a_loop().run_until_complete(live())


@functools.cache
def a_loop() -> asyncio.AbstractEventLoop:
    """One for all rounds: each loop costs a socket pair and kilobytes that the allocator gives back when it likes."""
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


class Steps:
    """A host that does what the calls would do, and has users, and ends of blocks."""

    options = SimpleNamespace(persist_on=())

    def __init__(self) -> None:
        self.table: Any = None
        self.steps = 0

    @property
    def _server(self) -> Any:
        return self

    _beginnings = _logins = _endings = _server

    async def open(self, user_id: Any, default: object, when_active: str) -> Any:
        return self.table.create()

    def refuse_if_ending(self, session: Any) -> None:
        assert not self.table.is_ending(session)

    async def create(self, key: str | None, replace: bool) -> Any:
        self.steps += 1
        return self.table.create(key)

    async def start(self, session: Any) -> None:
        self.steps += 1

    async def set_user(self, session: Any, user_id: Any, data: object) -> None:
        self.steps += 1
        self.table.identify(session, user_id, data, 0)

    async def end(self, session: Any, persist: bool | None) -> None:
        self.steps += 1
        self.table.begin_end(session)
        self.table.forget(session)
        session._end("destroyed")


def enter_and_leave(world: World) -> None:
    """A session that is entered as it is made, in a block that raises."""

    async def live() -> None:
        attend(world.called)
        world.called.bind_loop(asyncio.get_running_loop())
        for make in (world.manager.create, functools.partial(world.manager._open, world.user_id, None)):
            with contextlib.suppress(KeyError):
                async with make("join") as session:
                    assert len(world.called) == 1
                    raise KeyError(session)
        assert len(world.called) == 0

    a_loop().run_until_complete(live())


operation("SessionCall")(lambda world: come_and_go(world, quietly=False))
operation("SessionCall: entered")(enter_and_leave)
for name in (
    "ManagerCore",
    "SessionTable.keep_time",
    "SessionTable.attend_ends",
    "SessionTable.bind_loop",
    "SessionTable.hear",
    "SessionTable.admit",
):
    operation(name)(lambda world: come_and_go(world, quietly=True))
for name in ("SessionCore.start", "SessionCore.set_user", "SessionCore.destroy"):
    operation(name)(lambda world: come_and_go(world, quietly=True))


@operation("direct")
def take_methods(world: World) -> None:
    @core.direct
    class Direct(core.ManagerCore):
        pass

    assert "create" in vars(Direct)


# The wheel by itself


def timing_wheel(world: World) -> None:
    wheel = core.TimingWheel(3)
    timers = [wheel.schedule(3 + 10**each) for each in range(8)]
    wheel.refresh(timers[0], 2**41)
    wheel.cancel(timers[1])
    assert wheel.next_deadline() is not None
    assert len(wheel.advance(10**9, 1000)) == 6
    assert len(wheel) == 1


operation("TimingWheel")(timing_wheel)
for name in ("schedule", "refresh", "cancel", "advance", "next_deadline"):
    operation(f"TimingWheel.{name}")(timing_wheel)
refused("TimingWheel.cancel: none", lambda world: core.TimingWheel().cancel(5))
