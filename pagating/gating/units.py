"""The units: a gate, a strength and a base combined.

Each form is a function. Forms with the same weights share a module. Axes: `...` any leading axes, `F` features (last).
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .alpha import AlphaModule, Spec, parse
from .fused import applies, fused_pointwise
from .gates import Function, Gate, gate_row, kept_gate


def _gelu_new(x: Tensor) -> Tensor:
    # same operations in the same order as GPT-2, so that alpha = 0 gives the same bits
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _identity(x: Tensor) -> Tensor:
    return x


BASES: dict[str, Function] = {"identity": _identity, "gelu": _gelu_new}


def base_function(base: str | Function) -> Function:
    """Return the function of a base, given by name or as itself. Raises ValueError, which names the known bases."""
    if isinstance(base, str) and base in BASES:
        return BASES[base]
    if not callable(base):
        raise ValueError(f"base: {base!r} is not one of {', '.join(BASES)}, nor a function")
    return base


def pointwise(
    x: Tensor, alpha: float | Tensor = 0.5, gate: str | Gate = "sigmoid", base: str | Function = "identity"
) -> Tensor:
    """Compute `alpha * x * g(x) + (1 - alpha) * base(x)` for each element.

    `alpha` is a float (0 returns `base(x)` itself, bit for bit, and 1 the gated input) or a tensor that
    broadcasts against `x`; it is cast to the dtype of `x`. `base` is a key of `BASES` or any function of `x`.
    NaN gives NaN; an infinite input gives a result that is not finite, NaN if both terms are infinite.
    If `pagating.gating.fused` covers the gate and the base, only `x` is kept for the backward pass.
    The published formula (paGLU) is `gate="sigmoid", base="identity"`: a special case of ACON-C,
    arXiv 2009.04759. Raises ValueError for an argument that is not one of these.
    """
    _check_numbers(alpha, x=x)
    row, base_of = gate_row(gate), base_function(base)
    if not isinstance(alpha, Tensor):
        if alpha == 0.0:
            return base_of(x)
        if alpha == 1.0:
            return row.gated(x)
    if isinstance(gate, str) and isinstance(base, str) and applies(x, alpha, gate, base):
        return fused_pointwise(x, alpha, gate, base)
    if base == "gelu" and torch.compiler.is_compiling():
        base_of = _gelu_by_sigmoid
    return torch.lerp(base_of(x), row.gated(x), _like(alpha, x))


def _gelu_by_sigmoid(x: Tensor) -> Tensor:
    # (1 + tanh(u)) / 2 = sigmoid(2 u): the same function as the tanh form, in half the time when compiled
    return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def scaled(x: Tensor, alpha: float | Tensor, gate: str | Gate = "sigmoid", base: str | Function = "identity") -> Tensor:
    """Compute `x * g(alpha * x)`, without a base. For the sigmoid it is Swish (arXiv 1710.05941), `alpha` its beta."""
    _check_numbers(alpha, x=x)
    return x * gate_row(gate).gate(x * _like(alpha, x))


def expanded(
    x: Tensor, alpha: float | Tensor, gate: str | Gate = "sigmoid", base: str | Function = "identity"
) -> Tensor:
    """Compute `x * ((1 + 2 alpha) * g(x) - alpha)`, without a base. For the sigmoid it is xSiLU (arXiv 2405.20768).

    The range of the gate grows from (0, 1) to (-alpha, 1 + alpha).
    """
    _check_numbers(alpha, x=x)
    strength = _like(alpha, x)
    return (1 + 2 * strength) * gate_row(gate).gated(x) - strength * x


def squared(
    x: Tensor, alpha: float | Tensor, gate: str | Gate = "sigmoid", base: str | Function = "identity"
) -> Tensor:
    """Compute `(alpha * x * g(x) + (1 - alpha) * x)^2`; for the step gate, a squared leaky ReLU of slope 1 - alpha."""
    return pointwise(x, alpha, gate, base).square()


def glu(a: Tensor, b: Tensor, alpha: float | Tensor = 0.5, gate: str | Gate = "sigmoid") -> Tensor:
    """Compute `a * (alpha * g(b) + (1 - alpha))` for two projections `a` and `b` of the same shape.

    `alpha = 1` is a gated linear unit (arXiv 2002.05202). `alpha = 0` returns `a`. Raises ValueError for an argument
    that is not one of these.
    """
    _check_numbers(alpha, a=a, b=b)
    return torch.lerp(a, a * gate_row(gate).gate(b), _like(alpha, a))


def _check_numbers(alpha: Any, **tensors: Any) -> None:
    """Raise ValueError, one line, if alpha is no strength for the tensors, or one is not of floating-point numbers."""
    if torch.compiler.is_compiling() or any(isinstance(given, Proxy) for given in (alpha, *tensors.values())):
        return
    (first, x), *others = tensors.items()
    for name, given in tensors.items():
        if not isinstance(given, Tensor):
            raise ValueError(f"{name}: {type(given).__name__} is not a tensor")
        if not given.is_floating_point():
            raise ValueError(f"{name}: its dtype {given.dtype} is no floating-point type")
    for name, given in others:
        if (given.shape, given.dtype) != (x.shape, x.dtype):
            shapes = f"{tuple(given.shape)} {given.dtype} is not {tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name}: {shapes}, the shape and dtype of {first}")
    if isinstance(alpha, Tensor):
        try:
            torch.broadcast_shapes(alpha.shape, x.shape)
        except RuntimeError as error:
            shapes = f"shape {tuple(alpha.shape)} does not broadcast against {tuple(x.shape)}"
            raise ValueError(f"alpha: {shapes}, the shape of {first}") from error
    elif not isinstance(alpha, Real) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"alpha: {alpha!r} is neither a finite number nor a tensor")


def _like(alpha: float | Tensor, x: Tensor) -> Any:
    return alpha.to(x.dtype) if isinstance(alpha, Tensor) else alpha


ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "pointwise": pointwise,
    "scaled": scaled,
    "expanded": expanded,
    "squared": squared,
}


def idle_alpha(form: str, gate: str | Gate, base: str | Function) -> str | None:
    """Return a warning, one line, if a unit is the same function at every alpha. Return None if alpha has an effect.

    An example is the gate `sigmoid` over the base SiLU, which is `x * sigmoid(x)` too. A base with parameters or
    buffers is not tried. `form` is any of `catalog.FORMS`.
    """
    if isinstance(base, nn.Module) and base.state_dict():
        return None
    name = gate if isinstance(gate, str) else gate.formula
    with torch.no_grad(), torch.device("cpu"):  # the caller may build a model on meta
        x = torch.linspace(-6.0, 6.0, 64).reshape(1, 1, -1)  # without 0; the axes of hidden states
        if form in ELEMENTWISE:
            low, high = (ELEMENTWISE[form](x, alpha, gate, base) for alpha in (0.25, 0.75))
            called = base if isinstance(base, str) else getattr(base, "__name__", type(base).__name__)
            reason = f"x * {name}(x) is the base {called}" if form == "pointwise" else f"form {form} with gate {name}"
        else:
            low, high = gate_row(gate).gate(x), torch.ones(())
            reason = f"{name}(x) is 1"
        if not torch.allclose(low, high, rtol=1e-4, atol=1e-5):
            return None
    return f"alpha has no effect: {reason}, so that the unit is the same at every alpha; choose another gate or base"


class PaGLU(AlphaModule):
    """The elementwise unit as a module: `alpha * x * g(x) + (1 - alpha) * base(x)`, or another row of `ELEMENTWISE`.

    Input and output have the same shape and dtype.

    Args:
        alpha: Gate strength, as `pagating.gating.alpha.parse` accepts it.
        gate: Key of `pagating.gating.gates.GATES`.
        base: Key of `BASES`, a module (registered, so that its parameters are trained) or a function.
        width: Size of the last axis. Required if alpha is learned per channel or depends on the token.
        layer: Index of the layer, for a list of alphas.
        owner: Module whose alpha this one shares (`per: model`).
        form: Key of `ELEMENTWISE`.
    """

    def __init__(
        self,
        alpha: Spec = 0.5,
        gate: str = "sigmoid",
        base: str | Function = "identity",
        width: int | None = None,
        layer: int = 0,
        owner: AlphaModule | None = None,
        form: str = "pointwise",
    ) -> None:
        super().__init__(parse(alpha), width, layer, owner)
        base_function(base)
        if not isinstance(form, str) or form not in ELEMENTWISE:
            raise ValueError(f"form: {form!r} is not one of {', '.join(ELEMENTWISE)}")
        self.gate, self.base, self.form = gate, base, form
        self.kept_gate = kept_gate(gate)

    def gate_input(self, x: Tensor) -> Tensor:
        return x * _like(self.alpha(x), x) if self.form == "scaled" else x

    def forward(self, x: Tensor) -> Tensor:
        return ELEMENTWISE[self.form](x, self.alpha(x), self.kept_gate, self.base)

    def extra_repr(self) -> str:
        base = self.base if isinstance(self.base, str) else getattr(self.base, "__name__", type(self.base).__name__)
        return f"gate={self.gate}, {self.alpha_repr()}, base={base}" + (
            "" if self.form == "pointwise" else f", form={self.form}"
        )


class SplitGLU(AlphaModule):
    """The gated linear unit `glu(a, b)` of the two halves `a, b` of the last axis: `2h` features in, `width = h` out.

    It replaces the activation of an MLP, between an input projection to width `2h` and an output projection from `h`.
    """

    def __init__(self, alpha: Spec, gate: str, width: int, layer: int = 0, owner: AlphaModule | None = None) -> None:
        super().__init__(parse(alpha), width, layer, owner)
        self.gate, self.width = gate, width
        self.kept_gate = kept_gate(gate)

    def gate_input(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=-1)[1]

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return glu(a, b, self.alpha(b), self.kept_gate)

    def extra_repr(self) -> str:
        return f"gate={self.gate}, {self.alpha_repr()}, width={self.width}"


class ProjectedGLU(AlphaModule):
    """The projected unit `A(x) * (alpha * g(B(x)) + (1 - alpha))` with dense layers `A, B` of `width x width`.

    The published code replaces GPT-2's activation by this: `2 * (width^2 + width)` more parameters per layer, and a
    linear MLP at `alpha = 0`.
    """

    def __init__(self, alpha: Spec, gate: str, width: int, layer: int = 0, owner: AlphaModule | None = None) -> None:
        super().__init__(parse(alpha), width, layer, owner)
        self.gate, self.kept_gate = gate, kept_gate(gate)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def gate_input(self, x: Tensor) -> Tensor:
        return self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        b = self.gate_input(x)
        return glu(self.a(x), b, self.alpha(b), self.kept_gate)

    def extra_repr(self) -> str:
        return f"gate={self.gate}, {self.alpha_repr()}"
