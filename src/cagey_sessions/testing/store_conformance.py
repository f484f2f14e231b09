"""Tests of the store contract, for the test file of a store: written from `cagey_sessions.stores.Store`, not a store.

`StoreConformance` has one test for each line of the contract, and `StoreMachine` compares the store with a dict over
random histories. A test file subclasses both: it says how to make stores on one backing and, if the store is shared,
how an owner dies. The tests themselves are in ``conformance/``, a module for each part of the contract.
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
    """The contract, line by line. Subclass it as ``Test…`` and override `make`, `bury` if the store is shared, and
    `damage` if other programs can write to the engine:

        class TestMyStore(StoreConformance):
            @pytest.fixture
            def make(self, tmp_path):
                return lambda: MyStore(tmp_path / "users")

    Its tests are coroutines; each runs on an event loop of its own, with or without a plugin for such tests. The store
    has to be `fenced`. All tests together take some seconds on an engine that answers within a millisecond.
    """
