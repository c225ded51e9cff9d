"""Gate strength `alpha`: its kinds, its specification, and its parameters for an optimiser and a logger.

Kinds: a fixed number; one number per layer; learnable (one number per model or layer, or one value per channel);
scheduled over the fraction of training; token-dependent, `sigmoid(w.x + c)`. A learnable or scheduled alpha stays in
float32 (or above) whatever dtype the model is cast to. It starts at its stated value without a random number. Every
parameter has one axis, because FSDP shards the first axis of each; one number has shape (1,).
"""

import copy
import math
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .catalog import ALPHA_KINDS, LARGEST_ALPHA, LAYER_BOUND, PER, RANGES, require_known
from .schedules import SCHEDULES
from .schedules import value as schedule_value

Spec = float | str | Sequence[float] | Mapping[str, Any]


@dataclass(frozen=True)
class AlphaSpec:
    """A checked specification. `values` is set for kind `fixed`: one number, or one per layer."""

    kind: str
    options: dict[str, Any]
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class AlphaParameter:
    """A parameter that holds alpha: its state-dict name, itself, and its learning-rate multiplier.

    The multiplier is relative to the model's learning rate. None of these parameters takes weight decay.
    """

    name: str
    parameter: nn.Parameter
    lr_multiplier: float


def parse(alpha: Spec, n_layer: int | None = None) -> AlphaSpec:
    """Check a specification of alpha and fill in its defaults.

    `alpha` is a number in [0, 2]; a list of `n_layer` numbers in [-10, 10], one per layer (a learned one is often
    negative); `"learnable"`; or a mapping with exactly one key of `ALPHA_KINDS`, here with the defaults and the other
    allowed values:

        {"learnable": {"init": 0.5, "per": "model", "range": "unit", "lr_multiplier": 10.0}}
                       per: model, layer, channel; range: unit, free
        {"schedule": {"kind": "linear", "from": 0.0, "to": 1.0}}
                      kind: constant, linear, cosine
        {"token": {"init": 0.5, "lr_multiplier": 1.0}}

    `range: unit` stores a logit and needs an init strictly inside (0, 1); `range: free` stores alpha itself.
    Raises ValueError, one line, naming the key, the value and what is allowed.
    """
    if isinstance(alpha, str):
        if alpha != "learnable":
            raise ValueError(f"alpha: {alpha!r} is neither a number, a list of numbers, 'learnable' nor a mapping")
        return AlphaSpec("learnable", dict(ALPHA_KINDS["learnable"]))
    if isinstance(alpha, Mapping):
        return _parse_mapping(alpha)
    if isinstance(alpha, Sequence):
        if not alpha:
            raise ValueError("alpha: an empty list; give one number per layer")
        if n_layer is not None and len(alpha) != n_layer:
            raise ValueError(f"alpha: a list of {len(alpha)} for {n_layer} layers; give one number per layer")
        values = (_number(f"alpha[{i}]", a, LAYER_BOUND, -LAYER_BOUND) for i, a in enumerate(alpha))
        return AlphaSpec("fixed", {}, tuple(values))
    return AlphaSpec("fixed", {}, (_number("alpha", alpha),))


def _parse_mapping(alpha: Mapping[str, Any]) -> AlphaSpec:
    for key in alpha:
        require_known("alpha", key, ALPHA_KINDS)
    if len(alpha) != 1:
        raise ValueError(f"alpha: {dict(alpha)} has {len(alpha)} keys; give exactly one of {', '.join(ALPHA_KINDS)}")
    kind, given = next(iter(alpha.items()))
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"alpha.{kind}: {given!r} is not a mapping; allowed keys: {', '.join(ALPHA_KINDS[kind])}")
    for key in given:
        require_known(f"alpha.{kind}", key, ALPHA_KINDS[kind])
    options = {**ALPHA_KINDS[kind], **given}
    check = {"per": PER, "range": RANGES, "kind": tuple(SCHEDULES)}
    for key, allowed in check.items():
        if key in options and options[key] not in allowed:
            raise ValueError(f"alpha.{kind}.{key}: {options[key]!r} is not one of {', '.join(allowed)}")
    for key in {"init", "from", "to"} & options.keys():
        options[key] = _number(f"alpha.{kind}.{key}", options[key])
    if "lr_multiplier" in options:
        name = f"alpha.{kind}.lr_multiplier"
        options["lr_multiplier"] = _number(name, options["lr_multiplier"], math.inf)
    is_logit = kind == "token" or options.get("range") == "unit"
    if is_logit and not 0.0 < options["init"] < 1.0:
        raise ValueError(
            f"alpha.{kind}.init: {options['init']} has no finite logit; allowed: strictly between 0 and 1"
            + (", or range: free" if kind == "learnable" else "")
        )
    return AlphaSpec(kind, options)


