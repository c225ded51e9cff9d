"""Compute the duration of a study by assigning its cells to the slots in the order of its stages.

The seconds of a cell come from a calibration on this machine (`tune.plan.probe`), or from a device's peak and an
assumed utilisation. All other times (the start, a worker's imports, the time between two cells, the report) come from
`measured.json`, scaled by the speed at which this machine runs a fixed piece of Python.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagating.hardware import PEAKS
from tune.errors import StudyError
from tune.plan.probe import Calibration, Speed
from tune.plan.work import Model, stopped
from tune.study.sizes import (
    CORNER_UNITS,
    Span,
    arm_trials,
    corner_points,
    evaluations,
    grid_chances,
    steps,
    stopping_step,
    validation_tokens,
)
from tune.study.study import Study

# GPUs whose float32 peak is listed, by the name that --hours-from takes
DEVICES = {name.replace(" ", "").lower(): peak for name, peak in PEAKS.items() if peak.float32}
MEASURE = "measure"  # the other source of speeds: a calibration on this machine


@dataclass(frozen=True)
class Overheads:
    """Seconds beside training: before the first cell, once per slot, between two cells, and after the last cell."""

    start: float
    slot: float
    cell: float
    end: float


def check_device(source: str, utilisation: float) -> None:
    """Raise StudyError if `source` is neither `MEASURE` nor a device, or `utilisation` is outside (0, 1]."""
    if source not in (MEASURE, *DEVICES):
        raise StudyError(f"--hours-from {source}: allowed: {', '.join((MEASURE, *DEVICES))}")
    if not 0 < utilisation <= 1:
        raise StudyError(f"--utilisation {utilisation}: it must be in (0, 1]")


def device_speeds(device: str, study: Study, models: Mapping[str, Model], utilisation: float) -> dict[str, Speed]:
    """Return each arm's speed on a device of `DEVICES`, which is peak x utilisation / FLOPs per token."""
    rate = DEVICES[device].rate(study.fixed.precision) * 1e12 * utilisation
    evaluated = validation_tokens(study)
    return {
        arm: Speed(rate / model.flops_per_token, evaluated * model.flops_per_token / 3 / rate, 0.0)
        for arm, model in models.items()
    }


def cell_seconds(
    study: Study, arm: str, speed: Speed, stage: str, until: int | None = None, rows: float = 0.0
) -> float:
    """Return the seconds of one trial: making the model, training up to step `until`, and evaluations.

    A confirm trial also evaluates the test split and padded lines, each as long as an evaluation, after `rows` seconds
    that cut the lines.
    """
    done = steps(study) if until is None else until
    seconds = speed.build_seconds + study.length(arm, done) * study.fixed.batch_tokens / speed.tokens_per_second
    seconds += evaluations(study, done) * speed.evaluation_seconds
    return seconds + (2 * speed.evaluation_seconds + rows if stage == "confirm" else 0.0)


# --- the cells on the slots ------------------------------------------------------------------------------------------
# Simulated, because bounds are not accurate enough: on 4 slots max(work / slots, longest chain) is 13% below the
# simulated time of configs/smoke.yaml and 20% below that of configs/published/phase2.yaml; whole rounds of the longest
# cell are 20% below and, on 32 slots, 10% above (configs/laptop.yaml).


def pool_seconds(cells: list[float], slots: int) -> float:
    """Return the wall seconds of `cells` if the first free slot takes the next one."""
    if slots >= len(cells):
        return max(cells, default=0.0)
    free = [0.0] * slots
    for cell in cells:
        heapq.heapreplace(free, free[0] + cell)
    return max(free)


