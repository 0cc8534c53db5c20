"""Sequential mode: how long blocks are trained. Whole runs are in tests/end_to_end."""

import pytest

from dbf_compile.run.sequential import training_epochs


@pytest.mark.parametrize(
    ("asked", "windows", "epochs"),
    [(None, 64, 2), (None, 24, 4), (None, 40, 3), (None, 500, 1), (None, 0, 4), (3, 500, 3), (0, 64, 0)],
)
def test_many_windows_are_trained_with_in_fewer_epochs_unless_asked_for(asked, windows, epochs):
    assert training_epochs(asked, windows, steps=128) == epochs
