"""Train a few steps of every arm at its real size: does it fit and train on this machine, and how fast?

    python -m tune.plan.dry_run < trial.json

trains one arm, in a process of its own, so that its peak memory is that of this arm. `try_arms` starts these processes
one after another. Nothing is written.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.io.text import readable
from pagating.trial import Diverged, OutOfMemory, Trial
from tune.errors import StudyError
from tune.plan.plan import arm_example, corpus_of, stand_in
from tune.plan.space import vocabulary
from tune.study.study import Study
from tune.study.weights import check_arms

CHILD = "tune.plan.dry_run"


@dataclass(frozen=True)
class Tried:
    """The first steps of an arm: nats per token at the first and the last step, seconds per step, MiB, parameters.

    `problem`: why it could not be trained, in one line; the figures are then NaN. `silence`: the longest time between
    two signs of life, seconds.
    """

    arm: str
    first_nll: float = math.nan
    last_nll: float = math.nan
    step_seconds: float = math.nan
    peak_mb: float = math.nan
    parameters: int = 0
    problem: str | None = None
    silence: float = 0.0


def try_arms(
    study: Study, base: Path, output: Path, steps: int, arms: Sequence[str] = (), micro_batches: int | None = None
) -> Iterator[Tried | str]:
    """Train `steps` updates of each arm (of `arms`; all where none is named), one after the other.

    Model, precision and threads are the study's, and so is the batch, but for at most `micro_batches` of its micro
    batches a step where that is given: memory is that of any number. No code is compiled, one window evaluated. Where
    the corpus is not on this machine, random tokens stand for it, and a line that says so comes first. Yields a result
    for each arm as it is there. Raises StudyError for an arm that the study has not.
    """
    unknown = [arm for arm in arms if arm not in study.arms]
    if unknown:
        raise StudyError(f"--arm {unknown[0]}: {study.name} has the arms {', '.join(study.arms)}")
    corpus, missing = corpus_of(study, output, base)
    if missing:
        yield f"{missing}; random tokens stand for it: the losses say only that it trains"
    with tempfile.TemporaryDirectory(prefix="pagating-try-") as scratch:
        tokens, lines = max(1 << 16, 4 * study.model.n_ctx), study.corpus.rows == "lines"
        place = corpus or stand_in(Path(scratch), vocabulary(study), tokens, lines)
        weights, lacking = local_weights(study, base, place)
        if lacking:
            yield f"{lacking}; the trials start from initial weights"
        for arm in arms or study.arms:
            trial = replace(shortened(study, arm, base, place, steps, micro_batches), pretrained=weights)
            tried = _try_arm(trial, arm)
            yield tried
            if warning := too_silent(study, tried, trial.batch_tokens):
                yield warning


def local_weights(study: Study, base: Path, corpus: Path) -> tuple[str | None, str | None]:
    """The file of weights that the study starts from, or a line that says that it is not on this machine.

    Raises StudyError where it is, and is not of the study's sizes.
    """
    if study.model.pretrained is None:
        return None, None
    from pagating.data.corpus import read_meta
    from pagating.model.pretrained import PretrainedError, find_weights

    try:
        path = find_weights(study.model.pretrained, base)
    except PretrainedError as error:
        return None, str(error)
    try:
        check_arms(study, path, read_meta(corpus)["vocab_size"])
    except PretrainedError as error:
        raise StudyError(str(error)) from error
    return str(path), None


def shortened(study: Study, arm: str, base: Path, corpus: Path, steps: int, micro_batches: int | None = None) -> Trial:
    """Return the arm's trial with `steps` updates, each evaluated and of at most `micro_batches` micro batches."""
    trial = arm_example(study, arm, base, corpus)
    batch_tokens, micro = trial.batch_tokens, trial.micro_batch_tokens
    if micro_batches and micro:
        batch_tokens = min(batch_tokens, micro_batches * micro)
    return replace(
        trial,
        tokens=steps * batch_tokens,
        batch_tokens=batch_tokens,
        eval_every=1,
        eval_windows=1,
        compile="never",
    )


def too_silent(study: Study, tried: Tried, batch_tokens: int) -> str | None:
    """Return a warning if the arm may be silent for half the time after which a trial counts as hung; else None.

    An evaluation's batch is that of an update, `batch_tokens` of which was tried: its forward pass takes about a third
    of the update.
    """
    evaluated = tried.step_seconds * study.fixed.batch_tokens / batch_tokens / 3
    silence, timeout = max(tried.silence, evaluated), study.resources.stall_timeout
    if tried.problem or silence < timeout / 2:
        return None
    return (
        f"{tried.arm}: here a trial shows no life for about {silence:.0f} s at a time, and one is ended as hung after "
        f"{timeout:g} s: raise resources.stall_timeout, or lower fixed.batch_tokens or fixed.micro_batch_tokens"
    )


def line(tried: Tried | str) -> str:
    """Return the line to print for an arm."""
    if isinstance(tried, str):
        return tried
    if tried.problem:
        return f"{tried.arm}: {tried.problem}"
    return (
        f"{tried.arm}: {tried.parameters:,} parameters, train_nll {tried.first_nll:.4f} -> "
        f"{tried.last_nll:.4f}, {readable(tried.peak_mb * (1 << 20))} at the peak, {tried.step_seconds:.3g} s a step"
    )


def _try_arm(trial: Trial, arm: str) -> Tried:
    done = subprocess.run(
        [sys.executable, "-m", CHILD],
        input=json.dumps(trial.as_dict()),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(trial.threads)},
        check=False,
    )
    if done.returncode == 0:
        return Tried(arm, **json.loads(done.stdout.splitlines()[-1]))
    if done.returncode < 0:
        killed = f"its process was killed by signal {-done.returncode}"
        return Tried(arm, problem=killed + (", as a machine short of memory does" if done.returncode == -9 else ""))
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return Tried(arm, problem=lines[-1])


def main() -> int:
    """Train the trial on standard input; print the result as JSON. Exit code 1 if it cannot be trained."""
    trial = Trial.from_dict(json.load(sys.stdin))
    from pagating.train import heartbeats

    rows, silence, seen = [], 0.0, time.monotonic()
    try:
        for step in heartbeats(trial):
            silence, seen = max(silence, time.monotonic() - seen), time.monotonic()
            if step and step[1]:
                rows.append(step[1])
    except (Diverged, OutOfMemory) as error:
        print(error, file=sys.stderr)
        return 1
    seconds = [row["tokens"] / row["tokens_per_second"] for row in rows]  # of training so far
    later = len(seconds) > 1  # the first step warms up
    final = rows[-1]["final"]
    print(
        json.dumps(
            {
                "first_nll": rows[0]["train_nll"],
                "last_nll": rows[-1]["train_nll"],
                "step_seconds": (seconds[-1] - seconds[0]) / (len(seconds) - 1) if later else seconds[0],
                "peak_mb": final.get("peak_gpu_mb", final["peak_rss_mb"]),
                "parameters": final["parameters"],
                "silence": silence,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
