"""How messages show a value that the program gave.

All messages use `quote`, because a value may be anything: its own `repr` may raise, may never end, or may contain user
data or a password. So only values of Python's plain types are shown; of all others, only the type.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

__all__ = ["MOST_NAMED", "MOST_SHOWN", "Hidden", "kind_name", "name_some", "quote"]

MOST_SHOWN = 80
"""The most characters of a value that a message shows."""
MOST_NAMED = 10
"""The most users that a message names."""
WIDEST = 256
"""The most bits of an int that is shown: its digits fit into `MOST_SHOWN`."""

_SHORT = (bool, float, timedelta, type(None))
_name_of = type.__dict__["__name__"].__get__  # a metaclass may define `__name__` itself


class Hidden(str):
    """A text that no message shows, because it may contain a secret, such as a part of a URL."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "what is given"


def quote(value: Any) -> str:
    """A value as messages show it, in at most 80 characters. Never raises, runs no code of the value, and is O(1)."""
    kind = type(value)
    # The methods are called on the built-in type, not on the value: a subclass may override them.
    if kind is Hidden:
        text = repr(value)
    elif issubclass(kind, str):
        text = repr(str.__getitem__(value, slice(MOST_SHOWN)))
    elif issubclass(kind, bytes):
        text = repr(bytes.__getitem__(value, slice(MOST_SHOWN)))
    elif any(kind is short for short in _SHORT):
        text = repr(value)
    elif issubclass(kind, int):
        width = int.bit_length(value)
        text = int.__repr__(value) if width <= WIDEST else f"an int of {width:,} bits"
    elif issubclass(kind, type):
        text = type.__repr__(value)
    else:
        text = kind_name(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…"


def name_some(user_ids: list[int | str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(map(quote, user_ids[:MOST_NAMED])) + (", ..." if len(user_ids) > MOST_NAMED else "")


def kind_name(value: object) -> str:
    """The name of a value's type with its article, such as "an int"."""
    name = _name_of(type(value))[:MOST_SHOWN]
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"
