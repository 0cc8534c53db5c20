"""Train a Llama of 10 million parameters from scratch on the source of Python's standard library, on the CPU.

    python benchmarks/train_python_model.py                  41 minutes on two cores; out/python10m

Compressing a model is informative only if the model has learned something; this one predicts its text far better than a
unigram model. The output is a folder of transformers: weights, a byte-level tokenizer trained on the same text, and beside
them train.txt (samples of the training files, for calibration), valid.txt (held-out files, every 20th by the hash of its
name) and training.json (the figures). Tests and the tables in `encodings` are excluded. Products are in bfloat16; Muon
trains the matrices of the blocks, Adam everything else. Equal seeds see equal batches; their number depends on the speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from measure import commit, processor, versions
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings"}
SEPARATOR = "\n\n"  # between files, as token_batches puts it between documents
VOCABULARY, WINDOW, BATCH = 4096, 512, 8
MUON_RATE, ADAM_RATE, WARM_UP, DECAY = 4e-3, 2e-3, 0.03, 0.1
PIECE, PIECES = 2000, 500  # characters and number of the pieces in train.txt
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 7,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="duration of the training; the rest takes one minute more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "out" / "python10m")
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)

    training, held_out = library_texts()
    tokenizer = train_tokenizer(training)
    tokens, valid = encode(tokenizer, training), encode(tokenizer, held_out)
    print(
        f"{len(training)} files, {len(tokens)} tokens; held out: {len(held_out)} files, {len(valid)} tokens",
        flush=True,
    )
    torch.manual_seed(arguments.seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    trained = train(model, tokens, valid, 60 * arguments.minutes, arguments.seed)
    loss, bytes_held_out = validation_loss(model, valid), sum(len(text.encode()) for text in held_out)
    figures = {
        "parameters": model.num_parameters(),
        **trained,
        "train_tokens": len(tokens),
        "valid_tokens": len(valid),
        "valid_bytes_per_token": round(bytes_held_out / len(valid), 3),
        "valid_nats_per_token": round(loss, 4),
        "valid_perplexity": round(math.exp(loss), 3),
        "unigram_nats_per_token": round(unigram_loss(tokens, valid), 4),
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "machine": processor(),
        "versions": f"{versions()}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
        "commit": commit(),
    }
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "train.txt").write_text(sample(training, arguments.seed), encoding="utf-8")
        (folder / "valid.txt").write_text(SEPARATOR.join(held_out), encoding="utf-8")
        (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
        if output.exists():
            output.rename(Path(scratch) / "old")
        folder.rename(output)
    print("\n".join(f"{name:<24}{value}" for name, value in figures.items()))
    print(output)


def library_texts() -> tuple[list[str], list[str]]:
    """Return the texts of the training files, in the order of names, and of the held-out files, in the order of hashes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    digests = {
        name: hashlib.sha256(name.encode()).digest() for name in names if not LEFT_OUT & {*name.split("/")}
    }
    texts = {name: (root / name).read_text(encoding="utf-8", errors="replace") for name in digests}
    held_out = [name for name in sorted(digests, key=digests.__getitem__) if digests[name][-1] % 20 == 0]
    return (
        [text for name, text in texts.items() if name not in held_out and text],
        [texts[name] for name in held_out if texts[name]],
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, which has tokens for every text, and neither unknown nor special ones."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the tokens of all texts in one int16 vector."""
    rows = tokenizer([text + SEPARATOR for text in texts], verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row], dtype=torch.int16)


def sample(texts: list[str], seed: int) -> str:
    """Return samples of all texts in random order, cut at ends of lines."""
    draw = random.Random(seed)
    pieces = [
        text[start : text.rfind("\n", start, start + PIECE) + 1]
        for text in texts
        for start in [text.find("\n", draw.randrange(max(1, len(text) - PIECE))) + 1]
    ]
    draw.shuffle(pieces)
    return SEPARATOR.join(list(filter(None, pieces))[:PIECES])


def batches(tokens: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches [BATCH, WINDOW + 1] of tokens; every epoch cuts the text at other places."""
    while True:
        start = int(torch.randint(WINDOW, (), generator=generator))
        windows = tokens[start:].unfold(0, WINDOW + 1, WINDOW)
        for chosen in torch.randperm(len(windows), generator=generator).split(BATCH):
            if len(chosen) == BATCH:  # one shape, one compilation
                yield windows[chosen].long()


def train(model: nn.Module, tokens: Tensor, valid: Tensor, seconds: float, seed: int) -> dict[str, Any]:
    """Train for ``seconds``, with a learning rate that follows the elapsed share; return the figures."""
    named = dict(model.named_parameters())
    inner = [name for name, p in named.items() if p.ndim > 1 and "embed" not in name]
    muon = torch.optim.Muon(
        [named[name] for name in inner], lr=MUON_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    others = [p for name, p in named.items() if name not in inner]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    source = batches(tokens, torch.Generator().manual_seed(seed))
    window_loss = torch.compile(loss_of, dynamic=False)
    window_loss(model, next(source)).backward()  # compiles; not counted
    model.zero_grad()
    step, mean, reported = 0, 0.0, 0
    began = time.perf_counter()
    while (share := (time.perf_counter() - began) / seconds) < 1:
        rate = min(share / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * share))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = MUON_RATE * rate, ADAM_RATE * rate
        loss = window_loss(model, next(source))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad()
        step += 1
        mean += (loss.item() - mean) / min(step, 50)
        if share * 50 >= reported:
            reported += 1
            speed = step * BATCH * WINDOW / (time.perf_counter() - began)
            line = f"{share:4.0%}  step {step:5}  {speed:6.0f} tokens/s  rate {rate:.2f}  train {mean:.3f}"
            if reported % 10 == 1:
                line += f"  valid {validation_loss(model, valid[: 16 * WINDOW + 1]):.3f}"
            print(line, flush=True)
    return {
        "tokens_seen": step * BATCH * WINDOW,
        "steps": step,
        "seconds": round(time.perf_counter() - began, 1),
        "train_nats_per_token": round(mean, 4),
    }


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss in nats per token; the first token of a window is not predicted."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tensor) -> float:
    windows = tokens.unfold(0, WINDOW + 1, WINDOW)
    return float(torch.stack([loss_of(model, batch.long()) for batch in windows.split(1)]).mean())


def unigram_loss(tokens: Tensor, valid: Tensor) -> float:
    """Return the loss in nats per token of a unigram model."""
    counts = torch.bincount(tokens.long(), minlength=VOCABULARY).double() + 1
    return float(-(counts / counts.sum()).log()[valid.long()].mean())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
