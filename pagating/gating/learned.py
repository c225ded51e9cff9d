"""Activations with learned parameters: xIELU, in fused form, and two polynomials of degree 3.

xIELU is `alpha_p x^2 + beta x` for x > 0, else `alpha_n (expm1(x) - x) + beta x` (Huang and Schlag 2024, arXiv
2411.13010). Only its input is kept for the backward pass, which works in place. Parameters, buffers and start values
are those of `transformers.activations.XIELUActivation`. A state dict of one loads into the other. The Python form of
that module takes several times as long (`benchmarks/trial_speed.py`).

PolyReLU and PolyNorm are from arXiv 2411.03884. Both compute in float32 or above, because a cube overflows early in a
smaller dtype. Coefficients start at 1/3, the constant at 0, as in the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .fused import sum_to

BETA = 0.5
START = 0.8
DEGREE = 3
EPS = 1e-6  # of PolyNorm


class XIELU(nn.Module):
    """The xIELU activation with two learned strengths: softplus of a parameter, and beta plus softplus of another.

    Input and output have the same shape and dtype. It differs from transformers' module only for inputs in (-1e-6, 0]:
    there that module computes `expm1(-1e-6)`, an error below 2e-6 `alpha_n`, and a slope of `beta - alpha_n` instead of
    `beta`. Unless it is compiled, it can be differentiated only once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = (nn.Parameter(_inverse_softplus(start)) for start in (START, START - BETA))
        self.register_buffer("beta", torch.tensor(BETA))
        self.register_buffer("eps", torch.tensor(-1e-6))  # unused here, but part of the state dict

    def forward(self, x: Tensor) -> Tensor:
        positive, negative = F.softplus(self.alpha_p).to(x.dtype), (BETA + F.softplus(self.alpha_n)).to(x.dtype)
        if torch.compiler.is_compiling():
            return composed(x, positive, negative)
        out: Tensor = _XIELU.apply(x, positive, negative)
        return out


def _inverse_softplus(value: float) -> Tensor:
    return torch.log(torch.expm1(torch.tensor(value))).unsqueeze(0)


def composed(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Compute xIELU in elementary operations."""
    below = x.clamp(max=0.0)
    return positive * F.relu(x).square() + negative * (torch.expm1(below) - below) + BETA * x


class _XIELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        ctx.save_for_backward(x, positive, negative)
        below = x.clamp(max=0.0)
        y = torch.expm1(below).sub_(below).mul_(negative)
        return y.add_(F.relu(x).square_().mul_(positive)).add_(x, alpha=BETA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, positive, negative = ctx.saved_tensors
        grad, above, below = grads[0], F.relu(x), x.clamp(max=0.0)
        slope = torch.expm1(below)  # 0 for x > 0
        grad_negative = sum_to(torch.sub(slope, below, out=below).mul_(grad), negative)
        grad_positive = sum_to(torch.mul(above, above, out=below).mul_(grad), positive)
        grad_x = slope.mul_(negative).add_(above.mul_(2 * positive)).add_(BETA).mul_(grad)
        return grad_x, grad_positive, grad_negative


class _Polynomial(nn.Module):
    """The coefficients `weight[i]` of the power `i + 1`, and the constant `bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((DEGREE,), 1 / DEGREE))
        self.bias = nn.Parameter(torch.zeros(1))

    def powers(self, x: Tensor) -> list[Tensor]:
        """Return the terms that the coefficients multiply, from degree 1."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        wide = x if torch.finfo(x.dtype).bits >= 32 else x.float()
        terms = self.powers(wide)
        total = self.bias.to(wide.dtype) + self.weight[0].to(wide.dtype) * terms[0]
        for coefficient, term in zip(self.weight[1:].to(wide.dtype), terms[1:], strict=True):
            total = torch.addcmul(total, coefficient, term)
        return total.to(x.dtype)


class PolyReLU(_Polynomial):
    """The polynomial `bias + sum over i of weight[i] * max(x, 0)^(i + 1)`. It keeps shape and dtype."""

    def powers(self, x: Tensor) -> list[Tensor]:
        """Return the powers of `max(x, 0)`, from 1 to 3."""
        above = F.relu(x)
        return [above, above.square(), above.square() * above]


class PolyNorm(_Polynomial):
    """The polynomial `bias + sum over i of weight[i] * n(x^(i + 1))`. It keeps shape and dtype.

    `n(u) = u / sqrt(mean(u^2) + 1e-6)` divides by the root mean square over the features of a token. So an element
    depends on all features of its token.
    """

    def powers(self, x: Tensor) -> list[Tensor]:
        """Return the normalised powers of `x`, from 1 to 3."""
        raw = (x, x.square(), x.square() * x)
        return [u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS) for u in raw]


POLYNOMIALS: dict[str, type[nn.Module]] = {"polyrelu": PolyReLU, "polynorm": PolyNorm}
