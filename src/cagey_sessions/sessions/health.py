"""The health of a manager: its statistics, and a verdict on them for a load balancer. Changes nothing.

See also `Health` and `Statistics` in `records`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..errors import StoreError
from ..options import SECOND
from ..records import Health, Statistics
from ..saving import MOST_ROWS
from ..wording import MOST_NAMED, name_some
from .ending import Endings
from .server import Server

__all__ = ["drain_seconds", "health", "statistics"]

SECONDS_PER_END = 0.0001
"""About how long the event loop takes for the end of one session."""


def statistics(server: Server, endings: Endings) -> Statistics:
    counters = server.table.counters
    oldest = server.table.oldest_save
    return Statistics(
        live=counters.created - counters.ended,
        identified=counters.identified,
        ending=len(endings.under_way),
        created=counters.created,
        ended=counters.ended,
        pending=counters.due,
        in_flight=counters.in_flight,
        overdue=server.autosave.overdue()[0],
        oldest_unsaved=None if oldest is None else server.autosave.age(oldest),
        saved=counters.saved,
        unchanged=server.saver.unchanged + counters.skipped,
        failed=counters.failed,
        fenced=server.saver.fenced,
        unsavable=len(server.saver.unsavable),
        store=None if server.link is None else server.link.name,
        store_up=server.link is None or not server.link.down,
        store_latency=0.0 if server.link is None else server.link.latency,
        tick_lag=server.autosave.tick_lag / SECOND,
        slice_overruns=server.loop.overruns,
    )


def drain_seconds(server: Server) -> float:
    """See `SessionManager.estimate_drain_seconds`."""
    users = server.table.counters.identified
    if server.link is None:
        saves, seconds = users, server.autosave.seconds_per_save
    else:
        saves, seconds = -(-users // MOST_ROWS), server.link.latency
    return -(-saves // server.options.max_in_flight) * seconds + users * SECONDS_PER_END


def health(server: Server, endings: Endings) -> Health:
    """See `SessionManager.health`."""
    if server.closed:
        return Health("down", "the manager has been destroyed")
    if server.link is not None and server.link.down_since is not None:
        seconds = (server.clock.now() - server.link.down_since) / SECOND
        last = server.link.last_error
        # our own errors name nothing private; the text of a driver's exception may contain an address or a password
        why = last if isinstance(last, StoreError) else type(last).__name__
        return Health("down", f"{server.link.name} has been down for {seconds:.1f} s: {why}")
    if server.options.interval is not None and server.table.counters.identified and not server.saver.can_save():
        return Health("down", "nobody listens to 'persist_user_data', and there is no store")
    reasons = list(_troubles(server, endings, statistics(server, endings)))
    return Health("degraded", "; ".join(reasons)) if reasons else Health("ok", "")


def _troubles(server: Server, endings: Endings, found: Statistics) -> Iterator[str]:
    if server.link is not None and server.link.fails_for_several:
        yield f"{server.link.name} fails for several users: {type(server.link.last_error).__name__}"
    # up to one interval old is normal, and up to two while saves are retried
    limit = 2 * (server.options.interval or 0) / SECOND
    if limit and found.oldest_unsaved is not None and found.oldest_unsaved > limit:
        yield f"the oldest unsaved state is {found.oldest_unsaved:.1f} s old"
    if found.overdue:
        yield f"saves that take longer than the interval: {found.overdue}"
    if found.unsavable:
        some = [session.user_id for session in islice(server.saver.unsavable, MOST_NAMED + 1)]
        names = name_some([user_id for user_id in some if user_id is not None])
        yield f"users whose data cannot be saved as it is: {found.unsavable} ({names})"
    if endings.drain is not None:
        yield "the manager is being destroyed"
