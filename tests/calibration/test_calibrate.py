"""Calibration: the moments are right, and the model is left as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.calibration.losses import loss_named, output_loss
from dbf_compile.calibration.moments import Moment
from dbf_compile.errors import ConversionError, OptionError, WeightError
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize


class Net(nn.Module):
    """Two linears with an in-place activation between, a dropout, and a third linear that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.second(self.dropout(self.first(x * scale)).relu_())


class WithLoss(nn.Module):
    """Returns an object that carries a loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return type("Output", (), {"loss": self.net(x).square().mean()})()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 4, 5, generator=generator) for rows in (1, 3)]


def squared_sum(output, batch):
    return output.square().sum()


def test_input_moments_are_means_over_all_positions(batches):
    model = Net()
    found = calibrate(model, batches, loss=None)
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    hidden = model.first(positions).relu().detach()
    assert set(found) == {"first", "second"}
    # Moments are summed in float64 and rounded once; the hidden layer is a float32 product of another shape.
    torch.testing.assert_close(
        found["first"].input_second_moment, positions.square().mean(0), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        found["second"].input_second_moment, hidden.square().mean(0), rtol=1e-5, atol=1e-7
    )
    assert found["first"].output_grad_second_moment is None


def test_gradient_moments_match_autograd_up_to_one_factor_for_all_layers(batches):
    model = Net().eval()
    found = calibrate(model, batches, loss=squared_sum)
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    hidden = model.first(positions)
    output = model.second(hidden.relu())
    grads = torch.autograd.grad(output.square().sum(), [hidden, output])
    moments = [grad.square().mean(0) for grad in grads]
    common = max(moment.amax() for moment in moments)
    for name, moment in zip(("first", "second"), moments, strict=True):
        # float32 products in another order.
        torch.testing.assert_close(
            found[name].output_grad_second_moment, moment / common, rtol=1e-4, atol=1e-7
        )


def test_frozen_models_have_gradient_moments_too(batches):
    free = calibrate(Net(), batches, loss=squared_sum)
    frozen = calibrate(Net().requires_grad_(False), batches, loss=squared_sum)
    for name in free:
        assert torch.equal(free[name].output_grad_second_moment, frozen[name].output_grad_second_moment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_give_float32_moments(batches, dtype):
    found = calibrate(Net().to(dtype), [batch.to(dtype) for batch in batches], loss=squared_sum)
    assert found["first"].input_second_moment.dtype == torch.float32
    assert found["first"].output_grad_second_moment.dtype == torch.float32


def test_tiny_gradients_do_not_vanish(batches):
    tiny = calibrate(Net(), batches, loss=lambda output, batch: 1e-30 * output.square().sum())
    plain = calibrate(Net(), batches, loss=squared_sum)
    # 1e-30 is no power of two: float32 rounds every gradient differently.
    torch.testing.assert_close(
        tiny["first"].output_grad_second_moment, plain["first"].output_grad_second_moment, rtol=1e-5, atol=0
    )


def test_batches_may_be_tensors_sequences_or_mappings(batches):
    expected = calibrate(Net(), batches)["second"].input_second_moment
    for form in (lambda b: (b, 1.0), lambda b: [b], lambda b: {"x": b, "scale": 1.0}):
        assert torch.equal(calibrate(Net(), map(form, batches))["second"].input_second_moment, expected)


def test_the_loss_sees_output_and_batch(batches):
    seen = []

    def loss(output, batch):
        seen.append((tuple(output.shape), batch["x"].shape[0]))
        return output.sum()

    calibrate(Net(), [{"x": batch} for batch in batches], loss=loss)
    assert seen == [((1, 4, 3), 1), ((3, 4, 3), 3)]


def test_the_output_may_bring_its_own_loss(batches):
    found = calibrate(WithLoss(), batches, loss=output_loss)
    assert max(float(item.output_grad_second_moment.amax()) for item in found.values()) == 1
    with pytest.raises(ConversionError, match="without a loss"):
        calibrate(Net(), batches, loss=output_loss)


def test_a_layer_called_by_keyword_is_measured():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(input=x)

    assert calibrate(Keyword(), [torch.ones(4)])["layer"].input_second_moment.tolist() == [1, 1, 1, 1]


def test_a_layer_called_twice_counts_both():
    shared = nn.Linear(2, 2, bias=False)
    nn.init.eye_(shared.weight)
    found = calibrate(nn.Sequential(shared, nn.Hardtanh(-1, 1), shared), [torch.tensor([[3.0, 1.0]])])
    assert found["0"].input_second_moment.tolist() == [5, 1]


def state_of(model, batches):
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [batch.grad for batch in batches],
        torch.is_grad_enabled(),
        torch.random.get_rng_state(),
    )


def same(before, after):
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, (tuple, list)):
        return all(map(same, before, after))
    return before == after


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "raises"])
def test_the_model_is_left_as_it_was(batches, fails):
    model = Net().train()
    model.second.eval()
    model.first.weight.requires_grad_(False)
    model.second.weight.grad = torch.ones_like(model.second.weight)
    batches = [batch.requires_grad_() for batch in batches]
    before = state_of(model, batches)

    def loss(output, batch):
        if fails:
            raise ZeroDivisionError
        return squared_sum(output, batch)

    if fails:
        with pytest.raises(ZeroDivisionError):
            calibrate(model, batches, loss=loss)
    else:
        calibrate(model, batches, loss=loss)
    assert same(before, state_of(model, batches))


def test_no_batches_are_an_error():
    with pytest.raises(ConversionError, match="no batches"):
        calibrate(Net(), iter(()))


def test_a_batch_of_an_unknown_type_is_an_error():
    with pytest.raises(ConversionError, match="batch of type int"):
        calibrate(Net(), [3])


@pytest.mark.parametrize(
    "loss",
    [lambda o, b: o, lambda o, b: 1.0, lambda o, b: o.sum().detach()],
    ids=["matrix", "number", "detached"],
)
def test_a_loss_without_gradient_is_an_error(batches, loss):
    with pytest.raises(ConversionError, match="a loss of"):
        calibrate(Net(), batches, loss=loss)


def test_an_overflowing_layer_is_named():
    with pytest.raises(WeightError, match="first: input_second_moment"):
        calibrate(Net(), [torch.full((1, 5), float("inf"))])


def test_layers_the_loss_does_not_reach_have_input_moments_only(batches):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.ignored = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.used(x), self.ignored(x)

    found = calibrate(TwoHeads(), batches, loss=lambda output, batch: output[0].sum())
    assert found["ignored"].output_grad_second_moment is None
    assert found["used"].output_grad_second_moment is not None


# Forms, padding, clipping


def test_whole_moments_have_the_vectors_on_their_diagonal(batches):
    vectors = calibrate(Net(), batches, loss=squared_sum)
    for form, sides in (("input", 1), ("kronecker", 2)):
        found = calibrate(Net(), batches, loss=squared_sum, form=form)["second"]
        assert found.input_second_moment.shape == (7, 7)
        assert found.output_grad_second_moment.dim() == sides
        plain = found.diagonal()
        for name in ("input_second_moment", "output_grad_second_moment"):
            # float64 sums of the same float32 numbers, rounded once.
            torch.testing.assert_close(
                getattr(plain, name), getattr(vectors["second"], name), rtol=1e-6, atol=0
            )


def test_a_whole_input_moment_is_the_mean_of_outer_products_drawn_to_its_diagonal(batches):
    found = calibrate(Net(), batches, loss=None, form="input")["first"].input_second_moment
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    mean = positions.T @ positions / len(positions)
    share = len(positions) / (len(positions) + 5)
    expected = mean * torch.where(torch.eye(5, dtype=torch.bool), 1.0, share)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@given(positions=st.integers(1, 30), features=st.integers(2, 20), seed=st.integers(0, 2**31))
def test_no_direction_counts_nothing_because_few_positions_left_it_out(positions, features, seed):
    x = torch.randn(positions, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moment = Moment(whole=True)
    moment.add(x)
    found = moment.mean()
    torch.testing.assert_close(found.diagonal(), x.square().mean(0))
    # A share of the diagonal is in every direction, however few the positions are.
    share = features / (positions + features)
    least = share * x.square().mean(0).min()
    assert torch.linalg.eigvalsh(found).min() >= (1 - 1e-9) * least - 1e-12


def test_few_tokens_do_not_let_a_whole_moment_destroy_what_they_did_not_show():
    """Tokens are combinations of a few directions, which half as many of them cannot show all of."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 96, generator=generator) * torch.linspace(2, 0.1, 64)[:, None]
    seen, unseen = (torch.randn(count, 64, generator=generator) @ directions for count in (40, 4000))
    weight = torch.randn(48, 96, generator=generator)
    errors = {}
    for form in ("diagonal", "input"):
        layer = nn.Linear(96, 48, bias=False)
        known = calibrate(nn.Sequential(layer), [seen], loss=None, form=form)["0"]
        made = factorize(weight, 64, known, FactorizerConfig(iterations=60)).dense()
        errors[form] = ((unseen @ (made - weight).T).norm() / (unseen @ weight.T).norm()).item()
    assert errors["input"] < errors["diagonal"], errors


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x, attention_mask):
        return self.layer(x) * attention_mask[..., None]


