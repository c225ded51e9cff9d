"""What a trial costs: tokens a second against Hugging Face's Trainer, arm by arm, idea by idea; memory and start.

    python benchmarks/trial_speed.py [--quick] [--output DIR] [--json FILE]

One core. The variants of a table run interleaved, so that a busy machine slows them alike; a ratio is taken round by
round, and shown as median (quartiles). The Trainer needs `accelerate` (the extra `bench`); without it the tables
start from the plain loop. Without --quick, `performance.md` and `performance.json` are written to DIR (docs).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import gemm, interleave, machine, ratios, spread
from torch import Tensor
from torch.nn import functional as F
from variants import Variant, engine, hf_trainer, make_trial, plain_loop

from pagating import engine_loss
from pagating.train import Trial, train

BASE = {"d_model": 128, "n_ctx": 128, "vocab_size": 4096, "precision": "float32"}
SHAPES = [
    BASE,
    {**BASE, "d_model": 64},
    {**BASE, "d_model": 256},
    {**BASE, "n_ctx": 512},
    {**BASE, "vocab_size": 50257},
    {**BASE, "precision": "bfloat16"},
]
COMPILED_ARMS = ("gelu", "linear floor", "paGLU, fixed", "paGLU, learnable", "paGLU, base gelu", "paGTU")
LEARN = {"learnable": {"init": 0.5}}
ARMS: dict[str, dict[str, Any] | None] = {
    "gelu": None,
    "linear floor": {"alpha": 0.0},
    "paGLU, fixed": {"alpha": 0.5},
    "paGLU, learnable": {"alpha": LEARN},
    "paGLU, per layer": {"alpha": {"learnable": {"init": 0.5, "per": "layer", "range": "free"}}},
    "paGLU, per channel": {"alpha": {"learnable": {"init": 0.5, "per": "channel"}}},
    "paGLU, base gelu": {"alpha": 0.5, "base": "stock"},
    "paGTU": {"gate": "tanh"},
    "paReGLU": {"gate": "relu"},
    "paGELU": {"gate": "gelu"},
    "paMishU": {"gate": "mish"},
    "paSiLU": {"gate": "silu"},
    **{name: {"unit": name} for name in ("silu", "relu2", "prelu", "swish", "xsilu", "xielu", "swiglu", "geglu")},
}


def speed(folder: Path, seconds: float, shapes: list[dict[str, Any]], compiled: bool) -> list[dict[str, Any]]:
    """Tokens a second by shape and engine, with the ratio to the Trainer (or the plain loop) and the GEMM ceiling."""
    result = []
    for shape in shapes:
        trial = make_trial(folder, shape)
        variants: dict[str, Variant] = {}
        if importlib.util.find_spec("accelerate"):
            variants["HF Trainer, defaults"] = hf_trainer(trial, folder)
        variants["plain loop, HF model"] = plain_loop(trial)
        variants["this engine"] = engine(trial)
        if compiled:
            variants["this engine, compiled"] = engine(dataclasses.replace(trial, compile="always"))
        reference = next(iter(variants))
        times = interleave({**variants, "gemm": gemm(getattr(torch, shape["precision"]))}, seconds)
        final_flops = flops_per_token(trial)
        ceiling = [1 / (t * final_flops) for t in times["gemm"]]
        for name in variants:
            of_ceiling = [1 / (t * c) for t, c in zip(times[name], ceiling, strict=True)]
            rate = spread([1 / t for t in times[name]])
            row = {**shape, "variant": name, "tokens_per_second": rate, "reference": reference}
            result.append({**row, "ratio": ratios(times, reference)[name], "of_gemm": spread(of_ceiling)})
            print(_line(row | result[-1]), flush=True)
    return result


def flops_per_token(trial: Trial) -> int:
    """Training FLOPs a token, by the package's own account."""
    from pagating.gpt2_plain import training_flops_per_token
    from pagating.train import build_model

    return training_flops_per_token(build_model(trial))


