"""The end of `pagating sweep`, without Ray."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tune import sweep as study_sweep
from tune.cli import main, sweep
from tune.cli.screen import Screen
from tune.errors import StudyStopped
from tune.study.files import load

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"


def test_a_hopeless_study_says_why_in_one_line_without_a_password(monkeypatch, capsys):
    reasons = [None, "OSError: cannot reach\n  \x1b[31mhttp://me:s3cret@host/data?key=t0ken", "another"]
    records = {str(number): SimpleNamespace(reason=reason) for number, reason in enumerate(reasons)}
    run = SimpleNamespace(stages=SimpleNamespace(finished=True, hopeless=True), records=records)
    monkeypatch.setattr(study_sweep, "sweep", lambda *args, **kwargs: run)
    code = sweep._run(load(SMOKE), SMOKE.parent, Path("none"), "none", None, None, Screen())
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err == (
        "No search trial could be trained, so there is nothing to compare. The first said: "
        "OSError: cannot reach \\x1b[31mhttp://***@host/data?key=***\n"
    )


def test_a_warning_is_one_line_without_a_password(capsys):
    Screen().warn("cannot write\nhttp://me:s3cret@host")
    assert capsys.readouterr().err == "Warning: cannot write http://***@host\n"


def test_what_the_machine_refuses_ends_the_command_with_one_line(monkeypatch, capsys, tmp_path):
    def stopped(*args, **kwargs):
        raise StudyStopped("Ray did not start.\nIt said: \x1b[31m http://me:s3cret@host")

    monkeypatch.setattr(study_sweep, "sweep", stopped)
    words = ["pagating", "sweep", str(SMOKE), "--output", str(tmp_path), "--tracking", "none"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "pagating: Ray did not start. It said: \\x1b[31m http://***@host\n"