def test_padding_does_not_count():
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found = calibrate(Masked(), [{"x": x, "attention_mask": mask}], loss=squared_sum)["layer"]
    kept = x[mask.bool()]
    alone = calibrate(Masked(), [{"x": kept[None], "attention_mask": torch.ones(1, 4)}], loss=squared_sum)[
        "layer"
    ]
    for name in ("input_second_moment", "output_grad_second_moment"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-5, atol=0)


def test_clipping_tames_one_long_token():
    quiet = torch.ones(1, 100, 4)
    loud = quiet.clone()
    loud[0, 0] = 1e4
    layer = nn.Sequential(nn.Linear(4, 4))
    moments = [
        calibrate(layer, [batch], loss=None, clip=clip)["0"].input_second_moment
        for batch, clip in ((quiet, None), (loud, None), (loud, 0.98))
    ]
    assert moments[1][0] > 1e5
    torch.testing.assert_close(moments[2], moments[0])


def test_only_the_layers_asked_for_are_measured(batches):
    assert set(calibrate(Net(), batches, loss=None, layers=["sec*"])) == {"second"}


def test_layers_never_reached_are_named_in_a_warning(batches, caplog):
    calibrate(Net(), batches, loss=None)
    assert "unused" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "full"}, "'diagonal'|diagonal"),
        ({"clip": 1.5}, "between 0 and 1"),
        ({"loss": "nll"}, "next_token"),
    ],
    ids=str,
)
def test_unknown_options_are_refused(batches, options, message):
    with pytest.raises(OptionError, match=message):
        calibrate(Net(), batches, **options)


