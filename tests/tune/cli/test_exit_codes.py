"""Tests of the exit code of each command that shows a verdict, for each verdict, on studies of known losses."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.io import command
from analysis.report import build
from analysis.verdict import decide
from analysis.verdict.kinds import Verdict
from tests.studies import TINY, changed, yaml_of
from tests.tune.helpers import played, typed
from tune.cli import main
from tune.run import ledger
from tune.run.tables import write_tables
from tune.study.files import dump, parse

STUDY = changed(
    TINY,
    fixed={"tokens": 640},
    keep={"models": "none"},
    arms={"mine": {"gate": "tanh", "alpha": 0.5}},
    search={"pruner": "none"},
    confirm={"seeds": 6},
)
GAINS = {  # of `mine` over the baseline in nats, and how much it differs between seeds
    Verdict.BETTER: (0.1, 0.01),
    Verdict.WORSE: (-0.1, 0.01),
    Verdict.NO_DIFFERENCE: (0.0, 0.001),
    Verdict.UNDECIDED: (0.03, 0.06),
    Verdict.IDENTICAL: (0.0, 0.0),
    Verdict.NOT_TESTABLE: (0.1, 0.01),  # the floor does not lose
}
SEARCHED, UNFINISHED = "searched", "unfinished"
CASES = [*GAINS, SEARCHED, UNFINISHED]
COMMANDS = ("sweep", "report", "significance", "analysis.report")


def loss_of(kind):
    """Return the losses of a case: bowls over the learning rate, and known differences on the confirm seeds."""
    gain, noise = GAINS.get(kind, (0.1, 0.01))

    def loss(cell, share):
        if cell.stage != "confirm":
            return 3.0 + abs(np.log(cell.config["lr"] / 3e-3)) / 10 - share / 100
        base = 3.0 + 0.01 * np.sin(cell.seed)
        if cell.arm == "linear-floor":
            return base + (0.0 if kind is Verdict.NOT_TESTABLE else 0.5) + 0.01 * np.cos(3 * cell.seed)
        return base - (cell.arm == "mine") * (gain + noise * np.cos(5 * cell.seed))

    return loss


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Return a folder of studies: one per verdict, one that only searches and one that is unfinished."""
    place = tmp_path_factory.mktemp("studies")
    for case in CASES:
        text = yaml_of(STUDY, stages=["search"] if case == SEARCHED else None)
        (place / f"{case}.yaml").write_text(text)
        study, folder = parse(text, place / f"{case}.yaml"), place / case
        folder.mkdir()
        (folder / "study.yaml").write_text(dump(study))
        played(study, loss_of(case), folder)
        lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
        # without the event that names the corpus, `sweep` takes the study up on the built-in one
        lines = [line for line in lines if json.loads(line)["event"] != "study"]
        (folder / "ledger.jsonl").write_text("".join(lines))
        if case == UNFINISHED:
            last = max(i for i, line in enumerate(lines) if json.loads(line)["event"] == "suggested")
            (folder / "ledger.jsonl").write_text("".join(lines[:last]))
        write_tables(study.name, ledger.read(folder / "ledger.jsonl"), folder)
    return place


def words(name: str, place: Path, case: str, *more: str) -> list[str]:
    """Return the arguments of a command."""
    of_pagating = ["--output", str(place)]
    return {
        "sweep": ["sweep", str(place / f"{case}.yaml"), *of_pagating, "--tracking", "none", "--slots", "1"],
        "report": ["report", case, *of_pagating],
        "significance": [str(place / case)],
        "analysis.report": [str(place / case)],
    }[name] + list(more)


def called(name, place, case, *more, monkeypatch) -> int:
    """Call the entry point of a command in this process, without figures. Return its exit code."""
    monkeypatch.setattr(build, "drawn", lambda found: {})
    typed = words(name, place, case, *more)
    monkeypatch.setattr(sys, "argv", ["pagating", *typed])
    script = {"significance": decide, "analysis.report": build}.get(name)
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: script.main(typed)) if script else main.main()
    return int(ended.value.code)


