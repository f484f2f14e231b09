"""The driver of PostgreSQL, which only an extra installs. What lives here: its import. What must not: any use of it."""

from __future__ import annotations

from ...errors import MissingExtraError

try:
    import asyncpg
except ImportError as _error:
    raise MissingExtraError(
        'a store in PostgreSQL needs asyncpg: pip install "cagey-sessions[postgres]"', extra="postgres"
    ) from _error

__all__ = ["asyncpg"]
