import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pagating.gating.gates import GATES
from pagating.model.gpt2 import GPT2Size, activations
from tests.tune.helpers import run_of
from tune.errors import StudyError
from tune.run import ledger
from tune.study.files import parse
from tune.study.own_gates import check_gates, copy_of, digests, keep_gates, place_gate, references
from tune.study.trial_spec import trial_spec

torch.set_num_threads(1)
EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "own_activation.yaml"
TEXT = """
question: Is mine better?
model: {n_layer: 1, d_model: 8, n_head: 2, n_ctx: 16}
fixed: {tokens: 1024, batch_tokens: 64, eval_windows: 2}
tokenizer: {vocab_size: 260}
nuisance: {lr: {loguniform: [1.0e-3, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  mine: {gate: gates/own.py:mine, alpha: 0.5}
  learned: {gate: gates/own.py:mine, alpha: {learnable: {init: 0.5}}}
"""
SOURCE = "import torch\ndef mine(x):\n    return torch.tanh(x)\n"


@pytest.fixture(autouse=True)
def _only_the_built_in_gates_remain():
    before = dict(GATES)
    yield
    GATES.clear()
    GATES.update(before)


@pytest.fixture
def study(tmp_path):
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "own.py").write_text(SOURCE)
    return parse(TEXT, tmp_path / "own.yaml")


def test_the_arms_that_name_a_file(study):
    assert references(study) == {"gates/own.py:mine": ["mine", "learned"]}
    assert study.arms["mine"].arguments({}) == {"gate": "gates/own.py:mine", "alpha": 0.5, "base": "identity"}


def test_a_trial_runs_the_copy_that_the_study_keeps(study, tmp_path):
    folder = tmp_path / "studies" / "own"
    folder.mkdir(parents=True)
    check_gates(study, tmp_path, folder)
    assert list(folder.iterdir()) == []
    keep_gates(study, tmp_path, folder)
    assert digests(study, folder) == {"gates/own.py:mine": hashlib.sha256(SOURCE.encode()).hexdigest()}
    (tmp_path / "gates" / "own.py").unlink()
    plain = trial_spec(study, "gelu", {"lr": 1e-3}, 1, Path("/corpus"), test=False)
    assert place_gate(plain, folder) is plain
    spec = place_gate(trial_spec(study, "mine", {"lr": 1e-3}, 1, Path("/corpus"), test=False), folder)
    file, _, name = spec.unit["gate"].rpartition(":")
    assert (Path(file).read_text(), name) == (SOURCE, "mine")
    (act,) = activations(GPT2Size(11, 16, 8, 1, 2), spec.unit)
    x = torch.randn(3, 32)
    torch.testing.assert_close(act(x), 0.5 * x * torch.tanh(x) + 0.5 * x)


def test_files_of_one_name_in_two_folders_do_not_meet(tmp_path):
    assert copy_of("a/own.py:mine", tmp_path) != copy_of("b/own.py:mine", tmp_path)
    assert copy_of("a/own.py:mine", tmp_path) == copy_of("a/own.py:other", tmp_path)


def test_a_changed_file_is_refused(study, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    keep_gates(study, tmp_path, folder)
    check_gates(study, tmp_path, folder)
    (tmp_path / "gates" / "own.py").write_text(SOURCE.replace("tanh", "sigmoid"))
    with pytest.raises(StudyError, match=r"arms.mine.gate: .*own.py has changed since the study began") as caught:
        check_gates(study, tmp_path, folder)
    assert "\n" not in str(caught.value)


def test_a_copy_that_was_altered_is_refused_by_the_ledger(study, tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    monkeypatch.setattr("pagating.data.corpus.read_meta", lambda path: {"digest": "0" * 16, "vocab_size": 260})
    folder = tmp_path / "study"
    folder.mkdir()
    keep_gates(study, tmp_path, folder)
    run_of(study, folder, corpus).ledger.close()
    (event, *_) = ledger.read(folder / "ledger.jsonl")
    assert event["gates"] == digests(study, folder)
    run_of(study, folder, corpus).ledger.close()
    copy_of("gates/own.py:mine", folder).write_text("def mine(x):\n    return x\n")
    with pytest.raises(StudyError, match="are not those that the study was begun with"):
        run_of(study, folder, corpus)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"arms.mine.gate: '.*own.py:mine': .*own.py: No such file or directory"),
        ("def mine(x) x\n", "arms.mine.gate: .* cannot be imported: SyntaxError: expected ':'"),
        ("def yours(x):\n    return x\n", "arms.mine.gate: .* defines no 'mine'"),
    ],
)
def test_a_gate_that_cannot_be_loaded_is_one_line_and_writes_nothing(study, tmp_path, source, message):
    path = tmp_path / "gates" / "own.py"
    path.unlink()
    if source is not None:
        path.write_text(source)
    (tmp_path / "own.yaml").write_text(TEXT)
    command = [sys.executable, "-m", "tune.cli", "sweep", "own.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    with pytest.raises(StudyError, match=message):
        check_gates(study, tmp_path, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gates", "own.yaml"]


def test_a_gate_that_is_neither_built_in_nor_a_file_is_refused():
    with pytest.raises(StudyError, match=r"gate 'swish' is not one of sigmoid, .*, nor FILE.py:NAME"):
        parse(TEXT.replace("gates/own.py:mine", "swish"), Path("own.yaml"))


@pytest.mark.slow
def test_the_example_goes_from_the_idea_to_the_verdict(tmp_path):
    script = EXAMPLE.with_suffix(".py")
    shutil.copy(EXAMPLE, tmp_path)
    shutil.copy(script, tmp_path)
    command = [sys.executable, str(tmp_path / script.name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "hard-swish against gelu, n = 3: " in done.stdout
    assert f"The whole report: {Path('studies/own_activation/report.html')}" in done.stdout
    verdict = json.loads((tmp_path / "studies" / "own_activation" / "verdict.json").read_text())
    assert {row["arm"] for row in verdict["comparisons"]} == {"linear-floor", "hard-swish", "hard-learned"}
