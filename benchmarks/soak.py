"""Memory over time in a study of many tiny real trials whose workers are killed at random moments.

python benchmarks/soak.py [--cells 1000] [--seconds-between-kills 60] [--write docs/reliability.md]

It samples the resident memory of the driver and of its largest worker every second. Growth is the slope of a line
through the samples, over the cells that ended in that time. It is measured in the second half of all cells, and within
each stage without its first tenth, because the stages' cells differ. If one cell was killed three times in a row, the
same command is repeated. Writes docs/img/soak.svg and the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import machine
from disturbed import ROOT, Damage, Place, workers
from matplotlib.figure import Figure

from tune.run import ledger

START, END = "<!-- soak: start -->", "<!-- soak: end -->"
ARMS = 3  # of the study in disturbed.py
LEAST = 30  # fewest cells of a stage for a measure of growth


def tiny(folder: Path, cells: int) -> Place:
    """Make a study of about `cells` cells of 8 steps each, mostly confirm seeds and search trials."""
    trials = max(2, (cells // ARMS - 3 - 60) if cells > 300 else cells // ARMS - 3 - 4)
    seeds = max(2, cells // ARMS - 3 - trials)
    return Place(
        folder,
        name="soak",
        model={"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 32},
        fixed={"tokens": 4096, "batch_tokens": 512, "eval_windows": 4, "eval_every": 4},
        search={"trials_per_arm": trials, "sampler": "random"},
        confirm={"seeds": min(100, seeds)},
    )


def sample(driver: psutil.Process, place: Place, began: float) -> dict[str, float]:
    """Sample seconds, cells that have ended, and MiB of the driver and of the largest worker."""
    sizes = []
    for worker in workers(driver.pid):
        try:
            sizes.append(worker.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    mib = 1 << 20
    return {
        "seconds": round(time.monotonic() - began, 2),
        "cells": place.ended(),
        "driver": driver.memory_info().rss / mib,
        "worker": max(sizes, default=0) / mib,
    }


def soak(place: Place, pause: float, seed: int, kept: Path) -> tuple[list[dict[str, float]], int, int]:
    """Run the study to its end, kill workers and sample memory.

    Args:
        place: Folder of the study.
        pause: Mean seconds between two kills.
        seed: Seed of the random moments.
        kept: File that also gets the samples, line by line.

    Returns:
        Samples, number of kills, and number of sweeps.
    """
    generator, began, samples, kills, sweeps = random.Random(seed), time.monotonic(), [], 0, 0
    while _unfinished(place):
        found, more = _sweep(place, pause, generator, began, kept)
        samples, kills, sweeps = [*samples, *found], kills + more, sweeps + 1
    return samples, kills, sweeps


def _unfinished(place: Place) -> bool:
    """Check if the study has not reached its end, or a cell of its confirm stage was given up."""
    if not (place.study / "trials.parquet").exists():
        return True
    records = ledger.records(ledger.read(place.study / "ledger.jsonl")).values()
    return any(record.outcome == "failed" for record in records)


def _sweep(
    place: Place, pause: float, generator: random.Random, began: float, kept: Path
) -> tuple[list[dict[str, float]], int]:
    kills, running = 0, place.start()
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(running.stdout or []), daemon=True)
    reader.start()  # otherwise the pipe fills up
    driver, samples = psutil.Process(running.pid), []
    due = time.monotonic() - began + generator.expovariate(1 / pause)
    with open(kept, "a", encoding="utf-8") as file:
        while running.poll() is None:
            try:
                samples.append(sample(driver, place, began))
            except psutil.NoSuchProcess:
                break
            file.write(json.dumps(samples[-1]) + "\n")
            file.flush()
            if samples[-1]["seconds"] > due and (found := workers(running.pid)):
                generator.choice(found).kill()
                kills += 1
                due = samples[-1]["seconds"] + generator.expovariate(1 / pause)
            time.sleep(1.0)
    reader.join(30)
    print("".join(said)[-1500:])
    if running.wait() not in (0, 1):
        raise RuntimeError(f"the sweep ended with {running.returncode}: {''.join(said)[-2000:]}")
    return samples, kills


def slope(samples: list[dict[str, float]], name: str, first: float, last: float = math.inf) -> float:
    """Return MiB per 1,000 cells: the least-squares slope over `first` to `last` cells, while workers run."""
    shown = [s for s in samples if first <= s["cells"] <= last and s["worker"] > 0]
    cells = np.array([s["cells"] for s in shown])
    if len(set(cells.tolist())) < 2:
        return float("nan")
    return float(1000 * np.polyfit(cells, [s[name] for s in shown], 1)[0])


def stages(events: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return, by stage, the number of cells that ended before its first one and with its last one, from a ledger."""
    ended = [event["cell"].partition("/")[0] for event in events if event["event"] == "ended"]
    return {stage: (ended.index(stage), ended.index(stage) + ended.count(stage)) for stage in dict.fromkeys(ended)}


