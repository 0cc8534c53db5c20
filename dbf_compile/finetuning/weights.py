"""One weight that learns: its signs and scales follow the gradient of the dense weight that they stand for.

    Ŵ = diag(a) · A · diag(m) · B · diag(b)          A [N, R], B [R, K] of ±1,  G = ∂loss/∂Ŵ [N, K]

The scales a, m, b follow their gradients by Adam. A sign has no small steps: it flips or stays, and what a flip changes is
certain while its gradient is mostly noise. So G is remembered in a mean M of many steps, which serves both factors, and from
time to time a few signs flip, those of the best scores:

    P = M diag(b) Bᵀ         ∂loss/∂A = diag(a) P diag(m)           score  =  A ∘ ∂loss/∂A / (row's · column's size)
    Q = Aᵀ diag(a) M         ∂loss/∂B = diag(m) Q diag(b)           and the same for B

A flip changes the loss by -2 A ∘ ∂loss/∂A to first order. Sizes are root mean squares: without them a few rows and columns
with large gradients get all flips, and one such step ruins the model. The state of a sign is its byte and its part of M.

``benchmarks/results/finetune.csv`` has what was compared on a small model, docs/guides/finetune.md what on a real one.

Source: second moments of rows and columns alone as in Adafactor (arXiv 1804.04235); a capped share of codes a step as in
PV-Tuning (arXiv 2405.14852); the memory of the dense weight's gradient is our own.

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

_TINY = 1e-30  # else rows whose gradient is next to nothing would count like all others, or overflow


class Signs:
    """A sign matrix whose signs flip.

    Args:
        values: int8 of ±1 [rows, columns].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.owed = torch.zeros(
            (), dtype=torch.float64
        )  # flips; parts of one add up. Not every GPU has float64

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix of ±1."""
        return self.values.to(dtype)

    def flip(self, gradient: Tensor, share: float) -> int:
        """Flip the signs that gain most by it, and return how many.

        Args:
            gradient: of the loss by these signs, float32 [rows, columns]; it is overwritten.
            share: of all signs that may flip.
        """
        self.owed += share * self.values.numel()
        count = min(int(self.owed), self.values.numel())
        if not count:
            return 0
        self.owed -= count
        score = gradient.mul_(self.values)
        square = score.square()
        rows, columns = square.mean(1) + _TINY, square.mean(0) + _TINY
        score.div_((rows / rows.mean()).sqrt()[:, None]).div_(columns.sqrt())
        best, places = score.flatten().topk(count)
        places = places[best > 0]
        self.values.view(-1)[places] *= -1
        return len(places)


class LearningWeight:
    """The factors of one weight, of one layer or of several that share their first stage.

    Args:
        factors: of the layers by name, their rows stacked in this order.
        dtype: of products, of the dense weight and of the memory.
        signs: whether signs learn, too.
    """

    def __init__(
        self, factors: Mapping[str, DoubleBinaryFactors], dtype: torch.dtype, signs: bool = True
    ) -> None:
        first = next(iter(factors.values()))
        self.names, self.rows = list(factors), [one.out_features for one in factors.values()]
        self._dtype = dtype
        self._inner = Signs(unpack_signs(first.signs_in, first.in_features, torch.int8))
        outer = [unpack_signs(one.signs_out, first.mid_features, torch.int8) for one in factors.values()]
        self._outer = Signs(torch.cat(outer))
        self._scales = {
            "out": torch.cat([one.scale_out for one in factors.values()]).float(),
            "mid": first.scale_mid.float().clone(),
            "in": first.scale_in.float().clone(),
        }
        self._adam = RelativeAdam(self._scales)
        shape = sum(self.rows), first.in_features
        self._memory = torch.zeros(shape, dtype=dtype, device=first.scale_in.device) if signs else None

    @property
    def signs(self) -> int:
        """The number of signs."""
        return self._inner.values.numel() + self._outer.values.numel()

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return Ŵ [N, K]."""
        out, mid, into = (self._scales[name].to(self._dtype) for name in ("out", "mid", "in"))
        product = (self._outer.in_dtype(self._dtype) * mid) @ (self._inner.in_dtype(self._dtype) * into)
        return product.mul_(out[:, None])

    @torch.no_grad()
    def factors(self) -> dict[str, DoubleBinaryFactors]:
        """Return the factors of every layer, with scales in float16; training may have made scales negative."""
        into, mid, out = (signs_of(self._scales[name]) for name in ("in", "mid", "out"))
        stacked = DoubleBinaryFactors(
            pack_signs(self._inner.in_dtype(torch.float32) * into * mid[:, None]),
            pack_signs(self._outer.in_dtype(torch.float32) * out[:, None]),
            *half_scales(1.0, *(self._scales[name].abs() for name in ("in", "mid", "out"))),
        )
        return dict(zip(self.names, stacked.split(self.rows), strict=True))

    @torch.no_grad()
    def step(self, gradient: Tensor, scale_rate: float, kept: float = 0.0, sign_share: float = 0.0) -> int:
        """Learn from one gradient.

        Args:
            gradient: G, float32 [N, K]; one of zeros alone changes nothing.
            scale_rate: how far scales move, in units of their root mean square.
            kept: how much of the remembered gradient stays; the new one is the rest.
            sign_share: of the signs that may flip now; 0 leaves all.

        Returns:
            How many signs flipped.
        """
        if not bool(gradient.any()):
            return 0
        for_outer, for_inner = self._passed_on(gradient)
        agreement = for_outer * self._outer.values
        out, mid, into = (self._scales[name] for name in ("out", "mid", "in"))
        scales = {
            "out": agreement @ mid,
            "mid": out @ agreement,
            "in": mid @ (for_inner * self._inner.values),
        }
        flips = 0
        if self._memory is not None:
            self._memory.lerp_(gradient.to(self._memory.dtype), 1 - kept)
            if sign_share:
                for_outer, for_inner = self._passed_on(self._memory)
                flips += self._outer.flip(for_outer.mul_(mid).mul_(out[:, None]), sign_share)
                flips += self._inner.flip(for_inner.mul_(into).mul_(mid[:, None]), sign_share)
        self._adam.step(scales, scale_rate)
        return flips

    def _passed_on(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return P [N, R] and Q [R, K] of a gradient [N, K], float32."""
        inner, outer = self._inner.in_dtype(self._dtype), self._outer.in_dtype(self._dtype)
        for_outer = (gradient * self._scales["in"]).to(self._dtype) @ inner.T
        for_inner = outer.T @ (gradient * self._scales["out"][:, None]).to(self._dtype)
        return for_outer.float(), for_inner.float()

    def learned(self) -> dict[str, Tensor]:
        """Return signs and scales by name; tensors are those in use."""
        return {"inner": self._inner.values, "outer": self._outer.values, **self._scales}

    def moments(self) -> dict[str, Tensor]:
        """Return what else the next step depends on, by name; tensors are those in use."""
        owed = {"inner.owed": self._inner.owed, "outer.owed": self._outer.owed}
        memory = {} if self._memory is None else {"memory": self._memory}
        return {**owed, **memory, **self._adam.state()}
