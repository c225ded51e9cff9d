"""Checkpoints of a trial, safe against crashes, from which the training loop continues to the same bits.

A checkpoint is one safetensors file: parameters, buffers, the optimiser's state, the random generators, and in its
header (JSON) the other state of the loop. Nothing is unpickled. Its name is

    IDENTITY-STEP-CHECKSUM.safetensors

IDENTITY is a digest of the trial, so that trials may share a folder. CHECKSUM is the start of the SHA-256 of the whole
file. A file is written beside its place, synced, hashed as written, then renamed, so that the name appears only when
all bytes are on disk. The last two checkpoints are kept. If one is damaged, the one before it is used. If a checkpoint
cannot be written (disk full, folder removed), the trial continues without it.
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

FORMAT = 1  # increase it if the meaning of a file changes
KEPT = 2
EVERY_SECONDS = 60.0
LARGEST_SHARE = 0.02  # largest share of the time for writing: after a slow write, the next one waits longer
MARGIN = 1 << 20  # bytes that must be free beside the tensors of a checkpoint; they include its header
NAME = re.compile(r"(?P<identity>[0-9a-f]{16})-(?P<step>\d{10})-(?P<checksum>[0-9a-f]{16})\.safetensors")


@dataclass
class Checkpoint:
    """A saved state: `tensors` of `capture`, `facts` as JSON values, and the file."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    path: Path


def identity(trial: Mapping[str, Any]) -> str:
    """Return a digest of a trial and the version of torch, which decide the trial's bits: 16 hexadecimal digits.

    `trial` contains no paths; a digest replaces the path of a corpus.
    """
    text = json.dumps({"torch": torch.__version__, "trial": trial}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the state of the loop -------------------------------------------------------------------------------------------


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of model, optimiser and random generators that the next step depends on.

    Tensors are returned by name, without copies. Gradients are not included and must have been set to None.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return tensors | {f"generator.{device}": state for device, state in _generators(model).items()}


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state from `capture` in a new model and a new optimiser of the same trial.

    Raise ValueError if a tensor is missing, unknown or of another shape or dtype.
    """
    own = model_tensors(model)
    given = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if own.keys() != given.keys():
        raise ValueError(f"the checkpoint's tensors are not the model's: {sorted(own.keys() ^ given.keys())}")
    for name, tensor in own.items():
        saved = with_axis(given[name], tensor)
        if tensor.shape != saved.shape or tensor.dtype != saved.dtype:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (saved, tensor))
            raise ValueError(f"the checkpoint's '{name}' is not the model's: {shapes}")
        tensor.copy_(saved)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            saved = tensor if key == "step" else with_axis(tensor, parameters[int(index)])
            state.setdefault(int(index), {})[key] = saved.clone()  # the given tensor is mapped to the file
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["generator.cpu"].clone())
    if "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"].clone(), next(model.parameters()).device)


def with_axis(saved: Tensor, own: Tensor) -> Tensor:
    """Return a saved tensor with the axis of `own`, shape (1,): older versions saved one alpha with shape ()."""
    return saved.reshape(1) if saved.dim() == 0 and own.shape == (1,) else saved


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without copies. A tied parameter appears once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _generators(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


# --- the folder ------------------------------------------------------------------------------------------------------


class CheckpointFolder:
    """The folder of a trial's checkpoints, and the time of the next one. This time does not change a trial's results.

    `notes` collects one line per problem. Each line is also written to stderr.

    Args:
        folder: The folder.
        every_seconds: Least time between two checkpoints. It is longer if writing would take more than `LARGEST_SHARE`
            of the time.
        keep: Keep the last checkpoints when the trial is done.
    """

    def __init__(self, folder: str | Path, every_seconds: float = EVERY_SECONDS, keep: bool = False) -> None:
        self.folder, self.every_seconds, self.keep = Path(folder), every_seconds, keep
        self.notes: list[str] = []
        self._identity = ""  # set by `resume`
        self._whole: list[Path] = []  # intact checkpoints of this trial, oldest first
        self._failing = False
        self._wanted = False
        self._next = time.monotonic() + every_seconds

    def request(self) -> None:
        """Request a checkpoint at the end of the current step. It is safe in a signal handler."""
        self._wanted = True

    @property
    def requested(self) -> bool:
        """True if a checkpoint was requested that has not been written yet."""
        return self._wanted

    def due(self) -> bool:
        """Return True if a checkpoint was requested or its time has come."""
        return self._wanted or time.monotonic() >= self._next

    def resume(self, identity: str) -> Checkpoint | None:
        """Use the folder for this trial. Return its newest intact checkpoint, or None if there is none.

        Each unusable file is reported in one line. A damaged file is removed; a file of another trial is not touched.
        """
        self._identity = identity
        found = self._files()
        for path in self._scratch():  # left by a process that was killed while it wrote
            self._unlink(path)
        for position in range(len(found) - 1, -1, -1):
            checkpoint = self._opened(found[position])
            if checkpoint:
                self._whole = found[: position + 1]
                return checkpoint
        return None

    def _files(self) -> list[Path]:
        """Return the trial's checkpoints, sorted by step."""
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
                self._say(f"{path}: is left alone: not a checkpoint of this program")
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
        """Write the checkpoint of `step` and remove all but the last two checkpoints.

        Args:
            step: Updates made.
            tensors: Result of `capture`.
            facts: Other state, which JSON must preserve.

        Returns:
            False, after one line to stderr, if it cannot be written. Earlier checkpoints then stay.
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
        """Remove the checkpoints of a trial that is done, unless `keep` is set, and the folder if it is empty."""
        if self.keep or not self._identity:
            return
        for path in [*self._files(), *self._scratch()]:
            self._unlink(path)
        self._whole = []
        with contextlib.suppress(OSError):  # not empty, or no permission
            self.folder.rmdir()

    def _unlink(self, path: Path) -> None:
        """Remove a file if possible. Nothing depends on it."""
        with contextlib.suppress(OSError):
            path.unlink()

    def _say(self, line: str) -> None:
        self.notes.append(line)
        print(f"pagating: {line}", file=sys.stderr, flush=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: str, key: str = "pagating") -> None:
    """Write and sync one safetensors file, and make its folder if needed. `header` is stored in the file under `key`.

    There is one key, because the library writes several in a random order, so that equal files would differ.

    Raise OSError, before writing, if free space is less than the tensors and `MARGIN`. Raise OSError or SafetensorError
    if the write fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors.values()) + MARGIN
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors writes files that only the owner can read
    save_file(tensors, path, metadata={key: header})
    if path.stat().st_mode != mode:
        path.chmod(mode)
    _sync(path)


def _checksum(path: Path) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
