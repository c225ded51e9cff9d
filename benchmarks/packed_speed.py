"""Speed of a pack of trials against the same trials one after the other, by device and number of trials.

    python benchmarks/packed_speed.py [--quick] [--device auto|cpu|cuda] [--precision float32] [--output DIR]

The model is GPT-2 of 4 layers x 128, with windows of 128 tokens, vocabulary 4,096, and 1,024 tokens per step and trial;
paGLU, each trial with another alpha. Packed and sequential runs are interleaved. The ratio is computed round by round:
tokens per second of all trials of a pack over those of one trial at a time. `--compile` compiles both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import performance
import torch
from common import interleave, machine, ratios, spread
from variants import Variant, engine, make_trial

from pagating.device import resolve_device
from pagating.packed.loop import Pack
from pagating.train import Trial

SHAPE = {"d_model": 128, "n_ctx": 128, "vocab_size": 4096}


def together(trials: list[Trial], steps: int) -> Variant:
    """Make the variant of the packed loop: seconds per token of the next steps of all trials."""
    pack, done = Pack(trials), 0

    def run() -> float:
        nonlocal done
        start = time.perf_counter()
        for _ in range(steps):
            pack.step(done)
            done += 1
        pack.take_losses()  # waits for a GPU
        return (time.perf_counter() - start) / (steps * len(trials) * trials[0].batch_tokens)

    return run


def measure(folder: Path, counts: list[int], seconds: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each number of trials: tokens per second packed and sequentially, and their ratio."""
    device = resolve_device(options.device).type
    steps = 2 if device == "cpu" else 50  # steps per round, enough that waiting for a GPU is rare
    shared = {"device": device, "compile": "always" if options.compile else "never", "eval_every": steps}
    shape, rows = {**SHAPE, "precision": options.precision}, []
    for count in counts:
        units = [{"alpha": (i + 1) / (count + 1)} for i in range(count)]
        trials = [make_trial(folder, shape, unit=unit, seed=i, **shared) for i, unit in enumerate(units)]
        times = interleave({"in turn": engine(trials[0]), "packed": together(trials, steps)}, seconds)
        rate = {name: spread([1 / t for t in values]) for name, values in times.items()}
        rows.append({"trials": count, "device": device, **rate, "ratio": ratios(times, "in turn")["packed"]})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    alone, packed = (f"{row[name].median:,.0f}" for name in ("in turn", "packed"))
    return f"| {row['trials']} | {row['device']} | {alone} | {packed} | {row['ratio']} |"


def main(arguments: list[str] | None = None) -> int:
    """Measure each number of trials, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only packs of 2, in some seconds")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, help="folder in which performance.md and .json are updated")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts = [2] if options.quick else [2, 4, 8, 16, 32] if resolve_device(options.device).type == "cuda" else [2, 4, 8]
    print("| trials | device | tokens/s in turn | tokens/s packed | ratio |\n| --- | --- | --- | --- | --- |")
    where = machine()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch), counts, 3 if options.quick else 30, options)
    if options.output:
        performance.keep(options.output, "packed", {"machine": where, "order": "shuffled", "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
