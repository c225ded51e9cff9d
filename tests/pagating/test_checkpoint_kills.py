"""Tests of the time of a checkpoint, and of trials that diverge, are interrupted or are killed."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from pagating import checkpoint
from pagating import train as loop
from pagating.checkpoint import CheckpointFolder
from pagating.train import main, train
from pagating.trial import Diverged
from tests.pagating.helpers import make_trial, plain


def test_a_checkpoint_is_due_by_the_steady_clock_and_costs_a_small_share(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -now[0])  # a clock that goes back has no effect
    checkpoints = CheckpointFolder(tmp_path, every_seconds=60.0)
    checkpoints.resume("0" * 16)
    now[0] = 1059.0
    assert not checkpoints.due()
    now[0] = 1060.0
    assert checkpoints.due()

    def slow(*arguments, **options):
        now[0] += 3.0
        save_file(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    checkpoints.save(1, {"a": torch.zeros(1)}, {})  # 3 seconds: at most 2% of the time means 150 s to the next
    now[0] += 149.0
    assert not checkpoints.due()
    now[0] += 1.0
    assert checkpoints.due()
    checkpoints.save(2, {"a": torch.zeros(1)}, {})
    checkpoints.request()
    assert checkpoints.due()


def test_a_trial_that_diverges_leaves_no_checkpoint(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointFolder, "due", lambda self: True)
    with pytest.raises(Diverged, match=r"^step \d+: "):
        list(train(make_trial(packed, lr=1e30, warmup=0.0, clip=1e30), CheckpointFolder(tmp_path / "c")))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_and_the_same_command_goes_on(packed, tmp_path, monkeypatch, capsys, number, code):
    (tmp_path / "trial.json").write_text(json.dumps(vars(make_trial(packed))))
    command = [str(tmp_path / "trial.json"), "--checkpoints", str(tmp_path / "c")]
    *_, last = train(make_trial(packed))
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:

        def fourth(step, *given):
            if step == 3:
                signal.raise_signal(number)

        patched.setattr(loop, "require_finite", fourth)
        assert main(command) == code
    assert signal.getsignal(number) is before
    (path,) = (tmp_path / "c").iterdir()
    assert "-0000000004-" in path.name
    assert capsys.readouterr().out == ""
    assert main(command) == 0
    assert plain(json.loads(capsys.readouterr().out)) == {"outcome": "completed", **plain(last["final"])}
    assert not (tmp_path / "c").exists()


def kill_and_resume(trial, tmp_path, moments):
    """Kill a process by signal 9 after its first checkpoint, several times; then let it end."""
    (tmp_path / "trial.json").write_text(json.dumps(vars(trial)))
    command = [sys.executable, "-m", "pagating.train", str(tmp_path / "trial.json")]
    command += ["--checkpoints", str(tmp_path / "c"), "--every", "0"]
    reached = []
    for moment in moments:
        seen = set((tmp_path / "c").glob("*-*-*"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not set((tmp_path / "c").glob("*-*-*")) - seen and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        assert process.poll() is None, "the trial ended before it was killed"
        process.kill()
        process.wait()
        reached.append(max(int(path.name[17:27]) for path in (tmp_path / "c").glob("*-*-*")))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not (tmp_path / "c").exists()
    return reached, json.loads(done.stdout)


def test_killed_in_the_middle_and_run_again_it_ends_at_the_same_bits(packed, tmp_path):
    trial = make_trial(packed, tokens=64 * 150, eval_every=50)
    reached, final = kill_and_resume(trial, tmp_path, [0.05])
    assert reached[0] > 0
    *_, last = train(trial)
    assert plain(final) == {"outcome": "completed", **plain(last["final"])}


@pytest.mark.slow
def test_killed_many_times_at_random_moments_it_ends_at_the_same_bits(packed, tmp_path):
    trial = make_trial(packed, tokens=64 * 2000, eval_every=50)
    moments = [random.uniform(0.0, 1.0) for _ in range(12)]
    reached, final = kill_and_resume(trial, tmp_path, moments)
    assert reached == sorted(reached), moments
    *_, last = train(trial)
    assert plain(final) == {"outcome": "completed", **plain(last["final"])}, moments
