"""Whose a place in an engine is. What lives here: refusing one that is not ours, or that a newer version has made. What
must not: how an engine is marked as ours.
"""

from __future__ import annotations

from ..errors import StoreLayoutError

__all__ = ["check_layout", "refuse_newer"]


def check_layout(what: str, mark: str, layout: str, *, kind: str, known: int, setting: str) -> None:
    """Refuse `what`, a `kind` of place, unless its mark is ours and its layout one that is known."""
    if mark != "cagey-sessions" or not layout.isdigit():
        raise StoreLayoutError(
            f"{what} is not a {kind} of cagey-sessions; it is left as it is. Give another {setting}="
        )
    refuse_newer(what, int(layout), known)


def refuse_newer(what: str, layout: int, known: int) -> None:
    if layout > known:
        raise StoreLayoutError(
            f"{what} was made by a newer version of cagey-sessions (layout {layout}, and this one knows {known}); "
            "it is left as it is"
        )
