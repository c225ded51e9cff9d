"""The words of a verdict: its sentence, the reason of each row and its caveats."""

from __future__ import annotations

from typing import Any

from analysis.io.study import Study
from analysis.verdict.checks import CANNOT_TELL

CLAIM_SEEDS = 8  # fewer seeds are no claim


def summary(rows: list[dict[str, Any]], study: Study) -> str:
    """The verdict in one sentence."""
    head, parts, warning = summary_parts(rows, study)
    return head + (" " + "; ".join(parts) + "." if parts else "") + (f" {warning}" if warning else "")


def summary_parts(rows: list[dict[str, Any]], study: Study) -> tuple[str, list[str], str]:
    """What `summary` is made of: how it begins (all of it where there are no parts), a part an arm, a warning."""
    rows = [r for r in rows if r["arm"] != study.floor] or rows
    if not rows:
        return "No treatment runs: there is nothing to compare with the baseline.", [], ""
    if all(r["verdict"] == CANNOT_TELL for r in rows):
        return f"N{CANNOT_TELL[1:]} ({study.floor} against {study.baseline}).", [], ""
    parts = []
    for row in rows:
        value = row["improvement_percent"]
        number = "" if value is None else f" ({value:+.2f}%{_interval(row)}, n = {row['n']})"
        parts.append(f"{row['arm']}: {row['verdict']}{number}")
    edges = dict.fromkeys(arm for row in rows for arm in row["at_edge"])
    warning = f"Warning: the learning rate of {', '.join(edges)} is an end of the grid." if edges else ""
    return f"Against {study.baseline}, on {study.metric}:", parts, warning


def concluded(result: dict[str, Any]) -> bool:
    """Whether at least one arm could be tested (the exit code is 1 where none could)."""
    return any(not str(row["verdict"]).startswith("not testable") for row in _arms(result))


def _arms(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = result["comparisons"]
    return [r for r in rows if r["arm"] != result["floor"]] or rows


def _interval(row: dict[str, Any]) -> str:
    if row["improvement_low"] is None:
        return ""
    return f" [{row['improvement_low']:+.2f}, {row['improvement_high']:+.2f}]"


def _why_refused(row: dict[str, Any]) -> str:
    if row["verdict"] == "identical":
        return "every difference is exactly 0, so there is no interval, no t and no p of the t test"
    text = str(row["verdict"]).removeprefix("not testable (").removesuffix(")")
    return f"{text}: no interval and no p"


def _margin_text(study: Study) -> str:
    return study.margin.strip() if isinstance(study.margin, str) else f"{study.margin:g} nats"


def _next_look(row: dict[str, Any], study: Study) -> str:
    if not study.looks:
        return ""
    seen = row["path"][-1]["n"] if row["path"] else 0
    later = [n for n in study.looks if n > seen]
    return f"its next look is at {later[0]} seeds" if later else f"the cap of {study.looks[-1]} seeds is reached"


def _more_seeds(row: dict[str, Any]) -> str:
    total = row["seeds_needed"]
    if total is None:
        return "more than 10000 more seeds"
    more = max(1, total - row["n"])
    return f"about {more} more seed{'s' if more > 1 else ''}"


def _caveats(row: dict[str, Any], study: Study) -> list[str]:
    notes = [_rule_note(row, study)] if row["path"] else []
    if row["at_edge"]:
        arms = " and ".join(row["at_edge"])
        notes.append(f"the learning rate of {arms} is an end of the calibration grid: a better one may lie outside")
    for arm, key in ((row["baseline"], "dropped_seeds_baseline"), (row["arm"], "dropped_seeds_arm")):
        if row[key] and row["n"]:
            notes.append(f"seeds {_listed(row[key])} of {arm} have no partner and are left out")
    for arm, key in ((row["baseline"], "diverged_seeds_baseline"), (row["arm"], "diverged_seeds_arm")):
        if row[key]:
            notes.append(f"{arm} diverged on seed{'s' if len(row[key]) > 1 else ''} {_listed(row[key])}")
    if row["p_worst_rank"] is not None:
        complete = "" if row["p_t"] is None else f"; t, p_t, d_z and interval (p_t = {row['p_t']:.3g})"
        notes.append(
            f"intention to treat decides: worst-rank p = {row['p_worst_rank']:.3g}, "
            f"sign test p = {row['p_sign_test']:.3g} over all {row['n']} pairs"
            f"{complete or '; the mean-based numbers'} are of the {row['complete_pairs']} complete pairs only"
        )
        if row["n"] < 6:
            notes.append(f"the worst-rank test cannot reach 0.05 with n = {row['n']}")
    failed = _failed(study, row["arm"], row["baseline"])
    if failed:
        notes.append(f"failed for reasons outside the arm and left out: {', '.join(failed[:10])}")
    if 1 < row["n"] < CLAIM_SEEDS and study.rule == "fixed":
        notes.append(f"n = {row['n']}: fewer than {CLAIM_SEEDS} seeds are no claim")
    if row["p_t"] is not None and row["improvement_low"] is None:
        notes.append("Fieller's interval has no bounds: the baseline's mean is not clearly above zero")
    return notes


def _rule_note(row: dict[str, Any], study: Study) -> str:
    last, e = row["path"][-1], row["path"][-1]["e"]
    seen = "" if last["p"] is None else f", seen {last['p']:.3g}"
    seen += "" if e is None else f", e = {e:.3g}"
    lost = " (a diverged run: no evidence from it on)" if study.rule == "e-process" and last["t"] is None else ""
    return (
        f"{study.rule}: look {len(row['path'])} of {len(study.looks)}, at {last['n']} seeds, stops this arm alone at "
        f"p <= {last['stops_at']:.3g}{seen}{lost}; p over all looks = {last['p_anytime']:.3g} before {study.correction}"
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds[:20])) + (f" and {len(seeds) - 20} more" if len(seeds) > 20 else "")


def _failed(study: Study, *arms: str) -> list[str]:
    failed = study.trials["outcome"] == "failed"
    if not failed.any():
        return []
    rows = study.trials[failed & (study.trials["stage"] == "confirm")]
    return [f"{arm} seed {s}" for arm in arms for s in rows.loc[rows["arm"] == arm, "seed"]]
