"""`docs/performance.md` from the figures of the benchmarks, each kept in `docs/performance.json` when it was run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trial_precision

PATHS = {"never": "uncompiled", "always": "compiled"}
HEAD = """# Performance

Written by `make bench`. A ratio is the median (quartiles) over interleaved rounds of one run; above 1 is faster. What
is said here holds on the machine that each part names, at the load that it had.
"""


def keep(folder: Path, part: str, found: Mapping[str, Any]) -> None:
    """Put the figures of one benchmark into `performance.json` of the folder, and write the page again."""
    if part not in PARTS:
        raise KeyError(f"{part} is none of {', '.join(PARTS)}")
    path = folder / "performance.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[part] = plain(found)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (folder / "performance.md").write_text(page(kept), encoding="utf-8")


def plain(found: Any) -> Any:
    """The figures as JSON gives them back."""
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def page(kept: Mapping[str, Any]) -> str:
    """The page: the parts that have been measured, in the order of `PARTS`."""
    blocks = [HEAD.rstrip()]
    for part, (script, lines) in PARTS.items():
        if part in kept:
            blocks += ["\n".join(lines(kept[part], measured_by(script, kept[part]["machine"])))]
    return "\n\n".join(blocks) + "\n"


def measured_by(script: str, where: Mapping[str, Any]) -> str:
    """The command, the machine and the day, in a sentence."""
    return (
        f"`python benchmarks/{script}` on {where['date']}: {where['processor']}, {where['cores']} cores, "
        f"{where['instructions']}, torch {where['torch']}, Python {where['python']}; load average at the start "
        f"{where['load']}."
    )


def ratio(spread: Mapping[str, float]) -> str:
    """Median (quartiles)."""
    return f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"


def _shape(row: Mapping[str, Any]) -> str:
    return f"d_model {row['d_model']}, T {row['n_ctx']}, V {row['vocab_size']:,}, {row['precision']}"


def step(row: Mapping[str, Any]) -> str:
    """A row of the table of training steps."""
    rate = f"{row['tokens_per_second']['median']:,.0f}"
    return f"| {_shape(row)} | {row['variant']} | {rate} | {ratio(row['ratio'])} | {ratio(row['of_gemm'])} |"


def trial(found: Mapping[str, Any], by: str) -> list[str]:
    """What a trial costs."""
    return [
        "## A training step",
        "",
        f"{by} One core.",
        "",
        "4 layers, 1,024 tokens a step. The ratio is to the first variant of a shape; the last column is the share of "
        "what square matrix products reach in that precision, measured in the same rounds.",
        "",
        "| shape | variant | tokens/s | ratio | of GEMM |",
        "| --- | --- | --- | --- | --- |",
        *[step(row) for row in found["speed"]],
        "",
        "## Arms against GELU",
        "",
        "| arm | path | speed over GELU's |",
        "| --- | --- | --- |",
        *[f"| {row['arm']} | {PATHS[row['path']]} | {ratio(row['ratio'])} |" for row in found["arms"]],
        "",
        "## What was tried",
        "",
        "The engine with one thing changed, uncompiled unless it says so; the largest median is what would pay most.",
        "",
        "| shape | idea | speed over the engine's |",
        "| --- | --- | --- |",
        *[f"| {_shape(row)} | {row['idea']} | {ratio(row['ratio'])} |" for row in found["ideas"]],
        "",
        "## Precisions",
        "",
        "Last loss of a tiny model on the built-in text, paired by seed: what bfloat16 changes, as a 95% "
        "interval, against what a seed changes.",
        "",
        "| | float32 | bfloat16 | bfloat16 - float32 | standard deviation over seeds | seeds x steps |",
        "| --- | --- | --- | --- | --- | --- |",
        *[trial_precision.line(row) for row in found["precision"]],
        "",
        "## Memory and start",
        "",
        *[
            f"- {name}: {', '.join(f'{k} {v:,.0f} MiB' for k, v in row.items())}"
            for name, row in found["memory"].items()
        ],
        *[f"- torch.compile, {name} cache: {seconds:.1f} s" for name, seconds in found["compile"].items()],
        *[f"- import {name}: {ratio(times)} s" for name, times in found["start"].items()],
    ]


def packed(found: Mapping[str, Any], by: str) -> list[str]:
    """What a pack of trials gains."""

    def line(row: Mapping[str, Any]) -> str:
        alone, together = (f"{row[name]['median']:,.0f}" for name in ("in turn", "packed"))
        return f"| {row['trials']} | {row['device']} | {alone} | {together} | {ratio(row['ratio'])} |"

    return [
        "## Packed trials",
        "",
        by,
        "",
        "Trials of one shape (d_model 128, T 128, V 4,096) as one batched model, against the same trials in turn.",
        "",
        "| trials | device | tokens/s in turn | tokens/s packed | ratio |",
        "| --- | --- | --- | --- | --- |",
        *[line(row) for row in found["rows"]],
    ]


def study(found: Mapping[str, Any], by: str) -> list[str]:
    """What a study costs beside its training."""
    lines = [
        "## A study beside its training",
        "",
        f"{by} The trials are simulated: they sleep {found['trial_seconds']:g} s each.",
        "",
        "| slots | trials | wall seconds, first to last trial | share of slot seconds that trials train |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        if name.startswith("occupancy"):
            lines.append(f"| {row['slots']} | {row['trials']} | {row['wall_seconds']:.0f} | {row['occupancy']:.3f} |")
    lines += ["", f"- `pagating --help`: {found['help_seconds']:.2f} s"]
    lines += [f"- `pagating sweep` to the first evaluation of a trial, warm: {found['start_seconds']:.1f} s"]
    for name, words in (("tracking_sqlite", "to SQLite"), ("tracking_dead_server", "to a server that is down")):
        row = found[name]
        lines.append(
            f"- tracking {words}: {row['calls_ms']:.3f} ms a report in the driver's calls, {row['processor_ms']:.2f} "
            f"ms of the driver's processor, {row['owed']:.0f} cells owed at the end"
        )
    return lines


def gates(found: Mapping[str, Any], by: str) -> list[str]:
    """What the units alone cost."""
    lines = [
        "## The units alone",
        "",
        f"{by} Forward and backward, time over that of torch's fused GELU (below 1 is faster), and what is kept for "
        "the backward pass.",
        "",
        "| shape | dtype | unit | time over GELU's | bytes kept an element |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        shape = " x ".join(map(str, row["shape"]))
        kept = f"{row['kept_bytes_per_element']:.2f}"
        lines.append(f"| {shape} | {row['dtype']} | {row['variant']} | {spread} | {kept} |")
    return lines


def table(found: Mapping[str, Any], by: str) -> list[str]:
    """What a report of very many trials costs."""
    return [
        "## A large table",
        "",
        f"{by} A report of {found['trials']:,} trials: {found['seconds']:.1f} s, {found['peak_gigabytes']:.2f} GB at "
        f"the most, a page of {found['report_megabytes']:.1f} MB.",
    ]


PARTS: dict[str, tuple[str, Callable[[Mapping[str, Any], str], list[str]]]] = {
    "trial": ("trial_speed.py", trial),
    "packed": ("packed_speed.py", packed),
    "study": ("study_overhead.py", study),
    "gates": ("gate_cost.py", gates),
    "table": ("large_table.py", table),
}
