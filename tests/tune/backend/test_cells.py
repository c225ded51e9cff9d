"""Tests of cells as files: written, trained elsewhere, taken once, in any mixture with sweeps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.io.study import load as load_study
from analysis.verdict.decide import decide
from analysis.verdict.kinds import as_object
from pagating.cells import runner
from pagating.cells.folder import cells_of, read_result, write_result
from pagating.packed import plan
from tests.studies import TINY, changed, yaml_of
from tests.tune.helpers import typed
from tune.backend.inline import Inline
from tune.backend.packed import Packed
from tune.run import ledger
from tune.study.files import load
from tune.sweep import sweep

ROOT = Path(__file__).parents[3]
STUDY = changed(
    TINY,
    corpus={"files": {"train": "train.txt"}},
    arms={"own": {"gate": "mine.py:hard", "alpha": 0.5}},
    search={"pruner": "none"},
)
CLOCK = ["seconds", "tokens_per_second", "peak_rss_mb", "device", "packed"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("".join(f"{i * 7919 % 1000} brown foxes jump over\n" for i in range(2000)))
    (tmp_path / "mine.py").write_text("import torch\n\n\ndef hard(x):\n    return torch.clamp(x / 6 + 0.5, 0.0, 1.0)\n")
    (tmp_path / "s.yaml").write_text(yaml_of(STUDY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def say(monkeypatch, capsys):
    """Return a function that types a command and returns its exit code, its output and its errors."""
    return lambda *words: typed(monkeypatch, capsys, *words)


def trials_of(folder):
    """Return the table of trials without times, sorted by cell."""
    table = pd.read_parquet(folder / "trials.parquet")
    table = table.drop(columns=[name for name in CLOCK if name in table])
    return table.sort_values(["stage", "arm", "trial", "seed"]).reset_index(drop=True)


def events_of(folder, kind):
    return [event for event in ledger.read(folder / "ledger.jsonl") if event["event"] == kind]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_half_by_files_and_half_by_a_sweep_is_the_sweep_bit_for_bit(base, say):
    swept = sweep(load("s.yaml"), base, base / "whole", Inline())
    for _ in range(3):  # two rounds of the search and the grid
        assert say("cells", "s.yaml", "--into", "away")[0] == 0
        assert runner.main(["away"]) == 0
        assert say("take", "s.yaml", "away", "--tracking", "none")[0] == 0
    assert {event["cell"].split("/")[0] for event in events_of(base / "studies/s", "ended")} == {"search", "calibrate"}
    mixed = sweep(load("s.yaml"), base, base / "studies", Inline())
    pd.testing.assert_frame_equal(trials_of(mixed.folder), trials_of(swept.folder), check_exact=True)
    assert as_object(decide(load_study(mixed.folder))) == as_object(decide(load_study(swept.folder)))
    table = pd.read_parquet(base / "studies/s/trials.parquet")
    assert set(table[table.stage != "confirm"].device) == {plan.device_name(cells_of(Path("away"))[0].trial())}
    assert table[table.stage == "confirm"].device.isna().all()
    kept = json.loads((base / "studies/s/provenance.json").read_text())
    assert sum(kept["devices"].values()) == len(table[table.stage != "confirm"])
    assert say("cells", "s.yaml")[1] == "s is finished: pagating report s\n"


@pytest.mark.parametrize(("most", "workers"), [(8, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_study_begun_by_files_ends_in_packs(base, say, most, workers):
    whole = trials_of(sweep(load("s.yaml"), base, base / "whole", Inline()).folder)
    say("cells", "s.yaml")
    run = sweep(load("s.yaml"), base, base / "studies", Packed(most, workers=workers))
    assert run.stages.finished
    mixed = trials_of(run.folder)
    assert list(mixed.outcome) == list(whole.outcome)
    assert mixed.test_nll.to_numpy() == pytest.approx(whole.test_nll.to_numpy(), rel=1e-3, nan_ok=True)
    assert (pd.read_parquet(run.folder / "trials.parquet").packed > 1).mean() > 0.5


def test_cells_are_written_once_and_none_is_lost(base, say):
    assert say("cells", "s.yaml", "--limit", "2")[1].startswith("studies/s/cells: 2 cells may start now\n")
    folder = base / "studies/s/cells"
    first = content(folder)
    out = say("cells", "s.yaml")[1]
    assert out.startswith("studies/s/cells: 3 cells may start now, 2 of them from before\n")
    again = content(folder)
    assert {name: again[name] for name in first if name != "cells.json"} == {
        name: raw for name, raw in first.items() if name != "cells.json"
    }
    say("cells", "s.yaml")
    assert content(folder) == again
    assert [event["cell"] for event in events_of(base / "studies/s", "suggested")] == [
        cell.cell for cell in cells_of(folder)
    ]
    assert not events_of(base / "studies/s", "started")
    runner.main([str(folder)])
    assert "Nothing more may start before these results are taken" in say("cells", "s.yaml")[1]
    say("take", "s", folder, "--tracking", "none")
    say("cells", "s")
    assert len(list((folder / "trials").iterdir())) == len(cells_of(folder)) == 3
    assert [name for name in content(folder) if name.startswith("corpus-") and name.endswith("train.bin")] != []


def test_a_folder_of_something_else_is_refused_and_stays(base, say):
    (base / "mine/trials").mkdir(parents=True)
    (base / "mine/trials/own.json").write_text("{}")
    said = "pagating: mine: is not empty and no folder of cells; give another one with --into\n"
    assert say("cells", "s.yaml", "--into", "mine") == (2, "", said)
    assert (base / "mine/trials/own.json").read_text() == "{}"
    assert not (base / "studies").exists()
    (base / "other.yaml").write_text((base / "s.yaml").read_text())
    say("cells", "s.yaml", "--into", "away")
    code, _, err = say("cells", "other.yaml", "--into", "away")
    assert (code, err) == (2, "pagating: away: has the cells of the study s; give another folder with --into\n")
    code, _, err = say("take", "other.yaml", "away")
    assert (code, err.startswith("pagating: studies/other: the study was not begun; `pagating cells")) == (2, True)


FRESH = """
import sys
for name in ("ray", "mlflow", "optuna", "pydantic", "pandas", "tokenizers", "yaml", "transformers"):
    sys.modules[name] = None
