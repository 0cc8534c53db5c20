"""vLLM serves compressed folders: tokens of transformers, in one process, over two ranks, and over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from safetensors.torch import load_file, save_file
from support.models.served import KINDS, greedy, prompts, served_folder, write_adapter

pytestmark = pytest.mark.slow
TOKENS = 24
# Read by vLLM when it starts: the engine in this process, little memory for its cache, and nothing sent anywhere.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8}
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, settings, texts, tokens = map(json.loads, sys.argv[1:])
    model = LLM(folder, disable_log_stats=True, **settings)
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    results = model.generate([{"prompt_token_ids": text} for text in texts], greedy, use_tqdm=False)
    print("tokens:", json.dumps([list(result.outputs[0].token_ids) for result in results]))
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm")))
        yield


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("folders")

    def folder(kind: str) -> Path:
        return place / kind if (place / kind).exists() else served_folder(place, kind)

    return folder


def engine(folder: Path, **settings: Any) -> Any:
    from vllm import LLM

    return LLM(str(folder), **{**SMALL, "enforce_eager": True, "disable_log_stats": True, **settings})


def tokens_of(model: Any, texts: list[list[int]], **request: Any) -> list[list[int]]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    asked = [{"prompt_token_ids": text} for text in texts]
    results = model.generate(asked, settings, use_tqdm=False, **request)
    return [list(result.outputs[0].token_ids) for result in results]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    assert tokens_of(engine(folder), prompts()) == greedy(folder, prompts(), TOKENS)


def test_tokens_are_the_same_when_vllm_compiles(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("mixed")
    model = engine(folder, enforce_eager=False)
    assert tokens_of(model, prompts(3)) == greedy(folder, prompts(3), TOKENS)


def test_tokens_are_the_same_when_our_backend_compiles(folder_of: Callable[[str], Path]) -> None:
    settings = {"compilation_config": {"mode": 2, "backend": "dbf"}}
    folder = folder_of("shared")
    assert in_a_process(folder, settings, VLLM_USE_AOT_COMPILE="0") == greedy(folder, prompts(), TOKENS)


def test_no_dense_copy_is_kept(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("tables")
    (held,) = engine(folder).apply_model(bytes_of)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    # Rows of the vocabulary up to a multiple of 64, and scales in float32 once more, which count in a model as small as this.
    # Dense weights would be twenty times as large.
    assert held < 1.3 * stored


def bytes_of(model: torch.nn.Module) -> int:
    tensors = {id(one): one.nbytes for one in (*model.parameters(), *model.buffers())}
    rotary = {id(one) for name, one in model.named_buffers() if "rotary" in name}
    return sum(size for key, size in tensors.items() if key not in rotary)


def test_an_adapter_beside_factored_layers(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    folder = folder_of("shared")
    sizes = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (128, 256), "mlp.down_proj": (256, 688)}
    layers = {f"model.layers.{block}.{name}": size for block in range(2) for name, size in sizes.items()}
    adapter = write_adapter(tmp_path / "adapter", layers)
    # On CPUs vLLM gives a request without adapter that of the last place, which has to be free.
    model = engine(folder, enable_lora=True, max_lora_rank=8, max_loras=2)
    requests = [LoRARequest("adapter", 1, str(tmp_path / "adapter")), None] * 2
    plain, adapted = greedy(folder, prompts(4), TOKENS), greedy(folder, prompts(4), TOKENS, adapter)
    expected = [(adapted, plain)[number % 2][number] for number in range(4)]
    assert adapted != plain
    assert tokens_of(model, prompts(4), lora_request=requests) == expected


@pytest.mark.parametrize("kind", ["mixed", "phi3"])  # the others by hand: each is a minute
def test_two_ranks_give_the_same_tokens(kind: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    settings = {"tensor_parallel_size": 2, "enforce_eager": True}
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    several = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    assert in_a_process(folder, settings, **several) == greedy(folder, prompts(), TOKENS)


def in_a_process(folder: Path, settings: dict[str, Any], **environment: str) -> list[list[int]]:
    """Return the tokens of an engine in a process of its own."""
    script = folder.with_suffix(".py")
    script.write_text(PROGRAM)
    arguments = [json.dumps(one) for one in (str(folder), {**SMALL, **settings}, prompts(), TOKENS)]
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("tokens:")] or [done.stderr]
    return json.loads(line.removeprefix("tokens:"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def server(folder_of: Callable[[str], Path]) -> Iterator[tuple[str, Path]]:
    """Yield the address of a server, and its folder."""
    folder = folder_of("own")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    settings = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    process = subprocess.Popen(
        [*command, *settings, *sizes], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        until = time.monotonic() + 600
        while time.monotonic() < until and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0


def test_a_server_answers_many_at_once_and_one_that_is_broken_off(server: tuple[str, Path]) -> None:
    import openai

    address, folder = server
    client = openai.OpenAI(base_url=address, api_key="none")
    request: dict[str, Any] = {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": TOKENS,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }

    def ask(text: list[int]) -> list[int]:
        choice: Any = client.completions.create(prompt=text, **request).choices[0]
        return list(choice.token_ids)

    stream = client.completions.create(prompt=prompts()[0], stream=True, **{**request, "max_tokens": 100})
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(ask, prompts())
        next(iter(stream))
        stream.close()
    assert list(answers) == greedy(folder, prompts(), TOKENS)
    assert ask(prompts()[-1]) == greedy(folder, prompts()[-1:], TOKENS)[0]


def test_a_folder_without_a_tensor_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from dbf_compile.errors import CheckpointError

    folder = shutil.copytree(folder_of("shared"), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.signs_out"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.down_proj' without signs_out"):
        engine(folder)
