"""The fairness of a study: the trials, tokens, compute and time of each arm, and how its trials ended."""

from typing import Any

import pandas as pd

from analysis.io.assemble import Study
from analysis.io.names import OUTCOMES, STAGES
from analysis.io.trials import confirm_rows

SLOWER = 0.98  # an arm counts as slower below this share of the baseline's speed
COLUMNS = {
    "arm": ("arm", ""),
    "search": ("search trials", "d"),
    "calibrate": ("calibrate trials", "d"),
    "confirm": ("confirm trials", "d"),
    "tokens": ("tokens", ".3g"),
    "flops": ("FLOPs", ".3g"),
    "seconds": ("seconds", ".0f"),
    "stopped_early": ("stopped early", "d"),
    "infeasible": ("infeasible", "d"),
    "failed": ("failed", "d"),
    "parameters": ("parameters", ",.0f"),
    "flops_per_token": ("FLOPs per token", ".3g"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "speed": ("relative speed", ".2f"),
    "flops_utilisation": ("FLOPs utilisation", ".3f"),
    "compiled": ("share compiled", ".2f"),
    "peak_rss_mb": ("peak memory (MB)", ".0f"),
    "peak_gpu_mb": ("peak GPU memory (MB)", ".0f"),
}
PUBLISHED = {k: v for k, v in COLUMNS.items() if k != "tokens_per_second"}  # the speed depends on the machine


def ledger(study: Study) -> list[dict[str, Any]]:
    """Tabulate the trials, tokens, compute and speed of each arm, one row per arm.

    `flops` sums tokens * flops_per_token over all trials, and is None if they are not recorded. `speed` compares
    confirm runs: the median over seeds of the arm's tokens per second divided by those of the baseline's run of the
    same seed. It is paired because the load and the machines change over time. `tokens_per_second` is the median over
    the completed confirm runs too, or over all trials without any. `flops_utilisation` (of a GPU's bfloat16 peak) is
    the median over the completed trials of all stages, and `compiled` the share of them that torch.compile compiled.
    Memory is the largest peak of any trial.
    """
    rows = []
    speeds = _speeds(study)
    for arm in study.arms:
        trials = study.trials[study.trials["arm"] == arm]
        row: dict[str, Any] = {"arm": arm}
        row |= {stage: int((trials["stage"] == stage).sum()) for stage in STAGES}
        row |= {o: int((trials["outcome"] == o).sum()) for o in OUTCOMES[1:]}
        row |= {"tokens": _reduce(trials, "tokens", "sum"), "seconds": _reduce(trials, "seconds", "sum")}
        largest = ("parameters", "flops_per_token", "peak_rss_mb", "peak_gpu_mb")
        row |= {c: _reduce(trials, c, "max") for c in largest}
        done = trials[trials["outcome"] == "completed"]
        confirmed = done[done["stage"] == "confirm"]
        row["tokens_per_second"] = _reduce(confirmed if len(confirmed) else done, "tokens_per_second", "median")
        row["flops_utilisation"] = _reduce(done, "flops_utilisation", "median")
        row["compiled"] = _reduce(done, "compiled", "mean")
        both = {"tokens", "flops_per_token"} <= set(trials.columns)
        product = trials["tokens"] * trials["flops_per_token"] if both else pd.Series(dtype=float)
        row["flops"] = float(product.sum()) if product.notna().any() else None
        row["speed"] = speeds.get(arm)
        rows.append(row)
    return rows


def _reduce(trials: pd.DataFrame, column: str, how: str) -> float | None:
    if column not in trials.columns or not trials[column].notna().any():
        return None
    return float(getattr(trials[column], how)())


def _speeds(study: Study) -> dict[str, float]:
    runs = confirm_rows(study.trials)
    if "tokens_per_second" not in runs.columns or study.baseline not in set(runs["arm"]):
        return {}
    runs = runs[runs["outcome"] == "completed"]
    table = runs.pivot_table(index="seed", columns="arm", values="tokens_per_second", aggfunc="mean")
    if study.baseline not in table.columns:
        return {}
    ratios = table.div(table[study.baseline], axis=0).median().dropna()
    return {str(arm): float(ratio) for arm, ratio in ratios.items()}


def slower(rows: list[dict[str, Any]], unit: str = "tokens") -> str:
    """Name the arms that train more than 2% slower than the baseline in one sentence; empty if there is none.

    An arm is slower if both its relative speed and its tokens per second say so. `unit` is that of the budget.
    """
    base = next((r["tokens_per_second"] for r in rows if r["speed"] == 1), None)
    known = [r for r in rows if r["speed"] is not None and r["speed"] < SLOWER]
    named = [f"{r['arm']} ({r['speed']:.2f})" for r in known if base is None or r["tokens_per_second"] < base]
    return f"Slower than the baseline, at equal {unit}: {', '.join(named)} of its speed." if named else ""


def unfair(rows: list[dict[str, Any]], own: bool = False) -> list[str]:
    """Name each difference between the arms' numbers of trials, one line per stage.

    Args:
        rows: The rows of `ledger`.
        own: Only arms with hyperparameters of their own search (`search.arms`), so the others have no search trials.
    """
    notes = []
    for key, name in (("search", "search trials"), ("calibrate", "calibration trials")):
        counts = {r["arm"]: r[key] for r in rows if r[key] or not (own and key == "search")}
        if len(set(counts.values())) > 1:
            notes.append(f"unequal {name}: " + ", ".join(f"{a} {n}" for a, n in counts.items()))
    return notes
