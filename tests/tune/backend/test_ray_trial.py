"""Test the Ray adapter of a trial without Ray's processes: its reports to the driver and its files."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagating import evaluate
from pagating.checkpoint import CheckpointFolder
from pagating.data import prepare
from pagating.tasks import causal
from pagating.train import Trial, train
from tests.studies import STEADY, study_of
from tests.tune.helpers import job_of
from tune import sweep
from tune.backend.ray_backend import RayBackend
from tune.backend.ray_faults import Heartbeats
from tune.backend.ray_trial import CellTrainable
from tune.subject import training

WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them\n"
TIMES = ("tokens_per_second", "seconds", "peak_rss_mb")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} {WORDS}" for i in range(2000)))
    folder = prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 16, base / "cache", base)
    model = {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 16, "dropout": 0.1}
    size = {"model": model, "tokens": 64 * 8, "batch_tokens": 64, "eval_every": 4, "eval_windows": 8}
    return Trial(corpus=str(folder), lr=3e-3, seed=5, **size)


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """Switch off heartbeats that depend on the load of the machine."""
    monkeypatch.setattr(training, "BEAT_SECONDS", float("inf"))
    monkeypatch.setattr(training, "WITHIN_SECONDS", float("inf"))


def plain(row):
    return {name: value for name, value in row.items() if name not in TIMES}


def results(trainable):
    found = []
    while not found or not found[-1].get("done"):
        found.append(trainable.train())
    return found


def rows(found):
    return [plain(result["row"]) for result in found if result["row"]]


def expected(spec):
    return [{name: value for name, value in plain(row).items() if name != "final"} for row in train(spec)]


def test_a_cell_without_checkpoints_is_the_trial(spec):
    found = results(CellTrainable({"job": job_of(spec)}))
    assert rows(found) == expected(spec)
    assert [(result["fraction"], result["step"]) for result in found] == [(0.5, 4), (1.0, 8)]
    *_, last = train(spec)
    assert found[-1]["outcome"] == "completed"
    assert found[-1]["reason"] is None
    assert plain(found[-1]["final"]) == plain(last["final"])


def test_a_trial_says_that_it_is_alive_between_evaluations(spec, monkeypatch):
    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    found = results(CellTrainable({"job": job_of(spec)}))
    assert [result["step"] for result in found] == list(range(1, 9))
    assert [result["fraction"] for result in found] == [step / 8 for step in range(1, 9)]
    assert [result["row"] is not None for result in found] == [step in (4, 8) for step in range(1, 9)]
    assert rows(found) == expected(spec)


def test_a_long_update_shows_life_between_its_parts_and_changes_no_bit(spec, monkeypatch):
    parts = replace(spec, micro_batch_tokens=16, eval_windows=12, test=True)  # 4 and 3 parts
    undisturbed = expected(parts)
    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(training, "WITHIN_SECONDS", 0.0)
    found = results(CellTrainable({"job": job_of(parts)}))
    assert rows(found) == undisturbed
    made = [result["step"] for result in found]
    assert made == sorted(made)
    assert [made.count(step) for step in range(9)] == [
        2 + 4,  # the model, its loss; the micro-batches of the first update
        *[1 + 4] * 2,  # the update; the micro-batches of the next
        1 + 4 + 3,  # and the evaluation that follows the fourth update, before that is told
        1 + 4, 1 + 4, 1 + 4,
        1 + 4 + 3 + 3 + 3,  # and evaluation, test and padded loss after the last
        1,
    ]  # fmt: skip
    assert {result["row"] is None for result in found if result["step"] not in (4, 8)} == {True}


@pytest.mark.parametrize(
    ("minutes", "within", "ended"),
    [(5.0, 2.0, []), (5.0, float("inf"), ["a"]), (10.1, 2.0, ["a"])],
    ids=["slow", "as it was: no sign within an update", "hung"],
)
def test_a_trial_whose_update_outlasts_the_timeout_lives_while_its_parts_do(spec, monkeypatch, minutes, within, ended):
    """Use an update of four micro-batches and an evaluation of three batches, each minutes long on a fake clock."""
    now, silent = [0.0], []
    heartbeats = Heartbeats(600.0, lambda: now[0])

    def slowly(function):
        def call(*arguments):
            end = now[0] + 60 * minutes
            while now[0] < end:  # the driver looks all the while
                now[0] += 4.0
                silent.extend(heartbeats.silent())
            return function(*arguments)

        return call

    monkeypatch.setattr("pagating.tasks.causal.linear_nll", slowly(causal.linear_nll))
    monkeypatch.setattr("pagating.evaluate.token_nll", slowly(evaluate.token_nll))
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training, "BEAT_SECONDS", 2.0)
    monkeypatch.setattr(training, "WITHIN_SECONDS", within)
    heartbeats.beat("a")
    given = replace(spec, micro_batch_tokens=16, eval_windows=12, tokens=64, eval_every=1)
    cell = CellTrainable({"job": job_of(given)})
    while not cell.train().get("done"):
        heartbeats.beat("a")
    assert silent[:1] == ended


def test_a_cell_that_is_cut_off_within_an_update_ends_it_and_saves(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(training, "WITHIN_SECONDS", 0.0)
    config = {"job": job_of(replace(spec, micro_batch_tokens=16), checkpoints=tmp_path / "a")}
    undisturbed = expected(config["job"].trial)
    first = CellTrainable(config)
    while first.train()["step"] < 5:
        pass
    assert first.train()["step"] == 5  # the first micro-batch of the sixth update
    first.stop()
    (left,) = (tmp_path / "a").iterdir()
    assert "-0000000006-" in left.name
    assert rows(results(CellTrainable(config))) == undisturbed


def test_a_cell_that_is_cut_off_goes_on_in_another_actor_to_the_same_bits(spec, tmp_path, monkeypatch):
    config = {"job": job_of(spec, checkpoints=tmp_path / "a")}
    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    first = CellTrainable(config)
    for _ in range(5):
        first.train()
    first.stop()
    (left,) = (tmp_path / "a").iterdir()
    assert "-0000000006-" in left.name  # five were reported, and the stop made one more
    second = CellTrainable(config)
    found = results(second)
    assert [result["step"] for result in found] == [4, 7, 8]
    assert rows(found) == expected(spec)
    assert left.exists()  # until the driver has recorded the end
    second.stop()
    assert not (tmp_path / "a").exists()


def test_the_next_cell_of_an_actor_removes_what_the_last_one_left(spec, tmp_path):
    config = {"job": job_of(spec, checkpoints=tmp_path / "a")}
    actor = CellTrainable(config)
    actor._training._checkpoints.request()
    actor.train()
    assert len(list((tmp_path / "a").iterdir())) == 1  # stopped early here: Ray asks for no clean-up
    assert actor.reset({"job": job_of(spec, "b", tmp_path / "b")})
    assert not (tmp_path / "a").exists()
    assert rows(results(actor)) == expected(spec)


def test_a_damaged_checkpoint_reaches_the_driver_as_a_warning(spec, tmp_path):
    folder = CheckpointFolder(tmp_path / "a")
    folder.request()
    next(train(spec, folder))
    (path,) = (tmp_path / "a").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    first, second = results(CellTrainable({"job": job_of(spec, checkpoints=tmp_path / "a")}))
    assert first["warning"] == f"{path}: is damaged (its checksum does not match); it is removed"
    assert "warning" not in second
    assert rows([first, second]) == expected(spec)


def test_a_diverged_cell_is_infeasible_and_says_why(spec):
    (result,) = results(CellTrainable({"job": job_of(replace(spec, lr=1e30, warmup=0.0, clip=1e30))}))
    assert (result["outcome"], result["row"], result["final"]) == ("infeasible", None, {})
    assert result["reason"].startswith("step ")


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (MemoryError(), "infeasible", "out of memory: no size is known; lower the batch"),
        (MemoryError("Unable to allocate 7.45 GiB for an array"), "infeasible", "out of memory: 7.45 GiB more could"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "infeasible", "memory: 2.00 GiB"),
        (FileNotFoundError(2, "No such file or directory", "train.bin"), "failed", "No such file .* 'train.bin'"),
    ],
)
def test_what_a_machine_lacks_is_told_apart_from_a_fault(spec, monkeypatch, error, outcome, reason):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("pagating.tasks.causal.linear_nll", fail)
    (result,) = results(CellTrainable({"job": job_of(spec)}))
    assert result["outcome"] == outcome
    with pytest.raises(ValueError, match=reason):
        raise ValueError(result["reason"])


@pytest.mark.parametrize("then", ["the next cell", "the end"])
def test_a_cell_whose_machine_failed_leaves_its_checkpoints_for_the_next_try(spec, tmp_path, monkeypatch, then):
    config = {"job": job_of(spec, checkpoints=tmp_path / "a")}
    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    first = CellTrainable(config)
    first.train()
    first.stop()
    (kept,) = (tmp_path / "a").iterdir()

    def fail(*arguments, **options):
        raise FileNotFoundError(2, "No such file or directory", "train.bin")

    with monkeypatch.context() as broken:
        broken.setattr("pagating.tasks.causal.linear_nll", fail)
        second = CellTrainable(config)
        assert second.train()["outcome"] == "failed"
    if then == "the next cell":
        second.reset({"job": job_of(spec, "b")})
    else:
        second.stop()
    assert list((tmp_path / "a").iterdir()) == [kept]
    assert rows(results(CellTrainable(config))) == expected(spec)


def test_torchs_own_words_for_no_memory_are_understood(spec):
    model = {**spec.model, "d_model": 1 << 16, "n_head": 1, "n_layer": 64}  # 12 * 2^38 weights of 4 bytes
    (result,) = results(CellTrainable({"job": job_of(replace(spec, model=model))}))
    assert result["outcome"] == "infeasible"
    assert "GiB more could not be had; lower the batch (batch_tokens), the model" in result["reason"]


def test_an_error_of_the_program_is_not_swallowed(spec, monkeypatch):
    monkeypatch.setattr("pagating.tasks.causal.linear_nll", lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        CellTrainable({"job": job_of(spec)}).train()


class KilledOnce(CellTrainable):
    """Real trial. The first one that finds the file FAULTS/kill is killed by signal 9 after its sixth update."""

    def step(self):
        training.BEAT_SECONDS, training.WITHIN_SECONDS = 0.0, 3600.0  # one result per update, however long it takes
        place = Path(os.environ["FAULTS"])
        self._training._checkpoints.request()
        result = super().step()
        with open(place / "steps", "a") as file:
            file.write(f"{self.config['job'].cell} {os.getpid()} {result['step']} {result['row'] is not None}\n")
        if result["step"] == 6 and (place / "kill").exists():
            (place / "kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return result


@pytest.mark.slow
def test_a_worker_killed_in_mid_trial_goes_on_from_its_checkpoint_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAULTS", str(tmp_path))
    study = study_of(STEADY, "faults", search={"pruner": "none"})
    found = []
    for name in ("undisturbed", "disturbed"):
        (tmp_path / "steps").unlink(missing_ok=True)
        if name == "disturbed":
            (tmp_path / "kill").touch()
        run = sweep.sweep(study, tmp_path, tmp_path / name, RayBackend(1, trainable=KilledOnce))
        assert not (tmp_path / "kill").exists()
        assert not (run.folder / "checkpoints").exists()
        found.append({key: (r.outcome, plain(r.final), list(map(plain, r.curve))) for key, r in run.records.items()})
    assert found[0] == found[1]
    assert {outcome for outcome, *_ in found[0].values()} == {"completed"}
    lines = [line.split() for line in (tmp_path / "steps").read_text().splitlines()]
    cell = lines[0][0]  # the first to train was killed
    first, second = dict.fromkeys(pid for key, pid, *_ in lines if key == cell)
    told = [(int(step), row == "True") for key, pid, step, row in lines if (key, pid) == (cell, second)]
    assert [int(step) for key, pid, step, _ in lines if (key, pid) == (cell, first)] == [1, 2, 3, 4, 5, 6]
    assert told[:3] == [(4, True), (7, False), (8, True)]  # the stored row again, then the seventh update
