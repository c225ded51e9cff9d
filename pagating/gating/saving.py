"""The patch of a model in its configuration, so that `save_pretrained` of transformers records it.

The units of a patched model keep the arguments of `patch`. `save_pretrained` makes the record of what the model is
then; in memory, its configuration has none. config.json contains the record, and in place of each activation's name a
sentence. A class that knows no patch finds no activation of that name and raises an error. `pagating.from_pretrained`
reads both.
"""

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .alpha import AlphaModule, Spec, alpha_modules, named_alpha_modules, parse
from .catalog import DEFAULTS, GATE_ROWS, LARGEST_ALPHA, OWN_CODE, OWN_UNITS
from .discovery import find_activations, of_transformers
from .gates import GATES
from .own_check import eager, plain_torch

FORMAT = 1  # increase it if the meaning of a key changes
KEY = "pagating"
ADVICE = "this model is patched; load it with pagating.from_pretrained"
WEIGHTS = "transformers_weights"  # a key of config.json: the name of the file of weights
GPT2_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # for a GPT-2 that is written without transformers
POINTS = (-3.0, -1.5, -0.5, 0.0, 0.25, 1.0, 2.0, 4.0)  # where the user's own function is known by its values
_ACTIVATION_KEY = re.compile("act|feed_forward")


class Recorded:
    """A configuration that may have a record. It is a base before a class of transformers.

    The record is a part of its JSON form alone, so that a configuration made of another one's values has none.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the values, without the record."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        values.pop(KEY, None)
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the JSON form, with the record and without the names of activations if there is a record."""
        plain: str = super().to_json_string(use_diff)  # type: ignore[misc]
        if KEY not in self.__dict__:
            return plain
        values = masked({**json.loads(plain), KEY: self.__dict__[KEY]})
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def set_record(self, record: dict[str, Any] | None) -> None:
        """Set the record, or remove it."""
        self.__dict__.pop(KEY, None)
        if record is not None:
            setattr(self, KEY, record)


class _Swapped(Recorded):
    """A copy of a configuration of a stock class, whose class was exchanged for that of `_recorded`."""

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write config.json. That of a GPT-2 with a language-modelling head is of `PaGPT2Config`."""
        config: Any = super()
        if getattr(self, "architectures", None) == ["GPT2LMHeadModel"]:
            # by name, because that module imports `patch`, which imports this one
            config = import_module(".hf_gpt2", __package__).PaGPT2Config.of(self)
        config.save_pretrained(save_directory, **options)


@functools.cache
def _recorded(stock: Any) -> Any:
    """Return a class of configurations with a record, of the same name as the stock class."""
    return _derived(_Swapped, stock, __init__=stock.__init__)


def _derived(mixin: type, stock: Any, **content: Any) -> Any:
    same = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock)(stock.__name__, (mixin, stock), {**same, **content})


class Patched:
    """A model of transformers that is saved with the record of its patch. It is a base before the model's class."""

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Write the model as that of transformers does. Raise ValueError if layers of different patches are in it."""
        with recorded(self):
            super().save_pretrained(*arguments, **options)  # type: ignore[misc]


class _PatchedStock(Patched):
    """A model of a stock class, whose class was exchanged for that of `patched_class`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, (cls, *arguments), *state = reduced
        return _remade, (cls.__bases__[1], *arguments), *state


@functools.cache
def patched_class(stock: Any) -> Any:
    """Return a class of models that are saved with the record of their patch, of the same name as the stock class."""
    return stock if issubclass(stock, Patched) else _derived(_PatchedStock, stock)


def _remade(stock: Any, *arguments: Any) -> Any:
    cls = patched_class(stock)
    return cls.__new__(cls, *arguments)


# --- the record of a model -------------------------------------------------------------------------------------------


