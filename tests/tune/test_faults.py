"""Tests of faults of workers, drivers, disks and clocks. benchmarks/faults.py tests each more often."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray

from pagating.evaluate import token_nll
from pagating.model.fused_loss import linear_nll
from tests.studies import STEADY, study_of
from tests.tune.helpers import run_of
from tests.tune.steps import Steps, results
from tune import sweep
from tune.backend.ray_backend import RayBackend
from tune.backend.ray_start import QUIET
from tune.backend.ray_trial import CellTrainable
from tune.errors import LedgerError
from tune.run import ledger
from tune.run.interrupt import Interruption
from tune.run.study_run import StudyRun
from tune.study.inputs import packed_corpus
from tune.subject import training
from tune.subject.known import Known

ROOT = Path(__file__).parents[2]


def study(**changes):
    return study_of(STEADY, "faults", **changes)


def finals(folder):
    found = ledger.records(ledger.read(folder / "ledger.jsonl"))
    return {key: (record.outcome, record.final, record.curve) for key, record in found.items()}


def ends(folder):
    return [e for e in ledger.read(folder / "ledger.jsonl") if e["event"] == "ended"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Start one Ray for all tests of this file. Return the folder in which they ask for faults."""
    asked = tmp_path_factory.mktemp("asked")
    cache = tmp_path_factory.mktemp("cache")
    os.environ["FAULTS"], os.environ["PAGATING_CACHE"] = str(asked), str(cache)
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield asked
    ray.shutdown()
    del os.environ["FAULTS"], os.environ["PAGATING_CACHE"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return what each cell of the study ends with, computed without workers."""
    it = StudyRun(study(), folder := tmp_path_factory.mktemp("undisturbed"), Known(study(), lambda cell, share: 3.0))
    while (cell := it.next_cell()) is not None:
        it.start(cell)
        for result in results(cell.key, cell.config["lr"]):
            it.report(cell, result["row"])
        it.end(cell, result["outcome"], result["final"], result["reason"])
    it.close()
    found = finals(folder)
    assert {outcome for outcome, *_ in found.values()} == {"completed"}
    return found


def run(place, folder, *faults, **changes):
    for number, fault in enumerate(faults):
        (place / f"{fault}-{number}").touch()
    done = sweep.sweep(study(**changes), folder, folder, RayBackend(2, trainable=Steps))
    assert not list(place.iterdir())
    return done


def test_killed_and_hung_workers_cost_no_cell_and_change_no_result(place, undisturbed, tmp_path):
    run(place, tmp_path, "kill", "hang", "between", resources={"stall_timeout": 4.0})
    assert finals(tmp_path / "faults") == undisturbed
    failed = [end["reason"] for end in ends(tmp_path / "faults") if end["outcome"] == "failed"]
    assert len(failed) == 3
    assert failed.count("no heartbeat for 4 s (resources.stall_timeout)") == 2  # one of them between two trials


@pytest.fixture
def interruptible():
    """Take SIGINT also if pytest is a background job of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_one_slot_and_an_interruption_change_no_result(place, undisturbed, tmp_path, interruptible):
    seen = []

    def after_five(progress):
        seen.append(progress.cell.key)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with Interruption(lambda line: None) as interruption:
        done = sweep.sweep(
            study(),
            tmp_path,
            tmp_path,
            RayBackend(1, trainable=Steps),
            listen=after_five,
            interruption=interruption,
        )
    assert interruption.exit_code == 130
    assert not done.stages.finished
    before = {end["cell"]: end["time"] for end in ends(tmp_path / "faults")}
    assert 5 <= len(before) < len(undisturbed)
    sweep.sweep(study(), tmp_path, tmp_path, RayBackend(1, trainable=Steps))
    assert finals(tmp_path / "faults") == undisturbed
    after = ends(tmp_path / "faults")
    assert len(after) == len(undisturbed)  # no finished cell ran again
    assert {end["cell"]: end["time"] for end in after if end["cell"] in before} == before


def launch(output):
    """Start a driver that receives Ctrl-C even if these tests run in the background of a shell."""
    command = [sys.executable, "-m", "tests.tune.test_faults", str(output)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def until(running, folder, count):
    """Wait until `count` cells have ended."""
    path, deadline = folder / "ledger.jsonl", time.monotonic() + 240
    while not path.exists() or len(ends(folder)) < count:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code", "said"),
    [
        ([signal.SIGKILL], -signal.SIGKILL, None),
        ([signal.SIGTERM], 143, "Stopping: running trials save a checkpoint"),
        ([signal.SIGINT], 130, "Stopping: running trials save a checkpoint"),
        ([signal.SIGINT, signal.SIGINT], 130, "Stopped at once. What has ended is kept"),
    ],
    ids=["kill -9", "SIGTERM", "Ctrl-C", "Ctrl-C twice"],
)
def test_a_driver_that_is_stopped_is_continued_to_the_same_results(place, undisturbed, tmp_path, signals, code, said):
    folder = tmp_path / "faults"
    driver = launch(tmp_path)
    until(driver, folder, 2)
    with pytest.raises(LedgerError, match=rf"another sweep is running this study: process {driver.pid} on \S+$"):
        sweep.sweep(study(), tmp_path, tmp_path, RayBackend(trainable=Steps))
    heard = ""
    for number, signum in enumerate(signals):
        while number and "Stopping" not in heard:  # two signals at once would be one
            line = driver.stderr.readline()
            assert line, heard  # it has ended
            heard += line
        driver.send_signal(signum)
    _, more = driver.communicate(timeout=120)
    assert driver.returncode == code, heard + more
    assert said is None or said in heard + more
    kept = {end["cell"]: end["time"] for end in ends(folder)}
    assert 2 <= len(kept) < len(undisturbed)
    run(place, tmp_path)
    assert finals(folder) == undisturbed  # none lost, none different, every evaluation once
    after = ends(folder)
    assert len(after) == len({end["cell"] for end in after}) == len(undisturbed)  # none doubled
    assert {end["cell"]: end["time"] for end in after if end["cell"] in kept} == kept  # none ran again
    trials = pd.read_parquet(folder / "trials.parquet")
    assert len(trials) == len(trials[["stage", "arm", "config_key", "seed", "trial"]].drop_duplicates())
    assert sorted(trials["val_nll"]) == sorted(final["val_nll"] for _, final, _ in undisturbed.values())


class Slow(CellTrainable):
    """The real trial. The first that takes `slow` needs 1.5 s per micro-batch. The first that takes `stuck` hangs."""

    def setup(self, config):
        from pagating import evaluate
        from pagating.tasks import causal

        training.WITHIN_SECONDS, own = 0.5, (linear_nll, token_nll)  # an actor is used again
        mode = Steps._asked("slow", "stuck")

        def delayed(function):
            def call(*arguments):
                time.sleep({"slow": 1.5, "stuck": 3600.0, None: 0.0}[mode])
                return function(*arguments)

            return call

        causal.linear_nll, evaluate.token_nll = map(delayed, own)
        super().setup(config)


def test_a_worker_that_never_gets_on_fails_after_three_attempts_the_last_one_alone(tmp_path, place):
    corpus = packed_corpus(study(), tmp_path, tmp_path)
    (tmp_path / "faults").mkdir()
    it = run_of(study(), tmp_path / "faults", corpus)
    cell, other = it.next_cell(), it.next_cell()
    it.start(cell)
    it.start(other)
    it.cell_heartbeat(cell, 0.1)
    it.end(cell, "failed", {}, "worker died")
    assert it.next_cell() == cell
    it.start(cell)
    it.cell_heartbeat(cell, 0.2)  # further than before: the count starts anew
    it.end(cell, "failed", {}, "worker died")
    assert it.next_cell() == cell
    it.start(cell)
    it.end(cell, "failed", {}, "worker died")
    assert it.next_cell() is None  # its last attempt waits until nothing else runs
    it.end(other, "completed", {"val_nll": 3.0, "steps": 40})
    assert it.next_cell() == cell
    it.start(cell)
    assert it.next_cell() is None  # and nothing starts beside it
    it.end(cell, "failed", {}, "worker died")
    assert it.records[cell.key].outcome == "failed"
    assert it.stopping  # no stage chooses without it
    assert str(it.fatal) == (
        f"{cell.key} failed again and again, the last time: worker died; the same command tries it again"
    )
    it.ledger.close()
    again = run_of(study(), tmp_path / "faults", corpus)
    assert cell in (again.next_cell(), again.next_cell())
    again.ledger.close()


def test_a_confirm_cell_that_never_gets_on_leaves_the_others_to_go_on(tmp_path, place):
    corpus = packed_corpus(study(), tmp_path, tmp_path)
    (tmp_path / "faults").mkdir()
    it = run_of(study(), tmp_path / "faults", corpus)
    while (cell := it.next_cell()).stage != "confirm":
        it.start(cell)
        it.end(cell, "completed", {"val_nll": 3.0 + cell.config["lr"], "test_nll": 3.0, "steps": 40})
    for _ in range(3):
        it.start(cell)
        it.end(cell, "failed", {}, "worker died")
        it.next_cell()
    assert it.records[cell.key].outcome == "failed"
    assert not it.stopping
    it.ledger.close()


def test_a_worker_killed_for_memory_is_tried_again_alone(tmp_path, place):
    corpus = packed_corpus(study(), tmp_path, tmp_path)
    (tmp_path / "faults").mkdir()
    it = run_of(study(), tmp_path / "faults", corpus)
    cell, other = it.next_cell(), it.next_cell()
    it.start(cell)
    it.start(other)
    it.end(cell, "failed", {}, "The worker was killed because the node was running low on memory.")
    assert it.next_cell() is None
    it.end(other, "completed", {"val_nll": 3.0, "steps": 40})
    assert it.next_cell() == cell
    it.ledger.close()


@pytest.mark.slow
def test_an_update_that_outlasts_the_timeout_is_no_hung_one(place, tmp_path):
    (place / "slow-0").touch()
    (place / "stuck-0").touch()
    given = study(
        fixed={"tokens": 512, "batch_tokens": 256, "micro_batch_tokens": 32, "eval_windows": 64},
        search={"trials_per_arm": 1, "pruner": "none", "sampler": "random"},
        stages=["search"],
        resources={"stall_timeout": 10.0},
        keep={"models": "none"},
    )
    done = sweep.sweep(given, tmp_path, tmp_path, RayBackend(1, trainable=Slow))
    assert not list(place.iterdir())
    found = [(end["outcome"], end["reason"]) for end in ends(tmp_path / "faults")]
    silent = ("failed", "no heartbeat for 10 s (resources.stall_timeout)")
    assert sorted(found, key=str) == [("completed", None), ("completed", None), silent]
    assert max(record.final["seconds"] for record in done.records.values()) > 2 * (12 + 12)  # micro-batches, evaluation


def main(output):
    """Run the study of this file in a process of its own, to be killed."""
    with Interruption(lambda line: print(line, file=sys.stderr, flush=True)) as interruption:
        sweep.sweep(study(), output, output, RayBackend(2, trainable=Steps), interruption=interruption)
    os._exit(interruption.exit_code if interruption.caught else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
