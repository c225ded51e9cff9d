"""Cost of a trial: tokens per second against Hugging Face's Trainer, by arm and by idea; memory and start.

    python benchmarks/trial_speed.py [--quick] [--output DIR] [--json FILE]
    python benchmarks/trial_speed.py --only ideas|speed --shape VOCABULARY   # measure one table again
    python benchmarks/trial_speed.py --only memory

It uses one core. The variants of a table run interleaved, so that other load on the machine slows them alike. A ratio
is computed round by round, and shown as median (quartiles). The Trainer needs `accelerate` (the extra `bench`); without
it the reference is the plain loop. Without --quick, the results go to `performance.md` and `performance.json` of DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import performance
import performance_trial
import torch
import trial_ideas
import trial_precision
from common import gemm, interleave, machine, ratios, spread
from goals import NANO, TRAINER, TRAINER_COMPILED
from variants import Variant, apart, engine, hf_trainer, make_trial, nano_loop, plain_loop, worker

from pagating.train import Trial, train
from tune.backend.cluster import ALLOCATOR

BASE = {"d_model": 128, "n_ctx": 128, "vocab_size": 4096, "precision": "float32"}
SHAPES = [
    BASE,
    {**BASE, "d_model": 64},
    {**BASE, "d_model": 256},
    {**BASE, "n_ctx": 512},
    {**BASE, "vocab_size": 50257},
    {**BASE, "precision": "bfloat16"},
]
TRIED = (BASE, SHAPES[2], SHAPES[4])  # the smallest gains were at a width of 256 and a large vocabulary
MEMORY_PROCESSES = 7
IDEA_SECONDS = 25  # per shape, or the time of `trial_ideas.ROUNDS`: four minutes at the large vocabulary
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
    """Measure tokens per second by shape and engine, the ratio to the Trainer (or plain loop), the GEMM ceiling."""
    result = []
    for shape in shapes:
        trial = make_trial(folder, shape)
        variants: dict[str, Variant] = {}
        if importlib.util.find_spec("accelerate"):
            variants[TRAINER] = hf_trainer(trial)
            if compiled:
                variants[TRAINER_COMPILED] = apart("compiled Trainer", trial)
        variants["plain loop, HF model"] = plain_loop(trial)
        variants[NANO] = nano_loop(trial)
        variants["this engine"] = worker(trial)
        if compiled:
            variants["this engine, compiled"] = worker(dataclasses.replace(trial, compile="always"))
        reference = next(iter(variants))
        times = interleave({**variants, "gemm": gemm(getattr(torch, shape["precision"]))}, seconds)
        final_flops = flops_per_token(trial)
        ceiling = [1 / (t * final_flops) for t in times["gemm"]]
        for name in variants:
            of_ceiling = [1 / (t * c) for t, c in zip(times[name], ceiling, strict=True)]
            rate = spread([1 / t for t in times[name]])
            row = {**shape, "variant": name, "tokens_per_second": rate, "reference": reference}
            result.append({**row, "ratio": ratios(times, reference)[name], "of_gemm": spread(of_ceiling)})
            print(performance_trial.step(performance.plain(result[-1])), flush=True)
    return result


def flops_per_token(trial: Trial) -> int:
    """Return the training FLOPs per token as the package computes them."""
    from pagating.model.gpt2 import training_flops_per_token
    from pagating.train import build_model

    return training_flops_per_token(build_model(trial))


def arms(folder: Path, seconds: float, names: list[str], compile: str) -> list[dict[str, Any]]:
    """Measure the speed of each arm relative to GELU."""
    variants = {name: engine(make_trial(folder, BASE, unit=ARMS[name], compile=compile)) for name in names}
    found = ratios(interleave(variants, seconds), "gelu")
    return [{"arm": name, "path": compile, "ratio": found[name]} for name in names]


# --- memory and start ------------------------------------------------------------------------------------------------


def resident_mb() -> float:
    """Return the resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def memory_probe(folder: Path, kind: str) -> dict[str, float]:
    """Measure in its own process: many trials (`trials`), else the peak of a step at a vocabulary of 50,257."""
    if kind == "trials":
        trial = make_trial(folder, {**BASE, "vocab_size": 512}, tokens=1024 * 4, model={"n_layer": 2, "d_model": 64})
        marks = {}
        for done in range(1, 201):
            units = [None, {"alpha": done / 200}, {"alpha": LEARN}, {"alpha": 0.0}]
            list(train(dataclasses.replace(trial, seed=done, unit=units[done % 4], lr=1e-4 * done)))
            if done in (20, 100, 200):
                marks[f"after {done} trials"] = resident_mb()
        return marks
    list(train(make_trial(folder, {**BASE, "vocab_size": 512}, tokens=1024 * 2)))  # what torch itself keeps
    trial = make_trial(folder, {**BASE, "vocab_size": 50257}, tokens=1024 * 2)
    before = resident_mb()
    with mock.patch("pagating.tasks.causal.linear_nll", trial_ideas.whole) if kind == "whole" else nullcontext():
        *_, row = train(trial)
    held = row["final"]["parameters"] * 16 / (1 << 20)  # weights, gradients and two moments in float32
    return {"model and optimiser": held, "peak of a step": row["final"]["peak_rss_mb"] - before}


