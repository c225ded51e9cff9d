"""The metrics of a whole trial, from its last row, its model, its device and its process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pagating.data.corpus import read_meta
from pagating.evaluate import bits_per_byte, perplexity
from pagating.hardware import utilisation
from pagating.trial import Trial


def peak_rss_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `getrusage` would include the parent's memory at the start of this process
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def model_size(model: nn.Module, flops_per_token: int) -> dict[str, Any]:
    """Return the metrics of a trial that depend only on its model."""
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops_per_token": flops_per_token}


def device_metrics(device: torch.device, final: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a GPU: peak memory in MiB, and utilisation if the peak speed is known. A CPU has none."""
    if device.type != "cuda":
        return {}
    share = utilisation(final["flops_per_token"], final["tokens_per_second"], torch.cuda.get_device_name(device))
    memory = {"peak_gpu_mb": torch.cuda.max_memory_allocated(device) / (1 << 20)}
    return memory if share is None else memory | {"flops_utilisation": share}


def final_metrics(trial: Trial, row: Mapping[str, Any], alphas: list[float]) -> dict[str, Any]:
    """Return the metrics of a trial that depend on its last row and its alphas, one per layer (empty if stock)."""
    counts = read_meta(trial.corpus)["splits"]["validation"]
    bytewise = {"val_bpb": bits_per_byte(row["val_nll"], counts["tokens"], counts["bytes"])}
    return {
        "val_nll": row["val_nll"],
        "val_ppl": perplexity(row["val_nll"]),
        **(bytewise if trial.task == "causal" else {}),  # other tasks predict only a share of the tokens
        "train_nll": row["train_nll"],
        "alpha": sum(alphas) / len(alphas) if alphas else 0.0,  # the stock activation is a gate at 0
        "tokens": row["tokens"],
        "steps": trial.steps,
        "tokens_per_second": row["tokens_per_second"],
    }
