"""Options: the records of all that a user may set. A record checks itself however it is made.

``CompressionConfig`` says how weights become factors. ``AllocationConfig``, ``CompressOptions`` and ``CompileOptions`` extend
it for ``allocate``, ``compress`` and the backend; ``CalibrationConfig`` and ``EvaluationConfig`` stand alone. Functions take
a record as ``config``, its fields as keywords (:mod:`dbf_compile.keywords`), or both: keywords win. See :func:`dbf_compile.records.resolve`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch

from dbf_compile.errors import OptionError
from dbf_compile.records import Record, accept_aliases, option

# Routers of mixtures are small, and an error in one sends tokens to other experts.
DENSE_BY_DEFAULT = ("*router", "*router.*", "*mlp.gate", "*moe.gate", "*.gate.wg", "*shared_expert_gate")
# Names of heads in modules that do not say which layer is theirs.
HEADS = ("*lm_head", "*embed_out", "*predictions.decoder", "*output_projection", "*proj_out")
USUAL_PATTERNS = HEADS + DENSE_BY_DEFAULT  # may match nothing
TABLES = ("dense", "int8", "int6", "int4")  # what becomes of heads and embeddings
MIN_BITS, MAX_BITS = 0.05, 16.0
ACCURACIES = ("exact", "fast")
MODES, BUDGETS = ("auto", "independent", "sequential"), ("equal", "allocated")
CURVATURES = ("diagonal", "input", "kronecker")
LOSSES = ("auto", "model", "next_token", "sampled", "output")
PRESETS = {"fast": 250, "balanced": 600, "best": 6000}  # iterations of the factorizer
RESUME = ("auto", "required", "never")

_MODE_ALIASES = {"block": "sequential"}


@accept_aliases
@dataclass(frozen=True, kw_only=True)
class CompressionConfig(Record):
    """How dense weights become factors.

    Args:
        bits_per_weight: Stored bits per weight of every layer, scales and padding counted; 0.05 to 16.
        overrides: Bits per weight for layers whose name matches a pattern (``fnmatch``); the first match wins.
        skip: Name patterns of layers that stay dense, heads and embeddings among them. Matrices too small to gain always do.
        head: What becomes of the layer that computes logits: "int8", "int6" or "int4", rows of so many bits and scales; "dense";
            or a number, the bits per weight to factor it with.
        embedding: The same of embeddings. One that the head reads, too, is stored once if both say the same. The backend alone
            makes no tables: there both stay dense, but for a head with a number.
        merge_shared_inputs: Factor layers that read one input (q/k/v, gate/up) as one stacked weight.
        preset: How long the factorizer searches: "fast", "balanced" or "best", about 1 : 2.4 : 24.
        iterations: ADMM iterations of the factorizer; None for those of the preset.
        seed: Seed of the random start; equal seeds give equal factors.
        cache_dir: Folder of the factor cache; None for the user's cache folder.
        progress: Show progress bars.
    """

    bits_per_weight: float = 2.0
    overrides: Mapping[str, float] = option({})
    skip: tuple[str, ...] = DENSE_BY_DEFAULT
    head: str | float = "int8"
    embedding: str = option("int8", choices=TABLES)
    merge_shared_inputs: bool = True
    preset: str = option("balanced", choices=tuple(PRESETS))
    iterations: int | None = option(None, low=1)
    seed: int = option(0, low=0, high=2**63 - 1)
    cache_dir: str | None = option(None, changes_results=False)
    progress: bool = option(True, changes_results=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bits in (
            ("bits_per_weight", self.bits_per_weight),
            *self._bits_of_head(),
            *self.overrides.items(),
        ):
            if not MIN_BITS <= bits <= MAX_BITS:
                raise OptionError(
                    f"{bits} bits per weight for {name!r}",
                    f"{MIN_BITS} to {MAX_BITS}",
                    "use 2.0 for quality near dense, 1.0 for size",
                )

    def _bits_of_head(self) -> list[tuple[str, float]]:
        """Return the bits of the head, if it is to be factored; a command line gives them as text."""
        if isinstance(self.head, str) and self.head not in TABLES:
            try:
                object.__setattr__(self, "head", float(self.head))
            except ValueError:
                raise OptionError(
                    f"head={self.head!r}",
                    f"{', '.join(map(repr, TABLES))}, or bits per weight",
                    "leave head out for 'int8'",
                ) from None
        return [] if isinstance(self.head, str) else [("head", self.head)]

    def bits_for(self, name: str) -> float:
        """Return the target bits per weight of the layer ``name``."""
        override = self.override_for(name)
        return self.bits_per_weight if override is None else override

    def override_for(self, name: str) -> float | None:
        """Return the bits per weight of the first override that matches the layer ``name``, or None."""
        return next((bits for pattern, bits in self.overrides.items() if fnmatchcase(name, pattern)), None)

    def skips(self, name: str) -> bool:
        """Return whether the layer ``name`` stays dense."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip)


