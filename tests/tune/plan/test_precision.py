"""`fixed.precision: auto`, which is decided once, when a study starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis.report.build import ran
from pagating import device as devices
from tests.studies import SMALL, TINY, changed, study_of, yaml_of
from tune.errors import StudyError
from tune.plan import dry_run, probe
from tune.plan.child import ChildError
from tune.plan.dry_run import Tried
from tune.plan.plan import run
from tune.plan.probe import decide_precision, judge
from tune.run.extend import check_folder

AUTO = {"fixed": {"precision": "auto"}}
# A user's commands, one after the other, on a processor with bfloat16 units whose probe finds what NAME.json says
DRIVER = """
import json, pathlib, sys
from pagating import device
from tune.cli import main
from tune.plan import probe

device.has_bfloat16 = lambda device: True
probes = iter(json.loads(sys.argv[1]))
probe.in_both = lambda *study: next(probes)
for words in json.loads(sys.argv[2]):
    sys.argv = ["pagating", *words]
    try:
        main.main()
    except SystemExit as ended:
        print("exit", ended.code, flush=True)
"""
FASTER = {"float32": [2e-6, 3e-6, 2e-6], "bfloat16": [1e-6, 1e-6, 1e-6]}


def written_text(folder: Path) -> dict:
    """Write a short text into a folder; return the sections of a study that reads it."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return {"corpus": {"files": {"train": "text.txt"}}, "tokenizer": {"vocab_size": 280}}


def typed_in_turn(folder: Path, probes: list, *commands: str) -> tuple[list[str], list[str]]:
    """Type commands into one process with these results of its probes; return the lines of output and of errors."""
    words = [command.split() for command in commands]
    driver = [sys.executable, "-c", DRIVER, json.dumps(probes), json.dumps(words)]
    done = subprocess.run(driver, capture_output=True, text=True, cwd=folder, check=True)
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_bfloat16_is_taken_from_a_clear_margin_on():
    found = judge(FASTER, "Some CPU")
    assert (found.chosen, found.ratio, found.float32, found.bfloat16) == ("bfloat16", 2.0, 5e5, 1e6)
    assert str(found) == ("fixed.precision: auto is bfloat16, because it is 2.00 times as fast as float32 (Some CPU)")
    # the median of the rounds' ratios, not the ratio of the medians
    close = judge({"float32": [1.0, 1.0, 9.0], "bfloat16": [0.95, 1.0, 3.0]}, "Some CPU")
    assert (close.chosen, close.ratio) == ("float32", 1.053)
    assert close.reason == "bfloat16 is 1.05 times as fast, and 1.1 would be a clear gain"
    assert judge({"float32": [1.1], "bfloat16": [1.0]}, "").chosen == "bfloat16"
    assert judge({"float32": [1.0], "bfloat16": [3.0]}, "").chosen == "float32"


