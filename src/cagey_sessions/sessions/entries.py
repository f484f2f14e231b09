"""Makes the entry of a user for a file: for a snapshot, or for the spill.

See also `snapshot`, `spilling`, and `files.format`.
"""

from __future__ import annotations

import time

from .._core import SessionCore
from ..errors import UnsavableError
from ..files import SpillEntry
from ..records import SnapshotEntry
from .server import Server

__all__ = ["collect_unsaved", "entry_of", "spill_entry_of"]


def entry_of(server: Server, session: SessionCore) -> SnapshotEntry:
    """The entry of a user as they are now. Raises `UnsavableError`, or `EncodingError` if there is no store."""
    assert session.user_id is not None
    schema = server.encoding.schema
    if server.store_saver is None:
        body = server.encoding.dump(session.user_data)
        return SnapshotEntry(session.user_id, session.key, 0, "", 0, schema, body)
    body = server.store_saver.body(session)
    _, acknowledged = server.table.versions(session)
    epoch = server.table.epoch(session)
    return SnapshotEntry(session.user_id, session.key, epoch, server.owner, acknowledged, schema, body)


def spill_entry_of(server: Server, session: SessionCore) -> SpillEntry:
    """The same for the spill, with all that the store may have of the user. Raises `UnsavableError`."""
    assert server.store_saver is not None
    entry = entry_of(server, session)
    return SpillEntry(
        entry.user_id,
        None,  # the key is of no use to another process, and may be a secret
        entry.epoch,
        entry.owner,
        entry.version,
        entry.schema,
        entry.body,
        time.time(),
        server.identity.digest_key,
        server.store_saver.known_stored(session),
    )


def collect_unsaved(server: Server, session: SessionCore) -> bool:
    """Have a user written to the spill file with the next write of it.

    False if there is no spill file, or if the data cannot be encoded.
    """
    if server.spill is None:
        return False
    try:
        server.spill.collect(spill_entry_of(server, session))
    except UnsavableError:
        return False
    return True
