"""How long the property tests look: HYPOTHESIS_PROFILE names a profile, CAGEY_TEST_EXAMPLES overrides its examples.

And what was raised where nobody could catch it, which no test of the core may bring about.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings


def _register(name: str, examples: int, steps: int) -> None:
    settings.register_profile(
        name,
        max_examples=int(os.environ.get("CAGEY_TEST_EXAMPLES", examples)),
        stateful_step_count=steps,
        derandomize=False,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


_register("default", examples=250, steps=50)
_register("nightly", examples=2000, steps=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was raised where nobody could catch it; nothing may be."""
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(repr(unraisable.exc_value)))
    yield seen
    gc.collect()
    assert seen == []
