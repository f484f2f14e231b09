"""The core's objects as Python objects: made wrongly, copied, subclassed, counted, collected, alive at the exit.

None of it may crash, print, or leave a structure half changed; what is refused is refused with one clear error.
"""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from typing import Any

import pytest

from cagey_sessions import Session, UsageError
from cagey_sessions._core import DEBUG, SessionCore, SessionTable, living
from support.core_objects import identified, python

# Manners


def test_a_session_can_be_referred_to_weakly():
    table = SessionTable(Session, None)
    session = identified(table)
    notes = weakref.WeakKeyDictionary({session: "note"})
    assert weakref.ref(session)() is session
    assert notes[session] == "note"
    table.begin_end(session)
    table.forget(session)
    session._end("destroyed")
    assert len(notes) == 1
    del session
    assert len(notes) == 0


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, *(lambda session, n=n: pickle.dumps(session, n) for n in range(6))],
    ids=["copy", "deepcopy", *(f"pickle {n}" for n in range(6))],
)
@pytest.mark.parametrize("make", [lambda: SessionTable(Session, None).create(), lambda: Session.__new__(Session)])
def test_a_session_is_not_copied(duplicate, make):
    with pytest.raises(TypeError, match="cannot be copied or pickled; copy its user_data"):
        duplicate(make())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_table_and_a_walk_are_not_copied(duplicate):
    table = SessionTable(Session, None)
    with pytest.raises(TypeError):
        duplicate(table)
    with table.oldest_first() as walk, pytest.raises(TypeError):
        duplicate(walk)


def test_sessions_are_made_by_the_table_only():
    for session_type in (Session, SessionCore):
        with pytest.raises(UsageError, match=r"manager\.create"):
            session_type()
    session = SessionTable(Session, None).create()
    with pytest.raises(UsageError, match=r"manager\.create"):
        session.__init__()
    assert session.alive


class Forgetful(Session):
    """A subclass with attributes of its own that never calls `super().__init__`, as nobody calls its own either."""

    default = "of the class"

    def __init__(self) -> None:
        self.never = "called"


def test_a_subclass_has_attributes_of_its_own():
    table = SessionTable(Forgetful, None)
    session = table.create("key")
    assert type(session) is Forgetful
    session.extra = 1
    assert (session.extra, session.default, hasattr(session, "never")) == (1, "of the class", False)
    table.identify(session, 1, {}, 0)
    assert table.find_by_key("key") is table.find_by_user(1) is session
    handmade = Forgetful()
    assert handmade.never == "called"
    with pytest.raises(UsageError, match="belongs to no manager"):
        handmade.set("a", 1)


def test_attributes_of_a_subclass_in_a_cycle_are_collected():
    table = SessionTable(Forgetful, None)
    session = table.create()
    session.me = session
    gone = weakref.ref(session)
    table.begin_end(session)
    table.forget(session)
    session._end("destroyed")
    del session
    gc.collect()
    assert gone() is None


def test_a_subclass_whose_equality_raises_works(unraisable):
    """Sessions are told apart by identity, nothing else."""

    class Hostile(Session):
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("__eq__")

        def __hash__(self) -> int:
            raise RuntimeError("__hash__")

        def __bool__(self) -> bool:
            raise RuntimeError("__bool__")

        def __len__(self) -> int:
            raise RuntimeError("__len__")

    table = SessionTable(Hostile, None)
    session = table.create("key")
    table.identify(session, 1, {}, 0, 1)
    assert table.find_by_key("key") is session
    assert table.find_by_user(1) is session
    table.advance(1, 10)
    flight = table.take()
    assert flight is not None
    assert flight[0] is session
    assert table.acknowledge(session, 1, 1, 2)
    with table.oldest_first() as walk:
        assert next(walk) is session
    assert len(table.sessions_now()) == 1
    table.begin_end(session)
    table.forget(session)
    assert table.find_by_key("key") is None
    assert repr(session).startswith("<Hostile user 1")


