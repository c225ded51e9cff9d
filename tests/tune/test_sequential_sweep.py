"""Tests of sequential rules through Ray: each stops at the look that is computed by hand."""

import math
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from ray import tune as ray_tune
from scipy import stats

from analysis.io.study import load
from analysis.report import build
from analysis.verdict.decide import verdict
from tests.studies import STEADY, changed, study_of
from tune import sweep as runner
from tune.backend.ray_backend import RayBackend
from tune.backend.ray_start import QUIET
from tune.run import interrupt, ledger
from tune.run.interrupt import Interruption

STUDY = changed(STEADY, arms={"half": {"gate": "sigmoid", "alpha": 0.5}}, confirm=None)
GAINS = {  # nats below the baseline, by confirm seed from 101 on
    "gelu": [0.0] * 10,
    "half": [0.020, 0.012, 0.028, 0.021, 0.017, 0.020, 0.019, 0.022, 0.018, 0.021],
    "linear-floor": [-0.300, -0.305, -0.295, -0.302, -0.298] * 2,
}
FIRST = 101


class Known(ray_tune.Trainable):
    """One step to a loss that follows from the cell alone: a bowl over the learning rate, or a known gain by seed."""

    def setup(self, config):
        self._cell, self._lr = config["job"].cell, config["job"].trial.lr

    def reset_config(self, new_config):
        self.setup(new_config)
        return True

    def step(self):
        stage, arm, _, seed = self._cell.split("/")
        if stage == "confirm":
            loss = 3.0 + math.sin(int(seed)) / 50 - GAINS[arm][int(seed) - FIRST]
        else:
            loss = 3.0 + 0.1 * math.log(self._lr / 3e-3) ** 2
        row = {"step": 40, "tokens": 20_480, "val_nll": loss, "train_nll": loss, "alpha": [], "lr": self._lr}
        row |= {"grad_norm": 1.0, "tokens_per_second": 1.0}
        final = {"val_nll": loss, "test_nll": loss, "tokens": 20_480, "steps": 40, "seconds": 0.1}
        return {"row": row, "fraction": 1.0, "outcome": "completed", "reason": None, "final": final, "done": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Start one Ray, and set one cache of the corpus, for all tests of this file."""
    import ray

    os.environ["PAGATING_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    del os.environ["PAGATING_CACHE"]


def sweep(folder, rule, **options):
    study = study_of(STUDY, rule, confirm={"rule": rule, "max_seeds": 10})
    return runner.sweep(study, folder, folder, RayBackend(2, trainable=Known), **options)


def confirmed(folder):
    """Return the test loss of each confirm cell that ended, by arm and seed."""
    found = ledger.records(ledger.read(folder / "ledger.jsonl")).values()
    ended = [r for r in found if r.cell.stage == "confirm" and r.outcome]
    assert {r.outcome for r in ended} <= {"completed"}
    return {(r.cell.arm, r.cell.seed): r.final["test_nll"] for r in ended}


def p_of_t(arm, seeds):
    return stats.ttest_1samp(GAINS[arm][:seeds], 0.0).pvalue


def test_the_stopping_look_is_known_by_hand():
    """At 3 seeds `half` is above O'Brien-Fleming's level; at 5 both arms are below it, Holm's first step included."""
    assert p_of_t("half", 3) == pytest.approx(0.0494, abs=5e-5)
    assert p_of_t("half", 3) > 0.00035
    assert p_of_t("half", 5) < 0.0054
    assert p_of_t("linear-floor", 5) < 0.0054 / 100


def expected_losses(seeds, floor=None):
    """Return the losses of arms that run so many seeds; the floor stops at `floor` seeds."""
    each = dict.fromkeys(GAINS, seeds) | ({"linear-floor": floor} if floor else {})
    return {
        (arm, FIRST + i): 3.0 + math.sin(FIRST + i) / 50 - GAINS[arm][i] for arm, n in each.items() for i in range(n)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "looks", "floor"), [("obrien-fleming", [3, 5], 5), ("e-process", [3, 4, 5], 4)]
)  # the e-process decides the floor at its second look
def test_an_interruption_between_looks_changes_neither_the_verdict_nor_a_bit(
    place, tmp_path, monkeypatch, rule, looks, floor
):
    monkeypatch.setattr(interrupt, "PATIENCE", 120)  # on a busy machine a stop in good order takes longer
    ended = []

    def after_the_first_look(progress):
        ended.extend([progress.cell] if progress.cell.stage == "confirm" else [])
        if len(ended) == 3 * looks[0]:
            os.kill(os.getpid(), signal.SIGINT)

    with Interruption(lambda line: None) as interruption:
        first = sweep(tmp_path, rule, listen=after_the_first_look, interruption=interruption)
    assert interruption.exit_code == 130
    assert not first.stages.finished
    assert confirmed(tmp_path / rule) == expected_losses(3)
    seen = verdict(load(tmp_path / rule))
    assert seen["unfinished"] == f"9 of {3 * looks[1]} confirm trials to the next look"
    assert [row["verdict"] for row in seen["comparisons"]] == ["unfinished"] * 2

    done = sweep(tmp_path, rule)
    assert done.stages.finished
    assert confirmed(tmp_path / rule) == expected_losses(5, floor)  # 5 of at most 10, and to the last bit
    half = next(row for row in verdict(load(tmp_path / rule))["comparisons"] if row["arm"] == "half")
    assert (half["verdict"], half["n"]) == ("better", 5)
    assert [step["n"] for step in half["path"]] == looks
    assert [step["p"] for step in half["path"]] == pytest.approx([p_of_t("half", n) for n in looks])
    page = build.build(tmp_path / rule).read_text(encoding="utf-8")
    shown = pd.read_csv(tmp_path / rule / "tables" / "sequential.csv").query("arm == 'half'")
    assert shown["n"].tolist() == looks
    assert shown["p_anytime"].tolist() == pytest.approx([step["p_anytime"] for step in half["path"]])
    assert "How seeds were added" in page