def test_nan_activations_are_refused_by_layer():
    with pytest.raises(WeightError, match="first: input_second_moment"):
        calibrate(Net(), [torch.full((1, 5), float("nan"))], loss=None)


def test_gradients_of_layers_can_be_compared():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.eye_(model[0].weight)
    model[1].weight.data = 10 * torch.eye(4)
    found = calibrate(model, [torch.ones(3, 4)], loss=lambda output, batch: output.sum())
    # ∂loss/∂y is 1 behind the second layer and 10 before it.
    assert found["0"].output_grad_second_moment.tolist() == pytest.approx([1.0] * 4)
    assert found["1"].output_grad_second_moment.tolist() == pytest.approx([0.01] * 4)


# Models of transformers


def tiny(kind, **changes):
    import transformers

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{kind.split('For')[0].removesuffix('Model')}Config")(
        **sizes, **changes
    )
    return getattr(transformers, kind)(configuration).eval()


def tokens(count=4, length=12):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(50, (2, length), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForMaskedLM", "BertModel"])
@pytest.mark.parametrize("loss", ["auto", "sampled", "output"])
def test_every_kind_of_model_has_a_loss(kind, loss):
    if kind == "BertModel" and loss == "sampled":
        with pytest.raises(ConversionError, match="without logits"):
            calibrate(tiny(kind), tokens(), loss=loss)
        return
    found = calibrate(tiny(kind), tokens(), loss=loss)
    inner = [item for name, item in found.items() if "layer" in name]
    assert len(inner) >= 18
    assert all(item.output_grad_second_moment.any() for item in inner)
    again = calibrate(tiny(kind), tokens(), loss=loss)
    assert all(
        torch.equal(found[name].output_grad_second_moment, again[name].output_grad_second_moment)
        for name in found
        if found[name].output_grad_second_moment is not None
    )


def test_auto_is_the_loss_that_fits():
    causal = calibrate(tiny("LlamaForCausalLM"), tokens())
    labelled = calibrate(
        tiny("LlamaForCausalLM"), [{**batch, "labels": batch["input_ids"]} for batch in tokens()]
    )
    explicit = calibrate(tiny("LlamaForCausalLM"), tokens(), loss="next_token")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(causal[name].output_grad_second_moment, explicit[name].output_grad_second_moment)
    # The model's own loss is the same mean over the same tokens, summed by other code.
    torch.testing.assert_close(
        causal[name].output_grad_second_moment, labelled[name].output_grad_second_moment, rtol=1e-4, atol=1e-9
    )


def test_the_output_loss_estimates_the_jacobian():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    batch = torch.randn(1, 3, generator=torch.Generator().manual_seed(3))
    found = calibrate(model, [batch] * 4000, loss="output")["0"].output_grad_second_moment
    hidden = model[0](batch[0]).detach()
    jacobian = torch.autograd.functional.jacobian(lambda y: model[2](torch.tanh(y)), hidden)
    exact = jacobian.square().sum(0)
    # 4000 squares of normal numbers: a standard error of √(2 / 4000) = 2.2 %, of which five.
    torch.testing.assert_close(found / found.sum(), exact / exact.sum(), rtol=0.11, atol=0)


def test_a_wide_head_has_vectors_in_every_form():
    found = calibrate(tiny("LlamaForCausalLM"), tokens(1), form="kronecker")
    assert found["lm_head"].input_second_moment.dim() == found["lm_head"].output_grad_second_moment.dim() == 1
    assert found["model.layers.0.mlp.up_proj"].output_grad_second_moment.shape == (24, 24)


def test_without_data_tokens_are_random_and_the_same_every_time():
    first, second, other = (calibrate(tiny("LlamaForCausalLM"), seed=seed) for seed in (0, 0, 1))
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(first[name].input_second_moment, second[name].input_second_moment)
    assert not torch.equal(first[name].input_second_moment, other[name].input_second_moment)
    with pytest.raises(ConversionError, match="vocab_size"):
        calibrate(Net())


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertModel"])
def test_blocks_that_visit_a_device_one_at_a_time_give_the_same(kind):
    model = tiny(kind)
    plain = calibrate(model, tokens(), form="input")
    before = state_of(model, [])
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    visiting = calibrate(model, tokens(), form="input", device="cpu")
    assert same(before, state_of(model, []))
    assert storages == [parameter.data_ptr() for parameter in model.parameters()]
    assert set(plain) == set(visiting)
    for name, item in plain.items():
        assert torch.equal(item.input_second_moment, visiting[name].input_second_moment)
        if item.output_grad_second_moment is not None:
            # What is computed again is computed by the same operations.
            torch.testing.assert_close(
                item.output_grad_second_moment, visiting[name].output_grad_second_moment
            )


def test_what_is_computed_again_is_not_measured_again(monkeypatch):
    def additions(device):
        calls = []
        add = Moment.add
        with monkeypatch.context() as patch:
            patch.setattr(Moment, "add", lambda *args, **kwargs: calls.append(1) or add(*args, **kwargs))
            calibrate(tiny("LlamaForCausalLM"), tokens(2), device=device)
        return len(calls)

    assert additions("cpu") == additions(None) > 0


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("LlamaForCausalLM", "next_token"), ("BertForMaskedLM", "sampled"), ("BertModel", "output")],
)
def test_padding_has_no_part_in_a_loss(kind, loss):
    (batch,) = tokens(1)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 8:] = 0
    model = tiny(kind)
    criterion = loss_named(loss, model, torch.Generator().manual_seed(0))
    outputs = model(**batch, attention_mask=mask)
    seen = outputs.last_hidden_state if loss == "output" else outputs.logits
    (gradient,) = torch.autograd.grad(criterion(outputs, {**batch, "attention_mask": mask}), seen)
    assert gradient[:, :7].any() and not gradient[:, 8:].any()


def test_blocks_keep_only_their_inputs_for_the_backward_pass():
    def kept(device):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        model = tiny("LlamaForCausalLM")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            calibrate(model, tokens(1), device=device)
        return sum(sizes)

    assert kept("cpu") < 0.5 * kept(None)


def test_a_failure_half_way_brings_every_block_home():
    model = tiny("LlamaForCausalLM")
    before = state_of(model, [])

    def loss(output, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calibrate(model, tokens(1), loss=loss, device="cpu")
    assert same(before, state_of(model, []))
    assert all("forward" not in vars(module) for module in model.modules())
