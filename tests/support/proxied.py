"""The stores of shared engines behind a proxy, and what a network may do to them. What must not be here: tests."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from cagey_sessions import StoreUnavailableError
from cagey_sessions.stores import PostgresStore, RedisStore
from cagey_sessions.testing import FaultProxy
from support import POSTGRES, REDIS, needs_server

TIMEOUT = 0.5
"""Seconds that the engine has for a call."""
BOUND = 10
"""Seconds after which a call, or the return of the engine, counts as not noticed. Either takes one or two."""
DROP = """DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT nspname FROM pg_namespace WHERE starts_with(nspname, '%s') LOOP
        EXECUTE format('DROP SCHEMA %%I CASCADE', name);
    END LOOP;
END $$"""


@dataclass
class Adapter:
    kind: str
    mine: str
    """The schema, or the beginning of the prefix."""

    def part(self, name):
        """The same engine, with users of its own."""
        return Adapter(self.kind, f"{self.mine}_{name}")

    def proxy(self):
        url = urlsplit(POSTGRES if self.kind == "postgres" else REDIS)
        return FaultProxy(url.hostname or "127.0.0.1", url.port or (5432 if self.kind == "postgres" else 6379))

    def url(self, proxy=None):
        url = POSTGRES if self.kind == "postgres" else REDIS
        if proxy is None:
            return url
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{user}{at}{proxy.host}:{proxy.port}").geturl()
        return f"{url}?sslmode=disable" if self.kind == "postgres" else url

    def store(self, proxy=None, timeout=TIMEOUT, **settings):
        if self.kind == "postgres":
            return PostgresStore(self.url(proxy), schema=self.mine, timeout=timeout, **settings)
        return RedisStore(self.url(proxy), prefix=f"{self.mine}:", timeout=timeout, **settings)


def adapters(*kinds):
    return [pytest.param(kind, marks=needs_server(POSTGRES if kind == "postgres" else REDIS)) for kind in kinds]


async def until_it_works(call):
    """Repeat a call until the engine answers: what it answers."""
    async with asyncio.timeout(BOUND):
        while True:
            try:
                return await call()
            except StoreUnavailableError:
                await asyncio.sleep(0.01)


async def stall(proxy):
    proxy.stall()


async def drip(proxy):
    proxy.bytes_per_second = 10


async def half_close_and_stall(proxy):
    proxy.half_close()
    proxy.stall()


async def refuse(proxy):
    proxy.cut()
    await proxy.refuse()


async def cut_and_stall(proxy):
    proxy.cut()
    proxy.stall()


@contextlib.asynccontextmanager
async def under(fault, proxy):
    """For the length of a block; connections that suffered from it are lost."""
    await fault(proxy)
    try:
        yield
    finally:
        proxy.resume()
        proxy.latency = 0
        proxy.bytes_per_second = None
        proxy.cut()
        await proxy.accept()


def all_unavailable(answers):
    return all(isinstance(each, StoreUnavailableError) for each in answers)
