"""Tables of the shared grids: each arm's optimum of each hyperparameter, and all arms at equal values of the first."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.io.assemble import Study
from analysis.io.formats import Columns
from analysis.io.trials import confirm_rows
from analysis.stats import estimates
from analysis.stats.optimum import Bracket, Optimum, optima, variance
from analysis.stats.scale import Scale
from analysis.verdict.checks import edge_hits
from analysis.verdict.comparison import bounds
from analysis.verdict.grids import grid_rows, grids, unbracketed
from analysis.verdict.words import called

COLUMNS: Columns = {
    "nuisance": ("hyperparameter", ""),
    "arm": ("arm", ""),
    "points": ("points", "d"),
    "infeasible": ("infeasible runs", "d"),
    "grid_best": ("grid's best", ".4g"),
    "own": ("optimum of the fit", ".4g"),
    "fitted": ("read with the other arms", ".4g"),
    "chosen": ("confirmed", ".4g"),
    "standard_error": ("standard error of a point (nats)", ".4f"),
    "at_edge": ("at an end of the grid", ""),
    "bracketed": ("between finite points", ""),
}


def columns(rows: list[dict[str, Any]]) -> Columns:
    """Return the columns of `optimum_rows` that have something to tell: without those of one kind only."""
    left_out = {"nuisance"} if len({row["nuisance"] for row in rows}) < 2 else set()
    if all(row["bracketed"] == "yes" or row["at_edge"] == "yes" for row in rows):
        left_out.add("bracketed")
    return {name: column for name, column in COLUMNS.items() if name not in left_out}


def optimum_rows(study: Study) -> list[dict[str, Any]]:
    """Tabulate, per hyperparameter and arm, the value of lowest mean val_nll, the fitted and the confirmed one."""
    confirmed, hits, open_sides = confirm_rows(study.trials), edge_hits(study), unbracketed(study)
    rows = []
    for name, grid in grids(study).items():
        for arm, table in grid.losses.items():
            losses = table.to_numpy(float)
            if not len(losses) or not np.isfinite(losses).all(1).any():
                continue
            values = sorted({*table.index})
            same = {a: t.to_numpy(float) for a, t in grid.losses.items() if list(t.index) == values}
            same = {a: t for a, t in same.items() if t.shape == table.shape and np.isfinite(t).all(1).any()}
            found = _optimum(grid.scale, values, same, arm)
            chosen = confirmed.loc[confirmed["arm"] == arm, name].dropna()
            known = found.standard_error > 0 or any(variance(t) is not None for t in same.values())
            why = open_sides.get(arm, {}).get(name)
            edge = arm in hits if name == "lr" else why == Bracket.END
            rows.append(
                {
                    "nuisance": name,
                    "arm": arm,
                    "points": len(values),
                    "infeasible": int(np.isinf(losses).sum()),
                    "grid_best": found.grid_best,
                    "own": found.own,
                    "fitted": found.fitted,
                    "chosen": float(chosen.iloc[0]) if len(chosen) else None,
                    "standard_error": found.standard_error if known else None,
                    "at_edge": "yes" if edge else "no",
                    "bracketed": "yes" if why is None else f"no: {why}",
                }
            )
    return rows


def _optimum(scale: Scale, values: list[float], losses: Mapping[str, np.ndarray], arm: str) -> Optimum:
    """Return an arm's optimum of one grid, as calibrate finds it. Learning rates need no change of scale."""
    if scale.name == "lr":
        return optima(values, losses)[arm]
    centre = scale.to(values[0])
    found = optima([math.exp((scale.to(value) - centre) / scale.step) for value in values], losses)[arm]

    def back(at: float | None) -> float | None:
        return None if at is None else scale.value(centre + scale.step * math.log(at))

    best = values[int(losses[arm].mean(1).argmin())]
    return replace(found, grid_best=best, own=back(found.own), fitted=back(found.fitted))


def pivot(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Columns]:
    """Reshape rows of `at_grid`: one row per arm, one column per value, improvement in percent [interval]."""
    name = next((key for key in rows[0]), "") if rows else ""
    values = sorted({row[name] for row in rows})
    columns: Columns = {"arm": ("arm", "")} | {f"{value:.9g}": (f"{value:.3g}", "s") for value in values}
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        value, low, high = (row[key] for key in ("improvement_percent", "improvement_low", "improvement_high"))
        text = "-" if value is None else f"{value:+.2f}%"
        text += "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
        out.setdefault(row["arm"], {"arm": row["arm"]})[f"{row[name]:.9g}"] = text
    return list(out.values()), columns


GRID_COLUMNS: Columns = {
    "arm": ("arm", ""),
    "n": ("n", "d"),
    "improvement_percent": ("improvement %", "+.3f"),
    "improvement_low": ("low", "+.3f"),
    "improvement_high": ("high", "+.3f"),
    "infeasible": ("infeasible", "d"),
}


def grid_columns(study: Study) -> Columns:
    """Return the columns of `at_grid`."""
    return {str(study.first): (called(str(study.first)), ".3g"), **GRID_COLUMNS}


def at_grid(study: Study) -> list[dict[str, Any]]:
    """Compute the improvement on val_nll at every value of the first hyperparameter that arm and baseline share.

    It is that of the selection seeds. The table describes and tests nothing, because these seeds chose the values.
    """
    grid = grid_rows(study, study.first)
    if not len(grid):
        return []
    grid = grid.assign(_at=[float(f"{x:.9e}") for x in grid[study.first]])
    rows = []
    for value_of_first, points in grid.groupby("_at"):
        table = points.pivot_table(index="seed", columns="arm", values="_loss", aggfunc="mean")
        for arm in study.arms:
            if arm == study.baseline or not {arm, study.baseline} <= set(table.columns):
                continue
            both = table[[study.baseline, arm]].dropna().to_numpy(float)
            keep = np.isfinite(both).all(axis=1)
            b, a = study.sign * both[keep].T
            low, high = bounds(estimates.fieller(b, a, study.level, study.overlap), study.sign)
            value = estimates.improvement_percent(b, a)
            rows.append(
                {
                    str(study.first): float(str(value_of_first)),
                    "arm": arm,
                    "n": int(keep.sum()),
                    "improvement_percent": None if value is None else study.sign * value,
                    "improvement_low": low,
                    "improvement_high": high,
                    "infeasible": int((~keep).sum()),
                }
            )
    return rows
