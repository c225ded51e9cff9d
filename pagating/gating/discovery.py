"""Search for the activation of every MLP of a Hugging Face model of any architecture.

An MLP activation is a module with three properties: it is an activation of transformers or torch, its parent also has a
linear layer as a direct child, and it is inside a repeated block (a `ModuleList`). Poolers and prediction heads are
outside the blocks and are skipped. Token mixers (a `Conv1d` beside the linear layers, as in Mamba) are skipped too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

_TORCH = (nn.ELU, nn.GELU, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Tanh)
ACTIVATIONS = (*{row[0] if isinstance(row, tuple) else row for row in ACT2CLS.values()}, *_TORCH)


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
    return isinstance(module, nn.Linear | Conv1D)


def features(linear: Any) -> tuple[int, int]:
    """Return the input and output features of a linear layer. `Conv1D` of transformers stores its weight transposed."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def find_activations(model: nn.Module) -> list[Slot]:
    """Return the MLP activations of `model` in layer order, or an empty list if there are none."""
    return list(_slots(model))


def require_activations(model: nn.Module) -> list[Slot]:
    """Return the MLP activations of `model` in layer order. Raise ValueError, which lists the types, if none exists."""
    slots = find_activations(model)
    if not slots:
        known = ", ".join(sorted({cls.__name__ for cls in ACTIVATIONS}))
        raise ValueError(
            f"{type(model).__name__}: no MLP activation found; looked for a child module of one of the types "
            f"{known} beside a linear layer, inside a ModuleList"
        )
    return slots


def other_activations(model: nn.Module, slots: list[Slot]) -> list[str]:
    """Return the names of the activation modules of `model` that are not in `slots`."""
    found = {slot.name for slot in slots}
    return [name for name, m in model.named_modules() if isinstance(m, ACTIVATIONS) and name not in found]


def _slots(model: nn.Module) -> Iterator[Slot]:
    for prefix, parent in model.named_modules():
        if not any(part.isdigit() for part in prefix.split(".")):
            continue
        shapes = [features(m) for m in parent.children() if is_linear(m)]
        if not shapes or any(isinstance(m, nn.Conv1d) for m in parent.children()):
            continue
        for child, module in parent.named_children():
            if isinstance(module, ACTIVATIONS):
                yield Slot(prefix, parent, child, _width(shapes), module)


def _width(shapes: list[tuple[int, int]]) -> int:
    first_out, last_in = shapes[0][1], shapes[-1][0]
    # one projection may hold gate and value side by side (Phi-3, GLM, ModernBERT); the activation gets half of it
    return last_in if len(shapes) > 1 and first_out == 2 * last_in else first_out
