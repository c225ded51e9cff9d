"""Write `docs/performance.md` from the figures of the benchmarks, which `docs/performance.json` keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import goals
import performance_headline
import performance_trial

HEAD = """# Performance

Written by `make bench`. A ratio is the median (quartiles) over interleaved rounds of one run; above 1 is faster. Each
part holds for the machine and the load that it names.
"""


def keep(folder: Path, part: str, found: Mapping[str, Any]) -> None:
    """Save the results of one benchmark in `performance.json` of the folder, and write the page again."""
    if part not in PARTS:
        raise KeyError(f"{part} is none of {', '.join(PARTS)}")
    path = folder / "performance.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[part] = plain(found)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (folder / "performance.md").write_text(page(kept), encoding="utf-8")


def plain(found: Any) -> Any:
    """Return the results as JSON reads them back."""
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def page(kept: Mapping[str, Any]) -> str:
    """Return the page: the goals, then the measured parts in the order of `PARTS`."""
    blocks = [HEAD.rstrip(), "\n".join(goals.section(kept))]
    for part, (script, lines) in PARTS.items():
        if part in kept:
            where = kept[part]["machine"]
            by = measured_by(script, where) if "processor" in where else measured_on(script, where)
            blocks += ["\n".join(lines(kept[part], by))]
    return "\n\n".join(blocks) + "\n"


def measured_by(script: str, where: Mapping[str, Any]) -> str:
    """Name the command, the machine and the date in one sentence."""
    return (
        f"`python benchmarks/{script}` on {where['date']}: {where['processor']}, {where['cores']} cores, "
        f"{where['instructions']}, torch {where['torch']}, Python {where['python']}; load average at the start "
        f"{where['load']}."
    )


def measured_on(script: str, where: Mapping[str, Any]) -> str:
    """Name the command, the card and the date in one sentence."""
    return (
        f"`python benchmarks/{script}` on {where['date']}: one {where['card']}, torch {where['torch']}, CUDA "
        f"{where['cuda']}; its dense bfloat16 peak is {where['peak_tflops']:g} TFLOP/s."
    )


WHAT_ON_GPU = {
    "turn": "one trial, {what}",
    "pack": "pack, 3 x 128, 8,192 tokens per step and trial",
    "goal": "pack, 4 x 128, 1,024 tokens per step and trial",
    "small": "GPT-2 small (124M), n_ctx 1,024, {batch:,} tokens per step",
    "compiled": "{what}, 3 x 128, 8,192 tokens per step and trial, compiled",
}


def on_gpu(found: Mapping[str, Any], by: str) -> list[str]:
    """Return the section on one GPU: steps of packs and of single trials, and a study that trained on it."""

    def line(row: Mapping[str, Any]) -> str:
        what = WHAT_ON_GPU[row["part"]].format(**row)
        return (
            f"| {what} | {row.get('trials', 1)} | {row['precision']} | {row['ms']:.1f} | "
            f"{row['tokens_per_second']:,} | {row['utilisation']:.1%} | {row['peak_gpu_mb']:,} |"
        )

    study, ratio = found["study"], pack_ratio(found)
    return [
        "## On a GPU",
        "",
        by,
        "",
        "| step | trials | precision | ms | tokens/s, all trials | share of the peak | peak GPU memory, MiB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        *map(line, found["rows"]),
        "",
        f"A pack of 4 x 128 is {ratio:.0f} times as fast as its trials one after another. One measurement each, "
        "without a spread. Tried for GPT-2 small, and not measured yet: an output projection with a round number of "
        "rows.",
        "",
        f"A study on the same card: the last {study['cells']:,} cells of "
        f"[{study['name']}](results/{study['name']}/README.md) took {study['seconds']:,} s, in packs of up to 24, "
        f"three at a time. The card was busy for {study['gpu_busy']:.0%} of the time, at {study['watts']} W and with "
        f"at most {study['peak_gpu_mb']:,} MiB (means and maximum of {study['samples']} samples).",
    ]


def pack_ratio(found: Mapping[str, Any]) -> float:
    """Return how much faster the largest pack of 4 x 128 is than its trials one after another, in tokens/s."""
    turn = next(row for row in found["rows"] if row["part"] == "turn" and row["what"] == "4 x 128")
    return max(row["tokens_per_second"] for row in found["rows"] if row["part"] == "goal") / turn["tokens_per_second"]


def packed(found: Mapping[str, Any], by: str) -> list[str]:
    """Return the section on the speed of a pack of trials."""

    def line(row: Mapping[str, Any]) -> str:
        alone, together = (f"{row[name]['median']:,.0f}" for name in ("in turn", "packed"))
        return f"| {row['trials']} | {row['device']} | {alone} | {together} | {performance_trial.ratio(row['ratio'])} |"

    return [
        "## Packed trials",
        "",
        by,
        "",
        "Several small trials can train as one batched model if they differ only in arm, learning rate, schedule, "
        "decay, clipping and seed: `python -m pagating.packed trials.json`. The file holds a list of what `pagating "
        "trial STUDY CELL` prints. The command prints one line of final metrics per trial. A trial's results are those "
        "of the trial alone, up to the rounding of batched products: 1e-10 relative over a run in float64, 1e-4 in "
        "float32 (`tests/pagating/packed/test_packed.py`). Packing is meant for a GPU, which a small model leaves "
        "idle. A CPU gains nothing, as the table shows. Studies pack with `python -m pagating.cells --packed` "
        "(docs/cluster.md). To measure it on a GPU, some "
        "minutes: `python benchmarks/packed_speed.py --device cuda --precision bfloat16 --compile --output docs`.",
        "",
        "Trials of one shape (d_model 128, T 128, V 4,096), packed or one after the other; "
        f"{performance_trial.order(found)}:",
        "",
        "| trials | device | tokens/s one after the other | tokens/s packed | ratio |",
        "| --- | --- | --- | --- | --- |",
        *[line(row) for row in found["rows"]],
    ]


def study(found: Mapping[str, Any], by: str) -> list[str]:
    """Return the section on the cost of a study besides its training."""
    lines = [
        "## A study beside its training",
        "",
        f"{by} The trials are simulated: each sleeps for {found['trial_seconds']:g} s.",
        "",
        "| slots | trials | wall seconds, first to last trial | share of the slots' time that trials fill |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        if name.startswith("occupancy"):
            lines.append(f"| {row['slots']} | {row['trials']} | {row['wall_seconds']:.0f} | {row['occupancy']:.3f} |")
    lines += [
        "",
        "The processes of the slots start before their study begins, because simulated slots share cores at their "
        "start, which real ones do not. The cost of a start is below.",
    ]
    lines += ["", f"- `pagating --help`: {found['help_seconds']:.2f} s"]
    if "report_seconds" in found:
        lines += [f"- `pagating status`: {found['status_seconds']:.2f} s"]
        lines += [f"- `pagating report` of the laptop study: {found['report_seconds']:.1f} s"]
    lines += [f"- `pagating sweep` to the first evaluation of a trial, warm: {found['start_seconds']:.1f} s"]
    for name, words in (("tracking_sqlite", "to SQLite"), ("tracking_dead_server", "to a server that is down")):
        row = found[name]
        lines.append(
            f"- tracking {words}: {row['calls_ms']:.3f} ms per report in the driver's calls, {row['processor_ms']:.2f} "
            f"ms of processor time of the driver, {row['owed']:.0f} cells not written at the end"
        )
    return lines


def gates(found: Mapping[str, Any], by: str) -> list[str]:
    """Return the section on the cost of the units alone."""
    lines = [
        "## The units alone",
        "",
        f"{by} {performance_trial.order(found).capitalize()}. The time is forward and backward, "
        "relative to torch's fused GELU; below 1 is faster. The bytes are those kept for the backward pass.",
        "",
        "| shape | dtype | unit | time over GELU's | bytes kept per element |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        shape = " x ".join(map(str, row["shape"]))
        kept = f"{row['kept_bytes_per_element']:.2f}"
        lines.append(f"| {shape} | {row['dtype']} | {row['variant']} | {spread} | {kept} |")
    return lines


def table(found: Mapping[str, Any], by: str) -> list[str]:
    """Return the section on the cost of a report of very many trials."""
    return [
        "## A large table",
        "",
        f"{by} A report of {found['trials']:,} trials: {found['seconds']:.1f} s, a peak of "
        f"{found['peak_gigabytes']:.2f} GB, a page of {found['report_megabytes']:.1f} MB.",
    ]


PARTS: dict[str, tuple[str, Callable[[Mapping[str, Any], str], list[str]]]] = {
    "headline": ("headline.py", performance_headline.lines),
    "trial": ("trial_speed.py", performance_trial.trial),
    "packed": ("packed_speed.py", packed),
    "gpu": ("gpu_check.py", on_gpu),
    "study": ("study_overhead.py", study),
    "gates": ("gate_cost.py", gates),
    "table": ("large_table.py", table),
}
