"""The device of a trial, its peak speed, and the share of the peak that a trial reached."""

from __future__ import annotations

import functools
import platform
import sys

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda", "auto")
# dense bfloat16 TFLOP/s with float32 sums, without sparsity, by a part of the device's name; the first match counts
PEAK_TFLOPS: dict[str, float] = {
    "H200": 989.0,  # NVIDIA H200 data sheet: 1,979 with sparsity
    "H100 PCIe": 756.0,  # NVIDIA H100 data sheet: 1,513 with sparsity
    "H100": 989.0,  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    "A100": 312.0,  # NVIDIA A100 data sheet
    "L40S": 362.0,  # NVIDIA L40S data sheet: 733 with sparsity
    "L4": 121.0,  # NVIDIA L4 data sheet: 242 with sparsity
    "A10": 125.0,  # NVIDIA A10 data sheet
    "RTX 4090": 165.2,  # NVIDIA Ada architecture white paper, appendix A
    "RTX 3090": 71.0,  # NVIDIA Ampere GA102 white paper, appendix A
}


def resolve_device(choice: str) -> torch.device:
    """Return the device for `cpu`, `cuda` or `auto`, which is cuda if there is one.

    Raise ValueError for another choice, and for `cuda` if torch sees no CUDA device.
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


@functools.cache
def warn_of_emulation(device: torch.device) -> None:
    """Write one line to stderr, once per process, if the device emulates bfloat16."""
    if not has_bfloat16(device):
        print(
            f"pagating: bfloat16 is emulated on this {device.type}; precision: float32 is faster here", file=sys.stderr
        )


def peak_tflops(name: str) -> float | None:
    """Return the peak of a device in dense bfloat16 TFLOP/s, or None if `PEAK_TFLOPS` has no row for its name."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def utilisation(flops_per_token: int, tokens_per_second: float, name: str) -> float | None:
    """Compute the model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), a share of 1.

    It is the model's FLOPs divided by the FLOPs of the device at its bfloat16 peak in the same time.

    Args:
        flops_per_token: FLOPs of training that the model needs per token.
        tokens_per_second: Tokens trained per second.
        name: Name of the device.

    Returns:
        The share, or None if `PEAK_TFLOPS` has no row for the device.
    """
    peak = peak_tflops(name)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * 1e12)
