"""Find runs that end far from the others of their arm: if they are rare, the t test errs more often than its level."""

from dataclasses import dataclass

import numpy as np

from analysis.io.assemble import Study
from analysis.stats.outliers import far_off, far_residuals
from analysis.stats.pairs import pair
from analysis.verdict.family import Part
from analysis.verdict.kinds import PAIRED, Comparison

RARE = 0.02  # share of studies with normal noise that have such a warning, about, for each of the two checks


def mark(part: Part, size: int) -> None:
    """Set `odd_runs` of all rows: the confirm runs, and the calibration runs, that lie far from the rest.

    Confirm runs are judged by the differences. Calibration runs are judged by the noise that the differences show, or
    by that of the other arms at the same point if it is larger, as it is far from the optimum. A spike in a tenth of
    the runs is often missing among 8 confirm runs, and that is when the t test errs.

    Args:
        part: A study with its comparisons.
        size: Number of comparisons in the family.
    """
    level, study = RARE / max(1, size), part.study
    runs = _calibration(study)
    validation = study.losses("val_nll") if runs else None
    for row in part.rows:
        if row.p_t is None:
            continue
        row.odd_runs = _confirmed(row, part, level)
        if validation is not None:
            pairs = pair(validation, row.baseline, row.arm)
            d = pairs.differences[pairs.complete]
            sd = float(d.std(ddof=1)) if len(d) > 2 else 0.0
            for arm in (row.baseline, row.arm):
                mine = [run for run in runs if run.arm == arm]
                relative = np.array([run.residual / max(sd, run.elsewhere) if sd else 0.0 for run in mine])
                far = [f"{arm} {mine[i].name}" for i in far_residuals(relative, 1.0, len(d) - 1, level)]
                row.odd_runs += dict.fromkeys(far)  # a seed may be far off at several points


@dataclass(frozen=True)
class _Run:
    # a calibration run: its residual, and the other arms' root mean square residual at the same point, both in nats
    # and divided by their factor of a run's standard deviation
    arm: str
    name: str
    residual: float
    elsewhere: float


def _confirmed(row: Comparison, part: Part, level: float) -> list[str]:
    if row.p_worst_rank is not None:  # ranks bound what one run can do
        return []
    if row.of_table and row.of_table.test != PAIRED:
        found = []
        for arm in (row.baseline, row.arm):
            runs = part.losses[arm].dropna()
            found += [f"{arm} seed {int(runs.index[i])}" for i in far_off(runs.to_numpy(float), level)]
        return found
    pairs = part.paired[row.baseline, row.arm]
    return [f"seed {pairs.seeds[i]}" for i in far_off(pairs.differences, level)]


def _calibration(study: Study) -> list[_Run]:
    # residuals after the mean of each arm's point and the median of each seed
    trials = study.trials
    grid = trials[(trials["stage"] == "calibrate") & (trials["outcome"] == "completed")]
    names = [name for name in study.settings.get("nuisance") or {} if name in grid.columns and grid[name].notna().all()]
    if not len(grid) or not names or "val_nll" not in grid.columns:
        return []
    point = grid[names].astype(float).apply(lambda row: " ".join(f"{x:.6g}" for x in row), axis=1)
    table = grid.assign(_point=point).pivot_table("val_nll", ["arm", "_point"], "seed", aggfunc="last").dropna()
    losses, seeds = table.to_numpy(float), [int(seed) for seed in table.columns]
    if len(losses) < 3 or len(seeds) < 2 or not np.isfinite(losses).all():
        return []
    left = losses - losses.mean(axis=1, keepdims=True)
    left = (left - np.median(left, axis=0)) / np.sqrt(1 - 1 / len(seeds))
    arms, points = (table.index.get_level_values(name).to_numpy() for name in ("arm", "_point"))
    out = []
    for arm, at, row in zip(arms, points, left, strict=True):
        others = left[(points == at) & (arms != arm)]
        elsewhere = float(np.sqrt(np.mean(others**2))) if others.size else 0.0
        # with two seeds the residuals are equal and opposite: the run that ended higher is named
        places = [int(np.argmax(row))] if len(seeds) == 2 else range(len(seeds))
        out += [_Run(str(arm), f"calibrate seed {seeds[i]}", float(row[i]), elsewhere) for i in places]
    return out
