"""Files with users in them. What lives here: the format of snapshots and of spill files, and the list of users who are
in a spill. What must not: when such a file is written, because that depends on the manager, and a file can be read
without one.
"""

from . import format
from .spill import Plan, Spill, SpillEntry

__all__ = ["Plan", "Spill", "SpillEntry", "format"]
