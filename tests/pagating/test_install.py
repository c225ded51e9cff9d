"""Tests of the library as pip installs it, without the extra `study`, in an environment of its own."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import pagating
from pagating.train import steps
from pagating_study import NEEDS_STUDY, PACKAGES, STUDY_MODULES
from tests.pagating.helpers import make_trial
from tests.pagating.test_package import LIBRARY

ROOT = Path(__file__).parents[2]
PARTS = (*PACKAGES, "pyproject.toml", "pagating_study.py", "README.md", "LICENSE")
TYPED = """
import pagating

reveal_type(pagating.pointwise)
reveal_type(pagating.patch(pagating.PaGLU()))
reveal_type(pagating.__version__)
pagating.gating.probe.Probe(pagating.PaGLU(alpha=0.5))
pagating.pointwise("text")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return the folder of the programs of an environment into which pip installed this project, without an extra."""
    folder, source = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", source]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def ran(folder, *command):
    """Run a program in a folder; return exit code, output and errors."""
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=300, env={})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_library_works_as_pip_installs_it(bare, packed, tmp_path):
    list(steps(make_trial(packed, unit={"gate": "sigmoid", "alpha": {"learnable": {}}}), None, tmp_path / "model"))
    with torch.no_grad():
        logits = pagating.load_model(tmp_path / "model")(torch.arange(8).reshape(1, 8)).logits
    torch.save(logits, tmp_path / "logits.pt")
    code = f"import importlib.util as u\nprint([m for m in {STUDY_MODULES!r} if u.find_spec(m)])\n{LIBRARY}"
    found = ran(tmp_path, bare / "python", "-c", code, tmp_path / "model", tmp_path / "logits.pt")
    assert found == (0, "['filelock', 'jinja2']\n", "")  # torch needs these two
    assert ran(tmp_path, bare / "pagating", "--version") == (0, f"pagating {pagating.__version__}\n", "")
    for words in (["sweep", "a.yaml"], ["ls"], ["export", "a", "b"], ["significance", "a.csv"], ["--help"]):
        line = f"pagating {words[0]}: needs typer; {NEEDS_STUDY}\n"
        assert ran(tmp_path, bare / "pagating", *words) == (1, "", line)
    assert ran(tmp_path, bare / "pagating", "train", "a.json")[0] == 2


@pytest.mark.slow
def test_mypy_sees_the_types_of_an_installed_library(bare, tmp_path):
    (tmp_path / "mine.py").write_text(TYPED)
    checker = [sys.executable, "-m", "mypy", "--strict", "--python-executable", bare / "python", "mine.py"]
    code, out, _ = ran(tmp_path, *checker)
    said = re.findall(r'^mine.py:(\d+): (?:note: Revealed type is "(.*)"|error: (.*))$', out, re.M)
    assert code == 1
    assert [line for line, _, _ in said] == ["4", "5", "6", "8"], out
    assert said[0][1].startswith("def (x: torch._tensor.Tensor, alpha: ")
    assert said[1][1] == "pagating.gating.patch.PatchReport"
    assert said[2][1] in ("str", "builtins.str")
    assert said[3][2].startswith('Argument 1 to "pointwise" has incompatible type "str"')