def _number(name: str, given: Any, largest: float = LARGEST_ALPHA, least: float = 0.0) -> float:
    is_number = isinstance(given, Real) and not isinstance(given, bool)
    if not is_number or not least <= given <= largest or math.isinf(given):
        shown = " ".join(repr(given).split())  # a tensor's has several lines
        raise ValueError(f"{name}: {shown} is not a finite number in [{least:g}, {largest:g}]")
    return float(given)


class _Tie:
    """Keeps a parameter shared by modules while torch treats one module after another.

    torch replaces a parameter if a model moves from or to the meta device or loads with `assign=True`.
    """

    def __init__(self) -> None:
        self.saved: tuple[weakref.ref[Any], nn.Parameter] | None = None
        self.moved: tuple[nn.Parameter, nn.Parameter] | None = None
        self.call: tuple[list[str], nn.Parameter] | None = None  # of `load_state_dict`: missing names, the parameter
        self.names: list[str] = []  # of the parameter, seen in this call
        self.modules: list[AlphaModule] = []  # seen in this call
        self.loaded: nn.Parameter | None = None  # the parameter after this call

    def __reduce__(self) -> tuple[type["_Tie"], tuple[()]]:
        return _Tie, ()  # a copy of the modules has no call going on

    def replace(self, before: nn.Parameter, after: nn.Parameter) -> nn.Parameter:
        """Return the parameter that takes the place of `before` in every module; `after` is torch's proposal."""
        if self.moved is None or self.moved[0] is not before:
            self.moved = before, after
        return self.moved[1]

    def is_repeated(self, destination: Any, parameter: nn.Parameter) -> bool:
        """Return True if this state dict has the parameter already, under another name."""
        if not isinstance(destination, OrderedDict):
            return True
        if self.saved is not None and self.saved[0]() is destination and self.saved[1] is parameter:
            return True
        self.saved = weakref.ref(destination), parameter
        return False

    def load(self, module: "AlphaModule", path: str, before: nn.Parameter, saved: bool, missing: list[str]) -> None:
        """Complete the load of a module: a state dict needs only one of the names of the parameter.

        Args:
            module: The module that was loaded.
            path: Full name of the parameter.
            before: The parameter before the load.
            saved: Whether the state dict has this name.
            missing: The missing names of this call of `load_state_dict`.
        """
        if self.call is None or self.call[0] is not missing or self.call[1] is not before:
            self.call, self.names, self.modules, self.loaded = (missing, before), [], [], None
        name = path.rpartition(".")[2]
        self.names.append(path)
        self.modules.append(module)
        if saved and self.loaded is None:
            self.loaded = module.get_parameter(name)
        if self.loaded is not None:
            missing[:] = [other for other in missing if other not in self.names]
            for other in self.modules:
                if other.get_parameter(name) is not self.loaded:
                    other.register_parameter(name, self.loaded)


