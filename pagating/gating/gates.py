"""The gates: the functions of the rows of `catalog.GATE_ROWS`.

A gate `g` multiplies its input: `x * g(x)`. The row also holds that product in its fastest exact form
(`x * sigmoid(x)` is torch's `silu`), and the unit interpolates between it and a base (see `units`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalog import GATE_ROWS

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """One gate. `gated(x)` equals `x * gate(x)`, gradients included, up to rounding.

    `range` is the interval of `gate` over the reals; `attained` says whether its finite ends are values of `gate`.
    `limits` are the limits of `x * gate(x)` at -inf and +inf. In floating point -inf gives NaN if the limit 0 is a
    product of infinity and zero; NaN gives NaN.
    """

    gate: Function
    gated: Function
    formula: str
    range: tuple[float, float]
    limits: tuple[float, float]
    unit: str
    paper: str
    attained: bool = False


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _arctan(x: Tensor) -> Tensor:
    return torch.atan2(torch.ones_like(x), -x) / math.pi  # 1/2 + arctan(x) / pi cancels at large negative x


def _identity(x: Tensor) -> Tensor:
    return x


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


FUNCTIONS: dict[str, tuple[Function, Function]] = {  # g(x), x * g(x)
    "sigmoid": (torch.sigmoid, F.silu),
    "tanh": (torch.tanh, lambda x: x * torch.tanh(x)),
    "relu": (F.relu, _relu_squared),
    "gelu": (F.gelu, lambda x: x * F.gelu(x)),
    "mish": (F.mish, lambda x: x * F.mish(x)),
    "silu": (F.silu, lambda x: x * F.silu(x)),
    "step": (_step, F.relu),
    "normal": (torch.special.ndtr, F.gelu),
    "arctan": (_arctan, lambda x: x * _arctan(x)),
    "linear": (_identity, torch.square),
}
GATES: dict[str, Gate] = {name: Gate(*FUNCTIONS[name], **vars(row)) for name, row in GATE_ROWS.items()}


def gate_row(gate: str | Gate) -> Gate:
    """Return the row of `GATES` of a name, or a row itself. Raises ValueError, which names the known gates."""
    if isinstance(gate, Gate):
        return gate
    if not isinstance(gate, str) or gate not in GATES:
        own = "; register it with pagating.register_gate" if callable(gate) else ""
        raise ValueError(f"gate: {gate!r} is not one of {', '.join(GATES)}{own}")
    return GATES[gate]


def kept_gate(name: str) -> str | Gate:
    """Return what a unit keeps of its gate: the name of a built-in one, or the row of one of the user's own.

    So a name that is registered again does not change a model that has the gate. Raises ValueError as `gate_row`.
    """
    row = gate_row(name)
    return name if name in GATE_ROWS else row
