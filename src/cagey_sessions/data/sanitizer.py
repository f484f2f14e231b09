"""The checks of ``debug=True``: they look for mistakes with user data while they happen.

At each save and each end of a session the sanitizer looks for: data changed without `mark_changed`, one object in the
data of two users, data that `encode` and `decode` change, and data changed after its session ended. It also measures
how long listeners hold the event loop. Nothing here changes what is saved, and nothing runs without ``debug=True``.

Each mistake is reported as a `UserDataWarning`, once for each kind and user or listener. The text names user ids, paths
and listeners, never values. If a filter turns the warning into an error, it goes to the ``error`` event and the save
goes on.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from functools import partial, wraps
from typing import Any

from .._core import SessionCore, SessionTable, path_of
from ..options import name_of
from ..user_code import END_OF_PROCESS, as_exception
from ..wording import quote
from .encoding import Encoding

__all__ = ["Sanitizer", "UserDataWarning"]

LONGEST_STEP = 0.1
"""How many seconds a listener may hold the event loop without a warning."""
ENDED_WATCHED = 300
"""The data of so many ended sessions, the latest ones, is kept to see whether it changes."""
LOOKS_PER_SAVE = 4
"""How many of these each save looks at, in turn, so that the cost of a save is bounded."""

Path = tuple[object, ...]


class UserDataWarning(UserWarning):
    """User data, or a listener, is used in a way that loses changes or holds up saving. Only with ``debug=True``."""


class Sanitizer:
    """The checks of one manager; `report` gets the errors that a check raises, for the ``error`` event."""

    def __init__(
        self,
        table: SessionTable,
        encoding: Encoding,
        report: Callable[[Exception, SessionCore | None], None],
    ) -> None:
        self._table = table
        self._encoding = encoding
        self._report = report
        self._warned: set[tuple[str, object]] = set()
        self._holder: dict[int, SessionCore] = {}
        """By the id of a container, the session that held it at its last save. Only a hint: an id may be used again."""
        self._held: dict[SessionCore, set[int]] = {}
        self._ended: deque[tuple[int | str, Any, object]] = deque(maxlen=ENDED_WATCHED)
        self._was_marked = True

    def _warn(self, kind: str, who: object, text: str, session: SessionCore | None = None) -> None:
        if (kind, who) in self._warned:
            return
        self._warned.add((kind, who))
        try:
            warnings.warn(text, UserDataWarning, stacklevel=2)
        except END_OF_PROCESS:
            raise
        except BaseException as error:
            self._report(as_exception(error), session)

    # Saves

    def before_save(self, function: Callable[[Any], object]) -> Callable[[Any], object]:
        """The program's `before_save`, wrapped so that its time is measured."""

        @wraps(function, updated=())
        def timed(session: SessionCore) -> object:
            # before the call: the function may assign `user_data`, which marks
            self._was_marked = self._table.is_marked(session)
            with _Timed(partial(self._see_step, "before_save", function)):
                return function(session)

        return timed

    def saving(self, session: SessionCore, *, found_changed: bool = False) -> None:
        """Check a session right after its data was encoded, before anything else runs.

        `found_changed` says that the timer found the data changed; it is False if a call asked for the save.
        """
        was_marked, self._was_marked = self._was_marked, True
        try:
            user_id, data = session.user_id, session.user_data
            assert user_id is not None
            if found_changed and not (was_marked and self._table.is_marked(session)):
                self._warn(
                    "mark",
                    user_id,
                    f"user {quote(user_id)}: the data, or what before_save copies, has changed without a call of "
                    "session.mark_changed(); without debug the timer would have passed it over",
                    session,
                )
            self._look_for_sharing(session, user_id, data)
            if self._encoding.converts:
                self._look_at_conversion(session, user_id, data)
            self._look_at_ended(LOOKS_PER_SAVE)
        except END_OF_PROCESS:
            raise
        except BaseException as error:  # most likely raised by a class of the program's; the save goes on
            self._report(as_exception(error), session)

    def _look_for_sharing(self, session: SessionCore, user_id: int | str, data: object) -> None:
        """Warn if a container in this user's data is also in the data of another live user."""
        self._let_go(session)
        held = self._held[session] = set()
        for path, part in _mutable_parts(data):
            other = self._holder.setdefault(id(part), session)
            if other is not session:
                # looked up again: the other may have let go of it, and the id may be of a new object
                place = _place_of(part, other.user_data) if other.alive else None
                if place is not None and ("shared", other.user_id) not in self._warned:
                    self._warn(
                        "shared",
                        user_id,
                        f"user {quote(user_id)}: {path_of(_steps(path))} is the very object that is "
                        f"{path_of(_steps(place))} of user {quote(other.user_id)}; loaded again it will be two copies",
                        session,
                    )
                if place is not None:
                    continue
                self._holder[id(part)] = session
            held.add(id(part))

    def _let_go(self, session: SessionCore) -> None:
        for number in self._held.pop(session, ()):
            if self._holder.get(number) is session:
                del self._holder[number]

    def _look_at_conversion(self, session: SessionCore, user_id: int | str, data: object) -> None:
        """Warn if the data would not come back from the program's `encode` and `decode` as it is."""
        try:
            found = _difference(data, self._encoding.copy(data))
        except END_OF_PROCESS:
            raise
        except BaseException as error:
            found = (), f"cannot be read again ({type(error).__name__})"
        if found is not None:
            path, what = found
            text = f"user {quote(user_id)}: after encode and decode {path_of(_steps(path))} {what}"
            self._warn("conversion", user_id, text, session)

    # Ends

    def ended(self, session: SessionCore) -> None:
        """Begin to watch the data of a session that ends: changes to it from now on are lost."""
        self._let_go(session)
        if session.user_id is None:
            return
        try:
            data = session.user_data
            fingerprint = self._encoding.try_dump(data)
        except END_OF_PROCESS:
            raise
        except BaseException as error:
            self._report(as_exception(error), session)
            return
        if fingerprint is not None:
            self._ended.append((session.user_id, data, fingerprint))

    def look_at_all_ended(self) -> None:
        """Check the data of all ended sessions that are still watched."""
        self._look_at_ended(len(self._ended))

    def _look_at_ended(self, most: int) -> None:
        for _ in range(min(most, len(self._ended))):
            user_id, data, fingerprint = self._ended.popleft()
            live = self._table.active_session(user_id)
            if live is not None and live.alive and live.user_data is data:
                continue  # the program has handed it on to a newer session
            if self._encoding.try_dump(data) == fingerprint:
                self._ended.append((user_id, data, fingerprint))
                continue
            self._warn(
                "ended",
                user_id,
                f"user {quote(user_id)}: the data was changed after the session had ended, and nobody saves that; ask "
                "session.user_data each time in place of keeping what it returned",
            )

    # Listeners

    def call(self, event: str, function: Callable[..., object], args: tuple[object, ...]) -> object:
        """Call a listener and measure its time; if it returns an awaitable, each step of that is measured, too."""
        see = partial(self._see_step, f"event {event!r}", function)
        with _Timed(see):
            result = function(*args)
        return _TimedAwaitable(result, see) if inspect.isawaitable(result) else result

    def _see_step(self, what: str, function: Callable[..., object], seconds: float) -> None:
        if seconds > LONGEST_STEP:
            name = name_of(function)
            self._warn(
                "held",
                (what, name),
                f"{name} ({what}) held the event loop for {seconds * 1000:.0f} ms: all users wait meanwhile; have "
                "blocking work done with asyncio.to_thread",
            )