def record_of(arguments: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the record of a patch, as JSON values.

    Args:
        arguments: Arguments of `patch`, as `settled` returns them.
        names: Names of the replaced activations.
    """
    functions = fingerprints(arguments)
    return {"format": FORMAT, "arguments": dict(arguments), "functions": functions, "names": names}


def record_patch(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Keep the arguments of a patch in the units of the model, so that they are in a copy or a part of it too.

    Every model of transformers in `model` gets a class of the same name, which writes them when it is saved.
    """
    record = record_of(arguments, [])
    for unit in alpha_modules(model):
        unit.patched_as = record
    record_when_saved(model)


def record_when_saved(model: nn.Module) -> None:
    """Give every model of transformers in `model` that has a unit the class of `patched_class`."""
    stock = of_transformers("modeling_utils", "PreTrainedModel")
    for module in model.modules() if stock else ():
        if isinstance(module, stock) and alpha_modules(module):
            kind: Any = type(module)
            module.__class__ = patched_class(kind)


def forget_patch(model: nn.Module) -> None:
    """Give every model of transformers in `model` its stock class again."""
    for module in model.modules():
        if isinstance(module, _PatchedStock) and type(module).__bases__[0] is _PatchedStock:
            module.__class__ = type(module).__bases__[1]


@contextmanager
def recorded(model: Any) -> Iterator[None]:
    """Give a model a configuration with the record of its patch in a `with` block, if it is patched."""
    config, record = model.config, live_record(model)
    if record is None and not isinstance(config, Recorded):
        yield
        return
    model.config = copy.copy(config)  # other models may have the same one
    if not isinstance(config, Recorded):
        kind: Any = type(config)
        model.config.__class__ = _recorded(kind)
    model.config.set_record(record)
    try:
        yield
    finally:
        model.config = config


def live_record(model: nn.Module) -> dict[str, Any] | None:
    """Return the record of a model as it is now, after layers were moved, removed or copied. None: it is not patched.

    Raise ValueError if its units come from different patches.
    """
    found = [(name, unit, unit.patched_as) for name, unit in named_alpha_modules(model) if unit.patched_as]
    if not found:
        return None
    names, units = [name for name, _, _ in found], [unit for _, unit, _ in found]
    every = [{**made, "arguments": _but(made["arguments"], "alpha", "include")} for _, _, made in found]
    if any(made != every[0] for made in every):
        raise ValueError(f"{type(model).__name__}: its layers were patched in different ways, which no record can say")
    record, given = every[0], found[0][2]["arguments"]
    arguments = record["arguments"]
    if "alpha" in given:
        arguments["alpha"] = _alpha_of(units)
    if "include" in given or find_activations(model):
        arguments["include"] = names
    return {**record, "names": names}


def _but(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _alpha_of(units: list[AlphaModule]) -> Any:
    """Return the specification of alpha that makes these units. Raise ValueError if there is none."""
    kinds = [{unit.spec.kind: dict(unit.spec.options)} for unit in units]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"alpha: its layers have different kinds of it: {kinds[0]} and others")
    if units[0].spec.kind == "fixed":
        return _fixed([unit.fixed or 0.0 for unit in units])
    if units[0].is_shared and len({id(unit._tie) for unit in units}) > 1:  # a layer was copied
        kinds[0]["learnable"]["per"] = "layer"
    return kinds[0]


def _fixed(values: Sequence[float]) -> Any:
    # one number has other limits than a list
    return values[0] if len(set(values)) == 1 and 0.0 <= values[0] <= LARGEST_ALPHA else list(values)


def settled(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `patch` that do not depend on its defaults, from those of `catalog.settings`.

    An activation of the user's own is named as `unit`.
    """
    if chosen["base"] in OWN_UNITS:
        return {"unit": chosen["base"]}
    return {**{key: chosen[key] for key in DEFAULTS}, "alpha": plain_alpha(chosen["alpha"])}


def plain_alpha(alpha: Spec) -> Any:
    """Return a specification of alpha with its defaults filled in, as JSON values."""
    spec = parse(alpha)
    return _fixed(spec.values) if spec.values else {spec.kind: dict(spec.options)}


def fingerprints(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for the user's own gate or activation in the arguments, its values at `POINTS`.

    The floating-point tensors of a module are filled with constants before, because its values depend on them.
    """
    found: dict[str, Any] = {}
    for key, table in (("gate", GATES), ("unit", OWN_UNITS)):
        name = arguments.get(key)
        if name is None or name in GATE_ROWS or name not in table:
            continue
        with plain_torch(), eager(), torch.no_grad():  # a model may be made on `meta`
            made: Callable[..., Any] = GATES[name].gate if key == "gate" else OWN_UNITS[name](len(POINTS))
            state = made.state_dict() if isinstance(made, nn.Module) else {}
            for position, tensor in enumerate(tensor for tensor in state.values() if tensor.is_floating_point()):
                tensor.fill_(0.5 + 0.25 * position)
            values = made(torch.tensor(POINTS).reshape(1, 1, -1))  # the axes of a model's hidden states
            found[key] = torch.nan_to_num(values).flatten().tolist()
    return found


def check_functions(record: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if the user's own function is not known in this process, or is another one than in training.

    Args:
        record: The record of a saved model.
        arguments: The arguments of `patch` to load it with.
    """
    for key, values in record.get("functions", {}).items():
        name, saved = arguments.get(key), record["arguments"][key]
        if name is None:  # another unit was asked for
            continue
        if name not in (GATES if key == "gate" else OWN_UNITS):
            raise ValueError(
                f"was patched with a {key} of your own, {saved!r}, which is not known here: register it first "
                f"(pagating.register_{key}), or give {key}='FILE.py:NAME'"
            )
        if not _equal(fingerprints({key: name}).get(key), values):
            raise ValueError(f"was patched with another {key} than {name!r} is here: its values differ")


def _equal(found: list[float] | None, saved: list[float] | None) -> bool:
    if found is None or saved is None:
        return saved is None  # older versions wrote none for a module
    return all(math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) for one, other in zip(found, saved, strict=True))


# --- its JSON form ---------------------------------------------------------------------------------------------------


def masked(config: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a configuration with a record, of which no stock class makes or loads a model.

    The names of activations, and that of the file of weights, become a sentence that says what to do. The record keeps
    the former. Paths of this machine are left out.
    """
    config = copy.deepcopy(config)
    record = config[KEY]
    _drop_nested(config)
    for arguments in (record["arguments"], config):  # `PaGPT2Config` has them as its own keys too
        for key in ("gate", "unit"):
            if match := OWN_CODE.fullmatch(str(arguments.get(key))):
                arguments[key] = f"{Path(match['file']).name}:{match['name']}"
    stock: dict[str, str] = {}
    record["stock"] = stock
    _mask(config, "", stock)
    return {**config, WEIGHTS: ADVICE}


def unmasked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a stock configuration, with the record, from those that `masked` returned."""
    plain = copy.deepcopy(dict(config))
    record = plain.get(KEY)
    if isinstance(record, Mapping):
        if plain.get(WEIGHTS) == ADVICE:
            del plain[WEIGHTS]
        for path, value in record.get("stock", {}).items():
            *parents, key = path.split("/")
            place = plain
            for parent in parents:
                place = place[parent]
            place[key] = value
        plain[KEY] = {key: value for key, value in record.items() if key != "stock"}
    return plain


def _mask(values: dict[str, Any], prefix: str, stock: dict[str, str]) -> None:
    for key, value in values.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict) and path != KEY:
            _mask(value, path, stock)
        elif isinstance(value, str) and _is_activation(path, value):
            stock[path], values[key] = value, ADVICE


def _is_activation(path: str, value: str) -> bool:
    named = any(_ACTIVATION_KEY.search(key) for key in path.split("/")[-2:])
    known = of_transformers("activations", "ACT2CLS") or GPT2_ACTIVATIONS
    return named and value.rpartition("-")[2] in known  # `gated-gelu` of T5


def _drop_nested(values: dict[str, Any]) -> None:
    """Remove the records of configurations inside a configuration."""
    for value in values.values():
        if isinstance(value, dict):
            value.pop(KEY, None)
            _drop_nested(value)
