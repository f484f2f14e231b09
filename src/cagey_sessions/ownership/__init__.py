"""Whose a user is. What lives here: the turn that calls of this process take with a user, claims in the store, and
releases. What must not: the data of users, because a claim may be granted late, to a process that no longer wants it.
"""

from .claims import CLAIMED_AT_A_TIME, Claims
from .turns import Turns

__all__ = ["CLAIMED_AT_A_TIME", "Claims", "Turns"]
