"""Run a study on a bare GPU machine, without Ray and MLflow: cells of one shape train together as one batched model.

    pagating cells my.yaml                       # on a machine with everything: begins the study and packs its corpus
    python docs/examples/bare_gpu.py studies/my --most 64 --device cuda --time-limit 540 --copy /out

Copy the folder studies/my from the first machine to the second one, and back. The second machine needs torch, numpy,
safetensors, pandas, pyarrow, PyYAML, scipy, pydantic, optuna and filelock. The same command continues the study, and
`pagating sweep my` does so elsewhere.
Exit codes: 0 finished, 1 the time is up or the machine failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tune.backend.packed import Packed
from tune.errors import PagatingError
from tune.run.study_run import StudyRun
from tune.run.tables import write_tables
from tune.study.cell import Cell
from tune.study.files import find
from tune.sweep import sweep

COPIED = ("study.yaml", "ledger.jsonl", "trials.parquet", "curves.parquet", "provenance.json", "pretrained.json")


def copy_study(folder: Path, to: Path) -> None:
    """Copy what a sweep elsewhere needs to continue the study."""
    for name in COPIED:
        source, target = folder / name, to / folder.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.exists():
            shutil.copyfile(source, target)
    if (folder / "gates").is_dir():
        shutil.copytree(folder / "gates", to / folder.name / "gates", dirs_exist_ok=True)


def main() -> int:
    """Train the missing cells of a study until none is left or the time is up. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a begun study, or a study file")
    parser.add_argument(
        "output", type=Path, nargs="?", default=Path("studies"), help="folder of studies for a study file"
    )
    parser.add_argument("--most", type=int, default=32, metavar="K", help="cells per pack at most")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="packs at the same time, each in a process")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="copy ledger and tables there after every pack")
    given = parser.parse_args()
    began, signals = time.monotonic(), list[int]()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))

    def left() -> float:
        return 0.0 if signals else given.time_limit - (time.monotonic() - began)

    def after(run: StudyRun, cells: Sequence[Cell]) -> None:
        finals = [run.records[cell.key].final for cell in cells]
        each = max(final.get("tokens_per_second", 0.0) for final in finals)
        print(
            f"{time.monotonic() - began:7.1f} s  {cells[0].stage:9}  rung {cells[0].rung}  {len(cells)} cells, "
            f"{run.ended} in all, {each * len(cells):,.0f} tokens/s, {finals[-1].get('peak_gpu_mb', 0.0):,.0f} MiB, "
            f"{finals[0]['device']}",
            flush=True,
        )
        if given.copy:
            write_tables(run.study.name, run.ledger.events, run.folder)
            copy_study(run.folder, given.copy)

    try:
        found = find(given.study, given.output)
        if any(found.base.glob("cells/corpus-*")):  # `pagating cells` has packed the corpus
            os.environ.setdefault("PAGATING_CACHE", str(found.base / "cells"))
        backend = Packed(given.most, given.device, left, after, given.workers)
        run = sweep(found.study, found.base, found.output, backend, warn=lambda line: print(line, file=sys.stderr))
    except PagatingError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    if given.copy:
        copy_study(run.folder, given.copy)
    if run.stages.finished:
        print(f"finished: pagating report {run.folder}")
    else:
        print(f"{run.stages.remaining()} cells are left or may follow; the same command continues")
    return int(not run.stages.finished)


if __name__ == "__main__":
    sys.exit(main())
