"""Statistics of the MLPs of a running model, measured by removable hooks.

    with Probe(model) as probe:
        model(**batch).loss.backward()
    rows = probe.rows()

There is one row per layer. `x` is the input of the activation and `y` its output, for patched and stock activations. In
a gated linear unit `a * g(b)`, `x` is `a` for the columns that compare `x` with `y`. A row has:

- `alpha`; `gate_mean`, `gate_std` and `gate_saturated` of the gate `g`;
- `openness`, `sum(x y) / sum(x^2)`: the share of `x` that passes, 1 for the identity;
- `negative_slope`, the share of elements with `dy/dx < 0`; `linear_share`, the squared correlation of `x` and `y`;
- `width`, the number of hidden units; `dead`, the share of units whose `y` hardly depends on the position;
- `activation_rms` and `gradient_rms`, root mean squares of `y` and of the gradient of the loss by `y`;
- `gradient_norm`, the L2 norm of the gradient of the loss by the activation's input, and `gradient_passed`, this norm
  divided by that of the gradient by `y`;
- `hidden_rank` and `output_rank`, effective ranks of `y` and of the MLP's output. This output is that of the linear
  layer after the activation, or, if that layer is in another module (BERT), the output of the activation's parent.

A number is NaN if it is not defined: no slope for a unit that mixes features, nothing for values that are not finite.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .alpha import AlphaModule, require_module
from .discovery import find_activations, is_linear
from .gates import Gate, gate_row
from .units import SplitGLU

SATURATION = 0.01  # a gate is saturated within this share of its finite range from an end
DEAD = 0.01  # a unit is dead if its standard deviation is at most this share of the layer's root mean square
NAN = float("nan")


def effective_rank(x_NF: Tensor) -> float:
    """Compute the exponential of the entropy of the normalised singular values (Roy and Vetterli 2007).

    `x_NF` has N observations of F features, not centred. The result is in [1, min(N, F)], 0.0 for a matrix of zeros, or
    NaN if a value is not finite.
    """
    if not x_NF.isfinite().all():
        return NAN
    try:
        values = torch.linalg.svdvals(x_NF.double())
    except torch.linalg.LinAlgError:  # it did not converge, which is rare
        return NAN
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def linear_share(x: Tensor, y: Tensor) -> float:
    """Compute the squared correlation of `x` and `y` over all elements, in [0, 1].

    It is 1 for a linear activation and NaN if `x` or `y` is constant.
    """
    pair = torch.stack([x.double().flatten(), y.double().flatten()])
    return float(torch.corrcoef(pair)[0, 1] ** 2)


def openness(x: Tensor, y: Tensor) -> float:
    """Compute `sum(x y) / sum(x^2)` over all elements; NaN if `x` is zero everywhere."""
    x, y = x.double(), y.double()
    return float((x * y).sum() / x.square().sum())


def dead_share(y_NF: Tensor) -> float:
    """Compute the share of dead units: their standard deviation over the N rows is at most 1% of the RMS of `y`.

    A ReLU that is never on is dead, and so is a unit that is constant. NaN if a value is not finite.
    """
    y_NF = y_NF.double()
    if not y_NF.isfinite().all():
        return NAN
    return float((y_NF.std(0, correction=0) <= DEAD * y_NF.square().mean().sqrt()).double().mean())


def negative_slope_share(activation: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Compute the share of elements at which an elementwise function of `x` falls; NaN if a value is not finite."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
    return float((slope < 0).double().mean()) if slope.isfinite().all() else NAN


@torch.no_grad()
def mixes_features(activation: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Return True if a function of `x` depends on other features of a token: it has no slope by element then."""
    x = x.detach()
    other = x.clone()
    half = x.shape[-1] // 2
    other[..., :half] = other[..., :half].flip(-1) + 1.0
    rest, same = (activation(given)[..., half:] for given in (x, other))
    return not torch.allclose(rest, same, rtol=0.0, atol=0.0, equal_nan=True)


def gate_statistics(gate: str | Gate, x: Tensor) -> dict[str, float]:
    """Compute mean, standard deviation (of the population) and saturated share of `g(x)`.

    A value is saturated if its distance to a finite end of the range is at most 1% of the width of the range. If the
    range is not finite, the width counts as 1.
    """
    row = gate_row(gate)
    g, (low, high) = row.gate(x.double()), row.range
    width = high - low if high - low < float("inf") else 1.0
    near = (g <= low + SATURATION * width) | (g >= high - SATURATION * width)
    return {
        "gate_mean": float(g.mean()),
        "gate_std": float(g.std(correction=0)),
        "gate_saturated": float(near.double().mean()) if g.isfinite().all() else NAN,
    }


