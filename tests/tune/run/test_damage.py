"""Disks that are full or gone, damaged ledgers, and what a study may be extended by: without Ray."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from analysis.io.write import write_whole
from tests.tune.helpers import run_of
from tune import sweep
from tune.cli import main
from tune.errors import LedgerError, StudyError
from tune.run import extend, ledger, repair, study_run, tables
from tune.run.ledger import Ledger
from tune.study.files import dump, parse
from tune.study.inputs import packed_corpus

STUDY = {
    "name": "s",
    "question": "What survives?",
    "tokenizer": {"vocab_size": 300},
    "model": {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 32},
    "fixed": {"tokens": 20_480, "batch_tokens": 512},
    "nuisance": {"lr": {"loguniform": [1.0e-3, 1.0e-2]}},
    "arms": {"gelu": {"baseline": True}, "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True}},
    "search": {"trials_per_arm": 2},
    "calibrate": {"points": 3, "seeds": 1, "max_points": 3},
    "confirm": {"seeds": 2},
}
ROW = {"tokens": 1, "train_nll": 3.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "alpha": []}


def study(**changes):
    content = {**STUDY, **{k: v for k, v in changes.items() if not isinstance(v, dict)}}
    content |= {k: {**STUDY.get(k, {}), **v} for k, v in changes.items() if isinstance(v, dict)}
    return parse(yaml.safe_dump(content), Path("s.yaml"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    text = cache / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth.\n" * 400)
    made = study(corpus={"files": {"train": str(text)}})
    return packed_corpus(made, cache, cache)


def train(run, cell):
    """What Ray would do with a cell, in no time: ten reports and an end that follow from the cell alone."""
    run.start(cell)
    loss = 3.0 + abs(cell.config["lr"] - 3e-3) + 0.1 * (cell.arm == "linear-floor") + cell.seed / 1000
    for step in range(4, 41, 4):
        run.report(cell, {**ROW, "step": step, "tokens": 512 * step, "val_nll": loss})
    run.end(cell, "completed", {"val_nll": loss, "test_nll": loss, "steps": 40, "tokens": 20_480})


def finish(folder, corpus, made=None, stop_after=None):
    """Train what is missing of the study in `folder`; the cells that were trained."""
    run = run_of(made or study(), folder, corpus)
    trained = []
    try:
        while (cell := run.next_cell()) is not None and len(trained) != stop_after:
            train(run, cell)
            trained.append(cell.key)
    finally:
        run.ledger.close()
    return trained


def finals(folder):
    found = ledger.records(ledger.read(folder / "ledger.jsonl"))
    return {key: (r.outcome, r.final, [row["step"] for row in r.curve]) for key, r in found.items()}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "study.yaml").write_text(dump(study()))
    assert len(finish(folder, corpus)) == 2 * (2 + 3 + 2)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system of limited size can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_any_damaged_line_is_named_and_repaired_to_the_same_study(whole, corpus, tmp_path):
    lines = (whole / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    kinds = {}
    for number, line in enumerate(lines[:-1], 1):
        kinds.setdefault(json.loads(line)["event"], number)
        kinds[json.loads(line)["event"] + ", later"] = number
    assert {"study", "suggested", "started", "report", "ended", "grid", "chosen"} <= kinds.keys()
    for number, kind in {number: kind for kind, number in kinds.items()}.items():
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "study.yaml").write_text(dump(study()))
        damaged = bytearray(lines[number - 1])
        damaged[len(damaged) // 2] ^= 1
        (folder / "ledger.jsonl").write_bytes(b"".join([*lines[: number - 1], damaged, *lines[number:]]))
        with pytest.raises(LedgerError, match=rf"line {number} is damaged .*`pagating repair {folder}` keeps"):
            finish(folder, corpus)
        said = repair.repair(study(), folder)
        assert f"1 damaged lines removed (line {number})" in said, kind
        assert (folder / "ledger.damaged-1.jsonl").read_bytes() == b"".join(
            [*lines[: number - 1], damaged, *lines[number:]]
        )
        again = finish(folder, corpus)
        assert len(again) == (0 if kind.split(",")[0] in ("study", "grid", "chosen") else 1), kind
        assert finals(folder) == finals(whole), kind


def test_a_lost_start_of_a_second_attempt_does_not_mix_two_curves(whole, corpus, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    folder = tmp_path / "s"
    (folder / "ledger.jsonl").unlink()
    run = run_of(study(), folder, corpus)
    cell = run.next_cell()
    run.start(cell)
    run.report(cell, {**ROW, "step": 4, "val_nll": 9.0})
    run.ledger.close()  # killed
    finish(folder, corpus)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    starts = [n for n, line in enumerate(lines) if json.loads(line)["event"] == "started"]
    assert json.loads(lines[starts[1]])["cell"] == cell.key
    lines[starts[1]] = lines[starts[1]].replace(b"started", b"Started")
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))
    assert "1 cells will be trained again" in repair.repair(study(), folder)
    assert finish(folder, corpus) == [cell.key]
    assert finals(folder) == finals(whole)


def test_a_whole_ledger_is_left_as_it_is(whole, tmp_path):
    before = (whole / "ledger.jsonl").read_bytes()
    assert repair.repair(study(), whole).endswith("no line is damaged; nothing was changed")
    assert (whole / "ledger.jsonl").read_bytes() == before


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_ledger_after_a_whole_line_and_the_study_goes_on_when_there_is_room(
    whole, corpus, small_disk
):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100 * 1024))
    with pytest.raises(LedgerError, match=r"ledger.jsonl: cannot be written \(No space left on device\)"):
        finish(small_disk, corpus)
    kept = ledger.read(small_disk / "ledger.jsonl")
    assert (small_disk / "ledger.jsonl").read_bytes().endswith(b"}\n")
    assert len(kept) > 10
    for write in (
        lambda: write_whole(small_disk / "study.yaml", "x" * 50_000),
        lambda: tables.write_tables("s", kept * 20, small_disk),
    ):
        with pytest.raises(OSError, match="No space left on device") as caught:
            write()
        assert caught.value.errno == errno.ENOSPC
    assert {path.name for path in small_disk.iterdir()} == {"ballast", "ledger.jsonl", "ledger.lock"}
    ballast.unlink()
    finish(small_disk, corpus)
    assert finals(small_disk) == finals(whole)


def test_what_stood_in_a_file_stands_when_there_is_no_room_for_the_new(small_disk):
    write_whole(small_disk / "a", "old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(small_disk / "a", "n" * 200_000)
    assert [path.read_text() for path in small_disk.iterdir()] == ["old"]


def test_a_study_that_the_disk_has_no_room_for_is_not_begun(small_disk, corpus):
    made = study(corpus={"files": {"train": str(corpus.parents[1] / "text.txt")}})
    os.environ["PAGATING_CACHE"] = str(corpus.parent)
    try:
        with pytest.raises(StudyError, match=r"may need .*, but .* are free there; free some space or give another"):
            sweep.sweep(made, small_disk, small_disk / "studies")
    finally:
        del os.environ["PAGATING_CACHE"]
    assert list(small_disk.iterdir()) == []


def test_a_read_only_folder_is_refused_before_anything_is_done(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StudyError, match=rf"{small_disk}: cannot be written .*give another --output"):
        sweep.sweep(study(), small_disk, small_disk / "studies")


def test_a_study_warns_once_when_room_gets_short(corpus, small_disk):
    said = []
    run = run_of(study(), small_disk, corpus, warn=said.append, check_space=sweep._space(study(), small_disk, 1, 300))
    for _ in range(2):
        train(run, run.next_cell())
    run.ledger.close()
    assert len(said) == 1
    assert "the study may need" in said[0]


def test_room_that_gets_short_while_a_trial_runs_is_told_before_it_ends(corpus, tmp_path, monkeypatch):
    said, free = [], [1 << 40]
    monkeypatch.setattr("tune.plan.space.shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    run = run_of(study(), tmp_path, corpus, warn=said.append, check_space=sweep._space(study(), tmp_path, 1, 300))
    cell = run.next_cell()
    run.start(cell)
    run.alive(cell, 0.1)
    free[0] = 1000
    run.alive(cell, 0.2)
    assert said == []  # it has just been looked at
    monkeypatch.setattr(study_run, "SPACE_SECONDS", 0.0)
    for fraction in (0.3, 0.4):
        run.alive(cell, fraction)
    run.ledger.close()
    (line,) = said
    assert re.fullmatch(rf"{tmp_path}: the study may need .*, but 1000 B are free there; free some space or .*", line)


@pytest.mark.slow
def test_a_full_disk_while_the_report_is_written_is_one_line_and_the_same_command_writes_it_later(
    whole, tmp_path, monkeypatch, capsys
):
    shutil.copytree(whole, tmp_path / "s")
    write, full = Path.write_bytes, [True]

    def on_a_disk(self, content):
        if full[0] and "report.html" in self.name:
            write(self, content[:99])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, content)

    def command():
        monkeypatch.setattr(sys, "argv", ["pagating", "report", "s", "--output", str(tmp_path)])
        with pytest.raises(SystemExit) as end:
            main.main()
        return end.value.code, *capsys.readouterr()

    monkeypatch.setattr(Path, "write_bytes", on_a_disk)
    code, _, said = command()
    assert code == 1
    assert re.fullmatch(r"pagating: .*report\.html.*: No space left on device\n", said)
    assert not list((tmp_path / "s").glob("report.html*"))
    full[0] = False
    code, shown, said = command()
    assert (code, said) == (0, "")
    assert str(tmp_path / "s" / "report.html") in shown
    assert (tmp_path / "s" / "report.html").read_text().rstrip().endswith("</html>")


def removed(folder):
    shutil.rmtree(folder)


def moved(folder):
    folder.rename(folder.with_name("away"))


def replaced(folder):
    moved(folder)
    shutil.copytree(folder.with_name("away"), folder)


@pytest.mark.parametrize("vanish", [removed, moved, replaced])
def test_a_folder_that_vanishes_stops_the_study(corpus, tmp_path, vanish):
    folder = tmp_path / "study"
    folder.mkdir()
    run = run_of(study(), folder, corpus)
    cell = run.next_cell()
    vanish(folder)
    with pytest.raises(LedgerError, match="was removed or moved while the study ran"):
        run.start(cell)
    run.ledger.close()


def test_a_clock_that_steps_back_changes_no_order(whole, corpus, tmp_path, monkeypatch):
    import time

    clock = iter(range(10_000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    finish(tmp_path, corpus)
    assert finals(tmp_path) == finals(whole)
    trials, _ = tables.tables("s", ledger.read(tmp_path / "ledger.jsonl"))
    expected, _ = tables.tables("s", ledger.read(whole / "ledger.jsonl"))
    pd.testing.assert_frame_equal(trials, expected)


def test_a_start_that_was_killed_before_the_first_cell_is_begun_again(corpus, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    write_whole(folder / "study.yaml", dump(study()))
    Ledger(folder / "ledger.jsonl").close()
    extend.check_folder(study(), folder)
    assert len(finish(folder, corpus)) == 14


# --- extension -------------------------------------------------------------------------------------------------------


def test_more_confirm_seeds_extend_a_finished_study(whole, corpus, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(whole, folder)
    more = study(confirm={"seeds": 4})
    extend.check_folder(more, folder)
    trained = finish(folder, corpus, more)
    assert sorted(trained) == sorted(key for key in finals(folder) if key.endswith(("/103", "/104")))
    assert len(trained) == 4


def test_an_e_process_may_get_a_higher_cap(tmp_path):
    rule = {"seeds": 10, "rule": "e-process", "max_seeds": 5}
    (tmp_path / "study.yaml").write_text(dump(study(confirm=rule)))
    extend.check_folder(study(confirm={**rule, "max_seeds": 8}), tmp_path)
    with pytest.raises(StudyError, match=r"confirm.max_seeds was 5 and is now 4; seeds can be added"):
        extend.check_folder(study(confirm={**rule, "max_seeds": 4}), tmp_path)


def test_the_cap_of_obrien_fleming_stays(tmp_path):
    rule = {"seeds": 10, "rule": "obrien-fleming", "max_seeds": 5}
    (tmp_path / "study.yaml").write_text(dump(study(confirm=rule)))
    with pytest.raises(StudyError, match=r"max_seeds was 5 and is now 10; the bounds of obrien-fleming hold only for"):
        extend.check_folder(study(confirm={**rule, "max_seeds": 10}), tmp_path)


def test_search_trials_can_be_added_until_the_grid_is_chosen(whole, corpus, tmp_path):
    (tmp_path / "study.yaml").write_text(dump(study()))
    finish(tmp_path, corpus, stop_after=3)
    more = study(search={"trials_per_arm": 4})
    extend.check_folder(more, tmp_path)
    finish(tmp_path, corpus, more)
    assert sum(key.startswith("search/") for key in finals(tmp_path)) == 8
    with pytest.raises(StudyError, match=r"trials_per_arm was 2 and is now 4; the learning rates were already chosen"):
        extend.check_folder(more, whole)
    with pytest.raises(StudyError, match=r"trials_per_arm was 2 and is now 1; trials can be added, not removed"):
        extend.check_folder(study(search={"trials_per_arm": 1}), whole)


def test_anything_else_changed_is_refused_with_the_list(whole):
    changed = study(confirm={"level": 0.01}, question="Another?")
    with pytest.raises(
        StudyError, match=r"changed: confirm.level \(0.05 -> 0.01\), question \(What survives\? -> Another"
    ):
        extend.check_folder(changed, whole)
    extend.check_folder(study(resources={"stall_timeout": 60.0}), whole)  # no result depends on it