@accept_aliases
@dataclass(frozen=True, kw_only=True)
class AllocationConfig(CompressionConfig):
    """How ``allocate`` spreads bits over the weights of a model.

    Args:
        multiple: Middle dimensions are multiples of this; the few weights that take the remainder are exempt.
        floor: Least bits per weight of a layer; None for half of ``bits_per_weight``.
        ceiling: Most bits per weight of a layer; None for twice ``bits_per_weight``.
        depth_prior: Weights of block z (0 … 1) count exp(depth_prior · (z − ½)) times: measured curves undervalue the
            last blocks of some large models, for which 0.6 was found.
    """

    multiple: int = option(32, low=1)
    floor: float | None = option(None, low=0)
    ceiling: float | None = option(None, low=0)
    depth_prior: float = 0.0


@accept_aliases
@dataclass(frozen=True, kw_only=True)
class CompressOptions(CompressionConfig):
    """How ``compress`` turns a pretrained model into a folder.

    Args:
        mode: "independent": statistics once, then every weight on its own. "sequential": block after block, with inputs
            from the compressed prefix and targets from the dense model. "auto": sequential where there is data.
        length: Tokens of a window of text; None for 512, or for as many as the model has positions.
        windows: Windows to calibrate and train with; None for 64, or for as many as 262,144 tokens are. In sequential mode 64 of
            them, drawn at random, measure diagonal importance, and all train.
        shares: Shares of the kinds of data, any numbers: ``{"code": 2}`` gives code twice the windows of any other kind.
        own_text: Share of the windows that the model writes itself, 0 to 1. None: all of them where there is neither data nor
            batches, half of them beside data; models that write no text have none.
        own_temperature: Above 1 flattens, below 1 sharpens the distribution that the model's own text is drawn from.
        own_top_k: The model's own text is drawn from so many likeliest tokens; 0 for all.
        column: Column of the data to read; None for the first that is known, such as text or messages.
        split: Split of the data to read, such as train; needed where there are several.
        holdout: Windows to judge with, of every kind of text its share; no stage of training is kept that loses on them. 0 to
            judge nothing.
        curvature: Form of the importance: "diagonal", "input" or "kronecker"; see ``calibrate``.
        temper: Power of the spectrum of importances; None to leave them as measured, 0.5 is a usual value.
        budget: "equal" bits for all weights, or "allocated" by measured error curves and losses.
        tune: Epochs in which the still dense weights of a block are tuned before a weight is factored (sequential); None for 4,
            or the fewer that make 128 steps.
        refine: Epochs in which signs and scales of a block are refined at its end (sequential); None for 4, or the fewer that
            make 128 steps.
        distill: Epochs in which scales learn the logits of the dense model at the end; None for 4, or the fewer that make 128
            steps.
        max_shard_size: Bytes of a weight file.
        resume: "auto": continue an interrupted run. "required": fail without one. "never": start over.
        workers: Weights that this process factors at a time; None for one a core, or one a GPU.
        device: Where to compute, such as cuda or cpu; blocks are onloaded one at a time. None for a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        keep_work: Keep the folder OUTPUT.work at the end.
    """

    mode: str = option("auto", choices=MODES)
    length: int | None = option(None, low=2)
    windows: int | None = option(None, low=1)
    shares: Mapping[str, float] = option({})
    own_text: float | None = option(None, low=0, high=1)
    own_temperature: float = option(1.0, low=0.01)
    own_top_k: int = option(50, low=0)
    column: str | None = None
    split: str | None = None
    holdout: int = option(8, low=0)
    curvature: str = option("diagonal", choices=CURVATURES)
    temper: float | None = option(None, low=0, high=1)
    budget: str = option("equal", choices=BUDGETS)
    tune: int | None = option(None, low=0)
    refine: int | None = option(None, low=0)
    distill: int | None = option(None, low=0)
    max_shard_size: int = option(2 * 10**9, low=1, changes_results=False)
    resume: str = option("auto", choices=RESUME, changes_results=False)
    workers: int | None = option(None, low=1, changes_results=False)
    device: torch.device | str | None = option(None, changes_results=False)
    trust_remote_code: bool = option(False, changes_results=False)
    keep_work: bool = option(False, changes_results=False)

    def __post_init__(self) -> None:
        if isinstance(self.mode, str):
            object.__setattr__(self, "mode", _MODE_ALIASES.get(self.mode, self.mode))
        super().__post_init__()

    @property
    def form(self) -> str:
        """The old name of ``curvature``."""
        return self.curvature

    def result_settings(self) -> dict[str, Any]:
        """Return the fields on which results depend, by name."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.metadata.get("changes_results", True)
        }


@accept_aliases
@dataclass(frozen=True, kw_only=True)
class CompileOptions(CompressionConfig):
    """What ``torch.compile(model, backend="dbf", options={...})`` takes.

    Args:
        importance: Layer name to ``Importance``; in other layers all entries count alike.
        checkpoint: Path of ready factors; the layers in it are not factored again.
        accuracy: "exact": sums as exact as float32 ones. "fast": CPU kernels may err by 1e-4, relative.
        mode: Mode of Inductor, such as "reduce-overhead"; ``torch.compile`` takes ``mode`` or ``options``, not both.
        inductor: Settings of Inductor for this compilation only.
    """

    importance: Mapping[str, Any] = option({})
    checkpoint: str | None = None
    accuracy: str = option("exact", choices=ACCURACIES)
    mode: str | None = None
    inductor: Mapping[str, Any] = option({})


@accept_aliases
@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Record):
    """How ``calibrate`` measures importance.

    Args:
        loss: Name of a loss (:mod:`dbf_compile.calibration.losses`), or a function (model output, batch) -> scalar; None to
            measure inputs only, which needs no backward pass.
        curvature: "diagonal": a vector per side. "input": all of E[x xᵀ] [K, K]. "kronecker": matrices on both sides. From n
            positions, off-diagonal entries of a matrix of d features are scaled by n / (n + d), as few positions exaggerate
            them. A matrix takes 8 K² (8 N²) bytes while it is measured; heads always have vectors.
        layers: Name patterns (``fnmatch``) of the layers to measure.
        clip: Quantile of a batch's token norms, such as 0.999; longer tokens are scaled down to it. None: no clipping.
        device: Where to compute. Blocks are onloaded one at a time and recomputed in the backward pass. None: the model
            runs where it is, as a whole.
        seed: Seed of random tokens and random losses.
        progress: Show a progress bar.
    """

    loss: Callable[..., Any] | str | None = "auto"
    curvature: str = option("diagonal", choices=CURVATURES)
    layers: tuple[str, ...] = ("*",)
    clip: float | None = None
    device: torch.device | str | None = None
    seed: int = option(0, low=0, high=2**63 - 1)
    progress: bool = option(True, changes_results=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise OptionError(
                f"loss={self.loss!r}",
                ", ".join(map(repr, LOSSES)),
                "pass one of them, a function, or None for inputs only",
            )
        if self.clip is not None and not 0 < self.clip < 1:
            raise OptionError(f"clip={self.clip!r}", "a number between 0 and 1", "0.999 is a usual value")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Record):
    """How ``evaluate`` judges a model.

    Args:
        length: Context length: tokens of a window; None for 2048, or for as many as the model has positions.
        windows: Windows at most, of every kind of text; they do not overlap.
        column: Column of the data to read; None for the first that is known, such as text or messages.
        split: Split of the data to read, such as test; needed where there are several.
        tasks: Names of tasks of lm-eval, whose package must be installed.
        include_path: Folder with tasks of your own, as YAML files of lm-eval.
        limit: Examples of a task at most: their number, or below 1 their share.
        update_report: Write what was measured on text into the report of the compressed folder, and into its page.
        device: Where to compute, such as cuda or cpu; None for a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        progress: Show progress bars.
    """

    length: int | None = option(None, low=2)
    windows: int = option(10_000, low=1)
    column: str | None = None
    split: str | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: float | None = None
    update_report: bool = False
    device: torch.device | str | None = None
    trust_remote_code: bool = False
    progress: bool = option(True, changes_results=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is None or 0 < self.limit < 1:
            return
        if not (self.limit >= 1 and float(self.limit).is_integer()):
            raise OptionError(
                f"limit={self.limit!r}",
                "a whole number of examples, or a share between 0 and 1",
                "leave limit out for all",
            )
        object.__setattr__(self, "limit", int(self.limit))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Record):
    """How ``finetune`` trains a compressed folder end to end.

    Args:
        tokens: Tokens to learn from, each used once; fewer where the text is shorter.
        length: Tokens of a window; None for 512, or for as many as the model has positions.
        batch: Windows of a step, those of all processes together.
        own_text: Share of the windows that the dense model writes itself, 0 to 1. None: all of them without data, none beside it.
        own_temperature: Above 1 flattens, below 1 sharpens the distribution that the model's own text is drawn from.
        own_top_k: The model's own text is drawn from so many likeliest tokens; 0 for all.
        holdout: Windows of every kind of text to judge with, but no more than a fifth of them.
        judge: How often the model is judged on the way; the best state is kept.
        sign_rate: Largest share of the signs that flips in a million tokens; 0 leaves all signs.
        scale_rate: How fast scales learn, in units of their size.
        norm_rate: How fast norms and biases learn, in units of their size; 0 leaves them.
        hidden: Weight of the error of hidden states beside the divergence; above 0 the dense model runs in every step.
        top: Likeliest tokens of the dense model that are kept for every position; of the others 32 are drawn.
        column: Column of the data to read; None for the first that is known, such as text or messages.
        split: Split of the data to read, such as train; needed where there are several.
        seed: Seed of the order of windows, and of the model's own text.
        resume: "auto": continue an interrupted run. "required": fail without one. "never": start over.
        cache_dir: Folder of the dense model's predictions, 260 bytes a token, and of its text; None for the user's cache folder.
        device: Where to compute, such as cuda or cpu; None for a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        progress: Show progress bars.
    """

    tokens: int = option(2_000_000, low=2)
    length: int | None = option(None, low=2)
    batch: int = option(4, low=1)
    own_text: float | None = option(None, low=0, high=1)
    own_temperature: float = option(1.0, low=0.01)
    own_top_k: int = option(50, low=0)
    holdout: int = option(8, low=1)
    judge: int = option(10, low=1)
    sign_rate: float = option(0.005, low=0)
    scale_rate: float = option(0.0015, low=0)
    norm_rate: float = option(0.0004, low=0)
    hidden: float = option(0.0, low=0)
    top: int = option(64, low=1)
    column: str | None = None
    split: str | None = None
    seed: int = option(0, low=0, high=2**63 - 1)
    resume: str = option("auto", choices=RESUME, changes_results=False)
    cache_dir: str | None = option(None, changes_results=False)
    device: torch.device | str | None = option(None, changes_results=False)
    trust_remote_code: bool = option(False, changes_results=False)
    progress: bool = option(True, changes_results=False)


@dataclass(frozen=True, kw_only=True)
class Sampling(Record):
    """How the next token is chosen. What is None is as the model's own generation settings say.

    Args:
        do_sample: Draw tokens instead of taking the likeliest; None for drawing if one of the next four is set.
        temperature: Above 1 flattens, below 1 sharpens the distribution that is drawn from; 0 takes the likeliest.
        top_k: Draw from so many likeliest tokens; 0 for all.
        top_p: Draw from the likeliest tokens that together have this probability.
        min_p: Draw from tokens at least this probable, relative to the likeliest.
        repetition_penalty: Above 1 makes tokens less likely that stand in the text already.
        seed: Of the drawing; equal seeds draw equal tokens. None for others at every call.
    """

    do_sample: bool | None = None
    temperature: float | None = option(None, low=0)
    top_k: int | None = option(None, low=0)
    top_p: float | None = option(None, low=0, high=1)
    min_p: float | None = option(None, low=0, high=1)
    repetition_penalty: float | None = option(None, low=0.01)
    seed: int | None = option(None, low=0, high=2**62)