def search_seconds(chains: list[list[float]], parallel: int, slots: int) -> float:
    """Return the wall seconds of the search. Arms take turns; trial i of an arm waits for trials 0 .. i - parallel."""
    # earliest start of the arm's next trial, its number, arm
    waiting = [(0.0, 0, arm) for arm, chain in enumerate(chains) if chain]
    ends: list[list[float]] = [[] for _ in chains]
    free = [0.0] * slots
    left = sum(map(len, chains))
    while left:
        now = free[0]
        ready = [entry for entry in waiting if entry[0] <= now]
        if not ready:
            heapq.heapreplace(free, min(waiting)[0])
            continue
        _, number, arm = entry = min(ready, key=lambda one: one[1:])
        waiting.remove(entry)
        end = now + chains[arm][number]
        heapq.heapreplace(free, end)
        ends[arm].append(max(end, ends[arm][-1] if ends[arm] else 0.0))
        left -= 1
        if number + 1 < len(chains[arm]):
            seen = number + 1 - parallel
            waiting.append((ends[arm][seen] if seen >= 0 else 0.0, number + 1, arm))
    return max(free)


def stage_seconds(
    study: Study, speeds: Mapping[str, Speed], slots: int, seeds: Span, cell: float, rows: float
) -> dict[str, Span]:
    """Return the wall seconds of each stage. `cell` is the time between two cells of a slot, `rows` to cut lines."""
    arms = list(study.arms)
    cut, early = stopping_step(study), {arm: stopped(study, arm) for arm in arms}

    def search(which: int) -> float:
        # an arm's last trials are stopped; a fraction shortens one more trial
        def chain(arm: str) -> list[float]:
            trials, cuts = arm_trials(study, arm), early[arm][which]
            whole, short = (cell_seconds(study, arm, speeds[arm], "search", until) + cell for until in (None, cut))
            lengths = [whole] * trials
            for i in range(math.ceil(cuts)):
                lengths[trials - 1 - i] -= min(1.0, cuts - i) * (whole - short)
            return lengths

        return search_seconds([chain(arm) for arm in arms], study.search.parallel, slots)

    def wave(stage: str, count: int) -> float:
        return pool_seconds(
            [cell_seconds(study, arm, speeds[arm], stage, rows=rows) + cell for _ in range(count) for arm in arms],
            slots,
        )

    settings, grids, corners = study.calibrate, grid_chances(study), corner_points(study)

    def grid(points: int) -> float:
        first = min(points, settings.points)
        return wave("calibrate", first * settings.seeds) + (points - first) * wave("calibrate", settings.seeds)

    def rounds(count: float) -> float:
        return count * wave("calibrate", corners * settings.seeds) if corners else 0.0

    def confirm(count: float) -> float:
        looks = study.confirm.looks
        before, seconds = 0, 0.0
        for look in looks:
            if before >= count:
                break
            seconds += wave("confirm", look - before) * min(1.0, (count - before) / (look - before))
            before = look
        return seconds

    return {
        "search": (search(2), search(1), search(0)),
        "calibrate": (
            len(grids) * grid(settings.points) + rounds(CORNER_UNITS[0]),
            sum(chance * grid(size) for each in grids.values() for size, chance in each.items())
            + rounds(CORNER_UNITS[1]),
            len(grids) * grid(settings.max_points) + rounds(CORNER_UNITS[2]),
        ),
        "confirm": (confirm(seeds[0]), confirm(seeds[1]), confirm(seeds[2])),
    }


def scaled_overheads(found: Mapping[str, Any], calibration: Calibration | None) -> Overheads:
    """Return the recorded overheads, scaled to this machine. A worker's imports are those of the calibration."""
    scale = calibration.loop_seconds / found["loop_seconds"] if calibration else 1.0
    slot = calibration.import_seconds + calibration.first_seconds if calibration else found["slot_seconds"]
    return Overheads(found["start_seconds"] * scale, slot, found["cell_seconds"] * scale, found["end_seconds"] * scale)


def wall_seconds(stages: Mapping[str, Span], overheads: Overheads, spread: float) -> Span:
    """Return the seconds from start to end of the command. `spread` is the relative uncertainty of the speeds."""
    beside = overheads.start + overheads.slot + overheads.end
    least, likely, most = (sum(span[i] for span in stages.values()) for i in range(3))
    return beside + least / (1 + spread), beside + likely, beside + most * (1 + spread)
