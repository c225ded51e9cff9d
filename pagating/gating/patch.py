"""Replace the activation of every MLP of a Hugging Face model, and restore it.

Only the model instance changes. torch and transformers stay as they are.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .alpha import AlphaModule, AlphaSpec, Spec, alpha_modules, parse, require_module
from .catalog import BASES, MODULE_BASES, settings
from .discovery import Pattern, Slot, choose_activations, features, is_conv1d, of_transformers
from .gates import Function, gate_row
from .learned import POLYNOMIALS, XIELU
from .own_gate import make_unit
from .saving import forget_patch, record_patch, record_when_saved, settled
from .units import ELEMENTWISE, PaGLU, ProjectedGLU, SplitGLU, idle_alpha

_TANH_GELUS = ("NewGELUActivation", "GELUTanh", "FastGELUActivation", "AccurateGELUActivation")
_RECORD = "_pagating_replaced"  # in the parent of replaced modules: those modules by name, and other attributes
# torch's encoder has forms that do not call the activation, or call it with nested tensors: attributes that forbid them
_FUSED = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


@dataclass(frozen=True)
class PatchReport:
    """The changes that `patch` made to a model.

    Attributes:
        unit: The unit and its arguments.
        names: Names of the replaced activations, in layer order.
        replaced: Types of the replaced activations, in layer order.
        parameters_added: Number of parameters of the model after the patch minus before.
        left: Names of activations that were not replaced.
        why: The reason for each of them, by name.
    """

    unit: str
    names: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    parameters_added: int = 0
    left: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)

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
    *,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    layers: Sequence[int] | None = None,
) -> PatchReport:
    """Replace the activation of every MLP of `model`, in place, by a parameterised gate.

    Each activation becomes `alpha * x * g(x) + (1 - alpha) * base(x)`. `unpatch` restores the model. At a fixed
    `alpha = 0` with `gelu` on GPT-2, or with `stock` on any model, losses and gradients keep their bits. Warns if alpha
    has no effect, as that of the gate `sigmoid` over a stock SiLU.

    If it raises an error, the model is unchanged. `model` may be wrapped by `torch.compile`, PEFT, DDP or FSDP.

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
        include: Names of activations: replace these, whatever they belong to, and no others. A name is a glob for the
            whole name (`*.mlp.act`), whole components of it (`mlp`, `h.0`), or a compiled regular expression.
        exclude: Names of activations to leave alone, in the same way.
        layers: Indices of the blocks to patch: the first number in a name. Negative ones count from the end.

    Raises:
        ValueError: An argument is not allowed, `model` is already patched, no MLP activation was found, or, for `glu`,
            an MLP is not one layer in and one layer out.
    """
    chosen = settings({"gate": gate, "alpha": alpha, "base": base, "form": form, "unit": unit})
    gate_row(chosen["gate"])
    require_module(model)
    wrapper, model = model, inner(model)
    if patched := alpha_modules(model):
        made = "call pagating.unpatch first" if _parents(model) else f"it was made with {type(patched[0]).__name__}"
        raise ValueError(f"{type(model).__name__} is patched already; {made}")
    slots, why = choose_activations(model, include, exclude, layers)
    spec = parse(chosen["alpha"], len(slots))
    for slot in slots:
        _require_size(slot, chosen, spec)
    before = count_parameters(model)
    replaced = _replacements(model, slots, chosen, spec)
    stock = [{name: slot.parent._modules[name] for name in new} for slot, new in zip(slots, replaced, strict=True)]
    _require_no_reducer(wrapper, model, stock, replaced)
    with ExitStack() as undo:
        undo.callback(_restore, model)  # if anything below fails
        for slot, new in zip(slots, replaced, strict=True):
            for name, value in new.items():
                _set(slot.parent, name, value)
            if chosen["form"] in ("glu", "projected"):
                _initialise(model, slot, new)
        for encoder in model.modules():
            for kind, attribute in _FUSED:
                if isinstance(encoder, kind) and alpha_modules(encoder):
                    _set(encoder, attribute, False)
        arguments = settled(chosen)
        if why and (include, exclude, layers) != (None, None, None):
            arguments["include"] = [slot.name for slot in slots]
        record_patch(model, arguments)
        units = alpha_modules(model)
        _warn_of_idle_alpha(spec, units)
        undo.pop_all()
    return PatchReport(
        unit=f"{type(units[0]).__name__}({units[0].extra_repr()})",
        names=[slot.name for slot in slots],
        replaced=[type(slot.activation).__name__ for slot in slots],
        parameters_added=count_parameters(model) - before,
        left=list(why),
        why=why,
    )


def _set(parent: nn.Module, name: str, value: Any) -> None:
    """Set an attribute, such as a module, and keep the former value for `unpatch`."""
    parent.__dict__.setdefault(_RECORD, {})[name] = getattr(parent, name)
    setattr(parent, name, value)


def inner(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of torch (`torch.compile`, DDP, FSDP1) and of PEFT, or the model itself."""
    held = model._modules
    package = type(model).__module__.partition(".")[0]
    names = {"torch": ("_orig_mod", "_fsdp_wrapped_module", "module"), "peft": ("base_model", "model")}.get(package, ())
    for name in names:
        inside = held.get(name)
        if inside is not None and (len(held) == 1 or package == "peft"):
            return inner(inside)
    return model


