"""Tests of the choice of a checkpoint in a folder with damaged, older and foreign files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from pagating import checkpoint
from pagating.checkpoint import CheckpointFolder
from pagating.data import corpus
from pagating.train import train, trial_identity
from tests.pagating.helpers import interrupt, make_trial, plain, resume_folder, save_step


def test_the_last_two_are_kept_and_the_newest_is_used(tmp_path):
    for step in (9, 10, 11, 100):
        save_step(tmp_path, step)
    assert sorted(int(path.name[17:27]) for path in tmp_path.iterdir()) == [11, 100]
    found, notes = resume_folder(tmp_path)
    assert found.facts == {"step": 100}
    assert torch.equal(found.tensors["a"], torch.full((100,), 100.0))
    assert notes == []


def damages(raw):
    """Yield damaged copies: a bit of the header's length, the header, a tensor or the end; truncated files."""
    header = 8 + int.from_bytes(raw[:8], "little")
    for place in (0, 7, 8, header // 2, header - 1, header, (header + len(raw)) // 2, len(raw) - 1):
        for bit in (0, 7):
            yield f"bit {bit} of byte {place}", raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
    for length in (0, 1, 8, header - 1, header, len(raw) - 1):
        yield f"cut to {length}", raw[:length]
    yield "longer", raw + b"\0"
    yield "zeros", bytes(len(raw))


def test_the_older_one_is_used_when_the_newer_is_damaged_in_any_way(tmp_path):
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    _, newer = sorted(tmp_path.iterdir())
    raw = newer.read_bytes()
    for kind, damaged in damages(raw):
        newer.write_bytes(damaged)
        found, notes = resume_folder(tmp_path)
        assert found.facts == {"step": 1}, kind
        assert notes == [f"{newer}: is damaged (its checksum does not match); it is removed"]
        assert not newer.exists()
    newer.write_bytes(raw)
    assert resume_folder(tmp_path)[0].facts == {"step": 2}


def test_two_damaged_ones_are_a_start_from_nothing(packed, tmp_path):
    trial = make_trial(packed)
    undisturbed = [plain(row) for row in train(trial)]
    interrupt(trial, tmp_path, 3)
    interrupt(trial, tmp_path, 5)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    checkpoints = CheckpointFolder(tmp_path)
    assert [plain(row) for row in train(trial, checkpoints)] == undisturbed
    assert len(checkpoints.notes) == 2


@pytest.mark.parametrize("changed", [{"seed": 6}, {"lr": 2e-3}, {"unit": {"gate": "sigmoid", "alpha": 0.5}}])
def test_a_checkpoint_of_another_trial_is_left_alone(packed, tmp_path, changed):
    mine, other = make_trial(packed), make_trial(packed, **changed)
    interrupt(mine, tmp_path, 3)
    (path,) = tmp_path.iterdir()
    assert [plain(row) for row in train(other, CheckpointFolder(tmp_path))] == [plain(row) for row in train(other)]
    assert list(tmp_path.iterdir()) == [path]  # the other trial does not remove it when it is done
    renamed = tmp_path / path.name.replace(trial_identity(mine), trial_identity(other))
    path.rename(renamed)
    found, notes = resume_folder(tmp_path, trial_identity(other))
    assert found is None
    assert notes == [
        f"{renamed}: is left alone: format 1 of trial {trial_identity(mine)}, not format 1 of trial "
        f"{trial_identity(other)}"
    ]


def test_the_same_trial_on_a_corpus_in_another_place_goes_on(packed, tmp_path):
    moved = shutil.copytree(packed, tmp_path / "moved")
    assert trial_identity(make_trial(packed)) == trial_identity(make_trial(str(moved)))
    meta = json.loads((moved / "corpus.json").read_text())
    meta["splits"]["train"]["sha256"] = "another"
    (moved / "corpus.json").write_text(json.dumps({**meta, "digest": corpus.meta_digest(meta)}))
    assert trial_identity(make_trial(packed)) != trial_identity(make_trial(str(moved)))


def test_an_own_gate_counts_by_what_its_file_holds_and_not_by_where_it_is(packed, tmp_path):
    source = "import torch\n\n\ndef mine(x):\n    return torch.sigmoid({}x)\n"
    for name, text in (("a", source.format("")), ("b", source.format("")), ("c", source.format("2 * "))):
        (tmp_path / f"{name}.py").write_text(text)
    a, b, c = (
        trial_identity(make_trial(packed, unit={"gate": f"{tmp_path / name}.py:mine", "alpha": 1.0})) for name in "abc"
    )
    assert a == b != c


def test_another_version_of_torch_or_of_the_format_starts_from_nothing(packed, tmp_path, monkeypatch):
    before = trial_identity(make_trial(packed))
    save_step(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9")
        assert trial_identity(make_trial(packed)) != before
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "FORMAT", 2)
        found, notes = resume_folder(tmp_path)
    assert found is None
    assert notes[0].endswith(f": is left alone: format 1 of trial {'0' * 16}, not format 2 of trial {'0' * 16}")


def test_a_safetensors_file_of_someone_else_is_no_checkpoint(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    name = f"{'0' * 16}-{1:010d}-{checkpoint._checksum(tmp_path / 'x')}.safetensors"
    (tmp_path / "x").rename(tmp_path / name)
    assert resume_folder(tmp_path) == (None, [f"{tmp_path / name}: is left alone: not a checkpoint of this program"])
    (tmp_path / name).write_bytes(b"not at all")
    (tmp_path / name).rename(odd := tmp_path / f"{'0' * 16}-{1:010d}-{'c' * 16}.safetensors")
    odd.rename(tmp_path / f"{'0' * 16}-{1:010d}-{checkpoint._checksum(odd)}.safetensors")
    found, (note,) = resume_folder(tmp_path)
    assert found is None
    assert "cannot be read" in note


@pytest.mark.parametrize("where", ["save_file", "_checksum", "os.replace", "_sync"])
def test_a_process_that_dies_while_it_writes_leaves_the_one_before(tmp_path, monkeypatch, where):
    class Dead(BaseException):
        pass

    def die(*arguments, **options):
        raise Dead

    save_step(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(*((checkpoint.os, "replace") if where == "os.replace" else (checkpoint, where)), die)
        checkpoints = CheckpointFolder(tmp_path)
        checkpoints._identity = "0" * 16
        with pytest.raises(Dead):
            checkpoints.save(2, {"a": torch.ones(5)}, {"step": 2})
    found, notes = resume_folder(tmp_path)
    assert found.facts == {"step": 1}
    assert notes == []
    assert len(list(tmp_path.iterdir())) == 1  # the partly written file is removed


def test_nothing_is_unpickled(packed, tmp_path, monkeypatch):
    trial = make_trial(packed)
    interrupt(trial, tmp_path, 4)
    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("unpickled"))
    assert len(list(train(trial, CheckpointFolder(tmp_path)))) == 3