class _Timed:
    """Measures how long a block takes."""

    __slots__ = ("_began", "_see")

    def __init__(self, see: Callable[[float], None]) -> None:
        self._see = see

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._see(time.perf_counter() - self._began)


class _TimedAwaitable:
    """An awaitable that measures each step of another one: from one suspension to the next, it holds the loop."""

    __slots__ = ("_awaitable", "_see")

    def __init__(self, awaitable: Awaitable[object], see: Callable[[float], None]) -> None:
        self._awaitable = awaitable
        self._see = see

    def __await__(self) -> Generator[Any, Any, object]:
        steps: Any = self._awaitable.__await__()
        step: Callable[[], Any] = partial(next, steps)
        while True:
            try:
                with _Timed(self._see):
                    waits_for = step()
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield waits_for
            except GeneratorExit:
                if hasattr(steps, "close"):
                    steps.close()
                raise
            except BaseException as error:
                if not hasattr(steps, "throw"):
                    raise
                step = partial(steps.throw, error)
            else:
                step = partial(next, steps) if sent is None else partial(steps.send, sent)


# Walks over data


def _fields(value: Any) -> list[str] | None:
    """The names of the fields of a dataclass or a msgspec Struct; None for any other value."""
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.compare]
    fields = getattr(kind, "__struct_fields__", None)
    return list(fields) if isinstance(fields, tuple) else None


