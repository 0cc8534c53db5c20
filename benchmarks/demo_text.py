"""The demo's text: prompts, conversations to calibrate with, and text to judge with; all of it is there without a network.

python benchmarks/demo_text.py    writes smollm2_text.json again, with llama-cpp-python: about ten minutes
"""

from __future__ import annotations

import json
from pathlib import Path

from laptop_sizes import source_file

# Written by SmolLM2-135M-Instruct itself, drawn at temperature 0.8 after an empty beginning of a conversation, so that it
# asks and answers; every fourth is free text. A model knows best what it will read and write.
CONVERSATIONS = Path(__file__).with_name("smollm2_text.json")
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a dog who finds a key.",
    "Explain in two sentences why the sky is blue.",
)
_BEGINNING = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
_FREE = "<|endoftext|>"
_END_OF_TEXT, _END_OF_TURN = 0, 2
_COUNT, _TOKENS = 48, 300


def calibration_text(folder: Path) -> Path:
    """Write the model's own text as rows of a file, and return its path."""
    path = folder / "calibration.jsonl"
    texts = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def held_out_text(folder: Path) -> Path:
    """Write the documentation that comes with Python, and return its path."""
    from pydoc_data.topics import topics

    path = folder / "held_out.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def main() -> None:
    from llama_cpp import Llama

    model = Llama(str(source_file()), n_ctx=512, verbose=False)
    texts = []
    for index in range(_COUNT):
        model.reset()
        model.set_seed(index)
        beginning = _FREE if index % 4 == 3 else _BEGINNING
        tokens = model.tokenize(beginning.encode(), add_bos=False, special=True)
        written: list[int] = []
        drawn = model.generate(tokens, temp=0.8, top_k=50, top_p=0.95, repeat_penalty=1.05)
        for token in drawn:
            if token == _END_OF_TEXT or len(written) == _TOKENS:
                break
            written.append(token)
            if written.count(_END_OF_TURN) == 2:  # of the question, and of the answer
                break
        text = model.detokenize(tokens + written, special=True).decode("utf-8", errors="replace")
        texts.append(text.removeprefix(_FREE))
        print(f"{index + 1} of {_COUNT}: {len(written)} tokens", flush=True)
        CONVERSATIONS.write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