def memory() -> dict[str, dict[str, float]]:
    """Return the memory of new processes, as medians because the allocator varies by some MiB."""
    kinds = {
        "200 trials in one process": ("trials", 3),
        "V 50,257, logits in chunks": ("chunks", MEMORY_PROCESSES),
        "V 50,257, logits whole": ("whole", MEMORY_PROCESSES),
    }
    found = {name: [in_process("--probe", kind) for _ in range(times)] for name, (kind, times) in kinds.items()}
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def compile_seconds(folder: Path) -> float:
    """Return the seconds to the first row of a compiled trial, minus those of a second one in the same process."""
    taken = []
    for seed in (0, 1):
        start = time.perf_counter()
        next(train(make_trial(folder, BASE, unit={"alpha": 0.5}, seed=seed, compile="always")))
        taken.append(time.perf_counter() - start)
    return taken[0] - taken[1]


def cold_and_warm(folder: Path) -> dict[str, float]:
    """Return the seconds to compile a shape without and with a filled cache, each in a new process."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    return {name: in_process("--probe", "compile", **cache)["seconds"] for name in ("cold", "warm")}


def in_process(*arguments: str, **environment: str) -> dict[str, float]:
    """Return the output of a new process of this file."""
    command, env = [sys.executable, __file__, *arguments], {**os.environ, **environment}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def start_seconds(module: str, rounds: int = 3) -> list[float]:
    """Return the seconds from a new process to an imported module, minus those of an empty process."""
    result = []
    for _ in range(rounds):
        taken = []
        for code in ("pass", f"import {module}"):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken.append(time.perf_counter() - start)
        result.append(taken[1] - taken[0])
    return result


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """Measure every table; quick: the first shape, two arms, nothing compiled."""
    found: dict[str, Any] = {"machine": machine(), "order": "shuffled", "worker": ALLOCATOR}
    found["speed"] = speed(folder, 5 if quick else 10, SHAPES[:1] if quick else SHAPES, compiled=not quick)
    found["arms"] = arms(folder, 5, ["gelu", "paGLU, learnable"], "never") if quick else []
    found["ideas"], found["memory"], found["compile"] = [], {}, {}
    found["precision"] = trial_precision.agreement(
        folder, 2 if quick else 6, 20 if quick else 100, {name: ARMS[name] for name in ("gelu", "linear floor")}
    )
    if not quick:
        found["compile"] = cold_and_warm(folder)
        found["arms"] = [*arms(folder, 40, list(ARMS), "never"), *arms(folder, 12, list(COMPILED_ARMS), "always")]
        found["ideas"] = [row for shape in TRIED for row in trial_ideas.ideas(folder, IDEA_SECONDS, shape)]
        found["ideas"] += [row for shape in TRIED for row in trial_ideas.allocators(folder, 60, shape)]
        found["memory"] = memory()
    modules = ("torch", "pagating.train", "transformers.models.gpt2.modeling_gpt2")
    found["start"] = {module: spread(start_seconds(module)) for module in modules}
    return found


def ideas_again(folder: Path, output: Path, vocab_size: int) -> None:
    """Measure the rows of one vocabulary of "What was tried" again, replace the old ones, and write the page.

    Raises ValueError for a vocabulary that the table does not have.
    """
    shapes = [shape for shape in TRIED if shape["vocab_size"] == vocab_size]
    if not shapes:
        raise ValueError(f"--shape {vocab_size}: the table has {sorted({str(s['vocab_size']) for s in TRIED})}")
    kept = json.loads((output / "performance.json").read_text(encoding="utf-8"))["trial"]
    where = machine()
    new = [row for shape in shapes for row in trial_ideas.ideas(folder, IDEA_SECONDS, shape)]
    rows = trial_ideas.retaken(kept["ideas"], performance.plain(new), where)
    performance.keep(output, "trial", {**kept, "ideas": rows})


def taken_again(folder: Path, output: Path, part: str, vocab_size: int) -> None:
    """Measure the memory, or the steps of one vocabulary, again, and write the page with the rest unchanged."""
    kept = json.loads((output / "performance.json").read_text(encoding="utf-8"))["trial"]
    if part == "memory":
        kept["memory"] = memory()
    else:
        shapes = [shape for shape in SHAPES if shape["vocab_size"] == vocab_size]
        new = performance.plain(speed(folder, 30, shapes, compiled=True))
        kept["speed"] = [row for row in kept["speed"] if row["vocab_size"] != vocab_size] + new
    performance.keep(output, "trial", performance.plain(kept))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the document, and write it with the numbers unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute; nothing is written")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of performance.md and .json")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--only", choices=("ideas", "memory", "speed"), help="measure one part again")
    parser.add_argument("--shape", type=int, default=50257, help="with --only ideas or speed: the vocabulary")
    parser.add_argument("--probe", choices=("trials", "chunks", "whole", "compile"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.probe == "compile":
            print(json.dumps({"seconds": compile_seconds(Path(scratch))}))
            return 0
        if options.probe:
            print(json.dumps(memory_probe(Path(scratch), options.probe)))
            return 0
        if options.only:
            if options.only == "ideas":
                ideas_again(Path(scratch), options.output, options.shape)
            else:
                taken_again(Path(scratch), options.output, options.only, options.shape)
            return 0
        found = measure(Path(scratch), options.quick)
    numbers = performance.plain(found)
    print("\n" + performance.page({"trial": numbers}))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    if not options.quick:
        performance.keep(options.output, "trial", numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
