"""Caches with a time to live, for those who would keep sessions in one. What lives here: putting, getting and expiring
with each, in its own words and at its best. What must not: measuring.

None has users, events, saves, or a taken key; a value is whatever one puts there. cachebox has one time to live for all
entries; cachetools too; moka and theine have one for each.

A rival is made with the number of entries, and must not evict. `put` and `get` are loops over keys; `expire` removes
everything that `put` has put in: by expiry where the cache can be told to, one by one where it only does so by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

__all__ = ["RIVALS", "Cachebox", "Cachetools", "Moka", "Theine"]

TTL = 3600


class Cache:
    """What all of them say alike."""

    _cache: Any

    def get(self, keys: Sequence[str]) -> None:
        get = self._cache.get
        for key in keys:
            get(key)

    def before_expire(self, keys: Sequence[str], value: Any) -> None:
        pass

    def close(self) -> None:
        assert len(self._cache) == 0


class Cachebox(Cache):
    def __init__(self, count: int) -> None:
        from cachebox import TTLCache  # noqa: PLC0415 - each is there or not

        self._make = TTLCache
        self._cache = TTLCache(count, TTL)

    def put(self, keys: Sequence[str], value: Any) -> None:
        insert = self._cache.insert
        for key in keys:
            insert(key, value)

    def before_expire(self, keys: Sequence[str], value: Any) -> None:
        """It goes by the wall clock: the same entries with a short time to live."""
        self._cache = self._make(len(keys), 0.5)
        self.put(keys, value)
        time.sleep(0.55)

    def expire(self, keys: Sequence[str]) -> None:
        self._cache.expire()


class Cachetools(Cache):
    def __init__(self, count: int) -> None:
        from cachetools import TTLCache  # noqa: PLC0415

        self._cache = TTLCache(count, TTL)

    def put(self, keys: Sequence[str], value: Any) -> None:
        cache = self._cache
        for key in keys:
            cache[key] = value

    def expire(self, keys: Sequence[str]) -> None:
        self._cache.expire(time.monotonic() + 2 * TTL)


class Moka(Cache):
    def __init__(self, count: int) -> None:
        from moka_py import Moka as MokaCache  # noqa: PLC0415

        self._cache = MokaCache(2 * count, ttl=TTL)

    def put(self, keys: Sequence[str], value: Any) -> None:
        put = self._cache.set
        for key in keys:
            put(key, value)

    def expire(self, keys: Sequence[str]) -> None:
        remove = self._cache.remove
        for key in keys:
            remove(key)

    def close(self) -> None:
        pass


class Theine(Cache):
    """A part of its work is done in a thread of its own, which is not counted."""

    def __init__(self, count: int) -> None:
        from theine import Cache as TheineCache  # noqa: PLC0415

        self._cache = TheineCache(2 * count)

    def put(self, keys: Sequence[str], value: Any) -> None:
        put, ttl = self._cache.set, timedelta(seconds=TTL)
        for key in keys:
            put(key, value, ttl)

    def expire(self, keys: Sequence[str]) -> None:
        delete = self._cache.delete
        for key in keys:
            delete(key)

    def close(self) -> None:
        self._cache.close()


RIVALS: dict[str, Any] = {"cachebox": Cachebox, "cachetools": Cachetools, "moka_py": Moka, "theine": Theine}
"""By the name of the module."""
