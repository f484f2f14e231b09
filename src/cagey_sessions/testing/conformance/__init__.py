"""The tests of `store_conformance`, a room for each part of the contract. What lives here: the check that what they
need is installed. What must not: names; `store_conformance` has those that a test file imports.
"""

from ...errors import MissingExtraError

try:
    import hypothesis as hypothesis
    import pytest as pytest
except ImportError as _error:
    raise MissingExtraError(
        f'the tests for stores need {_error.name}: pip install "cagey-sessions[conformance]"', extra="conformance"
    ) from _error
