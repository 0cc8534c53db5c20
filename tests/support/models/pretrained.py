"""A tiny random Llama as a folder of transformers, with a tokenizer and text, and options to compress it in a moment."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.models.tiny import tiny_llama
from torch import nn

# Few iterations and epochs: these tests are about what is kept and loaded, not about quality.
FAST: dict[str, Any] = {
    "bits": 4.0,
    "iterations": 3,
    "length": 16,
    "windows": 8,
    "own_text": 0,
    "holdout": 2,
    "tune": 1,
    "refine": 1,
    "distill": 1,
    "progress": False,
}
# In independent mode, with random tokens: no text is read or written.
QUICK: dict[str, Any] = {
    "bits": 4.0,
    "iterations": 2,
    "mode": "independent",
    "own_text": 0,
    "distill": 0,
    "progress": False,
}
WORDS = ("add", "the", "signs", "of", "a", "matrix", "and", "scale", "what", "comes", "out", "twice")


def tiny_tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: token for token, letter in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_folder(path: Path, layers: int = 2, model: nn.Module | None = None) -> Path:
    """Write a model and a tokenizer to a folder, and text beside it; return the folder."""
    model = tiny_llama(layers) if model is None else model
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(len(WORDS), (400,), generator=generator).tolist()
    text_of(path).write_text(" ".join(WORDS[word] for word in words))
    return path


def text_of(folder: Path) -> Path:
    """Return the text that belongs to a folder."""
    return folder.with_name(f"{folder.name}.txt")


def weights_of(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a model but its reports, which hold times."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json") and path.name != "dbf_report.json"
    }


def as_pickle(folder: Path, shards: int) -> None:
    """Write the weights as PyTorch's own files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names, places = list(tensors), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = names[number::shards]
        torch.save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
