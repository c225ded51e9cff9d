"""The decision: all arms against the baseline, Holm-adjusted, in words.

`python -m analysis.significance STUDY|CSV`.

Primary test: two-sided paired t over seeds. A diverged run turns it into the worst-rank test over all pairs.
"""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from analysis.describe.fairness import edge_hits
from analysis.io import command
from analysis.io.study import Study, margin_in_nats
from analysis.stats import estimates, multiplicity, power, sequential
from analysis.stats.pairs import Pairs, pair
from analysis.verdict.checks import CANNOT_TELL, assay
from analysis.verdict.comparison import measure

SCHEMA = 1
CLAIM_SEEDS = 8  # fewer seeds are no claim


def verdict(study: Study) -> dict[str, Any]:
    """The object of verdict.json; its numbers are finite or null."""
    losses = study.losses()
    treatments = [arm for arm in study.arms if arm != study.baseline]
    paired = {arm: pair(losses, study.baseline, arm) for arm in treatments}
    baseline_losses = losses[study.baseline].to_numpy(float)
    finite = baseline_losses[np.isfinite(baseline_losses)]
    margin = margin_in_nats(study.margin, float(finite.mean()) if len(finite) else 1.0, str(study.folder or study.name))
    rows = [measure(arm, study.baseline, paired[arm], study.level, margin) for arm in treatments]
    hits = edge_hits(study)
    for row in rows if not study.confirms else []:
        row["verdict"] = "not testable (no confirm stage: one seed a configuration)"
    for row in rows:
        _look(row, paired[row["arm"]], losses, study)
        row["at_edge"] = [arm for arm in (study.baseline, row["arm"]) if arm in hits]
    _adjust(rows, study)
    for row in rows:
        _decide(row, study)
    sensitivity = assay(rows, study)
    if sensitivity["testable"] is False:
        for row in rows:
            if row["arm"] != study.floor:
                row["why"] = f"{sensitivity['why']}; alone it would read: {row['verdict']}; {row['why']}"
                row["verdict"] = CANNOT_TELL
    _secondary(rows, paired, study)
    return {
        "schema": SCHEMA,
        "study": study.name,
        "question": study.question,
        "metric": study.metric,
        "level": study.level,
        "correction": study.correction,
        "comparisons": rows,
        "sensitivity": sensitivity,
        "margin": study.margin,
        "margin_nats": margin,
        "baseline": study.baseline,
        "floor": study.floor,
        "rule": study.rule,
        "looks": list(study.looks),
        "summary": summary(rows, study),
        "seeds": {arm: [int(s) for s in losses[arm].dropna().index] for arm in study.arms},
        "losses_sha256": hashlib.sha256(losses.to_csv().encode()).hexdigest(),
        "data_digest": _find(study.settings, "digest"),
        "commit": _find(study.settings, "commit"),
        "versions": dict(_versions()),
    }


@cache
def _versions() -> dict[str, str]:
    names = ("numpy", "pandas", "scipy", "statsmodels")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


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


def _look(row: dict[str, Any], pairs: Pairs, losses: pd.DataFrame, study: Study) -> None:
    # a sequential rule decides by its own p, and its interval is that of the p at which this look would stop
    if study.rule == "fixed":
        return
    by_seed = dict(zip(pairs.seeds, pairs.differences, strict=True))
    d = [by_seed.get(int(seed), np.nan) for seed in losses.index]
    row["path"] = sequential.path(d, study.rule, study.looks, study.level)
    if row["verdict"] is not None:
        return
    row["p_anytime"] = row["p_deciding"] = row["path"][-1]["p_anytime"] if row["path"] else 1.0
    stops_at = row["path"][-1]["stops_at"] if row["path"] else 0.0
    interval = None
    if stops_at > 0 and row["p_t"] is not None:
        b, a = pairs.baseline[pairs.complete], pairs.arm[pairs.complete]
        interval = estimates.fieller(b, a, stops_at)
    row["improvement_low"], row["improvement_high"] = interval or (None, None)


def _adjust(rows: list[dict[str, Any]], study: Study) -> None:
    # the family is every arm that the study named: one that cannot be tested enters with p = 1
    p = [1.0 if row["p_deciding"] is None else row["p_deciding"] for row in rows]
    order = np.argsort(p, kind="stable")
    for row, value in zip(rows, multiplicity.adjust(p, study.correction), strict=True):
        row["p_adjusted"] = None if row["p_deciding"] is None else value
    for rank, i in enumerate(order):
        shares = {
            "holm": len(p) - rank,
            "bonferroni": len(p),
            "benjamini-hochberg": len(p) / (rank + 1),
            "none": 1,
        }
        rows[i]["level_of_this_step"] = study.level / shares[study.correction]


