"""Where user data is kept. What lives here: the names of the stores. What must not: any of their code."""

from .base import Claim, Outcome, Record, Store, Verdict

__all__ = ["Claim", "Outcome", "Record", "Store", "Verdict"]