def arms(folder: Path, seconds: float, names: list[str], compile: str) -> list[dict[str, Any]]:
    """Speed of each arm over that of GELU."""
    variants = {name: engine(make_trial(folder, BASE, unit=ARMS[name], compile=compile)) for name in names}
    found = ratios(interleave(variants, seconds), "gelu")
    return [{"arm": name, "path": compile, "ratio": found[name]} for name in names]


def _whole(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NC, weight_VC).float(), targets_N)


def _math(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return F.softmax(scores.masked_fill(later, -torch.inf), dim=-1) @ v


class _Foreach(torch.optim.AdamW):
    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, **{**settings, "fused": False, "foreach": True})


def ideas(folder: Path, seconds: float, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed of the engine with one thing changed over that of the engine as it is: above 1 would be worth taking."""

    def chunk(size: int) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: mock.patch.object(engine_loss, "CHUNK", size)

    trial = make_trial(folder, shape)
    attend_math = mock.patch("pagating.gpt2_plain.attend", _math)
    with mock.patch("torch.optim.AdamW", _Foreach):
        foreach = engine(trial)
        foreach()
    variants = {
        "as it is": engine(trial),
        "logits whole, F.cross_entropy": engine(trial, lambda: mock.patch("pagating.train.linear_nll", _whole)),
        "logits in chunks a quarter as large": engine(trial, chunk(engine_loss.CHUNK // 4)),
        "logits in chunks four times as large": engine(trial, chunk(engine_loss.CHUNK * 4)),
        "attention as three products": engine(trial, lambda: attend_math),
        "AdamW foreach, not fused": foreach,
        "GELU composed of single operations": engine(make_trial(folder, shape, model={"activation": "gelu_new"})),
        "dropout 0.1": engine(make_trial(folder, shape, model={"dropout": 0.1})),
        "twice the tokens a step": engine(dataclasses.replace(trial, batch_tokens=2048)),
        "denormals flushed": engine(trial, _Flushed),
        "torch.compile of the body": engine(dataclasses.replace(trial, compile="always")),
    }
    found = ratios(interleave(variants, seconds), "as it is")
    return [{**shape, "idea": name, "ratio": ratio} for name, ratio in found.items()]


class _Flushed:
    def __enter__(self) -> None:
        torch.set_flush_denormal(True)

    def __exit__(self, *failure: object) -> None:
        torch.set_flush_denormal(False)


# --- memory and start ------------------------------------------------------------------------------------------------


def resident_mb() -> float:
    """Resident memory of this process now, MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def memory_probe(folder: Path, kind: str) -> dict[str, float]:
    """Measured in a process of its own: `trials`: many trials; else the peak of a step at a vocabulary of 50,257."""
    if kind == "trials":
        trial = make_trial(folder, {**BASE, "vocab_size": 512}, tokens=1024 * 4, model={"n_layer": 2, "d_model": 64})
        marks = {}
        for done in range(1, 201):
            units = [None, {"alpha": done / 200}, {"alpha": LEARN}, {"alpha": 0.0}]
            list(train(dataclasses.replace(trial, seed=done, unit=units[done % 4], lr=1e-4 * done)))
            if done in (20, 100, 200):
                marks[f"after {done} trials"] = resident_mb()
        return marks
    list(train(make_trial(folder, {**BASE, "vocab_size": 512}, tokens=1024 * 2)))  # what torch itself loads and keeps
    trial = make_trial(folder, {**BASE, "vocab_size": 50257}, tokens=1024 * 2)
    before = resident_mb()
    with mock.patch("pagating.train.linear_nll", _whole) if kind == "whole" else nullcontext():
        *_, row = train(trial)
    held = row["final"]["parameters"] * 16 / (1 << 20)  # weights, gradients and two moments in float32
    return {"model and optimiser": held, "peak of a step": row["final"]["peak_rss_mb"] - before}


def in_process(*arguments: str) -> dict[str, float]:
    """What a fresh process of this file reports."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def start_seconds(module: str, rounds: int = 3) -> list[float]:
    """Seconds from a new process to an imported module, that of an empty process left out."""
    result = []
    for _ in range(rounds):
        taken = []
        for code in ("pass", f"import {module}"):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken.append(time.perf_counter() - start)
        result.append(taken[1] - taken[0])
    return result


# --- output ----------------------------------------------------------------------------------------------------------


def _shape(row: dict[str, Any]) -> str:
    return f"d_model {row['d_model']}, T {row['n_ctx']}, V {row['vocab_size']:,}, {row['precision']}"


def _line(row: dict[str, Any]) -> str:
    rate = f"{row['tokens_per_second'].median:,.0f}"
    return f"| {_shape(row)} | {row['variant']} | {rate} | {row['ratio']} | {row['of_gemm']} |"


def document(found: dict[str, Any]) -> str:
    """`performance.md`: every table of a run, and on what it was measured."""
    where = found["machine"]
    lines = [
        "# Performance",
        "",
        f"Written by `python benchmarks/trial_speed.py` on {where['date']}: {where['processor']}, {where['cores']} "
        f"cores (one used), {where['instructions']}, torch {where['torch']}, Python {where['python']}; load average at "
        f"the start {where['load']}. A ratio is the median (quartiles) over interleaved rounds of one run; above 1 is "
        "faster.",
        "",
        "## A training step",
        "",
        "4 layers, 1,024 tokens a step. The ratio is to the first variant of a shape; the last column is the share of "
        "what square matrix products reach in that precision, measured in the same rounds.",
        "",
        "| shape | variant | tokens/s | ratio | of GEMM |",
        "| --- | --- | --- | --- | --- |",
        *[_line(row) for row in found["speed"]],
        "",
        "## Arms against GELU",
        "",
        "| arm | path | speed over GELU's |",
        "| --- | --- | --- |",
        *[f"| {row['arm']} | {_PATH[row['path']]} | {row['ratio']} |" for row in found["arms"]],
        "",
        "## What was tried",
        "",
        "The engine with one thing changed, uncompiled unless it says so; the largest median is what would pay most.",
        "",
        "| shape | idea | speed over the engine's |",
        "| --- | --- | --- |",
        *[f"| {_shape(row)} | {row['idea']} | {row['ratio']} |" for row in found["ideas"]],
        "",
        "## Memory and start",
        "",
        *[
            f"- {name}: {', '.join(f'{k} {v:,.0f} MiB' for k, v in row.items())}"
            for name, row in found["memory"].items()
        ],
        *[f"- import {name}: {times} s" for name, times in found["start"].items()],
    ]
    return "\n".join(lines) + "\n"


_PATH = {"never": "uncompiled", "always": "compiled"}


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """Every table; quick: the first shape, two arms, nothing compiled."""
    found: dict[str, Any] = {"machine": machine()}
    found["speed"] = speed(folder, 5 if quick else 10, SHAPES[:1] if quick else SHAPES, compiled=not quick)
    found["arms"] = arms(folder, 5, ["gelu", "paGLU, learnable"], "never") if quick else []
    found["ideas"], found["memory"] = [], {}
    if not quick:
        found["arms"] = [*arms(folder, 40, list(ARMS), "never"), *arms(folder, 12, list(COMPILED_ARMS), "always")]
        found["ideas"] = [row for shape in (BASE, SHAPES[1]) for row in ideas(folder, 15, shape)]
        found["memory"] = {
            "200 trials in one process": in_process("--memory", "trials"),
            "V 50,257, logits in chunks": in_process("--memory", "chunks"),
            "V 50,257, logits whole": in_process("--memory", "whole"),
        }
    modules = ("torch", "pagating.train", "transformers.models.gpt2.modeling_gpt2")
    found["start"] = {module: spread(start_seconds(module)) for module in modules}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the document, and write it with the numbers unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute; nothing is written")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of performance.md and .json")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--memory", choices=("trials", "chunks", "whole"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.memory:
            print(json.dumps(memory_probe(Path(scratch), options.memory)))
            return 0
        found = measure(Path(scratch), options.quick)
    print("\n" + document(found))
    numbers = json.dumps(found, indent=1, default=dataclasses.asdict) + "\n"
    if options.json:
        options.json.write_text(numbers)
    if not options.quick:
        (options.output / "performance.md").write_text(document(found))
        (options.output / "performance.json").write_text(numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
