"""Calibrate a plan: train the first steps of each arm for some seconds, in one process per slot.

The figures include the contention of the slots for cores, caches and memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from pagating.trial import Trial
from tune.plan.child import answers, start


@dataclass(frozen=True)
class Speed:
    """The speed of one arm on one slot. `build_seconds` is the time to make the model."""

    tokens_per_second: float
    evaluation_seconds: float
    build_seconds: float


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration, as the mean over processes.

    Attributes:
        speeds: Speed by arm.
        import_seconds: Import time of a worker.
        first_seconds: Time by which a worker's first trial is longer than the next.
        base_mb: Memory of a worker without a model, MiB.
        rows_seconds: Time to cut the validation text into lines, once per confirm trial.
        loop_seconds: Time of `loop_seconds`, this machine's speed outside of training.
        spread: Largest relative deviation of a process's speed.
        processes: Number of processes.
    """

    speeds: dict[str, Speed]
    import_seconds: float
    first_seconds: float
    base_mb: float
    rows_seconds: float
    loop_seconds: float
    spread: float
    processes: int


LIMIT_SECONDS = 600.0  # longest wait for a calibration; a step of a large model may take minutes on a slow machine


def loop_seconds(rounds: int = 200) -> float:
    """Return the seconds of a fixed work in Python: `rounds` times a table of 1,000 numbers to JSON and back."""
    table = {str(i): i / 7 for i in range(1_000)}
    begun = time.perf_counter()
    for _ in range(rounds):
        json.loads(json.dumps(table))
    return time.perf_counter() - begun


def probe(trials: Mapping[str, Trial], flops: Mapping[str, int], processes: int, seconds: float) -> Calibration:
    """Train each arm's first steps in several processes at once, each starting with another arm.

    `flops` are training FLOPs per token, `seconds` the training time per process. Raises ChildError if one fails, and
    ChildTimeout if one gives no answer within `LIMIT_SECONDS`.
    """
    arms = list(trials)
    loop, threads = loop_seconds(), next(iter(trials.values())).threads
    turns = [[arms[(i + number) % len(arms)] for i in range(len(arms))] for number in range(processes)]
    each = [[(arm, trials[arm].as_dict(), flops[arm]) for arm in turn] for turn in turns]
    running = [start("calibrate", threads, arms=mine, seconds=seconds) for mine in each]
    return combine(answers(*running, limit=LIMIT_SECONDS), arms, flops, loop)


def combine(found: list[dict[str, Any]], arms: list[str], flops: Mapping[str, int], loop: float) -> Calibration:
    """Combine the answers of all processes. An arm that no process reached is scaled from another by its FLOPs."""
    speeds, deviations = {}, [0.0]
    for arm in arms:
        own = [one["arms"][arm] for one in found if arm in one["arms"]]
        scale = 1.0
        if not own:
            other = next(name for name in arms if any(name in one["arms"] for one in found))
            own, scale = [one["arms"][other] for one in found if other in one["arms"]], flops[other] / flops[arm]
        rate = len(own) / sum(1 / one["tokens_per_second"] for one in own)  # slots share cells, not seconds
        deviations += [abs(one["tokens_per_second"] / rate - 1) for one in own]
        evaluation, build = (mean(one[name] for one in own) for name in ("evaluation_seconds", "build_seconds"))
        speeds[arm] = Speed(rate * scale, evaluation / scale, build)
    names = ("import_seconds", "first_seconds", "base_mb", "rows_seconds")
    means = {name: mean(one[name] for one in found) for name in names}
    return Calibration(speeds=speeds, loop_seconds=loop, spread=max(deviations), processes=len(found), **means)
