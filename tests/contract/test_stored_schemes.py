"""Results of every scheme, and of the seed under every policy, against the stored ones (`test_stored.py`)."""

import pytest

from tests.contract import schemes
from tests.contract.test_stored import as_parameters, check

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")


@pytest.mark.parametrize("part", as_parameters(schemes.PARTS))
def test_outputs(part):
    check(part)
