"""Mixtures of experts: the fused weights of transformers, [E, N, K], as linear layers that can be factored.

    y[t] = Σ_j  p[t, j] · down_e( gate( up_e(x[t]) ) )          e = index[t, j], the experts that token t goes to

``up`` is called ``gate_up_proj`` where it holds both halves of a gated unit. An expert's layers have names of their
own, "<experts>.down_proj.3": calibration sees the tokens that are routed to it, and it is factored like any other.

Shape letters: E experts, J experts a token, K hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """The experts of one layer, each made of linear layers, in place of a module of transformers.

    Its forward is left out of compiled graphs: which experts run depends on the data, and only those are read.

    Args:
        fused: a module for which :func:`is_fused` holds. It keeps its activation and its rule for gates, and loses its weights;
            the layers here are views of them.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        for name in WEIGHTS:
            weight = fused._parameters.pop(name, None)
            bias = fused._parameters.pop(f"{name}_bias", None)
            if weight is not None:
                self.add_module(name, nn.ModuleList(_linears(weight, bias, bool(fused.is_transposed))))
        self.fused: Any
        # Not a submodule: transformers would take it for experts whose weights are missing.
        object.__setattr__(self, "fused", fused)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return y [T, K] for hidden states [T, K], the experts of each token [T, J] and their shares [T, J]."""
        ups, downs = (list(each.children()) for name, each in self.named_children() if name in WEIGHTS)
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < len(downs):
                continue  # masked, or an expert of another device
            tokens, places = torch.where(top_k_index == expert)
            inner = ups[expert](hidden_states[tokens])
            inner = self.fused._apply_gate(inner) if self.fused.has_gate else self.fused.act_fn(inner)
            part = downs[expert](inner) * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, part.to(result.dtype))
        return result


def linearize_experts_(model: nn.Module, keep: Collection[str] = ()) -> list[str]:
    """Give every expert of ``model`` linear layers of its own, in place; no weight is copied.

    Args:
        model: of transformers.
        keep: names of modules that stay as they are.

    Returns:
        The names of the modules that were replaced.
    """
    names = [name for name, module in model.named_modules() if is_fused(module) and name not in keep]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(model.get_submodule(name)))
    return names


def is_fused(module: nn.Module) -> bool:
    """Return whether ``module`` is the experts of one layer as transformers 5 keeps them, weights [E, ., .]."""
    down = module._parameters.get("down_proj")
    return (
        down is not None
        and down.dim() == 3
        and all(hasattr(module, name) for name in ("is_transposed", "has_gate", "_apply_gate"))
        and not getattr(module, "has_post_expert_norm", False)
    )


def _linears(weight: Tensor, bias: Tensor | None, transposed: bool) -> Iterator[nn.Linear]:
    for expert in range(weight.shape[0]):
        matrix = weight[expert].T if transposed else weight[expert]
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(matrix.detach(), requires_grad=weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias[expert].detach(), requires_grad=bias.requires_grad)
        yield linear
