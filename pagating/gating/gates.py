"""The table of gates.

A gate `g` multiplies its input: `x * g(x)`. A row also holds this product in its fastest exact form (`x * sigmoid(x)`
is torch's `silu`). The unit interpolates between the product and a base (see `units`). The first six rows are the gates
of the study. `step` and `linear` express known activations in the same table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """A gate and its product with the input.

    In floating point, an input of -inf gives NaN if the limit 0 is a product of infinity and zero. NaN gives NaN.

    Attributes:
        gate: `g`, a function of a tensor of any shape.
        gated: Equals `x * gate(x)`, gradients included, up to rounding.
        formula: `g` in plain text.
        range: Interval of `gate` over the reals.
        limits: Limits of `x * gate(x)` at -inf and +inf.
        unit: Name of the unit that the gate makes.
        paper: Source.
    """

    gate: Function
    gated: Function
    formula: str
    range: tuple[float, float]
    limits: tuple[float, float]
    unit: str
    paper: str


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _identity(x: Tensor) -> Tensor:
    return x


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_INF = float("inf")
# Minima of z * Phi(z), z * tanh(softplus(z)) and z * sigmoid(z).
_GELU_MIN, _MISH_MIN, _SILU_MIN = -0.16997120747990369, -0.3088434130172504, -0.27846454276107379

GATES: dict[str, Gate] = {
    "sigmoid": Gate(
        torch.sigmoid, F.silu, "1 / (1 + exp(-x))", (0.0, 1.0), (0.0, _INF), "paGLU",
        "Dauphin et al. 2017, arXiv 1612.08083; x * sigmoid(x): Elfwing et al. 2017, arXiv 1702.03118",
    ),
    "tanh": Gate(
        torch.tanh, lambda x: x * torch.tanh(x), "tanh(x)", (-1.0, 1.0), (_INF, _INF), "paGTU",
        "van den Oord et al. 2016, arXiv 1606.05328",
    ),
    "relu": Gate(
        F.relu, _relu_squared, "max(x, 0)", (0.0, _INF), (0.0, _INF), "paReGLU",
        "Shazeer 2020, arXiv 2002.05202; x * relu(x): So et al. 2021, arXiv 2109.08668",
    ),
    "gelu": Gate(
        F.gelu, lambda x: x * F.gelu(x), "x * Phi(x), Phi the normal distribution function",
        (_GELU_MIN, _INF), (0.0, _INF), "paGELU", "Hendrycks and Gimpel 2016, arXiv 1606.08415",
    ),
    "mish": Gate(
        F.mish, lambda x: x * F.mish(x), "x * tanh(log(1 + exp(x)))",
        (_MISH_MIN, _INF), (0.0, _INF), "paMishU", "Misra 2019, arXiv 1908.08681",
    ),
    "silu": Gate(
        F.silu, lambda x: x * F.silu(x), "x / (1 + exp(-x))",
        (_SILU_MIN, _INF), (0.0, _INF), "paSiLU", "Elfwing et al. 2017, arXiv 1702.03118",
    ),
    "step": Gate(
        _step, F.relu, "1 if x > 0, else 0", (0.0, 1.0), (0.0, _INF), "leaky ReLU of slope 1 - alpha",
        "Maas et al. 2013; He et al. 2015, arXiv 1502.01852",
    ),
    "linear": Gate(
        _identity, torch.square, "x", (-_INF, _INF), (_INF, _INF), "bilinear, as a gated linear unit",
        "Dauphin et al. 2017, arXiv 1612.08083",
    ),
}  # fmt: skip


def gate_row(name: str) -> Gate:
    """Return the row of `GATES` called `name`. Raise ValueError, which lists the known gates, if there is none."""
    if name not in GATES:
        raise ValueError(f"gate: {name!r} is not one of {', '.join(GATES)}")
    return GATES[name]
