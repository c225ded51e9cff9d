"""The command in surroundings that lack something: standard streams, or the working directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pagating_study
from tests.studies import TINY, study_of
from tests.tune.helpers import played
from tune.study.files import dump

ROOT = Path(__file__).parents[3]
PAGATING = f"{sys.executable} -P -c 'from pagating_study import main; main()'"
SIGNIFICANCE = f"{sys.executable} -m analysis.significance"


def in_shell(folder, line):
    """Run a line of a shell in a folder. Return the process that ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a study in `studies/tiny`."""
    folder = tmp_path_factory.mktemp("place")
    study = study_of(TINY, name="tiny")
    (folder / "studies" / "tiny").mkdir(parents=True)
    (folder / "studies" / "tiny" / "study.yaml").write_text(dump(study))
    played(study, lambda cell, share: 3.0 - share / 100, folder / "studies" / "tiny")
    return folder


@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        (f"{PAGATING} ls >&-", 0, "", ""),
        (f"{PAGATING} status tiny <&- >&- 2>&-", 0, "", ""),
        (f"{PAGATING} status nix <&- >&- 2>&-", 2, "", ""),
        (f"{PAGATING} --version >&- 2>&-", 0, "", ""),
        (f"{PAGATING} plan - <&-", 2, "", "pagating: standard input: is empty, not a mapping"),
        (f"{PAGATING} rm tiny <&-", 2, "studies/tiny: ", "pagating: without a terminal nobody can be asked"),
        (f"{SIGNIFICANCE} --help >&-", 0, "", ""),
        (
            f"mkdir gone; cd gone; rmdir ../gone; {PAGATING} status",
            2,
            "",
            "pagating: the working directory was",
        ),
    ],
)
def test_a_closed_stream_or_a_removed_folder_is_no_traceback(place, line, code, out, err):
    done = in_shell(place, line)
    assert done.returncode == code
    for found, expected in ((done.stdout, out), (done.stderr, err)):
        assert found.startswith(expected)
        assert (found == "") == (expected == "")
        assert found.count("\n") <= 1


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    script = (
        "import os; from analysis.io.exits import prepare_streams; prepare_streams(); "
        "file = open('ledger', 'w'); os.write(1, b'printed by a library'); os._exit(file.fileno())"
    )
    done = in_shell(tmp_path, f'{sys.executable} -c "{script}" <&- >&- 2>&-')
    assert done.returncode > 2
    assert (tmp_path / "ledger").read_text() == ""


def test_an_interrupt_during_the_imports_is_130_without_a_traceback(monkeypatch):
    class Importing:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "tune.cli.main", Importing())
    with pytest.raises(SystemExit) as ended:
        pagating_study.main()
    assert ended.value.code == 130
