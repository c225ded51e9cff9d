"""Improvement over training, and the trend of that improvement in the number of tokens."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from analysis.io.assemble import Study
from analysis.io.trials import confirm_rows
from analysis.stats import estimates, multiplicity, paired_tests
from analysis.verdict.checks import unfinished
from analysis.verdict.comparison import bounds

SCALES: dict[
    str, tuple[Callable[[np.ndarray], np.ndarray], str, str]
] = {  # axis of a slope: (function of the number of tokens, unit of the slope, key of the slope)
    "log2": (np.log2, "% per doubling of tokens", "slope_percent_per_doubling"),
    "linear": (lambda tokens: tokens / 1e6, "% per million tokens", "slope_percent_per_million"),
}
Pair = tuple[np.ndarray, ...]  # the curves of an arm and the baseline's, of the seeds and steps that both have
SLOPE_COLUMNS = {
    "arm": ("arm", ""),
    "n": ("n", "d"),
    "slope_percent_per_doubling": ("slope (% per doubling of tokens)", "+.4f"),
    "low": ("low", "+.4f"),
    "high": ("high", "+.4f"),
    "p": ("p", ".3g"),
    "p_adjusted": ("p adjusted", ".3g"),
    "why": ("the improvement", ""),
}


class Trend(StrEnum):
    """Change of an improvement over training that was tested, in words."""

    RISES = "rises with tokens"
    FALLS = "falls with tokens"
    NONE = "undecided"


def over_training(study: Study, pairs: Mapping[str, Pair] | None = None) -> dict[str, pd.DataFrame]:
    """For each arm: improvement on val_nll at every evaluation of the confirm runs, with Fieller's interval.

    Columns: step, tokens, n, improvement_percent, low, high. Pairs are those seeds whose runs are finite at
    that step. The points of one run depend on each other: the band holds at each step alone and no test is
    made along it. `pairs`: the study's `paired_curves`, if they are at hand.
    """
    out = {}
    for arm, (_, steps, tokens, b, a) in (paired_curves(study) if pairs is None else pairs).items():
        rows = []
        for j, step in enumerate(steps):
            keep = np.isfinite(b[:, j]) & np.isfinite(a[:, j])
            x, y = study.sign * b[keep, j], study.sign * a[keep, j]
            low, high = bounds(estimates.fieller(x, y, study.level, study.overlap), study.sign)
            value = estimates.improvement_percent(x, y)
            gains = (None if value is None else study.sign * value, low, high)
            rows.append((step, tokens[j], int(keep.sum()), *(np.nan if gain is None else gain for gain in gains)))
        out[arm] = pd.DataFrame(rows, columns=["step", "tokens", "n", "improvement_percent", "low", "high"])
    return out


def slopes(
    study: Study, after: float = 0.1, scale: str = "log2", pairs: Mapping[str, Pair] | None = None
) -> list[dict[str, Any]]:
    """Fit one slope of the improvement per seed, and test with a t test over seeds if the benefit grows with training.

    The slope is the least-squares line of 100 * (baseline - arm) / baseline. One run is one sample; its evaluations are
    not. Within a run the learning rate decays, so its early points do not stand for shorter runs.

    Args:
        study: The study.
        after: Fraction of training to leave out at the start (warm-up).
        scale: Axis of the slope: "log2" for log2(tokens), "linear" for millions of tokens.
        pairs: The study's `paired_curves`, if they are already computed.

    Returns:
        One row per arm; `values` has the slope of each seed. `p_adjusted` is corrected over the arms, as the study
        says, and decides the `trend`; it is None if there is no test. The interval `decision_low`, `decision_high`
        leaves out 0 exactly if a trend is shown. `why` has the trend, or the reason for no test.
    """
    axis, _, key = SCALES[scale]
    columns = [key if name == SCALES["log2"][2] else name for name in SLOPE_COLUMNS]
    rows = []
    for arm, (seeds, _, tokens, b, a) in (paired_curves(study) if pairs is None else pairs).items():
        late = tokens >= after * tokens.max()
        row: dict[str, Any] = dict.fromkeys(columns) | {"arm": arm, "n": 0, "values": {}, "trend": None}
        row |= {"decision_low": None, "decision_high": None}
        usable = np.isfinite(b[:, late]).all(axis=1) & np.isfinite(a[:, late]).all(axis=1)
        row["n"] = int(usable.sum())
        rows.append(row)
        if len(np.unique(tokens[late])) < 2 or not usable.any():
            row["why"] = "fewer than 2 evaluations, or no complete pair of curves"
            continue
        if study.own and not all(estimates.clearly_positive(study.sign * x, study.level) for x in b[usable][:, late].T):
            row["why"] = f"no percentage: the mean {study.own.name} of {study.baseline} is not clearly above zero"
            continue
        percent = study.sign * 100 * (1 - a[usable][:, late] / b[usable][:, late])
        per_seed = np.polyfit(axis(tokens[late]), percent.T, 1)[0]
        row[key] = float(per_seed.mean())
        row["values"] = {str(int(seed)): float(x) for seed, x in zip(seeds[usable], per_seed, strict=True)}
        if len(per_seed) < 2 or per_seed.std(ddof=1) <= max(1e-12, 1e-14 * np.abs(per_seed).max()):
            row["why"] = f"not testable (n={len(per_seed)}, or no spread between seeds)"
            continue
        row["p"] = paired_tests.paired_t(per_seed, study.overlap)[2]
        row["low"], row["high"] = paired_tests.mean_interval(per_seed, study.level, study.overlap)
        row["_per_seed"] = per_seed
    # an arm that cannot be tested enters the family with p = 1
    seen = [1.0 if row["p"] is None else row["p"] for row in rows]
    adjusted = multiplicity.adjust(seen, study.correction)
    levels = multiplicity.decision_levels(seen, study.correction, study.level)
    for row, p, level in zip(rows, adjusted, levels, strict=True):
        if row["p"] is not None:
            row["p_adjusted"] = p
            ends = paired_tests.mean_interval(row.pop("_per_seed"), level, study.overlap)
            row["decision_low"], row["decision_high"] = ends
            row["trend"] = Trend.NONE if p > study.level else Trend.RISES if row[key] > 0 else Trend.FALLS
            row["why"] = str(row["trend"]).replace("tokens", study.budget_unit)
    return rows


def confirm_curves(study: Study) -> pd.DataFrame:
    """Return the confirm curves. If arms stopped at different looks, only the seeds that all of them ran are there."""
    curves = study.curves[study.curves["stage"] == "confirm"] if len(study.curves) else study.curves
    if not study.races or not len(curves):
        return curves
    seeds = set.intersection(*(set(rows) for _, rows in curves.groupby("arm")["seed"]))
    return curves[curves["seed"].isin(seeds)] if seeds else curves


def paired_curves(study: Study) -> dict[str, Pair]:
    """Return arm -> (seeds, steps, tokens, baseline's losses, arm's losses), seeds down and common steps across.

    An unfinished study has none, because nothing is compared before its last trial has ended.
    """
    if not len(study.curves) or unfinished(study):
        return {}
    keys = [k for k in ("arm", "seed", "config_key") if k in study.curves.columns and k in study.trials.columns]
    chosen = confirm_rows(study.trials)[keys].drop_duplicates()
    curves = _at_equal_tokens(study.curves[study.curves["stage"] == "confirm"].merge(chosen, on=keys), study.baseline)
    tables = {
        str(arm): rows.pivot_table(index="seed", columns="step", values="val_nll", aggfunc="last")
        for arm, rows in curves.groupby("arm")
    }
    tokens = curves.groupby("step")["tokens"].max()
    out = {}
    for arm in study.arms:
        if arm == study.baseline or arm not in tables or study.baseline not in tables:
            continue
        b, a = tables[study.baseline], tables[arm]
        seeds, steps = b.index.intersection(a.index), b.columns.intersection(a.columns)
        steps = steps[tokens.loc[steps].to_numpy() > 0]  # before training there is nothing to compare
        if len(seeds) and len(steps):
            pick = [x.loc[seeds, steps].to_numpy(float) for x in (b, a)]
            out[arm] = (seeds.to_numpy(), steps.to_numpy(), tokens.loc[steps].to_numpy(float), *pick)
    return out


def _at_equal_tokens(curves: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return curves whose steps have the same tokens in every run.

    Arms may have chosen different batches. Then each run's loss is taken at the baseline's tokens, between its own
    evaluations by a straight line in log2(tokens), and at the end from its last evaluation.
    """
    if not len(curves) or (curves.groupby("step")["tokens"].nunique() <= 1).all():
        return curves
    points = curves[(curves["arm"] == baseline) & (curves["tokens"] > 0)].drop_duplicates("step").sort_values("step")
    at = np.log2(points["tokens"].to_numpy(float))
    out = []
    for _, run in curves[curves["tokens"] > 0].groupby([k for k in ("arm", "seed", "config_key") if k in curves]):
        run = run.sort_values("tokens")
        tokens = run["tokens"].to_numpy(float)
        losses = np.interp(at, np.log2(tokens), run["val_nll"].to_numpy(float), left=np.nan)
        losses[np.exp2(at) > tokens[-1] + tokens[0] / run["step"].iloc[0]] = (
            np.nan
        )  # the run ended a step or more before
        same = {k: run.iloc[0][k] for k in ("arm", "seed", "config_key") if k in curves}
        out.append(points[["step", "tokens"]].assign(val_nll=losses, **same))
    return pd.concat(out, ignore_index=True) if out else curves