class AlphaModule(nn.Module):
    """A module with a gate strength; units inherit from it so that names stay flat (`mlp.act.alpha_logit`).

    It registers `alpha_logit` (learnable, range unit), `alpha_free` (learnable, range free), `alpha_scheduled` (a
    buffer), or `alpha_weight` and `alpha_bias` (token-dependent); nothing if alpha is fixed.

    Args:
        spec: of alpha.
        width: size of the last axis; needed for one alpha per channel and for a token-dependent one.
        layer: selects the entry of a per-layer list.
        owner: module whose parameter this one shares (`per: model`). It is registered in both, like tied embeddings.
    """

    patched_as: dict[str, Any] | None = None  # the record of the patch that made this module

    @torch.inference_mode(False)  # a tensor of inference mode has no gradient
    def __init__(
        self, spec: AlphaSpec, width: int | None = None, layer: int = 0, owner: "AlphaModule | None" = None
    ) -> None:
        super().__init__()
        self.gate = "sigmoid"
        self.spec = spec
        self.fixed: float | None = None
        per_channel = spec.kind == "token" or spec.options.get("per") == "channel"
        if per_channel and not (isinstance(width, int) and width > 0):
            raise ValueError(f"alpha.{spec.kind}: the size of the last axis is needed; give width, not {width!r}")
        if not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer: {layer!r} is not the index of a layer, 0 or more")
        if owner is not None and getattr(owner, "spec", None) != spec:
            raise ValueError(f"owner: {type(owner).__name__} is not a module with the same specification of alpha")
        shape = (width,) if per_channel and width is not None else (1,)
        if spec.kind == "fixed":
            if layer >= len(spec.values) > 1:
                raise ValueError(f"layer: {layer} is not below {len(spec.values)}, the length of the list of alpha")
            self.fixed = spec.values[layer if len(spec.values) > 1 else 0]
        elif spec.kind == "schedule":
            self.register_buffer("alpha_scheduled", torch.empty((), dtype=torch.float32))
        elif spec.kind == "token":
            self.alpha_weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
            self.alpha_bias = nn.Parameter(torch.empty((1,), dtype=torch.float32))
        else:
            name = "alpha_logit" if spec.options["range"] == "unit" else "alpha_free"
            self._tie: _Tie = owner._tie if owner else _Tie()
            if owner is not None:
                self.register_parameter(name, owner.get_parameter(name))
                return
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.reset_alpha()

    def alpha_starts(self) -> dict[str, float]:
        """Return the start value of each tensor that this module registered for alpha, by name."""
        options = self.spec.options
        if self.spec.kind == "schedule":
            return {"alpha_scheduled": schedule_value(options["kind"], 0.0, options["from"], options["to"])}
        if self.spec.kind == "token":
            return {"alpha_weight": 0.0, "alpha_bias": _logit(options["init"])}
        if "alpha_logit" in self._parameters:
            return {"alpha_logit": _logit(options["init"])}
        return {"alpha_free": options["init"]} if "alpha_free" in self._parameters else {}

    @torch.no_grad()
    def reset_alpha(self) -> None:
        """Set every tensor that this module registered for alpha to its stated start; no random number is drawn."""
        own = dict(self.named_own_alpha())
        for name, start in self.alpha_starts().items():
            own[name].fill_(start)

    @torch.no_grad()
    def set_progress(self, fraction: float) -> None:
        """Move a scheduled alpha to its value at `fraction` of training; other kinds do not change."""
        if self.spec.kind != "schedule":
            return
        start, end = self.spec.options["from"], self.spec.options["to"]
        value = schedule_value(self.spec.options["kind"], fraction, start, end)
        self.get_buffer("alpha_scheduled").fill_(value)
        if (offloaded := _offloaded(self)) and self.get_buffer("alpha_scheduled").is_meta:
            offloaded["alpha_scheduled"].fill_(value)
            if not math.isclose(offloaded["alpha_scheduled"], value, rel_tol=1e-6):
                raise ValueError("alpha: accelerate keeps a scheduled one on disk; offload with offload_buffers=False")

    def alpha(self, x: Tensor | None = None) -> float | Tensor:
        """Return the effective alpha: a float (fixed) or a tensor that broadcasts against `x`.

        Its shape is `()`, `(width,)` for one per channel, or `x.shape[:-1] + (1,)` if token-dependent; without `x`, a
        token-dependent alpha is taken at `x = 0`. Raises ValueError if the last axis of `x` is not of size `width`.
        """
        if self.fixed is not None:
            return self.fixed
        if self.spec.kind == "schedule":
            return self.get_buffer("alpha_scheduled")
        if self.spec.kind == "token":
            bias = _number_in(self.alpha_bias)
            if x is None:
                return torch.sigmoid(bias)
            _require_width(self.alpha_weight, x)
            score = x @ self.alpha_weight.to(x.dtype).unsqueeze(-1)
            return torch.sigmoid(score + bias.to(x.dtype))
        is_logit = self.spec.options["range"] == "unit"
        parameter: Tensor = getattr(self, "alpha_logit" if is_logit else "alpha_free")
        stored = parameter if self.spec.options["per"] == "channel" else _number_in(parameter)
        if x is not None:
            if self.is_shared:
                _require_one_group(parameter)
            _require_width(stored, x)
            stored = stored.to(x.device)  # a model spread over devices: a shared parameter may lie on another
        return torch.sigmoid(stored) if is_logit else stored

    def gate_input(self, x: Tensor) -> Tensor:
        """Return the input of the gate, given the input of the module."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AlphaModule":
        own = {id(t) for _, tensor in self.named_own_alpha() for t in (tensor, tensor.grad)}

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            lost = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return t.to(moved.device) if id(t) in own and lost else moved

        before = dict(self._parameters) if self.is_shared else {}
        super()._apply(keep_precision, recurse)
        for name, shared in before.items():
            moved = self._parameters[name]
            if shared is not None and moved is not None and moved is not shared:
                self._parameters[name] = self._tie.replace(shared, moved)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, shared in self._parameters.items() if self.is_shared and not keep_vars else ():
            if shared is not None and self._tie.is_repeated(destination, shared):
                # safetensors refuses names that share memory, and drops all but one of them
                destination[prefix + name] = destination[prefix + name].clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # (local_metadata, strict, missing_keys, unexpected_keys, error_messages) follow
        for name, own in self.named_own_alpha():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.dim() == 0 and own.shape == (1,):
                state_dict[prefix + name] = saved.reshape(1)  # older versions saved a number without an axis
        before = dict(self._parameters) if self.is_shared else {}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name, shared in before.items():
            if shared is not None:
                self._tie.load(self, prefix + name, shared, prefix + name in state_dict, rest[2])

    @property
    def is_shared(self) -> bool:
        """True if all modules of the model have the same parameter (`per: model`)."""
        return self.spec.options.get("per") == "model"

    def named_own_alpha(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of everything that this module registered for alpha, shared or not."""
        for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
            if name.startswith("alpha_") and tensor is not None:
                yield name, tensor

    def alpha_repr(self) -> str:
        """Return alpha in a few words, for `repr`."""
        if self.fixed is not None:
            return f"alpha={self.fixed:g}"
        options = ", ".join(f"{key}={value}" for key, value in self.spec.options.items())
        return f"alpha={self.spec.kind}({options})"


