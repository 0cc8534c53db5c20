"""What flows into blocks: recorded once, and enough to run each block on its own."""

import pytest
import torch
from support.models.tiny import tiny_bert, tiny_gpt2, tiny_llama

from dbf_compile import machine
from dbf_compile.calibration.offload import blocks_of
from dbf_compile.calibration.streams import Streams, record, stacks_of
from dbf_compile.errors import ConversionError
from dbf_compile.linear import dense_linears

pytest.importorskip("transformers")


def ids(count=2, length=9):
    return [
        torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(n)) for n in range(count)
    ]


def last_hidden(model, tokens):
    return model(tokens, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
@torch.no_grad()
def test_blocks_run_one_by_one_give_what_the_model_gives(make):
    model = make().eval()
    blocks = list(blocks_of(model, dense_linears(model)).values())
    assert len(blocks) == 2
    streams = record(model, blocks, ids())
    for batch, tokens in enumerate(ids()):
        expected = model(tokens, output_hidden_states=True).hidden_states
        hidden = streams.hidden[batch]
        assert torch.equal(hidden, expected[0])
        first = streams.run(blocks[0], 0, batch, hidden)
        assert torch.allclose(first, expected[1], rtol=1e-5, atol=1e-6)
        streams.run(blocks[1], 1, batch, first)
    assert all(not module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_model_in_bfloat16_is_recorded_in_float32_and_masks_stay_shared():
    model = tiny_llama().to(torch.bfloat16)
    blocks = list(model.model.layers)
    streams = record(model, blocks, [{"input_ids": ids()[0], "attention_mask": torch.ones(1, 9)}])
    assert streams.hidden[0].dtype == torch.float32
    first, second = streams.calls[0]
    positions = first[1]["position_embeddings"]
    assert positions[0].dtype == torch.float32 and positions[0] is second[1]["position_embeddings"][0]
    streams.run(blocks[0].float(), 0, 0, streams.hidden[0])


def test_a_setting_of_the_cache_comes_back():
    model = tiny_llama()
    assert model.config.use_cache
    record(model, list(model.model.layers), ids())
    assert model.config.use_cache


class Twice(torch.nn.Module):
    def __init__(self, times, positional=True):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = self.blocks[0](x)
        return x


@torch.no_grad()
def test_blocks_that_are_not_called_are_refused():
    with pytest.raises(ConversionError, match=r"0 calls of 1 blocks.*independent"):
        model = Twice(0)
        record(model, list(model.blocks), [torch.randn(2, 4)])


@torch.no_grad()
def test_padding_does_not_count():
    model = tiny_bert().eval()
    mask = torch.tensor([[1] * 6 + [0] * 3])
    streams = record(
        model, list(model.encoder.layer), [{"input_ids": ids()[0], "attention_mask": mask}, ids()[1]]
    )
    values = torch.randn(1, 9, 64)
    assert torch.equal(streams.counted(0, values), values[0, :6])
    assert torch.equal(streams.counted(1, values), values[0])


class Stacks(torch.nn.Module):
    """Lists of blocks that are called in many ways; ``order`` is a program of names of blocks, + adds one in between."""

    def __init__(self, order):
        super().__init__()
        for name in "abc":
            self.register_module(name, torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3)))
        self.shared = torch.nn.ModuleList([torch.nn.Linear(4, 4)] * 3)
        self.order = order

    def forward(self, x):
        for step in self.order.split():
            x = x + 1 if step == "+" else self.get_submodule(step)(x)
        return x

    @property
    def blocks(self):
        return {
            f"{name}.{n}": block
            for name in ("a", "b", "c", "shared")
            for n, block in enumerate(getattr(self, name))
        }


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("a.0 a.1 a.2", ["a0 a1 a2"]),
        ("b.0 b.1 b.2 + a.0 a.1 a.2", ["b0 b1 b2", "a0 a1 a2"]),  # an encoder, then a decoder
        ("a.0 a.1 a.2 b.0 b.1 b.2", ["a0 a1 a2", "b0 b1 b2"]),
        ("a.0 a.2", ["a0 a2"]),  # a block is left out
        ("b.1", ["b1"]),
        ("a.0 + a.1 a.2 b.0", ["b0"]),  # something is added between two blocks
        ("a.0 b.0 a.1 b.1 a.2 b.2", []),  # lists take turns
        ("a.1 a.0 b.0 b.1", ["b0 b1"]),  # backwards
        ("a.0 a.1 a.0 a.1 b.0 b.1", ["b0 b1"]),  # twice
        ("shared.0 shared.1 shared.2 b.0 b.1", ["b0 b1"]),
        ("+", []),
    ],
)
def test_a_stack_is_a_row_of_blocks_each_of_which_reads_what_the_one_before_returns(order, expected):
    model = Stacks(order)
    stacks = stacks_of(model, model.blocks, [torch.randn(2, 4)])
    assert [" ".join(name.replace(".", "") for name in stack) for stack in stacks] == expected
    for stack in stacks:
        streams = record(model, [model.get_submodule(name) for name in stack], [torch.randn(2, 4)])
        assert len(streams.calls[0]) == len(stack)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_stack_is_one_of_every_kind_of_batch():
    class Picture(Stacks):
        def forward(self, x, picture=None):
            self.order = "a.0 a.1" if picture is None else "b.0 b.1 + a.0 a.1"
            return super().forward(x)

    model, x = Picture(""), torch.randn(2, 4)
    text, both = {"x": x}, {"x": x, "picture": x}
    assert stacks_of(model, model.blocks, [both, both]) == [["b.0", "b.1"], ["a.0", "a.1"]]
    assert stacks_of(model, model.blocks, [both, text]) == [["a.0", "a.1"]]
    assert stacks_of(model, model.blocks, []) == []


@pytest.mark.parametrize("order", ["a.0 + a.1", "a.1 a.0", "a.0", "a.0 a.0 a.1"])
@torch.no_grad()
def test_blocks_that_do_not_read_each_other_are_refused(order):
    model = Stacks(order)
    with pytest.raises(ConversionError, match="independent"):
        record(model, list(model.a)[:2], [torch.randn(2, 4)])


class _Minding(torch.nn.Module):
    """A block that minds products of rounded numbers in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.way, self.linear = way, torch.nn.Linear(8, 8)

    def forward(self, hidden):
        out = self.linear(hidden)
        if out.dtype == torch.bfloat16 and self.way == "raises":
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return out / 0 if out.dtype == torch.bfloat16 and self.way == "overflows" else out


@pytest.mark.parametrize(("way", "narrow"), [("agrees", True), ("raises", False), ("overflows", False)])
def test_streams_are_narrow_only_where_a_block_takes_it(monkeypatch, way, narrow):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda kind: True)
    mask = torch.tensor([[True, False]])
    streams = Streams([torch.randn(1, 2, 8)] * 2, [[((), {})]] * 2, [None, mask])
    block = _Minding(way)
    assert not streams.narrow
    chosen = streams.for_block(block, 0)
    assert chosen.narrow is narrow
    (output, _) = chosen.outputs(block, 0, chosen.hidden)
    exact = block.linear(chosen.hidden[0])
    assert output.dtype == torch.float32
    assert torch.equal(output, exact) is not narrow
    assert torch.allclose(output, exact, atol=0.02)
