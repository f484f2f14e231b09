"""How a manager is doing. What lives here: its figures, and a verdict on them for a load balancer. What must not: any
change of what it looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..errors import StoreError
from ..options import SECOND
from ..records import Health, Statistics
from ..saving.to_store import MOST_ROWS
from .server import MOST_NAMED, Lifecycle, name_some

__all__ = ["drain_seconds", "health", "statistics"]

SECONDS_PER_END = 0.0001
"""What the end of one session costs the event loop, about."""


def statistics(life: Lifecycle) -> Statistics:
    counters = life.table.counters
    oldest = life.table.oldest_save
    return Statistics(
        live=counters.created - counters.ended,
        identified=counters.identified,
        ending=len(life.endings.under_way),
        created=counters.created,
        ended=counters.ended,
        pending=counters.due,
        in_flight=counters.in_flight,
        overdue=life.autosave.overdue()[0],
        oldest_unsaved=None if oldest is None else life.autosave.age(oldest),
        saved=counters.saved,
        unchanged=0 if life.store_saver is None else life.store_saver.unchanged + counters.skipped,
        failed=counters.failed,
        fenced=0 if life.store_saver is None else life.store_saver.fenced,
        unsavable=0 if life.store_saver is None else len(life.store_saver.unsavable),
        store=None if life.gateway is None else life.gateway.name,
        store_up=life.gateway is None or not life.gateway.down,
        store_latency=0.0 if life.gateway is None else life.gateway.latency,
        tick_lag=life.autosave.tick_lag / SECOND,
        slice_overruns=life.autosave.slice.overruns,
    )


def drain_seconds(life: Lifecycle) -> float:
    """See `SessionManager.estimate_drain_seconds`."""
    users = life.table.counters.identified
    if life.gateway is None:
        saves, seconds = users, life.autosave.seconds_per_save
    else:
        saves, seconds = -(-users // MOST_ROWS), life.gateway.latency
    return -(-saves // life.options.max_in_flight) * seconds + users * SECONDS_PER_END


def health(life: Lifecycle) -> Health:
    """See `SessionManager.health`."""
    if life.closed:
        return Health("down", "the manager has been destroyed")
    if life.gateway is not None and life.gateway.down_since is not None:
        seconds = (life.clock.now() - life.gateway.down_since) / SECOND
        last = life.gateway.last_error
        why = last if isinstance(last, StoreError) else type(last).__name__  # a driver may name addresses
        return Health("down", f"{life.gateway.name} has been down for {seconds:.1f} s: {why}")
    if life.options.interval is not None and life.table.counters.identified and not life.can_save():
        return Health("down", "nobody listens to 'persist_user_data', and there is no store")
    reasons = list(_troubles(life, statistics(life)))
    return Health("degraded", "; ".join(reasons)) if reasons else Health("ok", "")


def _troubles(life: Lifecycle, found: Statistics) -> Iterator[str]:
    if life.gateway is not None and life.gateway.fails_for_several:
        yield f"{life.gateway.name} fails for several users: {type(life.gateway.last_error).__name__}"
    limit = 2 * (life.options.interval or 0) / SECOND
    if limit and found.oldest_unsaved is not None and found.oldest_unsaved > limit:
        yield f"the oldest unsaved state is {found.oldest_unsaved:.1f} s old"
    if found.overdue:
        yield f"saves that take longer than the interval: {found.overdue}"
    if life.store_saver is not None and found.unsavable:
        some = [session.user_id for session in islice(life.store_saver.unsavable, MOST_NAMED + 1)]
        names = name_some([user_id for user_id in some if user_id is not None])
        yield f"users whose data cannot be saved as it is: {found.unsavable} ({names})"
    if life.drain is not None:
        yield "the manager is being destroyed"
