"""Replace the activation of every MLP of a Hugging Face model, and restore it.

Only the model instance changes. torch and transformers stay as they are.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .alpha import AlphaModule, AlphaSpec, Spec, alpha_modules, parse, require_module
from .catalog import BASES, MODULE_BASES, settings
from .discovery import Slot, features, is_conv1d, of_transformers, other_activations, require_activations
from .gates import Function, gate_row
from .learned import POLYNOMIALS, XIELU
from .own_gate import make_unit
from .saving import forget_patch, record_patch, remember_patch, settled
from .units import ELEMENTWISE, PaGLU, ProjectedGLU, SplitGLU, idle_alpha

_TANH_GELUS = ("NewGELUActivation", "GELUTanh", "FastGELUActivation", "AccurateGELUActivation")
_RECORD = "_pagating_replaced"


@dataclass(frozen=True)
class PatchReport:
    """The changes that `patch` made to a model.

    Attributes:
        unit: The unit and its arguments.
        names: Names of the replaced activations, in layer order.
        replaced: Types of the replaced activations, in layer order.
        parameters_added: Number of parameters of the model after the patch minus before.
        left: Names of activations that were not replaced: outside the blocks (poolers, heads), or with no linear layer
            beside them (experts that keep their weights in one tensor).
    """

    unit: str
    names: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    parameters_added: int = 0
    left: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Return the number of replaced activations."""
        return len(self.names)

    def __str__(self) -> str:
        kinds = ", ".join(dict.fromkeys(self.replaced))
        ends = self.names[0] if self.count == 1 else f"{self.names[0]} .. {self.names[-1]}"
        change = f"{self.parameters_added:,} parameters added"
        left = f"; left alone: {', '.join(self.left)}" if self.left else ""
        return f"replaced {self.count} {kinds} by {self.unit} ({ends}); {change}{left}"


def patch(
    model: nn.Module,
    gate: str | None = None,
    alpha: Spec | None = None,
    base: str | None = None,
    form: str | None = None,
    unit: str | None = None,
) -> PatchReport:
    """Replace the activation of every MLP of `model`, in place, by a parameterised gate.

    Each activation becomes `alpha * x * g(x) + (1 - alpha) * base(x)`. `unpatch` restores the model. At a fixed
    `alpha = 0` with `gelu` on GPT-2, or with `stock` on any model, losses and gradients keep their bits. Warns if alpha
    has no effect, as that of the gate `sigmoid` over a stock SiLU.

    Args:
        model: A model of transformers.
        gate: Key of `pagating.gating.gates.GATES`; `sigmoid` by default.
        alpha: Gate strength, as `pagating.gating.alpha.parse` accepts it; 0.5 by default.
        base: `identity` (default), `gelu` (the tanh form; at a fixed `alpha = 0` the model's own module if it has one),
            `stock` (the replaced activation), `xielu`, `polyrelu` or `polynorm`.
        form: `pointwise` (default); `scaled`, `expanded` or `squared` (see `pagating.gating.units`); `glu`, which also
            replaces the two linear layers of the MLP by narrower ones (`h = round(2/3 * d_ff)`, parameters matched
            within 0.1% at GPT-2's sizes); `projected`, the two `d_ff x d_ff` layers of the published code. `glu` and
            `projected` have no base. Their new layers are initialised by the model's own rule with torch's global
            generator.
        unit: Key of `pagating.gating.catalog.COMPETITORS`, or a name given to `pagating.register_unit`, instead of
            gate, base and form.

    Raises:
        ValueError: An argument is not allowed, `model` is already patched, no MLP activation was found, or, for `glu`,
            an MLP is not one layer in and one layer out.
    """
    chosen = settings({"gate": gate, "alpha": alpha, "base": base, "form": form, "unit": unit})
    gate_row(chosen["gate"])
    require_module(model)
    if _RECORD in model.__dict__ or alpha_modules(model):
        raise ValueError(f"{type(model).__name__} is patched already; call pagating.unpatch first")
    slots = require_activations(model)
    spec = parse(chosen["alpha"], len(slots))
    if chosen["form"] == "glu":
        for slot in slots:
            _in_and_out(slot)
    before, left = count_parameters(model), other_activations(model, slots)
    owner: AlphaModule | None = None
    record: list[tuple[str, nn.Module]] = []
    for layer, slot in enumerate(slots):
        new = _modules(slot, chosen, layer, owner)
        if spec.options.get("per") == "model" and owner is None:
            owner = next(m for m in new.values() if isinstance(m, AlphaModule))
        for child, module in new.items():
            record.append((f"{slot.prefix}.{child}", slot.parent.get_submodule(child)))
            slot.parent.register_module(child, module)
        if chosen["form"] in ("glu", "projected"):
            _initialise(model, slot, new)
    model.__dict__[_RECORD] = record
    record_patch(model, settled(chosen), [slot.name for slot in slots])
    _warn_of_idle_alpha(spec, alpha_modules(model))
    return PatchReport(
        unit=f"{type(alpha_modules(model)[0]).__name__}({alpha_modules(model)[0].extra_repr()})",
        names=[slot.name for slot in slots],
        replaced=[type(slot.activation).__name__ for slot in slots],
        parameters_added=count_parameters(model) - before,
        left=left,
    )


