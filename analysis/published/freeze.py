"""Write the study file that tests learned alphas from scratch: `pagating freeze STUDY --arm ARM > new.yaml`.

The new study has the baseline, the floor, the arm that learned its alphas, and an arm whose alpha is fixed to the
learned ones: their mean over the confirm seeds, one per layer. All four are tuned again on one grid around the rates
that the first study confirmed, because the frozen arm has no rate of its own yet. The new confirm seeds begin after
those on which the alphas were learned.
"""

import argparse
from typing import Any

import numpy as np
import yaml

from analysis.describe import alphas
from analysis.io import command
from analysis.io.assemble import Study
from analysis.io.files import TableError
from analysis.io.names import RUNGS_APART, SEEDS_APART
from analysis.io.trials import confirm_rows

RANGE = (-10.0, 10.0)  # allowed values of a layer's fixed alpha in a study
SPREAD = 1.5  # the search draws its rates within this factor of the confirmed ones
KEPT = ("corpus", "tokenizer", "model", "fixed")


def pattern(study: Study, arm: str) -> list[float]:
    """Return the learned alphas of an arm at the last step, one per layer: the mean over confirm seeds, to four digits.

    Raises TableError if the arm learned no alpha, or one lies outside [-10, 10].
    """
    if arm not in study.arms:
        raise TableError(f"--arm {arm}: is not an arm of {study.name}; allowed: {', '.join(study.arms)}")
    rows = [row for row in alphas.by_layer(study) if row["arm"] == arm]
    if not rows:
        learn = dict.fromkeys(row["arm"] for row in alphas.by_layer(study))
        raise TableError(f"--arm {arm}: learned no alpha; allowed: {', '.join(learn) or 'none in this study'}")
    for row in rows:
        if not RANGE[0] <= row["mean"] <= RANGE[1]:
            raise TableError(f"--arm {arm}: alpha of layer {row['layer']} is {row['mean']:.4g}; allowed: in [-10, 10]")
    return [round(float(row["mean"]), 4) for row in rows]


def follow_up(study: Study, arm: str, seeds: int | None = None) -> dict[str, Any]:
    """Return the settings of the study that compares the frozen alphas with the baseline.

    Args:
        study: The study in which the arm learned its alphas.
        arm: The arm.
        seeds: Number of confirm seeds; None keeps that of the study.

    Raises:
        TableError: If the arm has no gate, or `pattern` refuses its alphas.
    """
    frozen, options = pattern(study, arm), study.settings["arms"][arm]
    if options.get("gate") is None:
        raise TableError(
            f"--arm {arm}: has no gate to freeze (unit {options.get('unit')}); allowed: an arm with a gate"
        )
    confirmed = confirm_rows(study.trials)
    runs = [name for name in (study.baseline, study.floor, arm) if name is not None]
    rates = [float(confirmed.loc[confirmed["arm"] == name, "lr"].iloc[0]) for name in runs]
    unit = {key: options[key] for key in ("gate", "base", "form") if key in options}
    arms = {name: study.settings["arms"][name] for name in runs} | {f"{arm}-frozen": unit | {"alpha": frozen}}
    confirm = (study.settings.get("confirm") or {}) | ({} if seeds is None else {"seeds": seeds})
    if study.ladder:  # the new study has one size, and the whole level
        confirm["level"] = study.ladder.level
    replicate = study.settings.get("replicate") or 0
    apart = SEEDS_APART * replicate + RUNGS_APART * ((study.rung or 1) - 1)
    return {
        "name": f"{study.name}-frozen",
        "question": f"Does the pattern that {arm} learned in {study.name}, frozen from the start, lower the loss "
        f"against an equally tuned {study.baseline}?",
        **{key: study.settings[key] for key in KEPT if key in study.settings},
        "nuisance": {"lr": {"loguniform": [_round(min(rates) / SPREAD), _round(max(rates) * SPREAD)]}},
        "arms": arms,
        "search": {"trials_per_arm": 2},
        "calibrate": study.settings.get("calibrate") or {},
        **({"replicate": replicate} if replicate else {}),
        "confirm": {**confirm, "first_seed": int(np.max(confirmed["seed"])) + 1 - apart},
    }


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")


def parser(prog: str) -> argparse.ArgumentParser:
    """Make the parser of the options of the command `prog`."""
    p = command.parser(prog, __doc__, tables=False)
    p.add_argument("--arm", required=True, help="the arm whose learned alphas are frozen")
    p.add_argument("--seeds", type=int, help="confirm seeds of the new study (default: as many as before)")
    return p


def main(argv: list[str] | None = None, prog: str = "python -m analysis.freeze") -> int:
    """Run the script; return the exit code."""
    options = parser(prog).parse_args(argv)
    study = command.study(options)
    settings = follow_up(study, options.arm, options.seeds)
    print(f"# The alphas of {options.arm} in {study.name}, mean over its confirm seeds, frozen. pagating freeze")
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
    return 0
