"""Imports asyncpg, which only an extra installs, in one place: if it is missing, the error says how to get it."""

from __future__ import annotations

from ...errors import MissingExtraError

try:
    import asyncpg
except ImportError as _error:
    raise MissingExtraError(
        'a store in PostgreSQL needs asyncpg: pip install "cagey-sessions[postgres]"', extra="postgres"
    ) from _error

__all__ = ["asyncpg"]
