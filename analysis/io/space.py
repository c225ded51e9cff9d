"""The hyperparameters that an arm's search tuned, by the study file, its number of trials and the chosen values."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from analysis.io.assemble import Study
from analysis.io.formats import Columns
from analysis.io.names import STAGES
from analysis.io.trials import confirm_rows


def searched(study: Study, arm: str) -> dict[str, dict[str, Any]]:
    """Return hyperparameter -> its range in the study file, for those that the arm's search tuned."""
    found = dict(study.settings.get("nuisance") or {})
    options = (study.settings.get("arms") or {}).get(arm) or {}
    alpha = options.get("alpha") if isinstance(options, dict) else None
    if isinstance(alpha, dict) and alpha.get("search"):
        layers = [name for name in study.trials.columns if re.fullmatch(r"alpha_\d+", str(name))]
        names = layers if alpha["search"].get("per") == "layer" else ["alpha"]
        found |= dict.fromkeys(names, alpha["search"])
    trained = (alpha.get("learnable") or alpha.get("token")) if isinstance(alpha, dict) else None
    if isinstance(trained, dict) and isinstance(trained.get("lr_multiplier"), dict):
        found["alpha_lr_multiplier"] = trained["lr_multiplier"]
    for each in (options.get("of"), arm) if study.own and isinstance(options, dict) else ():
        found |= ((study.settings["arms"].get(each) or {}).get("search") or {}) if each else {}
    return {name: where for name, where in found.items() if name in study.trials.columns}


def search_trials(study: Study, arm: str) -> int | None:
    """Return the number of search trials of an arm: `trials_per_arm`, or fewer if its choices have fewer combinations.

    Returns None without a study file, and 0 if the arm has no search.
    """
    search, space = study.settings.get("search") or {}, searched(study, arm)
    if "search" not in (study.settings.get("stages") or STAGES):
        return 0
    if search.get("arms") == "own" and not space.keys() - (study.settings.get("nuisance") or {}).keys():
        return 0
    asked = search.get("trials_per_arm")
    choices: list[list[float]] = [where.get("choice") or [] for where in space.values()]
    if not asked or not (choices or study.own) or not all(choices):
        return int(asked) if asked else None
    points: int = math.prod(len(set(values)) for values in choices)
    return min(int(asked), points)


def chosen_values(study: Study) -> dict[str, dict[str, float]]:
    """Return the values of its searched hyperparameters that each arm was given, by arm.

    They are those of its confirm runs. Without a confirm stage they are those of its best search trial, which has no
    calibrated value to show if a calibrate stage chose another one.
    """
    found: dict[str, dict[str, float]] = {}
    confirm, trials = confirm_rows(study.trials), study.trials
    calibrated = not study.confirms and (trials["stage"] == "calibrate").any()
    others = {study.first, *(trials["axis"].dropna() if "axis" in trials.columns else ())} if calibrated else set()
    for arm in study.arms if study.settings.get("arms") else ():
        rows = confirm[confirm["arm"] == arm]
        if not study.confirms and "val_nll" in trials.columns:
            done = (trials["stage"] == "search") & (trials["arm"] == arm) & (trials["outcome"] == "completed")
            rows = trials[done].sort_values("val_nll", kind="stable")
        names = [name for name in searched(study, arm) if name not in others]
        if len(rows):
            row = rows.iloc[0]
            found[arm] = {name: float(row[name]) for name in names if pd.notna(row[name])}
    return found


def chosen_rows(chosen: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return the chosen values as rows of a table, one per arm."""
    return [{"arm": arm, **values} for arm, values in chosen.items()]


def chosen_columns(rows: Iterable[Mapping[str, Any]]) -> Columns:
    """Return the columns of `chosen_rows`: the arm, then each hyperparameter that any arm searched."""
    names = dict.fromkeys(name for row in rows for name in row if name != "arm")
    return {"arm": ("arm", ""), **{name: (name, ".4g") for name in names}}
