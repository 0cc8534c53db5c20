"""Models compiled by the backend, and what its passes did to them."""

import logging

import torch
from support.models.tiny import OPTIONS, randn
from torch import nn

# float32 sums of at most 200 products, in the order of another kernel: 200 · 2^-24 is 1.2e-5 of the largest term.
TOLERANCE = 2e-5


def compiled(model, **options):
    """Compile a model, or a function, with the tests' options and others."""
    return torch.compile(model, backend="dbf", fullgraph=True, options={**OPTIONS, **options})


def rewrites(caplog, model, x, **options):
    """Compile a model anew and return the number of rewrites of each pass."""
    with caplog.at_level(logging.INFO, logger="dbf_compile.compiler.backend"):
        caplog.clear()
        torch.compiler.reset()
        compiled(model, **options)(x)
    (record,) = (record for record in caplog.records if record.msg.startswith("rewrites"))
    return record.args


class Block(nn.Module):
    """A square layer without a bias, and a ReLU."""

    def __init__(self, seed, size=70):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.linear.weight.data = randn(size, size, seed=seed)
        self.requires_grad_(False)

    def forward(self, x):
        return torch.relu(self.linear(x))
