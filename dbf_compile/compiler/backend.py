"""The entry point: ``torch.compile(model, backend="dbf", options={...})``.

The factors of dense weights are extra inputs of the compiled code. Every call passes those of its own weights: see
:class:`~dbf_compile.compiler.checked_call.CheckedCall`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from dbf_compile.compiler import dynamo, inductor, lowerings
from dbf_compile.compiler.checked_call import CheckedCall
from dbf_compile.compiler.graph_weights import GraphWeights, memory
from dbf_compile.compiler.left_dense import tell_left_dense
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.names import plain_name
from dbf_compile.options import CompileOptions
from dbf_compile.passes.pipeline import run_pipeline, run_post_grad_pipeline
from dbf_compile.records import resolve

_log = logging.getLogger(__name__)


def dbf(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of dense or factored linear layers; called by ``torch.compile``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: of the graph; parameters among them are real tensors.
        mode: of Inductor, as of ``torch.compile``.
        options: fields of ``CompileOptions``, and ``config``, a record of them; single fields win.

    Returns:
        The compiled graph, with the signature of ``gm``.

    Raises:
        OptionError: an unknown option, one of a wrong type or value, or names that match no layer of the model.
        TrainingError: a dense weight that would be factored requires a gradient.
    """
    keywords = dict(options or {})
    settings = resolve(CompileOptions, keywords.pop("config", None), keywords)
    patches = {**inductor.mode_settings(mode or settings.mode), **settings.inductor}
    inductor.check_settings(patches)
    lowerings.register()
    importance = {plain_name(name): moments for name, moments in settings.importance.items()}
    settings = replace(settings, importance=importance)
    factorizer = LayerFactorizer(settings, importance, settings.checkpoint)
    copy = dynamo.copy_graph(gm)
    weights = GraphWeights(copy, example_inputs, settings, factorizer)
    with dynamo.symbolic_sizes():
        rewrites = run_pipeline(copy.graph, weights, settings.accuracy == "fast")
    _log.info("rewrites by pass: %s", rewrites)
    tell_left_dense(gm, weights)
    copy.recompile()
    run: Callable[..., Any] = copy
    if not dynamo.within_transform():
        inputs = [*example_inputs, *weights.fake_inputs]
        compiled = inductor.compile_graph(
            copy, inputs, patches, weights.fingerprint(), run_post_grad_pipeline
        )
        run = _with_tangents(compiled, copy)
    return CheckedCall(run, weights) if weights.stacks or weights.skipped else run


def _with_tangents(compiled: Callable[..., Any], graph: GraphModule) -> Callable[..., Any]:
    """Return a function that runs the graph node by node in forward mode: its operators know tangents, compiled code none."""

    def call(*inputs: Any) -> Any:
        return (graph if dynamo.within_forward_mode() else compiled)(*inputs)

    return call


def _reset() -> None:
    memory.clear()
    inductor.reset()


dbf.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it
dbf.watches_frames = True  # type: ignore[attr-defined]  # see registration
