"""The settings of a manager: their defaults, how durations are read, and every check.

A setting that cannot be understood is an error that quotes it, and never replaced by a default: if a bad interval were
taken for "no autosave", data would be lost without a message.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias, TypeGuard

from .errors import DurationError, OptionError, UnknownEventError
from .wording import MOST_SHOWN, kind_name, quote

__all__ = [
    "PERSIST_EVENTS",
    "SECOND",
    "SHORTEST_INTERVAL",
    "Duration",
    "Options",
    "duration_of",
    "is_any",
    "is_text",
    "known_event",
    "lacks",
    "name_of",
    "one_of",
    "parse_duration",
    "path_text",
    "read_options",
    "suggest",
    "yes_or_no",
]

Duration: TypeAlias = int | float | str | timedelta
"""Seconds as a number, a `timedelta`, or text such as ``"30s"``, ``"1h30m"``, ``"500ms"``."""

SECOND = 1_000_000_000
SHORTEST_INTERVAL = SECOND // 100
LONGEST = 100 * 365 * 86_400 * SECOND
LONGEST_PATH = 4096
"""In bytes; no system that this runs on takes more."""
LONGEST_NAME = 200
"""In characters, of the name of a function in a message."""
MOST_IN_FLIGHT = 1_000_000
BEYOND = 10**12  # seconds, past LONGEST, where a float still holds nanoseconds as a finite number

PERSIST_EVENTS = ("disconnect", "shutdown")
"""The occasions, besides the interval, at which a manager may be told to save."""

TRACKING = ("content", "marked")

LONGEST_TEXT = 100
"""In characters, of a duration; "1 week, 2 days, 3 hours, 4 minutes, 5 seconds" has 45."""
_MILLISECONDS = re.compile(r"(\d+(?:\.\d+)?) ?(?:ms|msecs?|milliseconds?)", re.ASCII)
_LOG_METHODS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Options:
    """Checked settings; durations in nanoseconds."""

    interval: int | None = None
    persist_on: frozenset[str] = frozenset()
    max_in_flight: int = 50
    save_timeout: int = 10 * SECOND
    before_save: Callable[[Any], object] | None = None
    user_id: type[int] | type[str] | None = None
    tracking: str = "content"
    debug: bool = False
    log: Any = field(default_factory=lambda: logging.getLogger("cagey_sessions"))


def suggest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: ``; did you mean 'x'?``, or else the list of all known names."""
    import difflib  # noqa: PLC0415 - only for mistakes; keeps the import of the package cheap

    known = sorted(known)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:MOST_SHOWN]).lower() if isinstance(name, str) else ""
    close = difflib.get_close_matches(snake, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(map(repr, known))}"


def one_of(name: str, value: object, known: Collection[str]) -> str:
    """Check a setting that is one of a few words, and return it; raises `OptionError` for anything else."""
    if isinstance(value, str) and value in known:
        return value
    hint = suggest(value, known)
    raise OptionError(
        f"{name} is {' or '.join(map(repr, known))}, not {quote(value)}{hint if 'did you mean' in hint else ''}"
    )


def yes_or_no(name: str, value: object) -> bool:
    """Check a setting that is True or False, and return it; raises `OptionError` for anything else."""
    if value is True or value is False:
        return value
    raise OptionError(f"{name} is True or False, not {quote(value)}")


def lacks(value: object, methods: Iterable[str]) -> str | None:
    """The first of some methods that an object does not have; None if it has them all."""
    for name in methods:
        try:
            method = getattr(value, name)
        except Exception:  # a property of the program's may raise anything
            return name
        if not callable(method):
            return name
    return None


