"""The devices that a trial may ask for, the peak speeds of known GPUs, and the usable cores. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T", bound=float)

DEVICES = ("cpu", "cuda", "auto")
UTILISATION = 0.3  # share of the peak that a plan assumes; a small model reaches far less


@dataclass(frozen=True)
class Peak:
    """Peak rates of dense matrix products, TFLOP/s, without sparsity.

    bfloat16: with float32 sums; None if the GPU has no bfloat16 units. float32: without TF32; None if it is not listed.
    """

    bfloat16: float | None
    float32: float | None = None

    def rate(self, precision: str) -> float:
        """Return the rate at `float32` or `bfloat16`, TFLOP/s; a GPU without bfloat16 units computes in float32."""
        found = (self.bfloat16 or self.float32) if precision == "bfloat16" else self.float32
        assert found is not None
        return found


# by a part of the name that torch gives the device; the first row that fits counts
PEAKS: dict[str, Peak] = {
    "T4": Peak(None, 8.1),  # NVIDIA T4 data sheet
    "V100": Peak(None, 15.7),  # NVIDIA V100 data sheet
    "RTX 4090": Peak(165.2, 82.6),  # NVIDIA Ada architecture white paper, appendix A
    "RTX 3090": Peak(71.0),  # NVIDIA Ampere GA102 white paper, appendix A
    "L40S": Peak(362.0),  # NVIDIA L40S data sheet: 733 with sparsity
    "L4": Peak(121.0, 30.3),  # NVIDIA L4 data sheet: 242 with sparsity
    "A100": Peak(312.0, 19.5),  # NVIDIA A100 data sheet
    "A10": Peak(125.0),  # NVIDIA A10 data sheet
    "H100 PCIe": Peak(756.0),  # NVIDIA H100 data sheet: 1,513 with sparsity
    "H100": Peak(989.0, 67.0),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    "H200": Peak(989.0, 67.0),  # NVIDIA H200 data sheet: 1,979 with sparsity
}


def peak_tflops(device: str) -> float | None:
    """Return the bfloat16 peak of a device by the name that torch gives it, TFLOP/s; None if it is not known."""
    return next((peak.bfloat16 for part, peak in PEAKS.items() if part in device), None)


def utilisation(flops_per_token: int, tokens_per_second: float, device: str) -> float | None:
    """Return the model FLOPs utilisation: the FLOPs that the model needs, over the device's bfloat16 peak.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B. None if the device's peak is not known.
    """
    peak = peak_tflops(device)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * 1e12)


# --- cores -----------------------------------------------------------------------------------------------------------

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores() -> float:
    """Return the number of cores that this process may use: its CPU affinity and the quotas of its control groups.

    A container with half a core has 0.5.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(cores), *_quotas("cpu", _cores_of)])


def process_limit() -> int | None:
    """Return the number of processes and threads that the control groups still allow, or None without a limit."""
    return min(_quotas("pids", _processes_of), default=None)


def _quotas(controller: str, read: Callable[[Path], T | None]) -> Iterator[T]:
    """Yield the limits of this process's control groups and of all groups around them, versions 1 and 2.

    In a container the groups' paths may be those of the host. Then the mount itself is the container's group.
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        mounts = [CGROUPS / names, CGROUPS / controller] if names else [CGROUPS, CGROUPS / "unified"]
        for mount in mounts:
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount) and (limit := read(folder)) is not None:
                    yield limit


def _cores_of(folder: Path) -> float | None:
    """Return the CPU quota of a control group in cores, or None if it has none."""
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    elif (folder / "cpu.cfs_quota_us").is_file():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
    else:
        return None
    return None if quota.strip() in ("max", "-1") else int(quota) / int(period)


def _processes_of(folder: Path) -> int | None:
    """Return the number of processes and threads that a control group still allows, or None if it has no limit."""
    try:
        most, now = ((folder / f"pids.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
    except OSError:
        return None
    return None if most == "max" else int(most) - int(now)
