"""The loss of a weight is what the model's predictions lose with it alone factored; the model is left as it was."""

import copy

import pytest
import torch
from support.models.tiny import tiny_gpt2, tiny_llama
from torch import nn

from dbf_compile.calibration.compare import compare
from dbf_compile.compression.curves import allocate
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.compression.sensitivity import measured_losses
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize
from dbf_compile.linear import dense_linears
from dbf_compile.options import CompressionConfig

transformers = pytest.importorskip("transformers")
QUICK = FactorizerConfig(iterations=5, sweeps=0)


def factored_weights(model, **options):
    jobs = LayerFactorizer(CompressionConfig(bits_per_weight=1.0, **options)).jobs(model)
    return {job.name: (job, factorize(job.stacked, job.mid_features, None, QUICK)) for job in jobs}


def losses_of(model, factored, batches, shares=None, **options):
    shares = shares or dict.fromkeys(factored, 1.0)
    jobs = [job for job, _ in factored.values()]
    return measured_losses(
        model, jobs, lambda job: factored[job.name][1], batches, shares, progress=False, **options
    )


def windows(count=2, high=256):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, high, (1, 12), generator=generator) for _ in range(count)]


def with_one(model, job, factors):
    copied = copy.deepcopy(model)
    layers = dense_linears(copied)
    for name, part in zip(job.names, factors.dense().split(job.rows), strict=True):
        weight = layers[name].weight
        weight.data.copy_(part if weight.shape == part.shape else part.mT)
    return copied


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_losses_are_divergences_with_one_weight_factored(make):
    model = make()
    factored, batches = factored_weights(model), windows()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    losses = losses_of(model, factored, batches)
    assert list(losses) == list(factored)
    for name, (job, factors) in factored.items():
        expected = compare(model, with_one(model, job, factors), batches)["kl"]
        # Products may be rounded to bfloat16 while it measures.
        assert losses[name] == pytest.approx(expected, rel=0.1, abs=1e-5)
    after = dict(model.named_parameters())
    assert all(id(after[name]) == key and torch.equal(after[name], p) for name, (key, p) in before.items())


def test_a_model_that_predicts_no_tokens_loses_squares_of_its_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).requires_grad_(False)
    factored = factored_weights(model, skip=())
    x = torch.randn(16, 64)
    losses = losses_of(model, factored, [x])
    for name, (job, factors) in factored.items():
        lost = with_one(model, job, factors)(x) - model(x)
        expected = float(lost.square().sum() / model(x).square().sum())
        assert losses[name] == pytest.approx(expected, rel=0.1)


def test_dropout_is_no_loss_and_the_mode_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.5), nn.Linear(96, 64)).requires_grad_(False)
    factored, x = factored_weights(model, skip=()), torch.randn(16, 64)
    quiet = losses_of(model.eval(), factored, [x])
    assert losses_of(model.train(), factored, [x]) == quiet
    assert model.training and model[1].training


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    factored = factored_weights(model, skip=())
    weights = [layer.weight for layer in model]

    def fail(module, args):
        if any(layer.weight is not weight for layer, weight in zip(model, weights, strict=True)):
            raise RuntimeError("no more")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        losses_of(model, factored, [torch.randn(4, 64)])
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))


def test_what_stands_at_padding_changes_nothing():
    model = tiny_llama()
    factored = factored_weights(model)
    ids = windows(1)[0]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    other = torch.where(mask.bool(), ids, 5)
    one, two = (
        losses_of(model, factored, [{"input_ids": tokens, "attention_mask": mask}]) for tokens in (ids, other)
    )
    assert one == pytest.approx(two, rel=1e-3, abs=1e-7)


class Experts(nn.Module):
    """Two blocks, each of as many layers in a list as asked for; their mean is added."""

    def __init__(self, experts):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(96, 96) for _ in range(experts))})
            for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.stack([expert(x) for expert in block["experts"]]).mean(0)
        return x


def test_long_lists_of_a_block_are_measured_together_and_share_the_loss():
    model = Experts(6)
    factored = factored_weights(model, skip=())
    shares = {name: float(name[-1] == "2") for name in factored}  # all of it to one
    losses = losses_of(model, factored, [torch.randn(8, 96)], shares)
    assert {name for name, loss in losses.items() if loss > 0} == {
        "blocks.0.experts.2",
        "blocks.1.experts.2",
    }
    equal = losses_of(model, factored, [torch.randn(8, 96)], dict.fromkeys(factored, 0.0))
    assert len({round(loss, 9) for name, loss in equal.items() if "blocks.0" in name}) == 1
    short = Experts(3)
    alone = losses_of(short, factored_weights(short, skip=()), [torch.randn(8, 96)])
    assert len({round(loss, 9) for loss in alone.values()}) == 6


class Uneven(nn.Module):
    """What one of two equal layers returns counts for nothing."""

    def __init__(self, gains):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.gains = gains

    def forward(self, x):
        return self.gains[0] * self.first(x) + self.gains[1] * self.second(x)


@pytest.mark.parametrize("gains", [(1.0, 1e-3), (1e-3, 1.0)])
def test_bits_go_where_the_predictions_lose(tmp_path, gains):
    options = {"bits_per_weight": 2.0, "cache_dir": str(tmp_path), "progress": False, "multiple": 8}
    sizes = allocate(Uneven(gains), None, batches=[torch.randn(32, 64)], **options).mid_features
    assert (sizes["first"] > 2 * sizes["second"]) == (gains[0] > gains[1])
    assert (sizes["second"] > 2 * sizes["first"]) == (gains[1] > gains[0])
