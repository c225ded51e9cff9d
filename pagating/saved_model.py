"""A trained model as a folder that one line loads: `pagating.load_model(folder)`.

model.safetensors: parameters and buffers, a tied one once. model.json: what the model is, and what it was trained with.
tokenizer.json: of its corpus. Nothing is unpickled, and no Python of the folder's is run.
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
from torch import nn

from pagating.checkpoint import model_tensors, write_tensors
from pagating.data.corpus import read_meta
from pagating.gating.catalog import own_gate
from pagating.model.gpt2 import GPT2
from pagating.model.size import GPT2Size
from pagating.trial import TASKS, Trial

FORMAT = 1  # raise it when a file means something else than before
WEIGHTS, FACTS, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
KEYS = {"format", "task", "vocab_size", "model", "unit", "sha256"}  # what a model is made from


class SavedModelError(ValueError):
    """A folder that holds no model of this program: one line that names it and says why."""


def save_model(model: nn.Module, trial: Trial, folder: str | Path, final: Mapping[str, Any]) -> Path:
    """Write a trained model to `folder`, whole or not at all, and return the folder. A model that is there is replaced.

    trial: of the model. final: its metrics, written beside it. No path of this machine is written. Raises OSError,
    SafetensorError.
    """
    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    meta = read_meta(trial.corpus)
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model_tensors(model).items()}
        write_tensors(scratch / WEIGHTS, tensors, trial.task)
        shutil.copyfile(Path(trial.corpus) / TOKENIZER, scratch / TOKENIZER)
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


def keep_trained(model: nn.Module, trial: Trial, folder: Path, final: Mapping[str, Any]) -> str | None:
    """Save the model of a trial that is done; return None, or one line that says why it cannot be written."""
    try:
        save_model(model, trial, folder, final)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{folder}: the trained model is not kept: {reason}"
    return None


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Return the content of `model.json`. Raises SavedModelError."""
    path = Path(folder) / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{path}: cannot be read as a model's description: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not facts.keys() >= KEYS:
        raise SavedModelError(f"{path}: is no description of a model of format {FORMAT}")
    if facts["task"] not in TASKS:
        raise SavedModelError(f"{path}: its task {facts['task']!r} is not one of {', '.join(TASKS)}")
    return facts


@torch.no_grad()
def load_model(folder: str | Path, gate: str | None = None) -> Any:
    """Return the model of a folder that `save_model` wrote, in evaluation mode, on the CPU, to the same bits.

    It is a `pagating.model.gpt2.GPT2`, or a model of transformers for another task. gate: FILE.py:NAME of the own gate
    of a model that was trained with one. That file is run; the path that the folder names is never followed. Raises
    SavedModelError.
    """
    facts, path = read_facts(folder), Path(folder) / WEIGHTS
    unit = facts["unit"]
    if own_gate(unit):
        if gate is None:
            raise SavedModelError(f"{folder}: was trained with an own gate ({unit['gate']}); give gate='FILE.py:NAME'")
        unit = {**unit, "gate": gate}
    try:
        if (found := _sha256(path)) != facts["sha256"]:
            raise ValueError(f"it is damaged: its SHA-256 is {found[:16]}, not {str(facts['sha256'])[:16]}")
        model, saved = _made(facts, unit), load_file(path)
    except (OSError, SafetensorError, TypeError, ValueError, KeyError) as error:
        raise SavedModelError(f"{path}: cannot be loaded: {error}") from error
    own = model_tensors(model)
    if own.keys() != saved.keys():
        raise SavedModelError(f"{path}: its tensors are not the model's: {sorted(own.keys() ^ saved.keys())[:5]}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise SavedModelError(f"{path}: '{name}' is {tuple(saved[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(saved[name])
    return model.eval()


def _made(facts: Mapping[str, Any], unit: Mapping[str, Any] | None) -> nn.Module:
    """Return a model of the sizes and the unit of `facts`, with arbitrary tensors."""
    if facts["task"] == "causal":
        return GPT2(GPT2Size(vocab_size=facts["vocab_size"], **facts["model"]), unit)
    from pagating.tasks.denoising import make_model  # imports transformers, which takes seconds

    with torch.random.fork_rng(devices=[]):
        made: nn.Module = make_model(facts["task"], facts["vocab_size"], facts["model"], unit)
        return made


def _without_path(unit: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a trial's unit with an own gate named by the file's name, without its path."""
    own = own_gate(unit)
    if unit is None or own is None:
        return None if unit is None else dict(unit)
    return {**unit, "gate": f"{Path(own['file']).name}:{own['name']}"}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
