"""How `pagating sweep` ends, on a run that needs no Ray."""

from pathlib import Path
from types import SimpleNamespace

from tune import cli_sweep, runner
from tune.screen import Screen
from tune.study import load

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def test_a_hopeless_study_says_why_in_one_line_without_a_password(monkeypatch, capsys):
    reasons = [None, "OSError: cannot reach\n  \x1b[31mhttp://me:s3cret@host/data?key=t0ken", "another"]
    records = {str(number): SimpleNamespace(reason=reason) for number, reason in enumerate(reasons)}
    run = SimpleNamespace(stages=SimpleNamespace(finished=True, hopeless=True), records=records)
    monkeypatch.setattr(runner, "sweep", lambda *args, **kwargs: run)
    code = cli_sweep._run(load(SMOKE), SMOKE.parent, Path("none"), None, "none", None, None, Screen())
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err == (
        "No search trial could be trained, so there is nothing to compare. The first said: "
        "OSError: cannot reach \\x1b[31mhttp://***@host/data?key=***\n"
    )


def test_a_warning_is_one_line_without_a_password(capsys):
    Screen().warn("cannot write\nhttp://me:s3cret@host")
    assert capsys.readouterr().err == "Warning: cannot write http://***@host\n"
