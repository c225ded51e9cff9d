"""Test full or removed disks, damaged ledgers, and allowed extensions of a study, without Ray."""

import errno
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis.io.write import write_whole
from tests.studies import STEADY, study_of
from tests.tune.helpers import Caught, typed
from tune import sweep
from tune.backend.inline import Inline
from tune.errors import LedgerError, StudyError, StudyStopped
from tune.run import extend, ledger, repair, study_run, tables
from tune.run.ledger import Ledger
from tune.run.study_run import StudyRun
from tune.study.files import dump
from tune.subject.known import Known

ROW = {"tokens": 1, "train_nll": 3.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "alpha": []}


def study(**changes):
    return study_of(STEADY, "s", keep={"models": "none"}, **changes)


def loss(cell, share):
    return 3.0 + abs(cell.config["lr"] - 3e-3) + 0.1 * (cell.arm == "linear-floor") + cell.seed / 1000


def begun(folder, made=None, **options):
    """Return a run of known losses of the study in `folder`."""
    made = made or study()
    return StudyRun(made, folder, Known(made, loss), **options)


def finish(folder, made=None, stop_after=math.inf):
    """Train the missing cells of the study in `folder`, or so many of them. Return the keys of the trained cells."""
    trained, interruption = [], Caught(stop_after)

    def ended(progress):
        trained.append(progress.cell.key)
        interruption.ended(progress)

    run = begun(folder, made, listen=ended, interruption=interruption)
    try:
        Inline().train(run)
    finally:
        run.close()
    return trained


def finals(folder):
    found = ledger.records(ledger.read(folder / "ledger.jsonl"))
    return {key: (r.outcome, r.final, [row["step"] for row in r.curve]) for key, r in found.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "study.yaml").write_text(dump(study()))
    assert len(finish(folder)) == 2 * (2 + 3 + 2)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system of limited size can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_any_damaged_line_is_named_and_repaired_to_the_same_study(whole, tmp_path):
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
            finish(folder)
        said = repair.repair(study(), folder)
        assert f"1 damaged line removed (line {number})" in said, kind
        assert (folder / "ledger.damaged-1.jsonl").read_bytes() == b"".join(
            [*lines[: number - 1], damaged, *lines[number:]]
        )
        again = finish(folder)
        assert len(again) == (0 if kind.split(",")[0] in ("study", "grid", "chosen", "look") else 1), kind
        assert finals(folder) == finals(whole), kind


def test_a_lost_start_of_a_second_attempt_does_not_mix_two_curves(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    folder = tmp_path / "s"
    (folder / "ledger.jsonl").unlink()
    run = begun(folder)
    cell = run.next_cell()
    run.start(cell)
    run.report(cell, {**ROW, "step": 4, "val_nll": 9.0})
    run.ledger.close()  # killed
    finish(folder)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    starts = [n for n, line in enumerate(lines) if json.loads(line)["event"] == "started"]
    assert json.loads(lines[starts[1]])["cell"] == cell.key
    lines[starts[1]] = lines[starts[1]].replace(b"started", b"Started")
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))
    assert "1 cells will be trained again" in repair.repair(study(), folder)
    assert finish(folder) == [cell.key]
    assert finals(folder) == finals(whole)


def test_a_whole_ledger_is_left_as_it_is(whole, tmp_path):
    before = (whole / "ledger.jsonl").read_bytes()
    assert repair.repair(study(), whole).endswith("no line is damaged; nothing was changed")
    assert (whole / "ledger.jsonl").read_bytes() == before


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_ledger_after_a_whole_line_and_the_study_goes_on_when_there_is_room(whole, small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100 * 1024))
    with pytest.raises(StudyStopped, match=r"ledger.jsonl: cannot be written \(No space left on device\)"):
        finish(small_disk)
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
    finish(small_disk)
    assert finals(small_disk) == finals(whole)


