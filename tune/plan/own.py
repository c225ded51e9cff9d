"""Measure the user's own training with a few short trials: what a trial costs, and if each arm trains at all."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from threading import Event
from typing import Any

from analysis.io.text import readable
from tune.backend.preflight import check_granted
from tune.errors import StudyError, StudyStopped
from tune.plan.probe import LIMIT_SECONDS, Calibration, Speed, loop_seconds
from tune.plan.space import measured
from tune.study.own_study import OwnStudy
from tune.subject.short import ShortTrial, ShortTrials, subject_of
from tune.subject.sources import draft

PROBE_SECONDS = 5.0  # of training per arm, unless the second report takes longer
SHARE = 0.1  # of the budget, of a trial of `pagating try`
SEED = 1
STAGE = "search"


@contextmanager
def short_trials(study: OwnStudy, base: Path) -> Iterator[ShortTrials]:
    """Yield what runs short trials of a study, in a folder that is removed. `base` is the study file's folder."""
    with tempfile.TemporaryDirectory(prefix="pagating-short-") as scratch:
        sources = draft(study, base, Path(scratch)).write()
        yield ShortTrials(subject_of(study, sources), Path(scratch) / "trials")


# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Seconds and memory of an arm's trials.

    Attributes:
        fixed: Seconds of a trial of any length: its process, imports, data, the model.
        unit: Seconds per unit of the budget.
        peak_mb: Peak memory of the trial's process in MiB; None if it was stopped, or of a command.
    """

    fixed: float
    unit: float
    peak_mb: float | None


def cost(done: ShortTrial) -> Cost:
    """Return the cost of an arm's trials from the first reports of one. With one report, all of it counts as training.

    Raises StudyStopped if there is none.
    """
    if not done.rows:
        raise StudyStopped(
            f"no report came within {LIMIT_SECONDS:.0f} s, so the hours are not known: report more often, or give the "
            "seconds of a trial, such as --hours-from 3600s"
        )
    (first, began), (last, ended) = ((done.rows[i]["step"], _seconds(done.rows[i])) for i in (0, -1))
    unit = (ended - began) / (last - first) if last > first else done.seconds / last
    return Cost(max(0.0, done.seconds - unit * last), unit, done.final.get("peak_rss_mb"))


def _seconds(row: dict[str, Any]) -> float:
    """Return the time from the start of a trial to an evaluation."""
    return float(row["step"] / row["tokens_per_second"])


def probes(study: OwnStudy, slots: int) -> int:
    """Return the number of trials of a calibration: as many of each arm as keep all slots busy."""
    return -(-slots // len(study.arms)) * len(study.arms)


def calibrate(
    study: OwnStudy, base: Path, slots: int, ended: Callable[[], None] = lambda: None
) -> tuple[Calibration, float | None]:
    """Measure the first reports of a trial of each arm, with as many trials at a time as the study has slots.

    Args:
        study: The study.
        base: Folder of the study file.
        slots: Number of trials that run in parallel.
        ended: Called after each trial, by any thread.

    Returns:
        The calibration, and the peak memory of a trial in MiB, if it is known.

    Raises:
        StudyError: An arm cannot be trained.
        StudyStopped: A trial takes too long to its first report.
    """
    arms = list(study.arms) * (probes(study, slots) // len(study.arms))
    loop, stop = loop_seconds(), Event()
    with short_trials(study, base) as trials, ThreadPoolExecutor(slots) as pool:

        def measure(arm: str) -> Cost:
            found = cost(_trained(trials, arm, stop))
            ended()
            return found

        try:
            found = list(pool.map(measure, arms))
        finally:  # an interruption, or an arm that cannot be trained, ends the other trials too
            stop.set()
            pool.shutdown(cancel_futures=True)
    speeds, deviations = {}, [0.0]
    for arm in study.arms:
        costs = [each for name, each in zip(arms, found, strict=True) if name == arm]
        unit = mean(each.unit for each in costs)
        deviations += [abs(each.unit / unit - 1) for each in costs if unit]
        speeds[arm] = Speed(1 / max(unit, 1e-12), 0.0, mean(each.fixed for each in costs))
    peaks = [each.peak_mb for each in found if each.peak_mb is not None]
    kept = measured()
    return Calibration(
        speeds=speeds,
        import_seconds=kept["slot_seconds"],
        first_seconds=0.0,
        base_mb=kept["worker_mb"],
        rows_seconds=0.0,
        loop_seconds=loop,
        spread=max(deviations),
        processes=slots,
    ), max(peaks, default=None)


def given_speeds(study: OwnStudy, hours_from: str) -> dict[str, Speed]:
    """Return the speed of each arm from the seconds of a trial, such as 90s. Raises StudyError for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)s", hours_from)
    if not match or not float(match[1]):
        raise StudyError(
            f"--hours-from {hours_from}: allowed: measure, or the seconds of a trial, such as 90s; no formula gives "
            "those of your own training"
        )
    return dict.fromkeys(study.arms, Speed(study.amount / float(match[1]), 0.0, 0.0))


