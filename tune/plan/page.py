"""Show a plan as a table for the terminal, or as one JSON object."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from analysis.io.names import STAGES
from analysis.io.text import amount, duration, readable

FORMS = ("terminal", "json")


def spread_text(span: Sequence[float], form: Any) -> str:
    """Return `expected (least - most)`, or one number if all look alike. `form` is a number format or a function."""
    least, expected, most = (form(value) if callable(form) else format(value, form) for value in span)
    return expected if least == most else f"{expected} ({least} - {most})"


def show(plan: dict[str, Any], form: str) -> str:
    """Return the plan in one of `FORMS`."""
    if form == "json":
        return json.dumps(plan, indent=1, allow_nan=False)
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=110, highlight=False)
    console.print(_work(plan))
    for line in _lines(plan):
        console.print(line, markup=False, soft_wrap=True)
    return out.getvalue().rstrip("\n")


def _work(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{plan['study']}: expected (least - most)", title_justify="left")
    first = ("rung", "stage", "arm") if "rungs" in plan else ("stage", "arm")
    unit = plan.get("names", {}).get("budget", "tokens")
    forms: tuple[tuple[str, Any], ...] = (("cells", ".3g"), ("tokens", amount), ("flops", amount))
    if "names" in plan:  # nobody knows the model of the user's own training
        forms = forms[:2]
    for column in (*first, *("cells", unit, "FLOPs")[: len(forms)]):
        table.add_column(column, justify="left" if column in first else "right")
    for row in plan["work"]:
        table.add_row(*(str(row[name]) for name in first), *(spread_text(row[name], form) for name, form in forms))
    table.add_section()
    table.add_row("all", *[""] * (len(first) - 1), *(spread_text(plan["total"][name], form) for name, form in forms))
    return table


def _lines(plan: dict[str, Any]) -> list[str]:
    seconds, memory, names = plan["seconds"], plan["memory"], plan.get("names", {})
    disk = {name: parts for name, parts in plan["disk"].items() if name != "corpus"}
    rates = ", ".join(f"{arm} {amount(rate)}" for arm, rate in plan["speeds"].items())
    stages = ", ".join(f"{name} {spread_text(seconds[name], duration)}" for name in STAGES)
    sizes = ", ".join(f"{name} {readable(parts[1])}" for name, parts in disk.items() if parts[2])
    whole = [sum(parts[i] for parts in disk.values()) for i in range(3)]
    corpus = plan["disk"]["corpus"]
    slot = sum(memory.values())
    lines = [
        f"Time:   {spread_text(seconds['wall'], duration)} on {plan['slots']} slot{'s' * (plan['slots'] > 1)}; "
        f"expected end {plan['expected_end']}",
        f"        {stages}; start {duration(seconds['start'] + seconds['slot'])}, report {duration(seconds['end'])}",
        f"        from {plan['hours_from']}",
        f"        {names.get('budget', 'tokens')}/s per slot: {rates}",
        f"Disk:   {spread_text(whole, readable)}: {sizes}" + (f"; token cache {readable(corpus)}" if corpus else ""),
        f"Memory: {readable(slot)} per slot, {readable(slot * plan['slots'])} for all: "
        + ", ".join(f"{name} {readable(part)}" for name, part in memory.items()),
        *_power(plan["power"], plan["noise_from"], names.get("metric")),
    ]
    return lines + [f"Note:   {note}" for note in plan["notes"]]


def _power(power: dict[str, Any] | None, source: str | None, metric: str | None) -> list[str]:
    if power is None:
        return [
            "Power:  unknown without the noise: give --noise with an earlier study or a percentage such as 0.3%",
            *["        (docs/plan.md lists the noise of the published studies)"] * (metric is None),
        ]
    metric = metric or "loss"
    needed = f"{power['needed']} seeds" if power["needed"] else "more than 10,000 seeds"
    return [
        f"Power:  {power['power']:.0%} to see a difference of {power['effect']:.2%} of the baseline's {metric}, with "
        f"{power['seeds']:.3g} seeds at level {power['level']:.3g} ({power['level_is']})",
        f"        80%: for a difference of {power['smallest']:.2%}; or for {power['effect']:.2%} with {needed}",
        f"        noise: paired differences have a standard deviation of {power['noise']:.2%} of the {metric}; "
        f"{source}",
    ]
