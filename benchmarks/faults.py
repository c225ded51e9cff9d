"""Test of each fault on a real small study: cells lost, doubled or different afterwards, and the time it costs.

python benchmarks/faults.py [--only FAULT ...] [--times N] [--quick] [--write docs/reliability.md]

It uses real Ray, a real MLflow server, and real processes that end at random moments (seeded). After each fault the
same command is repeated until the study is finished. Then ledger, tables and MLflow are compared with an undisturbed
run. Results are saved after each fault in docs/reliability.json. `--write` puts the table between the page's markers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_files
import fault_own
import fault_processes
import fault_tracking
import fault_trials
from common import machine
from disturbed import ROOT, Bench, Damage

KEPT = ROOT / "docs" / "reliability.json"
START, END = "<!-- faults: start -->", "<!-- faults: end -->"


FAULTS: dict[str, tuple[Callable[[Bench, int], Damage], int, int]] = {  # name: (fault, times, times of --quick)
    "infeasible": (fault_trials.infeasible, 4, 1),
    "clock": (fault_trials.clock_back, 1, 1),
    "disk": (fault_files.disk_full, 1, 1),
    "disk-cache": (fault_files.cache_full, 1, 1),
    "read-only": (fault_files.read_only, 1, 1),
    "gone": (fault_files.folder_gone, 1, 1),
    "checkpoints": (fault_files.checkpoints_damaged, 2, 1),
    "ledger-bit": (fault_files.ledger_damaged, 3, 1),
    "ledger-cut": (fault_files.ledger_cut, 3, 1),
    "files": (fault_files.files_lost, 6, 3),
    "home": (fault_files.no_home, 3, 1),
    "worker": (fault_processes.worker_killed, 20, 2),
    "driver": (fault_processes.driver_killed, 20, 2),
    "own-trial": (fault_own.trial_killed, 20, 2),
    "own-worker": (fault_own.worker_killed, 10, 2),
    "own-driver": (fault_own.driver_killed, 8, 2),
    "own-inline": (fault_own.inline_killed, 20, 2),
    "node": (fault_processes.node_lost, 1, 1),
    "ctrl-c": (fault_processes.ctrl_c, 2, 1),
    "ctrl-c-twice": (fault_processes.ctrl_c_twice, 1, 1),
    "sigterm": (fault_processes.terminated, 1, 1),
    "sigterm-all": (fault_processes.terminated_with_ray, 1, 1),
    "hung": (fault_processes.worker_hung, 3, 1),
    "two-sweeps": (fault_processes.two_sweeps, 1, 1),
    "mlflow-start": (fault_tracking.mlflow_down_at_start, 1, 1),
    "mlflow-middle": (fault_tracking.mlflow_down_between, 1, 1),
    "mlflow-end": (fault_tracking.mlflow_down_at_end, 1, 1),
    "mlflow-slow": (fault_tracking.mlflow_slow, 1, 1),
    "mlflow-500": (fault_tracking.mlflow_500, 1, 1),
    "mlflow-lost": (fault_tracking.mlflow_lost, 1, 1),
}


def page(kept: dict[str, Any]) -> str:
    """Return the table of results in Markdown."""
    lines = [
        "| fault | times | cells lost | cells doubled | cells different | seconds lost, each | of them after the last "
        "cell | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in FAULTS:
        if found := kept["faults"].get(name):
            each, after = (_each(found.get(key), found["times"]) for key in ("seconds", "after"))
            lines.append(
                f"| {found['what']} | {found['times']} | {found['lost']} | {found['doubled']} | {found['different']} "
                f"| {each} | {after} | {'; '.join(found['notes'])} |"
            )
    here = kept["machine"]
    return "\n".join(
        [
            f"`{kept['command']}` on {here['processor']}, {here['cores']} cores, {here['date']}: a study of "
            f"{kept['cells']} cells, which takes {kept['seconds']:.0f} s undisturbed.",
            "",
            *lines,
        ]
    )


def _each(seconds: float | None, times: int) -> str:
    """Return the seconds per time; a dash if they were not measured."""
    return f"{seconds / times:.1f}" if times and seconds is not None else "-"


def write(target: Path, kept: dict[str, Any]) -> None:
    """Put the table between the markers of a page."""
    before, rest = target.read_text(encoding="utf-8").split(START)
    target.write_text(f"{before}{START}\n{page(kept)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    """Run the selected faults; return exit code 1 if anything is lost, doubled or different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--times", type=int, help="number of times each fault occurs")
    parser.add_argument("--quick", action="store_true", help="run each fault once or twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page with the markers; its table is updated after each fault")
    parser.add_argument("--node", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        fault_processes.sweep_on_two_nodes(options.node, options.seed)
    kept: dict[str, Any] = {"faults": {}}
    if options.write and KEPT.exists():
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["PAGATING_CACHE"] = str(folder / "cache")
    bad = 0
    bench = Bench(folder, options.seed)
    command = " ".join(["python benchmarks/faults.py", *(a for a in sys.argv[1:])])
    if "command" not in kept or options.only == list(FAULTS):  # a part of the faults leaves what is said of the others
        kept |= {"command": command, "machine": machine(), "cells": len(bench.expected), "seconds": bench.seconds}
    for name in options.only:
        fault, often, rarely = FAULTS[name]
        began = time.monotonic()
        try:
            damage = fault(bench, options.times or (rarely if options.quick else often))
        except RuntimeError as error:  # printed and counted; the other faults still run
            print(f"{name}: NOT AS EXPECTED: {error}", flush=True)
            bad += 1
            continue
        what = (fault.__doc__ or name).strip().rstrip(".")
        bad += damage.lost + damage.doubled + damage.different
        kept["faults"][name] = {"what": what, **vars(damage)}
        print(f"{name}: {damage}, {time.monotonic() - began:.0f} s", flush=True)
        if options.write:
            KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            write(options.write, kept)
    print(page(kept))
    shutil.rmtree(folder, ignore_errors=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
