"""State what a study's trials say of each kind of published claim, one row per arm."""

from dataclasses import replace
from typing import Any

from analysis.describe import curves, growth
from analysis.io.assemble import Study
from analysis.io.trials import confirm_rows
from analysis.stats import estimates
from analysis.stats.pairs import pair
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Comparison

PLAIN = "what its trials say"  # heading of words that have none of their own
CLAIMED = 0.5  # the alpha of the published claims
BYTES = 16  # per parameter in training: float32 weight, gradient and the two moments of AdamW


def said(study: Study) -> dict[str, list[dict[str, str]]]:
    """Return what a study's trials say of each kind of claim, by kind; the published baseline (alpha = 0) is the floor.

    Each kind has one row per arm. A row has the arm's name under `arm` and words under every other heading.
    """
    rows = decide(study).comparisons
    arms = [r for r in rows if r.arm != study.floor]
    improvement = {r.arm: {f"over {study.baseline}": _words(r)} for r in arms}
    out: dict[str, list[dict[str, str]]] = {}
    if study.floor is not None:
        for r in decide(replace(study, baseline=study.floor, floor=None, ladder=None)).comparisons:
            if r.arm != study.baseline:
                improvement[r.arm][f"over {study.floor}, the published baseline"] = _words(r)
        floor = next(r for r in rows if r.arm == study.floor)
        out["identical"] = [{"arm": study.floor, f"against {study.baseline}": _words(floor)}]
    out["improvement"] = [{"arm": arm} | words for arm, words in improvement.items()]
    out["significance"] = [{"arm": r.arm, f"over {study.baseline}": _words(r, with_p=True)} for r in arms]
    slopes = [s for s in growth.table(study) if s["arm"] != study.floor and s["scale"] == curves.SCALES["log2"][1]]
    out["growth"] = [{"arm": s["arm"]} | _slope(s) for s in slopes]
    out["parameters"] = _column(study, "parameters", ",.0f")
    out["memory"] = _column(study, "peak_rss_mb", ".0f", " MB")
    out["best"] = _best(study)
    out["padding"] = _padding(study)
    return {kind: rows for kind, rows in out.items() if rows}


def text(rows: list[dict[str, str]]) -> str:
    """Join the rows of one kind into one text, heading by heading."""
    headings = dict.fromkeys(heading for row in rows for heading in row if heading != "arm")
    parts = {h: "; ".join(f"{row['arm']}: {row[h]}" for row in rows if h in row) for h in headings}
    return ". ".join(f"{heading}: {part}" if heading != PLAIN else part for heading, part in parts.items())


def has_claimed_arm(study: Study) -> bool:
    """Return whether an arm has a gate whose alpha is fixed at the claimed 0.5 in every layer."""
    return any(is_claimed(options) for options in (study.settings.get("arms") or {}).values())


def is_claimed(options: dict[str, Any]) -> bool:
    """Return whether these options of an arm have a gate whose alpha is fixed at 0.5 in every layer."""
    value = options.get("alpha")
    return options.get("gate") is not None and (
        set(value) == {CLAIMED} if isinstance(value, list) else value == CLAIMED
    )


def notes(parameters: int, *studies: Study) -> dict[str, str]:
    """Return sentences on all these studies together, by kind of claim, for the kinds that need one.

    `parameters` is the number of parameters of the model that the claims are about.
    """
    out = {}
    if studies and not any(has_claimed_arm(study) for study in studies):
        out["improvement"] = out["best"] = (
            f"None of these studies has an arm of fixed alpha {CLAIMED:g}, which the claim is about: they fix it at "
            "other values, search it or learn it."
        )
    own = [size for study in studies if (size := _own_memory(study))]
    if own:
        out["memory"] = (
            "These are whole processes, mostly the libraries: weights, gradients and AdamW's moments are "
            f"{'; '.join(own)}. They say nothing of a model of {parameters:,} parameters."
        )
    return out


def _own_memory(study: Study) -> str:
    rows = confirm_rows(study.trials)
    if not {"parameters", "peak_rss_mb"} <= set(rows.columns) or not rows["peak_rss_mb"].notna().any():
        return ""
    largest = rows["parameters"].max()
    return f"{largest * BYTES / 1e6:.1f} MB in {study.name}" if largest > 0 else ""


def _words(row: Comparison, with_p: bool = False) -> str:
    value = row.improvement_percent
    text = "" if value is None else f"{value:+.2f}% "
    text += "" if row.interval is None else "[{:+.2f}, {:+.2f}] ".format(*row.interval)
    p = f", p = {row.p_adjusted:.3g}" if with_p and row.p_adjusted is not None else ""
    return f"{text}(n = {row.n}{p}), {row.verdict}"


def _slope(row: dict[str, Any]) -> dict[str, str]:
    out = {"over training": str(row["verdict"])}
    if row["p"] is not None:
        span = f"{row['slope']:+.3f}{row['scale']} [{row['low']:+.3f}, {row['high']:+.3f}]"
        out["over training"] = f"{span} (n = {row['n']}, p = {row['p_adjusted']:.3g}), {row['verdict']}"
    if row["late_p"] is not None:
        span = f"{row['late']:+.3f}{row['scale']} [{row['late_low']:+.3f}, {row['late_high']:+.3f}]"
        out["second half, exploratory"] = f"{span} (p = {row['late_p']:.3g}, not adjusted)"
    return out


def _column(study: Study, column: str, spec: str, unit: str = "") -> list[dict[str, str]]:
    if column not in study.trials.columns:
        return []
    largest = confirm_rows(study.trials).groupby("arm")[column].max().reindex(study.arms).dropna()
    return [{"arm": str(arm), PLAIN: f"{format(float(x), spec)}{unit}"} for arm, x in largest.items()]


def _padding(study: Study) -> list[dict[str, str]]:
    """Return loss and improvement with and without the padding counted, one row per arm; they decide nothing."""
    rows = confirm_rows(study.trials)
    if not {"padded_nll", "val_nll"} <= set(rows.columns) or not rows["padded_nll"].notna().any():
        return []
    base = rows[(rows["arm"] == study.baseline) & (rows["outcome"] == "completed")]
    metrics = {"val_nll": "on val_nll", "padded_nll": "with the padding counted"}
    out = [{"arm": study.baseline} | {words: f"{float(base[m].mean()):.4f} nats" for m, words in metrics.items()}]
    losses = {metric: study.losses(metric) for metric in metrics}
    for arm in (a for a in study.arms if a != study.baseline):
        row = {"arm": arm}
        for metric, words in metrics.items():
            pairs = pair(losses[metric], study.baseline, arm)
            value = estimates.improvement_percent(pairs.baseline[pairs.complete], pairs.arm[pairs.complete])
            row |= {} if value is None else {words: f"{value:+.2f}% (n = {int(pairs.complete.sum())})"}
        out.append(row)
    return out


def _best(study: Study) -> list[dict[str, str]]:
    rows, arms = confirm_rows(study.trials), study.settings.get("arms") or {}
    out = []
    for arm in study.arms:
        mine = rows[rows["arm"] == arm]
        # the table has an alpha for every arm, but an arm without a gate chooses none
        gated = not arms or any((arms.get(arm) or {}).get(key) is not None for key in ("gate", "alpha"))
        # an alpha that differs between seeds was learned, not chosen
        known = [c for c in ("lr", "alpha")[: 1 + gated] if c in rows.columns and mine[c].nunique() == 1]
        if known:
            words = ", ".join(f"{c} {mine[c].dropna().iloc[0]:.3g}" for c in known)
            out.append({"arm": arm, "chosen by search and calibration": words})
    return out