def _number_in(stored: Tensor) -> Tensor:
    # a packed alpha has three axes and stays as it is
    return stored.squeeze(0) if stored.shape == (1,) else stored


def _require_one_group(shared: Tensor) -> None:
    # FSDP1 leaves the parameter of another group in place, and then drops its gradient; FSDP2 refuses by itself
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if isinstance(shared, nn.Parameter) and getattr(shared, "_fsdp_flattened", False):
        raise ValueError(
            "alpha: one parameter of the whole model (per: model) cannot be trained if FSDP wraps layer by layer; "
            "use per: layer, or wrap the model as a whole"
        )


def _require_width(stored: Tensor, x: Tensor) -> None:
    # an axis of size 1 would be broadcast without a word
    if stored.dim() == 1 and x.shape[-1:] != stored.shape:
        raise ValueError(f"width: {stored.shape[0]} is not the last axis of an input of shape {tuple(x.shape)}")


def require_module(model: Any) -> None:
    """Raise ValueError if `model` is not a module of torch, or is scripted or traced, so that its modules are fixed."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {type(model).__name__} is not a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model: {type(model).__name__} is a program of torch.jit; take the model that it was made of")


def _logit(p: float) -> float:
    return math.log(p / (1.0 - p))


def named_alpha_modules(model: nn.Module) -> list[tuple[str, AlphaModule]]:
    """Return name and module of everything in `model` that has a gate strength, in layer order.

    If PEFT keeps a trained copy of such a module beside the original (`modules_to_save`), only the active one counts.
    """
    require_module(model)
    idle = {id(part) for module in model.modules() for held in _idle_copies(module) for part in held.modules()}
    return [(name, m) for name, m in model.named_modules() if isinstance(m, AlphaModule) and id(m) not in idle]


def _idle_copies(wrapper: Any) -> list[nn.Module]:
    copies, original = getattr(wrapper, "modules_to_save", None), getattr(wrapper, "original_module", None)
    if not isinstance(copies, nn.ModuleDict) or original is None:
        return []
    active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
    return [*([original] if active else []), *(held for name, held in copies.items() if name not in active)]


def alpha_modules(model: nn.Module) -> list[AlphaModule]:
    """Return the modules of `model` that have a gate strength, in layer order."""
    return [module for _, module in named_alpha_modules(model)]


def alpha_parameters(model: nn.Module) -> list[AlphaParameter]:
    """Return every learnable parameter of alpha, once each, in layer order; empty for an unpatched model.

    An optimiser gives each the model's learning rate times `lr_multiplier`, and no weight decay. Raise ValueError if
    FSDP1 keeps them in a flat parameter.
    """
    found: dict[int, AlphaParameter] = {}
    for prefix, module in named_alpha_modules(model):
        own = [(name, tensor) for name, tensor in module.named_own_alpha() if isinstance(tensor, nn.Parameter)]
        if module.spec.kind in ("learnable", "token") and not own:
            raise ValueError(f"{prefix}: FSDP keeps alpha in a flat parameter; wrap with use_orig_params=True")
        for name, tensor in own:
            full_name = f"{prefix}.{name}" if prefix else name
            found.setdefault(id(tensor), AlphaParameter(full_name, tensor, module.spec.options["lr_multiplier"]))
    return list(found.values())


def share_alphas(model: nn.Module, missing: set[str] | None = None) -> None:
    """Make one parameter of all that `per: model` shares, after a loader gave each module its own.

    The first that is not in `missing`, names that a checkpoint lacked, is kept. The others are removed from `missing`.
    """
    lacking = missing if missing is not None else set()
    groups: dict[int, list[tuple[str, AlphaModule]]] = {}
    for prefix, module in named_alpha_modules(model):
        if module.is_shared:
            groups.setdefault(id(module._tie), []).append((prefix, module))
    for group in groups.values():
        name = next(iter(group[0][1]._parameters))
        first = next((row for row in group if f"{row[0]}.{name}" not in lacking), group[0])
        for prefix, module in group:
            module.register_parameter(name, first[1].get_parameter(name))
            if module is not first[1]:
                lacking.discard(f"{prefix}.{name}")


@torch.no_grad()
def alpha_values(model: nn.Module) -> list[float]:
    """Return one effective alpha per layer, in layer order: the number itself, or the mean over channels.

    A token-dependent alpha is taken at `x = 0`. Empty for an unpatched model. If the model is sharded, every rank has
    to call this function.
    """
    with ExitStack() as stack:
        fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes seconds
        if fsdp and isinstance(model, fsdp.FullyShardedDataParallel):
            stack.enter_context(fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=False))
        alphas = [_whole(module).alpha() for module in alpha_modules(model)]
        return [float(torch.as_tensor(alpha, dtype=torch.float64).mean()) for alpha in alphas]


def _whole(module: AlphaModule) -> AlphaModule:
    """Return a module with the whole alpha: gathered from the shards of FSDP2, or read from accelerate's offload."""
    whole = copy.copy(module)
    whole._parameters = dict(module._parameters)
    offloaded = _offloaded(module)
    for name, tensor in module.named_own_alpha():
        if gather := getattr(tensor, "full_tensor", None):
            whole._parameters[name] = nn.Parameter(gather())
        elif tensor.is_meta and offloaded is not None:
            whole._parameters[name] = nn.Parameter(offloaded[name])
    return whole


def _offloaded(module: nn.Module) -> Any:
    """Return the tensors of a module that accelerate offloads, by name, or None."""
    return getattr(getattr(module, "_hf_hook", None), "weights_map", None)


def set_progress(model: nn.Module, fraction: float) -> None:
    """Move every scheduled alpha to its value at `fraction` (in [0, 1]) of training.

    The loop calls it before each step. The value is a buffer, so `state_dict` resumes it. Other kinds of alpha do not
    change.
    """
    fraction = _number("fraction", fraction.item() if isinstance(fraction, Tensor) else fraction, 1.0)
    for module in alpha_modules(model):
        module.set_progress(fraction)
