"""Each published claim, what its own numbers give, the verdict this project's rules allow, and what a study says of it.

`python -m analysis.claims [--study FOLDER]...`. The numbers are read from published.yaml.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from analysis import beside, command, estimates, formats, growth
from analysis.pairs import pair
from analysis.significance import verdict
from analysis.tables import Study, confirm_rows

COLUMNS: formats.Columns = {
    "id": ("id", ""),
    "claim": ("claim", ""),
    "own_numbers": ("what its own numbers give", ""),
    "verdict": ("verdict", ""),
    "page": ("page", ""),
}
ONE_SEED = "not testable (n=1)"


@cache
def published() -> dict[str, Any]:
    """The data file of published numbers."""
    return dict(yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")))


def own_numbers(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """The improvement in percent that the published cells give for each comparison of a claim."""
    cells = published()["cells"]
    out = []
    for row in claim["compare"]:
        b, a = (cells[row[side]][row["split"]] for side in ("baseline", "arm"))
        out.append(row | {"improvement_percent": estimates.improvement_percent([b], [a])})
    return out


def extra_parameters(n_layer: int, d_ff: int) -> int:
    """Parameters that the projected form adds: two d_ff x d_ff projections with biases in each layer."""
    return n_layer * 2 * (d_ff * d_ff + d_ff)


def judge(claim: dict[str, Any]) -> tuple[str, str]:
    """What a claim's own numbers give, in words, and the verdict that they allow."""
    model = published()["model"]
    numbers = "; ".join(
        f"{row['what']}: {row['improvement_percent']:+.3f}% ({row['split']})" for row in own_numbers(claim)
    )
    if claim["kind"] == "parameters":
        extra = extra_parameters(model["n_layer"], model["d_ff"])
        total = model["parameters"] + extra
        share = 100 * extra / model["parameters"]
        words = f"pointwise form: +0; projected form inside GPT-2: +{extra:,} ({total:,}, {share:+.1f}%)"
        return words, "true of the pointwise form, false of the projected form"
    if claim["kind"] == "memory":
        weights = model["parameters"] * 4 / 1e6
        training = model["parameters"] * 16 / 1e6
        words = f"float32 weights alone: {weights:.0f} MB; with gradients and AdamW's moments: {training:.0f} MB"
        held = claim["megabytes"] >= training
        return words, "possible" if held else "false of training in float32 (below what it must hold)"
    if claim["kind"] == "identical":
        return f"at alpha = 0 the published MLP is linear; {numbers}", "false by the formula (base = identity)"
    if claim["kind"] == "padding":
        return "positions that hold no text are averaged in", "false: not comparable with a loss of text"
    if claim["kind"] == "significance":
        return f"{published()['seeds_per_cell']} seed a cell: no variance, no test", ONE_SEED
    return numbers or "the losses behind it are not published", ONE_SEED


def ours(study: Study) -> dict[str, str]:
    """What a study's trials say of each kind of claim, in words. The published baseline (alpha = 0) is the floor."""
    result = verdict(study)
    rows = result["comparisons"]
    arms = [r for r in rows if r["arm"] != study.floor]
    out = {"improvement": f"over {study.baseline}: {_each(arms)}", "significance": _each(arms, with_p=True)}
    if study.floor is not None:
        over_floor = verdict(replace(study, baseline=study.floor, floor=None))["comparisons"]
        others = [r for r in over_floor if r["arm"] != study.baseline]
        out["improvement"] += f". Over {study.floor}, the published baseline: {_each(others)}"
        floor = next(r for r in rows if r["arm"] == study.floor)
        out["identical"] = f"{_each([floor])} against {study.baseline}"
    slopes = [s for s in growth.table(study) if s["arm"] != study.floor and s["scale"] == beside.SCALES["log2"][1]]
    if slopes:
        out["growth"] = "; ".join(_slope(s) for s in slopes)
    out["parameters"] = _column(study, "parameters", ",.0f")
    out["memory"] = _column(study, "peak_rss_mb", ".0f", " MB")
    out["best"] = _best(study)
    out["padding"] = _padding(study)
    return {kind: text for kind, text in out.items() if text}


