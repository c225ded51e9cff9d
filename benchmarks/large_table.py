"""Time for a large table: a study of 100,000 trials is loaded, tested and reported in its own process.

python benchmarks/large_table.py [--trials 100000] [--output DIR]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import performance
import yaml
from common import machine

ROOT = Path(__file__).parents[1]
ARMS: dict[str, dict[str, Any]] = {
    "gelu": {"baseline": True},
    "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True},
    "searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 2.0]}}},
    "learnable": {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5}}},
}
GAPS = {"gelu": 0.0, "linear-floor": 0.15, "searched": -0.01, "learnable": 0.002}
STEPS = 10  # evaluations per confirm run
RATES = 9  # points of the learning-rate grid


def write_study(folder: Path, trials: int) -> int:
    """Write a study folder of about `trials` trials, nine in ten of them confirm runs; return the exact number."""
    rng, per_arm = np.random.default_rng(0), trials // len(ARMS)
    stages = {"search": per_arm // 20, "calibrate": per_arm // 20}
    stages["confirm"] = per_arm - sum(stages.values())
    tables = []
    for stage, count in stages.items():
        seeds = {"search": np.ones(count, int), "calibrate": 11 + np.arange(count) // RATES}
        seed = seeds.get(stage, 100_001 + np.arange(count))
        shared = np.random.default_rng(1).normal(0, 0.012, count)
        for arm, gap in GAPS.items():
            lr = np.full(count, 2e-3) if stage == "confirm" else 10 ** rng.uniform(-4, -2, count)
            if stage == "calibrate":
                lr = np.resize(np.geomspace(2.5e-4, 1.6e-2, RATES), count)
            loss = 3.3 + gap + 0.06 * np.log(lr / 2e-3) ** 2 + shared + rng.normal(0, 0.006, count)
            table = pd.DataFrame({"stage": stage, "arm": arm, "seed": seed, "lr": lr, "val_nll": loss})
            table["config_key"] = "chosen" if stage == "confirm" else [f"{stage}{i}" for i in range(count)]
            table["test_nll"] = loss + 0.02 if stage == "confirm" else np.nan
            table["alpha"] = rng.uniform(0, 2, count) if arm == "searched" else 0.5
            tables.append(table.assign(outcome="completed", tokens=1e6, steps=100))
    whole = pd.concat(tables, ignore_index=True)
    whole.to_parquet(folder / "trials.parquet")
    confirm = whole[whole["stage"] == "confirm"]
    curves = confirm.loc[confirm.index.repeat(STEPS), ["stage", "arm", "seed", "config_key", "val_nll"]]
    step = np.tile(np.arange(1, STEPS + 1), len(confirm))
    curves = curves.assign(step=10 * step, tokens=1e5 * step, val_nll=curves["val_nll"] + 1 / step - 1 / STEPS)
    curves.to_parquet(folder / "curves.parquet")
    settings = {"name": "large", "arms": ARMS, "confirm": {"seeds": stages["confirm"]}}
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return len(whole)


def main() -> None:
    """Measure and print; `--output` saves the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="folder in which performance.md and .json are updated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Any] = {"machine": machine(), "trials": write_study(Path(scratch), options.trials)}
        began = time.perf_counter()
        command = [sys.executable, "-m", "analysis.report", scratch]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
        _, status, used = os.wait4(running.pid, 0)
        found |= {
            "exit_code": os.waitstatus_to_exitcode(status),
            "seconds": time.perf_counter() - began,
            "processor_seconds": used.ru_utime + used.ru_stime,
            "peak_gigabytes": used.ru_maxrss / 1024**2,
            "report_megabytes": (Path(scratch) / "report.html").stat().st_size / 1e6,
        }
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.output:
        performance.keep(options.output, "table", found)


if __name__ == "__main__":
    main()
