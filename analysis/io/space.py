"""The hyperparameters that an arm's search tuned, read from the study file, and the trials that this makes."""

import math
import re
from typing import Any

from analysis.io.assemble import Study


def searched(study: Study, arm: str) -> dict[str, dict[str, Any]]:
    """Return hyperparameter -> its range in the study file, for those that the arm's search tuned."""
    found = dict(study.settings.get("nuisance") or {})
    alpha = (study.settings.get("arms") or {}).get(arm) or {}
    alpha = alpha.get("alpha") if isinstance(alpha, dict) else None
    if isinstance(alpha, dict) and alpha.get("search"):
        layers = [name for name in study.trials.columns if re.fullmatch(r"alpha_\d+", str(name))]
        names = layers if alpha["search"].get("per") == "layer" else ["alpha"]
        found |= dict.fromkeys(names, alpha["search"])
    trained = (alpha.get("learnable") or alpha.get("token")) if isinstance(alpha, dict) else None
    if isinstance(trained, dict) and isinstance(trained.get("lr_multiplier"), dict):
        found["alpha_lr_multiplier"] = trained["lr_multiplier"]
    return {name: where for name, where in found.items() if name in study.trials.columns}


def search_trials(study: Study, arm: str) -> int | None:
    """Return the number of search trials of an arm: `trials_per_arm`, or fewer if its choices have fewer combinations.

    Returns None without a study file.
    """
    asked = (study.settings.get("search") or {}).get("trials_per_arm")
    choices: list[list[float]] = [where.get("choice") or [] for where in searched(study, arm).values()]
    if not asked or not choices or not all(choices):
        return int(asked) if asked else None
    points: int = math.prod(len(set(values)) for values in choices)
    return min(int(asked), points)
