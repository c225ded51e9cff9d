"""Sections of `docs/performance.md` on a trial: steps, arms, ideas tried, precisions, memory, start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import trial_precision
from goals import NANO, TRAINER, TRAINER_COMPILED, emulates_bfloat16
from trial_ideas import ALLOCATORS

PATHS = {"never": "uncompiled", "always": "compiled"}
MORE_WORK = ("dropout 0.1", "GELU composed of single operations")  # the engine's step and additional work
FIXED = "each round in one fixed order, the first row first"
SHUFFLED = "each round in another order, drawn by a seed"


def ratio(spread: Mapping[str, float]) -> str:
    """Return "median (quartiles)"."""
    return f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"


def _shape(row: Mapping[str, Any], precision: str | None = None) -> str:
    return f"d_model {row['d_model']}, T {row['n_ctx']}, V {row['vocab_size']:,}, {precision or row['precision']}"


def _environment_note(environment: Mapping[str, str]) -> str:
    """Name the environment variables of the engine's process, if it had its own."""
    pairs = ", ".join(f"`{name}={value}`" for name, value in environment.items())
    return f" The engine runs as in a worker of a study: in its own process, with {pairs}." if pairs else ""


def step(row: Mapping[str, Any]) -> str:
    """Return a row of the table of training steps.

    The Trainer always computes in float32, so its share of another precision's ceiling is left out.
    """
    rate = f"{row['tokens_per_second']['median']:,.0f}"
    trainer = row["variant"] in (TRAINER, TRAINER_COMPILED)
    shape, of_gemm = _shape(row, "float32" if trainer else None), ratio(row["of_gemm"])
    if trainer and row["precision"] != "float32":
        shape, of_gemm = f"{shape}, beside {row['precision']}", "-"
    return f"| {shape} | {row['variant']} | {rate} | {ratio(row['ratio'])} | {of_gemm} |"


def order(found: Mapping[str, Any]) -> str:
    """Describe the order in which the variants of a part ran."""
    return SHUFFLED if found.get("order") else FIXED


def under(where: Mapping[str, Any]) -> str:
    """The load of a part, in a sentence to stand under its heading."""
    busy = ": other work ran, too; rates are low and quartiles wide" if where["load"] > where["cores"] else ""
    return f"Load average at the start {where['load']} on {where['cores']} cores{busy}."


def order_effects(rows: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return, by shape, the rows that do more work than the engine and yet were faster in three of four rounds.

    Such a row shows the order of the rows or a drift of the machine, so no other row of that shape can be trusted.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["idea"] in MORE_WORK and row["ratio"]["low"] > 1:
            found.setdefault(_shape(row), []).append(row)
    return found


def _tried(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    spoilt = order_effects(rows)
    fixed = sorted({_shape(row) for row in rows if "order" not in row})
    if fixed:
        yield f"The engine with one thing changed, uncompiled unless it says so; {FIXED} ({'; '.join(fixed)})."
    else:
        yield f"The engine with one thing changed, uncompiled unless it says so; {SHUFFLED}."
    for shape, controls in spoilt.items():
        named = " and ".join(f"`{row['idea']}` {row['ratio']['median']:.2f}" for row in controls)
        most = max(row["ratio"]["median"] for row in controls) - 1
        yield (
            f"At {shape}, {named} do more work than the engine and yet come out faster: an effect of the order or of a "
            f"drift, of about {most:.2f}. The rows marked * select nothing. `python benchmarks/trial_speed.py --only "
            f"ideas --shape {shape.split(', ')[2].removeprefix('V ').replace(',', '')}` takes them again."
        )
    yield ""
    yield "| shape | idea | speed over the engine's |"
    yield "| --- | --- | --- |"
    for row in rows:
        mark = " *" if _shape(row) in spoilt and row["idea"] not in ALLOCATORS else ""
        load = f" (load {row['load']}, {row['date']})" if "load" in row else ""
        yield f"| {_shape(row)} | {row['idea']} | {ratio(row['ratio'])}{mark}{load} |"


def trial(found: Mapping[str, Any], by: str) -> list[str]:
    """Return the section on the cost of a trial."""
    where = found["machine"]
    emulated = (
        [
            "",
            f"This processor has no bfloat16 units ({where['instructions']}). It emulates bfloat16, several times "
            "slower than float32, in the products too. The bfloat16 goals cannot be judged on it.",
        ]
        if emulates_bfloat16(where)
        else []
    )
    nano = (
        f" {NANO} is a loop in the manner of its `train.py` and `model.py`, uncompiled: no biases, query, key and "
        "value in one product, fused AdamW."
        if any(row["variant"] == NANO for row in found["speed"])
        else ""
    )
    return [
        "## A training step",
        "",
        f"{by} One core; {order(found)}.",
        "",
        "4 layers, 1,024 tokens per step. The ratio is to the first variant of a shape. The last column is the speed "
        "relative to square matrix products in that precision, measured in the same rounds. Hugging Face's Trainer "
        "computes in float32, with dropout of 0.1." + nano + _environment_note(found.get("worker", {})),
        *emulated,
        "",
        "Compiled and uncompiled runs agree: every loss and gradient norm of 12 float32 steps within 1e-5 relative for "
        "the sigmoid gate, and within 1e-4 for every arm (`tests/pagating/model/test_compile.py`). `compiled` in "
        "MLflow and in `trials.parquet` says which path ran: 1 or 0.",
        "",
        "| shape | variant | tokens/s | ratio | of GEMM |",
        "| --- | --- | --- | --- | --- |",
        *[step(row) for row in found["speed"]],
        "",
        "## Arms against GELU",
        "",
        under(where),
        "",
        "| arm | path | speed over GELU's |",
        "| --- | --- | --- |",
        *[f"| {row['arm']} | {PATHS[row['path']]} | {ratio(row['ratio'])} |" for row in found["arms"]],
        "",
        "## What was tried",
        "",
        under(where),
        "",
        *_tried(found["ideas"]),
        "",
        "## Precisions",
        "",
        f"The last loss of a tiny model on the built-in text, paired by seed. The table compares the change by "
        f"bfloat16 (a 95% interval) with the change by another seed. {under(where)}",
        "",
        "| | float32 | bfloat16 | bfloat16 - float32 | standard deviation over seeds | seeds x steps |",
        "| --- | --- | --- | --- | --- | --- |",
        *[trial_precision.line(row) for row in found["precision"]],
        "",
        trial_precision.limits(found["precision"]),
        "",
        "## Memory and start",
        "",
        under(where),
        "",
        *[
            f"- {name}: {', '.join(f'{k} {v:,.0f} MiB' for k, v in row.items())}"
            for name, row in found["memory"].items()
        ],
        "- tokens: each trial maps the packed file, so 20 processes hold it once and not 20 times "
        "(`tests/pagating/data/test_shared_tokens.py`)",
        *[f"- torch.compile, {name} cache: {seconds:.1f} s" for name, seconds in found["compile"].items()],
        *[f"- import {name}: {ratio(times)} s" for name, times in found["start"].items()],
    ]
