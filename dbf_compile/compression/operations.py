"""Operations that one token costs in a model: additions, look-ups and multiplications of its linear layers.

Every layer is taken to be called once for a token, and an expert of a mixture by the share of tokens that reach it. Attention,
norms and activation functions are left out: they are the same in the dense model. :mod:`dbf_compile.formulas` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

from torch import nn

from dbf_compile import formulas
from dbf_compile.linear import DoubleBinaryLinear, is_conv1d
from dbf_compile.tables import QuantizedEmbedding, QuantizedLinear

# What blocks of mixtures, their routers and configurations call the number of experts that a token goes to.
_EXPERTS_A_TOKEN = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)


@dataclass(frozen=True)
class Operations:
    """Numbers of operations.

    Attributes:
        additions: of the products as they are written; a sign adds or subtracts.
        lookups: of sums of four, with which the kernels replace additions.
        lookup_additions: that remain with them, the tables included; all of them where nothing is looked up.
        multiplications: also by scales.
    """

    additions: int = 0
    lookups: int = 0
    lookup_additions: int = 0
    multiplications: int = 0

    def __add__(self, other: Operations) -> Operations:
        mine, others = asdict(self), asdict(other)
        return Operations(**{name: mine[name] + others[name] for name in mine})


def factored_operations(in_features: int, mid_features: int, out_features: int) -> Operations:
    """Return what a token costs in a factored layer, or in several that share their first stage.

    Args:
        in_features: K.
        mid_features: R.
        out_features: N, of all of them together.
    """
    sizes = (in_features, mid_features, out_features)
    return Operations(
        formulas.factored_additions(*sizes),
        formulas.factored_lookups(*sizes),
        formulas.lookup_additions(*sizes),
        formulas.factored_multiplications(*sizes),
    )


def dense_operations(in_features: int, out_features: int) -> Operations:
    """Return what a token costs in a dense layer."""
    additions = formulas.dense_additions(in_features, out_features)
    return Operations(additions, 0, additions, formulas.dense_multiplications(in_features, out_features))


def quantized_operations(layer: QuantizedLinear | QuantizedEmbedding) -> Operations:
    """Return what a token costs in a layer that reads a table of quantized rows."""
    if isinstance(layer, QuantizedEmbedding):
        return Operations(multiplications=formulas.row_reading_multiplications(layer.embedding_dim))
    sizes = (layer.in_features, layer.out_features, layer.form.groups(layer.in_features))
    additions = formulas.rows_additions(*sizes)
    return Operations(additions, 0, additions, formulas.rows_multiplications(*sizes))


@dataclass(frozen=True)
class ModelOperations:
    """What one token costs in a model.

    Attributes:
        factored: in its factored layers.
        quantized: in its embeddings and heads that are tables of quantized rows.
        dense: in its dense linear layers, routers and heads among them.
        dense_model: in all of them, were they dense.
        experts: of each mixture that tokens reach, such as "2 of 8".
        uncounted: weights of matrices that belong to no linear layer or embedding, such as those of convolutions.
    """

    factored: Operations
    quantized: Operations
    dense: Operations
    dense_model: Operations
    experts: tuple[str, ...]
    uncounted: int

    @property
    def total(self) -> Operations:
        """In all of its layers."""
        return self.factored + self.quantized + self.dense

    def summary(self) -> dict[str, Any]:
        """Return the counts as dictionaries, as a report holds them."""
        kinds = ("factored", "quantized", "dense", "total", "dense_model")
        counts = {kind: asdict(getattr(self, kind)) for kind in kinds}
        return {**counts, "experts": list(self.experts), "uncounted_weights": self.uncounted}


def count_operations(model: nn.Module) -> ModelOperations:
    """Return what one token costs in a model.

    Args:
        model: dense, or with factored layers; it may be on the meta device.
    """
    reach, uncounted = _Reach(model), 0
    factored: list[_Cost] = []
    quantized: list[_Cost] = []
    dense: list[_Cost] = []
    dense_model: list[_Cost] = []
    for names, layers in shared_first_stages(model):
        first, share = layers[0], reach.share(names[0])
        out_features = sum(layer.out_features for layer in layers)
        factored.append((share, factored_operations(first.in_features, first.mid_features, out_features)))
        dense_model.append((share, dense_operations(first.in_features, out_features)))
    for name, module in model.named_modules():
        if isinstance(module, DoubleBinaryLinear):
            continue
        share = reach.share(name)
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            quantized.append((share, quantized_operations(module)))
            if isinstance(module, QuantizedLinear):
                dense_model.append((share, dense_operations(module.in_features, module.out_features)))
            continue
        shapes = list(_dense_shapes(module))
        dense += [(share * copies, dense_operations(*sizes)) for copies, *sizes in shapes]
        if not shapes and not isinstance(module, nn.Embedding):
            own = module.parameters(recurse=False)
            uncounted += sum(parameter.numel() for parameter in own if parameter.dim() > 1)
    return ModelOperations(
        factored=_mean(factored),
        quantized=_mean(quantized),
        dense=_mean(dense),
        dense_model=_mean(dense_model + dense),
        experts=reach.experts(),
        uncounted=uncounted,
    )


_Cost = tuple[Fraction, Operations]  # the share of tokens that reaches it; more than 1 for several such


def _mean(costs: list[_Cost]) -> Operations:
    """Return what a token costs on average."""
    names = (item.name for item in fields(Operations))
    sums = {name: sum((share * getattr(cost, name) for share, cost in costs), Fraction(0)) for name in names}
    return Operations(**{name: round(count) for name, count in sums.items()})


def shared_first_stages(model: nn.Module) -> Iterator[tuple[list[str], list[DoubleBinaryLinear]]]:
    """Yield the names of factored layers, and these, by the first stage that they share, in the order of the model."""
    groups: dict[int, tuple[list[str], list[DoubleBinaryLinear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, DoubleBinaryLinear):
            names, layers = groups.setdefault(id(module.signs_in), ([], []))
            names.append(name)
            layers.append(module)
    yield from groups.values()


def _dense_shapes(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Yield (number of matrices, K, N) for the weights that a module multiplies by."""
    weight = module._parameters.get("weight")
    if is_conv1d(module):
        yield 1, weight.shape[0], weight.shape[1]  # type: ignore[union-attr]
    elif weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
        yield 1, weight.shape[1], weight.shape[0]  # routers of mixtures are no nn.Linear
    elif "down_proj" in module._parameters:  # experts in one tensor
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 3:
                number, *sizes = parameter.shape
                in_features, out_features = (
                    sizes if getattr(module, "is_transposed", False) else reversed(sizes)
                )
                yield number, in_features, out_features


