"""A look into the folder of a model, without loading it: what is compressed, how, and whether its files are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from dbf_compile.compression.coverage import coverage
from dbf_compile.compression.jobs import joined
from dbf_compile.compression.operations import (
    count_operations,
    dense_operations,
    factored_operations,
    shared_first_stages,
)
from dbf_compile.errors import CheckpointError, DBFError
from dbf_compile.factors import stored_bits
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.options import CompressionConfig
from dbf_compile.progress import say
from dbf_compile.records import parse
from dbf_compile.run.report import Report, read_report
from dbf_compile.tables import table_layers

_DAMAGED = "the folder is damaged: compress the model again, or copy it again"


def inspect(model: str | Path, trust_remote_code: bool = False, progress: bool = True) -> dict[str, Any]:
    """Return what of a model is compressed, from its configuration and its files, which are compared with what was written.

    Args:
        model: folder of a compressed model, or its name on the Hub.
        trust_remote_code: run code that comes with the model.
        progress: say on stderr what goes on.

    Returns:
        "model"; "share" of the weights that is factored; "factored" and "file", bits per weight; "dense", what is not factored
        and why; "layers": name, shape [N, K], ``mid_features``, bits, what a token that reaches it costs and, where the report
        has it, error; "operations": what a token costs in the model, as :func:`count_operations` says, and in the factored
        layers, with what it cost in the dense ones; "verified": whether all files are as the compression wrote them, or False
        where a file was saved again since.

    Raises:
        CheckpointError: not compressed, or damaged.
    """
    say(f"looking into {model}", progress)  # before transformers is imported, which takes a while
    from dbf_compile.integrations import content, pretrained, renaming

    folder = pretrained.local_folder(model)
    dense, factored, table = pretrained.empty_compressed(folder, trust_remote_code)
    files = sorted(folder.glob("model*.safetensors"))
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    say(f"comparing {megabytes:,.0f} MB with what was written", progress)
    verified = content.check_content(files)
    report = read_report(folder)
    tables = {name: layer.kind for name, layer in table_layers(factored).items()}
    covered = coverage(dense, set(table), _settings(report), tables)
    size = _check_files(files, factored, renaming.in_model(factored))
    errors = {} if report is None else {row.name: row.error for row in report.layers}
    # Configurations are sorted by name when they are saved, so the order is that of the model.
    rows = [_row(names, layers, errors) for names, layers in shared_first_stages(factored)]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "model": str(model),
        "share": covered["share"],
        "factored": sum(row["bits"] for row in rows) / max(1, weights),
        "file": 8 * size / covered["weights"],
        "dense": covered["dense"],
        "layers": rows,
        "operations": count_operations(factored).summary() | _operations(rows),
        "verified": verified,
    }


def _row(
    names: list[str], layers: list[DoubleBinaryLinear], errors: dict[str, float | None]
) -> dict[str, Any]:
    """Return what is known of layers that share their first stage."""
    first, out_features = layers[0], sum(layer.out_features for layer in layers)
    sizes = (first.in_features, first.mid_features, out_features)
    dense = dense_operations(first.in_features, out_features)
    bits = stored_bits(*sizes)
    return {
        "name": joined(names),
        "shape": [out_features, first.in_features],
        "mid_features": first.mid_features,
        "bits": bits,
        "bits_per_weight": bits / (out_features * first.in_features),
        "error": errors.get(joined(names)),
        "operations": {
            **asdict(factored_operations(*sizes)),
            "dense_additions": dense.additions,
            "dense_multiplications": dense.multiplications,
        },
    }


def _operations(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return what the factored layers cost a token that reaches all of them, and the dense ones that they replace."""
    names = ("additions", "multiplications", "dense_multiplications")
    return {name: sum(row["operations"][name] for row in rows) for name in names}


def _settings(report: Report | None) -> CompressionConfig:
    """Return the settings that decided which layers stay dense, as far as the report has them."""
    settings = {} if report is None else report.settings or {}
    names = {item.name for item in fields(CompressionConfig)}
    try:
        return parse(CompressionConfig, {key: settings[key] for key in names & {*settings}})
    except DBFError:
        return CompressionConfig()


def _check_files(files: Sequence[Path], model: nn.Module, rename: Callable[[str], str]) -> int:
    """Return the bytes of the weight files after comparing names and shapes with what the model needs.

    Args:
        files: of a compressed folder.
        model: on the meta device.
        rename: gives the name of a tensor in the model for that in a file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    size = 0
    for path in files:
        size += path.stat().st_size
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no dictionary
                    shapes[rename(key)] = tuple(file.get_slice(key).get_shape())
        except OSError as error:
            raise CheckpointError(
                f"{path}: a file that cannot be opened ({error})",
                "a file that can be read",
                "check who may read it",
            ) from error
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}", "a whole safetensors file", _DAMAGED) from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        if name not in tied and shapes.get(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name!r} of shape {shapes.get(name)}", f"shape {tuple(tensor.shape)}", _DAMAGED
            )
    return size
