"""What the API page needs to know of the compiled core. What lives here: taking docstrings from compiled classes, where
the sources only say which types there are. What must not: any text of them.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe

import cagey_sessions


class CompiledDocstrings(griffe.Extension):
    """Gives what `SessionManager` and `Session` have from the core the docstrings that it has there."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.path != "cagey_sessions":
            return
        for described, compiled in (
            (pkg["manager.SessionManager"], cagey_sessions.SessionManager),
            (pkg["session.Session"], cagey_sessions.Session),
        ):
            for name, member in described.members.items():
                text = inspect.getdoc(getattr(compiled, name, None))
                if member.docstring is None and text and not name.startswith("_"):
                    member.docstring = griffe.Docstring(text, parent=member)
