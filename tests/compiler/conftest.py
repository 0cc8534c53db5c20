"""What tests of the compiler watch."""

import pytest

from dbf_compile.compression import jobs


@pytest.fixture
def factorized_shapes(monkeypatch):
    """Return a list that collects the shapes of all weights that are factorized, those of the disk cache left out."""
    shapes = []
    original = jobs.factorize_batch

    def factorize_batch(weights, *args, **kwargs):
        shapes.extend(tuple(weight.shape) for weight in weights)
        return original(weights, *args, **kwargs)

    monkeypatch.setattr(jobs, "factorize_batch", factorize_batch)
    return shapes