def is_any(function: object, *checks: Callable[[object], bool]) -> bool:
    """Whether one of some checks of `inspect` is true of a callable."""
    try:
        return any(check(function) for check in checks)
    except Exception:  # the checks read attributes, and a property of the program's may raise anything
        return False


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a `str` that every engine can store: without a NUL and without a lone surrogate."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_text(name: str, path: Any) -> str:
    """Check the path of a file, and return it as a `str`.

    Raises `OptionError` for a path that no file can have; the text does not quote it, since it may be of any size.
    """
    try:
        text = os.fspath(path)
    except Exception:  # `__fspath__` of the program's may raise anything
        text = None
    if not isinstance(text, str):
        raise OptionError(f"{name} is the path of a file, a str or a pathlib.Path, not {kind_name(path)}")
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        raise OptionError(f"{name} is the path of a file, and this one holds a character that no path has") from None
    if not 0 < size <= LONGEST_PATH or "\0" in text:
        what = "holds a NUL" if "\0" in text else f"takes {size} bytes; a path takes 1 to {LONGEST_PATH}"
        raise OptionError(f"{name} is the path of a file, and this one {what}")
    return text


def name_of(function: Callable[..., object]) -> str:
    """The name of a function, or of another callable, for messages."""
    while isinstance(function, partial):
        function = function.func
    try:
        name = function.__qualname__
    except Exception:  # a callable may have anything for its attributes
        name = None
    return (name if type(name) is str and name else type(function).__qualname__)[:LONGEST_NAME]


def parse_duration(value: object, name: str, *, shortest: int = 1, longest: int = LONGEST) -> int:
    """Read a duration, and return it in nanoseconds.

    Numbers are seconds; text is read by pytimeparse, except milliseconds (``"500ms"``), which it does not know. `name`
    is the name of the setting in messages; `shortest` and `longest` are in nanoseconds. Raises `DurationError`, which
    quotes what was given.
    """
    seconds: float | None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = _seconds_in(value)
        if seconds is None:
            raise DurationError(
                f"{name}: cannot read {quote(value)} as a duration; write '30s', '1h30m', '500ms', or seconds"
            )
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    else:
        raise DurationError(
            f"{name}: a duration is a number of seconds, a timedelta or text like '30s', not {quote(value)}"
        )
    if isinstance(seconds, float) and not math.isfinite(seconds):
        raise DurationError(f"{name}: {quote(value)} is not a finite duration")
    nanoseconds = round(max(-BEYOND, min(BEYOND, seconds)) * SECOND)
    if nanoseconds < shortest:
        raise DurationError(f"{name}: {quote(value)} is too short; the shortest is {shortest / SECOND:g} s")
    if nanoseconds > longest:
        years = longest / (365 * 86_400 * SECOND)
        raise DurationError(f"{name}: {quote(value)} is too long; the longest is {years:g} years")
    return nanoseconds


def _seconds_in(text: str) -> float | None:
    """The seconds that a text says, or None if it is not a duration."""
    # the patterns of pytimeparse take minutes for a long text with many spaces
    if len(text) > LONGEST_TEXT:
        return None
    text = " ".join(text.split())
    if milliseconds := _MILLISECONDS.fullmatch(text):
        return float(milliseconds[1]) / 1000
    from pytimeparse.timeparse import timeparse  # noqa: PLC0415 - it imports decimal

    return timeparse(text)


def duration_of(text: str) -> Duration:
    """A duration from a place where everything is text, a URL or a command line; a bare number means seconds."""
    try:
        return float(text)
    except ValueError:
        return text


def known_event(name: object, known: Collection[str]) -> str:
    """Check the name of an event, and return it; raises `UnknownEventError` if there is no such event."""
    if not isinstance(name, str):
        raise UnknownEventError(f"the name of an event is a str, not {quote(name)}")
    if name not in known:
        raise UnknownEventError(f"there is no event {quote(name)}{suggest(name, known)}")
    return name


WITH_A_STORE: Mapping[str, Any] = {
    "interval": 30 * SECOND,
    "persist_on": frozenset(PERSIST_EVENTS),
    "max_in_flight": 4,
}
"""The defaults that differ when a store does the saving. `max_in_flight` then counts batches, not users."""


