"""Sequential mode: what is measured before the blocks, and how long they are trained. Whole runs are in tests/end_to_end."""

import pytest
from support.models.pretrained import FAST, text_of, tiny_folder

import dbf_compile
from dbf_compile.run import steps
from dbf_compile.run.sequential import training_epochs


@pytest.mark.parametrize(
    ("asked", "windows", "epochs"),
    [(None, 64, 2), (None, 24, 4), (None, 40, 3), (None, 500, 1), (None, 0, 4), (3, 500, 3), (0, 64, 0)],
)
def test_many_windows_are_trained_with_in_fewer_epochs_unless_asked_for(asked, windows, epochs):
    assert training_epochs(asked, windows, steps=128) == epochs


@pytest.mark.parametrize(("curvature", "measured"), [("diagonal", 64), ("kronecker", 70)])
def test_moments_of_vectors_are_measured_with_few_windows_before_the_blocks(
    curvature, measured, tmp_path, monkeypatch
):
    pytest.importorskip("transformers")
    windows = []

    def calibrate(model, batches, **_):
        windows.extend(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "calibrate", calibrate)
    dense = tiny_folder(tmp_path / "dense", layers=1)
    options = {**FAST, "length": 4, "windows": 70, "data": text_of(dense), "curvature": curvature}
    with pytest.raises(KeyboardInterrupt):
        dbf_compile.compress(dense, tmp_path / "made", mode="sequential", **options)
    assert len(windows) == measured
