"""Search for the activation of every MLP of a Hugging Face model of any architecture.

An MLP activation is a module with three properties: it is an activation of transformers or torch, its parent also has a
linear layer as a direct child, and it is inside a repeated block (a `ModuleList`). Poolers and prediction heads are
outside the blocks and are skipped. Token mixers (a `Conv1d` beside the linear layers, as in Mamba) are skipped too.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_TORCH = (nn.ELU, nn.GELU, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Tanh)


def of_transformers(module: str, name: str) -> Any:
    """Return an object of a module of transformers, or None if that module has not been imported.

    No model contains an instance of a class whose module has not been imported. So transformers is never imported here,
    and need not be installed.
    """
    return getattr(sys.modules.get(f"transformers.{module}"), name, None)


def activation_types() -> tuple[type[nn.Module], ...]:
    """Return the activation classes of torch, and those of transformers if it has been imported."""
    rows = (of_transformers("activations", "ACT2CLS") or {}).values()
    return (*{row[0] if isinstance(row, tuple) else row for row in rows}, *_TORCH)


@dataclass(frozen=True)
class Slot:
    """The position of an MLP activation in a model.

    Attributes:
        prefix: Full name of the parent module.
        parent: The parent module.
        child: Name of the activation in its parent.
        width: Size of the last axis of the activation's input.
        activation: The activation module.
    """

    prefix: str
    parent: nn.Module
    child: str
    width: int
    activation: nn.Module

    @property
    def name(self) -> str:
        """Return the full name of the activation module."""
        return f"{self.prefix}.{self.child}"

    def linears(self) -> dict[str, nn.Module]:
        """Return the linear layers beside the activation, by name."""
        return {n: m for n, m in self.parent.named_children() if is_linear(m)}


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer of torch and for a `Conv1D` of transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return True for a `Conv1D` of transformers, a linear layer that stores its weight transposed."""
    conv1d = of_transformers("pytorch_utils", "Conv1D")
    return conv1d is not None and isinstance(module, conv1d)


def features(linear: Any) -> tuple[int, int]:
    """Return the input and output features of a linear layer. `Conv1D` of transformers stores its weight transposed."""
    return (linear.nx, linear.nf) if is_conv1d(linear) else (linear.in_features, linear.out_features)


def find_activations(model: nn.Module) -> list[Slot]:
    """Return the MLP activations of `model` in layer order, or an empty list if there are none."""
    return list(_slots(model))


def require_activations(model: nn.Module) -> list[Slot]:
    """Return the MLP activations of `model` in layer order. Raise ValueError, which lists the types, if none exists."""
    slots = find_activations(model)
    if not slots:
        known = ", ".join(sorted({cls.__name__ for cls in activation_types()}))
        raise ValueError(
            f"{type(model).__name__}: no MLP activation found; looked for a child module of one of the types "
            f"{known} beside a linear layer, inside a ModuleList"
        )
    return slots


def other_activations(model: nn.Module, slots: list[Slot]) -> list[str]:
    """Return the names of the activation modules of `model` that are not in `slots`."""
    found, types = {slot.name for slot in slots}, activation_types()
    return [name for name, m in model.named_modules() if isinstance(m, types) and name not in found]


def _slots(model: nn.Module) -> Iterator[Slot]:
    types = activation_types()
    for prefix, parent in model.named_modules():
        if not any(part.isdigit() for part in prefix.split(".")):
            continue
        shapes = [features(m) for m in parent.children() if is_linear(m)]
        if not shapes or any(isinstance(m, nn.Conv1d) for m in parent.children()):
            continue
        for child, module in parent.named_children():
            if isinstance(module, types):
                yield Slot(prefix, parent, child, _width(shapes), module)


def _width(shapes: list[tuple[int, int]]) -> int:
    first_out, last_in = shapes[0][1], shapes[-1][0]
    # one projection may hold gate and value side by side (Phi-3, GLM, ModernBERT); the activation gets half of it
    return last_in if len(shapes) > 1 and first_out == 2 * last_in else first_out
