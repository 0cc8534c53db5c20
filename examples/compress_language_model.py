"""A language model of transformers: compress it, load the folder, judge it, generate text.

python examples/compress_language_model.py                                   a tiny random Llama, made on the spot
python examples/compress_language_model.py Qwen/Qwen3-0.6B text.txt out      a real one
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import tokenizers
import transformers

import dbf_compile

TEXT = "Signs are added, scales are multiplied, and a model gets small. " * 60


def tiny_model(folder: Path) -> tuple[str, Path]:
    """Write a random Llama with a tokenizer of bytes, and a text; return both places."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_ = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    bytes_.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    return str(folder / "dense"), folder / "text.txt"


def main() -> None:
    """Compress a model and use it."""
    with tempfile.TemporaryDirectory() as temporary:
        if len(sys.argv) == 4:
            (model, text, output), options = sys.argv[1:], {"length": 512, "windows": 64}
        else:
            model, text = tiny_model(Path(temporary))
            output = str(Path(temporary) / "small")
            options = {"length": 32, "windows": 8, "iterations": 20, "tune": 1, "refine": 1, "distill": 1}

        result = dbf_compile.compress(model, output, bits=3.0, data=text, preset="fast", **options)
        print(result)
        print("report:", result.folder / "dbf_report.html")

        length = options["length"]
        figures = dbf_compile.evaluate(output, text, dense=model, length=length, windows=8)
        print({name: value if isinstance(value, str) else round(value, 3) for name, value in figures.items()})

        # compiled=True compiles decoding: worth it for more than a few tokens.
        generation = dbf_compile.generate(output, "Signs are", max_new_tokens=16, compiled=False)
        print(repr(generation.text), f"{generation.decode_rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
