"""Load a model that `save_pretrained` of transformers wrote, patched by `pagating.patch` or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from pagating.gating.alpha import share_alphas
from pagating.gating.catalog import DEFAULTS, own_code
from pagating.gating.hf_gpt2 import ALPHA_NAMES, PaGPT2LMHeadModel, start_alphas
from pagating.gating.own_gate import load_own
from pagating.gating.patch import patch
from pagating.gating.saving import FORMAT, KEY, check_functions, unmasked
from pagating.hf.errors import SavedModelError

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")  # where the files are


def from_pretrained(
    folder: str | Path,
    *,
    gate: str | None = None,
    unit: str | None = None,
    model_class: type | None = None,
    **options: Any,
) -> Any:
    """Load the model that `save_pretrained` wrote, patched as it was, with the same bits, in evaluation mode.

    Args:
        folder: Folder, or name on the hub.
        gate: FILE.py:NAME of the user's gate, or its registered name, if the model was patched with one. This file is
            run. The file that the folder names is never run.
        unit: The same, if the model was patched with an activation of the user's own.
        model_class: Class of the model; by default the class of transformers that config.json names.
        options: Those of `from_pretrained` of transformers, such as dtype, device_map and revision.

    Raises:
        SavedModelError: There is no such model, `gate` or `unit` is missing or another one, or the weights are not
            those of the patched model.
    """
    try:
        return _loaded(str(folder), {"gate": gate, "unit": unit}, model_class, options)
    except SavedModelError:
        raise
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise SavedModelError(f"{folder}: cannot be loaded: {_one_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and printing notes in a `with` block."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _loaded(folder: str, own: Mapping[str, str | None], model_class: type | None, options: dict[str, Any]) -> Any:
    if Path(folder).is_absolute() and not Path(folder).is_dir():
        raise SavedModelError(f"{folder}: there is no such folder")
    place = {key: value for key, value in options.items() if key in HUB}
    values, _ = PreTrainedConfig.get_config_dict(folder, **place)
    if not values:
        if (Path(folder) / "adapter_config.json").is_file():
            advice = "load its base model with this function, then the adapter with peft"
            raise SavedModelError(f"{folder}: it is an adapter; {advice}")
        raise SavedModelError(f"{folder}: has no config.json")
    record = values.get(KEY)
    if record is not None and not (isinstance(record, Mapping) and record.get("format") == FORMAT):
        raise SavedModelError(f"{folder}: its record of the patch is not of format {FORMAT}")
    if record is not None and not record.keys() >= {"arguments", "names", "functions"}:
        raise SavedModelError(f"{folder}: its record of the patch has lost a key; it has {', '.join(record)}")
    arguments = _arguments(record, own) if record else {}
    plain = unmasked(values)
    cls: Any = model_class or _named_class(folder, plain)
    config = _config(cls, plain)
    if cls is PaGPT2LMHeadModel:  # it patches itself, as its configuration says
        for key, value in arguments.items():
            setattr(config, key, value)
    else:
        for key in (KEY, *DEFAULTS, "unit", "include", "auto_map"):  # of `PaGPT2Config`
            config.__dict__.pop(key, None)
        if record:
            check_functions(record, arguments)
            cls = _patched(cls, record["names"], arguments)
    rest = {key: value for key, value in options.items() if key not in ("trust_remote_code", "output_loading_info")}
    model, info = cls.from_pretrained(folder, config=config, output_loading_info=True, trust_remote_code=False, **rest)
    if record:
        _check(model, info, exact=model_class is None)
        if cls is not PaGPT2LMHeadModel:
            model.__class__ = cls.__base__
    return model.eval()


def _arguments(record: Mapping[str, Any], own: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the arguments of `patch`. The user's own gate or activation is the given one, and registered."""
    arguments = dict(record["arguments"])
    for key, given in own.items():
        if given is None:
            continue
        if key not in record.get("functions", {}):
            raise ValueError(f"{key}={given!r} was given, but it was patched with {key}: {arguments.get(key)!r}")
        if own_code({key: given}):
            load_own(key, given)
        arguments[key] = given
    return arguments


def _named_class(folder: str, values: Mapping[str, Any]) -> Any:
    saved_from = values.get(KEY, {}).get("class")  # a patched GPT-2 is written as one that the Auto classes load
    names = [saved_from] if saved_from else values.get("architectures") or []
    if names == [PaGPT2LMHeadModel.__name__]:
        return PaGPT2LMHeadModel
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise SavedModelError(
            f"{folder}: its class {', '.join(names) or 'is not named and'} is not one of transformers; give model_class"
        )
    return cls


def _config(cls: Any, values: dict[str, Any]) -> Any:
    config_class: Any = cls.config_class
    if not isinstance(config_class, type):  # Mixtures such as an encoder and a decoder of two types
        config_class = type(AutoConfig.for_model(values["model_type"]))
    return config_class.from_dict(values)


def _patched(cls: Any, names: list[str], arguments: Mapping[str, Any]) -> Any:
    """Return a subclass of a model's class, of the same name, that is patched when it is made.

    transformers makes a model without values, then fills it from the files. So the patch must be part of the making.
    """

    def made(self: Any, config: Any, *more: Any, **options: Any) -> None:
        cls.__init__(self, config, *more, **options)
        _require_same(patch(self, **arguments).names, names)

    def initialize_weights(self: Any) -> None:
        cls.initialize_weights(self)
        start_alphas(self)

    def tie_weights(self: Any, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        cls.tie_weights(self, missing_keys, recompute_mapping)
        share_alphas(self, missing_keys)

    kept = ALPHA_NAMES | set(cls._keep_in_fp32_modules_strict or ())
    content: dict[str, Any] = {"__init__": made, "initialize_weights": initialize_weights, "tie_weights": tie_weights}
    content["_keep_in_fp32_modules_strict"] = kept
    return type(cls)(cls.__name__, (cls,), {**content, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _require_same(found: list[str], names: list[str]) -> None:
    """Raise ValueError if other activations are replaced than in the saved model.

    A model inside another one has shorter names. Layers that were removed before saving are not found again.
    """
    if unknown := [name for name in found if not any(f".{known}".endswith(f".{name}") for known in names)]:
        raise ValueError(f"its patch replaced {names[0]} and {len(names) - 1} more, not {', '.join(unknown)}")


def _check(model: Any, info: Mapping[str, Any], exact: bool) -> None:
    """Raise ValueError if a weight of the patched model is missing in the files, or one of the files has no place.

    With another class than that of the saved model, only the weights of the patch have to be there.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info[kind])
        if not exact:
            keys = [key for key in keys if any(f".{name}" in key for name in ALPHA_NAMES)]
        if keys:
            raise ValueError(f"its weights are not those of the patched model: {kind.replace('_', ' ')} {keys[:3]}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
