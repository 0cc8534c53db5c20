"""One weight that learns: its signs and scales follow the gradient of the dense weight that they stand for.

    Ŵ = diag(a) · A · diag(m) · B · diag(b)          A [N, R], B [R, K] of ±1,  G = ∂loss/∂Ŵ [N, K]

The scales a, m, b follow their gradients by Adam. A sign has no small steps: it is the sign of a latent number that begins at
+1 or -1 and collects the gradient of its sign, which passes through unchanged (straight-through estimator):

    P = G diag(b) Bᵀ         ∂loss/∂A = diag(a) P diag(m)           latent  ←  latent - rate · ∂loss/∂A / √(v_row v_column)
    Q = Aᵀ diag(a) G         ∂loss/∂B = diag(m) Q diag(b)           and the same for B

v are second moments of rows and columns alone (Adafactor). The latent is the only state of a sign, 2 bytes in float16: there
is no momentum, as the latent is a sum of gradients itself, and no second moment of a sign's own. The gradients of the scales
follow from P and Q. So a step costs three products of N · R · K, that which builds Ŵ included.

``benchmarks/results/finetune.csv`` has what was compared: at small rates hardly any sign flips, and nothing is gained over scales
alone; Adam, with momentum and a second moment for every sign, is no better at five times the memory; a share of the signs that
flips in every step, those of the best scores, gains nothing at two bits.

Source: second moments as in Adafactor (arXiv 1804.04235); latents that are but accumulators of gradients as in Helwegen et al.
(arXiv 1906.02107).

Shape letters: K in_features, R mid_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dbf_compile.factorizer.projection import half_scales, signs_of
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.finetuning.adam import RelativeAdam
from dbf_compile.signs import pack_signs, unpack_signs

_MEMORY = 0.95  # of the second moments
_LARGEST = 2.0  # latent: what has always agreed with its sign can still change its mind
_ZERO = 2.0**-25  # and less is zero in float16, whose sign is +1
_TINY = 1e-30  # as in Adafactor; else rows whose gradient is next to nothing would move like all others, or overflow


class Latents:
    """A sign matrix as latents, and the second moments of its gradient.

    Args:
        signs: float16 of ±1 [rows, columns], which become the latents.
    """

    def __init__(self, signs: Tensor) -> None:
        self.values = signs
        self.rows, self.columns = (torch.zeros(size, device=signs.device) for size in signs.shape)
        self.steps = torch.zeros((), device=signs.device)

    def signs(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix of ±1."""
        return signs_of(self.values).to(dtype)

    def step(self, gradient: Tensor, rate: float) -> int:
        """Learn from a gradient, float32 [rows, columns], which is overwritten; return how many signs flipped."""
        self.steps += 1
        square = gradient.square()
        self.rows.lerp_(square.mean(1) + _TINY, 1 - _MEMORY)
        self.columns.lerp_(square.mean(0) + _TINY, 1 - _MEMORY)
        seen = 1 - _MEMORY ** float(self.steps)
        rows, columns = (self.rows / self.rows.mean()).sqrt(), (self.columns / seen).sqrt()
        return self.move(gradient.div_(rows[:, None]).div_(columns), rate)

    def move(self, direction: Tensor, rate: float) -> int:
        """Move the latents against a direction, float32 [rows, columns]; return how many signs flipped."""
        moved = self.values.float()  # comparisons of float16 take ten times as long
        before = moved < -_ZERO
        moved.sub_(direction, alpha=rate).clamp_(-_LARGEST, _LARGEST)
        self.values.copy_(moved)
        return int((before != (moved < -_ZERO)).sum())

    def moments(self) -> dict[str, Tensor]:
        """Return what the next step depends on beside the latents; tensors are those in use."""
        return {"rows": self.rows, "columns": self.columns, "steps": self.steps}


class LearningWeight:
    """The factors of one weight, of one layer or of several that share their first stage.

    Args:
        factors: of the layers by name, their rows stacked in this order.
        dtype: of products and of the dense weight.
    """

    def __init__(self, factors: Mapping[str, DoubleBinaryFactors], dtype: torch.dtype) -> None:
        first = next(iter(factors.values()))
        self.names, self.rows = list(factors), [one.out_features for one in factors.values()]
        self._dtype = dtype
        self._inner = Latents(unpack_signs(first.signs_in, first.in_features, torch.float16))
        outer = [unpack_signs(one.signs_out, first.mid_features, torch.float16) for one in factors.values()]
        self._outer = Latents(torch.cat(outer))
        self._scales = {
            "out": torch.cat([one.scale_out for one in factors.values()]).float(),
            "mid": first.scale_mid.float().clone(),
            "in": first.scale_in.float().clone(),
        }
        self._adam = RelativeAdam(self._scales)

    @property
    def signs(self) -> int:
        """The number of signs."""
        return self._inner.values.numel() + self._outer.values.numel()

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return Ŵ [N, K]."""
        out, mid, into = (self._scales[name].to(self._dtype) for name in ("out", "mid", "in"))
        product = (self._outer.signs(self._dtype) * mid) @ (self._inner.signs(self._dtype) * into)
        return product.mul_(out[:, None])

    @torch.no_grad()
    def factors(self) -> dict[str, DoubleBinaryFactors]:
        """Return the factors of every layer, with scales in float16; training may have made scales negative."""
        into, mid, out = (signs_of(self._scales[name]) for name in ("in", "mid", "out"))
        stacked = DoubleBinaryFactors(
            pack_signs(self._inner.signs(torch.float32) * into * mid[:, None]),
            pack_signs(self._outer.signs(torch.float32) * out[:, None]),
            *half_scales(1.0, *(self._scales[name].abs() for name in ("in", "mid", "out"))),
        )
        return dict(zip(self.names, stacked.split(self.rows), strict=True))

    @torch.no_grad()
    def step(self, gradient: Tensor, sign_rate: float, scale_rate: float) -> int:
        """Learn from one gradient.

        Args:
            gradient: G, float32 [N, K]; one of zeros alone changes nothing.
            sign_rate: how far latents move, in units of where they began; 0 leaves all signs.
            scale_rate: how far scales move, in units of their root mean square.

        Returns:
            How many signs flipped.
        """
        if not bool(gradient.any()):
            return 0
        out, mid, into = (self._scales[name] for name in ("out", "mid", "in"))
        inner, outer = self._inner.signs(self._dtype), self._outer.signs(self._dtype)
        for_outer = ((gradient * into).to(self._dtype) @ inner.T).float()  # P
        for_inner = (outer.T @ (gradient * out[:, None]).to(self._dtype)).float()  # Q
        agreement = for_outer * outer
        scales = {
            "out": agreement @ mid,
            "mid": out @ agreement,
            "in": mid @ (for_inner * inner),
        }
        flips = 0
        if sign_rate:
            flips += self._outer.step(for_outer.mul_(mid).mul_(out[:, None]), sign_rate)
            flips += self._inner.step(for_inner.mul_(into).mul_(mid[:, None]), sign_rate)
        self._adam.step(scales, scale_rate)
        return flips

    def learned(self) -> dict[str, Tensor]:
        """Return latents and scales by name; tensors are those in use."""
        return {"inner": self._inner.values, "outer": self._outer.values, **self._scales}

    def moments(self) -> dict[str, Tensor]:
        """Return what else the next step depends on, by name; tensors are those in use."""
        latents = {"inner": self._inner, "outer": self._outer}
        parts = {f"{name}.{key}": t for name, one in latents.items() for key, t in one.moments().items()}
        return {**parts, **self._adam.state()}
