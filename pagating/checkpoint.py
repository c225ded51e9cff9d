"""Checkpoints of a trial: what the loop needs to go on to the same bits, on disk so that no crash can spoil it.

A checkpoint is one safetensors file: parameters, buffers, the optimiser's state, the random generators, and in its
header (JSON) everything else that the loop holds. Nothing is unpickled. Its name is

    IDENTITY-STEP-CHECKSUM.safetensors

IDENTITY is a digest of the trial, so that trials may share a folder; CHECKSUM is the start of the SHA-256 of the whole
file. A file appears under that name only when all of it is on disk: written beside it, synced, hashed from what was
written, renamed. The last two are kept; a damaged one is passed over for the one before it. A checkpoint that cannot be
written (a full disk, a folder that has gone) costs the trial nothing but the checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1  # raise it when a file means something else than before
KEPT = 2
EVERY_SECONDS = 60.0
LARGEST_SHARE = 0.02  # of the time goes to writing: where a file takes long, the next one waits longer
MARGIN = 1 << 20  # bytes to be left free beside the next checkpoint; its header is in it
NAME = re.compile(r"(?P<identity>[0-9a-f]{16})-(?P<step>\d{10})-(?P<checksum>[0-9a-f]{16})\.safetensors")


@dataclass
class Checkpoint:
    """What was saved: `tensors` as `capture` gave them, `facts` as JSON holds them, and the file."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    path: Path


