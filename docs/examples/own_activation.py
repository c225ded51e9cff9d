"""A gate of your own, from the idea to the verdict.

    python docs/examples/own_activation.py

This runs the study `own_activation.yaml` beside this file. Its arm `hard-swish` uses the function below as its gate.
The study is too short to decide much. For your own study, use `pagating sweep`, which does the same.
"""

import json
import sys
from pathlib import Path

import torch


def hard(x: torch.Tensor) -> torch.Tensor:
    """The gate of hard swish (Howard et al. 2019, arXiv 1905.02244): clamp(x / 6 + 1 / 2, 0, 1)."""
    return torch.clamp(x / 6 + 0.5, 0.0, 1.0)


def main(config: Path, output: Path) -> None:
    """Run the study and print its verdict."""
    from analysis.report import build
    from tune import sweep
    from tune.study.files import load

    run = sweep.sweep(load(config), config.parent, output)
    build.build(run.folder)
    verdict = json.loads((run.folder / "verdict.json").read_text(encoding="utf-8"))
    for row in verdict["comparisons"]:
        print(f"{row['arm']} against {row['baseline']}, n = {row['n']}: {row['verdict']} ({row['why']})")
    print(f"The whole report: {run.folder / 'report.html'}")


if __name__ == "__main__":
    beside = Path(__file__).parent / "own_activation.yaml"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else beside, Path(sys.argv[2] if len(sys.argv) > 2 else "studies"))
