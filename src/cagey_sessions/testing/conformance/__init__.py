"""The tests of `store_conformance`, a module for each part of the contract. Import them from there, not from here.

This file only checks that pytest and Hypothesis are installed.
"""

from ...errors import MissingExtraError

try:
    import hypothesis as hypothesis
    import pytest as pytest
except ImportError as _error:
    raise MissingExtraError(
        f'the tests for stores need {_error.name}: pip install "cagey-sessions[conformance]"', extra="conformance"
    ) from _error
