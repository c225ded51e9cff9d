"""Tests of a full disk and a removed folder: a trial loses its checkpoint and nothing else."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pagating import checkpoint
from pagating.checkpoint import CheckpointFolder
from pagating.train import train
from tests.pagating.helpers import interrupt, make_trial, plain, resume_folder, save_step


def test_too_little_room_costs_the_trial_nothing_but_the_checkpoint(packed, tmp_path, monkeypatch, capsys):
    trial = make_trial(packed)
    undisturbed = [plain(row) for row in train(trial)]
    interrupt(trial, tmp_path / "c", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(CheckpointFolder, "due", lambda self: True)
    checkpoints = CheckpointFolder(tmp_path / "c", keep=True)
    assert [plain(row) for row in train(trial, checkpoints)] == undisturbed
    assert {path: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    line = f"{tmp_path / 'c'}: no checkpoint at step 3: it needs 1 MB, and 1 MB are free; the trial goes on without it"
    assert checkpoints.notes == [line]  # once, not at every step
    assert capsys.readouterr().err == f"pagating: {line}\n"


def test_room_for_what_the_next_checkpoint_needs_is_looked_for_to_the_byte(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    needed = 400 + checkpoint.MARGIN
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        checkpoints = CheckpointFolder(tmp_path)
        checkpoints.resume("0" * 16)
        assert checkpoints.save(1, {"a": torch.zeros(100)}, {}) == fits


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_a_file_is_what_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        checkpoint.write_tensors(tmp_path / "c" / "a.safetensors", {"a": torch.zeros(3)}, "")
    finally:
        os.umask(before)
    assert (tmp_path / "c" / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_while_writing_leaves_the_one_before_and_later_works_again(tmp_path, monkeypatch, error):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    checkpoints = save_step(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", half)
        assert not checkpoints.save(2, {}, {})
        assert not checkpoints.save(3, {}, {})
    assert len(checkpoints.notes) == 1
    assert "No space left on device" in checkpoints.notes[0]
    assert [int(path.name[17:27]) for path in tmp_path.iterdir()] == [1]
    assert checkpoints.save(4, {}, {"step": 4})
    assert resume_folder(tmp_path)[0].facts == {"step": 4}


def test_an_error_of_the_program_while_writing_is_not_swallowed(tmp_path, monkeypatch):
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.resume("0" * 16)
    with pytest.raises(ValueError, match="non contiguous"):
        checkpoints.save(1, {"a": torch.zeros(4, 4).t()[1:]}, {})


def test_a_folder_that_cannot_be_made_or_has_gone_costs_nothing(packed, tmp_path, monkeypatch):
    trial = make_trial(packed)
    undisturbed = [plain(row) for row in train(trial)]
    monkeypatch.setattr(CheckpointFolder, "due", lambda self: True)
    (tmp_path / "file").write_text("in the way")
    checkpoints = CheckpointFolder(tmp_path / "file" / "c")
    assert [plain(row) for row in train(trial, checkpoints)] == undisturbed
    assert checkpoints.notes == [
        f"{tmp_path / 'file' / 'c'}: no checkpoint at step 1: Not a directory; the trial goes on without it"
    ]


FULL = """
import json, sys
from pagating.checkpoint import CheckpointFolder
from pagating.train import Trial, train
CheckpointFolder.due = lambda self: True
checkpoints = CheckpointFolder(sys.argv[2], keep=True)
*_, last = train(Trial(**json.load(open(sys.argv[1]))), checkpoints)
print(json.dumps([last["final"]["val_nll"], checkpoints.notes]))
"""


@pytest.mark.slow
def test_a_real_file_system_that_is_full(packed, tmp_path):
    """Use a tmpfs of a few hundred KB in a new namespace: part of a checkpoint fits, or exactly one."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    (tmp_path / "trial.json").write_text(json.dumps(vars(make_trial(packed))))
    (tmp_path / "small").mkdir()
    (tmp_path / "run.py").write_text(FULL + "import os\nprint(len(os.listdir(sys.argv[2])))\n")
    mount = f"mount -t tmpfs -o size=200k none {tmp_path / 'small'} && "
    script = f"import pagating.checkpoint as c; c.MARGIN = -(1 << 30); exec(open({str(tmp_path / 'run.py')!r}).read())"
    command = f'{sys.executable} -c "$SCRIPT" {tmp_path / "trial.json"} {tmp_path / "small"}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + command], env={**os.environ, "SCRIPT": script},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (loss, notes), left = map(json.loads, done.stdout.splitlines())
    *_, last = train(make_trial(packed))
    assert loss == last["final"]["val_nll"]
    assert left == 1  # the first checkpoint, complete
    assert len(notes) == 1
    assert "No space left on device" in notes[0]
