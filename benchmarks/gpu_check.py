"""Measure one GPU with this project: packed trials against trials in turn, and GPT-2 small through the training loop.

    python benchmarks/gpu_check.py --limit 150 [--peak 989] [--parts pack,turn,...] [--output FILE] [--tiny]

Prints one line of JSON per measurement as soon as it is made; the first one names the card. A part that does not fit
into memory, or takes longer than its limit, says so, and the next one begins. Needs torch, numpy and safetensors only.

| part | what |
| --- | --- |
| turn | one trial of the pack's shape, and one of 4 layers x 128 with 1,024 tokens per step |
| pack | a packed step of K trials of 3 layers x 128, 8,192 tokens per step and trial, bfloat16 and float32 |
| goal | K packed trials of 4 layers x 128, 1,024 tokens per step, vocabulary 4,096 |
| wait | source lines at which the host waits for the GPU during packed steps |
| small | GPT-2 small of 124 million parameters, windows of 1,024 tokens, bfloat16, uncompiled |
| compiled | the same pack and GPT-2 small, compiled; each in a process of its own that is ended after its limit |

`ms` is the time of a step, `utilisation` the FLOPs that the models need over the peak of dense bfloat16 products.
`--tiny` takes sizes for a test on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from pagating.data.corpus import meta_digest
from pagating.device import out_of_memory, resolve_device
from pagating.hardware import peak_tflops
from pagating.model.gpt2 import training_flops_per_token
from pagating.packed.loop import Pack
from pagating.train import build_model, heartbeats
from pagating.trial import Trial

PER_LAYER = {"learnable": {"init": 0.5, "per": "layer", "range": "free"}}
ARMS: list[dict[str, Any] | None] = [  # the arms of one pack of the showcase, all but the gated linear unit
    None,
    {"unit": "relu2"},
    {"unit": "leaky_relu2"},
    {"unit": "xielu"},
    {"alpha": 0.5},
    {"alpha": 0.73},
    {"alpha": PER_LAYER},
    {"alpha": 0.0},
]
PART_SECONDS = 40.0
COMPILED_SECONDS = 75.0  # most of it is the compiler
PARTS = ("turn", "pack", "goal", "wait", "small", "compiled")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements. `seconds` is the time of one measurement after its warm-up."""

    rung: dict[str, int]
    rung_batch: int
    counts: tuple[int, ...]
    goal: dict[str, int]
    goal_batch: int
    small: dict[str, int]
    small_batches: tuple[int, ...]
    vocabulary: int
    small_vocabulary: int
    seconds: float


