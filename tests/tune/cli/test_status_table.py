"""Tests of the table of a study's progress at several widths, and of `pagating status`."""

import fcntl
import io
import os
import socket
import threading

import pytest
from rich.console import Console

from tests.own_trainings import own_study
from tests.studies import TOLD, study_of
from tune.cli import studies
from tune.cli.status_table import View, look
from tune.run.heartbeat import HeartbeatWriter
from tune.run.ledger import Ledger, is_held
from tune.run.progress import Progress
from tune.study.cell import Cell
from tune.study.files import dump


def shown(view, width, **console):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, **console).print(view)
    return out.getvalue().splitlines()


def words(line):
    return line.split()


def test_the_table_has_a_row_a_stage_and_an_arm(plan, searching):
    lines = shown(
        View(Progress(plan, searching.events), searching.now, slots=2, lines=["Log:     here"], note="And then."), 80
    )
    assert lines[0] == "x: Is it better?"
    assert words(lines[1]) == ["stage", "done", "running", "stopped", "early", "infeasible", "of"]
    assert [words(line) for line in lines[3:6]] == [
        ["search", "3", "1", "1", "1", "6"],
        ["calibrate", "0", "0", "0", "0", "12", "to", "20"],
        ["confirm", "0", "0", "0", "0", "6"],
    ]
    assert words(lines[9]) == ["gelu", "3.9000", "lr=3.0e-03"]
    assert words(lines[10]) == ["floor", "4.2000", "lr=2.0e-03"]
    assert lines[11].startswith("250 tokens/s; about ")
    assert lines[11].endswith("; 1 running in 2 slots")
    assert lines[12:] == ["Log:     here", "And then."]


@pytest.mark.parametrize("width", [30, 40, 60, 76, 80, 120])
def test_nothing_is_wider_than_the_terminal_and_the_numbers_stay(width, plan, searching):
    searching.cell("confirm", "gelu", 3.5, seed=101, lr=2e-3)
    lines = shown(View(Progress(plan, searching.events), searching.now, slots=2, lines=["Log:     here"]), width)
    assert max(map(len, lines)) <= width
    assert "3.5000 lr=2.0e-03 n=1" in "\n".join(lines)
    assert any(words(line)[:5] == ["search", "3", "1", "1", "1"] for line in lines if line) or width < 40
    assert any("3.9000" in line for line in lines) == (width >= 60)


def test_a_column_of_failed_cells_appears_with_the_first_one(plan, searching):
    searching.end(searching.start("search", "floor", index=3), outcome="failed")
    lines = shown(View(Progress(plan, searching.events), searching.now), 80)
    assert words(lines[1])[-2:] == ["failed", "of"]
    assert words(lines[3]) == ["search", "3", "1", "1", "1", "1", "6"]


def test_an_arm_that_lost_every_cell_says_so(plan, told):
    told.cell("search", "gelu", None, outcome="infeasible")
    assert any("none: infeasible" in line for line in shown(View(Progress(plan, told.events), told.now), 80))


def test_a_low_terminal_shows_the_arms_that_fit_and_counts_the_others():
    many = study_of(TOLD, arms={f"arm{i}": {"gate": "tanh", "alpha": i / 10} for i in range(1, 10)})
    view = View(Progress(many), 0.0, lines=["Log:     here"], note="And then.", fit=True)
    for height in (18, 20, 24, 40):
        lines = shown(view, 80, height=height, force_terminal=True)
        assert len(lines) < height
        arms_shown = sum(line.startswith(("gelu", "floor", "arm")) for line in lines)
        assert arms_shown == 11 or f"and {11 - arms_shown} more arms" in lines
        assert lines[-1] == "And then."


def test_a_name_is_text_and_no_markup():
    plain = study_of(TOLD, question="[red]Is[/red] it [better?")
    assert shown(View(Progress(plain), 0.0), 80)[0] == "x: [red]Is[/red] it [better?"


def written(folder, told):
    """Write a study and its events into a folder, as a run does. Return its ledger, still open."""
    folder.mkdir()
    (folder / "study.yaml").write_text(dump(study_of(TOLD, folder.name)))
    ledger = Ledger(folder / "ledger.jsonl")
    for event in told.events:
        ledger.append(**{k: v for k, v in event.items() if k != "time"})
    return ledger


