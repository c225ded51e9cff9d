"""What happens inside the MLPs while a model runs: hooks that come off again.

    with Probe(model) as probe:
        model(**batch).loss.backward()
    rows = probe.rows()

One row a layer. With `x` the input of the activation and `y` its output (a patched or a stock activation alike):
`alpha`, the gate's mean, standard deviation and saturation, root mean squares of `y` and of the gradient of the
loss with respect to `y`, the part of the variance of `y` that a linear function of `x` explains, and the effective
rank of the MLP's output: of the linear layer after the activation, or, where that lies in another module (BERT),
of `y` as that module passes it on.
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .alpha import AlphaModule
from .discovery import find_activations, is_linear
from .gates import GATES

SATURATION = 0.01  # a gate within this share of its finite range from an end counts as saturated


def effective_rank(x_NF: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007), in [1, min(N, F)].

    `x_NF`: N observations of F features, not centred. 0.0 for a matrix of zeros.
    """
    values = torch.linalg.svdvals(x_NF.double())
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def linear_share(x: Tensor, y: Tensor) -> float:
    """Squared correlation of `x` and `y` over all elements: 1 for an activation that is a line, 0..1 otherwise.

    NaN when either is constant.
    """
    pair = torch.stack([x.double().flatten(), y.double().flatten()])
    return float(torch.corrcoef(pair)[0, 1] ** 2)


def gate_statistics(gate: str, x: Tensor) -> dict[str, float]:
    """Mean, standard deviation (of the population) and saturated share of `g(x)`.

    Saturated: within 1% of the width of the range from a finite end; against the unit distance where the range
    is not finite.
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
    """Hooks on every MLP activation of a model; a context manager, or `close()`.

    What it sees replaces what it saw in the call before. It changes no value and no gradient. Ranks are computed
    from at most `max_rows` positions. ValueError when the model has no MLP activation.
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
        """One row a layer, in layer order: what the last call (and its backward pass) showed."""
        return [dict(seen) for seen in self._seen]

    def close(self) -> None:
        """Take every hook off."""
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
    # OPT and BART keep their MLP in the block itself, whose own output holds the residual stream too
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