def test_a_session_type_that_cannot_be_made_leaves_the_table_as_it_was():
    class Broken(Session):
        broken = True

        def __new__(cls) -> Any:
            if cls.broken:
                raise RuntimeError("no")
            return super().__new__(cls)

    table = SessionTable(Broken, None)
    for _ in range(200):
        with pytest.raises(RuntimeError, match="no"):
            table.create("key")
    assert len(table) == table.counters.created == 0
    assert table.sessions_now() == []
    assert table.find_by_key("key") is None
    Broken.broken = False
    assert table.find_by_key("key") is None
    assert table.create("key").key == "key"
    table._check()


def test_a_session_type_that_makes_something_else_is_refused():
    """Its `__new__` decides what the table gets, and the table writes into it: that must be a session."""
    script = """
    class Other(Session):
        def __new__(cls):
            return 10**100

    table = SessionTable(Other, None)
    try:
        table.create("key")
    except (TypeError, UsageError):
        print("refused", len(table), table.find_by_key("key"))
    """
    assert python(script) == "refused 0 None\n"


def test_a_method_of_the_core_refuses_what_is_no_object_of_its_class():
    """Taken from the class and called with something else first, it would look for C fields that are not there."""
    script = """
    import inspect
    from cagey_sessions import Session, SessionManager, _core

    def refusal(method, stranger):
        try:
            method(stranger)
        except TypeError as error:
            return str(error)

    asked = 0
    for kind in [Session, SessionManager, *(kind for kind in vars(_core).values() if inspect.isclass(kind))]:
        if kind.__module__.startswith("cagey_sessions") and not issubclass(kind, Exception):
            for name, method in vars(kind).items():
                if inspect.isroutine(method) and not isinstance(method, (staticmethod, classmethod)):
                    if not inspect.isfunction(method) and name not in ("__new__", "__init_subclass__"):
                        said = refusal(method, 5)
                        assert said and "'int'" in said, (kind, name, said)
                        asked += 1
    print(asked > 100)
    """
    assert python(script) == "True\n"


@pytest.mark.parametrize("session_type", [int, object, None, "Session", SessionTable])
def test_what_is_no_session_type_is_refused(session_type):
    with pytest.raises((UsageError, TypeError)):
        SessionTable(session_type, None)


def test_counters_and_identity_are_read_only():
    table = SessionTable(Session, None)
    session = identified(table)
    for thing, names in (
        (session, ["key", "user_id", "end_reason", "alive", "_host"]),
        (table.counters, ["created", "ended", "identified", "in_flight", "due", "saved", "failed"]),
        (table, ["counters", "host", "armed", "oldest_save"]),
    ):
        for name in names:
            with pytest.raises(AttributeError):
                setattr(thing, name, 1)
    with pytest.raises(AttributeError):
        session.extra = 1


# the sizes told here are those of 64 bits, which is what servers run
@pytest.mark.skipif(sys.maxsize < 2**32, reason="pointers of 32 bits")
def test_a_session_takes_80_bytes_and_the_collectors_16():
    """A field more, or a `cdef` method, takes 16 bytes more for everybody who is there."""
    assert Session.__basicsize__ == SessionCore.__basicsize__ == 80


# Collecting


def test_everything_is_collected_when_nobody_holds_the_table():
    """Cycles through host, data, listeners, a walk under way; with rows in the wheel, in both lanes and in flight."""

    class Host:
        pass

    class Data:
        pass

    host = Host()
    host.table = table = SessionTable(Forgetful, host)
    dead = [weakref.ref(host)]
    for user_id in range(200):
        session = table.create(str(user_id))
        data = Data()
        data.session, data.host = session, host
        table.identify(session, user_id, data, 0, 1 + user_id % 2 * 1000)
        session.set("data", data)
        session._listeners = [host, table]
        session.neighbour = session
        dead += [weakref.ref(session), weakref.ref(data)]
    table.advance(1, 50)
    table.ask(session)
    table.take()
    host.walk = table.oldest_first()
    next(host.walk)
    assert table.armed > 0
    assert table.counters.due > 0
    assert table.counters.in_flight == 1
    del host, table, session, data
    gc.collect()
    assert [reference() for reference in dead if reference() is not None] == []


