"""The settings of a manager. What lives here: defaults, durations, and every check of them. What must not: use of them.

Whatever is not understood is an error that quotes it. A default is never put in its place: a bad interval taken for
"no autosave" loses data without a sound.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

from .errors import DurationError, OptionError, UnknownEventError

__all__ = [
    "PERSIST_EVENTS",
    "SECOND",
    "SHORTEST_INTERVAL",
    "Duration",
    "Options",
    "duration_of",
    "known_event",
    "name_of",
    "parse_duration",
    "quote",
    "read_options",
    "suggest",
]

Duration: TypeAlias = int | float | str | timedelta
"""Seconds as a number, a `timedelta`, or text such as ``"30s"``, ``"1h30m"``, ``"500ms"``."""

SECOND = 1_000_000_000
SHORTEST_INTERVAL = SECOND // 100
LONGEST = 100 * 365 * 86_400 * SECOND
BEYOND = 10**12  # seconds, past LONGEST, where a float still holds nanoseconds as a finite number

PERSIST_EVENTS = ("disconnect", "shutdown")
"""The moments a program may want to save at, besides the interval."""

TRACKING = ("content", "marked")

_MILLISECONDS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:ms|msecs?|milliseconds?)\s*", re.ASCII)
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


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` if one of the known names is close, else the list of them all."""
    import difflib  # noqa: PLC0415 - for mistakes only: to import the package is to cost little

    known = sorted(known)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    close = difflib.get_close_matches(snake, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(map(repr, known))}"


def quote(value: object) -> str:
    """A value as messages show it: short, and whatever its `repr` does."""
    try:
        return f"{value!r:.80}"
    except Exception:  # an int of more digits than Python writes, or a repr that raises
        return f"a {type(value).__name__}"


def name_of(function: Callable[..., object]) -> str:
    """A function or another callable, as messages name it."""
    while isinstance(function, partial):
        function = function.func
    try:
        name = function.__qualname__
    except Exception:  # it has none, or what looks it up raises
        name = None
    return name if isinstance(name, str) and name else type(function).__qualname__


def parse_duration(value: object, name: str, *, shortest: int = 1, longest: int = LONGEST) -> int:
    """A duration in nanoseconds.

    Numbers are seconds; text is read by pytimeparse, and milliseconds (``"500ms"``) by us. `name` is how messages call
    the setting; `shortest` and `longest` are in nanoseconds. Raises `DurationError`, quoting what was given.
    """
    seconds: float | None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        if milliseconds := _MILLISECONDS.fullmatch(value):
            seconds = float(milliseconds[1]) / 1000
        else:
            from pytimeparse.timeparse import timeparse  # noqa: PLC0415 - it brings decimal along

            seconds = timeparse(value)
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


def duration_of(text: str) -> Duration:
    """A duration given where all is text, in a URL or on a command line: a bare number stands for seconds."""
    try:
        return float(text)
    except ValueError:
        return text


def known_event(name: object, known: Collection[str]) -> str:
    """The name, if there is an event of that name; raises `UnknownEventError` otherwise."""
    if not isinstance(name, str):
        raise UnknownEventError(f"the name of an event is a str, not {name!r:.80}")
    if name not in known:
        raise UnknownEventError(f"there is no event {name!r:.80}{suggest(name, known)}")
    return name


WITH_A_STORE: Mapping[str, Any] = {
    "interval": 30 * SECOND,
    "persist_on": frozenset(PERSIST_EVENTS),
    "max_in_flight": 4,
}
"""The defaults that are others where a store saves; what is in flight there are batches."""


def read_options(nested: object, *, stored: bool = False, **given: Any) -> Options:
    """Check all settings of a manager: those given by keyword (None: not given) and those of the nested mapping.

    Raises `OptionError` for an unknown name, a value that cannot be used, or a setting given twice.
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
    """The settings of a mapping shaped like the Node package's, in snake case."""
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
        if name not in known:
            raise OptionError(f"{place} has no setting {name!r:.80}{suggest(str(name), known)}")
    return value


def _interval(value: object) -> int:
    return parse_duration(value, "interval", shortest=SHORTEST_INTERVAL)


def _persist_on(value: object) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OptionError(f"persist_on is a list of names, like ['disconnect', 'shutdown'], not {quote(value)}")
    names = list(value)
    for name in names:
        if name not in PERSIST_EVENTS:
            raise OptionError(f"persist_on has no event {name!r:.80}{suggest(str(name), PERSIST_EVENTS)}")
    return frozenset(names)


def _max_in_flight(value: object) -> int:
    if type(value) is not int or value < 1:
        raise OptionError(f"max_in_flight is a whole number from 1 upwards, not {quote(value)}")
    return value


def _save_timeout(value: object) -> int:
    return parse_duration(value, "save_timeout", shortest=SHORTEST_INTERVAL)


def _before_save(value: object) -> object:
    if not callable(value):
        raise OptionError(f"before_save is a function that is given the session, not {quote(value)}")
    if inspect.iscoroutinefunction(value) or inspect.isgeneratorfunction(value):
        raise OptionError("before_save is a plain function: nothing may come between it and the bytes that are saved")
    return value


def _user_id(value: object) -> object:
    if value is not int and value is not str:
        raise OptionError(f"user_id is the type of all user ids, int or str, not {quote(value)}")
    return value


def _tracking(value: object) -> object:
    if not isinstance(value, str) or value not in TRACKING:
        raise OptionError(f"tracking is 'content' or 'marked', not {quote(value)}{suggest(str(value), TRACKING)}")
    return value


def _debug(value: object) -> object:
    if type(value) is not bool:
        raise OptionError(f"debug is True or False, not {quote(value)}")
    return value


def _log(value: object) -> object:
    missing = [name for name in _LOG_METHODS if not callable(getattr(value, name, None))]
    if missing:
        wanted = ", ".join(_LOG_METHODS)
        raise OptionError(f"log is a logger with the methods {wanted}; {quote(value)} has no {missing[0]}")
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
