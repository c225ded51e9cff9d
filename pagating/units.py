"""The units: a gate, a strength and a base put together.

Axes of tensor names: `...` any leading axes, `F` the feature axis (last).
"""

import math

import torch
from torch import Tensor

from pagating.alpha import AlphaModule, Spec, parse
from pagating.gates import Function, gate_row


def _gelu_new(x: Tensor) -> Tensor:
    # the operations and their order are GPT-2's own, so that alpha = 0 gives the same bits
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _identity(x: Tensor) -> Tensor:
    return x


BASES: dict[str, Function] = {"identity": _identity, "gelu": _gelu_new}


def pointwise(
    x: Tensor, alpha: float | Tensor = 0.5, gate: str = "sigmoid", base: str | Function = "identity"
) -> Tensor:
    """`alpha * x * g(x) + (1 - alpha) * base(x)`, element by element; `x` of any shape and floating dtype.

    `alpha` is a float (0 returns `base(x)` itself, bit for bit, and 1 the gated input) or a tensor that
    broadcasts against `x`; it is cast to the dtype of `x`. `base` is a key of `BASES` or any function of `x`.
    The published formula (paGLU) is `gate="sigmoid", base="identity"`: a special case of ACON-C,
    arXiv 2009.04759.
    """
    row, base_of = gate_row(gate), base_function(base)
    if isinstance(alpha, Tensor):
        return torch.lerp(base_of(x), row.gated(x), alpha.to(x.dtype))
    if alpha == 0.0:
        return base_of(x)
    if alpha == 1.0:
        return row.gated(x)
    return torch.lerp(base_of(x), row.gated(x), alpha)


def glu(a: Tensor, b: Tensor, alpha: float | Tensor = 0.5, gate: str = "sigmoid") -> Tensor:
    """`a * (alpha * g(b) + (1 - alpha))`: the gate of one projection multiplies another of the same shape.

    `alpha = 1` is a gated linear unit (arXiv 2002.05202); `alpha = 0` returns `a`.
    """
    row = gate_row(gate)
    alpha = alpha.to(a.dtype) if isinstance(alpha, Tensor) else alpha
    return torch.lerp(a, a * row.gate(b), alpha)


def base_function(base: str | Function) -> Function:
    """The function of a base given by name or as itself; ValueError naming the known bases otherwise."""
    if isinstance(base, str):
        if base not in BASES:
            raise ValueError(f"base: {base!r} is not one of {', '.join(BASES)}, stock")
        return BASES[base]
    return base


class PaGLU(AlphaModule):
    """The pointwise unit as a module: `alpha * x * g(x) + (1 - alpha) * base(x)`.

    `alpha` is anything that `pagating.alpha.parse` takes. `base` is a key of `BASES`, a module (registered,
    so that its parameters train) or a function. `width` is the size of the last axis, needed for one alpha a
    channel and for a token-dependent alpha. Input and output have the same shape and dtype.
    """

    def __init__(
        self,
        alpha: Spec = 0.5,
        gate: str = "sigmoid",
        base: str | Function = "identity",
        width: int | None = None,
        layer: int = 0,
        owner: AlphaModule | None = None,
    ) -> None:
        super().__init__(parse(alpha), width, layer, owner)
        gate_row(gate)
        self.gate = gate
        self.base = base
        base_function(base)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.alpha(x), self.gate, self.base)

    def extra_repr(self) -> str:
        base = self.base if isinstance(self.base, str) else type(self.base).__name__
        return f"gate={self.gate}, {self.alpha_repr()}, base={base}"
