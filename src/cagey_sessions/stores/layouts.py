"""Refuses a table, a key or a file that is not ours, or that a newer version of the library has made.

How an engine marks one as ours is up to its store: a comment on a table, a key under a prefix, a number in a file.
"""

from __future__ import annotations

from ..errors import StoreLayoutError

__all__ = ["check_layout", "refuse_newer"]


def check_layout(what: str, mark: str, layout: str, *, kind: str, known: int, setting: str) -> None:
    """Raise `StoreLayoutError` unless `mark` is ours and `layout` is a number up to `known`.

    `what` is the name of the thing in the message, `kind` what it is ("table"), and `setting` the option of the store
    that leads to another one.
    """
    if mark != "cagey-sessions" or not layout.isdigit():
        raise StoreLayoutError(
            f"{what} is not a {kind} of cagey-sessions; it is left as it is. Give another {setting}="
        )
    refuse_newer(what, int(layout), known)


def refuse_newer(what: str, layout: int, known: int) -> None:
    """Raise `StoreLayoutError` if a layout is newer than the one that this version knows."""
    if layout > known:
        raise StoreLayoutError(
            f"{what} was made by a newer version of cagey-sessions (layout {layout}, and this one knows {known}); "
            "it is left as it is"
        )