def _each(rows: list[dict[str, Any]], with_p: bool = False) -> str:
    parts = []
    for row in rows:
        value, low = row["improvement_percent"], row["improvement_low"]
        text = "" if value is None else f" {value:+.2f}%"
        text += "" if low is None else f" [{low:+.2f}, {row['improvement_high']:+.2f}]"
        p = f", p = {row['p_adjusted']:.3g}" if with_p and row["p_adjusted"] is not None else ""
        parts.append(f"{row['arm']}:{text} (n = {row['n']}{p}), {row['verdict']}")
    return "; ".join(parts) or "no treatment runs"


def _slope(row: dict[str, Any]) -> str:
    if row["p"] is None:
        return f"{row['arm']}: {row['verdict']}"
    span = f"{row['slope']:+.3f}{row['scale']} [{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"{row['arm']}: {span} (n = {row['n']}, p = {row['p_adjusted']:.3g}), {row['verdict']}"


def _column(study: Study, column: str, spec: str, unit: str = "") -> str:
    if column not in study.trials.columns:
        return ""
    largest = confirm_rows(study.trials).groupby("arm")[column].max().reindex(study.arms).dropna()
    return "; ".join(f"{arm}: {format(float(x), spec)}{unit}" for arm, x in largest.items())


def _padding(study: Study) -> str:
    """The loss with and without the padding counted, and what that makes of the improvement; decides nothing."""
    rows = confirm_rows(study.trials)
    if not {"padded_nll", "val_nll"} <= set(rows.columns) or not rows["padded_nll"].notna().any():
        return ""
    base = rows[(rows["arm"] == study.baseline) & (rows["outcome"] == "completed")]
    plain, padded = (float(base[column].mean()) for column in ("val_nll", "padded_nll"))
    parts = [f"{study.baseline}: val_nll {plain:.4f}, with the padding counted {padded:.4f}"]
    for metric, words in (("val_nll", "on val_nll"), ("padded_nll", "with the padding counted")):
        losses = study.losses(metric)
        for arm in (a for a in study.arms if a != study.baseline):
            pairs = pair(losses, study.baseline, arm)
            value = estimates.improvement_percent(pairs.baseline[pairs.complete], pairs.arm[pairs.complete])
            parts += [] if value is None else [f"{arm} {words}: {value:+.2f}% (n = {int(pairs.complete.sum())})"]
    return "; ".join(parts)


def _best(study: Study) -> str:
    rows = confirm_rows(study.trials)
    parts = []
    for arm in study.arms:
        mine = rows[rows["arm"] == arm]
        # an alpha that differs between seeds was learned, not chosen
        known = [c for c in ("lr", "alpha") if c in rows.columns and mine[c].nunique() == 1]
        if known:
            parts.append(f"{arm}: " + ", ".join(f"{c} {mine[c].dropna().iloc[0]:.3g}" for c in known))
    return "chosen by search and calibration: " + "; ".join(parts) if parts else ""


def table(*studies: Study) -> list[dict[str, Any]]:
    """A row a claim: its text, what its own numbers give, the verdict, and under each study's name what it says."""
    said = {study.name: ours(study) for study in studies}
    rows = []
    for claim in published()["claims"]:
        words, judged = judge(claim)
        row = {"id": claim["id"], "claim": claim["text"], "own_numbers": words, "verdict": judged}
        row["page"] = claim["page"]
        row["comparisons"] = own_numbers(claim)
        rows.append(row | {f"study {name}": of_study.get(claim["kind"]) for name, of_study in said.items()})
    return rows


def columns(*studies: Study) -> formats.Columns:
    """The columns of `table`."""
    return COLUMNS | {f"study {study.name}": (f"what {study.name} says", "") for study in studies}


def source_note() -> str:
    """Where the published numbers come from, in a sentence."""
    source = published()["source"]
    pages = f"pages are of {source['repository']} at commit {source['commit'][:7]}"
    return f"Numbers: {source['what']}; {pages} (analysis/published.yaml)."


def main(argv: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    options = command.parser("analysis.claims", __doc__, many=True).parse_args(argv)
    studies = command.studies(options)
    command.emit_rows(table(*studies), columns(*studies), options.format, title="The published claims")
    if options.format == "terminal":
        formats.print_notes([source_note()])
    return 0


if __name__ == "__main__":
    command.run(main)
