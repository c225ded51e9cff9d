"""Train one trial of the user's own code, as `pagating trial STUDY CELL` prints it: `pagating train trial.json`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tune.subject.own_cells import read_trial, train
from tune.subject.process import TrialFailed


def main(arguments: list[str] | None = None, prog: str = "pagating train") -> int:
    """Run the trial of a JSON file, print its reports and its final metrics, and return the exit code.

    Exit codes: 0 done, 1 infeasible or failed, 2 bad input, 130 interrupted by SIGINT, 143 by SIGTERM.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Train one trial, without Ray.")
    parser.add_argument("trial", type=Path, help="JSON file, as printed by `pagating trial STUDY CELL`")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="trial.folder; default: one that is removed")
    given = parser.parse_args(arguments)
    try:
        trial = read_trial(json.loads(given.trial.read_text(encoding="utf-8")), given.trial.parent)
    except (OSError, ValueError, TypeError) as error:
        print(f"{prog}: {given.trial}: {error}", file=sys.stderr)
        return 2
    caught: list[int] = []

    def told(row: dict[str, Any]) -> None:
        value = trial.sign * row["val_nll"]
        print(f"{row['step']}/{trial.budget} {trial.unit} {trial.metric} {value:.6g}", file=sys.stderr)

    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    place: Any = nullcontext(given.checkpoints) if given.checkpoints else tempfile.TemporaryDirectory()
    try:
        with place as folder:
            end = train(trial, Path(folder), lambda: bool(caught), told)
    except TrialFailed as error:
        print(json.dumps({"outcome": "failed", "reason": str(error)}))
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if end is None:
        return 128 + caught[0]
    if end.outcome == "infeasible":
        print(json.dumps({"outcome": end.outcome, "reason": end.reason}))
        return 1
    names = {"val_nll": trial.metric, "test_nll": trial.test_metric}
    final = {names.get(name, name): trial.sign * value if name in names else value for name, value in end.final.items()}
    print(json.dumps({"outcome": "completed", **{k: v for k, v in final.items() if "token" not in k}}))
    return 0
