"""Tabulate where learned gate strengths start and end, by arm and layer. `pagating alphas STUDY`."""

import re
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.io import command, formats
from analysis.io.assemble import Study
from analysis.io.files import TableError
from analysis.io.trials import confirm_rows

COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "layer": ("layer", "d"),
    "n": ("n", "d"),
    "start": ("start", ".3f"),
    "first": ("at the first evaluation", ".3f"),
    "mean": ("mean", ".3f"),
    "low": ("low", ".3f"),
    "high": ("high", ".3f"),
    "sd": ("sd", ".3f"),
    "smallest": ("min", ".3f"),
    "largest": ("max", ".3f"),
    "up": ("seeds up", "d"),
    "down": ("seeds down", "d"),
}
ALL_LAYERS = "all layers"
# start of the alpha of a known activation; the study gives every other start
UNIT_STARTS = {"prelu": 0.75, "swish": 1.0, "xsilu": 0.0, "xgelu": 0.0, "xatlu": 0.0}
INIT = 0.5  # start of a learned alpha if the study gives none
KINDS: dict[object, str] = {  # (range, per) of a learnable alpha, or "token"
    ("unit", "model"): "one in (0, 1) for all layers",
    ("unit", "layer"): "one in (0, 1) per layer",
    ("unit", "channel"): "one in (0, 1) per channel",
    ("free", "model"): "a free one for all layers",
    ("free", "layer"): "a free one per layer",
    ("free", "channel"): "a free one per channel",
    "token": "one per token",
}


def columns(rows: list[dict[str, Any]]) -> formats.Columns:
    """Return the columns that show `rows`: `start` if a row has one, `first` if a row has only that."""
    unsaid = any(row["start"] is None and row["first"] is not None for row in rows)
    said = any(row["start"] is not None for row in rows)
    left_out = {"start": said, "first": unsaid}
    return {key: column for key, column in COLUMNS.items() if left_out.get(key, True)}


def _trained(study: Study, arm: str, kind: str) -> dict[str, Any] | None:
    # options of an arm's learned alpha of a kind (learnable, token); {} if all are defaults, None if it has none
    alpha = ((study.settings.get("arms") or {}).get(arm) or {}).get("alpha")
    if alpha == kind:
        return {}
    if not isinstance(alpha, dict) or kind not in alpha:
        return None
    options = alpha[kind] or {}
    if not isinstance(options, dict):
        raise TableError(f"{study.name}: arms.{arm}.alpha.{kind} has {options!r}; allowed: a mapping")
    return options


def start_of(study: Study, arm: str) -> float | None:
    """Return the alpha of an arm before its first step, by the study's own configuration; return None if it has none.

    A token-dependent alpha starts at its `init` for every token. Raises TableError if the options have the wrong type.
    """
    for options in (_trained(study, arm, "learnable"), _trained(study, arm, "token")):
        if options is not None:
            init = options.get("init", INIT)
            if isinstance(init, bool) or not isinstance(init, int | float):
                raise TableError(f"{study.name}: arms.{arm}.alpha has init {init!r}; allowed: a number")
            return float(init)
    options = (study.settings.get("arms") or {}).get(arm) or {}
    return UNIT_STARTS.get(str(options.get("unit"))) if options.get("alpha") is None else None


def is_shared(study: Study, arm: str) -> bool:
    """Return whether all layers of an arm share one learned alpha (`per: model`, the default)."""
    options = _trained(study, arm, "learnable")
    return options is not None and options.get("per", "model") == "model"


def summarise(study: Study) -> list[dict[str, Any]]:
    """Return the rows of `by_layer`, with one row `all layers` for an arm whose layers share their alpha."""
    return [
        row | {"layer": ALL_LAYERS} if shared else row
        for row in by_layer(study)
        if not (shared := is_shared(study, row["arm"])) or row["layer"] == 0
    ]