def test_a_processor_without_units_needs_no_probe(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(probe, "in_both", lambda *study: pytest.fail("a probe"))
    found = decide_precision(study_of(SMALL, **AUTO), Path(), 300, pytest.fail)
    assert (found.chosen, found.reason) == ("float32", "bfloat16 is emulated here, which is slower")
    assert found.as_dict().keys() == {"asked", "chosen", "reason", "processor"}


def test_the_largest_size_decides_for_a_ladder(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    seen = []
    monkeypatch.setattr(probe, "in_both", lambda study, *_: seen.append(study.model.d_model) or FASTER)
    rows = [{"d_model": 16}, {"d_model": 32}, {"d_model": 64}]
    ladder = study_of(SMALL, fixed={"precision": "auto", "tokens": None}, scales=rows)
    chosen = decide_precision(ladder, Path(), 300).chosen
    assert (chosen, seen) == ("bfloat16", [64])
    assert [rung.fixed.precision for rung in ladder.with_precision(chosen).rungs] == ["bfloat16"] * 3
    with pytest.raises(StudyError, match="rung 2: precision=auto: one ladder has one precision"):
        study_of(SMALL, fixed={"tokens": None}, scales=[rows[0], rows[1] | {"precision": "auto"}, rows[2]])


def test_what_cannot_be_decided_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = study_of(SMALL, resources={"gpus": 1.0}, **AUTO)
    with pytest.raises(StudyError, match=r"torch sees no GPU here; allowed: float32, bfloat16$"):
        decide_precision(gpu, Path(), 300)

    def failed(*_):
        raise ChildError("out of memory")

    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(probe, "in_both", failed)
    with pytest.raises(StudyError, match=r"auto: the probe failed: out of memory; allowed: float32, bfloat16$"):
        decide_precision(study_of(SMALL, **AUTO), Path(), 300)


def test_try_says_what_it_trains_in(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(probe, "in_both", lambda *study: FASTER)
    tried = []
    monkeypatch.setattr(dry_run, "_try_arm", lambda trial, arm: tried.append(trial.precision) or Tried(arm))
    text = written_text(tmp_path)
    said, *_ = dry_run.try_arms(study_of(SMALL, **text, **AUTO), tmp_path, tmp_path, 1)
    assert tried == ["bfloat16"] * 3
    assert said == (
        "fixed.precision: auto is decided when the study starts; here it would be bfloat16: it is 2.00 times as fast "
        "as float32"
    )


@pytest.mark.parametrize("device", ["a100", "t4"])
def test_a_plan_for_a_device_takes_what_the_device_has(tmp_path, monkeypatch, device):
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "in_both", lambda *study: pytest.fail("a probe"))
    text = written_text(tmp_path)
    (tmp_path / "x.yaml").write_text(yaml_of(SMALL, **text, **AUTO))
    options = {"slots": 1, "utilisation": 0.3, "effect": "0.5%", "noise": None, "form": "json"}
    plan = json.loads(run(tmp_path / "x.yaml", tmp_path, hours_from=device, **options))
    chosen, has = ("bfloat16", "has") if device == "a100" else ("float32", "has no")
    assert f"TFLOP/s in {chosen} x" in plan["hours_from"]
    said = f"fixed.precision: auto is decided when the study starts; planned in {chosen}: {device} {has} bfloat16 units"
    assert said in plan["notes"]


def test_it_is_decided_once_and_kept_in_the_study_and_its_provenance(tmp_path):
    mine = changed(TINY, name="x", stages=["search"], **written_text(tmp_path), **AUTO)
    (tmp_path / "x.yaml").write_text(yaml_of(mine))
    (tmp_path / "other.yaml").write_text(yaml_of(mine, fixed={"precision": "float32"}))
    more = changed(mine, search={"trials_per_arm": 3})
    (tmp_path / "more.yaml").write_text(yaml_of(more))
    sweep = "sweep {} --inline --tracking none"
    out, err = typed_in_turn(
        tmp_path,
        [FASTER],  # a second probe would end the process
        sweep.format("x.yaml"),
        "cells more.yaml",
        "plan more.yaml --hours-from t4",
        "trial x search/gelu/0/1",
        sweep.format("other.yaml"),
    )
    ends = [line for line in out if line.startswith("exit")]
    assert ends == ["exit 0"] * 4 + ["exit 2"], err
    decided = [line for line in err if line.startswith("fixed.precision")]
    assert decided[0] == "fixed.precision: auto is decided by about 10 s of training in float32 and bfloat16"
    assert decided[1].startswith("fixed.precision: auto is bfloat16, because it is 2.00 times as fast as float32 (")
    assert len(decided) == 2
    assert err[-1].startswith("pagating: studies/x: fixed.precision was bfloat16 and is now float32; the study has")
    assert any('"precision": "bfloat16"' in line for line in out)  # of `trial`
    folder = tmp_path / "studies" / "x"
    assert "precision: bfloat16\n" in (folder / "study.yaml").read_text()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["precision"].pop("processor")
    assert provenance["precision"] == {
        "asked": "auto",
        "chosen": "bfloat16",
        "reason": "it is 2.00 times as fast as float32",
        "ratio": 2.0,
        "float32": 500_000.0,
        "bfloat16": 1_000_000.0,
    }
    said = ran(type("Study", (), {"settings": {"provenance": provenance}}))["precision"]
    assert said == "bfloat16, decided at the start: it is 2.00 times as fast as float32"
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "ended" for event in events) == 4
    cells = [json.loads(path.read_text()) for path in (folder / "cells" / "trials").glob("*.json")]
    assert [cell["precision"] for cell in cells] == ["bfloat16"] * 2
    assert check_folder(study_of(more, "x"), folder) == study_of(more, "x", fixed={"precision": "bfloat16"})


@pytest.mark.slow  # half a minute
def test_a_real_probe_trains_both_in_turns(monkeypatch):
    """Without bfloat16 units, it finds the emulation slower."""
    monkeypatch.setattr(probe, "PRECISION_SECONDS", 0.3)
    study = study_of(SMALL, model={"d_model": 64}, **AUTO)
    rounds = probe.in_both(study, Path(), 300)
    assert rounds.keys() == {"float32", "bfloat16"}
    assert len(rounds["float32"]) == len(rounds["bfloat16"]) >= 3
    assert all(1e-7 < seconds < 1e-2 for each in rounds.values() for seconds in each)
    if not devices.has_bfloat16(torch.device("cpu")):
        assert judge(rounds, "").chosen == "float32"
