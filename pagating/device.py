"""The device of a trial, its peak speed, and the share of the peak that a trial reached."""

from __future__ import annotations

import functools
import platform
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from pagating.hardware import DEVICES


def resolve_device(choice: str) -> torch.device:
    """Return the device of a trial: `cpu`, `cuda`, or `auto`, which is cuda if there is one.

    Raises ValueError for another choice, and for `cuda` if torch sees no CUDA device.
    """
    if choice not in DEVICES:
        raise ValueError(f"device='{choice}' is not one of {', '.join(DEVICES)}")
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch sees no CUDA device; choose cpu or auto")
    return torch.device("cuda" if choice == "cuda" or (choice == "auto" and torch.cuda.is_available()) else "cpu")


def to_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Copy tokens to the device. A copy to a GPU uses pinned memory, so that later launches do not wait for it."""
    return tokens if device.type == "cpu" else tokens.pin_memory().to(device, non_blocking=True)


def has_bfloat16(device: torch.device) -> bool:
    """Return True if the hardware multiplies bfloat16 matrices.

    A processor without AVX-512 BF16, AMX or Arm's equivalent emulates it, several times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def device_name(device: torch.device) -> str:
    """Return the name of a card or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


@functools.cache
def warn_of_emulation(device: torch.device) -> None:
    """Write one line to stderr, once per process, if the device emulates bfloat16."""
    if not has_bfloat16(device):
        print(
            f"pagating: bfloat16 is emulated on this {device.type}; precision: float32 is faster here", file=sys.stderr
        )


def out_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """Return one line that says what was asked for and what to lower; None if the error is not about memory."""
    text = str(error)
    if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text):
        return None
    found = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text)
    size = found and (found[2] or f"{int(found[1]) / (1 << 30):.2f} GiB")
    asked = f"{size} more could not be had" if size else "no size is known"
    return (
        f"out of memory: {asked}; lower the batch (batch_tokens), the model (d_model, n_layer, n_ctx), the vocabulary, "
        "or the number of trials side by side"
    )
