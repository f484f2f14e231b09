"""Whether the list of faults is still about these sources. What must not be here: running them (`make mutants`)."""

from __future__ import annotations

from pathlib import Path

import pytest

import cagey_sessions
from mutants.faults import FAULTS

SOURCES = Path(cagey_sessions.__file__).parent
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_a_fault_is_there_once(fault):
    assert (SOURCES / fault.file).read_text(encoding="utf-8").count(fault.before) == 1
    assert fault.before != fault.after


def test_no_two_faults_have_one_name():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25


def test_the_suites_of_a_fault_are_there():
    assert all((ROOT / suite).exists() for fault in FAULTS for suite in fault.tests)
