"""Train a few steps of every arm at its real size, to see if it fits and trains on this machine, and how fast.

Each arm is trained in a process of its own, so that its peak memory is its own. Nothing is written.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.io.text import readable
from pagating.trial import Trial
from tune.backend.preflight import check_granted
from tune.errors import StudyError
from tune.plan.child import ChildError, answers, start
from tune.plan.plan import corpus_of
from tune.plan.probe import arm_example, decide_precision, stand_in
from tune.plan.space import vocabulary
from tune.study.own_gates import doubtful
from tune.study.sections import AUTO
from tune.study.sizes import largest_batch
from tune.study.study import Study
from tune.study.weights import local_weights


@dataclass(frozen=True)
class Tried:
    """The first steps of an arm.

    The losses are in nats per token at the first and the last step, `peak_mb` in MiB. `problem` is one line that says
    why the arm could not be trained; the figures are then NaN. `silence` is the longest time between two heartbeats, in
    seconds. `formula` is the arm's activation.
    """

    arm: str
    first_nll: float = math.nan
    last_nll: float = math.nan
    step_seconds: float = math.nan
    peak_mb: float = math.nan
    parameters: int = 0
    problem: str | None = None
    silence: float = 0.0
    formula: str = ""


def try_arms(
    study: Study, base: Path, output: Path, steps: int, arms: Sequence[str] = (), micro_batches: int | None = None
) -> Iterator[Tried | str]:
    """Train a few updates of each arm, one arm after the other, and yield each result or a line to print.

    Model, precision and threads are the study's. No code is compiled, and one window is evaluated. If the corpus is
    not on this machine, random tokens replace it, and a line says so.

    Args:
        study: The study.
        base: Folder of the study file.
        output: Folder of studies, for the token cache.
        steps: Updates per arm.
        arms: Names of the arms; empty for all.
        micro_batches: Most micro batches per step; None for the study's. Memory does not depend on it.

    Raises:
        StudyError: The study has no such arm, or its weights do not fit.
    """
    unknown = [arm for arm in arms if arm not in study.arms]
    if unknown:
        raise StudyError(f"--arm {unknown[0]}: {study.name} has the arms {', '.join(study.arms)}")
    from pagating.data.corpus import read_meta

    if study.scales:
        yield f"rung {len(study.scales)} of {len(study.scales)}, the largest size:"
    study = study.rungs[-1]
    if not study.address:
        check_granted(study, slots=None)
    corpus, missing = corpus_of(study, output, base)
    if missing:
        yield f"{missing}; random tokens replace it, so the losses show only that it trains"
    yield from doubtful(study, base, output / study.name)
    with tempfile.TemporaryDirectory(prefix="pagating-try-") as scratch:
        tokens, lines = max(1 << 16, 4 * study.model.n_ctx), study.corpus.rows == "lines"
        place = corpus or stand_in(Path(scratch), vocabulary(study), tokens, lines)
        size = read_meta(place)["vocab_size"] if study.model.pretrained else None
        weights, lacking = local_weights(study, base, size)
        if lacking:
            yield f"{lacking}; the trials start from initial weights"
        if study.fixed.precision == AUTO:
            decision = decide_precision(study, base, read_meta(place)["vocab_size"])
            here = f"here it would be {decision.chosen}: {decision.reason}"
            yield f"fixed.precision: {AUTO} is decided when the study starts; {here}"
            study = study.with_precision(decision.chosen)
        for arm in arms or study.arms:
            trial = replace(shortened(study, arm, base, place, steps, micro_batches), pretrained=weights)
            tried = replace(_try_arm(trial, arm), formula=study.arms[arm].formula)
            yield tried
            if warning := too_silent(study, tried, trial.batch_tokens):
                yield warning


def shortened(study: Study, arm: str, base: Path, corpus: Path, steps: int, micro_batches: int | None = None) -> Trial:
    """Return the arm's trial with `steps` updates of at most `micro_batches` micro batches, each evaluated."""
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

    `batch_tokens` is the tried batch. An evaluation's batch is the study's, and takes about a third of its update.
    """
    evaluated = tried.step_seconds * largest_batch(study) / batch_tokens / 3
    silence, timeout = max(tried.silence, evaluated), study.resources.stall_timeout
    if tried.problem or silence < timeout / 2:
        return None
    return (
        f"{tried.arm}: here a trial sends no heartbeat for about {silence:.0f} s at a time and is ended as hung after "
        f"{timeout:g} s: raise resources.stall_timeout, or lower fixed.batch_tokens or fixed.micro_batch_tokens"
    )


def line(tried: Tried | str) -> str:
    """Return the line to print for an arm."""
    if isinstance(tried, str):
        return tried
    if tried.problem:
        return f"{tried.arm}: {tried.problem}"
    return (
        f"{tried.arm}: {tried.formula}; {tried.parameters:,} parameters, train_nll {tried.first_nll:.4f} -> "
        f"{tried.last_nll:.4f}, {readable(tried.peak_mb * (1 << 20))} at the peak, {tried.step_seconds:.3g} s per step"
    )


def _try_arm(trial: Trial, arm: str) -> Tried:
    try:
        (found,) = answers(start("try", trial.threads, trial=trial.as_dict()))
        return Tried(arm, **found)
    except ChildError as error:
        return Tried(arm, problem=str(error))
