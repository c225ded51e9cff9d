"""Tables of the shared learning-rate grid: each arm's optimum, and all arms at equal learning rate."""

from typing import Any

import numpy as np

from analysis.io.assemble import Study
from analysis.io.formats import Columns
from analysis.io.trials import confirm_rows
from analysis.stats import estimates
from analysis.stats.optimum import optima
from analysis.verdict.checks import edge_hits

COLUMNS: Columns = {
    "arm": ("arm", ""),
    "points": ("points", "d"),
    "infeasible": ("infeasible runs", "d"),
    "grid_best": ("grid's best", ".4g"),
    "own": ("optimum of the fit", ".4g"),
    "fitted": ("read with the other arms", ".4g"),
    "chosen": ("confirmed", ".4g"),
    "standard_error": ("standard error of a point (nats)", ".4f"),
    "at_edge": ("at an end of the grid", ""),
}


def optimum_rows(study: Study) -> list[dict[str, Any]]:
    """Tabulate, per arm, the learning rate with the lowest mean val_nll, the fitted one and the confirmed one."""
    if not {"lr", "val_nll"} <= set(study.trials.columns):
        return []
    grid = study.trials[(study.trials["stage"] == "calibrate") & study.trials["lr"].notna()]
    grid = grid[grid["outcome"] != "failed"]
    loss = grid["val_nll"].astype(float)
    finite = (grid["outcome"] == "completed") & np.isfinite(loss)
    grid = grid.assign(_loss=loss.where(finite, np.inf))
    tables = {
        arm: grid[grid["arm"] == arm].pivot_table(index="lr", columns="seed", values="_loss", aggfunc="mean")
        for arm in study.arms
    }
    tables = {arm: table.dropna() for arm, table in tables.items()}  # leave out a rate that lacks a seed
    confirmed, hits = confirm_rows(study.trials), edge_hits(study)
    rows = []
    for arm, table in tables.items():
        losses = table.to_numpy(float)
        if not len(losses) or not np.isfinite(losses).all(1).any():
            continue
        rates = sorted({*table.index})
        same = {a: t.to_numpy(float) for a, t in tables.items() if list(t.index) == rates and t.shape == table.shape}
        same = {a: t for a, t in same.items() if np.isfinite(t).all(1).any()}
        found = optima(rates, same)[arm]
        chosen = confirmed.loc[confirmed["arm"] == arm, "lr"].dropna()
        rows.append(
            {
                "arm": arm,
                "points": len(rates),
                "infeasible": int(np.isinf(losses).sum()),
                "grid_best": found.grid_best,
                "own": found.own,
                "fitted": found.fitted,
                "chosen": float(chosen.iloc[0]) if len(chosen) else None,
                "standard_error": found.standard_error,
                "at_edge": "yes" if arm in hits else "no",
            }
        )
    return rows


def pivot(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Columns]:
    """Reshape rows of `at_grid`: one row per arm, one column per learning rate, improvement in percent [interval]."""
    rates = sorted({row["lr"] for row in rows})
    columns: Columns = {"arm": ("arm", "")} | {f"{lr:.9g}": (f"{lr:.3g}", "s") for lr in rates}
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        value, low, high = (row[key] for key in ("improvement_percent", "improvement_low", "improvement_high"))
        text = "-" if value is None else f"{value:+.2f}%"
        text += "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
        out.setdefault(row["arm"], {"arm": row["arm"]})[f"{row['lr']:.9g}"] = text
    return list(out.values()), columns


GRID_COLUMNS = {
    "lr": ("learning rate", ".3g"),
    "arm": ("arm", ""),
    "n": ("n", "d"),
    "improvement_percent": ("improvement %", "+.3f"),
    "improvement_low": ("low", "+.3f"),
    "improvement_high": ("high", "+.3f"),
    "infeasible": ("infeasible", "d"),
}


def at_grid(study: Study) -> list[dict[str, Any]]:
    """Compute the improvement on val_nll at every learning rate that arm and baseline share, on the selection seeds.

    The table describes and tests nothing, because these seeds chose the learning rates.
    """
    if not {"lr", "val_nll"} <= set(study.trials.columns):
        return []
    grid = study.trials[(study.trials["stage"] == "calibrate") & study.trials["lr"].notna()]
    grid = grid[grid["outcome"] != "failed"]
    finite = (grid["outcome"] == "completed") & np.isfinite(grid["val_nll"].astype(float))
    grid = grid.assign(_lr=[float(f"{x:.9e}") for x in grid["lr"]], _loss=grid["val_nll"].where(finite, np.inf))
    rows = []
    for lr, points in grid.groupby("_lr"):
        table = points.pivot_table(index="seed", columns="arm", values="_loss", aggfunc="mean")
        for arm in study.arms:
            if arm == study.baseline or not {arm, study.baseline} <= set(table.columns):
                continue
            both = table[[study.baseline, arm]].dropna().to_numpy(float)
            keep = np.isfinite(both).all(axis=1)
            b, a = both[keep].T
            interval = estimates.fieller(b, a, study.level)
            low, high = interval if interval else (None, None)
            rows.append(
                {
                    "lr": float(str(lr)),
                    "arm": arm,
                    "n": int(keep.sum()),
                    "improvement_percent": estimates.improvement_percent(b, a),
                    "improvement_low": low,
                    "improvement_high": high,
                    "infeasible": int((~keep).sum()),
                }
            )
    return rows
