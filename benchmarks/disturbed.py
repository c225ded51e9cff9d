"""Real study in its own process that faults can disturb, and its comparison with an undisturbed one."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml
from mlflow import MlflowClient

from tune.run import ledger

ROOT = Path(__file__).parents[1]
STUDY: dict[str, Any] = {
    "question": "What survives?",
    "tokenizer": {"vocab_size": 300},
    "model": {"n_layer": 2, "d_model": 32, "n_head": 2, "n_ctx": 32},
    "fixed": {"tokens": 81_920, "batch_tokens": 512, "eval_windows": 16},
    "nuisance": {"lr": {"loguniform": [1.0e-3, 3.0e-2]}},
    "arms": {
        "gelu": {"baseline": True},
        "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True},
        "learned": {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5}}},
    },
    "search": {"trials_per_arm": 2},
    "calibrate": {"points": 3, "seeds": 1, "max_points": 3},
    "confirm": {"seeds": 2},
}
MEASURED = ("seconds", "tokens_per_second", "peak_rss_mb", "memory_growth_mb")  # differ between repetitions of a trial


@dataclass
class Damage:
    """Damage of a fault, summed over studies: occurrences, cells lost, doubled and different, and seconds lost.

    `seconds` is None if the fault gives no measure of time. `after` is the part of them after the end of the last cell,
    or None if it was not measured.
    """

    times: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    seconds: float | None = 0.0
    after: float | None = None
    notes: list[str] = field(default_factory=list)


class Place:
    """Folder with its own study file, output folder and store."""

    base = STUDY
    names = ("val_nll", "val/nll", "val_nll")  # of the loss: in the tables, of MLflow's curves and results

    def __init__(self, folder: Path, name: str = "faults", store: str | None = None, **changes: Any) -> None:
        """Make a place; `changes` are sections of the study file, `store` a tracking URI (default: a local sqlite)."""
        self.folder, self.name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "studies"
        self.store = store or f"sqlite:///{folder / 'mlflow.db'}"
        self.config = folder / f"{name}.yaml"
        self.config.write_text(yaml.safe_dump({**self.base, **changes, "name": name}), encoding="utf-8")
        self.study = self.output / name
        self.seconds = 0.0  # of all sweeps so far
        self.after = 0.0  # of the last sweep, from the end of its last cell

    def start(self, tracking: str | None = None, inline: bool = False, **env: str | None) -> subprocess.Popen[str]:
        """Start `pagating sweep` in its own session with its output in one pipe; a variable that is None is unset."""
        command = [sys.executable, "-m", "tune.cli", "sweep", str(self.config), "--output", str(self.output)]
        command += ["--inline"] if inline else ["--slots", "2"]
        command += ["--tracking", tracking or self.store]
        given = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **env}
        settings = {name: value for name, value in given.items() if value is not None}
        self._began = time.monotonic()
        return subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def wait(self, running: subprocess.Popen[str], allowed: tuple[int, ...] = (0, 1)) -> str:
        """Wait for a sweep and return its output. Raises RuntimeError at another exit code or a traceback."""
        said = running.communicate()[0]
        self.seconds += time.monotonic() - self._began
        ends = [event["time"] for event in self._events() if event["event"] == "ended"]
        self.after = time.time() - max(ends) if ends else 0.0
        if running.returncode not in allowed or "Traceback" in said:
            raise RuntimeError(f"sweep ended with {running.returncode}: {said[-2000:]}")
        return said

    def sweep(self, **settings: Any) -> str:
        """Run the study to its end."""
        return self.wait(self.start(**settings))

    def run(self, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
        """Run another command of `pagating` on this study."""
        command = [sys.executable, "-m", "tune.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode not in allowed:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def refused(self) -> str:
        """Try a sweep that must end with exit code 2; what it said."""
        study = [str(self.config), "--output", str(self.output)]
        return self.run("sweep", *study, "--tracking", self.store, allowed=(2,))

    def ended(self) -> int:
        """Return the number of cells that have ended, from the ledger."""
        return sum(event["event"] == "ended" for event in self._events())

    def started(self) -> int:
        """Return the number of starts of cells, from the ledger."""
        return sum(event["event"] == "started" for event in self._events())

    def _events(self) -> list[dict[str, Any]]:
        path = self.study / "ledger.jsonl"
        return ledger.read(path) if path.exists() else []

    def until(self, running: subprocess.Popen[str], cells: int) -> bool:
        """Wait until this number of cells has ended; return False if the sweep ended before."""
        while self.ended() < cells:
            if running.poll() is not None:
                return False
            time.sleep(0.05)
        return True

    # --- content of a study ---

    def cells(self) -> dict[str, Any]:
        """Return outcome, final metrics and curve of each cell, without seconds and bytes."""
        found = ledger.records(ledger.read(self.study / "ledger.jsonl"))
        return {
            key: (
                record.outcome,
                {name: value for name, value in record.final.items() if name not in MEASURED},
                [{name: value for name, value in row.items() if name not in MEASURED} for row in record.curve],
            )
            for key, record in found.items()
        }

    def compare(self, expected: dict[str, Any], damage: Damage, undisturbed: float, store: str | None = None) -> None:
        """Add to `damage` each cell that ledger, tables or MLflow lack, have twice, or have not as `expected`."""
        found = self.cells()
        damage.lost += sum(key not in found or found[key][0] is None for key in expected)
        damage.different += sum(key in found and found[key] != value for key, value in expected.items())
        damage.different += len(found.keys() - expected.keys())
        events = ledger.read(self.study / "ledger.jsonl")
        ends = Counter(e["cell"] for e in events if e["event"] == "ended" and e["outcome"] != "failed")
        damage.doubled += sum(count > 1 for count in ends.values())
        trials = pd.read_parquet(self.study / "trials.parquet")
        rows = Counter(zip(*(trials[name] for name in ("stage", "arm", "trial", "config_key", "seed")), strict=True))
        damage.doubled += sum(count > 1 for count in rows.values())
        damage.lost += max(0, len(expected) - len(rows))
        wanted = sorted(cell[1]["val_nll"] for cell in expected.values() if "val_nll" in cell[1])
        shown = sorted(trials[self.names[0]].astype(float).dropna())
        damage.different += sum(a != b for a, b in zip(shown, wanted, strict=False)) + abs(len(shown) - len(wanted))
        self._compare_store(store or self.store, expected, damage)
        if damage.seconds is not None:
            damage.seconds += self.seconds - undisturbed

    def _compare_store(self, uri: str, expected: dict[str, Any], damage: Damage) -> None:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(self.name)
        runs = client.search_runs([experiment.experiment_id], max_results=5000)
        mine = Counter(run.data.tags.get("cell", "study") for run in runs)
        damage.doubled += sum(count > 1 for count in mine.values())
        damage.lost += len(expected.keys() - mine.keys())
        for run in runs:
            cell = run.data.tags.get("cell")
            if cell not in expected:
                continue
            _, final, curve = expected[cell]
            history = client.get_metric_history(run.info.run_id, self.names[1])
            seen = [(metric.step, metric.value) for metric in history]
            same = seen == [(row["step"], row["val_nll"]) for row in curve]
            damage.different += not (same and run.data.metrics.get(self.names[2]) == final.get("val_nll"))


def workers(driver: int, runs: str = "Trainable") -> list[psutil.Process]:
    """Return the processes in which a driver's trials run. `runs` is a part of their command line."""
    found = []
    try:
        for process in psutil.Process(driver).children(recursive=True):
            try:
                if runs in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return []
    return found


