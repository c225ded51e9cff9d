"""The grids of the calibrate stage in a study's table, and the arms whose optimum they do not bracket."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.io.assemble import Study
from analysis.io.names import STAGES
from analysis.stats.optimum import Bracket, bracket, enclosed
from analysis.stats.scale import Scale, batch_limits, calibrated, scale_of

SPACING = 2.0  # of learning rates, without a study file


@dataclass(frozen=True)
class Grid:
    """The grid of one hyperparameter: its scale, and the losses of each arm, values x seeds, infinite if infeasible."""

    scale: Scale
    losses: dict[str, pd.DataFrame]


def ranges(study: Study) -> dict[str, dict[str, list[float]]]:
    """Return the search range of each nuisance hyperparameter of the study file, without missing keys."""
    found = study.settings.get("nuisance") or {}
    return {name: {kind: values for kind, values in where.items() if values} for name, where in found.items()}


def grid_rows(study: Study, name: str | None) -> pd.DataFrame:
    """Return the calibrate trials of the grid of a hyperparameter, without those that the machine failed.

    They have their loss in `_loss`, infinite if they were infeasible. A trial that two grids share has one row.
    """
    trials = study.trials
    if not {name, "val_nll"} <= set(trials.columns):
        return trials.iloc[:0].assign(_loss=[])
    rows = trials[(trials["stage"] == "calibrate") & trials[name].notna() & (trials["outcome"] != "failed")]
    loss = rows["val_nll"].astype(float)
    rows = rows.assign(_loss=loss.where((rows["outcome"] == "completed") & np.isfinite(loss), np.inf))
    if "axis" not in rows.columns:
        return rows if name == study.first else rows.iloc[:0]
    values = rows.loc[rows["axis"] == name, name].unique()
    order = calibrated(ranges(study))
    others = [other for other in order if other != name and other in rows.columns]
    before = order[: order.index(name)] if name in order else []  # a point that both grids have is in the first one
    keep = pd.Series(False, index=rows.index)
    for _, mine in rows.groupby("arm"):
        own = mine[mine["axis"] == name]
        if len(own):
            beside = (mine[others] == own.iloc[0][others]).all(axis=1)
            shared = mine.loc[beside & mine["axis"].isin(before), name]
            keep[mine.index[beside & mine[name].isin([*values, *shared])]] = True
    return rows[keep]


def grids(study: Study) -> dict[str, Grid]:
    """Return the grid of each hyperparameter that was calibrated, `study.first` first."""
    given = ({} if study.own else {"lr": {"loguniform": [1e-4, 1e-2]}}) | ranges(study)
    spacing = (study.settings.get("calibrate") or {}).get("spacing") or SPACING
    settings = study.settings
    own = study.own is not None
    batch = batch_limits(settings["model"], settings["fixed"]) if "batch_tokens" in given and not own else None
    found = {}
    for name in calibrated(given):
        rows = grid_rows(study, name)
        if len(rows):
            tables = {
                arm: rows[rows["arm"] == arm].pivot_table(index=name, columns="seed", values="_loss", aggfunc="mean")
                for arm in study.arms
            }
            # a value that lacks a seed is left out
            losses = {arm: table.dropna() for arm, table in tables.items()}
            found[name] = Grid(scale_of(name, given[name], spacing, batch, own), losses)
    return found


def unbracketed(study: Study) -> dict[str, dict[str, str]]:
    """Return, by arm and hyperparameter, why a grid's best point or the chosen value is not between finite ones."""
    out: dict[str, dict[str, str]] = {}
    joint = "axis" in study.trials.columns and study.trials["axis"].eq("corners").any()
    for name, grid in grids(study).items():
        for arm, table in grid.losses.items():
            if not len(table):
                continue
            values = [float(value) for value in table.index]
            ends = (grid.scale.is_end(values[0], -1), grid.scale.is_end(values[-1], 1))
            why = bracket(table.mean(axis=1).to_numpy(float).tolist(), ends)
            if joint and why is Bracket.CLOSED:
                why = _enclosed(study, arm, grid.scale)
            if why is not Bracket.CLOSED:
                out.setdefault(arm, {})[name] = str(why)
    return out


def _enclosed(study: Study, arm: str, scale: Scale) -> Bracket:
    rows = study.trials[study.trials["arm"] == arm]
    chosen, points = rows.loc[rows["stage"] == "confirm", scale.name].dropna(), rows[rows["stage"] == "calibrate"]
    infeasible = points.loc[points["outcome"] != "completed", "config_key"]
    tried = points.loc[~points["config_key"].isin(infeasible), scale.name]
    return enclosed(float(chosen.iloc[0]), tried, scale) if len(chosen) and len(tried) else Bracket.CLOSED


def uncalibrated(study: Study) -> list[str]:
    """Return the nuisance hyperparameters that were searched but not calibrated, in the order of the study file.

    Return none for a table of confirm trials alone, which does not show how their values were found.
    """
    if not study.confirms or set(study.trials["stage"]) <= {"confirm"}:
        return []
    several = [name for name, where in ranges(study).items() if len(set(next(iter(where.values()), []))) > 1]
    done = {*grids(study), *([study.first] if "calibrate" in (study.settings.get("stages") or STAGES) else [])}
    return [name for name in several if name not in done]