def _require_size(slot: Slot, chosen: Mapping[str, Any], spec: AlphaSpec) -> None:
    if chosen["form"] == "glu":
        _in_and_out(slot)
    needs_width = spec.kind == "token" or spec.options.get("per") == "channel" or chosen["form"] == "projected"
    if needs_width and slot.width is None:
        raise ValueError(f"{slot.name}: its width is not known, which this unit needs ({slot.why})")
    if any(p.is_meta for p in slot.parent.parameters()) and any(hasattr(m, "_hf_hook") for m in slot.parent.modules()):
        raise ValueError(f"{slot.name}: its layer is offloaded by accelerate; patch the model before it is offloaded")


def _require_no_reducer(
    wrapper: nn.Module, model: nn.Module, old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]
) -> None:
    # DDP and FSDP take the parameters when they wrap: a later one is not averaged over the processes. DDP waits for one
    # that is gone.
    kinds = {type(module).__name__ for module in (wrapper, *model.modules())}
    sharing = [kind for kind in kinds if kind.startswith(("DistributedData", "FSDP", "FullySharded"))]
    before, after = _trained(old), _trained(new)
    waits = any(kind.startswith("DistributedData") for kind in sharing)
    if sharing and (after - before or (waits and before - after)):
        raise ValueError(
            f"{sharing[0]}: the trained parameters would change; patch or unpatch before it wraps the model"
        )


def _trained(replaced: Iterable[Mapping[str, Any]]) -> set[int]:
    modules = [each for one in replaced for each in one.values() if isinstance(each, nn.Module)]
    return {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}


def _parents(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of each parent of replaced modules."""
    return [(name, module) for name, module in model.named_modules() if _RECORD in module.__dict__]


@torch.inference_mode(False)  # tensors of inference mode have no gradient
def _replacements(
    model: nn.Module, slots: list[Slot], chosen: Mapping[str, Any], spec: AlphaSpec
) -> list[dict[str, nn.Module]]:
    """Make the modules that replace children of each slot's parent, by child name. The model does not change."""
    owner: AlphaModule | None = None
    made: list[dict[str, nn.Module]] = []
    for layer, slot in enumerate(slots):
        new = _modules(model, slot, chosen, layer, owner)
        if spec.options.get("per") == "model" and owner is None:
            owner = next(m for m in new.values() if isinstance(m, AlphaModule))
        made.append(new)
    return made


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


def _modules(
    model: nn.Module, slot: Slot, chosen: Mapping[str, Any], layer: int, owner: AlphaModule | None
) -> dict[str, nn.Module]:
    like = next((parameter for m in (slot.parent, model) for parameter in m.parameters()), torch.empty(0))
    alpha, gate, form = chosen["alpha"], chosen["gate"], chosen["form"]
    with torch.device(like.device):
        if form in ELEMENTWISE:
            base = _base(chosen["base"], slot, _is_off(alpha, layer))
            new: dict[str, nn.Module] = {slot.child: PaGLU(alpha, gate, base, slot.width, layer, owner, form)}
        elif form == "projected":
            new = {slot.child: ProjectedGLU(alpha, gate, slot.width or 0, layer, owner)}
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
    width = round(2 / 3 * features(into)[1])
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
        if into[1] == out[0] == slot.width and not any(hasattr(linear, "base_layer") for linear in linears.values()):
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
        return make_unit(base, slot.width or 0)
    if base == "xielu":
        theirs = of_transformers("activations", "XIELUActivation")
        return theirs(dtype=torch.float32) if theirs else XIELU()
    if base in POLYNOMIALS:
        return POLYNOMIALS[base]()
    # a gate that is off keeps the module that was there, for the same bits
    if base == "stock" or (base == "gelu" and is_off and _is_tanh_gelu(slot.activation)):
        return _not_in_place(slot.activation)
    return base


def _not_in_place(module: Any) -> Any:
    """Return a module that keeps its argument, which the gate reads too: itself, or a copy with the same tensors."""
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False
    return module


def _is_tanh_gelu(module: nn.Module) -> bool:
    kinds = (of_transformers("activations", name) for name in _TANH_GELUS)
    return any(kind is not None and isinstance(module, kind) for kind in kinds)


def unpatch(model: nn.Module) -> list[str]:
    """Restore the modules that `patch` replaced and return their names. Raise ValueError if `model` is not patched."""
    require_module(model)
    wrapper, model = model, inner(model)
    records = [parent.__dict__[_RECORD] for _, parent in _require_patched(model)]
    units = [{name: parent._modules.get(name) for name in parent.__dict__[_RECORD]} for _, parent in _parents(model)]
    _require_no_reducer(wrapper, model, units, records)
    return _restore(model)


def _restore(model: nn.Module) -> list[str]:
    names: list[str] = []
    for prefix, parent in _parents(model):
        for name, value in parent.__dict__.pop(_RECORD).items():
            setattr(parent, name, value)
            if isinstance(value, nn.Module):
                names.append(f"{prefix}.{name}" if prefix else name)
    forget_patch(model)
    return names


def _require_patched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    parents = _parents(model)
    if not parents:
        raise ValueError(f"{type(model).__name__} is not patched; nothing to undo")
    return parents


@contextmanager
def unpatched(model: nn.Module) -> Iterator[nn.Module]:
    """Remove the patch of `model` in a `with` block, then put it back. Raise ValueError if there is no patch."""
    records = [(parent, parent.__dict__[_RECORD]) for _, parent in _require_patched(inner(model))]
    units = [{name: getattr(parent, name) for name in record} for parent, record in records]
    _restore(inner(model))
    try:
        yield model
    finally:
        for (parent, record), new in zip(records, units, strict=True):
            for name, value in new.items():
                setattr(parent, name, value)
            parent.__dict__[_RECORD] = record
        record_when_saved(inner(model))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters. A shared parameter counts once."""
    return sum(p.numel() for p in model.parameters())
