"""The place for the players of a demo: a new file, or a schema or a prefix of its own on a server; and its removal."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...stores import open_store
from ...stores.urls import engine_of

__all__ = ["Place", "place_of"]

LEASE = "3s"
"""The lease of the demo's servers. It is short, because the demo waits for it after each kill."""


@dataclass(frozen=True)
class Place:
    """The URL for the server and for the reader, and the folder for the bots' ledgers."""

    url: str
    folder: Path
    name: str
    is_temporary: bool
    """Whether everything is removed at the end, if nothing was lost."""

    def ledgers(self, moment: str) -> Path:
        return self.folder / f"{self.name}.{moment}.json"

    def __str__(self) -> str:
        if self.url.startswith("sqlite:"):
            return str(self.folder)
        return f"{self.folder} and under {self.url.rpartition('?')[2].partition('&')[0]} on the server"

    def remove(self) -> None:
        """Remove the place, if it is temporary."""
        if self.is_temporary:
            shutil.rmtree(self.folder)
            _remove_from_server(self.url)


def place_of(store: str | None) -> Place:
    """Make an empty place: in a temporary folder, in a new file, or on the server of a URL.

    Raises `OptionError`, and `MissingExtraError` if the driver is not installed.
    """
    if store is not None and "://" not in store:
        file = Path(store)
        return Place(f"sqlite:///{file}", file.parent, file.name, is_temporary=False)
    url = ""
    if store is not None:
        kind = "schema=cagey_demo_" if engine_of(store) == "postgres" else "prefix=cagey-demo-"
        url = f"{store}{'&' if '?' in store else '?'}{kind}{secrets.token_hex(6)}&lease={LEASE}&timeout={LEASE}"
        open_store(url)  # raises now if the URL or the driver is not usable
    folder = Path(tempfile.mkdtemp(prefix="cagey-sessions-demo-"))
    return Place(url or f"sqlite:///{folder / 'players.db'}", folder, "players", is_temporary=True)


def _remove_from_server(url: str) -> None:
    where, _, own = url.partition("?")
    kind, _, name = own.partition("&")[0].partition("=")
    if kind == "schema":
        asyncio.run(_drop(where, name))
    elif kind == "prefix":
        import redis  # noqa: PLC0415 - only where it is the server

        with redis.Redis.from_url(where) as client:
            for key in client.scan_iter(f"{name}*", count=1000):
                client.unlink(key)


async def _drop(url: str, schema: str) -> None:
    import asyncpg  # noqa: PLC0415 - only where it is the server

    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')
    finally:
        await connection.close()
