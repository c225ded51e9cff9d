"""A trained model as a folder, loaded by `pagating.load_model(folder)`, or by `pagating.from_pretrained(folder)`.

model.safetensors: parameters and buffers, a tied one once. model.json: description of the model and its training.
tokenizer.json: tokenizer of its corpus. The other files make it a folder of Hugging Face (`pagating.hf.folder`);
`load_model` does not read them, and older folders lack them. Nothing is unpickled. No code of the folder is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pagating.checkpoint import model_tensors, with_axis, write_tensors
from pagating.data.corpus import read_meta
from pagating.gating.catalog import OwnCode, own_code
from pagating.gating.own_gate import load_own
from pagating.hf.errors import SavedModelError, require_path
from pagating.hf.folder import write_denoiser, write_gpt2
from pagating.model.gpt2 import GPT2
from pagating.model.size import GPT2Size
from pagating.trial import TASKS, Trial

FORMAT = 1  # increase it if the meaning of a file changes
WEIGHTS, FACTS, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
KEYS = {"format", "task", "vocab_size", "model", "unit", "sha256"}  # keys needed to make the model


def save_model(model: nn.Module, trial: Trial, folder: str | Path, final: Mapping[str, Any]) -> Path:
    """Write a trained model to a folder in one step, replacing an existing one, and return the folder.

    No path of this machine is written.

    Args:
        model: The trained model.
        trial: The trial that trained it.
        folder: The folder.
        final: Metrics of the trial, stored in `model.json`.

    Raises:
        OSError, SafetensorError: The folder cannot be written.
    """
    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    meta = read_meta(trial.corpus)
    try:
        scratch.mkdir(parents=True)
        shutil.copyfile(Path(trial.corpus) / TOKENIZER, scratch / TOKENIZER)
        _write_files(scratch, model, trial.task, meta["vocab_size"], trial.model, trial.unit)
        settings = trial.as_dict()
        known = {
            "format": FORMAT,
            "task": settings.pop("task"),
            "vocab_size": meta["vocab_size"],
            "model": dict(settings.pop("model")),
            "unit": _without_path(settings.pop("unit")),
            "sha256": _sha256(scratch / WEIGHTS),
            "corpus": meta["digest"],
            "final": dict(final),
        }
        if own := trial.own_code:
            known["code_sha256"] = _sha256(Path(own.file))
        trained = {name: value for name, value in settings.items() if name not in ("corpus", "pretrained")}
        with open(scratch / FACTS, "w", encoding="utf-8") as file:
            file.write(json.dumps({**known, "trial": trained}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_files(
    folder: Path, model: nn.Module, task: str, vocab_size: int, size: Mapping[str, Any], unit: Mapping[str, Any] | None
) -> None:
    """Write the weights, and what makes a folder with a tokenizer.json one of Hugging Face."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _saved_tensors(model).items()}
    write_tensors(folder / WEIGHTS, tensors, "pt", key="format")  # as transformers writes it
    if task == "causal":
        write_gpt2(folder, GPT2Size(vocab_size=vocab_size, **size), unit)
    else:
        write_denoiser(folder, model, vocab_size, size["n_ctx"])


