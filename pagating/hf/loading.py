"""Load a model that `save_pretrained` of transformers wrote, patched by `pagating.patch` or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, GPT2Config, PreTrainedConfig
from transformers.utils import logging

from pagating.gating.alpha import share_alphas
from pagating.gating.catalog import own_code
from pagating.gating.hf_gpt2 import ALPHA_NAMES, ARGUMENTS, PaGPT2Config, PaGPT2LMHeadModel, start_alphas
from pagating.gating.own_gate import load_own
from pagating.gating.patch import patch
from pagating.gating.saving import FORMAT, KEY, check_functions, patched_class, unmasked
from pagating.hf.errors import SavedModelError, require_path

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")  # where the files are
OF_PATCH = (KEY, *ARGUMENTS, "auto_map")  # keys of `PaGPT2Config`
OF_LOADER = (*HUB, "dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config")


def from_pretrained(
    folder: str | Path,
    *,
    gate: str | None = None,
    unit: str | None = None,
    model_class: type | None = None,
    config: PreTrainedConfig | None = None,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """Load the model that `save_pretrained` wrote, patched as it was, with the same bits, in evaluation mode.

    Args:
        folder: Folder, or name on the hub.
        gate: FILE.py:NAME of the user's gate, or its registered name, if the model was patched with one. This file is
            run. The file that the folder names is never run.
        unit: The same, if the model was patched with an activation of the user's own.
        model_class: Class of the model, or an Auto class; by default the class of transformers that config.json names.
            A class with another head, or with none, gets the alphas of the saved model too.
        config: Configuration of the model; by default that of the folder.
        output_loading_info: Whether to return the model and a dictionary of missing and unexpected weights.
        options: Those of `from_pretrained` of transformers: dtype, device_map, revision, and keys of the configuration
            such as num_labels.

    Raises:
        SavedModelError: There is no such model, `gate` or `unit` is missing or another one, or the weights are not
            those of the patched model.
    """
    require_path(folder)
    if not (config is None or isinstance(config, PreTrainedConfig)):
        raise SavedModelError(f"config: {type(config).__name__} is not a configuration of transformers")
    if not (model_class is None or hasattr(model_class, "from_pretrained")):
        raise SavedModelError(f"model_class: {model_class!r} is not a class of models of transformers")
    try:
        model, info = _loaded(str(folder), {"gate": gate, "unit": unit}, model_class, config, options)
    except SavedModelError:
        raise
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise SavedModelError(f"{folder}: cannot be loaded: {_one_line(error)}") from error
    return (model, info) if output_loading_info else model


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


def _loaded(
    folder: str, own: Mapping[str, str | None], model_class: Any, config: Any, options: dict[str, Any]
) -> tuple[Any, Any]:
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
    cls: Any = _class_of(model_class, plain) if model_class else _named_class(folder, plain)
    rest = {key: value for key, value in options.items() if key != "trust_remote_code"}
    if config is None:
        config, rest = _config(cls, plain, rest)
    if cls is PaGPT2LMHeadModel:  # it patches itself, as its configuration says
        for key, value in arguments.items():
            setattr(config, key, value)
    elif record:
        check_functions(record, arguments)
        cls = _patched(cls, record["names"], arguments)
    model, info = cls.from_pretrained(folder, config=config, output_loading_info=True, trust_remote_code=False, **rest)
    _check(model, info, bool(record), exact=model_class is None)
    if record and cls is not PaGPT2LMHeadModel:
        model.__class__ = cls.__base__
    return model.eval(), info


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


def _class_of(model_class: Any, values: Mapping[str, Any]) -> Any:
    """Return a model's class: the given one, or that of an Auto class for the configuration of these values."""
    if (mapping := getattr(model_class, "_model_mapping", None)) is None:
        return model_class
    model_type = GPT2Config.model_type if values["model_type"] == PaGPT2Config.model_type else values["model_type"]
    config_class = type(AutoConfig.for_model(model_type))
    if config_class not in mapping:
        raise ValueError(f"{model_class.__name__} has no class for {config_class.__name__}")
    found = mapping[config_class]
    return found[0] if isinstance(found, list | tuple) else found


def _config(cls: Any, values: dict[str, Any], options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of these values and of those options that are keys of it, and the other options."""
    config_class: Any = cls.config_class
    if not isinstance(config_class, type):  # Mixtures such as an encoder and a decoder of two types
        config_class = type(AutoConfig.for_model(values["model_type"]))
    if cls is not PaGPT2LMHeadModel:
        values = {key: value for key, value in values.items() if key not in OF_PATCH}
    given = {key: value for key, value in options.items() if key not in OF_LOADER}
    config, unused = config_class.from_dict(values, return_unused_kwargs=True, **given)
    return config, {**unused, **{key: value for key, value in options.items() if key in OF_LOADER}}


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
    return type(cls)(
        cls.__name__, (patched_class(cls),), {**content, "__module__": cls.__module__, "__doc__": cls.__doc__}
    )


def _require_same(found: list[str], names: list[str]) -> None:
    """Raise ValueError if other activations are replaced than in the saved model.

    A model inside another one has shorter names. Older versions kept the names of layers that were removed.
    """

    def is_part(name: str, of: str) -> bool:
        return f".{of}".endswith(f".{name}")

    if unknown := [name for name in found if not any(is_part(name, one) or is_part(one, name) for one in names)]:
        known = f"{names[0]} and {len(names) - 1} more" if names else "nothing"
        raise ValueError(f"its patch replaced {known}, not {', '.join(unknown)}")


def _check(model: Any, info: Mapping[str, Any], has_record: bool, exact: bool) -> None:
    """Raise ValueError if a weight of the patched model is missing in the files, or one of the files has no place.

    With another class than that of the saved model, only the weights of the patch have to be there. Without a record,
    the files must have none.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info[kind])
        if not (has_record and exact):
            keys = [key for key in keys if any(f".{name}" in key for name in ALPHA_NAMES)]
        if keys and has_record:
            raise ValueError(f"its weights are not those of the patched model: {kind.replace('_', ' ')} {keys[:3]}")
        if keys and kind == "unexpected_keys":
            raise ValueError(
                f"its weights have alphas, {keys[0]}, but no patch is recorded: an older version wrote it, or a part "
                "of the model was patched; patch the stock model again, then load the weights"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