def _decide(row: dict[str, Any], study: Study) -> None:
    notes: list[str] = []
    p, worst = row["p_adjusted"], row["p_worst_rank"] is not None
    # equivalence is tested once, at the rule's last look: a test at each look would err more often than its level
    last_look = not study.looks or (bool(row["path"]) and row["path"][-1]["n"] == study.looks[-1])
    equivalent = last_look and row["p_tost"] is not None and row["p_tost"] <= study.level
    if row["verdict"] is not None:
        notes.append(_why_refused(row))
    elif p is not None and p <= study.level:
        direction = _direction(row) if worst else row["mean_difference"]
        row["verdict"] = "better" if direction > 0 else "worse"
        notes.append(f"adjusted p = {p:.3g} ({study.correction}) <= {study.level:g} over n = {row['n']} seeds")
        if equivalent:
            notes.append(f"yet the difference is smaller than the margin of {study.margin}")
    elif not worst and equivalent:
        row["verdict"] = f"no difference larger than {_margin_text(study)}"
        notes.append(f"TOST p = {row['p_tost']:.3g} <= {study.level:g} at that margin over n = {row['n']} seeds")
    else:
        row["seeds_needed"] = _total_seeds(row, study)
        row["verdict"] = f"undecided ({_next_look(row, study) or 'needs ' + _more_seeds(row)})"
        notes.append(
            f"adjusted p = {p:.3g} ({study.correction}) > {study.level:g}"
            + ("" if row["p_tost"] is None or worst else f", TOST p = {row['p_tost']:.3g} > {study.level:g}")
        )
    row["why"] = "; ".join([*notes, *_caveats(row, study)])


def _why_refused(row: dict[str, Any]) -> str:
    if row["verdict"] == "identical":
        return "every difference is exactly 0, so there is no interval, no t and no p of the t test"
    text = str(row["verdict"]).removeprefix("not testable (").removesuffix(")")
    return f"{text}: no interval and no p"


def _margin_text(study: Study) -> str:
    return study.margin.strip() if isinstance(study.margin, str) else f"{study.margin:g} nats"


def _direction(row: dict[str, Any]) -> float:
    # the sign of the rank sum of `worst_rank`, from what the row itself records
    d = _with_divergence(row)
    d = d[d != 0]
    return float(np.sum(np.sign(d) * rankdata(np.abs(d))))


def _with_divergence(row: dict[str, Any]) -> np.ndarray:
    arm, base = set(row["diverged_seeds_arm"]), set(row["diverged_seeds_baseline"])
    values = []
    for seed, d in zip(row["seeds"], row["differences"], strict=True):
        both = seed in arm and seed in base
        values.append(0.0 if both else -np.inf if seed in arm else np.inf if seed in base else float(d))
    return np.asarray(values)


def _next_look(row: dict[str, Any], study: Study) -> str:
    if not study.looks:
        return ""
    seen = row["path"][-1]["n"] if row["path"] else 0
    later = [n for n in study.looks if n > seen]
    return f"its next look is at {later[0]} seeds" if later else f"the cap of {study.looks[-1]} seeds is reached"


def _total_seeds(row: dict[str, Any], study: Study) -> int | None:
    step = row["level_of_this_step"]
    if row["p_worst_rank"] is not None:
        return power.seeds_needed_worst_rank(_with_divergence(row), step)
    return power.seeds_needed(row["d_z"], row["margin"] / row["sd_difference"], step, study.level)


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


def _secondary(rows: list[dict[str, Any]], paired: dict[str, Pairs], study: Study) -> None:
    sizes = study.trials[study.trials["stage"] == "confirm"].groupby("arm")
    for column in ("parameters", "flops_per_token"):
        if column in study.trials.columns:
            first = sizes[column].first()
            for row in rows:
                for prefix, arm in (("", row["arm"]), ("baseline_", row["baseline"])):
                    value = first.get(arm)
                    row[prefix + column] = None if value is None or not np.isfinite(value) else float(value)
    names = [arm for arm in paired if len(paired[arm].seeds)]
    for row in rows:
        row["p_dunnett"] = None
    balanced = names and len({tuple(paired[arm].seeds) for arm in names}) == 1 and study.rule == "fixed"
    tested = [row for row in rows if row["p_t"] is not None]
    if balanced and len(tested) == len(rows) and all(row["p_worst_rank"] is None for row in rows):
        result = multiplicity.dunnett_blocked(paired[names[0]].baseline, [paired[arm].arm for arm in names])
        for row, p in zip(rows, result["p_adjusted"], strict=True):
            row["p_dunnett"] = p


def _find(settings: dict[str, Any], word: str) -> str | None:
    for key, value in settings.items():
        if word in str(key) and isinstance(value, str):
            return value
        if isinstance(value, dict) and (found := _find(value, word)):
            return found
    return None


def main(argv: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    options = command.parser("analysis.significance", __doc__).parse_args(argv)
    study = command.study(options)
    result = verdict(study)
    command.emit_verdict(result, options.format)
    if concluded(result):
        return 0
    reason = (
        "no treatment runs"
        if not result["comparisons"]
        else "; ".join(f"{r['arm']}: {r['verdict']}" for r in _arms(result))
    )
    return command.could_not_conclude(reason)
