"""Cost of a study besides its training: idle slots, tracking and start. Every trial is simulated by sleeping.

python benchmarks/study_overhead.py [--quick] [--output DIR]
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import performance
import yaml
from common import machine, spread
from ray import tune as ray_tune

from pagating.data.corpus import read_meta
from tune import sweep
from tune.backend.ray_backend import RayBackend
from tune.backend.ray_start import started
from tune.run import ledger
from tune.study.cell import Cell, Record
from tune.study.files import parse
from tune.study.inputs import packed_corpus
from tune.study.study import Study
from tune.tracking.tracker import MlflowTracker

ROOT = Path(__file__).parents[1]
LAPTOP = ROOT / "docs" / "results" / "laptop-builtin"
STUDY = {
    "question": "What does a study cost beside its training?",
    "tokenizer": {"vocab_size": 300},
    "model": {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 32},
    "fixed": {"tokens": 20_480, "batch_tokens": 512},
    "nuisance": {"lr": {"loguniform": [1.0e-3, 1.0e-2]}},
    "arms": {
        "gelu": {"baseline": True},
        "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True},
        "half": {"gate": "sigmoid", "alpha": 0.5},
        "full": {"gate": "sigmoid", "alpha": 1.0},
    },
    "search": {"trials_per_arm": 4},
    "calibrate": {"points": 3, "seeds": 2, "max_points": 3},
    "confirm": {"seeds": 8},
}


def sleeping(seconds: float) -> type:
    """Return a trainable like `tune.backend.ray_trial.CellTrainable` that sleeps ten times instead of training."""

    class Sleeping(ray_tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._trial, self._step = config["job"].trial, 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(seconds / 10)
            self._step += 1
            loss = 3.0 + math.log(self._trial.lr / 3e-3) ** 2
            row = {"step": 4 * self._step, "tokens": 2048 * self._step, "val_nll": loss, "train_nll": loss}
            row |= {"lr": self._trial.lr, "grad_norm": 1.0, "tokens_per_second": 1.0, "alpha": []}
            result = {"row": row, "fraction": self._step / 10}
            if self._step < 10:
                return result
            final = {"val_nll": loss, "test_nll": loss, "tokens": 20_480, "steps": 40, "seconds": seconds}
            return {**result, "outcome": "completed", "reason": None, "final": final, ray_tune.result.DONE: True}

    return Sleeping


def make_study(name: str, parallel: int = 1) -> Study:
    """Make the study; `parallel` is the number of concurrent trials of one arm in its search."""
    search = {**STUDY["search"], "parallel": parallel}
    return parse(yaml.safe_dump({**STUDY, "name": name, "search": search}), Path(f"{name}.yaml"))


def occupancy(slots: int, seconds: float, folder: Path) -> dict[str, float]:
    """Measure `occupied` in a study of sleeping trials on this number of slots.

    Their processes start before the measurement: simulated slots share the cores that the start needs, real ones do
    not.
    """
    study = make_study(f"slots-{slots}", math.ceil(slots / len(STUDY["arms"])))  # as `pagating plan` advises
    uri = f"sqlite:///{folder / f'{slots}.db'}"
    at_once = {"RAY_worker_maximum_startup_concurrency": str(slots)}  # Ray's default is the number of cores
    with mock.patch.dict(os.environ, at_once), started(slots, study, None, load=True):
        time.sleep(5 * slots)
        run = sweep.sweep(study, folder, folder, RayBackend(slots, trainable=sleeping(seconds)), tracking_uri=uri)
    records = [record for record in run.records.values() if record.started and record.ended]
    return occupied(records, slots, seconds)


def occupied(records: list[Record], slots: int, seconds: float) -> dict[str, float]:
    """Return the share of the slots' seconds in which trials train, from the start of the first to the end of the last.

    The first starts when it trains: the start of its process is measured separately.
    """
    spans = sorted((record.started or 0.0, record.ended or 0.0, len(record.curve) * seconds / 10) for record in records)
    wall = max(ended for _, ended, _ in spans) - min(ended - trained for _, ended, trained in spans[:slots])
    share = sum(trained for *_, trained in spans) / (slots * wall)
    return {"slots": slots, "trials": len(spans), "wall_seconds": wall, "occupancy": share}


def tracking(uri: str, folder: Path, trials: int, reports: int) -> dict[str, float]:
    """Measure milliseconds per report: of the driver's calls, and of processor time in the driver's process."""
    study = make_study("tracking")
    corpus = packed_corpus(study, folder, folder)
    (folder / "tracking").mkdir(exist_ok=True)
    (folder / "tracking" / "study.yaml").write_text("{}")
    (folder / "tracking" / "ledger.jsonl").write_bytes(b"")
    with mock.patch("tune.tracking.tracker.HOLD_BACK", 0.0):
        tracker = MlflowTracker(uri, study, folder / "tracking", read_meta(corpus))
        time.sleep(15)  # a study makes the connection and the schema while it starts its actors
    calls, began = 0.0, time.process_time()
    for number in range(trials):
        record = Record(Cell("confirm", "gelu", 0, number, {"lr": 1e-3}, "key"), started=time.time())
        calls += _timed(tracker.started, record)
        for step in range(reports):
            row = {"step": step, "tokens": step, "val_nll": 3.0, "train_nll": 3.0, "lr": 1e-3, "grad_norm": 1.0}
            record.curve.append({**row, "tokens_per_second": 1.0, "alpha": []})
            calls += _timed(tracker.reported, record, record.curve[-1])
            time.sleep(0.002)
        record.outcome, record.final, record.ended = "completed", {"val_nll": 3.0}, time.time()
        calls += _timed(tracker.ended, record)
    tracker.close(patience=20)
    total = trials * reports
    return {
        "calls_ms": 1000 * calls / total,
        "processor_ms": 1000 * (time.process_time() - began) / total,
        "owed": tracker.owed,
    }


def _timed(call: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def start(folder: Path) -> float:
    """Measure the seconds from `pagating sweep` to the first evaluation of a real trial, warm."""
    config = folder / "start.yaml"
    config.write_text(yaml.safe_dump(STUDY))
    command = [
        sys.executable,
        "-m",
        "tune.cli",
        "sweep",
        str(config),
        "--output",
        str(folder / "start"),
        "--slots",
        "1",
    ]
    began = time.time()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    path = folder / "start" / "start" / "ledger.jsonl"
    while True:
        events = ledger.read(path) if path.exists() else []
        found = next((event for event in events if event["event"] == "report"), None)
        if found or running.poll() is not None:
            running.kill()
            running.wait()
            shutil.rmtree(folder / "start" / "start")
            time.sleep(5)  # Ray's processes end shortly after their driver
            return found["time"] - began if found else math.nan
        time.sleep(0.05)


def command_seconds(*words: str) -> float:
    """Return the median seconds of five calls of a `pagating` command."""
    command = [sys.executable, "-m", "tune.cli", *words]
    return spread(
        [_timed(lambda: subprocess.run(command, capture_output=True, check=True, cwd=ROOT)) for _ in range(5)]
    ).median


def main() -> None:
    """Measure and print; `--output` saves the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="use trials of 3 seconds instead of 15")
    parser.add_argument("--output", type=Path, help="folder in which performance.md and .json are updated")
    options = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    seconds = 3.0 if options.quick else 15.0
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[name] = value
        print(f"{name}: {value}", flush=True)

    note("machine", machine())
    note("trial_seconds", seconds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(LAPTOP, folder / LAPTOP.name)
        note("help_seconds", command_seconds("--help"))
        note("status_seconds", command_seconds("status", str(folder / LAPTOP.name)))
        note("report_seconds", command_seconds("report", str(folder / LAPTOP.name)))
        start(folder)  # packs the corpus
        note("start_seconds", spread([start(folder) for _ in range(3)]).median)
        for slots in (2, 8):
            note(f"occupancy_{slots}_slots", occupancy(slots, seconds, folder))
        note("tracking_sqlite", tracking(f"sqlite:///{folder / 'tracking.db'}", folder, 100, 50))
        note("tracking_dead_server", tracking("http://127.0.0.1:9", folder, 10, 50))
    if options.output:
        performance.keep(options.output, "study", found)


if __name__ == "__main__":
    main()
