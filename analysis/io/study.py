"""Read a study from its folder or from a table."""

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from analysis.io.assemble import Study, assemble
from analysis.io.files import TableError, read_json, read_settings, read_table
from analysis.io.tables.columns import Options
from analysis.io.tables.load import Question, load_table


def load(
    path: str | Path,
    *,
    baseline: str | None = None,
    floor: str | None = None,
    metric: str | None = None,
    level: float | None = None,
    margin: float | str | None = None,
    correction: str | None = None,
    options: Options | None = None,
) -> Study:
    """Read a study folder, or a table of (arm, seed, metric) from elsewhere, and check it.

    A study folder names its own baseline, floor, level, margin and correction. The last three were fixed before the
    study ran and cannot be changed here. A table with a `step` column is reduced to the last step of each run.

    Args:
        path: Study folder; or a file with a table, "-" for standard input.
        baseline: Arm to use as baseline instead of the marked one.
        floor: Arm to use as floor instead of the marked one.
        metric: Column to use as metric instead of the default.
        level: Significance level.
        margin: Margin in nats, or a text such as "0.5%" of the baseline's mean loss.
        correction: Correction of p for several arms, one of `CORRECTIONS`.
        options: What the columns of a table mean.

    Raises:
        TableError: If the input cannot be read or would invalidate a test.
    """
    source = Path(path)
    if os.path.isdir(source):  # False also for a name that is not possible for a folder
        for name, value in (("level", level), ("margin", margin), ("correction", correction)):
            if value is not None:
                raise TableError(f"--{name} {value}: {source}/study.yaml fixed it before the study ran")
        if options is not None and options.unpaired:
            raise TableError(
                f"--unpaired: {source}/study.yaml fixed the test before the study ran (confirm.test: welch)"
            )
        if options is not None and options != Options():
            raise TableError(f"{source}: {options.named()} is an option of tables; allowed: a study folder without it")
        return _load_folder(source, baseline, floor, metric)
    if str(path) != "-" and not os.path.isfile(source):
        raise TableError(f"{source}: no such file or folder; allowed: a study folder, or a file with a table")
    question = Question(baseline, floor, metric, level, margin, correction)
    return load_table(str(path), question, options or Options())


def _load_folder(folder: Path, baseline: str | None, floor: str | None, metric: str | None) -> Study:
    settings_file, trials_file, curves_file = (folder / f for f in ("study.yaml", "trials.parquet", "curves.parquet"))
    for file in (settings_file, trials_file):
        if not file.is_file():
            raise TableError(f"{file}: missing; a study folder holds study.yaml and trials.parquet")
    settings = read_settings(settings_file)
    if provenance := read_json(folder / "provenance.json"):
        settings["provenance"] = provenance
    curves = read_table(curves_file) if curves_file.is_file() else pd.DataFrame()
    trials, name = read_table(trials_file), folder.resolve().name
    study = assemble(
        str(folder), name, trials, curves, settings, baseline=baseline, floor=floor, metric=metric, folder=folder
    )
    layers_file = folder / "layers.parquet"
    return replace(study, layers=read_table(layers_file)) if layers_file.is_file() else study
