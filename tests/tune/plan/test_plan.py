"""Tests of `pagating plan`: its output, files and errors, and a real study against its plan."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.studies import SMALL, study_of, yaml_of
from tests.tune.decide.ladders import LADDER, ladder_of
from tests.tune.helpers import rows_of
from tune.errors import StudyError
from tune.plan import plan, space, work
from tune.plan.page import show
from tune.run import ledger
from tune.study import sizes
from tune.study.files import load

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
SMOKE = load(ROOT / "configs" / "smoke.yaml")
OPTIONS = {"slots": 2, "hours_from": "a100", "utilisation": 0.3, "effect": "0.5%", "noise": None, "form": "json"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture
def cache(packed, monkeypatch):
    monkeypatch.setenv("PAGATING_CACHE", str(packed))
    return packed


def test_a_plan_writes_nothing_but_the_token_cache(tmp_path, cache):
    text = plan.run(ROOT / "configs" / "smoke.yaml", tmp_path / "studies", **{**OPTIONS, "noise": "0.3%"})
    found = json.loads(text)
    assert list(tmp_path.iterdir()) == []
    assert found["total"]["cells"] == [45, pytest.approx(sizes.grid_points(SMOKE)[1] * 5 + 30), 55]
    assert found["total"]["tokens"][2] == 55 * 20_480
    assert found["disk"]["corpus"] == sum(path.stat().st_size for path in cache.glob("corpus-*/*"))
    assert found["hours_from"] == "a100, one per slot: 19.5 TFLOP/s in float32 x 30% assumed utilisation"
    assert found["seconds"]["wall"][0] < found["seconds"]["wall"][1] < found["seconds"]["wall"][2]
    assert found["power"]["level"] == 0.05 / 4
    page = show(found, "terminal")
    assert "49.3 (45 - 55)" in page
    assert "assumed utilisation" in page
    assert "Holm's first step" in page
    flops = found["models"]["gelu"]["flops_per_token"] * SMOKE.fixed.batch_tokens
    note, few = sorted(found["notes"])
    assert few.startswith("calibrate: one selection seed on 3 points and 5 arms does not show the noise")
    assert note.startswith(f"a step is {1e3 * flops / (0.3 * 19.5e12):.2g} ms of computing on that device")
    large = ROOT / "configs" / "published" / "fair.yaml"
    notes = json.loads(plan.run(large, tmp_path / "studies", **OPTIONS))["notes"]
    assert [note for note in notes if "ms of computing" in note] == []


def test_the_plan_of_a_ladder_covers_its_rungs(tmp_path, cache):
    config = tmp_path / "ladder.yaml"
    config.write_text(LADDER)
    found = json.loads(plan.run(config, tmp_path / "studies", **OPTIONS))
    each, study = found["rungs"], ladder_of()
    assert found["total"]["cells"] == pytest.approx([sum(p["total"]["cells"][i] for p in each) for i in range(3)])
    assert found["total"]["cells"][0] == 4 * 3 + 3 * 4 * ((3 + 3 + 2) * 2 + 8)
    assert [row["rung"] for row in found["work"] if row["stage"] == "search"] == [1] * 4
    flops = [p["total"]["flops"][1] for p in each]
    assert found["total"]["flops"][1] == pytest.approx(sum(flops))
    beside = sum(found["seconds"][name] for name in ("start", "slot", "end"))
    assert found["seconds"]["wall"][1] == pytest.approx(sum(p["seconds"]["wall"][1] for p in each) - 2 * beside)
    page = show(found, "terminal")
    for number, rung in enumerate(study.rungs, 1):
        tokens = rung.fixed.tokens / each[number - 1]["models"]["gelu"]["parameters"]
        assert re.search(
            rf"rung {number}: {rung.model.n_layer} x {rung.model.d_model}, .*\({tokens:.3g} per param", page
        )


def test_a_plan_says_how_often_a_trial_reads_a_short_text(tmp_path, cache):
    (tmp_path / "text.txt").write_text("a few words of text, again and again\n" * 400)
    config = tmp_path / "short.yaml"
    for tokens, said in ((128, 0), (1 << 20, 1)):
        config.write_text(yaml_of(SMALL, corpus={"files": {"train": "text.txt"}}, fixed={"tokens": tokens}))
        notes = json.loads(plan.run(config, tmp_path / "studies", **OPTIONS))["notes"]
        assert sum(note.startswith("a trial reads the training text ") for note in notes) == said


def test_a_corpus_that_is_not_here_is_planned_from_the_file(tmp_path, cache, monkeypatch):
    config = tmp_path / "far.yaml"
    tokenizer = {"vocab_size": None, "pretrained": "gpt2"}
    config.write_text(yaml_of(SMALL, tokenizer=tokenizer, corpus={"hub": {"name": "far/away"}}))

    def gone(*arguments):
        from pagating.data.errors import NotDownloaded

        raise NotDownloaded("hub dataset 'far/away' cannot be loaded: offline")

    monkeypatch.setattr("tune.study.inputs.packed_corpus", gone)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = json.loads(plan.run(config, tmp_path / "studies", **OPTIONS))
    assert found["notes"][:-1] == [
        "corpus: not on this machine, planned from the study file's sizes "
        "(hub dataset 'far/away' cannot be loaded: offline)"
    ]
    assert found["models"]["gelu"]["parameters"] == (50_257 + 16) * 16 + 2 * (12 * 256 + 13 * 16) + 32
    assert found["disk"]["corpus"] is None


@pytest.mark.parametrize(
    ("slots", "parallel", "advice"),
    [
        (3, 1, None),
        (4, 1, "3 of 4 slots can be busy.* search.parallel: 2 keeps 4 busy, but each suggestion then lacks the last 1"),
        (6, 2, None),
        (40, 2, "6 of 40 slots can be busy.* search.parallel: 3 keeps 9 busy"),  # an arm has only 3 trials
        (40, 3, None),
    ],
)
def test_slots_that_the_search_leaves_idle_are_said(slots, parallel, advice):
    notes = plan.idle_slots(study_of(SMALL, search={"trials_per_arm": 3, "parallel": parallel}), slots)
    assert len(notes) == (advice is not None)
    assert all(re.search(advice, note) for note in notes)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("hours_from", "gt200", "--hours-from gt200: allowed: measure, t4, v100"),
        ("form", "yaml", "--format yaml: allowed: terminal, json"),
        ("effect", "half", "--effect half: allowed: a percentage"),
        ("noise", "nothing", "--noise nothing: no study of that name in .*studies and no percentage"),
        ("utilisation", 0.0, r"--utilisation 0.0: it must be in \(0, 1\]"),
    ],
)
def test_bad_options_are_one_line(tmp_path, cache, option, value, message):
    with pytest.raises(StudyError, match=message):
        plan.run(ROOT / "configs" / "smoke.yaml", tmp_path / "studies", **{**OPTIONS, option: value})


def test_bad_input_of_the_command_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "tune.cli", "plan"]
    for arguments, message in (
        ([str(tmp_path / "none.yaml")], "none.yaml: No such file or directory"),
        ([str(ROOT / "configs" / "smoke.yaml"), "--hours-from", "abacus"], "--hours-from abacus: allowed: measure, t4"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_real_study_takes_what_was_planned(tmp_path):
    environment = {**os.environ, "PAGATING_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tune.cli", "sweep", str(ROOT / "configs" / "smoke.yaml"), "--slots", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "studies")], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode in (0, 1), done.stderr
    folder = tmp_path / "studies" / "smoke"
    found = ledger.records(ledger.read(folder / "ledger.jsonl")).values()
    cells = Counter((record.cell.stage, record.cell.arm) for record in found)
    rows = {(row.stage, row.arm): row for row in rows_of(SMOKE)}
    assert cells.keys() == rows.keys()
    for key, row in rows.items():
        assert row.cells[0] <= cells[key] <= row.cells[2]
        trained = sum(r.final["tokens"] for r in found if (r.cell.stage, r.cell.arm) == key)
        assert row.tokens[0] <= trained <= row.tokens[2]
    planned = space.disk_parts(SMOKE, len(found), 2, work.arm_model(SMOKE, "gelu", 300))
    kept = {"ledger": folder / "ledger.jsonl", "mlflow": tmp_path / "mlflow.db"}
    for name, path in kept.items():
        assert path.stat().st_size / 1.3 < planned[name] < 1.3 * path.stat().st_size, name
    used = sum(path.stat().st_size for path in (*tmp_path.rglob("mlflow.db"), *folder.rglob("*")) if path.is_file())
    assert used < space.disk_needed(SMOKE, 2)