def test_status_tells_a_study_that_runs_from_one_that_was_left(tmp_path, plan, searching):
    ledger = written(tmp_path / "x", searching)
    folder = tmp_path / "x"
    assert is_held(folder / "ledger.jsonl")
    (folder / "ledger.lock").write_text("process 7 on there\n")
    beat = '{"time": %r, "driver": "process 7 on there", "slots": 3, "running": ["search/floor/2/1"]}'
    (folder / "heartbeat.json").write_text(beat % (ledger.events[-1]["time"] + 60))
    view = look(plan, folder, now=ledger.events[-1]["time"] + 63)
    assert view.note == "It runs: process 7 on there; last update 3 s ago."
    assert (view.progress.running, view.slots) == (1, 3)
    ledger.close()
    assert not is_held(folder / "ledger.jsonl")
    left = look(plan, folder, now=ledger.events[-1]["time"] + 60 + 7200)
    assert left.note.startswith("It is not running; last update 2.0 h ago. `pagating sweep`")
    assert left.progress.running == 0


@pytest.mark.parametrize(
    "beat",
    ["", "[]", "{}", '{"time": "x"}', '{"time": 1e999, "driver": 1, "slots": 1e999, "running": []}', "[" * 10**5],
)
def test_a_damaged_heartbeat_is_none(tmp_path, beat, plan, searching):
    ledger = written(tmp_path / "x", searching)
    (tmp_path / "x" / "heartbeat.json").write_text(beat)
    view = look(plan, tmp_path / "x", now=ledger.events[-1]["time"])
    assert view.note == f"It runs: process {os.getpid()} on {socket.gethostname()}; last update 0 s ago."
    ledger.close()


def test_the_heartbeat_of_a_killed_driver_is_not_that_of_the_next(tmp_path, plan, searching):
    ledger = written(tmp_path / "x", searching)
    beat = '{"time": 1.0, "driver": "process 7 on there", "slots": 3, "running": ["search/floor/2/1"]}'
    (tmp_path / "x" / "heartbeat.json").write_text(beat)
    view = look(plan, tmp_path / "x", now=ledger.events[-1]["time"] + 4)
    assert view.note == f"It runs: process {os.getpid()} on {socket.gethostname()}; last update 4 s ago."
    assert (view.progress.running, view.slots) == (0, 0)
    ledger.close()


def test_a_look_does_not_keep_a_sweep_out(tmp_path, searching):
    written(tmp_path / "x", searching).close()
    path = tmp_path / "x" / "ledger.jsonl"
    with open(path, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, [looking, fcntl.LOCK_UN]).start()
        mine = Ledger(path)
        assert mine.events, "the sweep has the ledger and read it"
        mine.close()


def test_status_in_a_pipe_breaks_no_path_in_two(tmp_path, monkeypatch, capsys, searching):
    folder = tmp_path / ("a-long-name-" * 5) / "x"
    folder.parent.mkdir()
    written(folder, searching).close()
    for columns, whole in ((None, True), ("60", False)):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
        studies.status(str(folder))
        out = capsys.readouterr().out
        assert (f"Log:     {folder / 'logs'}" in out.splitlines()) is whole
        assert "search" in out


def test_a_running_trial_of_ones_own_training_says_how_long_it_is_silent(tmp_path):
    """Start two trials, of which one has reported; the table names both while the driver's heartbeat is there."""
    study = own_study(tmp_path)
    folder = tmp_path / "studies/own"
    folder.mkdir(parents=True)
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("study", schema=1, study="own", corpus="abc", code={}, runs="train")
    keys = []
    for arm in ("plain", "shifted"):
        cell = Cell("search", arm, 0, 1, {"lr": 0.1}, "key")
        fields = {"stage": "search", "arm": arm, "index": 0, "seed": 1, "config": cell.config, "config_key": "key"}
        ledger.append("suggested", cell=cell.key, **fields)
        began = ledger.append("started", cell=cell.key)["time"]
        keys.append(cell.key)
    row = {"step": 10, "tokens": 10, "val_nll": 2.0, "tokens_per_second": 5.0, "alpha": []}
    heard = ledger.append("report", cell=keys[0], row=row)["time"]
    HeartbeatWriter(folder).write(2, keys)
    lines = look(study, folder, now=heard + 42).lines
    assert lines[0] == "Running: search/plain/0/1: 10 steps, silent for 42 s of at most 10.0 min"
    assert lines[1].startswith("Running: search/shifted/0/1: no report yet, silent for 42 s")
    assert heard - began < 1
    ledger.close()
    assert [line for line in look(study, folder).lines if "Running" in line] == []
