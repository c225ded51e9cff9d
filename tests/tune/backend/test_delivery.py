"""Test how corpus, weights and code of a study travel to nodes, without a cluster."""

import hashlib
import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.autoscaler.sdk

from pagating.data.corpus import CorpusError, read_meta
from pagating.data.prepare import fault, file_names, receive
from pagating.trial import Trial
from tests.own_trainings import FUNCTION, own_study
from tests.studies import FROM_A_FILE, study_of
from tests.tune.helpers import job_of, run_of, trained_to_the_end
from tune.backend import cluster, delivery
from tune.backend.delivery import Parcel, pack, pack_own, unpack
from tune.backend.ray_trial import CellTrainable
from tune.errors import StudyError
from tune.study.cell import Cell
from tune.study.inputs import opened
from tune.study.trial_spec import trial_spec
from tune.study.weights import note
from tune.subject.gpt2 import Gpt2
from tune.subject.short import subject_of
from tune.subject.sources import draft
from tune.subject.subject import Job

TIMES = ("seconds", "tokens_per_second", "peak_rss_mb")


def study(**changes):
    return study_of(FROM_A_FILE, "delivery", **changes)


def pieces(folder):
    return {name: [(folder / name).read_bytes()] for name in file_names(folder)}


def test_a_corpus_is_received_once_whole_and_checked(packed, tmp_path):
    digest, folder, asked = read_meta(packed)["digest"], tmp_path / "cache" / packed.name, []

    def files():
        asked.append(1)
        return pieces(packed)

    receive(folder, digest, files)
    assert fault(folder) is None
    assert pieces(folder) == pieces(packed)
    receive(folder, digest, files)
    assert len(asked) == 1
    shutil.rmtree(folder)  # a cache that was cleared is filled again
    receive(folder, digest, files)
    assert len(asked) == 2


def test_a_corpus_that_is_damaged_on_the_way_or_on_the_disk_is_not_taken(packed, tmp_path):
    digest, folder = read_meta(packed)["digest"], tmp_path / packed.name
    with pytest.raises(CorpusError, match=r"train.bin is damaged \(its checksum does not match\)"):
        receive(folder, digest, lambda: {**pieces(packed), "train.bin": [b"another"]})
    receive(folder, digest, lambda: pieces(packed))  # the damaged copy is replaced
    assert fault(folder) is None
    with pytest.raises(CorpusError, match=rf"is corpus {digest}, not 0123456789abcdef"):
        receive(folder, "0123456789abcdef", lambda: pieces(packed))


def test_a_cache_that_cannot_be_written_is_named(packed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"the corpus cannot be brought here: (Not a directory|File exists)"):
        receive(tmp_path / "file" / packed.name, read_meta(packed)["digest"], lambda: pieces(packed))


def plain_trial(corpus):
    """A trial on a corpus, with the defaults."""
    size = {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 32}
    return Trial(corpus=str(corpus), model=size, lr=1e-3, tokens=64, batch_tokens=64, seed=1)


@pytest.fixture
def objects(monkeypatch):
    """Replace Ray's object store by a list."""
    kept = []
    monkeypatch.setattr(delivery.ray, "put", lambda piece: kept.append(piece) or len(kept) - 1)
    monkeypatch.setattr(delivery.ray, "get", lambda ref: kept[ref])
    return kept


def test_a_node_unpacks_corpus_gate_and_a_folder_for_checkpoints(packed, tmp_path, monkeypatch, objects):
    folder = tmp_path / "studies" / "delivery"
    (folder / "gates").mkdir(parents=True)
    (folder / "gates" / "mine-1.py").write_text("def hard(x):\n    return x.clamp(0, 1)\n")
    monkeypatch.setattr(delivery, "PART_BYTES", 1000)
    parcel = pack(opened(study(), folder, packed), None, driver="")
    assert len(parcel.parts["train.bin"]) == -(-(packed / "train.bin").stat().st_size // 1000) > 1
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "node"))
    unit = {"gate": f"{folder.resolve() / 'gates' / 'mine-1.py'}:hard", "alpha": 1.0, "base": "identity"}
    given = replace(plain_trial(packed), unit=unit)
    placed = unpack(parcel, Job("a", given, Gpt2.train, str(folder / "checkpoints" / "a"), 1))
    trial, checkpoints = placed.trial, placed.checkpoints
    assert trial.corpus == str(tmp_path / "node" / packed.name)
    assert pieces(Path(trial.corpus)) == pieces(packed)
    file, _, name = trial.unit["gate"].rpartition(":")
    assert (name, Path(file).read_bytes()) == ("hard", (folder / "gates" / "mine-1.py").read_bytes())
    assert Path(file).parent.name == "gate-" + hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    assert Path(checkpoints).parent.parent == tmp_path / "node"
    assert Path(checkpoints).name == "a"
    assert (trial.lr, trial.unit["alpha"], trial.unit["base"]) == (1e-3, 1.0, "identity")


