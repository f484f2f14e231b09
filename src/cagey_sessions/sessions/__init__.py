"""A session from beginning to end. What lives here: the public manager and session, beginnings, logins, ends, the end
of everybody, and users who have no session. What must not: how a save is made, because with a store and with listeners
the steps of a session are the same.
"""

from .loading import NO_DEFAULT
from .manager import SessionManager, create
from .session import Session
from .snapshot import read_snapshot

__all__ = ["NO_DEFAULT", "Session", "SessionManager", "create", "read_snapshot"]