def write_hf(folder: str | Path, model: nn.Module, target: Path, gate: str | None, unit: str | None) -> Path:
    """Write a loaded model as a folder of Hugging Face, with all files of its folder, and return the new folder.

    Args:
        folder: The folder of the model, of any version.
        model: The model that `load_model` loaded.
        target: The new folder.
        gate, unit: As for `load_model`.
    """
    facts = read_facts(folder)
    shutil.copytree(folder, target)
    made_of = _made_of(folder, facts, gate, unit)
    _write_files(target, model, facts["task"], facts["vocab_size"], facts["model"], made_of)
    facts = {**facts, "sha256": _sha256(target / WEIGHTS)}
    (target / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return target


def keep_trained(model: nn.Module, trial: Trial, folder: Path, final: Mapping[str, Any]) -> str | None:
    """Save the model of a trial that is done. Return None, or the reason in one line if it cannot be written."""
    try:
        save_model(model, trial, folder, final)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{folder}: the trained model is not kept: {reason}"
    return None


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Read `model.json`. Raise SavedModelError if it is missing, invalid or of another format."""
    path = Path(folder) / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{path}: cannot be read as a model's description: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not facts.keys() >= KEYS:
        raise SavedModelError(f"{path}: is not a description of a model of format {FORMAT}")
    if facts["task"] not in TASKS:
        raise SavedModelError(f"{path}: its task {facts['task']!r} is not one of {', '.join(TASKS)}")
    return facts


def load_model(folder: str | Path, gate: str | None = None, unit: str | None = None) -> Any:
    """Load a model that `save_model` wrote, with the same bits, in evaluation mode, on the CPU.

    Args:
        folder: The folder of the model.
        gate: FILE.py:NAME of the user's gate, if the model was trained with one. This file is run. The file that the
            folder names is never run.
        unit: The same, if the model was trained with an activation of the user's own.

    Returns:
        A `pagating.model.gpt2.GPT2`, or a model of transformers for another task than causal.

    Raises:
        SavedModelError: The folder has no usable model, or `gate` or `unit` is missing or another one.
    """
    require_path(folder)
    facts = read_facts(folder)
    made_of = _made_of(folder, facts, gate, unit)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return _loaded(Path(folder) / WEIGHTS, facts, made_of)


def _made_of(
    folder: str | Path, facts: Mapping[str, Any], gate: str | None, unit: str | None
) -> Mapping[str, Any] | None:
    """Return the unit of `facts`, with the file that was given for the user's own code. Raise SavedModelError."""
    made_of: Mapping[str, Any] | None = facts["unit"]
    own = own_code(made_of)
    if own is None or made_of is None:
        return made_of
    given = gate if own.key == "gate" else unit
    if given is None:
        called = "gate" if own.key == "gate" else "activation"
        raise SavedModelError(
            f"{folder}: was trained with an own {called} ({own.reference}); give {own.key}='FILE.py:NAME'"
        )
    made_of = {**made_of, own.key: str(given)}
    _check_code(folder, facts, own, own_code(made_of))
    return made_of


def _check_code(folder: str | Path, facts: Mapping[str, Any], own: OwnCode, given: OwnCode | None) -> None:
    """Raise SavedModelError if the file or the name in it is not the one that the model was trained with."""
    path = Path(given.file).expanduser() if given else None
    wanted = facts.get("code_sha256")  # older folders have none
    if path and path.is_file() and wanted and (found := _sha256(path)) != wanted:
        raise SavedModelError(
            f"{folder}: {path} is not the file that the model was trained with (its SHA-256 is {found[:16]}, not "
            f"{wanted[:16]}); a study keeps its files in its folder gates/"
        )
    if given and wanted and given.name != own.name:
        raise SavedModelError(f"{folder}: was trained with {own.name} of its file, not with {given.name}")


def _loaded(path: Path, facts: Mapping[str, Any], unit: Mapping[str, Any] | None) -> nn.Module:
    """Return the model of `facts` with the unit and the tensors of a file. Raise SavedModelError."""
    try:
        if (found := _sha256(path)) != facts["sha256"]:
            raise ValueError(f"it is damaged: its SHA-256 is {found[:16]}, not {str(facts['sha256'])[:16]}")
        if code := own_code(unit):
            load_own(code.key, code.reference, far=False)  # an older version trained gates that are not finite far out
        model, saved = _made(facts, unit), load_file(path)
    except (OSError, SafetensorError, TypeError, ValueError, KeyError) as error:
        raise SavedModelError(f"{path}: cannot be loaded: {error}") from error
    own, every = _saved_tensors(model), model_tensors(model)  # older folders have every one
    if not own.keys() <= saved.keys() <= every.keys():
        raise SavedModelError(f"{path}: its tensors are not the model's: {sorted(own.keys() ^ saved.keys())[:5]}")
    for name, tensor in own.items():
        value = with_axis(saved[name], tensor)
        if tensor.shape != value.shape:
            raise SavedModelError(f"{path}: '{name}' is {tuple(value.shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(value)
    return model.eval()


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, without copies. A tied parameter appears once."""
    persistent = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in model_tensors(model).items() if name in persistent}


def _made(facts: Mapping[str, Any], unit: Mapping[str, Any] | None) -> nn.Module:
    """Make a model with the sizes and the unit of `facts`. The values of its tensors do not matter."""
    if facts["task"] == "causal":
        return GPT2(GPT2Size(vocab_size=facts["vocab_size"], **facts["model"]), unit)
    from pagating.tasks.denoising import make_model  # imports transformers, which takes seconds

    with torch.random.fork_rng(devices=[]):
        made: nn.Module = make_model(facts["task"], facts["vocab_size"], facts["model"], unit)
        return made


def _without_path(unit: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a trial's unit with the user's own code named by the file's name, without its path."""
    own = own_code(unit)
    if unit is None or own is None:
        return None if unit is None else dict(unit)
    return {**unit, own.key: f"{Path(own.file).name}:{own.name}"}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