def _trained(trials: ShortTrials, arm: str, stop: Event) -> ShortTrial:
    """Train an arm until the seconds of a whole trial are known. Raises StudyError if the trial does not complete."""
    budget = trials.budget(arm, 1.0)

    def enough(reports: int, seconds: float) -> bool:
        return (reports > 1 and seconds > PROBE_SECONDS) or seconds > LIMIT_SECONDS or stop.is_set()

    done = trials.run(STAGE, arm, SEED, budget, enough=enough)
    if done.outcome not in ("completed", "stopped"):
        raise StudyError(f"arms.{arm}: a trial is {done.outcome}: {done.reason}")
    return done


# --- try -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnTried:
    """A short trial of an arm. `line` tells of it, and `problem` why it was not completed; None if it was."""

    line: str
    problem: str | None


def try_arms(study: OwnStudy, base: Path, length: int | None, arms: Sequence[str] = ()) -> Iterator[OwnTried]:
    """Train a short trial of each arm, one after the other, and yield each.

    Args:
        study: The study.
        base: Folder of the study file.
        length: Budget of the trials in the study's unit. None is a tenth of the arm's.
        arms: Names of the arms; empty for all.

    Raises:
        StudyError: The study has no such arm, or the user's files cannot be used.
    """
    if unknown := [arm for arm in arms if arm not in study.arms]:
        raise StudyError(f"--arm {unknown[0]}: {study.name} has the arms {', '.join(study.arms)}")
    if not study.address:
        check_granted(study, slots=None)
    with short_trials(study, base) as trials:

        def budget(arm: str) -> int:
            return min(length or trials.budget(arm, SHARE), trials.budget(arm, 1.0))

        for arm in arms or study.arms:
            tried = trials.run(STAGE, arm, SEED, budget(arm))
            yield _tried(trials.study, arm, tried, study.arms[arm].share < 1 and budget(arm) == budget(study.baseline))


def _tried(study: OwnStudy, arm: str, done: ShortTrial, alike: bool) -> OwnTried:
    """Describe a short trial. `alike`: it has the baseline's length, though in the study its trials are shorter."""
    if done.outcome != "completed":
        return OwnTried(f"{arm}: {done.outcome}: {done.reason}", done.reason)
    first, last = (study.sign * done.losses[i] for i in (0, -1))
    values = f"{first:.6g} -> {last:.6g}" if len(done.losses) > 1 else f"{last:.6g}"
    peak = done.final.get("peak_rss_mb")
    memory = f", {readable(peak * (1 << 20))} at the peak" if peak is not None else ""
    said = (
        f"{arm}: {study.resolved(arm).formula}; {study.metric.name} {values} in {done.budget} of "
        f"{study.length(arm, study.amount)} {study.unit}{memory}, {done.seconds:.3g} s with the start of its process"
        + (f"; as long as {study.baseline} here, and shorter in the study" if alike else "")
    )
    return OwnTried(said, None)
