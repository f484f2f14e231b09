"""Keys, user ids, user data and the bag: what is taken, what is refused, and what the core never looks at."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagey_sessions import (
    InvalidKeyError,
    InvalidUserDataError,
    InvalidUserIdError,
    KeyTakenError,
    NotIdentifiedError,
    Session,
    SessionEndedError,
    UsageError,
    UserActiveError,
)
from cagey_sessions._core import SessionTable, check_key, check_user_id
from support.core_objects import identified

# Keys and user ids


class Text(str):
    """A `str` with its own ideas of equality."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("__eq__")

    def __hash__(self) -> int:
        raise RuntimeError("__hash__")


class Number(int):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("__eq__")

    def __hash__(self) -> int:
        raise RuntimeError("__hash__")


NO_KEYS = [Text("key"), b"key", bytearray(b"key"), 1, 1.0, True, (), ["key"], {}, object(), str]


@pytest.mark.parametrize("key", [*NO_KEYS, ""], ids=lambda key: type(key).__name__)
def test_what_is_no_key_is_refused_before_it_is_looked_at(key, unraisable):
    """With a subclass of `str` the index would have to trust its `__eq__`; the call after the refusal works."""
    table = SessionTable(Session, None)
    session = identified(table)
    for call in (check_key, table.create):
        with pytest.raises(InvalidKeyError) as caught:
            call(key)
        assert isinstance(caught.value, (UsageError, ValueError, TypeError))
    if type(key) is str:
        assert table.find_by_key(key) is None
    else:
        with pytest.raises(InvalidKeyError):
            table.find_by_key(key)
    assert table.counters.created == len(table) == 1
    assert table.advance(10, 10) >= 1
    assert table.take() == (session, 1)


@given(st.lists(st.text(st.characters(), min_size=1, max_size=8), max_size=8, unique=True), st.text(st.characters()))
def test_keys_are_data(keys, other):
    """Any text at all, surrogates and NUL too, finds the session made with it and no other."""
    table = SessionTable(Session, None)
    hostile = ["__class__", "__proto__", "__init__", "constructor", "\0", " ", "k" * 100_000, "create", "by_key"]
    sessions = {key: table.create(key) for key in dict.fromkeys(hostile + keys)}
    for key, session in sessions.items():
        assert table.find_by_key(key) is session
        assert table.find_by_key("".join(list(key))) is session, "an equal text, not the same object"
        assert session.key == key
        with pytest.raises(KeyTakenError):
            table.create(key)
    for key in (other, other + "\0", "__dict__", "__prot", "k" * 99_999):
        assert table.find_by_key(key) is sessions.get(key)
    assert table.find_by_key("") is None


def test_the_user_of_a_session_that_is_ending_is_still_taken():
    """Its last save may not have been made: whoever loaded the data before has something older."""
    table = SessionTable(Session, None)
    older, newer = identified(table), table.create()
    for _ in range(2):
        with pytest.raises(UserActiveError) as caught:
            table.identify(newer, 1, {}, 0)
        assert caught.value.session is older
        assert newer.user_id is None
        assert table.active_session(1) is older
        table.begin_end(older)
        assert table.find_by_user(1) is None
    table.forget(older)
    assert table.active_session(1) is None
    table.identify(newer, 1, {}, 0)
    assert table.find_by_user(1) is newer


def test_the_end_of_the_older_never_removes_the_newer():
    """Of two sessions under one key, or of one user."""
    table = SessionTable(Session, None)
    older = table.create("key")
    table.identify(older, 1, {}, 0)
    table.begin_end(older)
    newer = table.create("key")
    assert table.find_by_key("key") is newer
    table.forget(older)
    assert table.find_by_key("key") is newer
    table.identify(newer, 1, {}, 0)
    for call in (table.begin_end, table.forget):
        with pytest.raises(SessionEndedError):
            call(older)
    assert table.find_by_key("key") is table.find_by_user(1) is newer


GOOD_IDS = [0, -1, 2**63 - 1, -(2**63), "a", "\u00e9" * 512, "x" * 1024, "\U0001f600" * 256, "__proto__", " ", "1"]
BAD_IDS = [
    *(True, False, 1.0, None, b"1", (), [1], {}, object(), int, Number(1), Text("a")),
    *(2**63, -(2**63) - 1, 10**5000, -(10**5000)),
    *("", "\0", "a\0b", "a\0", "\ud800", "a\udfff", "x" * 1025, "\u00e9" * 513, "\U0001f600" * 257, "x" * 10**6),
]


def name_of(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:8]!a}" if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("user_id", GOOD_IDS, ids=name_of)
def test_what_is_a_user_id(user_id):
    check_user_id(user_id)
    check_user_id(user_id, type(user_id))
    table = SessionTable(Session, None)
    assert table.find_by_user(user_id) is None
    session = identified(table, user_id)
    assert table.find_by_user(user_id) is session
    assert table.active_session(user_id) is session


@pytest.mark.parametrize("required", [None, int, str], ids=["any", "int", "str"])
@pytest.mark.parametrize("user_id", BAD_IDS, ids=name_of)
def test_what_is_no_user_id_is_refused(user_id, required, unraisable):
    """Whatever type is required, with one error that is also a `ValueError` and a `TypeError`."""
    with pytest.raises(InvalidUserIdError) as caught:
        check_user_id(user_id, required)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TypeError)
    assert len(str(caught.value)) < 400
    with pytest.raises(InvalidUserIdError):
        SessionTable(Session, None).find_by_user(user_id)


