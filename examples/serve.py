"""A compressed folder behind vLLM's server, and a chat with it by OpenAI's client; docs/guides/serve.md says more.

python examples/serve.py                                            a tiny random Llama, made on the spot
python examples/serve.py qwen-2bit --tensor-parallel-size 2         a folder; what follows it goes to the server
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import tokenizers
import transformers

import dbf_compile

TEMPLATE = "{% for one in messages %}{{ one['role'] + ': ' + one['content'] + ' ' }}{% endfor %}assistant:"
SERVER = ("-m", "vllm.entrypoints.openai.api_server", "--port", "8123", "--served-model-name", "small")
TINY = ("--max-model-len=256", "--enforce-eager", "--gpu-memory-utilization=0.3")  # vLLM asks for 0.92


def tiny_folder(place: Path) -> Path:
    """Write a random Llama with a tokenizer of words and a chat template; return it compressed. vLLM on CPUs takes heads of 64."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=8, bos_token_id=None, eos_token_id=None, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "dense")
    words = ["why", "is", "the", "sky", "blue", "so", "it", "?"]
    by_word = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "?"))
    by_word.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=by_word, chat_template=TEMPLATE)
    tokenizer.save_pretrained(place / "dense")
    options = {"mode": "independent", "iterations": 20, "own_text": 0, "distill": 0}
    return dbf_compile.compress(place / "dense", place / "small", bits=2.0, **options).folder


def main() -> None:
    """Serve a folder until one question is answered."""
    with tempfile.TemporaryDirectory() as temporary:
        arguments = sys.argv[1:] or [tiny_folder(Path(temporary)), *TINY]
        with subprocess.Popen([sys.executable, *SERVER, "--model", *arguments]) as server:
            chats = openai.OpenAI(base_url="http://localhost:8123/v1", api_key="none").chat.completions
            messages = [{"role": "user", "content": "why is the sky blue ?"}]
            try:
                while server.poll() is None:
                    try:
                        parts = chats.create(model="small", messages=messages, max_tokens=32, stream=True)
                        print("answer:", "".join(part.choices[0].delta.content or "" for part in parts))
                        break
                    except openai.APIConnectionError:  # it is not there yet
                        time.sleep(1)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
