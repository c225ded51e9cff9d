"""Say what an arm's activation does inside its kept model: statistics of each layer, against the baseline's.

They come from one model per arm, on the same validation windows, so nothing is tested. `pagating.gating.probe` defines
them.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from analysis.io import formats
from analysis.io.assemble import Study
from analysis.io.files import TableError
from analysis.io.trials import to_numbers

COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "layer": ("layer", "d"),
    "alpha": ("alpha", ".3f"),
    "openness": ("openness", ".3f"),
    "negative_slope": ("negative slope", ".3f"),
    "dead": ("dead units", ".3f"),
    "gradient_norm": ("gradient norm", ".3g"),
    "gradient_passed": ("gradient passed", ".3f"),
    "hidden_rank": ("effective rank", ".1f"),
    "width": ("units", "d"),
    "output_rank": ("rank of the output", ".1f"),
}
ARM_COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "seed": ("seed", "d"),
    "layers": ("layers", "d"),
    **{name: COLUMNS[name] for name in ("openness", "negative_slope", "dead", "gradient_passed")},
    "gradient_ratio": ("gradient / baseline", ".2f"),
    "hidden_rank": COLUMNS["hidden_rank"],
    "rank_ratio": ("rank / baseline", ".2f"),
    "width": COLUMNS["width"],
}
_NUMBERS = tuple(name for name in COLUMNS if name not in ("arm", "layer"))
_SHARES = ("openness", "negative_slope", "dead", "gradient_passed", "hidden_rank", "width")


def by_layer(study: Study) -> list[dict[str, Any]]:
    """Return one row per arm and layer, in the order of the study's arms; a value that is not finite is None.

    Raises TableError if the table of layers lacks a column, or has an unknown arm or a text.
    """
    table, source = study.layers, f"{study.folder}/layers.parquet"
    if not len(table):
        return []
    for name in ("arm", "seed", "layer"):
        if name not in table.columns:
            raise TableError(f"{source}: column {name} is missing; it has {', '.join(map(str, table.columns))}")
    if unknown := sorted(set(table["arm"].astype(str)) - set(study.arms)):
        raise TableError(f"{source}: column arm has {unknown[0]!r}; allowed: {', '.join(study.arms)}")
    numbers = {name: to_numbers(source, table, name) for name in ("seed", "layer", *_NUMBERS) if name in table.columns}
    table = table.assign(**numbers)
    for name in ("seed", "layer"):
        if not (finite := np.isfinite(table[name])).all():
            raise TableError(f"{source}: column {name} has {table.loc[~finite, name].iloc[0]}; allowed: whole numbers")
    out: list[dict[str, Any]] = []
    for arm in study.arms:
        for row in table[table["arm"] == arm].sort_values("layer").to_dict("records"):
            values = {name: _known(row.get(name)) for name in _NUMBERS}
            if values["width"] is not None:
                values["width"] = int(values["width"])
            out.append({"arm": arm, "layer": int(row["layer"]), **values, "seed": int(row["seed"])})
    return out


def by_arm(rows: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return one row per arm: means over its layers, and geometric means over the layers of its ratio to the baseline.

    Args:
        rows: The rows of `by_layer`.
        baseline: The arm of the denominators. `gradient_ratio` and `rank_ratio` are None if it has no row.
    """
    base = {row["layer"]: row for row in rows if row["arm"] == baseline}
    out = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        means = {name: _mean(row[name] for row in mine) for name in _SHARES}
        width = means["width"]
        out.append(
            {
                "arm": arm,
                "seed": mine[0]["seed"],
                "layers": len(mine),
                **means,
                "width": None if width is None else round(width),
                "gradient_ratio": _ratio(mine, base, "gradient_norm"),
                "rank_ratio": _ratio(mine, base, "hidden_rank"),
            }
        )
    return out


def without_model(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    """Return the arms that have no row, because no model of them was kept or measured."""
    return [arm for arm in study.arms if arm not in {row["arm"] for row in rows}]


def _known(value: Any) -> float | None:
    return None if value is None or pd.isna(value) or not np.isfinite(value) else float(value)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _ratio(mine: list[dict[str, Any]], base: dict[int, dict[str, Any]], name: str) -> float | None:
    """Return the geometric mean over layers of a value divided by the baseline's; None if no layer has both."""
    pairs = [(row[name], base[row["layer"]][name]) for row in mine if row["layer"] in base]
    logs = [np.log(value / of_base) for value, of_base in pairs if value and of_base]
    return float(np.exp(np.mean(logs))) if logs else None