class _Reach:
    """The share of tokens that reaches each module: below 1 for the experts of a mixture.

    Args:
        model: in which modules called "experts" are those of mixtures.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mixtures: dict[str, tuple[int | None, int]] = {}
        for name, module in model.named_modules():
            parent, _, last = name.rpartition(".")
            number = _number_of_experts(module) if last == "experts" else 0
            if number:
                self._mixtures[name] = (_experts_a_token(model, model.get_submodule(parent), number), number)

    def share(self, name: str) -> Fraction:
        """Return the share of tokens that reaches a module; 1 for all where it is not known."""
        for mixture, (reached, number) in self._mixtures.items():
            if name == mixture or name.startswith(f"{mixture}."):
                return Fraction(reached or number, number)
        return Fraction(1)

    def experts(self) -> tuple[str, ...]:
        """Return what is known of the mixtures, each kind once."""
        texts = (
            f"{reached} of {number}" if reached else f"all of {number}, as it is not known how many"
            for reached, number in self._mixtures.values()
        )
        return tuple(dict.fromkeys(texts))


def _number_of_experts(module: nn.Module) -> int:
    """Return the number of experts below a module of theirs, 0 where it holds none."""
    down = module._parameters.get("down_proj")
    if down is not None:
        return down.shape[0] if down.dim() == 3 else 0
    experts = module._modules.get("down_proj", module)
    return len(experts) if isinstance(experts, (nn.ModuleList, nn.ModuleDict)) else 0


def _experts_a_token(model: nn.Module, block: nn.Module, number: int) -> int | None:
    """Return how many of its experts a block sends a token to: from it, its router or a configuration; None if unknown."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for holder in (block, *block.children(), getattr(block, "config", None), text, config):
        for name in _EXPERTS_A_TOKEN:
            value = getattr(holder, name, None)
            if type(value) is int and 1 <= value <= number:
                return value
    return None