def test_a_session_keeps_its_table():
    """A handle is usable for as long as somebody holds it, whatever has become of its manager."""
    session = identified(SessionTable(Session, None))
    gc.collect()
    assert session.alive
    assert session.user_data == {}
    assert session._host is None


def test_the_interpreter_ends_cleanly_with_everything_alive():
    """Pending deadlines, due and flying saves, a walk, listeners that hold the manager; nothing ended."""
    script = """
    async def main():
        global manager, sessions
        manager = SessionManager()
        manager.on("persist_user_data", lambda session, manager=manager: None)
        manager.on("destroy", lambda session, manager=manager: None)
        sessions = [await manager.create(str(n)) for n in range(100)]
        for session in sessions:
            session.on("destroy", lambda session=session: manager)
            session.set("manager", manager)

    asyncio.run(main())

    class Host:
        pass

    class Person(SessionCore):
        def __del__(self):
            # runs while the interpreter goes down, when the table may be half gone
            repr(self), self.alive, self.get("a"), self.key
            try:
                self.user_data
                table.find_by_key("1")
            except Exception:
                pass

    host = Host()
    host.table = table = SessionTable(Person, host)
    for n in range(200):
        person = table.create(str(n))
        table.identify(person, n, {"person": person}, 0, 1 + n % 2 * 1000)
        person._listeners = (host, person)
    table.advance(1, 50)
    table.ask(person)
    table.take()
    walk = table.oldest_first()
    next(walk)
    gc.collect()
    """
    python(script)
    python(script, "del host, table, person, walk; gc.collect()")
    python(script, "del manager, sessions; gc.collect()")
    python(script, "sys.exit(0)")


def test_a_manager_with_pending_saves_says_only_that_users_are_unsaved():
    script = """
    async def main():
        global manager
        manager = SessionManager(interval="1h")
        manager.on("persist_user_data", lambda session, manager=manager: None)
        for n in range(50):
            session = await manager.create(str(n))
            session.on("destroy", lambda session=session: manager)
            await session.set_user(n, {"me": session})
        gc.collect()

    asyncio.run(main())
    gc.collect()
    """
    says = "unsaved users: 50; `await manager.destroy(persist=True)` was not called, or did not finish\n"
    python(script, stderr=says)


# Counting


# counters exist in debug builds only: make check-core runs this one
@pytest.mark.skipif(not DEBUG, reason="a release build counts nothing")
def test_the_objects_of_the_core_are_counted_from_allocation_to_release():
    """Those of a subclass too, raw ones, those whose construction fails, and those that come back once."""
    before = living()

    class Phoenix(Session):
        def __del__(self) -> None:
            ashes.append(self)

    def more() -> tuple[int, ...]:
        return tuple(count - before[name] for name, count in living().items())

    ashes: list[Any] = []
    table = SessionTable(Phoenix, None)
    session = table.create()
    walk = table.oldest_first()
    raw = SessionCore.__new__(SessionCore)
    assert list(before) == ["SessionCore", "SessionTable", "Counters", "OldestFirst"]
    assert more() == (2, 1, 1, 1)
    with pytest.raises(UsageError):
        SessionTable(int, None)  # type: ignore[arg-type]
    table.begin_end(session)
    table.forget(session)
    del session, raw
    gc.collect()
    assert more() == (1, 1, 1, 1)
    ashes.clear()
    del walk
    assert more() == (0, 1, 1, 0)
    counters = table.counters
    del table
    gc.collect()
    assert more() == (0, 0, 1, 0)
    del counters
    assert more() == (0, 0, 0, 0)


# that a release build pays for no counter; make test runs this one
@pytest.mark.skipif(DEBUG, reason="a debug build counts")
def test_a_release_build_counts_nothing():
    assert living() == {}
