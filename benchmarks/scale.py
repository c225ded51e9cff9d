"""Cost of a study for its driver as cells and slots grow: trials are simulated, everything else is real.

python benchmarks/scale.py [--cells 100 1000 10000] [--slots 2] [--side-by-side 2 8 32] [--profile] [--output DIR]

A simulated trial reports a known loss `--reports` times and trains nothing. So all the time belongs to the driver and
Ray: ledger, stages, Optuna, Ray Tune, MLflow (SQLite), tables and report. Each row runs in its own process: each size
with `--sampler`, `--tpe` cells with Optuna's TPE, and `--side-by-side` slots with trials that wait until all slots are
taken. Writes scale.json, scale.md and img/scale.svg to DIR; the page in docs/ uses 100, 1,000 and 10,000 cells.
"""

from __future__ import annotations

import argparse
import contextlib
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
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from common import machine
from ray import tune as ray_tune
from scale_page import draw, page

from analysis.report import build
from tune import sweep
from tune.backend.ray_backend import RayBackend
from tune.decide import search
from tune.run import tables
from tune.study.files import parse
from tune.study.inputs import packed_corpus
from tune.study.study import Study
from tune.tracking import runs

PUBLISHED = (100, 1000, 10_000)
ARMS = {
    "gelu": {"baseline": True},
    "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True},
    "half": {"gate": "sigmoid", "alpha": 0.5},
    "searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 2.0]}}},
}
HARM = {"gelu": 0.0, "linear-floor": 0.2, "half": 0.05, "searched": 0.0}
SLOT_CELLS = 5  # cells per slot in a row of slots
FILES = 65536.0  # open files per process: Ray raises its limit to this number if allowed
BEHIND = 0.02  # seconds between two checks if all slots are taken


def make_study(cells: int, sampler: str) -> Study:
    """Make a study of `cells` cells: the largest allowed number of confirm seeds, then the grid, the rest search."""
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
    """Return the loss in nats: a parabola over the learning rate, the arm's own offset, and noise from the seed."""
    noise = math.sin(1e3 * seed) * 0.02 + math.sin(77.0 * seed * (1 + len(arm))) * 0.005
    return 3.0 + 0.1 * math.log(lr / 3e-3) ** 2 + HARM[arm] + noise


