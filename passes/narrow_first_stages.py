"""Keep results in 16 bits between two products on tensor cores.

    h = sign_matmul(x, signs_in, ...);  sign_matmul(h, signs_out, ..., dtype=bfloat16)
        ->  h = sign_matmul(x, signs_in, ..., dtype=bfloat16)

For many tokens on a GPU the second product rounds wider activations to the dtype of a 16-bit model anyway; so the first
product writes them in that dtype. Runs on the graph that Inductor is about to lower.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from dbf_compile.kernels.sign_matmul.regimes import is_beyond_decode
from dbf_compile.passes.graph import SIGN_MATMUL, WeightSource, arguments_of, example_value, on_gpu

_NARROW = (torch.bfloat16, torch.float16)


def narrow_first_stages(graph: Graph, source: WeightSource | None = None) -> int:
    """Narrow products that only products in 16 bits read.

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
            arguments = arguments_of(node) | {"dtype": dtype}
            node.args, node.kwargs = (arguments.pop("x"), arguments.pop("signs")), arguments
            for name in ("val", "example_value"):
                if name in node.meta:
                    node.meta[name] = node.meta[name].to(dtype)
            narrowed += 1
    return narrowed


def can_narrow_first_stages(node: Node) -> torch.dtype | None:
    """Return the dtype to which all readers of a wide product of 16-bit activations round it, or None."""
    if node.target not in SIGN_MATMUL or not node.users:
        return None
    arguments = arguments_of(node)
    x, y = example_value(arguments["x"]), example_value(node)
    if not on_gpu(y) or x.dtype not in _NARROW or y.dtype != torch.float32 or not arguments["interleaved"]:
        return None
    if not is_beyond_decode(math.prod(y.shape[:-1])):
        return None
    dtypes = {_rounds_to(reader, node) for reader in node.users}
    return dtypes.pop() if len(dtypes) == 1 else None


def _rounds_to(reader: Node, node: Node) -> torch.dtype | None:
    if reader.target not in SIGN_MATMUL:
        return None
    arguments = arguments_of(reader)
    # in_scale multiplies before rounding, so a reader with one needs wide activations.
    if arguments["x"] is not node or arguments["in_scale"] is not None or not arguments["interleaved"]:
        return None
    return arguments["dtype"] if arguments["dtype"] in _NARROW else None
