"""Let what goes from tensor cores to tensor cores have 16 bits.

    h = sign_matmul(x, signs_in, ...);  sign_matmul(h, signs_out, ..., dtype=bfloat16)
        ->  h = sign_matmul(x, signs_in, ..., dtype=bfloat16)

For many tokens on a GPU the second product rounds its activations to the dtype of a 16-bit model, if they are wider;
then nobody has to write and read them wide. Runs on the graph that Inductor is about to lower.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from dbf_compile.kernels.sign_matmul.reference import DECODE_TOKENS
from dbf_compile.passes.graph import SIGN_MATMUL, WeightSource, arguments_of, example_value, on_gpu

_NARROW = (torch.bfloat16, torch.float16)


def narrow_first_stages(graph: Graph, source: WeightSource | None = None) -> int:
    """Narrow products that only products of 16 bits read.

    Args:
        graph: changed in place.
        source: unused; every pass takes the same arguments.

    Returns:
        The number of products narrowed.
    """
    narrowed = 0
    for node in graph.nodes:
        dtype = can_narrow_first_stages(node)
        if dtype is not None:
            given = arguments_of(node) | {"dtype": dtype}
            node.args, node.kwargs = (given.pop("x"), given.pop("signs")), given
            for name in ("val", "example_value"):
                if name in node.meta:
                    node.meta[name] = node.meta[name].to(dtype)
            narrowed += 1
    return narrowed


def can_narrow_first_stages(node: Node) -> torch.dtype | None:
    """Return the dtype to which all readers of a wide product of 16-bit activations round it, or None."""
    if node.target not in SIGN_MATMUL or not node.users:
        return None
    given = arguments_of(node)
    x, y = example_value(given["x"]), example_value(node)
    tokens = math.prod(y.shape[:-1])
    if not on_gpu(y) or x.dtype not in _NARROW or y.dtype != torch.float32 or not given["interleaved"]:
        return None
    if not isinstance(tokens, int) or tokens <= DECODE_TOKENS:
        return None
    dtypes = {_rounds_to(reader, node) for reader in node.users}
    return dtypes.pop() if len(dtypes) == 1 else None


def _rounds_to(reader: Node, node: Node) -> torch.dtype | None:
    if reader.target not in SIGN_MATMUL:
        return None
    given = arguments_of(reader)
    # Scales come before rounding.
    if given["x"] is not node or given["in_scale"] is not None or not given["interleaved"]:
        return None
    return given["dtype"] if given["dtype"] in _NARROW else None
