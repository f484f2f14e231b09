"""How long the property tests look: HYPOTHESIS_PROFILE names a profile, CAGEY_TEST_EXAMPLES overrides its examples."""

from __future__ import annotations

import os

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