REAL = Sizes(
    rung={"n_layer": 3, "d_model": 128, "n_head": 2, "n_ctx": 128},
    rung_batch=8192,
    counts=(16, 32, 64, 96),
    goal={"n_layer": 4, "d_model": 128, "n_head": 2, "n_ctx": 128},
    goal_batch=1024,
    small={"n_layer": 12, "d_model": 768, "n_head": 12, "n_ctx": 1024},
    small_batches=(16_384, 32_768),
    vocabulary=1024,
    small_vocabulary=50_257,
    seconds=2.0,
)
TINY = Sizes(
    rung={"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16},
    rung_batch=64,
    counts=(2, 3),
    goal={"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16},
    goal_batch=32,
    small={"n_layer": 2, "d_model": 32, "n_head": 2, "n_ctx": 32},
    small_batches=(128,),
    vocabulary=64,
    small_vocabulary=300,
    seconds=0.05,
)


def corpus_of(folder: Path, vocabulary: int, tokens: int) -> str:
    """Write a corpus of random tokens, which cost a trial as much as text."""
    path = folder / f"random-{vocabulary}"
    path.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        draw.integers(0, vocabulary, tokens).astype(np.uint16).tofile(path / f"{split}.bin")
    (path / "tokenizer.json").write_text("{}")
    splits = {split: {"tokens": tokens, "bytes": 4 * tokens} for split in ("train", "validation", "test")}
    meta = {"dtype": "uint16", "vocab_size": vocabulary, "splits": splits}
    (path / "corpus.json").write_text(json.dumps({**meta, "digest": meta_digest(meta)}))
    return str(path)


class Check:
    """The measurements on one device, and their lines."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.sizes = given, TINY if given.tiny else REAL
        self.device = resolve_device(given.device)
        self.card = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.peak = given.peak or peak_tflops(self.card)
        tokens = 1 << 12 if given.tiny else 1 << 20
        self.corpora = {v: corpus_of(folder, v, tokens) for v in {self.sizes.vocabulary, self.sizes.small_vocabulary}}

    def trial(self, model: dict[str, int], batch: int, vocabulary: int, **changed: Any) -> Trial:
        """Return a trial that is never evaluated while it is measured."""
        shared = {"corpus": self.corpora[vocabulary], "model": model, "batch_tokens": batch, "tokens": batch * 100_000}
        settings: dict[str, Any] = {"lr": 3e-4, "seed": 1, "compile": "never", "eval_windows": 1, **shared}
        return Trial(**{**settings, "device": self.device.type, "precision": "bfloat16", **changed})

    def trials(self, count: int, **changed: Any) -> list[Trial]:
        """Return `count` trials of the top rung: the arms in turn, each with seed, rate and decay of its own."""
        sizes = self.sizes
        own = [
            {"unit": ARMS[i % len(ARMS)], "seed": i // len(ARMS), "weight_decay": 0.1 + i / 1e3} for i in range(count)
        ]
        return [
            self.trial(sizes.rung, sizes.rung_batch, sizes.vocabulary, lr=1e-3 * (1 + i / 100), **each, **changed)
            for i, each in enumerate(own)
        ]

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, step: Callable[[], Any], warm: int = 3) -> float:
        """Return the seconds of one step: the mean over about `Sizes.seconds`, after a warm-up."""
        for _ in range(warm):
            step()
        self.sync()
        begun = time.perf_counter()
        step()
        self.sync()
        steps = max(2, min(500, int(self.sizes.seconds / (time.perf_counter() - begun))))
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        self.sync()
        return (time.perf_counter() - begun) / steps

    def line(self, part: str, seconds: float, tokens: int, flops_per_token: float, **more: Any) -> dict[str, Any]:
        """Return a measurement: the time of a step of so many tokens, of all trials together."""
        found = {"part": part, **more, "ms": round(1e3 * seconds, 3), "tokens_per_second": round(tokens / seconds)}
        if self.peak:
            found["utilisation"] = round(flops_per_token * tokens / seconds / self.peak / 1e12, 4)
        if self.device.type == "cuda":
            found["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / (1 << 20))
        return found

    def pack(self, part: str, trials: list[Trial], **more: Any) -> dict[str, Any]:
        """Measure the packed step of some trials."""
        begun, done = time.perf_counter(), 0
        pack = Pack(trials)
        self.sync()
        built = time.perf_counter() - begun

        def step() -> None:
            nonlocal done
            pack.step(done)
            pack.unseen.clear()
            done += 1

        seconds = self.timed(step)
        flops = sum(size["flops_per_token"] for size in pack.sizes) / len(trials)
        tokens = len(trials) * trials[0].batch_tokens
        more |= {"trials": len(trials), "precision": trials[0].precision, "build_s": round(built, 2)}
        return self.line(part, seconds, tokens, flops, **more)

    def loop(self, part: str, trial: Trial, **more: Any) -> dict[str, Any]:
        """Measure a step of the training loop of one trial."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        flops = training_flops_per_token(build_model(trial))
        begun = time.perf_counter()
        run = (step for step in heartbeats(trial) if step)
        next(run)
        self.sync()
        more |= {"precision": trial.precision, "first_step_s": round(time.perf_counter() - begun, 2)}
        found = self.line(part, self.timed(lambda: next(run)), trial.batch_tokens, flops, **more)
        run.close()
        return found

    def waits(self) -> dict[str, Any]:
        """List the source lines at which the host waits for a GPU in steps of a pack."""
        pack = Pack(self.trials(len(ARMS)))
        pack.step(0)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pack.step(1)
                pack.step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchron" in str(each.message)]
        return {"part": "wait", "lines": sorted(set(places)), "waits": len(places)}

    def measurements(self, part: str) -> Iterator[Callable[[], dict[str, Any]]]:
        """Yield the measurements of a part."""
        sizes, small = self.sizes, self.sizes.small_vocabulary
        goal = [
            self.trial(sizes.goal, sizes.goal_batch, sizes.vocabulary, unit={"alpha": (i + 1) / 65}, seed=i)
            for i in range(2 if self.given.tiny else 64)
        ]
        if part == "turn":
            yield lambda: self.loop(part, self.trials(1)[0], what="top rung")
            yield lambda: self.loop(part, goal[0], what="4 x 128")
        elif part == "pack":
            for count in sizes.counts:
                yield lambda count=count: self.pack(part, self.trials(count))
            for count in sizes.counts[1:3]:
                yield lambda count=count: self.pack(part, self.trials(count, precision="float32"))
        elif part == "goal":
            for count in (len(goal) // 4 or 1, len(goal)):
                yield lambda count=count: self.pack(part, goal[:count])
        elif part == "wait" and self.device.type == "cuda":
            yield self.waits
        elif part == "small":
            for batch in sizes.small_batches:
                yield lambda batch=batch: self.loop(part, self.trial(sizes.small, batch, small), batch=batch)
        elif part == "compiled:pack":
            count = sizes.counts[-2]
            yield lambda: self.pack("compiled", self.trials(count, compile="always"), what="pack")
        elif part == "compiled:small":
            batch = sizes.small_batches[-1]
            trial = self.trial(sizes.small, batch, small, compile="always")
            yield lambda: self.loop("compiled", trial, what="GPT-2 small", batch=batch)


def measured(make: Callable[[], dict[str, Any]], part: str) -> dict[str, Any]:
    """Make one measurement; return a line that says so if it does not fit into memory."""
    full = None
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
    return {"part": part, "problem": full}


def in_process(part: str, words: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Run a part in a process of its own; yield its lines, or one that says that it was ended."""
    command = [sys.executable, __file__, *words, "--parts", part]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        yield {"part": part, "problem": f"ended after {seconds:.0f} s"}
        return
    yield from (json.loads(line) for line in done.stdout.splitlines()[1:])
    if done.returncode:
        yield {"part": part, "problem": f"exit code {done.returncode}"}


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print each measurement as it is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=150.0, metavar="SECONDS", help="begin nothing after this time")
    parser.add_argument(
        "--peak", type=float, metavar="TFLOPS", help="dense bfloat16 peak; default: that of a known card"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the lines to this file too")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    begun = time.perf_counter()
    words = [word for key in ("peak", "device") if (value := getattr(given, key)) for word in (f"--{key}", str(value))]
    words += ["--tiny"] if given.tiny else []

    def say(line: dict[str, Any]) -> None:
        text = json.dumps({"at": round(time.perf_counter() - begun, 1), **line})
        print(text, flush=True)
        if given.output:
            with given.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        check = Check(given, Path(scratch))
        say({"card": check.card, "peak_tflops": check.peak, "torch": torch.__version__, "cuda": torch.version.cuda})
        for part in given.parts.split(","):
            if part == "compiled":
                gc.collect()
                if check.device.type == "cuda":
                    torch.cuda.empty_cache()
                for one in ("compiled:pack", "compiled:small"):
                    left = given.limit - (time.perf_counter() - begun)
                    if left > PART_SECONDS / 2:
                        for line in in_process(one, words, min(left, COMPILED_SECONDS)):
                            say(line)
                continue
            part_begun = time.perf_counter()
            for make in check.measurements(part):
                now = time.perf_counter()
                if now - begun > given.limit or now - part_begun > PART_SECONDS:
                    say({"part": part, "problem": "the time is up"})
                    break
                say(measured(make, part))
                gc.collect()
                if check.device.type == "cuda":
                    torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
