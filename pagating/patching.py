"""Swap the activation of every MLP of a Hugging Face model instance, and put it back.

An MLP activation is found, not listed by architecture: a child module that is an activation (one of
transformers' or torch's), of a parent that also has a linear layer as a direct child, inside a repeated
block (a `ModuleList`). Poolers and prediction heads lie outside the blocks and keep theirs. Nothing global
changes: neither torch nor transformers, only the instance.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from transformers.activations import (
    ACT2CLS,
    AccurateGELUActivation,
    FastGELUActivation,
    GELUTanh,
    NewGELUActivation,
)
from transformers.pytorch_utils import Conv1D

from pagating.alpha import Spec, alpha_modules, parse
from pagating.gates import Function, gate_row
from pagating.units import BASES, PaGLU

FORMS = ("pointwise",)
PATCHABLE_BASES = (*BASES, "stock")
_TORCH_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid)
ACTIVATIONS = tuple({row[0] if isinstance(row, tuple) else row for row in ACT2CLS.values()})
_TANH_GELUS = (NewGELUActivation, GELUTanh, FastGELUActivation, AccurateGELUActivation)
_RECORD = "_pagating_replaced"


@dataclass(frozen=True)
class Slot:
    """Where an MLP activation sits, the size of its last axis, and the activation there."""

    name: str
    parent: nn.Module
    child: str
    width: int
    activation: nn.Module


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did: the unit, names and types of what it replaced in layer order, parameters added."""

    unit: str
    names: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    parameters_added: int = 0

    @property
    def count(self) -> int:
        """Number of activations replaced."""
        return len(self.names)

    def __str__(self) -> str:
        kinds = ", ".join(dict.fromkeys(self.replaced))
        ends = self.names[0] if self.count == 1 else f"{self.names[0]} .. {self.names[-1]}"
        added = f"{self.parameters_added:,} parameters added"
        return f"replaced {self.count} {kinds} by {self.unit} ({ends}); {added}"


def find_activations(model: nn.Module) -> list[Slot]:
    """The MLP activations of `model`, in the order of its layers; empty when there is none."""
    return list(_slots(model))


def _slots(model: nn.Module) -> Iterator[Slot]:
    for prefix, parent in model.named_modules():
        if not any(part.isdigit() for part in prefix.split(".")):
            continue
        widths = [w for w in map(_output_width, parent.children()) if w is not None]
        for child, module in parent.named_children():
            if widths and isinstance(module, ACTIVATIONS + _TORCH_ACTIVATIONS):
                yield Slot(f"{prefix}.{child}", parent, child, widths[0], module)


def _output_width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.nf if isinstance(module, Conv1D) else None


def patch(
    model: nn.Module,
    gate: str = "sigmoid",
    alpha: Spec = 0.5,
    base: str = "identity",
    form: str = "pointwise",
) -> PatchReport:
    """Replace the activation of every MLP of `model`, in place, by a parameterised gate.

    Each becomes `alpha * x * g(x) + (1 - alpha) * base(x)`; `gate` is a key of `pagating.gates.GATES` and
    `alpha` what `pagating.alpha.parse` takes. `base`: `identity`, `gelu` (the tanh form: the model's own
    module where it has one) or `stock` (the activation that was there). At a fixed `alpha = 0` with `gelu` on
    GPT-2, or with `stock` on any model, losses and gradients keep their bits. New parameters lie on the
    device of the MLP they belong to.

    Raises ValueError when an argument is not one of the allowed, when `model` is patched already, and when no
    MLP activation was found. `unpatch` undoes it.
    """
    gate_row(gate)
    if base not in PATCHABLE_BASES:
        raise ValueError(f"base: {base!r} is not one of {', '.join(PATCHABLE_BASES)}")
    if form not in FORMS:
        raise ValueError(f"form: {form!r} is not one of {', '.join(FORMS)}")
    if _RECORD in model.__dict__ or alpha_modules(model):
        raise ValueError(f"{type(model).__name__} is patched already; call pagating.unpatch first")
    slots = find_activations(model)
    if not slots:
        known = ", ".join(sorted(cls.__name__ for cls in ACTIVATIONS))
        raise ValueError(
            f"{type(model).__name__}: no MLP activation found; looked for a child module of one of the types "
            f"{known} beside a linear layer, inside a ModuleList"
        )
    spec = parse(alpha, len(slots))
    before = count_parameters(model)
    owner: PaGLU | None = None
    for layer, slot in enumerate(slots):
        unit = PaGLU(alpha, gate, _base(base, slot.activation), slot.width, layer, owner)
        if spec.options.get("per") == "model" and owner is None:
            owner = unit
        unit.train(slot.activation.training).to(next(slot.parent.parameters()).device)
        slot.parent.register_module(slot.child, unit)
    model.__dict__[_RECORD] = [(slot.name, slot.activation) for slot in slots]
    return PatchReport(
        unit=f"PaGLU({alpha_modules(model)[0].extra_repr()})",
        names=[slot.name for slot in slots],
        replaced=[type(slot.activation).__name__ for slot in slots],
        parameters_added=count_parameters(model) - before,
    )


def _base(base: str, stock: nn.Module) -> str | Function:
    if base == "stock" or (base == "gelu" and isinstance(stock, _TANH_GELUS)):
        return stock
    return base


def unpatch(model: nn.Module) -> list[str]:
    """Put back the activations that `patch` took out; returns their names.

    Raises ValueError for a model that is not patched.
    """
    if _RECORD not in model.__dict__:
        raise ValueError(f"{type(model).__name__} is not patched; nothing to undo")
    record = model.__dict__.pop(_RECORD)
    for name, activation in record:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, activation)
    return [name for name, _ in record]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, a shared one counted once."""
    return sum(p.numel() for p in model.parameters())
