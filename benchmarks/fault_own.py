"""Kills in a study of the user's own training: of a trial's process, its worker, the driver, and without Ray."""

from __future__ import annotations

import functools
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from disturbed import Bench, Damage, Place, workers

FUNCTION = '''"""A user's training without libraries. Its losses follow from the seed and the arm alone."""

import math
import random
import time


def train(trial):
    draw = random.Random(f"{trial.seed}/{trial.shift}")
    off = math.log10(trial.lr / 0.1) ** 2
    for step in range(10, trial.budget + 1, 10):
        time.sleep(0.1)
        loss = 2 + off + 20 / step - trial.shift + 0.02 * draw.random()
        trial.report(step, val_loss=loss)
    return {"test_loss": loss + 0.01} if trial.test else {}
'''
STUDY: dict[str, Any] = yaml.safe_load("""
question: What survives?
trial: mine.py:train
metric: {name: val_loss, test: test_loss}
budget: {steps: 80}
nuisance: {lr: {loguniform: [0.02, 0.5]}}
arms:
  plain: {baseline: true, set: {shift: 0.0}}
  shifted: {set: {shift: 0.1}}
  short: {of: plain, budget: 0.5, floor: true}
search: {trials_per_arm: 2}
calibrate: {points: 3, seeds: 1, max_points: 3}
confirm: {seeds: 4}
""")


class OwnPlace(Place):
    """Folder with a study of the user's own training."""

    base = STUDY
    names = ("val_loss", "val/val_loss", "val_loss")

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        (folder / "mine.py").write_text(FUNCTION, encoding="utf-8")


@functools.cache
def of_own(bench: Bench) -> Bench:
    """Return the bench of the user's own training, with its undisturbed run."""
    return Bench(bench.folder / "own", bench.random.randrange(1000), OwnPlace)


def trials(driver: int) -> list[psutil.Process]:
    """Return the processes of a driver's trials, which run the user's function."""
    return workers(driver, "own_worker.py")


def _killed(bench: Bench, times: int, kind: str, inline: bool, strikes: tuple[str, ...], most: float = 4.0) -> Damage:
    """Kill processes of a study at random moments, and run it again until it is finished.

    Args:
        bench: The bench.
        times: Number of kills.
        kind: Name of the fault.
        inline: Run without Ray.
        strikes: Kinds of processes, one of which is struck each time: trial, worker or driver.
        most: Longest time between two kills in seconds, after a trial has started.
    """
    own, damage = of_own(bench), Damage()
    while damage.times < times:
        place = own.place(kind)
        done = False
        while not done:
            running = place.start(inline=inline)
            before = place.started()
            while running.poll() is None and place.started() == before:
                time.sleep(0.05)
            while running.poll() is None and damage.times < times:
                time.sleep(own.random.uniform(0.2, most))
                damage.times += _strike(running, own.random.choice(strikes), own)
            place.wait(running, allowed=(0, 1, -9))
            done = running.returncode == 0
        own.compare(place, damage, struck=0)
    damage.notes.append(f"a user's function in {len(own.expected)} cells")
    return damage


def _strike(running: subprocess.Popen[str], what: str, own: Bench) -> int:
    """Kill a process; return the number of kills, 0 if there was none of that kind."""
    if what == "driver":
        running.kill()
        return 1
    found = trials(running.pid) if what == "trial" else workers(running.pid)
    if not found:
        return 0
    own.random.choice(found).kill()
    return 1


def trial_killed(bench: Bench, times: int) -> Damage:
    """The process of a trial of your own function, by kill -9 at random moments."""
    return _killed(bench, times, "own-trial", False, ("trial",))


def worker_killed(bench: Bench, times: int) -> Damage:
    """The worker of a trial of your own function, by kill -9 at random moments."""
    return _killed(bench, times, "own-worker", False, ("worker",))


def driver_killed(bench: Bench, times: int) -> Damage:
    """The driver of a study of your own function, by kill -9 at random moments."""
    return _killed(bench, times, "own-driver", False, ("driver",), 12.0)


def inline_killed(bench: Bench, times: int) -> Damage:
    """The driver or a trial of a study of your own function with `--inline`, by kill -9 at random moments."""
    return _killed(bench, times, "own-inline", True, ("driver", "trial", "trial"))
