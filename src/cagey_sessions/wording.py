"""Values in messages. What lives here: how a value that somebody has given is shown. What must not: any check of it.

There is this one way, because values may be anything. A `repr` that is somebody's own may raise, may never end, or may
hold what no message is to hold; so only Python's plain types show what they hold, and all others show their type.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

__all__ = ["MOST_NAMED", "MOST_SHOWN", "Hidden", "kind_name", "name_some", "quote"]

MOST_SHOWN = 80
"""Characters of a value that is shown."""
MOST_NAMED = 10
"""How many users a message names."""
WIDEST = 256
"""Bits of an int that is shown: its digits fit."""

_SHORT = (bool, float, timedelta, type(None))
_name_of = type.__dict__["__name__"].__get__  # a metaclass may have ideas of its own


class Hidden(str):
    """A text of which no message shows anything, because a secret may be in it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "what is given"


def quote(value: Any) -> str:
    """A value as messages show it, in at most 80 characters: never raises, runs no code of the value's, and is O(1)."""
    kind = type(value)
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
    """The type of a value, with its article."""
    name = _name_of(type(value))[:MOST_SHOWN]
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"
