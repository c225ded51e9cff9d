import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pagating import checkpoint, corpus
from pagating import train as loop
from pagating.checkpoint import CheckpointFolder, capture, folder_name, restore
from pagating.train import Trial, build_model, build_optimizer, main, steps, train, trial_identity
from pagating.trial import Diverged

MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16, "dropout": 0.1}
LEARNED = {"init": 0.5, "lr_multiplier": 20.0}
UNITS = {
    "stock": None,
    "fixed": {"gate": "sigmoid", "alpha": 0.5},
    "learnable": {"gate": "sigmoid", "alpha": {"learnable": LEARNED}},
    "per layer": {"gate": "tanh", "alpha": {"learnable": {**LEARNED, "per": "layer", "range": "free"}}},
    "scheduled": {"gate": "sigmoid", "alpha": {"schedule": {"kind": "cosine"}}},
}
TIMES = ("tokens_per_second", "seconds", "peak_rss_mb")


def make(packed, **changed):
    size = {"tokens": 64 * 7, "batch_tokens": 64, "eval_every": 3, "eval_windows": 8}
    return Trial(**{"corpus": packed, "model": MODEL, "lr": 3e-3, "seed": 5, **size, **changed})


def plain(row):
    """The row without what a clock or the memory of the process decides."""
    return {k: plain(v) if isinstance(v, dict) else v for k, v in row.items() if k not in TIMES}


def interrupt(trial, folder, step):
    """Train up to `step`, leave a checkpoint of it, and forget everything else."""
    checkpoints = CheckpointFolder(folder, every_seconds=1e9)
    for made, _ in steps(trial, checkpoints):
        if made == step - 1:
            checkpoints.request()
        if made == step:
            assert any(f"-{step:010d}-" in path.name for path in Path(folder).iterdir())
            return
    raise AssertionError(f"the trial has no step {step}")


@pytest.fixture
def models(monkeypatch):
    """Every model that the loop builds."""
    made = []
    monkeypatch.setattr(loop, "build_model", lambda trial: made.append(build_model(trial)) or made[-1])
    return made


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "precision"), [*((unit, "float32") for unit in UNITS), ("fixed", "bfloat16"), ("per layer", "bfloat16")]
)
def test_interrupted_at_any_step_and_resumed_is_undisturbed_bit_for_bit(packed, tmp_path, models, unit, precision):
    trial = make(packed, unit=UNITS[unit], precision=precision, clip=0.3)
    undisturbed = [plain(row) for row in train(trial)]
    assert any(row["grad_norm"] > 0.3 for row in undisturbed)  # so that clipping took part
    final = bits(models[-1])
    for step in range(2, trial.steps):
        interrupt(trial, tmp_path / "c", step)
        torch.manual_seed(99)  # another process has another generator
        torch.rand(step)
        assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] == undisturbed, step
        assert all(torch.equal(tensor, final[name]) for name, tensor in models[-1].state_dict().items()), step
        assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_compiled_trial_goes_on_to_the_same_bits(packed, tmp_path):
    trial = make(packed, unit=UNITS["per layer"], compile="always", model={**MODEL, "dropout": 0.0})
    undisturbed = [plain(row) for row in train(trial)]
    if not undisturbed[-1]["final"]["compiled"]:
        pytest.skip("no compiler here")
    interrupt(trial, tmp_path / "c", 4)
    assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] == undisturbed


def test_saving_at_every_step_changes_nothing_and_rows_before_it_come_again_as_they_were(packed, tmp_path, monkeypatch):
    trial = make(packed, test=True)
    undisturbed = [plain(row) for row in train(trial)]
    monkeypatch.setattr(CheckpointFolder, "due", lambda self: True)
    checkpoints = CheckpointFolder(tmp_path / "c", keep=True)
    first = list(train(trial, checkpoints))
    assert [plain(row) for row in first] == undisturbed
    again = list(train(trial, CheckpointFolder(tmp_path / "c")))
    assert [plain(row) for row in again] == undisturbed
    assert again[:2] == first[:2]  # those before the last checkpoint with their times
    assert again[-1]["final"]["seconds"] > again[0]["tokens"] / again[0]["tokens_per_second"]