@pytest.mark.parametrize("kind", GAINS)
def test_the_studies_have_the_verdicts_that_they_are_named_after(kind, studies, monkeypatch, capsys):
    assert called("significance", studies, kind, "--format", "json", monkeypatch=monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["comparisons"][1]["kind"] == kind
    assert result["unfinished"] == ""


# every kind through one command, and every command with one kind of each code: `analysis.verdict.exits` serves them all
ENDS = [("significance", kind) for kind in GAINS] + [
    (name, kind) for name in COMMANDS if name != "significance" for kind in (Verdict.BETTER, Verdict.UNDECIDED)
]


@pytest.mark.parametrize(("name", "kind"), ENDS)
def test_a_result_is_0_and_with_require_verdict_3_if_it_is_none(name, kind, studies, monkeypatch, capsys):
    code = called(name, studies, kind, "--require-verdict", monkeypatch=monkeypatch)
    open_ = kind in (Verdict.UNDECIDED, Verdict.NOT_TESTABLE)
    assert code == (3 if open_ else 0)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no verdict: mine: ")]
    assert len(said) == open_
    if open_:
        assert called(name, studies, kind, monkeypatch=monkeypatch) == 0
        assert "no verdict" not in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_study_that_only_searches_did_what_it_was_asked(name, studies, monkeypatch):
    assert called(name, studies, SEARCHED, monkeypatch=monkeypatch) == 0
    assert called(name, studies, SEARCHED, "--require-verdict", monkeypatch=monkeypatch) == 3


@pytest.mark.parametrize("case", CASES)
def test_status_and_ls_do_what_they_are_asked(case, studies, monkeypatch, capsys):
    assert typed(monkeypatch, capsys, "status", case, "--output", studies)[0] == 0
    assert typed(monkeypatch, capsys, "ls", studies / case)[0] == 0


def test_status_of_an_unfinished_study_has_no_verdict_even_after_its_report(studies, monkeypatch, capsys):
    assert called("report", studies, UNFINISHED, monkeypatch=monkeypatch) == 1
    out, _ = capsys.readouterr()
    assert "Unfinished: 17 of 18 confirm trials." in " ".join(out.split())
    assert "To finish it: pagating sweep unfinished" in out
    for words in (["status", UNFINISHED, "--output", studies], ["ls", studies / UNFINISHED]):
        said = typed(monkeypatch, capsys, *words)[1]
        assert not [word for word in ("better,", "undecided", "not testable", "It has ended") if word in said]
    assert "It is not running" in typed(monkeypatch, capsys, "status", UNFINISHED, "--output", studies)[1]


def test_a_full_disk_is_1_and_one_line(studies, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = studies / "tiny.yaml"
    config.write_text(yaml_of(STUDY))
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "_write", full)
        said = typed(patch, capsys, "sweep", config, "--output", studies, "--tracking", "none", "--inline")
    path = studies / "tiny" / "ledger.jsonl"
    kept = "the events in it are kept, and the same command continues from there"
    assert said[0] == 1
    assert said[2] == f"pagating: {path}: cannot be written (No space left on device); {kept}\n"
    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        said = typed(patch, capsys, "report", SEARCHED, "--output", studies)
    assert (said[0], said[2]) == (1, "pagating: No space left on device\n")


@pytest.mark.parametrize(
    ("words", "buffered"),
    [
        (["-c", "from pagating_study import main; main()", "significance", "better", "--format", "csv"], True),
        (["-c", "from pagating_study import main; main()", "ls", "."], True),
        (["-c", "from pagating_study import main; main()", "ls", "."], False),
        (["-m", "analysis.significance", "better"], False),
    ],
)
def test_a_full_disk_below_the_output_is_1_in_a_fresh_process(words, buffered, studies):
    command = [sys.executable, *words]
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        environment["PYTHONUNBUFFERED"] = "" if buffered else "1"
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=studies, env=environment, check=False
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("name", COMMANDS[1:])  # a sweep would finish it
@pytest.mark.parametrize("more", [[], ["--require-verdict"]])
def test_an_unfinished_study_is_1(name, more, studies, monkeypatch, capsys):
    assert called(name, studies, UNFINISHED, *more, monkeypatch=monkeypatch) == 1
    assert "unfinished: 17 of 18 confirm trials\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_input_is_2(name, tmp_path, monkeypatch, capsys):
    assert called(name, tmp_path, "missing", "--require-verdict", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "name", [name if name == "report" else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_in_a_fresh_process(name, studies):
    program = {
        "sweep": "tune.cli",
        "report": "tune.cli",
        "significance": "analysis.significance",
        "analysis.report": "analysis.report",
    }[name]
    typed = [sys.executable, "-m", program, *words(name, studies, Verdict.UNDECIDED, "--require-verdict")]
    done = subprocess.run(typed, capture_output=True, text=True, check=False, env=os.environ, timeout=300)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "no verdict: mine: undecided (needs about " in done.stderr


def test_an_interrupt_that_python_wraps_is_an_interrupt(monkeypatch):
    """Python 3.11 raises RuntimeError from a KeyboardInterrupt that strikes while a class of pydantic is made."""

    def struck(*given, **settings):
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    def broken(*given, **settings):
        raise RuntimeError("a bug") from KeyError()

    monkeypatch.setattr(main, "app", struck)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 130
    monkeypatch.setattr(main, "app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main()