@pytest.mark.parametrize("shared", [False, True])
def test_pretrained_weights_travel_too_and_are_checked(packed, tmp_path, monkeypatch, objects, shared):
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 100)
    digest = hashlib.sha256(b"weights" * 100).hexdigest()
    note({"path": str(tmp_path / "model.safetensors"), "sha256": digest}, tmp_path)
    monkeypatch.setattr(delivery, "PART_BYTES", 256)
    parcel = pack(opened(study(), tmp_path, packed), tmp_path / "shared" if shared else None, driver="")
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "node"))
    given = replace(plain_trial(packed), pretrained="/there/model.safetensors")
    job = Job("a", given, Gpt2.train, None, 1)
    trial = unpack(parcel, job).trial
    assert Path(trial.pretrained).parent == tmp_path / ("shared" if shared else "node")
    assert Path(trial.pretrained).read_bytes() == b"weights" * 100
    if not shared:
        Path(trial.pretrained).unlink()
        objects[parcel.weights[0]] = b"else"
        with pytest.raises(OSError, match=rf"the weights that came are \w{{16}}, not {digest[:16]}"):
            unpack(parcel, job)


def test_with_storage_nodes_read_and_write_there_and_nothing_is_sent(packed, tmp_path, monkeypatch, objects):
    folder = tmp_path / "studies" / "delivery"
    parcel = pack(opened(study(), folder, packed), tmp_path / "shared", driver="")
    assert objects == []
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "node"))
    it = run_of(study(storage=str(tmp_path / "shared")), tmp_path, packed)
    wanted = str(it.checkpoints(it.next_cell()))
    assert Path(wanted).parent == tmp_path / "shared" / "delivery" / "checkpoints"
    placed = unpack(parcel, Job("a", plain_trial(packed), Gpt2.train, wanted, 1))
    trial, checkpoints = placed.trial, placed.checkpoints
    assert trial == plain_trial(tmp_path / "shared" / packed.name)
    assert fault(Path(trial.corpus)) is None
    assert checkpoints == wanted
    assert not (tmp_path / "node").exists()


def test_a_trial_is_the_same_wherever_its_corpus_lies(packed, tmp_path, objects, monkeypatch):
    spec = trial_spec(study(), "floor", {"lr": 3e-3}, 5, packed, test=True)
    parcel = pack(opened(study(), tmp_path, packed), None, driver="")

    def final(**parts):
        trainable, found = CellTrainable({"job": job_of(spec)}), []
        trainable.setup({"job": job_of(spec)}, **parts)
        while not found or not found[-1].get("done"):
            found.append(trainable.step())
        return {name: value for name, value in found[-1]["final"].items() if name not in TIMES}

    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "node"))
    assert final(parcel=parcel) == final()


def test_a_node_that_cannot_have_the_corpus_fails_the_cell_for_another_try(packed, tmp_path, monkeypatch, objects):
    parcel = pack(opened(study(), tmp_path, packed), None, driver="")

    def lost(ref):
        raise delivery.ray.exceptions.ObjectLostError(b"0" * 28, "", "")

    monkeypatch.setattr(delivery.ray, "get", lost)
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "node"))
    spec = trial_spec(study(), "gelu", {"lr": 3e-3}, 5, packed, test=False)
    trainable = CellTrainable({"job": job_of(spec)})
    trainable.setup({"job": job_of(spec)}, parcel=parcel)
    result = trainable.step()
    assert (result["outcome"], result["done"]) == ("failed", True)
    with pytest.raises(ValueError, match="the study's data cannot be fetched from the driver: ObjectLostError"):
        raise ValueError(result["reason"])


