"""The student: it computes what the compressed model does, with dense weights in place of factors."""

import pytest
import torch
from support.models.tiny import error_of, factored, tiny_gpt2, tiny_llama
from torch import nn

pytest.importorskip("transformers")

from dbf_compile.finetuning.student import small_parameters, stacks_of, training_dtype, write_out_
from dbf_compile.tables import quantize_tables, swap_tables_

TOKENS = torch.arange(1, 17)[None]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_it_computes_what_the_compressed_model_does(build):
    model = factored(build())
    if build is tiny_llama:
        swap_tables_(model, quantize_tables(model, {"model.embed_tokens": "int8", "lm_head": "int8"}))
    expected = model(TOKENS).logits
    factors = {name: layer.factors for stack in stacks_of(model) for name, layer in stack.items()}
    layers = write_out_(model, torch.float32)
    assert layers.keys() == factors.keys()
    for name, layer in layers.items():
        layer.weight.data.copy_(factors[name].dense())
    assert error_of(model(TOKENS).logits, expected) < 1e-4
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.weight" for name in layers}


def test_tensors_of_another_dtype_than_the_model_keep_it():
    model = factored(tiny_llama(1).bfloat16())
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()  # as from_pretrained has it
    write_out_(model, torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    write_out_(half := factored(tiny_llama(1).half()), torch.float32)
    assert {tensor.dtype for tensor in half.parameters()} == {torch.float32}


def test_layers_that_share_a_first_stage_are_one_stack():
    stacks = [list(stack) for stack in stacks_of(factored(tiny_llama(1)))]
    assert [len(stack) for stack in stacks] == [3, 1, 2, 1]
    assert [name.rpartition(".")[2] for name in stacks[0]] == ["q_proj", "k_proj", "v_proj"]


def test_norms_and_biases_are_small_parameters():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    assert set(small_parameters(module)) == {"0.bias", "1.weight", "1.bias"}


def test_half_precision_trains_in_single():
    model = tiny_llama(1)
    cpu = torch.device("cpu")
    assert training_dtype(model, cpu) == torch.float32
    assert training_dtype(model.half(), cpu) == torch.float32
    assert training_dtype(model.bfloat16(), torch.device("cuda")) == torch.bfloat16
    assert training_dtype(model, cpu) in (torch.bfloat16, torch.float32)  # as the processor is
