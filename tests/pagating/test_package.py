"""The package `pagating` as `import pagating` shows it, and the library without the packages that a study needs."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

import pagating
from pagating.tasks.causal import CAUSAL
from pagating.tasks.table import task_of
from pagating.train import steps
from pagating_study import NEEDS_STUDY, STUDY_MODULES
from tests.pagating.helpers import make_trial

ROOT = Path(__file__).parents[2]


def test_the_package_lists_its_names_its_sub_modules_and_its_version():
    assert {"load_model", "patch", "PaGLU", "gating", "train", "__version__"} <= set(dir(pagating))
    assert set(pagating.__all__) < set(dir(pagating))
    assert {"probe", "patch"} <= set(dir(pagating.gating))
    assert "__main__" not in dir(pagating.packed)
    assert pagating.__version__.count(".") == 2
    assert f"version: {pagating.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse((ROOT / "pagating" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"pagating.{home}" for name, home in pagating._HOME.items()}


@pytest.mark.parametrize("name", ["none", "gating.none", "a b", "__wrapped__", "__main__"])
def test_a_name_that_the_package_lacks_is_an_attribute_error(name):
    for package in (pagating, pagating.gating):
        assert not hasattr(package, name)
        with pytest.raises(AttributeError, match=f"^module '{package.__name__}' has no attribute '{name}'$"):
            getattr(package, name)


# a module of None is one that is not installed; torch itself needs filelock
BARE = f"""
import sys
blocked = set({STUDY_MODULES!r}) - {{"filelock", "jinja2"}}
sys.modules.update(dict.fromkeys(blocked))
"""
LIBRARY = """
import sys
import pagating
assert not {"torch", "numpy"} & sys.modules.keys()
assert pagating.gating.catalog.LARGEST_ALPHA == 2.0
assert "torch" not in sys.modules
from pagating import *
assert set(pagating.__all__) <= set(dir(pagating))
assert not {"PaGPT2Config", "from_pretrained"} & set(dir(pagating))
for name in ("PaGPT2Config", "from_pretrained"):
    try:
        getattr(pagating, name)
    except ImportError as error:
        assert str(error) == f"pagating.{name} needs transformers 5: pip install transformers", error
    else:
        raise AssertionError(name)
import torch
from torch import nn

x = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64)
assert torch.allclose(pointwise(x, 0.25), 0.25 * x * torch.sigmoid(x) + 0.75 * x, rtol=1e-14)
assert torch.allclose(glu(x, 2 * x, 0.5), x * (0.5 * torch.sigmoid(2 * x) + 0.5), rtol=1e-14)

class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
    def forward(self, x):
        return self.down(self.act(self.up(x)))

torch.manual_seed(0)
model, x = nn.Sequential(nn.ModuleList([MLP(), MLP()])), torch.randn(5, 4)
run = lambda: model[0][1](model[0][0](x))
stock = run()
for given in ({}, {"alpha": "learnable", "base": "gelu"}, {"unit": "relu2"}, {"unit": "xielu"}, {"form": "glu"}):
    assert patch(model, **given).count == 2
    assert not torch.allclose(run(), stock), given
    with pagating.gating.probe.Probe(model) as probe:
        run().sum().backward()
    assert [row["name"] for row in probe.rows()] == ["0.0.act", "0.1.act"]
    unpatch(model)
patch(model, alpha=0.0, base="stock")
assert torch.equal(run(), stock)

ids = torch.arange(8).reshape(1, 8)
assert torch.equal(load_model(sys.argv[1])(ids).logits, torch.load(sys.argv[2]))
"""
MAIN = """
import pagating_study
pagating_study.main()
"""


def ran(code, *arguments):
    """Run code in a fresh process; return exit code, output and errors."""
    program = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_library_needs_no_package_of_a_study(packed, tmp_path):
    trial = make_trial(packed, unit={"gate": "sigmoid", "alpha": {"learnable": {}}})
    list(steps(trial, None, tmp_path / "model"))
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        torch.save(pagating.load_model(tmp_path / "model")(ids).logits, tmp_path / "logits.pt")
    assert ran(BARE + LIBRARY, tmp_path / "model", tmp_path / "logits.pt") == (0, "", "")
    (tmp_path / "trial.json").write_text(json.dumps(trial.as_dict()))
    code, out, _ = ran(BARE + MAIN, "train", tmp_path / "trial.json")
    assert code == 0
    assert json.loads(out)["outcome"] == "completed"


@pytest.mark.parametrize(
    "words", [["sweep", "configs/sweep.yaml"], ["--help"], [], ["significance", "runs.csv"]], ids=str
)
def test_a_command_of_a_study_names_the_missing_extra_in_a_line(words):
    code, out, errors = ran(BARE + MAIN, *words)
    said = " ".join(["pagating", *words[:1]])
    assert (code, out, errors) == (1, "", f"{said}: needs typer; {NEEDS_STUDY}\n")


def test_a_package_that_is_missing_deep_inside_a_command_is_named_in_a_line():
    code = f"import sys\nsys.modules['pandas'] = None\n{MAIN}"
    assert ran(code, "significance", "runs.csv") == (1, "", f"pagating significance: needs pandas; {NEEDS_STUDY}\n")


def test_a_trial_that_needs_transformers_says_so(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"^task: 'span' needs transformers 5, which is not installed: pip install"):
        task_of(make_trial(packed, task="span"))
    assert task_of(make_trial(packed)) is CAUSAL


def test_the_version_needs_the_library_alone():
    assert ran(BARE + MAIN, "--version") == (0, f"pagating {pagating.__version__}\n", "")


def test_a_study_needs_the_extra_and_the_library_three_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda rows: {re.match(r"[\w.-]+", row)[0].lower() for row in rows}  # noqa: E731
    assert names(project["dependencies"]) == {"numpy", "safetensors", "torch"}
    given = packages_distributions()
    brought = {name.lower() for module in STUDY_MODULES for name in given[module]}
    assert brought - {"mlflow-skinny", "mlflow-tracing"} == names(project["optional-dependencies"]["study"])
