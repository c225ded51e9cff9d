"""Statistics of the MLPs of a running model, measured by removable hooks.

    with Probe(model) as probe:
        model(**batch).loss.backward()
    rows = probe.rows()

There is one row per layer. `x` is the input of the activation and `y` its output, for patched and stock activations. A
row has: `alpha`; mean, standard deviation and saturation of the gate; root mean squares of `y` and of the gradient of
the loss with respect to `y`; the part of the variance of `y` that a linear function of `x` explains; the effective rank
of the MLP's output. This output is that of the linear layer after the activation, or, if that layer is in another
module (BERT), the output of the activation's parent.
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .alpha import AlphaModule
from .discovery import find_activations, is_linear
from .gates import GATES

SATURATION = 0.01  # a gate is saturated within this share of its finite range from an end


def effective_rank(x_NF: Tensor) -> float:
    """Compute the exponential of the entropy of the normalised singular values (Roy and Vetterli 2007).

    The result is in [1, min(N, F)], or 0.0 for a matrix of zeros. `x_NF` has N observations of F features, not centred.
    """
    values = torch.linalg.svdvals(x_NF.double())
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


def gate_statistics(gate: str, x: Tensor) -> dict[str, float]:
    """Compute mean, standard deviation (of the population) and saturated share of `g(x)`.

    A value is saturated if its distance to a finite end of the range is at most 1% of the width of the range. If the
    range is not finite, the width counts as 1.
    """
    row = GATES[gate]
    g, (low, high) = row.gate(x.double()), row.range
    width = high - low if high - low < float("inf") else 1.0
    near = (g <= low + SATURATION * width) | (g >= high - SATURATION * width)
    return {
        "gate_mean": float(g.mean()),
        "gate_std": float(g.std(correction=0)),
        "gate_saturated": float(near.double().mean()),
    }


class Probe:
    """Hooks on every MLP activation of a model; a context manager.

    Each call of the model overwrites the statistics of the call before. No value and no gradient changes. Ranks are
    computed from at most `max_rows` positions. The constructor raises ValueError if the model has no MLP activation.
    """

    def __init__(self, model: nn.Module, max_rows: int = 512) -> None:
        self.max_rows = max_rows
        self._seen: list[dict[str, Any]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, output, module in _activations(model):
            seen: dict[str, Any] = {"name": name}
            self._seen.append(seen)
            self._handles.append(module.register_forward_hook(_watch(seen)))
            self._handles.append(output.register_forward_hook(self._watch_mlp(seen)))

    def _watch_mlp(self, seen: dict[str, Any]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                rows = output.detach().flatten(0, -2)[: self.max_rows]
                seen["output_rank"] = effective_rank(rows)

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


def _activations(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    found: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, AlphaModule)
    ]
    found = found or [(slot.name, slot.activation) for slot in find_activations(model)]
    if not found:
        raise ValueError(f"{type(model).__name__}: no MLP activation to watch")
    return [(name, _output(model.get_submodule(name.rpartition(".")[0])), module) for name, module in found]


def _output(parent: nn.Module) -> nn.Module:
    # OPT and BART have their MLP in the block itself, whose output contains the residual stream
    linears = [module for module in parent.children() if is_linear(module)]
    return linears[-1] if len(linears) > 1 else parent


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _watch(seen: dict[str, Any]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = inputs[0].detach(), output.detach()
        if isinstance(module, AlphaModule):
            with torch.no_grad():
                gate_input = module.gate_input(x)
                alpha = torch.as_tensor(module.alpha(gate_input), dtype=torch.float64)
            seen["alpha"] = float(alpha.mean())
            seen.update(gate_statistics(module.gate, gate_input))
        seen["activation_rms"] = _rms(y)
        if x.shape == y.shape:
            seen["linear_share"] = linear_share(x, y)
        if output.requires_grad:
            output.register_hook(lambda grad: seen.__setitem__("gradient_rms", _rms(grad)))

    return hook