def simulated(reports_a_trial: int, gate: Path | None = None, slots: int = 0) -> type:
    """Make a trainable with the interface of `tune.backend.ray_trial.CellTrainable` that knows its loss.

    Args:
        reports_a_trial: Number of reports per trial.
        gate: Folder in which the trials of the confirm stage, which take all slots, wait for each other; None: no
            waiting.
        slots: Number of processes to wait for.
    """

    class Simulated(ray_tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._cell, self._trial, self._made = config["job"].cell, config["job"].trial, 0
            if gate and self._cell.startswith("confirm/"):
                (gate / str(os.getpid())).touch()
                while len(os.listdir(gate)) < slots:
                    time.sleep(BEHIND)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            self._made += 1
            share = self._made / reports_a_trial
            loss = true_loss(self._cell.split("/")[1], self._trial.lr, self._trial.seed) + 1.0 - share
            row = {"step": round(100 * share), "tokens": round(51_200 * share), "val_nll": loss, "train_nll": loss}
            row |= {"lr": self._trial.lr, "grad_norm": 1.0, "tokens_per_second": 1.0, "alpha": []}
            result = {"row": row, "fraction": share}
            if share < 1:
                return result
            final = {"val_nll": loss, "train_nll": loss, "tokens": 51_200, "steps": 100, "seconds": 0.0}
            final |= {"test_nll": loss} if self._trial.test else {}
            return {**result, "outcome": "completed", "reason": None, "final": final, ray_tune.result.DONE: True}

    return Simulated


class Timed:
    """Seconds of every call of a class's method while it replaces that method."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds: list[float] = []
        self._owner, self._name, self._plain = owner, name, getattr(owner, name)

    def __enter__(self) -> Timed:
        plain, seconds = self._plain, self.seconds

        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return plain(*given, **named)
            finally:
                seconds.append(time.perf_counter() - began)

        setattr(self._owner, self._name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, self._plain)


class Tree:
    """Peak resources of this process and its children, sampled while `gate` is full and shortly after."""

    def __init__(self, gate: Path, slots: int) -> None:
        self.most = {"workers": 0, "processes": 0, "threads": 0, "tree_mb": 0.0, "most_files": 0}
        self._gate, self._slots, self._ended = gate, slots, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Tree:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            if len(os.listdir(self._gate)) < self._slots - 1:  # the last one opens it
                continue
            now = {**dict.fromkeys(self.most, 0), "workers": len(os.listdir(self._gate))}
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
                    now["tree_mb"] += process.memory_full_info().pss / 1e6
                    now["processes"] += 1
                    now["threads"] += process.num_threads()
                    now["most_files"] = max(now["most_files"], process.num_fds())
            self.most = {name: max(value, now[name]) for name, value in self.most.items()}


def measure(cells: int, slots: int, reports_a_trial: int, sampler: str, profile: bool, wait: bool) -> dict[str, Any]:
    """Run one study of `cells` cells in this process; return seconds and MB. With `wait`, trials wait for all slots."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="pagating-scale-") as scratch, contextlib.ExitStack() as stack:
        os.environ["PAGATING_CACHE"] = scratch
        base, study = Path(scratch), make_study(cells, sampler)
        packed_corpus(study, base, base)
        uri, gate = f"sqlite:///{base / 'mlflow.db'}", base / "gate"
        gate.mkdir()
        trainable = simulated(reports_a_trial, gate if wait else None, slots)
        writes = stack.enter_context(Timed(runs.Runs, "write"))
        suggestions = stack.enter_context(Timed(search.ArmSearch, "suggest"))
        profiler = cProfile.Profile() if profile else None
        began = time.perf_counter()
        if profiler:
            profiler.enable()
        with Tree(gate, slots) if wait else contextlib.nullcontext() as tree:
            run = sweep.sweep(study, base, base, RayBackend(slots, trainable=trainable), tracking_uri=uri)
        if profiler:
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
        wall, mlflow_seconds = time.perf_counter() - began, sum(writes.seconds)
        suggest = statistics.mean(suggestions.seconds[-max(1, len(suggestions.seconds) // 10) :])
        began = time.perf_counter()
        tables.write_tables(study.name, run.ledger.events, run.folder)
        build.build(run.folder)
        report_seconds = time.perf_counter() - began
        owed = run.tracker.finish(json.loads((run.folder / "verdict.json").read_text()))
        began = time.perf_counter()
        sweep.sweep(study, base, base, RayBackend(slots, trainable=trainable), tracking_uri=uri)
        again = time.perf_counter() - began
        ends = [event["time"] for event in run.ledger.events if event["event"] == "ended"]
        size = (run.folder / "ledger.jsonl").stat().st_size
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    tenth = max(1, len(gaps) // 10)
    steady = gaps[-(len(gaps) // 4) :] if wait else gaps  # trials wait until all slots are taken
    return {
        "cells": len(ends),
        "sampler": sampler,
        "slots": slots,
        "seconds_a_cell": statistics.mean(steady),
        "growth": statistics.mean(gaps[-tenth:]) / statistics.mean(gaps[:tenth]),
        "wall_seconds": wall,
        "suggest_ms": 1e3 * suggest,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "mlflow_seconds": mlflow_seconds,
        "owed": 0 if owed is None else 1,
        "report_seconds": report_seconds,
        "again_seconds": again,
        "ledger_mb": size / 1e6,
        **(tree.most if tree else {}),
    }


def limits(output: Path) -> dict[str, float]:
    """Return this machine's limits: memory and free disk in MB, threads, open files per process as Ray raises them."""
    threads, files = (resource.getrlimit(which)[1] for which in (resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE))
    found = [float(threads)] if threads != resource.RLIM_INFINITY else []
    kernel = [Path("/proc/sys/kernel/pid_max"), Path("/proc/sys/kernel/threads-max")]
    found += [float(path.read_text()) for path in kernel if path.exists()]
    return {
        "memory_mb": psutil.virtual_memory().total / 1e6,
        "disk_mb": psutil.disk_usage(str(output)).free / 1e6,
        "threads": min(found),
        "files": min(float(files), FILES) if files != resource.RLIM_INFINITY else FILES,
    }


def main() -> None:
    """Measure each row in its own process; print all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--slots", type=int, default=2, help="slots of the rows of cells")
    parser.add_argument("--side-by-side", type=int, nargs="*", default=[2, 8, 32], help="slots of the rows of slots")
    parser.add_argument("--tpe", type=int, nargs="*", default=[1000], help="numbers of cells of further rows, with TPE")
    parser.add_argument("--reports", type=int, default=10)
    parser.add_argument("--sampler", choices=("tpe", "random", "qmc"), default="random")
    parser.add_argument("--profile", action="store_true", help="print a profile of the driver")
    docs = Path(__file__).parents[1] / "docs"
    parser.add_argument("--output", type=Path, help="folder (default: docs, if --cells are the published ones)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        given = (options.cells[0], options.slots, options.reports, options.sampler, options.profile, options.wait)
        print(json.dumps(measure(*given)))
        return

    def one(cells: int, slots: int, sampler: str, *more: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--one", "--cells", str(cells), "--slots", str(slots)]
        command += ["--reports", str(options.reports), "--sampler", sampler, *more]
        *said, last = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print("\n".join([*said, last]), flush=True)
        return json.loads(last)

    profile = ["--profile"] if options.profile else []
    output = options.output or (docs if tuple(options.cells) == PUBLISHED else None)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": {**machine(), **limits(output or Path.cwd())}, "slots": options.slots}
    found |= {"reports": options.reports, "sampler": options.sampler}
    found["sizes"] = [one(cells, options.slots, options.sampler, *profile) for cells in options.cells]
    found["sizes"] += [one(cells, options.slots, "tpe", *profile) for cells in options.tpe]
    found["side_by_side"] = [
        one(max(100, SLOT_CELLS * slots), slots, options.sampler, "--wait") for slots in options.side_by_side
    ]
    print(page(found))
    if output:
        (output / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
        (output / "scale.md").write_text(page(found))
        draw(found, output / "img" / "scale.svg")


if __name__ == "__main__":
    main()
