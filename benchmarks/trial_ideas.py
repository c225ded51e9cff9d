"""Ideas for a faster training step, each compared with the engine, including the ones that failed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import interleave, ratios
from torch import Tensor
from torch.nn import functional as F
from variants import engine, make_trial

from pagating.model import fused_loss

ROUNDS = 9  # fewest rounds per idea: with fewer, a shuffled order is not balanced
ALLOCATORS = {
    "glibc keeps what it freed": {
        "MALLOC_TRIM_THRESHOLD_": "1073741824",
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TOP_PAD_": "67108864",
    },
    "glibc with huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
ALLOCATORS["both"] = {name: value for settings in list(ALLOCATORS.values()) for name, value in settings.items()}


def whole(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Return the loss from all logits at once."""
    return F.cross_entropy(F.linear(x_NC, weight_VC).float(), targets_N)


def _math(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return F.softmax(scores.masked_fill(later, -torch.inf), dim=-1) @ v


class _Foreach(torch.optim.AdamW):
    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, **{**settings, "fused": False, "foreach": True})


def ideas(folder: Path, seconds: float, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure the speed of the engine with one change relative to the engine itself; above 1 is an improvement."""

    def chunk(size: int) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: mock.patch.object(fused_loss, "CHUNK", size)

    trial = make_trial(folder, shape)
    beside = mock.patch.object(fused_loss, "_softmax_", lambda logits: torch.softmax(logits, -1))
    more = mock.patch.object(fused_loss, "LEAST_ROWS", 96)
    attend_math = mock.patch("pagating.model.gpt2.attend", _math)
    with mock.patch("torch.optim.AdamW", _Foreach):
        foreach = engine(trial)
        foreach()
    variants = {
        "as it is": engine(trial),
        "logits whole, F.cross_entropy": engine(trial, lambda: mock.patch("pagating.tasks.causal.linear_nll", whole)),
        "logits in chunks a quarter as large": engine(trial, chunk(fused_loss.CHUNK // 4)),
        "logits in chunks four times as large": engine(trial, chunk(fused_loss.CHUNK * 4)),
        "attention as three products": engine(trial, lambda: attend_math),
        "AdamW foreach, not fused": foreach,
        "GELU composed of single operations": engine(make_trial(folder, shape, model={"activation": "gelu_new"})),
        "dropout 0.1": engine(make_trial(folder, shape, model={"dropout": 0.1})),
        "twice the tokens a step": engine(dataclasses.replace(trial, batch_tokens=2048)),
        "softmax beside the logits, not in their place": engine(trial, lambda: beside),
        "logits of at least 96 tokens at a time, not 64": engine(trial, lambda: more),
        "denormals flushed": engine(trial, _Flushed),
        "torch.compile of the body": engine(dataclasses.replace(trial, compile="always")),
    }
    found = ratios(interleave(variants, seconds, least=ROUNDS), "as it is")
    return [{**shape, "idea": name, "ratio": ratio, "order": "shuffled"} for name, ratio in found.items()]


def allocators(folder: Path, seconds: float, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure the same for settings of a new process: environment variables of the C library's allocator."""

    def fresh(environment: dict[str, str]) -> Callable[[], float]:
        arguments = [sys.executable, __file__, str(folder), json.dumps(shape)]
        settings = {**os.environ, **environment}

        def run() -> float:
            done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=settings)
            return float(done.stdout)

        return run

    variants = {"as it is": fresh({}), **{name: fresh(settings) for name, settings in ALLOCATORS.items()}}
    found = ratios(interleave(variants, seconds), "as it is")
    rows = [{**shape, "idea": name, "ratio": ratio, "order": "shuffled"} for name, ratio in found.items()]
    return [row for row in rows if row["idea"] != "as it is"]


def retaken(old: list[dict[str, Any]], new: list[dict[str, Any]], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Replace rows of `old` by the `new` ones of the same kind, which carry their own date and load."""
    taken = {name: where[name] for name in ("date", "load")}
    fresh = {_name(row): {**row, **taken} for row in new}
    kept = [fresh.pop(_name(row), row) for row in old]
    return [*kept, *fresh.values()]


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("d_model", "n_ctx", "vocab_size", "precision", "idea"))


class _Flushed:
    def __enter__(self) -> None:
        torch.set_flush_denormal(True)

    def __exit__(self, *failure: object) -> None:
        torch.set_flush_denormal(False)


def main() -> None:
    """Print the seconds per token of some steps, in a process of `allocators`."""
    torch.set_num_threads(1)
    run = engine(make_trial(Path(sys.argv[1]), json.loads(sys.argv[2])))
    run()
    print(min(run() for _ in range(4)))


if __name__ == "__main__":
    main()
