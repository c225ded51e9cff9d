"""Test commands in the C and POSIX locales with ASCII output, each in a fresh process."""

import os
import subprocess
import sys

import pytest

PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def listed(folder, **env):
    """Run `pagating ls` of a folder, given in bytes. Return its exit code and what it wrote."""
    command = [sys.executable, "-m", "tune.cli", "ls", "--output", folder]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run(command, env={**given, **env}, capture_output=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_letters_beyond_ascii_are_printed_escaped_or_whole(tmp_path, locale):
    folder = tmp_path / "Größe ∞"
    (folder / "ü").mkdir(parents=True)
    (folder / "ü" / "study.yaml").write_text("question: Ü → ∞?\n", encoding="utf-8")
    code, said = listed(os.fsencode(folder), LC_ALL=locale, **PLAIN)
    assert code in (0, 2), said
    assert b"Traceback" not in said
    assert b"Error" not in said
    again, whole = listed(os.fsencode(folder), LC_ALL="C.UTF-8")
    assert again == code
    assert "ü" in whole.decode()
    assert rb"\xfc" in said or "ü".encode() in said


def test_a_path_that_is_not_utf8_is_refused_in_a_line(tmp_path):
    code, said = listed(os.fsencode(tmp_path) + b"/o-\xf6")
    assert code == 2
    assert said.endswith(b"/o-\\xf6': not UTF-8; rename the file or folder\n")
