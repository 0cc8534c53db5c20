"""Averages of models by torch: of words of bits there is no mean, so an average has those of the model.

Importing this file wraps ``torch.optim.swa_utils.AveragedModel.update_parameters``, which takes the mean of every parameter and
asks none of them.
"""

from __future__ import annotations

from functools import wraps

from torch import nn
from torch.optim.swa_utils import AveragedModel

from dbf_compile.stand_in import WithoutWeight

_update = AveragedModel.update_parameters


@wraps(_update)
def update_parameters(self: AveragedModel, model: nn.Module) -> None:
    """Average the parameters of a model, and copy those of its factored layers and tables that are words of bits."""
    _update(self, model)
    layers = (layer for layer in self.module.modules() if isinstance(layer, WithoutWeight))
    words = {id(p) for layer in layers for p in layer.parameters(recurse=False) if not p.is_floating_point()}
    if words:
        for mean, value in zip(self.module.parameters(), model.parameters(), strict=True):
            if id(mean) in words:
                mean.detach().copy_(value.detach())


AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]
