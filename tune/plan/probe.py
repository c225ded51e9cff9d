"""The calibration of a plan: trains each arm's first steps for some seconds, several processes at once.

    python -m tune.plan.probe < specification.json

is one process, as niced as Ray makes a study's workers and with what they import; `probe` starts one for each slot, so
that the slots' contention for cores, caches and memory is in the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

NICENESS = 15  # Ray's default for its workers; RAY_worker_niceness changes both
ROUGH_FLOPS = (
    2e10  # a core's speed to a factor of a few: it settles only how many steps stand between two clock readings
)

LONGEST = 10_000  # clock readings of one arm


class ProbeError(RuntimeError):
    """A calibration process ended without a figure."""


@dataclass(frozen=True)
class Speed:
    """One arm on one slot: training tokens a second, seconds of an evaluation, of making the model (first steps)."""

    tokens_per_second: float
    evaluation_seconds: float
    build_seconds: float


@dataclass(frozen=True)
class Calibration:
    """What the probes found, the mean over processes. `spread`: largest relative deviation of a process's speed.

    import_seconds: of a worker; first_seconds: what its first trial takes longer than the next; base_mb: its memory
    without a model; rows_seconds: of cutting the validation text into lines, once a confirm trial; loop_seconds:
    of a fixed piece of Python, which tells how fast this machine is at all that is no training.
    """

    speeds: dict[str, Speed]
    import_seconds: float
    first_seconds: float
    base_mb: float
    peak_mb: float
    rows_seconds: float
    loop_seconds: float
    spread: float
    processes: int


def loop_seconds(rounds: int = 200) -> float:
    """Seconds of a fixed piece of work in plain Python: a table of 1,000 numbers to JSON and back."""
    table = {str(i): i / 7 for i in range(1_000)}
    begun = time.perf_counter()
    for _ in range(rounds):
        json.loads(json.dumps(table))
    return time.perf_counter() - begun


def probe(
    trials: Mapping[str, Mapping[str, Any]], flops: Mapping[str, int], processes: int, seconds: float
) -> Calibration:
    """Train each arm's first steps for `seconds` in all, in `processes` at once, each beginning with another arm.

    `trials`: arguments of `pagating.train.Trial` by arm; `flops`: training FLOPs a token by arm. Raises ProbeError with
    the last line of what a process said when it fails.
    """
    arms = list(trials)
    loop = loop_seconds()
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="pagating-plan-") as scratch:
        environment = {**os.environ, "OMP_NUM_THREADS": str(next(iter(trials.values()))["threads"])}
        for number in range(processes):
            turned = [arms[(i + number) % len(arms)] for i in range(len(arms))]
            content = {"arms": [[arm, trials[arm], flops[arm]] for arm in turned], "seconds": seconds}
            path = Path(scratch) / f"{number}.json"
            path.write_text(json.dumps(content), encoding="utf-8")
            with path.open(encoding="utf-8") as given:
                command = [sys.executable, "-m", "tune.plan.probe"]
                running.append(
                    subprocess.Popen(
                        command,
                        stdin=given,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                        env=environment,
                    )
                )
        said = [process.communicate() for process in running]
    for process, (_, error) in zip(running, said, strict=True):
        if process.returncode:
            lines = [line for line in error.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
            raise ProbeError(f"the calibration failed: {lines[-1]}")
    return combine([json.loads(out) for out, _ in said], arms, flops, loop)


def combine(found: list[dict[str, Any]], arms: list[str], flops: Mapping[str, int], loop: float) -> Calibration:
    """One calibration of what the processes found; an arm that none had time for is scaled by FLOPs from another."""
    speeds, deviations = {}, [0.0]
    for arm in arms:
        own = [one["arms"][arm] for one in found if arm in one["arms"]]
        scale = 1.0
        if not own:
            other = next(name for name in arms if any(name in one["arms"] for one in found))
            own, scale = [one["arms"][other] for one in found if other in one["arms"]], flops[other] / flops[arm]
        rate = len(own) / sum(1 / one["tokens_per_second"] for one in own)  # slots share the cells, not the seconds
        deviations += [abs(one["tokens_per_second"] / rate - 1) for one in own]
        evaluation, build = (mean(one[name] for one in own) for name in ("evaluation_seconds", "build_seconds"))
        speeds[arm] = Speed(rate * scale, evaluation / scale, build)
    names = ("import_seconds", "first_seconds", "base_mb", "peak_mb", "rows_seconds")
    means = {name: mean(one[name] for one in found) for name in names}
    return Calibration(speeds=speeds, loop_seconds=loop, spread=max(deviations), processes=len(found), **means)


# --- inside a process ------------------------------------------------------------------------------------------------


def short(spec: Mapping[str, Any], flops: int, seconds: float) -> tuple[dict[str, Any], float]:
    """A trial with clock readings close enough for `seconds`, and how much of an evaluation each of its own is.

    A step or an evaluation that would take longer than the whole calibration is made smaller.
    """
    from pagating.data.corpus import read_meta
    from pagating.model.compile import is_compiled
    from pagating.model.gpt2 import GPT2Size, stock_flops_per_token

    size = GPT2Size(vocab_size=read_meta(spec["corpus"])["vocab_size"], **spec["model"])
    causal = spec.get("task", "causal") == "causal"
    whole = stock_flops_per_token(size) * spec["tokens"]
    affordable = seconds * ROUGH_FLOPS / flops  # tokens
    batch_tokens = min(spec["batch_tokens"], max(1, int(affordable // size.n_ctx)) * size.n_ctx)
    micro = spec.get("micro_batch_tokens")
    if micro:
        batch_tokens = batch_tokens // micro * micro or batch_tokens
    every = max(1, min(16, round(affordable / 4 / batch_tokens)))
    windows = min(spec["eval_windows"], max(1, every * batch_tokens // size.n_ctx))
    changed = {
        "batch_tokens": batch_tokens,
        "micro_batch_tokens": micro if micro and batch_tokens % micro == 0 else None,
        "tokens": LONGEST * every * batch_tokens,
        "eval_every": every,
        "eval_windows": windows,
        "test": False,
        "compile": "always" if causal and is_compiled(spec.get("compile", "auto"), whole, size.dropout) else "never",
    }
    return {**spec, **changed}, spec["eval_windows"] / windows


def first_steps(spec: Mapping[str, Any], flops: int, seconds: float) -> dict[str, float]:
    """Speed of one arm from its first steps, about `seconds` of them; the first interval warms up and is left out."""
    from pagating.train import Trial, train

    trial, share = short(spec, flops, seconds)
    begun = time.perf_counter()
    trained, clock, evaluations = [], [], []
    for row in train(Trial(**trial)):
        trained.append(row["tokens"] / row["tokens_per_second"])  # seconds of training so far
        clock.append(time.perf_counter())
        if len(clock) > 1:
            evaluations.append(clock[-1] - clock[-2] - (trained[-1] - trained[-2]))
            if clock[-1] - clock[0] >= seconds:
                break
    # medians: a burst of other work is not this machine's speed
    step = median(after - before for before, after in pairwise(trained)) / trial["eval_every"]
    evaluation = max(0.0, median(evaluations))
    return {
        "tokens_per_second": trial["batch_tokens"] / step,
        "evaluation_seconds": evaluation * share,
        "build_seconds": max(0.0, clock[0] - begun - evaluation - trial["eval_every"] * step),
    }


def tiny_trial(spec: Mapping[str, Any]) -> float:
    """Seconds of a trial of one step of hardly any model: what a process loads and does for the first time."""
    from pagating.train import Trial, train

    n_ctx = spec["model"]["n_ctx"]
    model = {**spec["model"], "n_layer": 1, "d_model": 8, "n_head": 1}
    changed = {"batch_tokens": n_ctx, "tokens": n_ctx, "eval_windows": 1, "unit": None, "test": False}
    begun = time.perf_counter()
    for _ in train(Trial(**{**spec, **changed, "model": model, "compile": "never"})):
        pass
    return time.perf_counter() - begun


def main() -> int:
    """Run the specification on standard input, print what was found as JSON."""
    given = json.load(sys.stdin)
    wanted = int(os.environ.get("RAY_worker_niceness", NICENESS))  # noqa: SIM112 (Ray's own spelling)
    os.nice(max(0, wanted - os.nice(0)))
    begun = time.perf_counter()
    import tune.backend.ray_trial  # noqa: F401 (what a worker imports)
    from pagating.evaluate import text_rows
    from pagating.train import peak_rss_mb

    imported = time.perf_counter() - begun
    each, spec = given["seconds"] / len(given["arms"]), given["arms"][0][1]
    first = tiny_trial(spec)
    found: dict[str, Any] = {"import_seconds": imported, "first_seconds": max(0.0, first - tiny_trial(spec))}
    found |= {"base_mb": peak_rss_mb(), "arms": {}}
    begun = time.perf_counter()
    text_rows(spec["corpus"], "validation", spec["eval_windows"])
    found["rows_seconds"] = time.perf_counter() - begun
    begun = time.perf_counter()
    for arm, spec, flops in given["arms"]:
        if found["arms"] and time.perf_counter() - begun > 2 * given["seconds"]:
            break  # a large model: the other arms follow by their FLOPs
        found["arms"][arm] = first_steps(spec, flops, each)
    found["peak_mb"] = peak_rss_mb()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