def test_an_empty_parcel_leaves_the_drivers_node_alone(monkeypatch):
    class Here:
        def get_node_id(self):
            return "here"

    monkeypatch.setattr(delivery.ray, "get_runtime_context", Here)
    job = Job("a", plain_trial(Path("/there")), Gpt2.train, "/c/a", 1)
    assert unpack(Parcel("/there", "0", "/c", driver="here"), job) is job


def test_what_a_job_needs_can_be_sent_to_any_cluster(monkeypatch):
    """With ray:// Ray writes it as JSON on the head, which has none of our packages."""
    sent = {}
    for name in ("_reach", "client_refusal"):
        monkeypatch.setattr(cluster, name, lambda *given: None)
    monkeypatch.setattr(ray, "init", lambda **given: sent.update(given))
    cluster._join("ray://10.0.0.1:10001")
    environment = sent["runtime_env"]
    assert json.loads(json.dumps(environment)) == environment
    files = [Path(path) for path in environment["py_modules"]]
    assert [path.name for path in files if path.exists()] == ["pagating", "tune", "analysis", "pagating_study.py"]
    module, _, name = environment["worker_process_setup_hook"].rpartition(".")
    assert f"{module}.py" in [path.name for path in files]
    assert callable(getattr(importlib.import_module(module), name))


def test_an_own_training_is_written_once_and_runs_in_the_nodes_cache(tmp_path, monkeypatch, objects):
    monkeypatch.setattr(delivery.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    given = own_study(tmp_path / "mine")
    subject = subject_of(given, draft(given, tmp_path / "mine", tmp_path / "studies/own").write())
    cell = Cell("search", "shifted", 0, 3, {"lr": 0.1}, "key")
    job = Job("a", subject.trial(cell), subject.train, str(tmp_path / "studies/own/checkpoints/a"), 40)
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    there = unpack(pack_own(subject, None, "driver"), job)
    shutil.rmtree(tmp_path / "mine")
    shutil.rmtree(tmp_path / "studies")
    place = Path(there.trial.folder)
    assert place.parent == tmp_path / "cache"
    assert (place / "mine.py").read_text() == FUNCTION
    assert Path(there.checkpoints).parent.parent == tmp_path / "cache"
    end, rows = trained_to_the_end(there)
    assert (end["outcome"], len(rows)) == ("completed", 4)
    (place / "noise.py").write_text("SIZE = 9")  # a damaged file is written again
    study = tmp_path / "again"
    other = own_study(study)
    again = subject_of(other, draft(other, study, tmp_path / "studies/own").write())
    assert unpack(pack_own(again, Path("/shared"), ""), job).checkpoints == job.checkpoints  # all nodes see them
    assert "0.02" in (place / "noise.py").read_text()
    assert unpack(pack_own(again, None, "node"), job) is job


def test_a_command_runs_in_the_nodes_cache_and_a_file_above_its_folder_does_not_travel(tmp_path, monkeypatch):
    script = "import sys\nprint(f'METRIC val_loss={2 - float(sys.argv[1])} step={sys.argv[2]}')\n"
    line = f"{sys.executable} train.py {{shift}} {{budget}} {{seed}}"
    monkeypatch.setattr(delivery.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "mine"
    given = own_study(mine, trial={"command": line}, nuisance={"lr": {"loguniform": [0.02, 0.5]}})
    (mine / "train.py").write_text(script)
    subject = subject_of(given, draft(given, mine, tmp_path / "studies/own").write())
    cell = Cell("search", "shifted", 0, 3, {"lr": 0.1}, "key")
    there = unpack(pack_own(subject, None, "driver"), Job("a", subject.trial(cell), subject.train, None, 40))
    shutil.rmtree(mine)
    end, rows = trained_to_the_end(there)
    assert (end["outcome"], [row["val_nll"] for row in rows]) == ("completed", [1.9])
    assert [path.name for path in Path(there.trial.folder).iterdir()] == ["train.py"]
    above = own_study(mine, trial={"command": line.replace("train.py", "../train.py")})
    (tmp_path / "train.py").write_text(script)
    subject = subject_of(above, draft(above, mine, tmp_path / "studies/own").write())
    with pytest.raises(StudyError, match=r"\.\./train\.py is not below .*mine, so it cannot travel"):
        pack_own(subject, None, "driver")
    whole = own_study(mine, trial={"command": line.replace("train.py", str(tmp_path / "train.py"))})
    assert pack_own(subject_of(whole, draft(whole, mine, tmp_path / "s").write()), None, "driver").files == {}
