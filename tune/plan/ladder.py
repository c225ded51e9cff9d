"""Join the plans of a ladder's rungs into one plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.io.text import amount
from tune.study.sizes import Span
from tune.study.study import Study

LEAST_RUNGS = 3
OF_THE_LARGEST = ("report", "models", "checkpoints")  # parts of the disk that exist for one rung at a time


def join_plans(study: Study, plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the plan of a ladder from those of its rungs, from the lowest.

    Counts, seconds and records are sums. Memory, models, speeds and power are those of the highest rung. The plans of
    the rungs stay under `rungs`.

    Args:
        study: The ladder.
        plans: The plan of each rung (`tune.plan.plan.make_plan`).
    """
    top = plans[-1]
    beside = ("start", "slot", "end")
    seconds: dict[str, Any] = {name: top["seconds"][name] for name in beside}
    for name in top["seconds"]:
        if name not in beside:
            seconds[name] = _sum(plan["seconds"][name] for plan in plans)
    again = (len(plans) - 1) * sum(top["seconds"][name] for name in beside)  # the command starts and ends once
    seconds["wall"] = tuple(value - again for value in seconds["wall"])
    disk = {name: _sum(plan["disk"][name] for plan in plans) for name in top["disk"] if name != "corpus"}
    return {
        **top,
        "work": [
            {"rung": number, **row}
            for number, plan in enumerate(plans, 1)
            for row in plan["work"]
            if row["cells"][2]  # no search above the lowest rung
        ],
        "total": {name: _sum(plan["total"][name] for plan in plans) for name in top["total"]},
        "seconds": seconds,
        "disk": {**disk, **{name: top["disk"][name] for name in (*OF_THE_LARGEST, "corpus")}},
        "rungs": list(plans),
    }


def lengths(study: Study, plans: Sequence[dict[str, Any]], train_tokens: int | None) -> list[str]:
    """Return a line per rung with its size, the tokens of a trial, and how often a trial reads the training text.

    Args:
        study: The ladder.
        plans: The plan of each rung.
        train_tokens: Tokens of the training split, or None if unknown.
    """
    said = ["a trend needs three or more sizes: with fewer, each size has its verdict, and nothing is said of more"] * (
        len(plans) < LEAST_RUNGS
    )
    for number, (rung, plan) in enumerate(zip(study.rungs, plans, strict=True), 1):
        tokens = rung.fixed.tokens
        size = plan["models"][study.baseline]["parameters"]
        often = f", {tokens / train_tokens:.2g} times the training text" if train_tokens else ""
        said.append(
            f"rung {number}: {rung.model.n_layer} x {rung.model.d_model}, {amount(size)} parameters, {amount(tokens)} "
            f"tokens per trial ({tokens / size:.3g} per parameter{often})"
        )
    return said


def _sum(spans: Any) -> Span:
    least, expected, most = (float(sum(values)) for values in zip(*spans, strict=True))
    return least, expected, most
