"""When and how users are saved. What lives here: the timer, which sessions are saved together, the calls that write
them, what the answers mean, retries, and the callers that wait. What must not: why a session ends, because a save only
has to know whether it is the last one, which is a flag of its row.
"""

from .autosave import Autosave
from .requests import Requests
from .saver import Saver
from .to_listeners import ListenerSaver
from .to_store import MOST_BYTES, MOST_ROWS, StoreSaver

__all__ = ["MOST_BYTES", "MOST_ROWS", "Autosave", "ListenerSaver", "Requests", "Saver", "StoreSaver"]
