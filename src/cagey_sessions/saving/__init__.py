"""When and how users are saved. What lives here: the timer, which sessions are saved together, the calls that write
them, what the answers mean, retries, and the callers that wait. What must not: why a session ends, because a save only
has to know whether it is the last one, which is a flag of its row.

Theory of operation
===================

Four machines are coupled here. Each has a table of its stages, and only the code named below moves it.

The save of a session (``core/saves.pxi``; `SAVE_TRANSITIONS`) is a byte in the session's row in the core. It says
whether a save is due, asked for, or under way, and whether the session is being ended. What waits for a save is nothing
but this byte and a place in one of three queues: a store that is down for an hour costs no memory. The core moves it,
when it is told to by

    autosave     time has passed (`advance`), a caller asks (`ask`), a worker takes (`take`), an outcome is known
    sessions     a session gets its user (`identify`), begins to end (`begin_end`), is forgotten (`forget`)

A `Save` (``in_flight.py``) exists only while a caller waits, or while the save is handled alone. There are at most two
for a session: one asked for, one under way. A caller that comes while one is under way waits for the next, because the
bytes of the first are fixed already and may lack the caller's change. A caller waits for its own deadline, not for an
attempt: an attempt that fails hands its callers on to the next one (`Autosave._wait_on`).

A `Row` (``row.py``; its own table) is one save on its way to a store, from the moment its bytes are fixed. A worker
owns it. `verdicts` settles it; `reclaiming` takes it back from the store's "not yours"; `writing` sends it, alone if it
must.

A worker (``workers.py``) is a task that takes what is due, has it saved, and ends when nothing is left. At most
`max_in_flight` exist. Its slot is free again in the same step in which it looks for the last time, for whoever asks in
between must find it.

One save, in order::

    core: due or asked -> take ----------------> fix -------------> acknowledge or fail
    to_store:                   encode, digest       record
    writing:                                               call ->
    verdicts:                                                        verdict

What holds at each step, and why:

- **Bytes are fixed in one synchronous step**, with no call of the program in it but `before_save` and `encode`. So
  what is saved is the data as it was between two steps of the event loop.
- **A version stands for certain bytes.** The same bytes get the same version again, so a call whose outcome is
  unknown can be repeated: the store answers "already" if it was written after all.
- **One save of a session is under way at a time.** So the store never gets two versions in the wrong order, and two
  bits (`MARKED`, `MARKED_BEFORE`) say whether a change is known to be stored.
- **A call that has no answer at its deadline is of unknown outcome.** Where the store fences, the row fails and is
  tried again. Where it does not, the user stays under way until the call returns, because a late write would land on
  top of the next one.
- **What failed never shares a call with what did not.** A call that fails as a whole is made again in halves, until
  the row that it fails for is alone.
- **Flags of the row** say that a session is lost (it is not saved any more), that the next save is final (it releases
  the user in the same write), and that the last one has released. `sessions` sets the first two, `verdicts` the last.
  Nothing here asks why.

Two things go up, by functions handed in when a manager is made: a session has lost its user, and a save of a session
that is being ended is over.

What was tried and dropped:

- **One deadline for all callers of a save.** A caller that joined late was told too early that the save had failed.
- **One timer for all callers, on a grid of 50 ms.** A timer for each caller is less code.
- **Every save by itself, in Python.** It cost about 8 us; so most saves go through the core in batches, and only what
  is special about a save takes it out of its batch.

Considered, and not built: arming everybody anew after an outage, in place of the token bucket in ``pacing.py``. It
would be a walk over all rows in one step, where the bucket costs a subtraction for each save.
"""

from .autosave import Autosave
from .requests import Requests
from .saver import Saver
from .to_listeners import ListenerSaver
from .to_store import MOST_BYTES, MOST_ROWS, StoreSaver

__all__ = ["MOST_BYTES", "MOST_ROWS", "Autosave", "ListenerSaver", "Requests", "Saver", "StoreSaver"]
