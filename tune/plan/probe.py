"""The calibration of a plan: trains the first steps of each arm for some seconds, in several processes at once.

    python -m tune.plan.probe < specification.json

is one process, with the niceness and the imports of a worker of Ray. `probe` starts one per slot, so that the figures
include the contention of the slots for cores, caches and memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from pagating.trial import Trial

NICENESS = 15  # Ray's default for its workers; RAY_worker_niceness changes both
ROUGH_FLOPS = (
    2e10  # a core's speed to a factor of a few: it settles only how many steps stand between two clock readings
)

LONGEST = 10_000  # clock readings of one arm


class ProbeError(RuntimeError):
    """A calibration process ended without a figure."""


@dataclass(frozen=True)
class Speed:
    """One arm on one slot: training tokens per second, seconds of an evaluation, seconds to make the model."""

    tokens_per_second: float
    evaluation_seconds: float
    build_seconds: float


@dataclass(frozen=True)
class Calibration:
    """What the probes found, the mean over processes. `spread`: largest relative deviation of a process's speed.

    import_seconds: of a worker. first_seconds: by which its first trial is longer than the next. base_mb: its memory
    without a model. rows_seconds: to cut the validation text into lines, once per confirm trial. loop_seconds: of a
    fixed piece of Python, which measures the speed of this machine outside of training.
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
    """Return the seconds of a fixed piece of work in Python: a table of 1,000 numbers to JSON and back."""
    table = {str(i): i / 7 for i in range(1_000)}
    begun = time.perf_counter()
    for _ in range(rounds):
        json.loads(json.dumps(table))
    return time.perf_counter() - begun


def probe(trials: Mapping[str, Trial], flops: Mapping[str, int], processes: int, seconds: float) -> Calibration:
    """Train the first steps of each arm, `seconds` in all, in `processes` at once; each begins with another arm.

    `trials`: by arm. `flops`: training FLOPs per token, by arm. Raises ProbeError with the last line on standard error
    of a process that failed.
    """
    arms = list(trials)
    loop = loop_seconds()
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="pagating-plan-") as scratch:
        environment = {**os.environ, "OMP_NUM_THREADS": str(next(iter(trials.values())).threads)}
        for number in range(processes):
            turned = [arms[(i + number) % len(arms)] for i in range(len(arms))]
            content = {"arms": [[arm, trials[arm].as_dict(), flops[arm]] for arm in turned], "seconds": seconds}
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
    """Return one calibration of all processes. An arm that none had time for is scaled from another by FLOPs."""
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


def short(trial: Trial, flops: int, seconds: float) -> tuple[Trial, float]:
    """Return a trial with clock readings close enough for `seconds`, and the cost of an evaluation relative to its own.

    A step or an evaluation that would take longer than the whole calibration is made smaller.
    """
    from pagating.data.corpus import read_meta
    from pagating.model.compile import is_compiled
    from pagating.model.size import GPT2Size, stock_flops_per_token

    size = GPT2Size(vocab_size=read_meta(trial.corpus)["vocab_size"], **trial.model)
    whole = stock_flops_per_token(size) * trial.tokens
    affordable = seconds * ROUGH_FLOPS / flops  # tokens
    batch_tokens = min(trial.batch_tokens, max(1, int(affordable // size.n_ctx)) * size.n_ctx)
    micro = trial.micro_batch_tokens
    if micro:
        batch_tokens = batch_tokens // micro * micro or batch_tokens
    every = max(1, min(16, round(affordable / 4 / batch_tokens)))
    windows = min(trial.eval_windows, max(1, every * batch_tokens // size.n_ctx))
    compiled = trial.task == "causal" and is_compiled(trial.compile, whole, size.dropout)
    shorter = replace(
        trial,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro if micro and batch_tokens % micro == 0 else None,
        tokens=LONGEST * every * batch_tokens,
        eval_every=every,
        eval_windows=windows,
        test=False,
        compile="always" if compiled else "never",
    )
    return shorter, trial.eval_windows / windows


def first_steps(trial: Trial, flops: int, seconds: float) -> dict[str, float]:
    """Return the speed of one arm over about `seconds` of its first steps, without the first interval, a warm-up."""
    from pagating.train import train

    trial, share = short(trial, flops, seconds)
    every = trial.evaluation_interval
    begun = time.perf_counter()
    trained, clock, evaluations = [], [], []
    for row in train(trial):
        trained.append(row["tokens"] / row["tokens_per_second"])  # seconds of training so far
        clock.append(time.perf_counter())
        if len(clock) > 1:
            evaluations.append(clock[-1] - clock[-2] - (trained[-1] - trained[-2]))
            if clock[-1] - clock[0] >= seconds:
                break
    # medians: a burst of other work is not this machine's speed
    step = median(after - before for before, after in pairwise(trained)) / every
    evaluation = max(0.0, median(evaluations))
    return {
        "tokens_per_second": trial.batch_tokens / step,
        "evaluation_seconds": evaluation * share,
        "build_seconds": max(0.0, clock[0] - begun - evaluation - every * step),
    }


def tiny_trial(trial: Trial) -> float:
    """Return the seconds of one step of a tiny model: what a process loads and does for the first time."""
    from pagating.train import train

    n_ctx = trial.model["n_ctx"]
    tiny = replace(
        trial,
        model={**trial.model, "n_layer": 1, "d_model": 8, "n_head": 1},
        batch_tokens=n_ctx,
        micro_batch_tokens=None,
        tokens=n_ctx,
        eval_windows=1,
        unit=None,
        test=False,
        compile="never",
    )
    begun = time.perf_counter()
    for _ in train(tiny):
        pass
    return time.perf_counter() - begun


def main() -> int:
    """Run the specification on standard input; print the result as JSON."""
    given = json.load(sys.stdin)
    wanted = int(os.environ.get("RAY_worker_niceness", NICENESS))  # noqa: SIM112 (Ray's own spelling)
    os.nice(max(0, wanted - os.nice(0)))
    begun = time.perf_counter()
    import tune.backend.ray_trial  # noqa: F401 (what a worker imports)
    from pagating.evaluate import text_rows
    from pagating.metrics import peak_rss_mb

    imported = time.perf_counter() - begun
    arms = [(arm, Trial.from_dict(fields), flops) for arm, fields, flops in given["arms"]]
    each, trial = given["seconds"] / len(arms), arms[0][1]
    first = tiny_trial(trial)
    found: dict[str, Any] = {"import_seconds": imported, "first_seconds": max(0.0, first - tiny_trial(trial))}
    found |= {"base_mb": peak_rss_mb(), "arms": {}}
    begun = time.perf_counter()
    text_rows(trial.corpus, "validation", trial.eval_windows)
    found["rows_seconds"] = time.perf_counter() - begun
    begun = time.perf_counter()
    for arm, trial, flops in arms:
        if found["arms"] and time.perf_counter() - begun > 2 * given["seconds"]:
            break  # a large model: the other arms follow by their FLOPs
        found["arms"][arm] = first_steps(trial, flops, each)
    found["peak_mb"] = peak_rss_mb()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
