"""`pagating ls`, `pagating rm` and the verdict in `pagating status`, on studies of known losses."""

import json
import os
import re
import shutil
import time

import pytest

from analysis.report import build, plots
from analysis.verdict.kinds import Verdict
from tests.studies import study_of, yaml_of
from tests.tune.cli.test_exit_codes import STUDY, loss_of
from tests.tune.helpers import played, typed
from tune.run import ledger
from tune.run.standing import State, standing
from tune.run.tables import write_tables
from tune.study.files import dump


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a finished study, an unfinished one, a published one, damaged ones and foreign ones."""
    place = tmp_path_factory.mktemp("made") / "studies"
    for name, kind in (("done", Verdict.BETTER), ("open", Verdict.UNDECIDED)):
        folder, study = place / name, study_of(STUDY, name=name)
        folder.mkdir(parents=True)
        (folder / "study.yaml").write_text(dump(study))
        played(study, loss_of(kind), folder)
        write_tables(name, ledger.read(folder / "ledger.jsonl"), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "render", lambda *args, **kwargs: b"<svg></svg>")
        for name in ("done", "open"):
            build.build(place / name)
    for name in ("half", "torn", "lost", "odd", "published", "new"):
        shutil.copytree(place / "done", place / name)
    lines = (place / "done" / "ledger.jsonl").read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["event"] == "suggested")
    (place / "half" / "ledger.jsonl").write_text("".join(lines[:last]))
    os.utime(place / "half" / "verdict.json", (1, 1))
    (place / "torn" / "ledger.jsonl").write_text("".join([*lines[:3], "torn\n", *lines[3:]]))
    (place / "lost" / "study.yaml").unlink()
    (place / "odd" / "study.yaml").write_text("question: [")
    for name in ("ledger.jsonl", "ledger.lock"):
        (place / "published" / name).unlink(missing_ok=True)
    for file in (place / "new").iterdir():
        if file.name != "study.yaml":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    (place / "photos").mkdir()
    (place / ".cache").mkdir()
    (place / "notes.txt").touch()
    return place


def test_ls_says_how_each_folder_stands(made, monkeypatch, capsys):
    code, out, err = typed(monkeypatch, capsys, "ls", "--output", made)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: re.split(r"\s{2,}", line.rstrip()) for line in out.splitlines()[2:]}
    today = time.strftime("%Y-%m-%d")
    assert list(rows) == ["done", "half", "lost", "new", "odd", "open", "photos", "published", "torn"]
    assert rows["done"][:4] == ["done", "finished", "33 of 33", "1 better (preliminary)"]
    assert rows["done"][4].startswith(today)
    assert rows["open"][:4] == ["open", "finished", "33 of 33", "1 undecided (preliminary)"]
    assert rows["half"][1:3] == ["not finished", "32 of 33"]
    assert rows["half"][3].startswith(today)  # an older verdict is not shown
    assert rows["published"][1:3] == ["tables only", "1 better (preliminary)"]
    assert rows["new"][1] == "not begun"
    assert rows["lost"][1:3] == ["damaged", "study.yaml is missing"]
    assert rows["odd"][1:3] == [
        "damaged",
        "study.yaml: line 1 is not YAML: expected the node content, but found '<stream end>'",
    ]
    assert rows["torn"][1] == "damaged"
    assert rows["torn"][2].startswith("ledger.jsonl: line 4 is damaged")
    assert rows["photos"][1:3] == ["no study", "no study.yaml and no ledger"]


def test_ls_prints_json_of_the_same_and_takes_a_folder(made, monkeypatch, capsys):
    found = {row["name"]: row for row in json.loads(typed(monkeypatch, capsys, "ls", made, "--json")[1])}
    row = found["done"]
    assert row["verdict"] == {"mine": "better"}
    assert (row["state"], row["ended"], row["least"], row["most"]) == ("finished", 33, 33, 33)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["changed"])
    assert found["half"]["verdict"] == {}
    assert "line 4 is damaged" in found["torn"]["problem"]
    (only,) = json.loads(typed(monkeypatch, capsys, "ls", made / "done", "--json")[1])
    assert only == row


def test_ls_without_studies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = "No studies in studies. `pagating sweep STUDY.yaml` begins one.\n"
    assert typed(monkeypatch, capsys, "ls") == (0, "", said)
    assert typed(monkeypatch, capsys, "ls", "--json") == (0, "[]\n", "")
    assert typed(monkeypatch, capsys, "ls", "none") == (2, "", "pagating: none: no such folder\n")
    assert typed(monkeypatch, capsys, "ls", "--output", "none") == (2, "", "pagating: none: no such folder\n")


def test_a_study_that_runs_is_listed_as_running(made, tmp_path):
    shutil.copytree(made / "half", tmp_path / "half")
    held = ledger.Ledger(tmp_path / "half" / "ledger.jsonl")
    assert standing(tmp_path / "half").state is State.RUNNING
    held.close()
    assert standing(tmp_path / "half").state is State.STOPPED


def test_status_has_the_verdict_of_a_finished_study_only(made, monkeypatch, capsys):
    code, out, _ = typed(monkeypatch, capsys, "status", "done", "--output", made)
    assert code == 0
    assert f"Verdict: {standing(made / 'done').summary}" in " ".join(out.split())
    assert "mine: better, beyond the margin of 0.5% (+" in " ".join(out.split())
    assert "Verdict" not in typed(monkeypatch, capsys, "status", "half", "--output", made)[1]
    assert typed(monkeypatch, capsys, "status", made / "new")[:2] == (0, "new: not begun.\n")
    code, out, _ = typed(monkeypatch, capsys, "status", made / "published")
    assert (code, "tables only. Preliminary, with " in out) == (0, True)


def test_a_published_study_is_reported_from_its_tables(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made / "published", tmp_path / "published")
    (tmp_path / "published" / "report.html").unlink()
    monkeypatch.setattr(plots, "render", lambda *args, **kwargs: b"<svg></svg>")
    code, out, err = typed(monkeypatch, capsys, "report", tmp_path / "published")
    assert (code, err) == (0, "")
    assert "mine: better, beyond the margin of 0.5% (+" in " ".join(out.split())
    assert (tmp_path / "published" / "report.html").exists()


def test_a_report_of_several_studies(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "render", lambda *given, **options: b"<svg></svg>")  # only the text is tested
    for name in ("one", "two"):
        shutil.copytree(made / "published", tmp_path / name)
    code, out, _ = typed(monkeypatch, capsys, "report", "one", "two", "one", "--output", tmp_path)
    assert (code, out.splitlines()[-1]) == (0, f"All studies: {tmp_path / 'report.html'}")
    assert (tmp_path / "report.html").read_text().count("The whole report") == 2
    code, _, err = typed(monkeypatch, capsys, "report", "one", "--into", "x.html", "--output", tmp_path)
    assert (code, err) == (2, "pagating: --into x.html: is the page of several studies; name more than one\n")
    code, _, err = typed(monkeypatch, capsys, "report", "one", "two", "--into", "no/x.html", "--output", tmp_path)
    assert (code, "no: no such folder" in err) == (2, True)


# --- rm --------------------------------------------------------------------------------------------------------------


def test_rm_removes_what_it_names_and_says_what_that_frees(made, tmp_path, monkeypatch, capsys):
    place = tmp_path / "studies"
    shutil.copytree(made, place)
    size = sum(path.stat().st_size for path in (place / "done").rglob("*") if path.is_file())
    assert typed(monkeypatch, capsys, "rm", "done", "--output", place) == (
        2,
        f"{place}/done: 33 cells, {size / 1024:.1f} KiB\n",
        "pagating: without a terminal nobody can be asked: give --yes\n",
    )
    assert (place / "done" / "ledger.jsonl").exists()
    code, out, err = typed(monkeypatch, capsys, "rm", "done", "torn", place / "lost", "--output", place, "--yes")
    assert (code, err) == (0, "")
    assert f"Removed {place}/done: {size / 1024:.1f} KiB are free.\n" in out
    left = {path.name for path in place.iterdir()}
    assert left == {"half", "new", "odd", "open", "photos", "published", "notes.txt", ".cache"}


@pytest.mark.parametrize(("answer", "left"), [("y\n", False), ("n\n", True), ("\n", True)])
def test_rm_asks(made, tmp_path, monkeypatch, capsys, answer, left):
    shutil.copytree(made / "done", tmp_path / "done")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: answer.startswith("y"))
    code, out, _ = typed(monkeypatch, capsys, "rm", tmp_path / "done")
    assert code == 0
    assert (tmp_path / "done").exists() == left
    assert ("Nothing was removed." in out) == left


def test_rm_refuses_a_running_study_a_link_and_what_is_no_study(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made / "done", tmp_path / "done")
    shutil.copytree(made / "open", tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path / "done")
    (tmp_path / "photos").mkdir()
    held = ledger.Ledger(tmp_path / "done" / "ledger.jsonl")
    code, out, err = typed(monkeypatch, capsys, "rm", "open", "done", "--output", tmp_path, "--yes")
    assert (code, out) == (2, "")
    me = f"process {os.getpid()} on {os.uname().nodename}"
    assert err == f"pagating: {tmp_path}/done: another sweep is running this study: {me}\n"
    held.close()
    assert (tmp_path / "open").exists()  # nothing is removed before all are free
    assert "is a link to" in typed(monkeypatch, capsys, "rm", "link", "--output", tmp_path, "--yes")[2]
    code, _, err = typed(monkeypatch, capsys, "rm", "photos", "--output", tmp_path, "--yes")
    assert (code, err.startswith("pagating: photos: no study of that name")) == (2, True)
    assert "did you mean 'open'?" in typed(monkeypatch, capsys, "rm", "opne", "--output", tmp_path, "--yes")[2]
    assert {"done", "open", "photos"} <= {path.name for path in tmp_path.iterdir()}


def test_rm_says_that_the_runs_in_mlflow_stay_and_removes_checkpoints_elsewhere(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made / "done", tmp_path / "done")
    stored = tmp_path / "storage" / "done" / "checkpoints"
    stored.mkdir(parents=True)
    (stored / "x").write_bytes(b"1" * 10_000)
    study = study_of(STUDY, name="done", storage=str(tmp_path / "storage"))
    (tmp_path / "done" / "study.yaml").write_text(dump(study))
    (tmp_path / "done" / "logs").mkdir(exist_ok=True)
    (tmp_path / "done" / "logs" / "tracked.json").write_text("{}")
    code, out, _ = typed(monkeypatch, capsys, "rm", tmp_path / "done", "--yes")
    assert code == 0
    assert "Its runs in MLflow stay: to remove them, delete the experiment done in `pagating ui`" in out
    assert list((tmp_path / "storage").iterdir()) == []


def test_rm_keeps_what_no_study_wrote(made, tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"  # of a user, with a study file of this name
    project.mkdir()
    (project / "study.yaml").write_text(yaml_of(STUDY))
    said = (2, "", f"pagating: {project}: contains a study file but no study; nothing is removed\n")
    assert typed(monkeypatch, capsys, "rm", project, "--yes") == said
    (project / "models").mkdir()
    assert typed(monkeypatch, capsys, "rm", project, "--yes") == said
    monkeypatch.chdir(project)
    (project / "data").mkdir()
    (project / "thesis.tex").touch()
    code, _, err = typed(monkeypatch, capsys, "rm", ".", "--yes")
    assert (code, err) == (2, "pagating: data and 1 more: not written by a study; move it away first\n")
    shutil.copytree(made / "done", tmp_path / "done")
    (tmp_path / "done" / "notes.md").touch()
    code, _, err = typed(monkeypatch, capsys, "rm", "done", "--output", tmp_path, "--yes")
    assert (code, err) == (2, f"pagating: {tmp_path}/done/notes.md: not written by a study; move it away first\n")
    for scratch in (
        ".study.yaml.123",
        ".trials.parquet.7",
        "ledger.damaged",
        "heartbeat.json",
        ".DS_Store",
        "samples.parquet",
    ):
        (tmp_path / "done" / scratch).touch()
    (tmp_path / "done" / "notes.md").unlink()
    assert typed(monkeypatch, capsys, "rm", "done", tmp_path / "done", "--output", tmp_path, "--yes")[0] == 0
    assert not (tmp_path / "done").exists()


def test_rm_of_a_copy_keeps_the_checkpoints_of_the_study(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made / "done", tmp_path / "copy")
    stored = tmp_path / "storage" / "done" / "models"
    stored.mkdir(parents=True)
    (tmp_path / "copy" / "study.yaml").write_text(dump(study_of(STUDY, name="done", storage=str(stored.parents[1]))))
    assert typed(monkeypatch, capsys, "rm", tmp_path / "copy", "--yes")[0] == 0
    assert stored.exists()


# --- parts of a study that are missing -------------------------------------------------------------------------------


def test_commands_name_the_part_of_a_study_that_is_missing(made, tmp_path, monkeypatch, capsys):
    for name in ("published", "lost", "new"):
        shutil.copytree(made / name, tmp_path / name)
    for command in ("sync", "repair", "trial"):
        code, out, err = typed(monkeypatch, capsys, command, "published", "--output", tmp_path)
        folder = f"pagating: {tmp_path}/published"
        assert (code, out) == (2, "")
        assert err == f"{folder}: has no ledger.jsonl: the study was not begun, or has its tables only\n"
    assert not (tmp_path / "published" / "ledger.jsonl").exists()
    for command in ("status", "report", "repair"):
        code, out, err = typed(monkeypatch, capsys, command, "lost", "--output", tmp_path)
        assert (code, out) == (2, "")
        assert err.startswith(f"pagating: {tmp_path}/lost: study.yaml is missing; put back a copy")
    said = (1, "", f"unfinished: no trial of {tmp_path}/new has ended yet\n")
    assert typed(monkeypatch, capsys, "report", tmp_path / "new") == said
    (tmp_path / "new" / "ledger.jsonl").touch()
    assert typed(monkeypatch, capsys, "report", tmp_path / "new") == said
    assert not (tmp_path / "new" / "trials.parquet").exists()


def test_sweep_begins_no_study_over_the_tables_or_the_ledger_of_another(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    options = ("--inline", "--tracking", "none", "--output")
    for name, said in (("published", "has tables but no ledger.jsonl"), ("lost", "has a ledger but no study.yaml")):
        shutil.copytree(made / name, tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml_of(STUDY))
        code, _, err = typed(monkeypatch, capsys, "sweep", tmp_path / f"{name}.yaml", *options, tmp_path)
        assert (code, said in err) == (2, True), err
    code, _, err = typed(monkeypatch, capsys, "sweep", tmp_path / "lost.yaml", *options, tmp_path / "file")
    assert (code, err) == (2, f"pagating: {tmp_path}/file: is a file; give a folder as --output\n")