from pagating import train
from pagating.cells import runner
assert train.main([sys.argv[2]]) == 0
code = runner.main([sys.argv[1], "--packed", "--most", "2"])
sys.exit(code)
"""


def test_the_folder_works_elsewhere_with_torch_alone(base, say):
    (base / "s.yaml").write_text(yaml_of(changed(STUDY, stages=["search", "confirm"], search={"trials_per_arm": 1})))
    say("cells", "s.yaml", "--into", "away")
    runner.main(["away"])
    say("take", "s.yaml", "away", "--tracking", "none")
    say("cells", "s.yaml", "--into", "away")  # the confirm trials read the test split
    shutil.move("away", "moved")
    for name in ("train.txt", "mine.py", "studies/.cache"):
        (base / name).rename(base / f"{name}.gone")
    trial = next(iter((base / "moved/trials").iterdir()))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(base / "moved"), str(trial)],
        cwd="/",
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{base / 'moved'}: 6 of 6 cells have a result"
    assert json.loads(done.stdout.splitlines()[0])["test_nll"] > 0
    (base / "studies/.cache.gone").rename(base / "studies/.cache")
    code, out, err = say("take", "s", "moved", "--tracking", "none")
    assert code == 0, err
    assert out.startswith("6 taken, 3 already known, 0 refused\n")
    assert "verdict" in out


BARE = """
import runpy, sys
for name in ("ray", "mlflow", "typer", "rich", "jinja2", "matplotlib", "tokenizers", "transformers", "psutil"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_ladder_runs_on_a_bare_machine_and_a_sweep_reads_it(base, say):
    rungs = [{"d_model": 8, "tokens": 640}, {"d_model": 16, "tokens": 1280, "batch_tokens": 128}]
    few = {"search": {"trials_per_arm": 1}, "fixed": {"eval_every": 5}}
    ladder = changed(STUDY, arms={"swiglu": {"unit": "swiglu"}}, scales=rungs, **few)
    (base / "s.yaml").write_text(yaml_of(ladder))
    assert say("cells", "s.yaml")[0] == 0
    script = [str(ROOT / "docs/examples/bare_gpu.py"), "studies/s", "--device", "cpu", "--copy", "copy"]
    command, env = [sys.executable, "-c", BARE, *script], {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"finished: pagating report {base / 'studies/s'}"
    run = sweep(load("copy/s/study.yaml"), base / "copy/s", base / "copy", Inline())  # nothing is left
    assert run.stages.finished
    assert run.slots == 0
    table = pd.read_parquet(base / "copy/s/trials.parquet")
    assert set(table.rung) == {1, 2}
    assert table.device.notna().all()
    assert set(table[table.arm == "swiglu"].packed) == {0, 3, 2}  # alone in the search, then its grid and its seeds
    assert (table.outcome == "completed").all()


def test_a_pack_is_made_as_small_as_the_time_that_is_left(base, monkeypatch):
    sizes, now = [], [0.0]

    real = plan.train_together

    def together(trials, stop, say):
        sizes.append(len(trials))
        now[0] += 10.0 * len(trials)
        return real(trials, lambda: False, say=say)

    monkeypatch.setattr(plan, "train_together", together)
    monkeypatch.setattr("tune.backend.packed.time.monotonic", lambda: now[0])
    run = sweep(load("s.yaml"), base, base / "studies", Packed(3, left=lambda: 85.0 - now[0]))
    assert sizes == [3, 3, 2]  # 30 s, 30 s, and 25 s are left
    assert sum(record.outcome is not None for record in run.records.values()) == 8


def broken(result, **given):
    return lambda path: write_result(path, type(result)(**{**vars(result), **given}))


def test_a_wrong_result_is_refused_by_name_and_the_others_are_taken(base, say, capsys):
    say("cells", "s.yaml")
    folder = base / "studies/s/cells"
    runner.main([str(folder)])
    capsys.readouterr()
    gelu = cells_of(folder)[0].result
    good, raw = read_result(gelu), gelu.read_bytes()
    last = {**good.rows[-1], "val_nll": float("nan")}
    faults = {
        "is of another trial than that of search/gelu/0/1": {"sha256": "0" * 64},
        "its curve is not complete": {"rows": good.rows[:-1]},
        "val_nll at step 20 is not a finite number": {"rows": [*good.rows[:-1], last]},
        "it read the test split, which this stage does not": {"final": {**good.final, "test_nll": 3.0}},
        "final metric train_nll is not a finite number": {"final": {**good.final, "train_nll": None}},
        "its final loss is not that of its last evaluation": {"final": {**good.final, "val_nll": 1.0}},
        "it made 19 steps": {"final": {**good.final, "steps": 19}},
        "final metric 'note' is not known": {"final": {**good.final, "note": 1.0}},
        "is infeasible without a reason": {"outcome": "infeasible"},
        "it does not name its device": {"final": {**good.final, "device": None}},
        "'note' at step 2 is not known": {"rows": [{**good.rows[0], "note": "x"}, *good.rows[1:]]},
        "step 2 has None tokens, not 128": {"rows": [{"step": 2}, *good.rows[1:]]},
        "lacks a part of a result, or has one of another type": {"rows": ["step"]},
        "s has no cell search/gelu/9/1 that may start now": {"cell": "search/gelu/9/1"},
    }
    for message, given in faults.items():
        broken(good, **given)(gelu)
        code, out, err = say("take", "s.yaml", gelu, "--tracking", "none")
        assert (code, message in err) == (2, True), (message, err)
        assert err.startswith(f"refused: {gelu}: ")
        assert out.startswith("0 taken, 0 already known, 1 refused\n")
    gelu.write_bytes(raw[: len(raw) // 2])
    code, out, err = say("take", "s.yaml", folder, "--tracking", "none")
    assert (code, out.splitlines()[0]) == (2, "2 taken, 0 already known, 1 refused")
    assert err == f"refused: {gelu}: is not JSON; it is half-written, or no result\n"
    gelu.write_bytes(raw.replace(b'"val_nll": ', b'"val_nll": 1', 1))
    assert "its digest does not match" in say("take", "s.yaml", folder, "--tracking", "none")[2]
    gelu.write_bytes(raw)
    before = len(events_of(base / "studies/s", "ended"))
    assert say("take", "s.yaml", folder, "--tracking", "none")[1].startswith("1 taken, 2 already known, 0 refused\n")
    assert say("take", "s.yaml", folder, "--tracking", "none")[1].startswith("0 taken, 3 already known, 0 refused\n")
    assert len(events_of(base / "studies/s", "ended")) == before + 1 == 3


def test_a_divergence_is_a_result_and_an_error_of_the_machine_is_none(base, say, capsys, monkeypatch):
    wild = {"lr": {"loguniform": [50.0, 100.0]}}  # the decay multiplies weights by -500 or less
    (base / "s.yaml").write_text(yaml_of(changed(STUDY, nuisance=wild, fixed={"weight_decay": 10.0, "warmup": 0.0})))
    say("cells", "s.yaml")
    folder = base / "studies/s/cells"
    gelu, *others = cells_of(folder)
    with monkeypatch.context() as patched:
        patched.setattr(plan, "heartbeats", lambda trial, checkpoints: (_ for _ in ()).throw(OSError(5, "gone")))
        assert runner.main([str(folder), "--only", str(gelu.path)]) == 1
    assert f"{gelu.path}: [Errno 5] gone; it has no result\n" in capsys.readouterr().out
    assert not gelu.result.exists()
    assert runner.main([str(folder), "--packed"]) == 0
    assert [read_result(cell.result).outcome for cell in (gelu, *others)] == ["infeasible"] * 3
    assert "3 taken, 0 already known, 0 refused\n" in say("take", "s.yaml", folder, "--tracking", "none")[1]
    ended = events_of(base / "studies/s", "ended")
    assert [event["outcome"] for event in ended] == ["infeasible"] * 3
    assert all(event["reason"].startswith("step 1: ") or "step" in event["reason"] for event in ended)


def test_a_pack_that_does_not_fit_is_halved(base, say, monkeypatch, capsys):
    say("cells", "s.yaml")
    folder = base / "studies/s/cells"
    whole, tried = plan.heartbeats_packed, []

    def small(trials):
        tried.append(len(trials))
        if len(trials) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(trials)

    monkeypatch.setattr(plan, "heartbeats_packed", small)
    assert runner.main([str(folder), "--packed"]) == 0
    assert tried == [3, 2]
    assert "a pack of 3 does not fit into memory; 1 at a time" in capsys.readouterr().out
    assert [read_result(cell.result).final["packed"] for cell in cells_of(folder)] == [0, 2, 2]


def test_a_stopped_trial_continues_from_its_checkpoint_to_the_same_bits(base, say):
    say("cells", "s.yaml", "--limit", "1")
    (cell,) = cells_of(base / "studies/s/cells")
    runner.main([str(base / "studies/s/cells")])
    whole = read_result(cell.result)
    cell.result.unlink()
    calls = iter(range(100))
    runner.run([cell], 1, None, lambda: next(calls) > 30, print)
    assert not cell.result.exists()
    assert list((base / "studies/s/cells/checkpoints").rglob("*.safetensors"))
    runner.run([cell], 1, None, lambda: False, print)
    again = read_result(cell.result)
    assert [row["val_nll"] for row in again.rows] == [row["val_nll"] for row in whole.rows]
    assert again.final["val_nll"] == whole.final["val_nll"]
    assert not list((base / "studies/s/cells/checkpoints").rglob("*.safetensors"))


@pytest.mark.slow
def test_workers_share_a_folder(base, say):
    say("cells", "s.yaml")
    folder = base / "studies/s/cells"
    assert runner.main([str(folder), "--workers", "2"]) == 0
    assert all(cell.result.exists() for cell in cells_of(folder))


def test_time_parts_claims_and_bad_words(base, say, capsys):
    say("cells", "s.yaml")
    folder = base / "studies/s/cells"
    cells = cells_of(folder)
    assert runner.main([str(folder), "--time-limit", "0"]) == 1
    assert not any(cell.result.exists() for cell in cells)
    with runner.claimed(cells[:1]) as mine:
        assert mine == cells[:1]
        assert runner.main([str(folder), "--part", "1/2"]) == 1  # another process has the first one
    assert [cell.result.exists() for cell in cells] == [False, False, True]
    assert runner.main([str(folder), "--part", "1/2"]) == 0
    assert runner.main([str(folder), "--only", cells[1].path.name]) == 0
    capsys.readouterr()
    assert runner.main([str(base)]) == 2
    assert capsys.readouterr().err.endswith("give a folder that `pagating cells` wrote\n")
    path = cells[0].path
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    cells[0].result.unlink()
    assert runner.main([str(folder)]) == 2
    assert "is not the trial of search/gelu/0/1: it was changed" in capsys.readouterr().err
    for words in (["--part", "3/2"], ["--most", "0"], ["--only", "nothing.json"]):
        with pytest.raises(SystemExit) as ended:
            sys.exit(runner.main([str(folder), *words]))
        assert ended.value.code == 2
