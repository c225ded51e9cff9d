"""Comparison of `pagating plan` with the study itself, which runs in a temporary folder.

python benchmarks/plan_accuracy.py CONFIG [--slots N] [--write docs/plan.md] [--record]

`--write` puts the table between the markers of a page. `--record` writes `tune/plan/measured.json`: measured values of
the parts without a formula, from this study and this machine. Nothing else should run at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine
from mlflow import MlflowClient

from analysis.io.text import amount, duration, readable
from tune.plan.page import spread_text
from tune.plan.probe import loop_seconds
from tune.run import ledger
from tune.study.cell import Record

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "tune" / "plan" / "measured.json"
START, END = "<!-- plan_accuracy: start -->", "<!-- plan_accuracy: end -->"


def pagating(*arguments: str) -> str:
    """Return the output of a `pagating` command. Raises RuntimeError if it neither concludes nor ends undecided."""
    done = subprocess.run(
        [sys.executable, "-m", "tune.cli", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pagating {' '.join(arguments)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder; 0 if it does not exist."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def actual(folder: Path, records: list[Record], wall: float) -> dict[str, Any]:
    """Measure what the study took: cells, tokens, training FLOPs, seconds, bytes by part, a worker's largest peak."""
    ended = [record for record in records if record.ended]
    finals = [record.final for record in ended]
    rate = {r.cell.arm: r.final["flops_per_token"] for r in ended if "flops_per_token" in r.final}
    top = folder.parents[1]
    in_mlflow = sum(size(path) for path in top.glob("mlruns/*/models"))
    return {
        "cells": len(ended),
        "tokens": sum(final["tokens"] for final in finals),
        "flops": sum(record.final["tokens"] * rate[record.cell.arm] for record in ended),
        "wall": wall,
        "disk": {
            "ledger": size(folder / "ledger.jsonl"),
            "tables": size(folder / "trials.parquet") + size(folder / "curves.parquet"),
            "report": sum(size(folder / name) for name in ("report.html", "figures", "tables", "verdict.json"))
            + size(top / "mlruns")
            - in_mlflow,
            "models": size(folder / "models") + in_mlflow,
            "ray": size(folder / "logs" / "ray"),
            "mlflow": size(top / "mlflow.db"),
        },
        "memory": max(final["peak_rss_mb"] for final in finals if "peak_rss_mb" in final) * (1 << 20),
    }


def table(plan: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return lines of a Markdown table: planned value, actual value, and ratio of the expected to the actual one."""
    memory = sum(plan["memory"].values())
    rows: list[tuple[str, list[float], float, Any]] = [
        ("cells", plan["total"]["cells"], found["cells"], lambda value: f"{value:.0f}"),
        ("tokens", plan["total"]["tokens"], found["tokens"], amount),
        ("time", plan["seconds"]["wall"], found["wall"], duration),
        ("memory of a slot", [memory] * 3, found["memory"], readable),
        *((name, plan["disk"][name], held, readable) for name, held in found["disk"].items() if held),
    ]
    lines = ["| what | planned (least - most) | was | expected / was |", "| --- | ---: | ---: | ---: |"]
    for name, span, was, form in rows:
        lines.append(f"| {name} | {spread_text(span, form)} | {form(was)} | {span[1] / was:.2f} |")
    return lines


# --- parts without a formula ------------------------------------------------------------------------------------------


def seconds_beside(records: list[Record], slots: int, began: float, ended: float) -> dict[str, float]:
    """Return the seconds before the first cell, of a worker's start, between a slot's cells, after the last cell."""
    cells = sorted((record for record in records if record.ended), key=lambda record: record.started or 0.0)
    first, later = cells[:slots], cells[slots:]
    trained = [record.final["seconds"] for record in later]
    usual = statistics.median(record.final["seconds"] for record in later if record.outcome == "completed")
    start, slot = _started(cells[0]), statistics.median(_took(record) - usual for record in first)
    last = max(record.ended or 0.0 for record in cells)
    busy = sum(trained) + usual * len(first)
    return {
        "start_seconds": start - began,
        "slot_seconds": slot,
        "cell_seconds": max(0.0, ((last - start - slot) * slots - busy) / len(cells)),
        "end_seconds": ended - last,
    }


def _started(record: Record) -> float:
    assert record.started is not None
    return record.started


def _took(record: Record) -> float:
    assert record.ended is not None
    return record.ended - _started(record)


def bytes_beside(folder: Path, arms: int, cells: int, disk: dict[str, int]) -> dict[str, float]:
    """Return the bytes of the report per arm, Ray's logs per cell, and MLflow's empty store, per metric and per run."""
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{empty}").search_experiments(max_results=1)
        schema = size(empty)
    with sqlite3.connect(folder.parents[1] / "mlflow.db") as store:
        pages = store.execute("select coalesce(sum(pgsize), 0) from dbstat where name glob '*metrics*'").fetchone()[0]
        metrics = store.execute("select count(*) from metrics").fetchone()[0]
    return {
        "report_arm_bytes": disk["report"] / arms,
        "ray_cell_bytes": disk["ray"] / cells,
        "mlflow_schema_bytes": schema,
        "mlflow_metric_bytes": pages / metrics,
        "mlflow_run_bytes": max(0.0, disk["mlflow"] - schema - pages) / cells,
    }


def main() -> None:
    """Plan, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", type=Path, help="page with the markers")
    parser.add_argument("--record", action="store_true", help="write tune/plan/measured.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "studies"
        config, slots = str(options.config.resolve()), str(options.slots)
        loop = statistics.median(loop_seconds() for _ in range(5))
        plan = json.loads(pagating("plan", config, "--slots", slots, "--output", str(output), "--format", "json"))
        began = time.time()
        pagating("sweep", config, "--slots", slots, "--output", str(output))
        ended = time.time()
        folder = output / plan["study"]
        records = list(ledger.records(ledger.read(folder / "ledger.jsonl")).values())
        found = actual(folder, records, ended - began)
        arms = len({record.cell.arm for record in records})
        beside = {
            **seconds_beside(records, options.slots, began, ended),
            **bytes_beside(folder, arms, len(records), found["disk"]),
        }
    here = machine()
    print(f"{here['processor']}, {here['cores']} cores, load {here['load']}, {here['date']}; {options.slots} slots")
    lines = table(plan, found)
    print("\n".join(lines))
    print(json.dumps(beside, indent=1))
    if options.write:
        head = (
            f"`{options.config}` on {options.slots} slots: {here['processor']}, {here['cores']} cores, {here['date']}."
        )
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(START)
        after = rest.split(END)[1]
        text = "\n".join([START, head, "", *lines, END])
        options.write.write_text(before + text + after, encoding="utf-8")
    if options.record:
        kept = {"study": plan["study"], "machine": here, "loop_seconds": loop, **beside}
        kept["worker_mb"] = plan["memory"]["base"] / (1 << 20)
        MEASURED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