def _is_frozen(value: Any) -> bool:
    settings = getattr(value, "__dataclass_params__", None) or getattr(value, "__struct_config__", None)
    return bool(getattr(settings, "frozen", False))


def _children(value: Any) -> list[tuple[object, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return [(name, getattr(value, name)) for name in _fields(value) or () if hasattr(value, name)]


def _mutable_parts(data: Any) -> Iterator[tuple[Path, object]]:
    """Every part of user data that can be changed in place, with its path; each once, however often it is in it."""
    seen: set[int] = set()
    ahead: list[tuple[Path, Any]] = [((), data)]
    while ahead:
        path, part = ahead.pop()
        fields = None if isinstance(part, (dict, list, set, tuple)) else _fields(part)
        if (fields is None and not isinstance(part, (dict, list, set, tuple))) or id(part) in seen:
            continue
        seen.add(id(part))
        if not isinstance(part, tuple) and not (fields is not None and _is_frozen(part)):
            yield path, part
        ahead += [((*path, step), child) for step, child in reversed(_children(part))]


def _place_of(wanted: object, data: Any) -> Path | None:
    """The path of an object in user data; None if it is not in it."""
    return next((path for path, part in _mutable_parts(data) if part is wanted), None)


def _steps(path: Path) -> list[str | int]:
    return [step if type(step) is str or type(step) is int else type(step).__name__ for step in path]


def _difference(one: Any, other: Any) -> tuple[Path, str] | None:
    """The first path at which two values differ in type or value, and how; None if they are the same."""
    ahead: list[tuple[Path, Any, Any]] = [((), one, other)]
    seen: set[int] = set()
    while ahead:
        path, one, other = ahead.pop()
        if type(one) is not type(other):
            return path, f"is of type {type(other).__name__}, not {type(one).__name__}"
        parts, others = _children(one), _children(other)
        if isinstance(one, dict):
            if [(type(key), key) for key in one] != [(type(key), key) for key in other]:
                return path, "has other keys, or in another order"
        elif isinstance(one, (list, tuple)):
            if len(one) != len(other):
                return path, "has another length"
        elif _fields(one) is None:
            if not _is_same(one, other):
                return path, "has another value"
            continue
        elif len(parts) != len(others):
            return path, "has other fields"
        if id(one) not in seen:
            seen.add(id(one))
            pairs = zip(parts, others, strict=True)
            ahead += reversed([((*path, step), child, counterpart) for (step, child), (_, counterpart) in pairs])
    return None


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, (set, frozenset)):
        return {(type(part), part) for part in one} == {(type(part), part) for part in other}
    kind: Any = type(one)
    if kind.__eq__ is object.__eq__ and hasattr(one, "__dict__"):
        return bool(vars(one) == vars(other))
    return bool(one == other)
