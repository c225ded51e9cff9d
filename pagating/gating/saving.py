"""The patch of a model in its configuration, so that `save_pretrained` of transformers records it.

`patch` gives the model a copy of its configuration. The copy has the attribute `pagating`, the record. In memory it
behaves as before. Its JSON form (config.json) contains the record, and in place of each activation's name a sentence.
A class that knows no patch finds no activation of that name and raises an error. `pagating.from_pretrained` reads both.
"""

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .alpha import Spec, parse
from .catalog import DEFAULTS, GATE_ROWS, OWN_CODE, OWN_UNITS
from .discovery import of_transformers
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
    """A configuration that may have a record. It is a base before a class of transformers."""

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the JSON form, with the record and without the names of activations if there is a record."""
        plain: str = super().to_json_string(use_diff)  # type: ignore[misc]
        if KEY not in self.__dict__:
            return plain
        return json.dumps(masked(json.loads(plain)), indent=2, sort_keys=True) + "\n"

    def set_record(self, record: dict[str, Any] | None) -> None:
        """Set the record, or remove it."""
        self.__dict__.pop(KEY, None)
        if record is not None:
            setattr(self, KEY, record)


class _Swapped(Recorded):
    """A configuration of a stock class whose class was exchanged for that of `_recorded`."""

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write config.json. That of a GPT-2 with a language-modelling head is of `PaGPT2Config`."""
        config: Any = super()
        if getattr(self, "architectures", None) == ["GPT2LMHeadModel"]:
            # by name, because that module imports `patch`, which imports this one
            config = import_module(".hf_gpt2", __package__).PaGPT2Config.of(self)
        config.save_pretrained(save_directory, **options)

    def set_record(self, record: dict[str, Any] | None) -> None:
        """Set the record, or remove it and be an object of the stock class again."""
        super().set_record(record)
        if record is None:
            self.__class__ = type(self).__bases__[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remade, (type(self).__bases__[1], self.__dict__)


@functools.cache
def _recorded(stock: Any) -> Any:
    """Return a class of configurations with a record, of the same name as the stock class."""
    same = {"__module__": stock.__module__, "__doc__": stock.__doc__, "__init__": stock.__init__}
    return type(stock)(stock.__name__, (_Swapped, stock), same)


def _remade(stock: Any, state: dict[str, Any]) -> Any:
    cls = _recorded(stock)
    config = cls.__new__(cls)
    config.__dict__.update(state)
    return config


# --- the record of a model -------------------------------------------------------------------------------------------


def record_of(arguments: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the record of a patch, as JSON values.

    Args:
        arguments: Arguments of `patch`, as `settled` returns them.
        names: Names of the replaced activations.
    """
    functions = fingerprints(arguments)
    return {"format": FORMAT, "arguments": dict(arguments), "functions": functions, "names": names}


def record_patch(model: nn.Module, arguments: Mapping[str, Any], names: list[str]) -> None:
    """Write the record of a patch into the model's configurations. The arguments are those of `record_of`.

    Each model inside `model` gets its record, because it may be saved by itself. Configurations are copied before,
    since other models may have the same ones. A model without a configuration of transformers has no record.
    """
    record = record_of(arguments, names)
    copies: dict[int, Any] = {}  # of `copy.deepcopy`: a configuration inside another one stays the same object
    seen: set[int] = set()
    config_type = of_transformers("configuration_utils", "PreTrainedConfig")
    model_type = of_transformers("modeling_utils", "PreTrainedModel")
    for prefix, module in model.named_modules():
        config = module.__dict__.get("config")
        if config_type is None or not isinstance(config, config_type):
            continue
        module.config = config = copy.deepcopy(config, copies)
        inside = prefix + "." if prefix else ""
        own = [name.removeprefix(inside) for name in names if name.startswith(inside)]
        if isinstance(module, model_type) and own and id(config) not in seen:
            seen.add(id(config))
            chosen = {"include": own} if "include" in arguments else {}
            _set(config, {**record, "arguments": {**arguments, **chosen}, "names": own})


def _set(config: Any, record: dict[str, Any]) -> None:
    if not isinstance(config, Recorded):
        config.__class__ = _recorded(type(config))  # type: ignore[arg-type]
    config.set_record(record)


def forget_patch(model: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Remove the records of `record_patch` from the model's configurations. Return both, for `remember_patch`."""
    configs = {id(config): config for m in model.modules() if isinstance(config := m.__dict__.get("config"), Recorded)}
    found = [(config, getattr(config, KEY)) for config in configs.values() if KEY in config.__dict__]
    for config, _ in found:
        config.set_record(None)
    return found


def remember_patch(forgotten: list[tuple[Any, dict[str, Any]]]) -> None:
    """Set the records again that `forget_patch` removed."""
    for config, record in forgotten:
        _set(config, record)


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
    if spec.values:
        return list(spec.values) if len(spec.values) > 1 else spec.values[0]
    return {spec.kind: dict(spec.options)}


def fingerprints(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for the user's own gate or activation in the arguments, its values at `POINTS`.

    An activation that is a module has None, because its parameters change its values.
    """
    found: dict[str, Any] = {}
    for key, table in (("gate", GATES), ("unit", OWN_UNITS)):
        name = arguments.get(key)
        if name is None or name in GATE_ROWS or name not in table:
            continue
        made: Callable[..., Any] = GATES[name].gate if key == "gate" else OWN_UNITS[name](len(POINTS))
        is_module = isinstance(made, nn.Module)
        with plain_torch(), eager(), torch.no_grad():  # a model may be made on `meta`
            found[key] = None if is_module else made(torch.tensor(POINTS)).tolist()
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
        return found is saved
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
