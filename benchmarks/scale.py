"""What a study costs its driver as it grows: simulated trials, everything else is real.

python benchmarks/scale.py [--cells 100 1000 10000] [--slots 2] [--reports 10] [--profile] [--output DIR]

A simulated trial reports a known loss `--reports` times and trains nothing, so that all the time is the driver's and
Ray's: ledger, stages, Optuna, Ray Tune, MLflow (SQLite), tables and report. Each size runs in a process of its own.
Writes scale.json, scale.md and img/scale.svg into DIR (docs) when all of 100, 1,000 and 10,000 are measured.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import logging
import math
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import machine
from ray import tune as ray_tune

from analysis import report as reports
from tune import ledger, mlflow_runs, runner
from tune.study import Study, parse
from tune.tracking import finish

PUBLISHED = (100, 1000, 10_000)
ARMS = {
    "gelu": {"baseline": True},
    "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True},
    "half": {"gate": "sigmoid", "alpha": 0.5},
    "searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 2.0]}}},
}
HARM = {"gelu": 0.0, "linear-floor": 0.2, "half": 0.05, "searched": 0.0}
COLUMNS = {
    "seconds_a_cell": "driver, s a cell",
    "growth": "last tenth over first",
    "peak_mb": "driver, MB",
    "mlflow_seconds": "MLflow, s",
    "report_seconds": "tables and report, s",
    "again_seconds": "same command again, s",
    "ledger_mb": "ledger, MB",
}


def make_study(cells: int, sampler: str) -> Study:
    """A study of `cells` cells: as many confirm seeds as a study may have, then the grid, the rest search."""
    arms = len(ARMS)
    seeds = min(100, max(2, cells // (2 * arms)))
    points, selection = 3, max(1, min(10, cells // (8 * arms)))
    trials = cells // arms - seeds - points * selection
    return parse(
        yaml.safe_dump(
            {
                "name": f"cells-{cells}",
                "question": "What does a large study cost its driver?",
                "tokenizer": {"vocab_size": 300},
                "model": {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 32},
                "fixed": {"tokens": 51_200, "batch_tokens": 512},
                "nuisance": {"lr": {"loguniform": [1.0e-3, 1.0e-2]}},
                "arms": ARMS,
                "search": {"trials_per_arm": trials, "sampler": sampler, "parallel": 4},
                "calibrate": {"points": points, "seeds": selection, "max_points": points},
                "confirm": {"seeds": seeds},
            }
        ),
        Path("scale.yaml"),
    )


def true_loss(arm: str, lr: float, seed: int) -> float:
    """A bowl over the learning rate, the arm's own harm, and noise that follows from the seed, nats."""
    noise = math.sin(1e3 * seed) * 0.02 + math.sin(77.0 * seed * (1 + len(arm))) * 0.005
    return 3.0 + 0.1 * math.log(lr / 3e-3) ** 2 + HARM[arm] + noise


