"""Trials and losses for the workers of Ray. This module imports little, because each worker imports it."""

import math
import os
import signal
import time
from pathlib import Path

from ray import tune as ray_tune

from pagating.trial import Diverged
from tune.subject.known import Known


class Steps(ray_tune.Trainable):
    """Ten steps to a loss that follows from the cell alone. A test asks for a fault with a file.

    The folder FAULTS holds `<mode>-<n>` files: the trial that takes one (by removing it) at step 3 does as it says, or,
    `between`, hangs before its first step in an actor that had another trial before.
    """

    def setup(self, config):
        self._results = results(config["job"].cell, config["job"].trial.lr)
        self._step = 0

    def reset_config(self, new_config):
        if self._asked("between"):
            os.kill(os.getpid(), signal.SIGSTOP)
        self.setup(new_config)
        return True

    def step(self):
        self._step += 1
        time.sleep(0.01)
        asked = self._asked("kill", "hang") if self._step == 3 else None
        if asked == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if asked == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        return next(self._results)

    @staticmethod
    def _asked(*modes):
        for path in sorted(path for mode in modes for path in Path(os.environ["FAULTS"]).glob(f"{mode}-*")):
            try:
                path.unlink()
            except FileNotFoundError:  # another trial took it
                continue
            return path.name.partition("-")[0]
        return None


def results(cell, lr):
    """Yield the ten results of a cell of a learning rate. The last one has its end."""
    loss = 3.0 + math.log(lr / 3e-3) ** 2 + 0.1 * ("floor" in cell)
    for number in range(1, 11):
        row = {"step": 4 * number, "tokens": 2048 * number, "val_nll": loss, "train_nll": loss, "alpha": []}
        row |= {"lr": lr, "grad_norm": 1.0, "tokens_per_second": 1.0}
        result = {"row": row, "fraction": number / 10}
        if number == 10:
            final = {"val_nll": loss, "test_nll": loss, "tokens": 20_480, "steps": 40, "seconds": 0.1}
            result |= {"outcome": "completed", "reason": None, "final": final, "done": True}
        yield result


def bowl(cell, share):
    if cell.arm == "searched" and cell.stage == "search" and cell.index == 0:
        return math.inf
    return 4.0 - share + math.log(cell.config["lr"] / 3e-3) ** 2 + 0.01 * cell.index + cell.seed / 1000


class Broken(Known):
    """Subject whose trials fail, in another way for each arm."""

    def train(self, trial, checkpoints, model):
        if trial.arm == "gelu":
            yield from super().train(trial, checkpoints, model)
        elif trial.arm == "linear-floor":
            raise ZeroDivisionError("an own gate divided by zero")
        raise Diverged("the loss is nan at step 1")