def identity(trial: Mapping[str, Any]) -> str:
    """Digest of all that decides a trial's bits, with the version of torch: 16 hexadecimal digits.

    `trial` holds no paths: a corpus stands in it by its digest.
    """
    text = json.dumps({"torch": torch.__version__, "trial": trial}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_name(key: str) -> str:
    """A name of one folder for any text: what is readable of it, and a digest; it cannot lead out of its parent."""
    readable = re.sub(r"[^A-Za-z0-9._=-]+", "-", key)[:60].strip(".-")
    return f"{readable or 'cell'}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


# --- the state of the loop -------------------------------------------------------------------------------------------


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything of model, optimiser and random generators that the next step depends on; tensors by name, no copies.

    The gradients must have been set to None: they are no part of it.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return tensors | {f"generator.{device}": state for device, state in _generators(model).items()}


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `capture` took, into a model and an optimiser made anew from the same trial.

    Raises ValueError where a tensor is missing, unknown or of another shape.
    """
    own = model_tensors(model)
    given = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if own.keys() != given.keys():
        raise ValueError(f"the checkpoint's tensors are not the model's: {sorted(own.keys() ^ given.keys())}")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape or tensor.dtype != given[name].dtype:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (given[name], tensor))
            raise ValueError(f"the checkpoint's '{name}' is not the model's: {shapes}")
        tensor.copy_(given[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor.clone()  # out of the file's mapping
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["generator.cpu"].clone())
    if "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"].clone(), next(model.parameters()).device)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a tied one once; no copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _generators(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


# --- the folder ------------------------------------------------------------------------------------------------------


class CheckpointFolder:
    """Where a trial keeps its checkpoints, and when the next one is due.

    `every_seconds`: at most so often, and less often where writing would take more than `LARGEST_SHARE` of the time.
    `keep`: leave the last ones when the trial is done. `notes` collects what a person should know, a line each; each is
    written to stderr as well. When a checkpoint is made changes nothing in a trial's results.
    """

    def __init__(self, folder: str | Path, every_seconds: float = EVERY_SECONDS, keep: bool = False) -> None:
        self.folder, self.every_seconds, self.keep = Path(folder), every_seconds, keep
        self.notes: list[str] = []
        self._identity = ""  # known once a trial uses the folder
        self._whole: list[Path] = []  # ours, oldest first
        self._failing = False
        self._wanted = False
        self._next = time.monotonic() + every_seconds

    def request(self) -> None:
        """Ask for a checkpoint at the end of the step that runs (safe in a signal handler)."""
        self._wanted = True

    def due(self) -> bool:
        """Whether it is time for a checkpoint, or one was asked for."""
        return self._wanted or time.monotonic() >= self._next

    def resume(self, identity: str) -> Checkpoint | None:
        """Use the folder for this trial: its newest whole checkpoint, None where there is none.

        What cannot be used is named in a line: a damaged file is removed, another trial's is left alone.
        """
        self._identity = identity
        found = self._files()
        for path in self._scratch():  # of a process that was killed while it wrote
            self._unlink(path)
        for position in range(len(found) - 1, -1, -1):
            checkpoint = self._opened(found[position])
            if checkpoint:
                self._whole = found[: position + 1]
                return checkpoint
        return None

    def _files(self) -> list[Path]:
        """The trial's checkpoints, by step."""
        return sorted(path for path in self.folder.glob(f"{self._identity}-*") if NAME.fullmatch(path.name))

    def _scratch(self) -> list[Path]:
        return list(self.folder.glob(f".{self._identity}-*"))

    def _opened(self, path: Path) -> Checkpoint | None:
        named = NAME.fullmatch(path.name)
        try:
            if named is None or _checksum(path) != named["checksum"]:
                self._say(f"{path}: is damaged (its checksum does not match); it is removed")
                self._unlink(path)
                return None
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("pagating", "{}"))
            if not {"format", "identity", "facts"} <= header.keys():
                self._say(f"{path}: is left alone: no checkpoint of this program")
                return None
            if header["format"] != FORMAT or header["identity"] != self._identity:
                self._say(
                    f"{path}: is left alone: format {header['format']} of trial {header['identity']}, "
                    f"not format {FORMAT} of trial {self._identity}"
                )
                return None
            return Checkpoint(load_file(path), header["facts"], path)
        except (OSError, SafetensorError) as error:
            self._say(f"{path}: cannot be read: {error}")
            return None

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
        """Write the checkpoint of `step` and drop all but the last two; False, and one line, where it cannot be done.

        `facts` holds what JSON gives back unchanged. A failure leaves the earlier checkpoints as they are.
        """
        self._wanted = False
        started = time.monotonic()
        header = {"format": FORMAT, "identity": self._identity, "facts": dict(facts)}
        scratch = self.folder / f".{self._identity}-{secrets.token_hex(6)}.tmp"
        try:
            write_tensors(scratch, dict(tensors), json.dumps(header))
            path = self.folder / f"{self._identity}-{step:010d}-{_checksum(scratch)}.safetensors"
            os.replace(scratch, path)
            _sync(self.folder)
            self._whole = [*[earlier for earlier in self._whole if earlier != path], path]
            for older in self._whole[:-KEPT]:
                self._unlink(older)
            self._whole = self._whole[-KEPT:]
        except (OSError, SafetensorError) as error:
            if isinstance(error, SafetensorError) and "I/O error" not in str(error):
                raise
            if not self._failing:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                self._say(f"{self.folder}: no checkpoint at step {step}: {reason}; the trial goes on without it")
            self._failing = True
            self._unlink(scratch)
        else:
            self._failing = False
        took = time.monotonic() - started
        self._next = time.monotonic() + max(self.every_seconds, took / LARGEST_SHARE)
        return not self._failing

    def remove(self) -> None:
        """Remove the checkpoints of a trial that is done, unless they are kept, and the folder when it is empty."""
        if self.keep or not self._identity:
            return
        for path in [*self._files(), *self._scratch()]:
            self._unlink(path)
        self._whole = []
        with contextlib.suppress(OSError):  # not empty, or not ours to remove
            self.folder.rmdir()

    def _unlink(self, path: Path) -> None:
        """A file that cannot be removed is left: nothing depends on it."""
        with contextlib.suppress(OSError):
            path.unlink()

    def _say(self, line: str) -> None:
        self.notes.append(line)
        print(f"pagating: {line}", file=sys.stderr, flush=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: str) -> None:
    """Write and sync one safetensors file, its folder made; `header`: text that is kept in it.

    Raises OSError where the disk has less room than it needs and `MARGIN`, and writes nothing then; SafetensorError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors.values()) + MARGIN
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
    path.touch()
    mode = path.stat().st_mode  # what the umask says; safetensors lets nobody but the owner read what it writes
    save_file(tensors, path, metadata={"pagating": header})
    if path.stat().st_mode != mode:
        path.chmod(mode)
    _sync(path)


def _checksum(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
