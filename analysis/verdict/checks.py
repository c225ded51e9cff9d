"""Assay sensitivity: the linear floor must lose, or the regime cannot tell arms apart and no verdict on them holds."""

from typing import Any

import numpy as np

from analysis.io.study import Study, confirm_rows

STRONG_GAP = 3.0  # percent: a regime that means to rank arms separates the linear floor by this much
CANNOT_TELL = "not testable: this regime cannot tell a linear MLP from GELU"


def assay(rows: list[dict[str, Any]], study: Study) -> dict[str, Any]:
    """The gap of the floor to the baseline in percent with its interval; `testable` where that lies above zero."""
    keys = ("floor", "baseline", "gap_percent", "gap_low", "gap_high", "n", "p", "testable", "why", "strong")
    out: dict[str, Any] = dict.fromkeys(keys) | {
        "floor": study.floor,
        "baseline": study.baseline,
        "strong": False,
    }
    row = next((r for r in rows if r["arm"] == study.floor), None)
    if row is None:
        return out | {"why": "no floor arm is declared, so assay sensitivity is unknown"}
    gap, low, high = (
        None if row[key] is None else -row[key]
        for key in ("improvement_percent", "improvement_high", "improvement_low")
    )
    out |= {"gap_percent": gap, "gap_low": low, "gap_high": high, "n": row["n"], "p": row["p_t"]}
    out["testable"] = low is not None and low > 0
    out["strong"] = bool(out["testable"] and gap is not None and gap >= STRONG_GAP)
    if gap is None or low is None:
        why = f"the gap between {study.floor} and {study.baseline} has no interval: {row['why']}"
    else:
        span = f"{gap:+.2f}% [{low:+.2f}, {high:+.2f}]"
        why = f"{study.floor} is {span} worse than {study.baseline} (n = {row['n']})"
        if not out["testable"]:
            why += ", not clearly above zero"
        elif not out["strong"]:
            why += f", below the {STRONG_GAP:g}% that ranking arms asks for"
    return out | {"why": why}


def edge_hits(study: Study) -> list[str]:
    """Arms whose confirmed learning rate is an end of the calibration grid: a better one may lie outside."""
    if "lr" not in study.trials.columns:
        return []
    grid = study.trials[(study.trials["stage"] == "calibrate") & study.trials["lr"].notna()]
    confirm = confirm_rows(study.trials)
    hits = []
    for arm in study.arms:
        points = np.unique(grid.loc[grid["arm"] == arm, "lr"].to_numpy(float))
        chosen = confirm.loc[confirm["arm"] == arm, "lr"].dropna().unique()
        if len(points) and any(np.isclose(lr, e, rtol=1e-6) for lr in chosen for e in (points[0], points[-1])):
            hits.append(arm)
    return hits