def growth(samples: list[dict[str, float]], events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows of the table: MiB per 1,000 cells in the second half, and within each stage of `LEAST` cells or more."""
    found = []
    for name in ("driver", "worker"):
        half = slope(samples, name, samples[-1]["cells"] / 2)
        found.append((f"{name}: MiB per 1,000 cells, in the second half of the cells", f"{half:.1f}"))
        for stage, (before, end) in stages(events).items():
            if end - before >= LEAST:
                within = slope(samples, name, before + (end - before) / 10, end - 1)
                found.append((f"{name}: MiB per 1,000 cells, within {stage} ({end - before} cells)", f"{within:.1f}"))
    return found


def draw(samples: list[dict[str, float]], target: Path) -> None:
    """Draw memory over cells."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, label in (("driver", "driver"), ("worker", "largest worker")):
        shown = [s for s in samples if s[name] > 0]
        axes.plot([s["cells"] for s in shown], [s[name] for s in shown], label=label, linewidth=1)
    axes.set(xlabel="cells that have ended", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


def main() -> int:
    """Run, draw and print; return exit code 1 if a cell was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seconds-between-kills", type=float, default=60.0, help="mean of the random intervals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page with the markers")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ["PAGATING_CACHE"] = str(folder / "cache")
    place = tiny(folder, options.cells)
    samples, kills, sweeps = soak(place, options.seconds_between_kills, options.seed, folder / "samples.jsonl")
    found, damage = place.cells(), Damage()
    place.compare(found, damage, 0.0)
    rows: list[tuple[str, Any]] = [
        ("cells", len(found)),
        ("workers killed", kills),
        ("sweeps that it took", sweeps),
        ("cells lost, doubled, different between ledger, tables and MLflow",
         f"{damage.lost}, {damage.doubled}, {damage.different}"),
        *((f"{name}: MiB at a tenth, half and all of the cells", _at(samples, name)) for name in ("driver", "worker")),
        *growth(samples, ledger.read(place.study / "ledger.jsonl")),
    ]  # fmt: skip
    here = machine()
    command = " ".join(["python benchmarks/soak.py", *sys.argv[1:]])
    lines = [
        f"`{command}` on {here['processor']}, {here['cores']} cores, {here['date']}.",
        "",
        "| | |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    print("\n".join(lines))
    if options.write:
        draw(samples, ROOT / "docs" / "img" / "soak.svg")
        before, rest = options.write.read_text(encoding="utf-8").split(START)
        text = "\n".join([START, *lines, "", "![Memory of driver and workers](img/soak.svg)", END])
        options.write.write_text(before + text + rest.split(END)[1], encoding="utf-8")
    if damage.lost + damage.doubled + damage.different:
        print(f"the study is kept for inspection: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _at(samples: list[dict[str, float]], name: str) -> str:
    last = samples[-1]["cells"]
    picked = [next(s[name] for s in samples if s["cells"] >= share * last) for share in (0.1, 0.5, 1.0)]
    return ", ".join(f"{value:.0f}" for value in picked)


if __name__ == "__main__":
    sys.exit(main())
