"""Double Binary Factorization as a compiler backend: ``torch.compile(model, backend="dbf")``.

W  ≈  diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

from dbf_compile.calibration.batches import token_batches
from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.chat import Conversation
from dbf_compile.checkpoint import load, read_metadata, save
from dbf_compile.compiler import registration
from dbf_compile.compression.budgets import Allocation
from dbf_compile.compression.curves import allocate
from dbf_compile.compression.layers import convert_, factorize_model
from dbf_compile.errors import DBFError
from dbf_compile.evaluation import evaluate
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.finetuning.folders import Finetuned, finetune
from dbf_compile.generation import Generation, TextGenerator, generate
from dbf_compile.inspection import inspect
from dbf_compile.integrations.on_import import when_imported
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.options import (
    AllocationConfig,
    CalibrationConfig,
    CompileOptions,
    CompressionConfig,
    CompressOptions,
    EvaluationConfig,
    FinetuneConfig,
    Sampling,
)
from dbf_compile.run.compress import Compressed, compress

__version__ = "0.1.0"

# Whoever loads or saves a compressed model, or trains adapters, needs no import but this package's and the library's.
for _library, _integration in (
    ("transformers.quantizers.auto", "transformers"),
    ("transformers.modeling_utils", "saving"),
    ("peft", "peft"),
    ("torch.optim.swa_utils", "averaging"),
):
    when_imported(_library, partial(import_module, f"dbf_compile.integrations.{_integration}"))

when_imported(registration.REGISTRY, registration.register)
when_imported(registration.TRACER, registration.watch_frames)

__all__ = [
    "Allocation",
    "AllocationConfig",
    "CalibrationConfig",
    "CompileOptions",
    "CompressOptions",
    "Compressed",
    "CompressionConfig",
    "Conversation",
    "DBFError",
    "DoubleBinaryFactors",
    "DoubleBinaryLinear",
    "EvaluationConfig",
    "FactorizerConfig",
    "FinetuneConfig",
    "Finetuned",
    "Generation",
    "Importance",
    "Sampling",
    "TextGenerator",
    "allocate",
    "calibrate",
    "compress",
    "convert_",
    "evaluate",
    "factorize",
    "factorize_model",
    "finetune",
    "generate",
    "inspect",
    "load",
    "read_metadata",
    "save",
    "token_batches",
    "weighted_error",
]