class Bench:
    """Undisturbed run for comparison with all others, and the generator of random moments."""

    def __init__(self, folder: Path, seed: int, kind: type[Place] = Place) -> None:
        self.folder, self.random, self._kind = folder, random.Random(seed), kind
        self._number = 0

    @functools.cached_property
    def _undisturbed(self) -> Place:
        first = self.place("undisturbed")
        first.sweep()
        print(f"undisturbed: {len(first.cells())} cells in {first.seconds:.1f} s", flush=True)
        return first

    @functools.cached_property
    def expected(self) -> dict[str, Any]:
        """Cells of the undisturbed run."""
        return self._undisturbed.cells()

    @property
    def seconds(self) -> float:
        """Duration of the undisturbed run."""
        return self._undisturbed.seconds

    @property
    def after(self) -> float:
        """Seconds of the undisturbed run after the end of its last cell."""
        return self._undisturbed.after

    def place(self, kind: str, **settings: Any) -> Place:
        """Make a new place for a study."""
        self._number += 1
        return self._kind(self.folder / f"{kind}-{self._number}", **settings)

    def begun(self, place: Place, **settings: Any) -> subprocess.Popen[str]:
        """Start a sweep; wait until a random number of its cells have ended, so that at least four are to come."""
        running = place.start(**settings)
        place.until(running, self.random.randint(1, len(self.expected) - 4))
        return running

    def compare(self, place: Place, damage: Damage, store: str | None = None, struck: int = 1) -> None:
        """Count a fault that struck so many times; compare the finished study with the undisturbed one."""
        damage.times += struck
        place.compare(self.expected, damage, self.seconds, store)
