"""Calibration with whole matrices, padding and clipped tokens."""

import torch
from support.models.calibrated import Net, squared_sum, tiny, tokens
from torch import nn

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize


def test_whole_moments_have_the_vectors_on_their_diagonal(batches):
    vectors = calibrate(Net(), batches, loss=squared_sum)
    for curvature, sides in (("input", 1), ("kronecker", 2)):
        importance = calibrate(Net(), batches, loss=squared_sum, curvature=curvature)["second"]
        assert importance.input_second_moment.shape == (7, 7)
        assert importance.output_grad_second_moment.dim() == sides
        plain = importance.diagonal()
        for name in ("input_second_moment", "output_grad_second_moment"):
            # float64 sums of the same float32 numbers, rounded once.
            torch.testing.assert_close(
                getattr(plain, name), getattr(vectors["second"], name), rtol=1e-6, atol=0
            )


def test_a_whole_input_moment_is_the_mean_of_outer_products_drawn_to_its_diagonal(batches):
    moment = calibrate(Net(), batches, loss=None, curvature="input")["first"].input_second_moment
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    mean = positions.T @ positions / len(positions)
    share = len(positions) / (len(positions) + 5)
    expected = mean * torch.where(torch.eye(5, dtype=torch.bool), 1.0, share)
    torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-6)


def test_few_tokens_do_not_let_a_whole_moment_destroy_what_they_did_not_show():
    """Tokens are combinations of a few directions, which half as many of them cannot show all of."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 96, generator=generator) * torch.linspace(2, 0.1, 64)[:, None]
    seen, unseen = (torch.randn(count, 64, generator=generator) @ directions for count in (40, 4000))
    weight = torch.randn(48, 96, generator=generator)
    errors = {}
    for curvature in ("diagonal", "input"):
        layer = nn.Linear(96, 48, bias=False)
        importance = calibrate(nn.Sequential(layer), [seen], loss=None, curvature=curvature)["0"]
        dense = factorize(weight, 64, importance, FactorizerConfig(iterations=60)).dense()
        errors[curvature] = ((unseen @ (dense - weight).T).norm() / (unseen @ weight.T).norm()).item()
    assert errors["input"] < errors["diagonal"], errors


def test_a_wide_head_has_vectors_in_every_form():
    importance = calibrate(tiny("causal"), tokens(1), curvature="kronecker")
    assert (
        importance["lm_head"].input_second_moment.dim()
        == importance["lm_head"].output_grad_second_moment.dim()
        == 1
    )
    assert importance["model.layers.0.mlp.up_proj"].output_grad_second_moment.shape == (172, 172)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x, attention_mask):
        return self.layer(x) * attention_mask[..., None]


def test_padding_does_not_count():
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    importance = calibrate(Masked(), [{"x": x, "attention_mask": mask}], loss=squared_sum)["layer"]
    kept = x[mask.bool()]
    alone = calibrate(Masked(), [{"x": kept[None], "attention_mask": torch.ones(1, 4)}], loss=squared_sum)[
        "layer"
    ]
    for name in ("input_second_moment", "output_grad_second_moment"):
        torch.testing.assert_close(getattr(importance, name), getattr(alone, name), rtol=1e-5, atol=0)


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
