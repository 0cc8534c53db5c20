"""A pretrained sentence encoder: compress it, compile it, compare it with the dense one.

python benchmarks/encoder.py            the whole encoder, all 37 linear layers
python benchmarks/encoder.py --quick    its first two blocks
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from measure import Timing, commit, interleaved, minilm_folder, processor, versions
from safetensors.torch import save_file
from sentences import CALIBRATION, EVALUATION
from torch import Tensor, nn

import dbf_compile
from dbf_compile.factorizer.projection import onebit
from dbf_compile.linear import dense_linears, dense_weight

LENGTH = 32  # tokens of a sentence, padding included
BATCH = 16
OUTPUT = Path(__file__).parent.parent / "out"


def main() -> None:
    arguments = parse_arguments()
    torch.set_grad_enabled(False)
    step(f"loading all-MiniLM-L6-v2 ({processor()}; {versions()}; commit {commit()})")
    model, tokens = load(blocks=2 if arguments.quick else None)

    step(f"calibrating on {len(CALIBRATION)} sentences")
    importance = dbf_compile.calibrate(model, [tokens(CALIBRATION)])

    step(f"factoring at {arguments.bits} bits per weight (a second run reads the factors from the cache)")
    start = time.perf_counter()
    config = dbf_compile.CompressionConfig(bits_per_weight=arguments.bits)
    factors = dbf_compile.factorize_model(model, config, importance)
    print(f"    {time.perf_counter() - start:.1f} s")

    step("comparing every layer with its dense weight, and with OneBit's single sheet of signs")
    rows = compare_layers(model, factors, importance)
    picture(rows, arguments.bits)

    step("compiling the dense model with backend='inductor' and with backend='dbf'")
    # The backend finds the factors computed above in the cache.
    options = {"bits_per_weight": arguments.bits, "importance": importance, "progress": False}
    inductor = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False)
    dbf = torch.compile(model, backend="dbf", fullgraph=True, dynamic=False, options=options)
    batches = {f"batch {BATCH}": tokens(EVALUATION[:BATCH])}
    if not arguments.quick:
        batches["batch 1"] = tokens(EVALUATION[:1])
    for name, batch in batches.items():
        for label, run in (("inductor", inductor), ("dbf", dbf)):
            start = time.perf_counter()
            run(**batch)
            print(f"    {label}, {name}: {time.perf_counter() - start:.1f} s")

    step(f"embedding {len(EVALUATION)} sentences and timing")
    similarity = cosine(model, dbf, tokens)
    single = copy.deepcopy(model)
    put_onebit(single, rows)
    similarity_onebit = cosine(model, single, tokens)
    rounds = 10 if arguments.quick else 30
    timings = {
        name: interleaved(
            {
                "dense, eager": lambda batch=batch: model(**batch),
                "dense, inductor": lambda batch=batch: inductor(**batch),
                "dbf": lambda batch=batch: dbf(**batch),
            },
            rounds,
        )
        for name, batch in batches.items()
    }
    print()
    report(model, factors, rows, similarity, similarity_onebit, timings)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, default=2.0, help="stored bits per weight (default 2.0)")
    parser.add_argument("--quick", action="store_true", help="only the first two blocks, fewer measurements")
    return parser.parse_args()


def step(what: str) -> None:
    print(f"--- {what}", flush=True)


def load(blocks: int | None):
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = minilm_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    model.requires_grad_(False)
    if blocks is not None:
        model.encoder.layer = model.encoder.layer[:blocks]

    def tokens(sentences) -> dict[str, Tensor]:
        return dict(
            tokenizer(
                list(sentences), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
            )
        )

    return model, tokens


def embed(run, batch: dict[str, Tensor]) -> Tensor:
    """Return sentence embeddings [sentences, features]: normalized means over the tokens."""
    mask = batch["attention_mask"].unsqueeze(-1)
    summed = (run(**batch).last_hidden_state * mask).sum(1)
    return nn.functional.normalize(summed / mask.sum(1), dim=-1)


def cosine(dense, run, tokens) -> Tensor:
    """Return the cosine similarity of both models' embeddings, sentence by sentence."""
    similarities = []
    for start in range(0, len(EVALUATION), BATCH):
        batch = tokens(EVALUATION[start : start + BATCH])
        similarities.append((embed(dense, batch) * embed(run, batch)).sum(-1))
    return torch.cat(similarities)


