"""Effect of bfloat16 on a study's losses, compared with the effect of a seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy import stats

from pagating.data.prepare import prepare
from pagating.train import train
from pagating.trial import Trial

TINY = {"n_layer": 2, "d_model": 32, "n_head": 2, "n_ctx": 64, "initializer_range": 0.06}
BATCH_TOKENS = 512


def agreement(folder: Path, seeds: int, steps: int, arms: Mapping[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Compare last losses of two arms on the built-in text in both precisions: means, paired difference, spread."""
    text = str(prepare({"source": "builtin"}, {"vocab_size": 512}, 64, folder / "cache"))
    settings = {
        "corpus": text,
        "model": TINY,
        "lr": 4e-3,
        "tokens": BATCH_TOKENS * steps,
        "batch_tokens": BATCH_TOKENS,
        "eval_windows": 64,
    }

    def last(precision: str, unit: dict[str, Any] | None) -> list[float]:
        each = [Trial(**settings, seed=seed, unit=unit, precision=precision) for seed in range(seeds)]
        return [list(train(trial))[-1]["val_nll"] for trial in each]

    found = {arm: {p: last(p, unit) for p in ("float32", "bfloat16")} for arm, unit in arms.items()}
    gap = {p: [b - a for a, b in zip(*(found[arm][p] for arm in found), strict=True)] for p in ("float32", "bfloat16")}
    rows = []
    for name, values in (*found.items(), ("the second less the first", gap)):
        exact, rounded = values["float32"], values["bfloat16"]
        interval = stats.ttest_rel(rounded, exact).confidence_interval(0.95)
        rows.append(
            {
                "what": name,
                "float32": statistics.mean(exact),
                "bfloat16": statistics.mean(rounded),
                "seed_sd": statistics.stdev(exact),
                "difference_low": float(interval.low),
                "difference_high": float(interval.high),
                "seeds": seeds,
                "steps": steps,
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    change = f"[{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
    means = f"{row['float32']:.4f} | {row['bfloat16']:.4f}"
    return f"| {row['what']} | {means} | {change} | {row['seed_sd']:.4f} | {row['seeds']} x {row['steps']} |"


def limits(rows: list[dict[str, Any]]) -> str:
    """Name the limits of the table in one sentence."""
    if not rows:
        return "Not measured."
    seeds, steps = rows[0]["seeds"], rows[0]["steps"]
    return (
        f"The evidence is two arms of {TINY['n_layer']} layers of width {TINY['d_model']}, {seeds} seeds and {steps} "
        f"steps of {BATCH_TOKENS} tokens. Rounding is far below the noise of seeds there. This is not shown for a "
        "study's own size or length, for other arms, or for a processor or GPU with bfloat16 units, which rounds in "
        "another order."
    )