def test_what_stood_in_a_file_stands_when_there_is_no_room_for_the_new(small_disk):
    write_whole(small_disk / "a", "old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(small_disk / "a", "n" * 200_000)
    assert [path.read_text() for path in small_disk.iterdir()] == ["old"]


def test_a_study_that_the_disk_has_no_room_for_is_not_begun(small_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth.\n" * 400)
    made = study(corpus={"files": {"train": str(text)}})
    with pytest.raises(StudyError, match=r"may need .*, but .* are free there; free some space or give another"):
        sweep.sweep(made, small_disk, small_disk / "studies")
    assert list(small_disk.iterdir()) == []


def test_a_read_only_folder_is_refused_before_anything_is_done(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StudyError, match=rf"{small_disk}: cannot be written .*give another --output"):
        sweep.sweep(study(), small_disk, small_disk / "studies")


def test_a_study_warns_once_when_room_gets_short(small_disk):
    said = []
    run = begun(small_disk, warn=said.append, check_space=sweep._space(study(), small_disk, 1, 300))
    Inline().train(run)
    run.close()
    assert len(said) == 1
    assert "the study may need" in said[0]


def test_room_that_gets_short_while_a_trial_runs_is_told_before_it_ends(tmp_path, monkeypatch):
    said, free = [], [1 << 40]
    monkeypatch.setattr("tune.plan.space.shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    run = begun(tmp_path, warn=said.append, check_space=sweep._space(study(), tmp_path, 1, 300))
    cell = run.next_cell()
    run.start(cell)
    run.cell_heartbeat(cell, 0.1)
    free[0] = 1000
    run.cell_heartbeat(cell, 0.2)
    assert said == []  # it was checked just before
    monkeypatch.setattr(study_run, "SPACE_SECONDS", 0.0)
    for fraction in (0.3, 0.4):
        run.cell_heartbeat(cell, fraction)
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

    monkeypatch.setattr(Path, "write_bytes", on_a_disk)
    code, _, said = typed(monkeypatch, capsys, "report", "s", "--output", tmp_path)
    assert code == 1
    assert re.fullmatch(r"pagating: .*report\.html.*: No space left on device\n", said)
    assert not list((tmp_path / "s").glob("report.html*"))
    full[0] = False
    code, shown, said = typed(monkeypatch, capsys, "report", "s", "--output", tmp_path)
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
def test_a_folder_that_vanishes_stops_the_study(tmp_path, vanish):
    folder = tmp_path / "study"
    folder.mkdir()
    run = begun(folder)
    cell = run.next_cell()
    vanish(folder)
    with pytest.raises(LedgerError, match="was removed or moved while the study ran"):
        run.start(cell)
    run.ledger.close()


def test_a_clock_that_steps_back_changes_no_order(whole, tmp_path, monkeypatch):
    import time

    clock = itertools.count(100_000, -1)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    finish(tmp_path)
    assert finals(tmp_path) == finals(whole)
    trials, _ = tables.tables("s", ledger.read(tmp_path / "ledger.jsonl"))
    expected, _ = tables.tables("s", ledger.read(whole / "ledger.jsonl"))
    pd.testing.assert_frame_equal(trials, expected)


def test_a_start_that_was_killed_before_the_first_cell_is_begun_again(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    write_whole(folder / "study.yaml", dump(study()))
    Ledger(folder / "ledger.jsonl").close()
    extend.check_folder(study(), folder)
    assert len(finish(folder)) == 14


# --- extension -------------------------------------------------------------------------------------------------------


def test_more_confirm_seeds_extend_a_finished_study(whole, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(whole, folder)
    more = study(confirm={"seeds": 4})
    extend.check_folder(more, folder)
    trained = finish(folder, more)
    assert sorted(trained) == sorted(key for key in finals(folder) if key.endswith(("/103", "/104")))
    assert len(trained) == 4


def test_an_e_process_may_get_a_higher_cap(tmp_path):
    rule = {"seeds": 10, "rule": "e-process", "max_seeds": 5}
    (tmp_path / "study.yaml").write_text(dump(study(confirm=rule)))
    extend.check_folder(study(confirm={**rule, "max_seeds": 8}), tmp_path)
    with pytest.raises(StudyError, match=r"confirm.max_seeds was 5 and is now 4; it can only grow"):
        extend.check_folder(study(confirm={**rule, "max_seeds": 4}), tmp_path)


def test_the_cap_of_obrien_fleming_stays(tmp_path):
    rule = {"seeds": 10, "rule": "obrien-fleming", "max_seeds": 5}
    (tmp_path / "study.yaml").write_text(dump(study(confirm=rule)))
    with pytest.raises(StudyError, match=r"max_seeds was 5 and is now 10; the bounds of obrien-fleming hold only for"):
        extend.check_folder(study(confirm={**rule, "max_seeds": 10}), tmp_path)


def test_search_trials_can_be_added_until_the_grid_is_chosen(whole, tmp_path):
    (tmp_path / "study.yaml").write_text(dump(study()))
    finish(tmp_path, stop_after=3)
    more = study(search={"trials_per_arm": 4})
    extend.check_folder(more, tmp_path)
    finish(tmp_path, more)
    assert sum(key.startswith("search/") for key in finals(tmp_path)) == 8
    with pytest.raises(StudyError, match=r"trials_per_arm was 2 and is now 4; the learning rates were already chosen"):
        extend.check_folder(more, whole)
    with pytest.raises(StudyError, match=r"trials_per_arm was 2 and is now 1; it can only grow"):
        extend.check_folder(study(search={"trials_per_arm": 1}), whole)


def test_what_no_result_depends_on_may_change(whole):
    extend.check_folder(study(resources={"stall_timeout": 60.0}, question="Another?"), whole)
