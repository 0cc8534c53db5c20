"""Batches that the tests of calibration share."""

import pytest
from support.models.calibrated import net_batches


@pytest.fixture
def batches():
    """Batches for ``Net``."""
    return net_batches()
