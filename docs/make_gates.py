"""Write the tables of docs/gates.md from the catalogue, and the one of learned alphas from docs/results.

    python docs/make_gates.py [FILE]

The text around the tables stays as it is.
"""

import math
import re
import sys
from functools import cache
from pathlib import Path

from analysis.describe import alphas
from analysis.io.study import load
from pagating.gating.catalog import COMPETITORS, FORMS, GATE_ROWS, Competitor, GateRow

PAGE = Path(__file__).parent / "gates.md"
RESULTS = Path(__file__).parent / "results"


def formula(text: str) -> str:
    """Return a formula as code, and its note after a comma."""
    code, *note = text.split("; ", 1)
    return ", ".join([f"`{code}`", *note])


def interval(row: GateRow) -> str:
    """Return the range of a gate: a square bracket at an end that is a value of the gate."""
    low, high = row.range
    left = "[" if row.attained and math.isfinite(low) else "("
    right = "]" if row.attained and math.isfinite(high) else ")"
    return f"{left}{low:.2g}, {high:.2g}{right}"


def learned(row: Competitor) -> str:
    """Return what a known activation learns, or the alpha that may be set."""
    alpha = row.settings["alpha"]
    if row.learns_alpha:
        return f"alpha per layer, from {alpha['learnable']['init']:g}"
    return f"alpha is {alpha:g}" if row.has_alpha else row.learns


def mirrored(alpha: float) -> float:
    """Return the alpha whose paGLU is that of `alpha` mirrored, `f(-x)`, up to a factor."""
    return alpha / (alpha - 1)


@cache
def read_as_both() -> list[tuple[str, ...]]:
    """Return each learned strength of a paGLU or an xSiLU in the published studies as the other one's."""
    out = []
    for folder in sorted(path.parent for path in RESULTS.glob("*/study.yaml")):
        study = load(folder)
        for row in alphas.summarise(study):
            options = study.settings["arms"][row["arm"]]
            if options.get("unit") == "xsilu":
                strength = row["mean"]
                alpha = (1 + 2 * strength) / (1 + strength)
            elif options.get("gate") == "sigmoid" and options.get("form", "pointwise") == "pointwise":
                alpha = row["mean"]
                strength = (alpha - 1) / (2 - alpha)
            else:
                continue
            between = f"{mirrored(alpha):.2f}" if not 0 <= alpha <= 2 else ""
            numbers = (f"{alpha:.2f}", f"{strength:.2f}", f"{2 - alpha:.2f}", between)
            out.append((folder.name, row["arm"], str(row["layer"]), *numbers))
    return out


def tables() -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the rows of each table by its heading."""
    return {
        ("form", "formula", "extra parameters per layer"): [
            (f"`{name}`", formula(form.formula), form.extra_parameters) for name, form in FORMS.items()
        ],
        ("gate", "`g(x)`", "range", "`x * g(x)` at -inf, +inf", "unit", "source"): [
            (
                f"`{name}`",
                formula(row.formula),
                interval(row),
                ", ".join(f"{limit:g}" for limit in row.limits),
                row.unit,
                row.paper,
            )
            for name, row in GATE_ROWS.items()
        ],
        ("unit", "formula", "alpha", "source"): [
            (f"`{name}`", formula(row.formula), learned(row), row.paper) for name, row in COMPETITORS.items()
        ],
        ("study", "arm", "layer", "alpha of paGLU", "`a` of xSiLU", "factor `2 - alpha`", "mirrored alpha"): (
            read_as_both()
        ),
    }


def filled(page: str) -> str:
    """Return the page with every table replaced. Raises ValueError if a heading is not once in it."""
    for heading, rows in tables().items():
        first = f"| {' | '.join(heading)} |\n"
        if (found := page.count(first)) != 1:
            raise ValueError(f"docs/gates.md has the heading {first.strip()!r} {found} times; once is needed")
        begin = page.index(first)
        end = begin + len(re.match(r"(?:\|.*\n)*", page[begin:])[0])
        lines = [heading, ["---"] * len(heading), *rows]
        page = page[:begin] + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + page[end:]
    return page


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
