"""What listeners hear. What lives here: listeners and how they are called, errors that no caller waits for, and the
detection of waits that would never end. What must not: what an event is for, because a listener may be called for any
of them, and may itself call anything.
"""

from . import deadlocks, reports
from .listeners import Listener, Listeners, ManagerEvent, SessionEvent, listener_error
from .reports import Reports

__all__ = [
    "Listener",
    "Listeners",
    "ManagerEvent",
    "Reports",
    "SessionEvent",
    "deadlocks",
    "listener_error",
    "reports",
]
