"""What every fenced store has to do, written from the contract in `cagey_sessions.stores.Store` and not from any store.

What lives here: the names that a store's test file imports. `StoreConformance` has one test for each line of the
contract, `StoreMachine` makes random histories. A test file subclasses both: it says how nodes on one backing are made
and, if it is shared, how an owner dies. What must not: the tests (`conformance/`, a room for each part of it).
"""

from __future__ import annotations

from .conformance.base import claim, everything, opened, record, release, save
from .conformance.calls import Calls
from .conformance.claims import Claims
from .conformance.damages import Damages
from .conformance.endings import Endings
from .conformance.histories import StoreMachine, machine_test
from .conformance.saves import Saves
from .conformance.values import Values

__all__ = [
    "StoreConformance",
    "StoreMachine",
    "claim",
    "everything",
    "machine_test",
    "opened",
    "record",
    "release",
    "save",
]


class StoreConformance(Claims, Saves, Endings, Values, Damages, Calls):
    """The contract, line by line. Subclass it as ``Test…`` and override `make`, `bury` where the store is shared, and
    `damage` where somebody else may write to the engine:

        class TestMyStore(StoreConformance):
            @pytest.fixture
            def make(self, tmp_path):
                return lambda: MyStore(tmp_path / "users")

    Its tests are coroutines; each runs on an event loop of its own, whether a plugin for such tests is there or not.
    The store is to be `fenced`. The whole takes some seconds on an engine that answers within a millisecond.
    """