def simulated(reports_a_trial: int) -> type:
    """A trainable with the interface of `tune.trial.CellTrainable` that knows its loss."""

    class Simulated(ray_tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._cell, self._trial, self._made = config["cell"], config["trial"], 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            self._made += 1
            share = self._made / reports_a_trial
            loss = true_loss(self._cell.split("/")[1], self._trial["lr"], self._trial["seed"]) + 1.0 - share
            row = {"step": round(100 * share), "tokens": round(51_200 * share), "val_nll": loss, "train_nll": loss}
            row |= {"lr": self._trial["lr"], "grad_norm": 1.0, "tokens_per_second": 1.0, "alpha": []}
            result = {"row": row, "fraction": share}
            if share < 1:
                return result
            final = {"val_nll": loss, "train_nll": loss, "tokens": 51_200, "steps": 100, "seconds": 0.0}
            final |= {"test_nll": loss} if self._trial["test"] else {}
            return {**result, "outcome": "completed", "reason": None, "final": final, ray_tune.result.DONE: True}

    return Simulated


def measure(cells: int, slots: int, reports_a_trial: int, sampler: str, profile: bool) -> dict[str, float]:
    """One study of `cells` cells in this process; seconds, MB."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    written = {"seconds": 0.0}
    write = mlflow_runs.Runs.write

    def timed(self: Any, record: Any) -> Any:
        began = time.perf_counter()
        try:
            return write(self, record)
        finally:
            written["seconds"] += time.perf_counter() - began

    mlflow_runs.Runs.write = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="pagating-scale-") as scratch:
        os.environ["PAGATING_CACHE"] = scratch
        base, study = Path(scratch), make_study(cells, sampler)
        runner.packed_corpus(study, base, base)
        uri = f"sqlite:///{base / 'mlflow.db'}"
        profiler = cProfile.Profile() if profile else None
        began = time.perf_counter()
        if profiler:
            profiler.enable()
        run = runner.sweep(
            study, base, base, slots=slots, tracking_uri=uri, trainable=simulated(reports_a_trial)
        )  # fmt: skip
        if profiler:
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
        wall = time.perf_counter() - began
        began = time.perf_counter()
        ledger.write_tables(study.name, run.ledger.events, run.folder)
        reports.build(run.folder)
        report_seconds = time.perf_counter() - began
        owed = finish(run.tracker, json.loads((run.folder / "verdict.json").read_text())) if run.tracker else None
        began = time.perf_counter()
        runner.sweep(study, base, base, slots=slots, tracking_uri=uri, trainable=simulated(reports_a_trial))
        again = time.perf_counter() - began
        ends = [event["time"] for event in run.ledger.events if event["event"] == "ended"]
        size = (run.folder / "ledger.jsonl").stat().st_size
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    tenth = max(1, len(gaps) // 10)
    return {
        "cells": len(ends),
        "seconds_a_cell": (ends[-1] - ends[0]) / len(gaps),
        "growth": statistics.mean(gaps[-tenth:]) / statistics.mean(gaps[:tenth]),
        "wall_seconds": wall,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "mlflow_seconds": written["seconds"],
        "owed": 0 if owed is None else 1,
        "report_seconds": report_seconds,
        "again_seconds": again,
        "ledger_mb": size / 1e6,
    }


def page(found: dict[str, Any]) -> str:
    """The figures as a page."""
    rows = found["sizes"]
    lines = [
        "# How far one driver goes",
        "",
        "Written by `python benchmarks/scale.py`. Trials are simulated: they report ",
    ]
    lines[-1] += (
        f"a known loss {found['reports']} times and train nothing, {found['slots']} side by side; all else is real."
    )
    lines += [
        f"Machine: {found['machine']['processor']}, {found['machine']['cores']} cores, {found['machine']['date']}.",
        "",
    ]
    lines += ["| cells | " + " | ".join(COLUMNS.values()) + " |", "| ---: |" + " ---: |" * len(COLUMNS)]
    for row in rows:
        lines.append(f"| {row['cells']:,} | " + " | ".join(f"{row[name]:.3g}" for name in COLUMNS) + " |")
    lines += ["", "![Seconds and memory over the number of cells](img/scale.svg)", ""]
    last = rows[-1]
    times = 1e6 / last["cells"]
    hours = {name: times * last[f"{name}_seconds"] / 3600 for name in ("wall", "mlflow")}
    gigabytes = {name: times * last[f"{name}_mb"] / 1000 for name in ("peak", "ledger")}
    lines += [
        f"Carried on as a straight line, 1,000,000 cells would take the driver {hours['wall']:.0f} hours, "
        f"{gigabytes['peak']:.0f} GB of memory, a ledger of {gigabytes['ledger']:.0f} GB and",
        f"{hours['mlflow']:.0f} hours of writing to MLflow. Memory ends first: the driver holds every event of the",
        "ledger, and Ray Tune every trial.",
        "",
    ]
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Seconds a cell, memory, MLflow and report seconds over cells, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = found["sizes"]
    cells = [row["cells"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, label in (("wall_seconds", "whole study"), ("mlflow_seconds", "MLflow"), ("report_seconds", "report")):
        left.loglog(cells, [row[name] for row in rows], marker="o", label=label)
    first = rows[0]["wall_seconds"] / cells[0]
    left.loglog(cells, [first * n for n in cells], color="0.7", linestyle="--", label="linear")
    left.set(xlabel="cells", ylabel="seconds")
    left.legend(frameon=False)
    right.semilogx(cells, [row["peak_mb"] for row in rows], marker="o")
    right.set(xlabel="cells", ylabel="memory of the driver, MB", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure each size in a process of its own; print, and write where all published sizes are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--reports", type=int, default=10)
    parser.add_argument("--sampler", choices=("tpe", "random", "qmc"), default="random")
    parser.add_argument("--profile", action="store_true", help="print what the driver spends its time on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = measure(options.cells[0], options.slots, options.reports, options.sampler, options.profile)
        print(json.dumps(found))
        return
    sizes = []
    for cells in options.cells:
        command = [sys.executable, __file__, "--one", "--cells", str(cells), "--slots", str(options.slots)]
        command += ["--reports", str(options.reports), "--sampler", options.sampler]
        command += ["--profile"] if options.profile else []
        *said, last = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print("\n".join([*said, last]), flush=True)
        sizes.append(json.loads(last))
    everything = {"machine": machine(), "slots": options.slots, "reports": options.reports, "sizes": sizes}
    everything["sampler"] = options.sampler
    if tuple(options.cells) == PUBLISHED:
        (options.output / "scale.json").write_text(json.dumps(everything, indent=1) + "\n")
        (options.output / "scale.md").write_text(page(everything))
        draw(everything, options.output / "img" / "scale.svg")


if __name__ == "__main__":
    main()
