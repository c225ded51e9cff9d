"""Estimate what a search budget buys: the expected best loss of n trials per arm.

`pagating budget STUDY`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.describe.hyperparameters import ALPHA_COLUMNS, against_alpha, importance
from analysis.describe.hyperparameters import COLUMNS as IMPORTANCE_COLUMNS
from analysis.io import command, formats
from analysis.io.assemble import Study
from analysis.stats.paired_tests import Values

COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "budget": ("trials", "d"),
    "with_replacement": ("expected best, with replacement", ".4f"),
    "without_replacement": ("expected best, without", ".4f"),
    "infeasible": ("infeasible of all", ""),
}
EACH = 100  # budgets up to this one are all shown


def expected_best(losses: Values, replacement: bool, budgets: Sequence[int] | None = None) -> list[float]:
    """Return the expected lowest loss of b trials drawn from the n seen, for each budget b.

    With replacement, P(the best is the i-th lowest) = ((n-i+1)/n)^b - ((n-i)/n)^b, biased high for b near n (Dodge et
    al. 2019, arXiv 1909.03004). Without replacement, it is C(n-i, b-1) / C(n, b), unbiased (Tang et al. 2020, arXiv
    2004.13705). The code multiplies b / n by (n-k-b+1) / (n-k) for all k < i, which avoids large numbers.

    Args:
        losses: The n losses; +inf stands for an infeasible trial.
        replacement: True to draw with replacement.
        budgets: Values of b; None for 1..n.

    Returns: One loss per budget; +inf if the best trial may be infeasible.
    Raises: ValueError if there is no loss, or one is NaN.
    """
    x = np.sort(np.asarray(losses, float))
    n = len(x)
    if not n or np.isnan(x).any():
        raise ValueError(f"{n} losses, {int(np.isnan(x).sum())} of them NaN; an infeasible trial counts as +inf")
    out = []
    k = np.arange(1, n)
    for b in range(1, n + 1) if budgets is None else budgets:
        if replacement:
            rest = (np.arange(n, -1, -1) / n) ** b
            weight = rest[:-1] - rest[1:]
        else:
            weight = b / n * np.cumprod(np.append(1.0, np.maximum(n - k - b + 1, 0) / (n - k)))
        out.append(float(x[weight > 0] @ weight[weight > 0]))
    return out


def shown_budgets(n: int) -> list[int]:
    """Return the budgets of a curve over n trials: each up to 100, then about 100 more at equal log steps."""
    if n <= EACH:
        return list(range(1, n + 1))
    return [*range(1, EACH), *sorted({round(b) for b in np.geomspace(EACH, n, EACH)})]


def curves(study: Study) -> list[dict[str, Any]]:
    """Return one row per arm and budget, from the val_nll (nats per token) of the arm's own search trials.

    A trial stopped early counts with the loss it had. It would have ended lower, so the curve is an upper bound.
    """
    search = study.trials[study.trials["stage"] == "search"]
    rows: list[dict[str, Any]] = []
    for arm in study.arms:
        trials = search[(search["arm"] == arm) & (search["outcome"] != "failed")]
        if trials.empty:
            continue
        lost = (trials["outcome"] == "infeasible") | ~np.isfinite(trials["val_nll"].astype(float))
        losses = trials["val_nll"].astype(float).where(~lost, np.inf).to_numpy()
        budgets = shown_budgets(len(losses))
        both = (expected_best(losses, kind, budgets) for kind in (True, False))
        for budget, with_, without in zip(budgets, *both, strict=True):
            expected = {"with_replacement": with_, "without_replacement": without}
            known = {key: study.turn * loss if math.isfinite(loss) else None for key, loss in expected.items()}
            share = f"{int(lost.sum())} of {len(trials)}"
            rows.append({"arm": arm, "budget": budget, **known, "infeasible": share})
    return rows


def main(argv: list[str] | None = None, prog: str = "python -m analysis.budget") -> int:
    """Run the script; return the exit code."""
    options = command.parser(prog, __doc__).parse_args(argv)
    study = command.study(options)
    rows = curves(study)
    if not rows:
        below = [each.rung for each in study.ladder.rungs if curves(each)] if study.ladder else []
        return command.nothing_to_show(
            "no search trials" + (f" here; arms searched on --rung {below[0]}" if below else "")
        )
    command.emit_rows(
        rows,
        COLUMNS,
        options.format,
        title=f"Expected best {study.own.name if study.own else 'val_nll'} of n search trials",
    )
    if options.format == "terminal":
        for name, (more, columns) in {
            "Importance of hyperparameters (PED-ANOVA)": (importance(study), IMPORTANCE_COLUMNS),
            "Loss against the searched alpha": (against_alpha(study), ALPHA_COLUMNS),
        }.items():
            if more:
                command.emit_rows(more, columns, "terminal", title=name)
    return 0
