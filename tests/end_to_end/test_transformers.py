"""Whole tiny models of the library transformers, random."""

import copy
import logging

import pytest
import torch
from support.models.tiny import OPTIONS, error_of, factored, tiny_bert, tiny_gpt2, tiny_llama
from torch._dynamo.utils import counters

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

# Two layers of float32 sums of at most 200 products behind norms and softmax; other kernels sum in another order.
TOLERANCE = 1e-4

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
# Per layer of the model: Llama has q|k|v, o, gate|up, down; GPT-2 four Conv1D; BERT q|k|v, output, two of the MLP, and
# a pooler at the end. The head of Llama is skipped by name, that of GPT-2 is tied to the embedding.
REPLACED = {"llama": 2 * 4, "gpt2": 2 * 4, "bert": 2 * 4 + 1}
MERGED = {"llama": 2 * 2, "gpt2": 0, "bert": 2}


def ids(batch, length, seed=0):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def first_output(model, tokens):
    return model(tokens)[0]


@pytest.fixture
def graphs(monkeypatch):
    """Record the graphs that the backend is given."""
    from dbf_compile.compiler import backend

    seen = []
    original = backend.inductor.compile_graph
    monkeypatch.setattr(
        backend.inductor, "compile_graph", lambda gm, *args: seen.append(gm) or original(gm, *args)
    )
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_model_compiles_into_one_graph(name, caplog, graphs):
    model, tokens = MODELS[name](), ids(2, 9)
    eager = factored(model)
    counters.clear()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="dbf_compile.compiler.backend"):
        y = first_output(torch.compile(model, backend="dbf", fullgraph=True, options=OPTIONS), tokens)
        assert error_of(y, first_output(eager, tokens)) < TOLERANCE
        assert error_of(y, first_output(model, tokens)) > 1e-3  # factored indeed
    assert len(graphs) == 1 and not counters["graph_break"]
    (record,) = (record for record in caplog.records if record.msg.startswith("rewrites"))
    assert record.args["replace_linears"] == REPLACED[name]
    assert record.args["merge_shared_inputs"] == MERGED[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_compiles_into_the_same_products(name, unlowered):
    model, tokens = factored(MODELS[name]()), ids(2, 9)
    with torch.no_grad():
        y = first_output(torch.compile(model, backend="dbf", fullgraph=True), tokens)
        assert error_of(y, first_output(model, tokens)) < TOLERANCE
    (graph,) = unlowered
    products = sum("sign_matmul" in str(node.target) for node in graph.graph.nodes)
    # Siblings share the first stage; the second stages of the parts stay apart.
    extra = {"llama": 2 * (2 + 1), "gpt2": 0, "bert": 2 * 2}[name]
    assert products == 2 * REPLACED[name] + extra


def test_other_lengths_and_batches_stay_right_with_few_graphs(unlowered):
    model = tiny_llama(layers=1)
    eager = factored(model)
    with torch.no_grad():
        run = torch.compile(model, backend="dbf", fullgraph=True, options=OPTIONS)
        for batch, length in ((1, 7), (1, 11), (1, 13), (2, 5), (3, 17)):
            tokens = ids(batch, length)
            assert error_of(first_output(run, tokens), first_output(eager, tokens)) < TOLERANCE
    # Static, then dynamic in the length, then in the batch as well.
    assert len(unlowered) <= 3


def generate(model, tokens, **options):
    return model.generate(tokens, max_new_tokens=6, do_sample=False, **options)


def compile_config(dynamic=None):
    config = transformers.CompileConfig(backend="dbf", mode=None, fullgraph=True, dynamic=dynamic)
    config._compile_all_devices = True  # transformers leaves the CPU out otherwise
    return config


def test_generate_with_a_static_cache(unlowered):
    model = factored(tiny_llama(layers=1))
    prompts = [ids(1, 7), ids(1, 7, seed=1), ids(2, 7)]
    expected = [generate(model, prompt, disable_compile=True) for prompt in prompts]
    for prompt, tokens in zip(prompts, expected, strict=True):
        options = {"cache_implementation": "static", "compile_config": compile_config()}
        assert torch.equal(generate(model, prompt, **options), tokens)
    # Decoding is compiled once for each batch size; equal shapes are not compiled again.
    assert len(unlowered) == 2


def test_generate_through_a_compiled_forward_compiles_prefill_and_decode(graphs):
    model = factored(tiny_llama(layers=1))
    prompt = ids(1, 7)
    expected = generate(model, prompt, disable_compile=True)
    model.forward = torch.compile(model.forward, backend="dbf", fullgraph=True)
    tokens = generate(model, prompt, cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, expected)
    assert len(graphs) == 2


def test_generate_with_a_dense_model_compiled_whole(graphs):
    model = tiny_llama(layers=1)
    prompt = ids(1, 7)
    expected = generate(factored(model), prompt, disable_compile=True)
    model.forward = torch.compile(model.forward, backend="dbf", fullgraph=True, options=OPTIONS)
    with torch.no_grad():
        tokens = generate(model, prompt, cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, expected)
    assert len(graphs) == 2


def test_bfloat16_models():
    model, tokens = tiny_llama(layers=1).to(torch.bfloat16), ids(2, 9)
    eager = factored(model)
    with torch.no_grad():
        y = first_output(torch.compile(model, backend="dbf", fullgraph=True, options=OPTIONS), tokens)
        expected = first_output(eager, tokens)
    assert y.dtype == torch.bfloat16
    # bfloat16 rounds at 2^-8 at every layer's end; the compiler rounds less often than eager does.
    assert error_of(y, expected) < 16 * 2**-8


def test_a_converted_model_moves_saves_and_copies_like_any_other(tmp_path):
    model, tokens = factored(tiny_llama()), ids(2, 9)
    expected = first_output(model, tokens)
    copied = copy.deepcopy(model)
    assert torch.equal(first_output(copied, tokens), expected)
    other = factored(tiny_llama(), seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(first_output(other, tokens), expected)
