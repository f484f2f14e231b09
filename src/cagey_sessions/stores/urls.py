"""`open_store`: makes a store from a URL, for programs and tools that are configured by text.

The parameters that are options of the store are taken out of the URL by their names, which no driver uses itself.
Everything else goes to the driver as it is, byte for byte. No error quotes more of a URL than its scheme, because the
rest may be part of a password.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, NamedTuple
from urllib.parse import unquote

from ..errors import OptionError
from ..options import duration_of, suggest
from ..wording import Hidden, quote
from .contract import Store

__all__ = ["engine_of", "open_store"]


class _Engine(NamedTuple):
    store: str
    in_url: tuple[str, ...]
    """Options of the constructor that may also be parameters of the URL."""
    others: tuple[str, ...] = ()
    """Options that may not."""


ENGINES = {
    "memory": _Engine("MemoryStore", (), ("backing",)),
    "postgres": _Engine("PostgresStore", ("schema", "timeout", "lease"), ("create",)),
    "redis": _Engine("RedisStore", ("prefix", "timeout", "lease")),
    "sqlite": _Engine("SQLiteStore", ("synchronous",), ("read_only",)),
}
SCHEMES = {
    "sqlite": "sqlite",
    "postgresql": "postgres",
    "postgres": "postgres",
    "redis": "redis",
    "rediss": "redis",
    "unix": "redis",
    "redis+sentinel": "redis",
    "rediss+sentinel": "redis",
    "memory": "memory",
}
DURATIONS = ("timeout", "lease")


def open_store(url: str, **options: Any) -> Store:
    """Make the store that a URL names. It is not opened: the manager does that, and nothing is connected to before.

    ``sqlite:///players.db`` is a file in the current folder, and ``sqlite:////var/lib/players.db`` one by its whole
    path, as in SQLAlchemy; the path is not decoded, and ends at a ``?``. ``postgresql://`` and ``postgres://`` are a
    `PostgresStore`, ``redis://``, ``rediss://``, ``unix://`` and ``redis+sentinel://`` a `RedisStore`, and ``memory:``
    is a `MemoryStore`.

    `options` are those of the store's constructor. Some may also be parameters of the URL: ``?synchronous=`` of SQLite,
    ``?schema=`` of PostgreSQL, ``?prefix=`` of Redis, ``?timeout=`` and ``?lease=`` (seconds, or a text such as "10s")
    of both. All other parameters are the driver's.

    Raises `OptionError` for a URL that names no store, an option that the store does not have, or one given twice, and
    `MissingExtraError`, which names the extra, if the driver is not installed.
    """
    engine = ENGINES[engine_of(url)]
    scheme, _, rest = url.partition(":")
    address, mark, query = rest.partition("?")
    _check_names(engine.store, options, (*engine.in_url, *engine.others))
    theirs: list[str] = []
    for parameter in query.split("&") if mark else ():
        name, _, value = parameter.partition("=")
        if name not in engine.in_url:
            theirs.append(parameter)
        elif name in options:
            raise OptionError(f"{name} is given twice; once is enough, in the URL or as an argument")
        else:
            text = Hidden(unquote(value))  # in a URL that is misread it may be part of the password
            options[name] = duration_of(text) if name in DURATIONS else text
    if theirs and scheme in ("memory", "sqlite"):  # there is no driver to take them
        hint = suggest(theirs[0].partition("=")[0], engine.in_url) if engine.in_url else ""
        raise OptionError(f"the URL of a {engine.store} has a parameter that there is not{hint}")
    store: Any = getattr(import_module(__name__.rpartition(".")[0]), engine.store)
    if scheme == "memory":
        made: Store = store(**options)
    elif scheme == "sqlite":
        made = store(_path(address), **options)
    else:
        made = store(f"{scheme}:{address}{'?' if theirs else ''}{'&'.join(theirs)}", **options)
    return made


def engine_of(url: str) -> str:
    """The engine that a URL names: ``"memory"``, ``"postgres"``, ``"redis"`` or ``"sqlite"``. Raises `OptionError`."""
    scheme, _, rest = url.partition(":") if isinstance(url, str) else ("", "", "")
    if not re.fullmatch(r"[a-z][a-z0-9+.-]{0,30}", scheme) or not (rest.startswith("//") or url == "memory:"):
        raise OptionError(f"a store's URL begins with one of {_known()}; the file players.db is sqlite:///players.db")
    if scheme not in SCHEMES:
        hint = suggest(scheme, SCHEMES)
        more = f" Known are {_known()}" if "did you mean" in hint else ""
        raise OptionError(f"there is no store for {scheme}:// URLs{hint}{more}")
    return SCHEMES[scheme]


def _known() -> str:
    return ", ".join("memory:" if scheme == "memory" else f"{scheme}://" for scheme in SCHEMES)


def _check_names(what: str, names: Any, known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise OptionError(f"{what} has no {quote(name)}{suggest(name, known)}")


def _path(address: str) -> str:
    """The path in what follows ``sqlite:`` in a URL. Raises `OptionError` for two slashes, where a host would be."""
    if not address.startswith("///") or address == "///":
        raise OptionError(
            "the URL of a file has three slashes for a path from here (sqlite:///players.db) and four for a whole one "
            "(sqlite:////var/lib/players.db); for users in memory there is memory:"
        )
    return address[3:]