def _warn_of_idle_alpha(spec: AlphaSpec, units: Iterable[AlphaModule]) -> None:
    """Warn, once per reason, if alpha has no effect. A fixed alpha of 0 is a control, so it is left alone."""
    found: dict[str, None] = {}
    for unit in units if spec.kind != "fixed" or any(spec.values) else ():
        base = getattr(unit, "base", "identity")
        line = idle_alpha(getattr(unit, "form", "glu"), unit.gate, base)
        if line is not None:
            found[line] = None
    for line in found:
        warnings.warn(line, stacklevel=3)


def _modules(slot: Slot, chosen: Mapping[str, Any], layer: int, owner: AlphaModule | None) -> dict[str, nn.Module]:
    """Return the modules that replace children of the slot's parent, by child name."""
    like = next(slot.parent.parameters())
    alpha, gate, form = chosen["alpha"], chosen["gate"], chosen["form"]
    with torch.device(like.device):
        if form in ELEMENTWISE:
            base = _base(chosen["base"], slot, _is_off(alpha, layer))
            new: dict[str, nn.Module] = {slot.child: PaGLU(alpha, gate, base, slot.width, layer, owner, form)}
        elif form == "projected":
            new = {slot.child: ProjectedGLU(alpha, gate, slot.width, layer, owner)}
        else:
            new = _glu_modules(slot, alpha, gate, layer, owner)
    for module in new.values():
        # quantised weights are stored as integers; the new module then gets torch's default dtype
        module.to(like.device, like.dtype if like.is_floating_point() else torch.get_default_dtype())
        module.train(slot.parent.training)
    return new


def _glu_modules(slot: Slot, alpha: Spec, gate: str, layer: int, owner: AlphaModule | None) -> dict[str, nn.Module]:
    name_in, name_out = _in_and_out(slot)
    into, out = slot.linears()[name_in], slot.linears()[name_out]
    width = round(2 / 3 * slot.width)
    return {
        name_in: _linear_like(into, features(into)[0], 2 * width),
        slot.child: SplitGLU(alpha, gate, width, layer, owner),
        name_out: _linear_like(out, width, features(out)[1]),
    }


def _in_and_out(slot: Slot) -> tuple[str, str]:
    linears = slot.linears()
    shapes = {name: features(linear) for name, linear in linears.items()}
    if len(shapes) == 2:
        (name_in, into), (name_out, out) = shapes.items()
        if into[1] == out[0] == slot.width:
            return name_in, name_out
    raise ValueError(f"form: glu needs an MLP of one linear layer in and one out beside {slot.name}; found {shapes}")


def _linear_like(linear: nn.Module, n_in: int, n_out: int) -> nn.Module:
    if is_conv1d(linear):
        return of_transformers("pytorch_utils", "Conv1D")(n_out, n_in)
    return nn.Linear(n_in, n_out, bias=linear.bias is not None)


def _initialise(model: nn.Module, slot: Slot, new: Mapping[str, nn.Module]) -> None:
    """Initialise new linear layers by the model's own rule, if it has one."""
    rule = getattr(model, "_init_weights", None)
    if rule is None:
        return
    for module in new.values():
        module.apply(rule)
    if all(name in new for name in slot.linears()):
        rule(slot.parent)  # GPT-2 scales c_proj by 1/sqrt(2 n_layer) in its rule for the MLP class


def _is_off(alpha: Spec, layer: int) -> bool:
    values = parse(alpha).values
    return bool(values) and values[layer if len(values) > 1 else 0] == 0.0


def _base(base: str, slot: Slot, is_off: bool) -> str | Function:
    if base not in (*BASES, *MODULE_BASES):
        return make_unit(base, slot.width)
    if base == "xielu":
        theirs = of_transformers("activations", "XIELUActivation")
        return theirs(dtype=torch.float32) if theirs else XIELU()
    if base in POLYNOMIALS:
        return POLYNOMIALS[base]()
    # a gate that is off keeps the module that was there, for the same bits
    if base == "stock" or (base == "gelu" and is_off and _is_tanh_gelu(slot.activation)):
        return slot.activation
    return base


def _is_tanh_gelu(module: nn.Module) -> bool:
    kinds = (of_transformers("activations", name) for name in _TANH_GELUS)
    return any(kind is not None and isinstance(module, kind) for kind in kinds)


def unpatch(model: nn.Module) -> list[str]:
    """Restore the modules that `patch` replaced and return their names. Raise ValueError if `model` is not patched."""
    require_module(model)
    if _RECORD not in model.__dict__:
        raise ValueError(f"{type(model).__name__} is not patched; nothing to undo")
    record = model.__dict__.pop(_RECORD)
    for name, module in record:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, module)
    forget_patch(model)
    return [name for name, _ in record]


@contextmanager
def unpatched(model: nn.Module) -> Iterator[nn.Module]:
    """Remove the patch of `model` in a `with` block, then put it back. Raise ValueError if there is no patch."""
    if _RECORD not in model.__dict__:
        raise ValueError(f"{type(model).__name__} is not patched; nothing to undo")
    record = model.__dict__[_RECORD]
    patch_modules = [model.get_submodule(name) for name, _ in record]
    forgotten = forget_patch(model)
    unpatch(model)
    try:
        yield model
    finally:
        for (name, _), module in zip(record, patch_modules, strict=True):
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, module)
        model.__dict__[_RECORD] = record
        remember_patch(forgotten)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters. A shared parameter counts once."""
    return sum(p.numel() for p in model.parameters())
