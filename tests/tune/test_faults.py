"""Faults of workers, drivers, disks and clocks, in short; benchmarks/faults.py has each in full."""

import math
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from ray import tune as ray_tune

from tune import ledger as ledgers
from tune import runner
from tune.study import parse

ROOT = Path(__file__).parents[2]
STUDY = {
    "question": "What survives?",
    "tokenizer": {"vocab_size": 300},
    "model": {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 32},
    "fixed": {"tokens": 20_480, "batch_tokens": 512},
    "nuisance": {"lr": {"loguniform": [1.0e-3, 1.0e-2]}},
    "arms": {"gelu": {"baseline": True}, "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True}},
    "search": {"trials_per_arm": 2},
    "calibrate": {"points": 3, "seeds": 1, "max_points": 3},
    "confirm": {"seeds": 2},
}


class Steps(ray_tune.Trainable):
    """Ten steps towards a loss that follows from the cell alone, with a file a cell in which a test can read and ask.

    The folder FAULTS holds `<mode>-<n>` files: the trial that takes one (by removing it) at step 3 does as it says.
    """

    def setup(self, config):
        self._cell, self._trial, self._step = config["cell"], config["trial"], 0

    def reset_config(self, new_config):
        self.setup(new_config)
        return True

    def step(self):
        self._step += 1
        time.sleep(0.01)
        asked = self._asked() if self._step == 3 else None
        if asked == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if asked == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if asked == "raise":
            raise ZeroDivisionError("an own gate divided by zero")
        if asked == "diverge":
            return {
                "outcome": "infeasible", "reason": "step 3: loss nan, gradient norm nan", "row": None, "final": {},
                "fraction": 1.0, "done": True,
            }  # fmt: skip
        loss = 3.0 + math.log(self._trial["lr"] / 3e-3) ** 2 + 0.1 * ("floor" in self._cell)
        row = {"step": 4 * self._step, "tokens": 2048 * self._step, "val_nll": loss, "train_nll": loss, "alpha": []}
        row |= {"lr": self._trial["lr"], "grad_norm": 1.0, "tokens_per_second": 1.0}
        result = {"row": row, "fraction": self._step / 10}
        if self._step < 10:
            return result
        final = {"val_nll": loss, "test_nll": loss, "tokens": 20_480, "steps": 40, "seconds": 0.1}
        return {**result, "outcome": "completed", "reason": None, "final": final, "done": True}

    @staticmethod
    def _asked():
        for path in sorted(Path(os.environ["FAULTS"]).glob("*-*")):
            try:
                path.unlink()
            except FileNotFoundError:  # another trial took it
                continue
            return path.name.partition("-")[0]
        return None


def study(name, **changes):
    return parse(yaml.safe_dump({**STUDY, "name": name, **changes}), Path(f"{name}.yaml"))


def finals(folder):
    found = ledgers.records(ledgers.read(folder / "ledger.jsonl"))
    return {key: (record.outcome, record.final) for key, record in found.items()}


def ends(folder):
    return [e for e in ledgers.read(folder / "ledger.jsonl") if e["event"] == "ended"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One Ray for all tests of this file, and the folder in which they ask for faults."""
    import ray

    asked = tmp_path_factory.mktemp("asked")
    cache = tmp_path_factory.mktemp("cache")
    os.environ["FAULTS"], os.environ["PAGATING_CACHE"] = str(asked), str(cache)
    os.environ |= {name: value for name, value in runner_quiet().items() if name not in os.environ}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield asked
    ray.shutdown()
    del os.environ["FAULTS"], os.environ["PAGATING_CACHE"]


def runner_quiet():
    from tune.ray_part import QUIET

    return QUIET


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    runner.sweep(study("faults"), folder, folder, trainable=Steps)
    found = finals(folder / "faults")
    assert {outcome for outcome, _ in found.values()} == {"completed"}
    return found


def run(place, folder, *faults, **changes):
    for number, fault in enumerate(faults):
        (place / f"{fault}-{number}").touch()
    done = runner.sweep(study("faults", **changes), folder, folder, slots=2, trainable=Steps)
    assert not list(place.iterdir())
    return done


def test_killed_workers_cost_no_cell_and_change_no_result(place, undisturbed, tmp_path):
    run(place, tmp_path, "kill", "kill", "kill")
    assert finals(tmp_path / "faults") == undisturbed
    failed = [end for end in ends(tmp_path / "faults") if end["outcome"] == "failed"]
    assert len(failed) == 3


def test_a_hung_worker_is_ended_and_its_cell_trained_again(place, undisturbed, tmp_path):
    run(place, tmp_path, "hang", resources={"stall_timeout": 3.0})
    assert finals(tmp_path / "faults") == undisturbed
    (failed,) = [end for end in ends(tmp_path / "faults") if end["outcome"] == "failed"]
    assert failed["reason"] == "no sign of life for 3 s (resources.stall_timeout)"