@pytest.mark.parametrize(("user_id", "required"), [(1, str), ("1", int), (-(2**63), str), ("x" * 1024, int)])
def test_ids_can_be_narrowed_to_one_type(user_id, required):
    with pytest.raises(InvalidUserIdError, match=f"user ids of type {required.__name__}"):
        check_user_id(user_id, required)


@given(st.one_of(st.integers(), st.text(st.characters()), st.sampled_from([2**63, -(2**63), 2**63 - 1])))
def test_a_user_id_is_64_bits_or_up_to_1024_bytes_of_utf_8(user_id):
    if isinstance(user_id, int):
        good = -(2**63) <= user_id < 2**63
    else:
        size = len(user_id.encode("utf-8", "surrogatepass"))
        good = 1 <= size <= 1024 and not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in user_id)
    if good:
        check_user_id(user_id)
    else:
        with pytest.raises(InvalidUserIdError):
            check_user_id(user_id)


def test_the_number_1_and_the_text_1_are_two_users():
    table = SessionTable(Session, None)
    number, text = identified(table, 1), identified(table, "1")
    assert table.find_by_user(1) is number
    assert table.find_by_user("1") is text


# User data and the bag


class Touchy:
    """An object that minds being looked at."""

    def _raise(self, *_: object) -> Any:
        raise RuntimeError("looked at")

    __eq__ = __ne__ = __hash__ = __bool__ = __len__ = __repr__ = __iter__ = __contains__ = __getattr__ = _raise


def test_user_data_is_never_looked_at(unraisable):
    """Neither compared, hashed, measured nor shown, from the first call to the last."""
    table = SessionTable(Session, None)
    data = Touchy()
    session = identified(table, data=data, interval=1)
    assert session.user_data is data
    session.user_data = data
    session.set("touchy", data)
    assert session.get("touchy") is data
    table.advance(1, 10)
    flight = table.take()
    assert flight is not None
    assert table.acknowledge(*flight, 1, 2)
    table.begin_end(session)
    table.forget(session)
    repr(session)
    session._end("destroyed")
    assert session.get("touchy") is data


class Clingy:
    """Data that uses its session while it is being freed."""

    def __init__(self, table: SessionTable, session: Any, seen: list[Any]) -> None:
        self.table, self.session, self.seen = table, session, seen

    def __del__(self) -> None:
        self.seen.append(self.session.user_data if self.session.alive else "ended")
        self.table.create()
        self.table.advance(10**6, 100)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"pet": data}, lambda data: [data]])
@pytest.mark.parametrize("end", [False, True], ids=["replaced", "ended"])
def test_data_that_uses_its_session_while_it_is_freed(wrap, end, unraisable):
    """It finds the session as it is after the change: without the data, or with the new data; never a dying object."""
    table = SessionTable(Session, None)
    session = table.create()
    seen: list[Any] = []
    table.identify(session, 1, wrap(Clingy(table, session, seen)), 0, 5)
    new = {"new": True}
    if end:
        table.begin_end(session)
        table.forget(session)
        session._end("destroyed")
        assert seen == ["ended"]
    else:
        session.user_data = new
        assert seen == [new]
        assert session.user_data is new
        assert table.state(session) == "due"
    table._check()


def test_a_weak_reference_to_data_may_look_at_the_session(unraisable):
    class Data:
        pass

    table = SessionTable(Session, None)
    session = identified(table, data=Data())
    seen: list[Any] = []
    watcher = weakref.ref(session.user_data, lambda _: seen.append(session.user_data))
    session.user_data = new = {}
    assert seen == [new]
    assert watcher() is None


def test_user_data_needs_a_user_and_is_never_none():
    table = SessionTable(Session, None)
    session = table.create()
    for use in (lambda: session.user_data, lambda: setattr(session, "user_data", {})):
        with pytest.raises(NotIdentifiedError, match="no user yet"):
            use()
    with pytest.raises(InvalidUserDataError):
        table.identify(session, 1, None, 0)
    assert session.user_id is None
    table.identify(session, 1, {}, 0)
    with pytest.raises(InvalidUserDataError):
        session.user_data = None
    with pytest.raises((AttributeError, NotImplementedError)):
        del session.user_data
    assert session.user_data == {}
    table.begin_end(session)
    session.user_data = {"while": "ending"}
    table.forget(session)
    session._end("destroyed")
    for use in (lambda: session.user_data, lambda: setattr(session, "user_data", {})):
        with pytest.raises(SessionEndedError, match=r"user 1 has ended \(destroyed\)"):
            use()


def test_the_bag_holds_what_it_is_given_and_outlives_the_end():
    table = SessionTable(Session, None)
    session = table.create()
    assert session.get("client") is None
    assert session.get("client", 5) == 5
    for name in (1, None, Text("a"), b"a"):
        with pytest.raises(InvalidKeyError):
            session.set(name, 1)
    session.set("client", None)
    assert session.get("client", 5) is None
    session.set("__class__", 7)
    assert session.get("__class__") == 7
    assert type(session) is Session
    session._end("destroyed")
    assert session.get("__class__") == 7
    with pytest.raises(SessionEndedError):
        session.set("client", 1)


def test_repr_never_raises_and_stays_short():
    table = SessionTable(Session, None)
    session = table.create("secret key")
    texts = [repr(session)]
    table.identify(session, "u" * 1024, {"secret": 1}, 0)
    texts.append(repr(session))
    table.begin_end(session)
    texts.append(repr(session))
    table.forget(session)
    texts.append(repr(session))
    session._end("destroyed")
    texts.append(repr(session))
    assert [text.rsplit(", ", 1)[1] for text in texts] == ["live>", "live>", "ending>", "ending>", "ended: destroyed>"]
    assert all(len(text) < 200 and "secret" not in text for text in texts)
