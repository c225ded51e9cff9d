"""Tests of studies whose arms name a gate of a user's file."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pagating
from analysis.io import study as tables
from analysis.report.findings import Findings
from analysis.report.methods import arm_rows
from pagating.gating.gates import GATES
from pagating.model.gpt2 import GPT2Size, activations
from tests.studies import SNAKES, TINY, changed, study_of, yaml_of
from tests.tune.helpers import run_of, typed
from tune import sweep
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.run import ledger
from tune.study.own_gates import check_gates, copy_of, digests, doubtful, keep_gates, place_gate, references
from tune.study.trial_spec import trial_spec

torch.set_num_threads(1)
EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "own_activation.yaml"
STUDY = changed(
    TINY,
    tokenizer={"vocab_size": 260},
    arms={
        "linear-floor": None,
        "mine": {"gate": "gates/own.py:mine", "alpha": 0.5},
        "learned": {"gate": "gates/own.py:mine", "alpha": {"learnable": {"init": 0.5}}},
    },
)
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
    return study_of(STUDY, "own")


def test_the_arms_that_name_a_file(study):
    assert references(study) == ["gates/own.py:mine"]
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
def test_a_gate_that_cannot_be_loaded_is_one_line_and_writes_nothing(
    study, tmp_path, monkeypatch, capsys, source, message
):
    path = tmp_path / "gates" / "own.py"
    path.unlink()
    if source is not None:
        path.write_text(source)
    (tmp_path / "own.yaml").write_text(yaml_of(STUDY))
    monkeypatch.chdir(tmp_path)
    code, _, err = typed(monkeypatch, capsys, "sweep", "own.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(message, err)
    with pytest.raises(StudyError, match=message):
        check_gates(study, tmp_path, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gates", "own.yaml"]


def test_a_study_trains_keeps_and_loads_activations_of_a_file(tmp_path, monkeypatch, capsys):
    arms = {"wrong": {"gate": "act.py:snake", "alpha": 1.0}, "right": {"unit": "act.py:snake"}}
    arms |= {"mine": None, "learned": {"unit": "act.py:Snake"}}
    (tmp_path / "act.py").write_text(SNAKES)
    (tmp_path / "units.yaml").write_text(yaml_of(STUDY, arms=arms))
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(monkeypatch, capsys, "try", "units.yaml", "--steps", "1", "--arm", "learned")
    assert (code, err) == (0, "")
    note, line = out.splitlines()
    assert note == (
        "arms.wrong.gate: snake(x) grows with x, as an activation does; the arm trains x * snake(x): write "
        "`unit: act.py:snake` if snake(x) is the whole activation"
    )
    learned = int(re.match(r"learned: Snake\(x\); ([\d,]+) parameters, train_nll ", line)[1].replace(",", ""))
    code, out, _ = typed(monkeypatch, capsys, "plan", "units.yaml", "--hours-from", "a100", "--format", "json")
    planned = {arm: model["parameters"] for arm, model in json.loads(out)["models"].items()}
    assert (planned["learned"], planned["right"], planned["gelu"]) == (learned, learned - 32, learned - 32)
    warned: list[str] = []
    study = study_of(STUDY, "units", arms=arms)
    early: list[str] = []

    def listen(cell):
        early.append((tmp_path / "studies" / "units" / "provenance.json").read_text())

    run = sweep.sweep(study, tmp_path, tmp_path / "studies", Inline(), warn=warned.append, listen=listen)
    assert json.loads(early[0])["formulas"]["wrong"] == "x * snake(x)"
    assert [line for line in warned if line.startswith("arms.")] == [note]
    provenance = json.loads((run.folder / "provenance.json").read_text())
    assert provenance["formulas"] == {
        "gelu": "the stock activation",
        "wrong": "x * snake(x)",
        "right": "snake(x)",
        "learned": "Snake(x)",
    }
    shown = {row["arm"]: row["is"] for row in arm_rows(Findings(tables.load(run.folder)))}
    assert shown == provenance["formulas"]
    losses = {
        arm: {r.cell.seed: r.final["val_nll"] for r in run.records.values() if r.cell.key.startswith(f"confirm/{arm}")}
        for arm in study.arms
    }
    assert losses["right"] != losses["wrong"] != losses["learned"] != losses["right"]
    for arm, name in (("right", "snake"), ("learned", "Snake")):
        facts = json.loads((run.folder / "models" / arm / "model.json").read_text())
        model = pagating.load_model(run.folder / "models" / arm, unit=f"studies/units/gates/{facts['unit']['unit']}")
        assert facts["unit"]["unit"].endswith(f".py:{name}")
        assert sum(p.numel() for p in model.parameters()) == facts["final"]["parameters"]
        assert facts["final"]["parameters"] == learned - (32 if arm == "right" else 0)
    (tmp_path / "act.py").write_text(SNAKES.replace("** 2", "** 4"))
    with pytest.raises(StudyError, match=r"arms.learned.unit: .*act.py has changed since the study began"):
        sweep.sweep(study, tmp_path, tmp_path / "studies", Inline())


def test_an_arm_whose_alpha_has_no_effect_is_named(tmp_path):
    arms = {"learned": None, "mine": {"gate": "own.py:phi", "alpha": 0.5, "base": "gelu"}}
    arms |= {
        "control": {"gate": "own.py:phi", "alpha": 0.0, "base": "gelu"},
        "plain": {"gate": "own.py:phi", "alpha": 0.5},
    }
    phi = "0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))"
    (tmp_path / "own.py").write_text(f"import torch\ndef phi(x):\n    return {phi}\n")
    (line,) = doubtful(study_of(STUDY, "own", arms=arms), tmp_path, tmp_path / "none")
    assert line == (
        "arms.mine: alpha has no effect: x * phi(x) is the base gelu, so that the unit is the same at every alpha; "
        "choose another gate or base"
    )


def test_a_gate_that_is_neither_built_in_nor_a_file_is_refused():
    with pytest.raises(StudyError, match=r"gate 'swish' is not one of sigmoid, .*, nor FILE.py:NAME"):
        study_of(STUDY, arms={"mine": {"gate": "swish", "alpha": 0.5}})


@pytest.mark.slow
def test_the_example_goes_from_the_idea_to_the_verdict(tmp_path):
    """Run the whole script, and the same study with its gate in another file under another name."""
    script = EXAMPLE.with_suffix(".py")
    shutil.copy(EXAMPLE, tmp_path)
    shutil.copy(script, tmp_path)
    command = [sys.executable, str(tmp_path / script.name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "hard-swish against gelu, n = 3: " in done.stdout
    assert f"The whole report: {Path('studies/own_activation/report.html')}" in done.stdout
    verdict = json.loads((tmp_path / "studies" / "own_activation" / "verdict.json").read_text())
    assert {row["arm"] for row in verdict["comparisons"]} == {"linear-floor", "hard-swish", "hard-learned"}
