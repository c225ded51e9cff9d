"""State what each figure of a report shows, in a sentence made from the study's tables."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from analysis.describe.alphas import ALL_LAYERS
from analysis.describe.curves import Trend, confirm_curves
from analysis.io.assemble import Study
from analysis.io.trials import confirm_rows
from analysis.report.cell_curves import Line
from analysis.verdict.kinds import Comparison
from analysis.verdict.ladder.kinds import ArmTrend
from analysis.verdict.words import called, headline

SAME = 0.005  # alphas of an arm's layers that differ by less are shown as one number


def listed(names: Iterable[str]) -> str:
    """Join names with commas, and the last with `and`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    # (key, arm) pairs to key -> arms
    groups: dict[str, list[str]] = {}
    for key, arm in pairs:
        groups.setdefault(key, []).append(arm)
    return groups


def differences(rows: Sequence[Comparison], study: Study) -> str:
    """List the arms by their verdict, without its details in brackets."""
    groups = _grouped((headline(row, study.margin, study.unit), row.label) for row in rows)
    return " ".join(f"{word[:1].upper()}{word[1:]}: {listed(arms)}." for word, arms in groups.items())


def ladder(trends: Sequence[ArmTrend]) -> str:
    """List the arms by how their improvement goes on over the rungs."""
    groups = _grouped((str(row.trend), row.label) for row in trends)
    said = "; ".join(f"{word}: {listed(arms)}" for word, arms in groups.items())
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def sequential(rows: Sequence[Comparison]) -> str:
    """Count the arms that were decided, and state the seeds that they ran."""
    looked = [row for row in rows if row.path]
    if not looked:
        return ""
    decided = [row for row in looked if row.kind.settled]
    n = sorted({row.n for row in decided})
    seeds = "" if not n else f", with {n[0]} seeds" if len(n) == 1 else f", with {n[0]} to {n[-1]} seeds"
    what = "comparisons" if any(row.contrast for row in looked) else "arms"
    return f"{len(decided)} of {len(looked)} {what} were decided{seeds}."


def learning_rate(rows: list[dict[str, Any]]) -> str:
    """State if every arm's optimum lies inside the grids, and the range of the first hyperparameter's optima."""
    if not rows:
        return ""
    first, several = rows[0]["nuisance"], len({row["nuisance"] for row in rows}) > 1

    def named(row: dict[str, Any], *more: str) -> str:
        said = ", ".join([*([row["nuisance"]] if several else []), *more])
        return f"{row['arm']} ({said})" if said else str(row["arm"])

    grid = "its grid" if several else "the grid"
    if edges := [named(row) for row in rows if row["at_edge"] == "yes"]:
        return f"The optimum of {listed(edges)} is at an end of {grid}, and may lie beyond it."
    if lonely := [named(row, row["bracketed"].removeprefix("no: ")) for row in rows if row["bracketed"] != "yes"]:
        return f"The optimum of {listed(lonely)} has no finite point on each side, and is uncertain."
    found = sorted({f"{row['fitted']:.2g}" for row in rows if row["nuisance"] == first and row["fitted"]}, key=float)
    what = f", {called(first)} " if several else ", "
    rates = "" if not found else f"{what}{found[0]}" if not found[1:] else f"{what}between {found[0]} and {found[-1]}"
    return f"Every arm has its optimum inside {'its grids' if several else 'the grid'}{rates}."


def against_alpha(rows: list[dict[str, Any]]) -> str:
    """State the alpha of each arm's lowest fitted loss."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        best[row["arm"]] = min(best.get(row["arm"], row), row, key=lambda r: r["loss"])
    each = [f"{arm} at {row['alpha']:.2f}" for arm, row in best.items()]
    return f"The fit is lowest for {listed(each)}." if each else ""


def loss_curves(study: Study) -> str:
    """Name the arms of the lowest and the highest mean loss at the last evaluation, and the spread of the seeds."""
    curves, chosen = confirm_curves(study), confirm_rows(study.trials)
    if not len(curves) or not len(chosen):
        return ""
    ends = curves[np.isfinite(curves["val_nll"].astype(float))]
    ends = ends[ends["tokens"] == ends["tokens"].max()]
    by_arm = ends.groupby("arm")["val_nll"].agg(["mean", "min", "max"])
    if len(by_arm) < 2:
        return ""
    low, high = by_arm["mean"].idxmin(), by_arm["mean"].idxmax()
    spread = (by_arm["max"] - by_arm["min"]).max()
    ways, unit = ("lowest", "highest"), f" {study.unit}" if study.own else " nats per token"
    best, worst = ways[:: study.sign]
    return (
        f"At the end {low} has the {best} mean, {study.sign * by_arm['mean'].min():.3f}{unit.rstrip()}, and {high} the "
        f"{worst}, {study.sign * by_arm['mean'].max():.3f}; seeds of one arm lie up to {spread:.3f} apart."
    )


def lowest_cell(lines: Sequence[Line], study: Study) -> str:
    """Name the configuration of the lowest last loss, or of the best metric."""
    found = [(float(rows["val_nll"].iloc[-1]), label) for _, _, label, rows in lines]
    if not found:
        return ""
    loss, label = min(found)
    unit, way = f" {study.unit}".rstrip() if study.own else " nats per token", "Lowest" if study.turn > 0 else "Highest"
    return f"{way} at the end: {label}, {study.turn * loss:.3f}{unit}."


def over_training(rows: list[dict[str, Any]], left_out: Iterable[str] = ()) -> str:
    """List the arms by the trend of their improvement over training, if it was tested; p is adjusted.

    Sentences on what the test leaves out follow.
    """
    words = {Trend.RISES: "rises for", Trend.FALLS: "falls for", Trend.NONE: "is undecided for"}
    groups = _grouped((row["trend"], row["arm"]) for row in rows if row["trend"])
    said = [f"{word} {listed(groups[trend])}" for trend, word in words.items() if trend in groups]
    return " ".join([f"Over training the improvement {'; '.join(said)}.", *left_out]) if said else ""


def by_layer(rows: list[dict[str, Any]]) -> str:
    """State the lowest and the highest mean alpha of each arm, with the layer."""
    said = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        low, high = min(mine, key=lambda r: r["mean"]), max(mine, key=lambda r: r["mean"])
        if low["layer"] == ALL_LAYERS or high["mean"] - low["mean"] < SAME:
            said.append(f"{arm} at {low['mean']:.2f} in every layer")
        else:
            said.append(f"{arm} from {low['mean']:.2f} (layer {low['layer']}) to {high['mean']:.2f} ({high['layer']})")
    return f"Mean alpha at the end: {'; '.join(said)}." if said else ""


def search_budget(rows: list[dict[str, Any]], study: Study) -> str:
    """Name the arm whose last search trial improved its expected best loss, or metric, the most."""
    gains: dict[str, float] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        seen = [row["without_replacement"] for row in rows if row["arm"] == arm]
        known = [float(value) for value in seen if value is not None and np.isfinite(value)]
        if len(known) > 1:
            gain = study.turn * (known[-2] - known[-1])
            gains[arm] = 100 * gain / abs(known[-1]) if study.own is None else gain
    if not gains:
        return ""
    most = max(gains, key=lambda arm: gains[arm])
    if study.own:
        moved, unit = "lowered" if study.turn > 0 else "raised", f" {study.unit}".rstrip()
        what = f"the expected best {study.own.name} by at most {gains[most]:.3g}{unit}"
        return f"The last search trial {moved} {what} ({most})."
    return f"The last search trial lowered the expected best loss by at most {gains[most]:.2f}% ({most})."
