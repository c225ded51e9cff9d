"""The metrics of a whole trial: what its last row, its model, its device and its process say."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pagating.corpus import read_meta
from pagating.device import utilisation
from pagating.evaluate import bits_per_byte, perplexity
from pagating.gpt2_plain import GPT2, training_flops_per_token
from pagating.trial import Trial


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: `getrusage` would count what the parent held when it started this process
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def model_size(model: GPT2) -> dict[str, Any]:
    """The metrics of a trial that follow from its model alone."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, "flops_per_token": training_flops_per_token(model)}


def device_metrics(device: torch.device, final: Mapping[str, Any]) -> dict[str, Any]:
    """What only a GPU has: its peak memory, and the share of its peak speed, where that is known."""
    if device.type != "cuda":
        return {}
    share = utilisation(final["flops_per_token"], final["tokens_per_second"], torch.cuda.get_device_name(device))
    memory = {"peak_gpu_mb": torch.cuda.max_memory_allocated(device) / (1 << 20)}
    return memory if share is None else memory | {"flops_utilisation": share}


def final_metrics(trial: Trial, row: Mapping[str, Any], alphas: list[float]) -> dict[str, Any]:
    """The metrics of a trial that follow from its last row and its alphas, one a layer (empty: stock)."""
    counts = read_meta(trial.corpus)["splits"]["validation"]
    return {
        "val_nll": row["val_nll"],
        "val_ppl": perplexity(row["val_nll"]),
        "val_bpb": bits_per_byte(row["val_nll"], counts["tokens"], counts["bytes"]),
        "train_nll": row["train_nll"],
        "alpha": sum(alphas) / len(alphas) if alphas else 0.0,  # the stock activation is the gate switched off
        "tokens": row["tokens"],
        "steps": trial.steps,
        "tokens_per_second": row["tokens_per_second"],
    }