def test_without_what_it_holds_a_resumed_trial_is_another_one(packed, tmp_path, monkeypatch):
    """Each part left out must be seen: dropout's generator, the optimiser's moments, the losses since the last row."""
    trial = make(packed)
    undisturbed = [plain(row) for row in train(trial)]
    whole = checkpoint.restore

    def without(part):
        def partial(model, optimizer, tensors):
            old = capture(model, optimizer)
            kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(part)}
            whole(model, optimizer, kept | {name: old[name] for name in old if name.startswith(part)})

        return partial

    for part in ("generator.", "optimizer.", "model.transformer.wte"):
        monkeypatch.setattr(loop, "restore", without(part))
        interrupt(trial, tmp_path / "c", 5)
        assert [plain(row) for row in train(trial, CheckpointFolder(tmp_path / "c"))] != undisturbed, part


def test_restore_gives_back_what_torchs_own_state_dicts_hold(packed, tmp_path):
    trial = make(packed, unit=UNITS["learnable"])
    model = build_model(trial)
    optimizer = build_optimizer(model, trial)
    model.hidden(torch.arange(16)[None]).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    save_file(capture(model, optimizer), tmp_path / "x")
    with safe_open(tmp_path / "x", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    drawn = torch.rand(3)
    other = build_model(make(packed, unit=UNITS["learnable"], seed=6))
    fresh = build_optimizer(other, trial)
    restore(other, fresh, tensors)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    mine, theirs = optimizer.state_dict(), fresh.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for index, state in mine["state"].items():
        assert all(torch.equal(value, theirs["state"][index][name]) for name, value in state.items())
        assert {v.dtype for v in state.values()} == {v.dtype for v in theirs["state"][index].values()}


def test_a_checkpoint_of_another_shape_is_refused(packed):
    trial = make(packed)
    model = build_model(trial)
    optimizer = build_optimizer(model, trial)
    tensors = capture(model, optimizer)
    name = "model.transformer.ln_f.bias"
    with pytest.raises(ValueError, match=r"'transformer.ln_f.bias' is not the model's: \(3,\) torch.float32, \(16,\)"):
        restore(model, optimizer, {**tensors, name: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"tensors are not the model's: \['transformer.ln_f.bias'\]"):
        restore(model, optimizer, {key: tensor for key, tensor in tensors.items() if key != name})


# --- the file --------------------------------------------------------------------------------------------------------


def save(folder, step, **options):
    checkpoints = CheckpointFolder(folder, **options)
    checkpoints.resume("0" * 16)
    assert checkpoints.save(step, {"a": torch.full((100,), float(step))}, {"step": step})
    return checkpoints


def load(folder, identity="0" * 16):
    checkpoints = CheckpointFolder(folder)
    return checkpoints.resume(identity), checkpoints.notes


def test_the_last_two_are_kept_and_the_newest_is_used(tmp_path):
    for step in (9, 10, 11, 100):
        save(tmp_path, step)
    assert sorted(int(path.name[17:27]) for path in tmp_path.iterdir()) == [11, 100]
    found, notes = load(tmp_path)
    assert found.facts == {"step": 100}
    assert torch.equal(found.tensors["a"], torch.full((100,), 100.0))
    assert notes == []


def damages(raw):
    """Every kind of byte: the header's length, the header, a tensor, the tail; and a file that is not all there."""
    header = 8 + int.from_bytes(raw[:8], "little")
    for place in (0, 7, 8, header // 2, header - 1, header, (header + len(raw)) // 2, len(raw) - 1):
        for bit in (0, 7):
            yield f"bit {bit} of byte {place}", raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
    for length in (0, 1, 8, header - 1, header, len(raw) - 1):
        yield f"cut to {length}", raw[:length]
    yield "longer", raw + b"\0"
    yield "zeros", bytes(len(raw))


def test_the_older_one_is_used_when_the_newer_is_damaged_in_any_way(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    _, newer = sorted(tmp_path.iterdir())
    raw = newer.read_bytes()
    for kind, damaged in damages(raw):
        newer.write_bytes(damaged)
        found, notes = load(tmp_path)
        assert found.facts == {"step": 1}, kind
        assert notes == [f"{newer}: is damaged (its checksum does not match); it is removed"]
        assert not newer.exists()
    newer.write_bytes(raw)
    assert load(tmp_path)[0].facts == {"step": 2}


def test_two_damaged_ones_are_a_start_from_nothing(packed, tmp_path):
    trial = make(packed)
    undisturbed = [plain(row) for row in train(trial)]
    interrupt(trial, tmp_path, 3)
    interrupt(trial, tmp_path, 5)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    checkpoints = CheckpointFolder(tmp_path)
    assert [plain(row) for row in train(trial, checkpoints)] == undisturbed
    assert len(checkpoints.notes) == 2


@pytest.mark.parametrize("changed", [{"seed": 6}, {"lr": 2e-3}, {"unit": UNITS["fixed"]}])
def test_a_checkpoint_of_another_trial_is_left_alone(packed, tmp_path, changed):
    mine, other = make(packed), make(packed, **changed)
    interrupt(mine, tmp_path, 3)
    (path,) = tmp_path.iterdir()
    assert [plain(row) for row in train(other, CheckpointFolder(tmp_path))] == [plain(row) for row in train(other)]
    assert list(tmp_path.iterdir()) == [path]  # and not removed when the other trial is done
    renamed = tmp_path / path.name.replace(trial_identity(mine), trial_identity(other))
    path.rename(renamed)
    found, notes = load(tmp_path, trial_identity(other))
    assert found is None
    assert notes == [
        f"{renamed}: is left alone: format 1 of trial {trial_identity(mine)}, not format 1 of trial "
        f"{trial_identity(other)}"
    ]


def test_the_same_trial_on_a_corpus_in_another_place_goes_on(packed, tmp_path):
    import shutil

    moved = shutil.copytree(packed, tmp_path / "moved")
    assert trial_identity(make(packed)) == trial_identity(make(str(moved)))
    meta = json.loads((moved / "corpus.json").read_text())
    meta["splits"]["train"]["sha256"] = "another"
    (moved / "corpus.json").write_text(json.dumps({**meta, "digest": corpus.meta_digest(meta)}))
    assert trial_identity(make(packed)) != trial_identity(make(str(moved)))


def test_an_own_gate_counts_by_what_its_file_holds_and_not_by_where_it_is(packed, tmp_path):
    source = "import torch\n\n\ndef mine(x):\n    return torch.sigmoid({}x)\n"
    for name, text in (("a", source.format("")), ("b", source.format("")), ("c", source.format("2 * "))):
        (tmp_path / f"{name}.py").write_text(text)
    a, b, c = (
        trial_identity(make(packed, unit={"gate": f"{tmp_path / name}.py:mine", "alpha": 1.0})) for name in "abc"
    )
    assert a == b != c


def test_another_version_of_torch_or_of_the_format_starts_from_nothing(packed, tmp_path, monkeypatch):
    before = trial_identity(make(packed))
    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9")
        assert trial_identity(make(packed)) != before
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "FORMAT", 2)
        found, notes = load(tmp_path)
    assert found is None
    assert notes[0].endswith(f": is left alone: format 1 of trial {'0' * 16}, not format 2 of trial {'0' * 16}")


def test_a_safetensors_file_of_someone_else_is_no_checkpoint(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    name = f"{'0' * 16}-{1:010d}-{checkpoint._checksum(tmp_path / 'x')}.safetensors"
    (tmp_path / "x").rename(tmp_path / name)
    assert load(tmp_path) == (None, [f"{tmp_path / name}: is left alone: no checkpoint of this program"])
    (tmp_path / name).write_bytes(b"not at all")
    (tmp_path / name).rename(odd := tmp_path / f"{'0' * 16}-{1:010d}-{'c' * 16}.safetensors")
    odd.rename(tmp_path / f"{'0' * 16}-{1:010d}-{checkpoint._checksum(odd)}.safetensors")
    found, (note,) = load(tmp_path)
    assert found is None
    assert "cannot be read" in note


@pytest.mark.parametrize("where", ["save_file", "_checksum", "os.replace", "_sync"])
def test_a_process_that_dies_while_it_writes_leaves_the_one_before(tmp_path, monkeypatch, where):
    class Dead(BaseException):
        pass

    def die(*arguments, **options):
        raise Dead

    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(*((checkpoint.os, "replace") if where == "os.replace" else (checkpoint, where)), die)
        checkpoints = CheckpointFolder(tmp_path)
        checkpoints._identity = "0" * 16
        with pytest.raises(Dead):
            checkpoints.save(2, {"a": torch.ones(5)}, {"step": 2})
    found, notes = load(tmp_path)
    assert found.facts == {"step": 1}
    assert notes == []
    assert len(list(tmp_path.iterdir())) == 1  # what was half written is gone


def test_nothing_is_unpickled(packed, tmp_path, monkeypatch):
    trial = make(packed)
    interrupt(trial, tmp_path, 4)
    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("unpickled"))
    assert len(list(train(trial, CheckpointFolder(tmp_path)))) == 3


@pytest.mark.parametrize(
    "key",
    [
        "search/paglu/3/1",
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\0b",
        "a" * 300,
        "C:\\x",
        "é" * 300,
        "\ud800",
    ],
)
def test_a_cells_folder_cannot_leave_its_parent(tmp_path, key):
    name = folder_name(key)
    assert len(name) < 100
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert not name.startswith(".")
    (tmp_path / name).mkdir()
    assert name != folder_name(key + "x")
    assert folder_name("search/a-b/1") != folder_name("search/a/b/1")


# --- a disk that is full, a folder that has gone ---------------------------------------------------------------------


def test_too_little_room_costs_the_trial_nothing_but_the_checkpoint(packed, tmp_path, monkeypatch, capsys):
    trial = make(packed)
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

    checkpoints = save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", half)
        assert not checkpoints.save(2, {}, {})
        assert not checkpoints.save(3, {}, {})
    assert len(checkpoints.notes) == 1
    assert "No space left on device" in checkpoints.notes[0]
    assert [int(path.name[17:27]) for path in tmp_path.iterdir()] == [1]
    assert checkpoints.save(4, {}, {"step": 4})
    assert load(tmp_path)[0].facts == {"step": 4}


def test_an_error_of_the_program_while_writing_is_not_swallowed(tmp_path, monkeypatch):
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.resume("0" * 16)
    with pytest.raises(ValueError, match="non contiguous"):
        checkpoints.save(1, {"a": torch.zeros(4, 4).t()[1:]}, {})


def test_a_folder_that_cannot_be_made_or_has_gone_costs_nothing(packed, tmp_path, monkeypatch):
    trial = make(packed)
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
    """A tmpfs of a few hundred KB in a namespace of its own: not all of a checkpoint fits, or only one does."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    (tmp_path / "trial.json").write_text(json.dumps(spec_of(packed)))
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
    *_, last = train(make(packed))
    assert loss == last["final"]["val_nll"]
    assert left == 1  # the first checkpoint, whole
    assert len(notes) == 1
    assert "No space left on device" in notes[0]


# --- when ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_due_by_the_steady_clock_and_costs_a_small_share(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -now[0])  # a clock that steps back is not looked at
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
        list(train(make(packed, lr=1e30, warmup=0.0, clip=1e30), CheckpointFolder(tmp_path / "c")))
    assert not (tmp_path / "c").exists()


# --- alone, and killed -----------------------------------------------------------------------------------------------


def spec_of(packed, **changed):
    return {**vars(make(packed)), **changed}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_and_the_same_command_goes_on(packed, tmp_path, monkeypatch, capsys, number, code):
    (tmp_path / "trial.json").write_text(json.dumps(spec_of(packed)))
    command = [str(tmp_path / "trial.json"), "--checkpoints", str(tmp_path / "c")]
    *_, last = train(make(packed))
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


def kill_and_resume(packed, tmp_path, moments, tokens):
    """Kill -9 a real process some time after its first checkpoint, again and again; then let it end."""
    spec = spec_of(packed, tokens=tokens, eval_every=50)
    (tmp_path / "trial.json").write_text(json.dumps(spec))
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
    return reached, json.loads(done.stdout), Trial(**spec)


def test_killed_in_the_middle_and_run_again_it_ends_at_the_same_bits(packed, tmp_path):
    reached, final, trial = kill_and_resume(packed, tmp_path, [0.05], tokens=64 * 150)
    assert reached[0] > 0
    *_, last = train(trial)
    assert plain(final) == {"outcome": "completed", **plain(last["final"])}


@pytest.mark.slow
def test_killed_many_times_at_random_moments_it_ends_at_the_same_bits(packed, tmp_path):
    import random

    moments = [random.uniform(0.0, 1.0) for _ in range(12)]
    reached, final, trial = kill_and_resume(packed, tmp_path, moments, tokens=64 * 2000)
    assert reached == sorted(reached), moments
    *_, last = train(trial)
    assert plain(final) == {"outcome": "completed", **plain(last["final"])}, moments