def read_options(nested: object, *, stored: bool = False, **given: Any) -> Options:
    """Check all settings of a manager: those given by keyword and those in the nested mapping.

    A keyword that is None counts as not given. `stored` says whether the manager has a store. Raises `OptionError` for
    an unknown name, a value that cannot be used, or a setting given twice.
    """
    for name, value in _flatten(nested).items():
        if given.get(name) is not None:
            raise OptionError(f"{name!r} is given twice: by keyword, and in the mapping of options")
        given[name] = value
    checked: dict[str, Any] = {name: _CHECKS[name](value) for name, value in given.items() if value is not None}
    if not stored:
        for name in ("before_save", "save_timeout", "tracking"):
            if name in checked:
                raise OptionError(
                    f"{name} needs a store; without one, a listener of 'persist_user_data' does the saving"
                )
    return Options(**({**WITH_A_STORE, **checked} if stored else checked))


def _flatten(nested: object) -> dict[str, Any]:
    """The settings in a nested mapping, which has the shape of the Node package's options, in snake case."""
    if nested is None:
        return {}
    user_data = _branch(nested, "options", ("user_data",)).get("user_data", {})
    persistence = _branch(user_data, "options['user_data']", ("persistence",)).get("persistence", {})
    leaves = _branch(persistence, "options['user_data']['persistence']", ("interval", "events"))
    names = {"interval": "interval", "events": "persist_on"}
    return {names[name]: value for name, value in leaves.items() if value is not None}


def _branch(value: object, place: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(f"{place} is a mapping, not {quote(value)}")
    for name in value:
        if not isinstance(name, str) or name not in known:
            raise OptionError(f"{place} has no setting {quote(name)}{suggest(name, known)}")
    return value


def _interval(value: object) -> int:
    return parse_duration(value, "interval", shortest=SHORTEST_INTERVAL)


def _persist_on(value: object) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OptionError(f"persist_on is a list of names, like ['disconnect', 'shutdown'], not {quote(value)}")
    names = set()
    try:
        for name in value:
            if not isinstance(name, str) or name not in PERSIST_EVENTS:
                raise OptionError(f"persist_on has no event {quote(name)}{suggest(name, PERSIST_EVENTS)}")
            names.add(name)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"persist_on is a list of names, and {quote(value)} raised {kind_name(error)}") from error
    return frozenset(names)


def _max_in_flight(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MOST_IN_FLIGHT:
        raise OptionError(f"max_in_flight is a whole number from 1 to {MOST_IN_FLIGHT:,}, not {quote(value)}")
    return value


def _save_timeout(value: object) -> int:
    return parse_duration(value, "save_timeout", shortest=SHORTEST_INTERVAL)


def _before_save(value: object) -> object:
    if not callable(value):
        raise OptionError(f"before_save is a function that is given the session, not {quote(value)}")
    if is_any(value, inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        raise OptionError("before_save is a plain function: nothing may come between it and the bytes that are saved")
    return value


def _user_id(value: object) -> object:
    if value is not int and value is not str:
        raise OptionError(f"user_id is the type of all user ids, int or str, not {quote(value)}")
    return value


def _tracking(value: object) -> str:
    return one_of("tracking", value, TRACKING)


def _debug(value: object) -> bool:
    return yes_or_no("debug", value)


def _log(value: object) -> object:
    if missing := lacks(value, _LOG_METHODS):
        wanted = ", ".join(_LOG_METHODS)
        raise OptionError(f"log is a logger with the methods {wanted}; {quote(value)} has no {missing}")
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "interval": _interval,
    "persist_on": _persist_on,
    "max_in_flight": _max_in_flight,
    "save_timeout": _save_timeout,
    "before_save": _before_save,
    "user_id": _user_id,
    "tracking": _tracking,
    "debug": _debug,
    "log": _log,
}