@pytest.mark.slow
def test_an_undisturbed_study_gives_the_same(place, tmp_path):
    whole = sweep(tmp_path / "whole", "e-process")
    assert whole.stages.finished
    assert confirmed(tmp_path / "whole" / "e-process") == expected_losses(5, floor=4)
    done = sweep(tmp_path / "whole", "e-process")  # nothing is left to run
    assert confirmed(tmp_path / "whole" / "e-process") == expected_losses(5, floor=4)
    assert done.stages.chosen == whole.stages.chosen


class Counted(Known):
    """Known losses. Each worker writes its process id into a file."""

    def __init__(self, *args, **kwargs):
        with (Path(os.environ["PAGATING_CACHE"]) / "started").open("a", encoding="utf-8") as file:
            print(os.getpid(), file=file, flush=True)
        time.sleep(2.0 * self._before())  # they start one after the other, and each takes longer than trials do
        super().__init__(*args, **kwargs)

    @staticmethod
    def _before():
        lines = (Path(os.environ["PAGATING_CACHE"]) / "started").read_text(encoding="utf-8").split()
        return lines.index(str(os.getpid()))

    def step(self):
        time.sleep(1.0)
        return super().step()


@pytest.mark.slow
def test_a_study_starts_one_worker_a_slot(place, tmp_path):
    """Through all stages: Tune by itself keeps one idle worker, and starts the others anew after every stage.

    And it gives a trial whose worker starts to one that is free, and ends the worker that starts.
    """
    study = study_of(STUDY, "workers", search={"trials_per_arm": 6, "parallel": 6}, confirm={"seeds": 3})
    run = runner.sweep(study, tmp_path, tmp_path, RayBackend(4, trainable=Counted))
    assert len(run.records) == 3 * 6 + 3 * 3 + 3 * 3  # search, calibrate, confirm
    started = (Path(os.environ["PAGATING_CACHE"]) / "started").read_text(encoding="utf-8").split()
    assert len(started) == 4
