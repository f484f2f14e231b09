"""What the API page needs to know that the sources do not say. What lives here: what compiled classes have at run time
or in the stub alone, and what is not for a reader. What must not: any text of a docstring.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

import cagey_sessions

STUB = Path(cagey_sessions.__file__).with_name("_core.pyi")
SIGNATURE = re.compile(r"(async )?\w+\(.*\n\n")
"""What the docstring of a compiled call begins with, for `help`. The site has it from the stub."""


class Compiled(griffe.Extension):
    """Gives what `SessionManager` and `Session` have from the core its docstrings, and says which calls are awaited."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.path != "cagey_sessions":
            return
        for described, compiled in (
            (pkg["sessions.manager.SessionManager"], cagey_sessions.SessionManager),
            (pkg["sessions.session.Session"], cagey_sessions.Session),
        ):
            for name, member in described.members.items():
                text = inspect.getdoc(getattr(compiled, name, None))
                if member.docstring is None and text and not name.startswith("_"):
                    member.docstring = griffe.Docstring(without_signature(text), parent=member)
        core, stub = pkg["_core.SessionCore"], griffe.visit("_core", STUB, STUB.read_text("utf-8"))["SessionCore"]
        core.members.pop("__init__", None)  # a manager makes sessions
        for name, member in core.members.items():
            if name in stub.members and "async" in stub[name].labels:
                member.labels.add("async")
            if member.docstring:
                member.docstring.value = without_signature(member.docstring.value)


def without_signature(text: str) -> str:
    found = SIGNATURE.match(text)
    return text[found.end() :] if found else text


class Listeners(griffe.Extension):
    """Shows `on` and `once` with one signature for each kind of listener, that of a plain call.

    As decorators they take the listener later, and what is known of it then is a type variable.
    """

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        for name in ("on", "once"):
            if name in cls.members and cls[name].is_function and cls[name].overloads:
                cls[name].overloads = [each for each in cls[name].overloads if "listener" in each.parameters]


class Fields(griffe.Extension):
    """Leaves out how a record declares a field: to a reader `field(repr=False)` looks like a default."""

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if str(attr.value).startswith("field("):
            attr.value = None