class Probe:
    """Hooks on every MLP activation of a model; a context manager.

    Each call of the model overwrites the statistics of the call before. No value and no gradient changes.

    Args:
        model: The model.
        max_rows: Positions of which ranks are computed, at most.
        names: Names of the activation modules. None: the modules with an alpha, else those that `patch` would replace.

    Raises:
        ValueError: The model has no MLP activation.
    """

    def __init__(self, model: nn.Module, max_rows: int = 512, names: Sequence[str] | None = None) -> None:
        self.max_rows = max_rows
        self._seen: list[dict[str, Any]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, output, module in _activations(model, names):
            seen: dict[str, Any] = {"name": name}
            self._seen.append(seen)
            self._handles.append(module.register_forward_hook(self._watch(seen)))
            self._handles.append(output.register_forward_hook(self._watch_mlp(seen)))

    def _watch_mlp(self, seen: dict[str, Any]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                rows = output.detach().flatten(0, -2)[: self.max_rows]
                seen["output_rank"] = effective_rank(rows)

        return hook

    def _watch(self, seen: dict[str, Any]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0].detach(), output.detach()
            if isinstance(module, AlphaModule):
                with torch.no_grad():
                    gate_input = module.gate_input(x)
                    alpha = torch.as_tensor(module.alpha(gate_input), dtype=torch.float64)
                seen["alpha"] = float(alpha.mean())
                seen.update(gate_statistics(getattr(module, "kept_gate", module.gate), gate_input))
            seen["activation_rms"] = _rms(y)
            seen.update(_of_units(module, x, y))
            y_NF = y.flatten(0, -2)
            seen.update(width=y.shape[-1], dead=dead_share(y_NF), hidden_rank=effective_rank(y_NF[: self.max_rows]))
            if output.requires_grad:
                output.register_hook(lambda grad: seen.update(gradient_rms=_rms(grad)))
            if inputs[0].requires_grad:
                inputs[0].register_hook(
                    lambda grad: seen.update(_passed(grad, seen["gradient_rms"] * y.numel() ** 0.5))
                )

        return hook

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per layer, in layer order: statistics of the last call and its backward pass."""
        return [dict(seen) for seen in self._seen]

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Probe":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _activations(model: nn.Module, names: Sequence[str] | None) -> list[tuple[str, nn.Module, nn.Module]]:
    require_module(model)
    if names is None:
        names = [name for name, module in model.named_modules() if isinstance(module, AlphaModule)]
        names = names or [slot.name for slot in find_activations(model)]
    if not names:
        raise ValueError(f"{type(model).__name__}: no MLP activation to watch")
    return [(name, _output(model.get_submodule(name.rpartition(".")[0])), model.get_submodule(name)) for name in names]


def _output(parent: nn.Module) -> nn.Module:
    # OPT and BART have their MLP in the block itself, whose output contains the residual stream
    linears = [module for module in parent.children() if is_linear(module)]
    return linears[-1] if len(linears) > 1 else parent


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _passed(grad: Tensor, by_output: float) -> dict[str, float]:
    """Return the norm of the gradient by an activation's input, and its ratio to the norm of that by its output."""
    norm = float(grad.double().norm())
    return {"gradient_norm": norm, "gradient_passed": norm / by_output if by_output else NAN}


def _of_units(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return the statistics that compare each unit's input with its output, for an elementwise activation."""
    if isinstance(module, SplitGLU):
        a, b = x.chunk(2, dim=-1)
        slope = negative_slope_share(lambda a: module.forward(torch.cat([a, b], dim=-1)), a)  # the factor of `a`
        return {"openness": openness(a, y), "negative_slope": slope}
    if x.shape != y.shape:
        return {}
    found = {"linear_share": linear_share(x, y)}
    by_token = isinstance(module, AlphaModule) and module.spec.kind == "token"  # also while its weights are 0
    if by_token or mixes_features(module.forward, x):
        return found
    return found | {"openness": openness(x, y), "negative_slope": negative_slope_share(module.forward, x)}
