"""Decide how the improvement of each arm goes on over the rungs of a ladder, in one place."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.io.assemble import COMPUTE, RUNG, Ladder, Study
from analysis.io.trials import confirm_rows
from analysis.stats import multiplicity, trend
from analysis.stats.pairs import Pairs
from analysis.verdict import looks
from analysis.verdict.checks import not_begun
from analysis.verdict.kinds import Comparison, Result, Rung, Verdict, in_question
from analysis.verdict.ladder import words
from analysis.verdict.ladder.kinds import ArmTrend, ComputeGain, Trend
from analysis.verdict.ladder.words import LEAST

LOST = 2  # rungs on which a dropped arm was worse
HELD = (Verdict.BETTER, Verdict.WORSE, Verdict.NO_DIFFERENCE, Verdict.IDENTICAL)


def rungs_of(ladder: Ladder, results: Sequence[Result]) -> list[Rung]:
    """Return the rungs of a ladder with their verdicts. Gains in compute are computed of rungs that have finished.

    Args:
        ladder: The ladder.
        results: Verdict of each of its rungs.
    """
    out: list[Rung] = []
    for study, result, size, row in zip(ladder.rungs, results, ladder.sizes, ladder.rows, strict=True):
        number = study.rung or 0
        lost = [_times_worse(out, arm) for arm in ladder.absent.get(number, ())]
        dropped = [arm for arm, n in zip(ladder.absent.get(number, ()), lost, strict=True) if n >= LOST]
        parameters, tokens = (None if study.own else _of_baseline(study, column) for column in ("parameters", "tokens"))
        compute = size if math.isfinite(size) and ladder.axis != RUNG else None
        out.append(Rung(number, result.study, row, parameters, tokens, compute, result, [], dropped))
    done = [i for i, rung in enumerate(out) if not rung.result.unfinished]
    losses = [study.losses() for study in ladder.rungs]
    for at, i in enumerate(done):
        low, high = done[max(at - 1, 0)], done[min(at + 1, len(done) - 1)]
        out[i].gains = [_gain(ladder, losses, row, (low, i, high)) for row in out[i].result.comparisons]
    return out


def missing(ladder: Ladder, rungs: Sequence[Rung]) -> str:
    """State what an unfinished ladder lacks; return "" if nothing."""
    lacks = [
        f"rung {rung.rung} of {ladder.planned}: {rung.result.unfinished}" for rung in rungs if rung.result.unfinished
    ]
    for rung in rungs:
        gone = [arm for arm in ladder.absent.get(rung.rung, ()) if arm not in rung.dropped]
        lacks += [f"rung {rung.rung} of {ladder.planned}: no trial of {', '.join(gone)}"] if gone else []
    return "; ".join([*lacks, *([not_begun(ladder)] if len(rungs) < ladder.planned else [])])


def trends(study: Study, rungs: Sequence[Rung]) -> list[ArmTrend]:
    """Decide the trend of every comparison in question, with p adjusted over them as the study corrects its arms.

    Args:
        study: The study with the ladder.
        rungs: Its rungs, all finished.
    """
    ladder = study.ladder
    assert ladder is not None
    every = [row for rung in rungs for row in rung.result.every]
    asked = dict.fromkeys((row.baseline, row.arm) for row in in_question(every, study.floor))
    losses = [each.losses() for each in ladder.rungs]
    found = [_measured(ladder, rungs, losses, reference, arm) for reference, arm in asked]
    adjusted = multiplicity.adjust([1.0 if row.p is None else row.p for row in found], study.correction)
    for row, p in zip(found, adjusted, strict=True):
        row.p_adjusted = None if row.p is None else p
        row.trend = decided([each.kind for each in words.rows_of(row, rungs)], row.slope, row.p_adjusted, row.level)
        words.say(row, rungs, study)
    return found


def decided(kinds: Sequence[Verdict], slope: float | None, p: float | None, level: float) -> Trend:
    """Decide a trend; this is the only place that does.

    Args:
        kinds: Verdict of the arm on each rung where it is testable, from the lowest.
        slope: Slope of its improvement over three rungs or more; None if there is none.
        p: Adjusted p of the slope.
        level: Level of the trends.
    """
    if len(kinds) >= LEAST and {Verdict.BETTER, Verdict.WORSE} <= set(kinds):
        return Trend.TURNS
    if slope is not None and p is not None and p <= level:
        return Trend.GROWS if slope > 0 else Trend.SHRINKS
    return Trend.HOLDS if len(kinds) >= LEAST and kinds[0] in HELD and len(set(kinds)) == 1 else Trend.UNDECIDED


def _measured(
    ladder: Ladder, rungs: Sequence[Rung], losses: Sequence[pd.DataFrame], reference: str, arm: str
) -> ArmTrend:
    # the rungs with a verdict, and the slope. A floor that does not lose refuses the verdicts of its rung, because the
    # rung may be too noisy to see a difference. In the slope that noise is part of the error, so the rung stays in it.
    out = ArmTrend(arm, reference, level=ladder.level, axis=ladder.axis)
    out.dropped_after = next(
        (rung.rung - 1 for rung in rungs if arm in rung.dropped or reference in rung.dropped), None
    )
    rows = {
        rung.rung: row for rung in rungs for row in rung.result.every if (row.baseline, row.arm) == (reference, arm)
    }
    out.label = next(iter(rows.values())).label
    out.rungs = [number for number, row in rows.items() if row.kind is not Verdict.NOT_TESTABLE]
    measured = [number for number, row in rows.items() if row.refusal is None or row.refusal.of_floor]
    counted = [i for i, study in enumerate(ladder.rungs) if study.rung in measured]
    means = [_mean(ladder.rungs[i], rows[ladder.rungs[i].rung or 0], losses[i]) for i in counted]
    sizes = [ladder.sizes[i] for i in counted]
    if not out.rungs:  # where no floor loses on any rung, nothing shows that any could tell arms apart
        return out
    if len(measured) < LEAST or None in means or not np.isfinite(sizes).all():
        return out
    slope = trend.slope(np.log2(sizes).tolist(), [mean for mean in means if mean], ladder.level)
    if slope is not None:
        out.slope_rungs = measured
        out.slope, out.slope_low, out.slope_high = slope.value, slope.low, slope.high
        out.standard_error, out.df, out.p = slope.error, slope.df, slope.p
    return out


def _mean(study: Study, row: Comparison, losses: pd.DataFrame) -> trend.Mean | None:
    # a diverged run has a rank and no loss, so its rung has no mean
    if row.diverged_seeds_arm or row.diverged_seeds_baseline or row.improvement_percent is None:
        return None
    b, a = (study.sign * values for values in _pair(study, row, losses))
    found = trend.improvement(b, a, not study.unpaired, _stopped(study, row))
    return trend.Mean(study.sign * found.value, found.error, found.df)


def _stopped(study: Study, row: Comparison) -> bool:
    # whether a look before the last one ended the comparison
    last = (study.looks or study.made or (0,))[-1]
    return bool(row.path) and row.n < last


def _pair(study: Study, row: Comparison, losses: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    if study.unpaired:
        b, a = (losses[name].dropna().to_numpy(float) for name in (row.baseline, row.arm))
        return b, a
    pairs: Pairs = looks.paired(study, losses, row.baseline, row.arm)
    return pairs.baseline, pairs.arm


def _gain(ladder: Ladder, losses: Sequence[pd.DataFrame], row: Comparison, at: tuple[int, int, int]) -> ComputeGain:
    # `at`: places of the rung below, of the rung and of the rung above; an end of the ladder is its own neighbour
    low, i, high = at
    out, study, sizes = ComputeGain(row.arm, row.baseline), ladder.rungs[i], ladder.sizes
    out.why = _no_gain(ladder, row, at)
    if out.why:
        return out
    b, a = _pair(study, row, losses[i])
    ends = [None if end == i else losses[end][row.baseline].dropna().to_numpy(float) for end in (low, high)]
    if any(end is not None and (len(end) < 2 or not np.isfinite(end).all() or end.mean() <= 0) for end in ends):
        out.why = f"{row.baseline} has no mean on a neighbouring rung"
        return out
    near = trend.Neighbours((math.log(sizes[low]), math.log(sizes[high])), *ends)
    factor = trend.compute_factor(b, a, near, ladder.level, _stopped(study, row))
    if factor is None:
        out.why = f"the loss of {row.baseline} does not clearly fall between the rungs"
    else:
        out.factor, out.factor_low, out.factor_high = factor.value, factor.low, factor.high
    return out


def _no_gain(ladder: Ladder, row: Comparison, at: tuple[int, int, int]) -> str:
    low, i, high = at
    if row.kind in (Verdict.IDENTICAL, Verdict.NOT_TESTABLE):
        return str(row.verdict)
    if low == high:
        return "one rung alone shows no fall of the loss with compute"
    if ladder.axis != COMPUTE or not np.isfinite([ladder.sizes[place] for place in at]).all():
        return "the training compute is not known"
    if ladder.rungs[i].sign < 0 or row.improvement_percent is None:
        return "the metric is not a loss above zero"
    if row.diverged_seeds_arm or row.diverged_seeds_baseline:
        return "a run diverged, so there is no mean loss"
    return "runs are not pairs" if ladder.rungs[i].unpaired else ""


def _times_worse(rungs: Sequence[Rung], arm: str) -> int:
    return sum(row.arm == arm and row.kind is Verdict.WORSE for rung in rungs for row in rung.result.comparisons)


def _of_baseline(study: Study, column: str) -> float | None:
    rows = confirm_rows(study.trials)
    if column not in rows.columns:
        return None
    found = rows.loc[rows["arm"] == study.baseline, column].dropna()
    return float(found.median()) if len(found) else None