def by_layer(study: Study) -> list[dict[str, Any]]:
    """Summarise the last alpha of the completed confirm runs, one row per arm and layer, with a t interval of its mean.

    `start` comes from the study's configuration, and is None for a table alone. `first` is the mean at the first
    evaluation, when training has already moved alpha; it is None without curves. `up` and `down` count the seeds that
    ended above and below the start; without a start, above and below their own first evaluation. Nothing is tested
    across layers, because layers of one run depend on each other.
    """
    rows = confirm_rows(study.trials)
    rows = rows[rows["outcome"] == "completed"]
    out: list[dict[str, Any]] = []
    for arm in study.arms:
        runs = rows[rows["arm"] == arm].set_index("seed")
        seen, start = _first_evaluations(study, arm), start_of(study, arm)
        for column in alpha_columns(rows):
            final = runs[column].dropna().astype(float)
            if final.empty:
                continue
            row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"arm": arm, "layer": int(column.rsplit("_", 1)[1])}
            row |= {"n": len(final), "mean": float(final.mean()), "start": start}
            row |= {"smallest": float(final.min()), "largest": float(final.max())}
            row["values"] = {str(seed): float(x) for seed, x in final.items()}
            if len(final) > 1:
                sd = float(final.std(ddof=1))
                half = float(stats.t.isf(study.level / 2, len(final) - 1)) * sd / np.sqrt(len(final))
                row |= {"sd": sd, "low": row["mean"] - half, "high": row["mean"] + half}
            first = seen[column].reindex(final.index).dropna() if column in seen else final.iloc[:0]
            if len(first):
                row["first"] = float(first.mean())
            moved = final[first.index] - first if start is None else final - start
            if len(moved):
                row |= {"up": int((moved > 0).sum()), "down": int((moved < 0).sum())}
            out.append(row)
    return out


def _first_evaluations(study: Study, arm: str) -> dict[str, Any]:
    # column -> alpha of each seed at its first evaluation
    curves = study.curves
    if not len(curves):
        return {}
    mine = curves[(curves["stage"] == "confirm") & (curves["arm"] == arm)].sort_values("step")
    first = mine.drop_duplicates("seed").set_index("seed")
    return {c: first[c].astype(float) for c in alpha_columns(first)}


def kinds(studies: list[Study]) -> str:
    """State in two sentences which kinds of learned alpha these studies ran in arms with a gate, and which not."""
    ran: set[object] = set()
    for study in studies:
        for arm in study.arms:
            if (options := _trained(study, arm, "learnable")) is not None:
                ran.add((str(options.get("range", "unit")), str(options.get("per", "model"))))
            if _trained(study, arm, "token") is not None:
                ran.add("token")
    lists = ["; ".join(words for kind, words in KINDS.items() if (kind in ran) == was) for was in (True, False)]
    said = zip(("Learned alphas that were run", "Not run"), lists, strict=True)
    return " ".join(f"{heading}: {text}." for heading, text in said if text)


def main(argv: list[str] | None = None, prog: str = "python -m analysis.alphas") -> int:
    """Run the script; return the exit code."""
    options = command.parser(prog, __doc__).parse_args(argv)
    study = command.study(options)
    rows = summarise(study)
    if not rows:
        return command.nothing_to_show("no confirm run of this study learned alpha (no alpha_layer_ columns)")
    command.emit_rows(rows, columns(rows), options.format, title=f"Learned alpha at the last step: {study.name}")
    return 0


def alpha_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns alpha_layer_0, alpha_layer_1, ... in the order of the layers."""
    names = [c for c in table.columns if re.fullmatch(r"alpha_layer_\d+", str(c))]
    return sorted(names, key=lambda c: int(c.rsplit("_", 1)[1]))


def arms_with_alphas(study: Study) -> list[str]:
    """Return the arms whose confirm runs recorded an alpha per layer."""
    rows = confirm_rows(study.trials)
    columns = alpha_columns(rows)
    return [a for a in study.arms if columns and rows.loc[rows["arm"] == a, columns].notna().any(axis=None)]