def compare_layers(model: nn.Module, factors, importance) -> list[dict]:
    rows = []
    for name, module in dense_linears(model).items():
        if name not in factors:
            continue
        weight = dense_weight(module)
        single = onebit(weight, importance.get(name))
        rows.append(
            {
                "name": name,
                "weights": weight.numel(),
                "error": dbf_compile.weighted_error(weight, factors[name], importance.get(name)),
                "onebit": single,
                "onebit error": dbf_compile.weighted_error(weight, single, importance.get(name)),
            }
        )
    return rows


def put_onebit(model: nn.Module, rows: list[dict]) -> None:
    layers = dense_linears(model)
    for row in rows:
        layers[row["name"]].weight.copy_(row["onebit"].dense())


def mean_error(rows: list[dict], key: str) -> float:
    return sum(row[key] * row["weights"] for row in rows) / sum(row["weights"] for row in rows)


def file_sizes(model: nn.Module, factors) -> dict[str, int]:
    """Return the bytes of files with the dense model, the factors, the rest of the model, and the last two together."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_file(dict(model.state_dict()), path / "dense.safetensors")
        dbf_compile.save(factors, path / "factors.safetensors")
        rest = {
            key: value
            for key, value in model.state_dict().items()
            if key.rpartition(".")[0] not in factors or not key.endswith(".weight")
        }
        save_file(rest, path / "rest.safetensors")
        sizes = {name: (path / f"{name}.safetensors").stat().st_size for name in ("dense", "factors", "rest")}
    return {**sizes, "compressed": sizes["factors"] + sizes["rest"]}


def report(
    model, factors, rows, similarity, similarity_onebit, timings: dict[str, dict[str, Timing]]
) -> None:
    weights = sum(row["weights"] for row in rows)
    sizes = file_sizes(model, factors)
    bits = 8 * sum(_stored_bytes(factors).values())
    single_bits = sum(row["onebit"].bits() for row in rows)
    lines = [
        (
            "linear layers factored",
            f"{len(rows)} of {len(dense_linears(model))}, {weights / 1e6:.2f} M weights",
        ),
        ("bits per weight, layers", f"{bits / weights:.3f} (signs, padding and scales)"),
        (
            "bits per weight, factor file",
            f"{8 * sizes['factors'] / weights:.3f} ({sizes['factors'] / 1e6:.2f} MB)",
        ),
        (
            "whole model on disk",
            f"{sizes['compressed'] / 1e6:.1f} MB, dense float32 {sizes['dense'] / 1e6:.1f} MB "
            f"(embeddings stay float32: {sizes['rest'] / 1e6:.1f} MB)",
        ),
        ("weighted error, two sheets", f"{mean_error(rows, 'error'):.4f} at {bits / weights:.2f} bits (dbf)"),
        (
            "weighted error, one sheet",
            f"{mean_error(rows, 'onebit error'):.4f} at {single_bits / weights:.2f} bits (OneBit)",
        ),
        ("cosine similarity to dense, dbf", _similarity(similarity)),
        ("cosine similarity to dense, OneBit", _similarity(similarity_onebit)),
    ]
    for name, timing in timings.items():
        base = timing["dense, inductor"].median
        for label, latency in timing.items():
            ratio = f"{base / latency.median:.2f}x of dense inductor's speed"
            value = f"{latency.median:7.2f} ms  [{latency.low:.2f}, {latency.high:.2f}]  {ratio}"
            lines.append((f"latency, {name}, {label}", value))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
    print(
        f"\n{len(similarity)} sentences of at most {LENGTH} tokens; {torch.get_num_threads()} threads; {processor()}"
    )
    print(f"{versions()}; commit {commit()}; picture: {OUTPUT / 'demo.png'}")


def _stored_bytes(factors) -> dict[int, int]:
    """Return the bytes of every tensor, shared ones once."""
    tensors = [tensor for layer in factors.values() for tensor in layer.tensors().values()]
    return {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}


def _similarity(values: Tensor) -> str:
    return f"mean {values.mean():.4f}, lowest {values.min():.4f}"


def picture(rows: list[dict], bits: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    OUTPUT.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(11, 0.26 * len(rows) + 1.6), layout="constrained")
    places = range(len(rows))
    axes.barh(
        places, [row["onebit error"] for row in rows], color="#d8c7a9", label="OneBit: one sheet of signs"
    )
    axes.barh(
        places,
        [row["error"] for row in rows],
        color="#33658a",
        height=0.55,
        label=f"dbf: two sheets, {bits} bits",
    )
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("weighted squared error, relative to the weight (1 = zeros)")
    axes.set_title("all-MiniLM-L6-v2, layer by layer")
    axes.legend(loc="lower right")
    figure.savefig(OUTPUT / "encoder.png", dpi=120)
    pyplot.close(figure)
    print(f"    picture: {OUTPUT / 'demo.png'}")


if __name__ == "__main__":
    main()
