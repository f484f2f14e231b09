"""A failed assertion of the shared tests shows its values, too."""

import pytest

pytest.register_assert_rewrite("stores.conformance")
