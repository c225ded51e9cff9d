"""Read a study from its folder or from a table."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.io.assemble import COMPUTE, DEFAULTS, MOST_LEVEL, RUNG, Ladder, Study, assemble
from analysis.io.files import TableError, read_json, read_settings, read_table, shown
from analysis.io.names import STAGES, STUDIES
from analysis.io.own_training import of_own
from analysis.io.tables.columns import Options
from analysis.io.tables.load import Question, load_table
from analysis.io.trials import confirm_rows, to_numbers

TRIALS = "trials.parquet"
MODEL_KEYS = ("preset", "n_layer", "d_model", "n_head", "n_ctx", "dropout", "initializer_range", "activation")
ARM_DEFAULTS = {"baseline": False, "floor": False, "base": "identity", "form": "pointwise", "per": "model"}


def located(source: str) -> str:
    """Return the folder of a study that is given by its name in the default folder; any other source as it is."""
    by_name = os.path.join(STUDIES, source)
    given = os.path.isfile(source) or os.path.isfile(os.path.join(source, "study.yaml"))
    return by_name if not given and os.path.isfile(os.path.join(by_name, "study.yaml")) else source


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
    rung: int | None = None,
) -> Study:
    """Read a study folder, or a table of (arm, seed, metric) from elsewhere, and check it.

    A study folder names its own baseline, floor, level, margin and correction. The last three were fixed before the
    study ran and cannot be changed here. A table with a `step` column is reduced to the last step of each run. Of the
    folder of a ladder, the study of its highest rung that has begun is returned, with all rungs in its `ladder`.

    Args:
        path: Study folder; or a file with a table, "-" for standard input.
        baseline: Arm to use as baseline instead of the marked one.
        floor: Arm to use as floor instead of the marked one.
        metric: Column to use as metric instead of the default.
        level: Significance level.
        margin: Margin in nats, or a text such as "0.5%" of the baseline's mean loss.
        correction: Correction of p for several arms, one of `CORRECTIONS`.
        options: What the columns of a table mean.
        rung: Number of one rung of a ladder, from 1, which is returned as a study without the others.

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
        found = _load_folder(source, baseline, floor, metric)
        return found if rung is None else one_rung(str(source), found, rung)
    if str(path) != "-" and not os.path.isfile(source):
        raise TableError(f"{source}: no such file or folder; allowed: a study folder, or a file with a table")
    its_study = source.with_name("study.yaml")
    if source.name == TRIALS and metric is None and its_study.is_file() and "trial" in read_settings(its_study):
        raise TableError(
            f"{source}: a table alone does not name its metric, goal and floor, and {its_study} does; allowed: the "
            f"folder, {source.parent}"
        )
    question = Question(baseline, floor, metric, level, margin, correction)
    found = load_table(str(path), question, options or Options())
    return found if rung is None else one_rung(str(path), found, rung)


def _load_folder(folder: Path, baseline: str | None, floor: str | None, metric: str | None) -> Study:
    settings_file, trials_file, curves_file = (folder / f for f in ("study.yaml", TRIALS, "curves.parquet"))
    for file in (settings_file, trials_file):
        if not file.is_file():
            raise TableError(f"{file}: missing; a study folder holds study.yaml and trials.parquet")
    settings = read_settings(settings_file)
    if provenance := read_json(folder / "provenance.json"):
        settings["provenance"] = provenance
    curves = read_table(curves_file) if curves_file.is_file() else pd.DataFrame()
    trials, name = read_table(trials_file), folder.resolve().name
    chosen: dict[str, Any] = {"baseline": baseline, "floor": floor, "metric": metric, "folder": folder}
    study = assemble_any(str(folder), name, trials, curves, settings, **chosen)
    if study.ladder and study.rung != study.ladder.planned:
        return study
    files = {name: folder / f"{name}.parquet" for name in ("layers", "samples")}
    found: dict[str, Any] = {name: read_table(file) for name, file in files.items() if file.is_file()}
    return replace(study, **found)


def one_rung(source: str, study: Study, rung: int) -> Study:
    """Return the study of one rung of a ladder; raise TableError if it has none of that number."""
    numbers = [each.rung for each in study.ladder.rungs] if study.ladder else []
    if study.ladder is None or rung not in numbers:
        allowed = ", ".join(map(str, numbers)) or "no --rung, because this study has one size"
        raise TableError(f"{source}: --rung {rung}; allowed: {allowed}")
    return study.ladder.rungs[numbers.index(rung)]


def assemble_any(
    source: str, name: str, trials: pd.DataFrame, curves: pd.DataFrame, settings: dict[str, Any], **chosen: Any
) -> Study:
    """Make a checked study of two tables and a study file; of a ladder, that of its highest rung which has begun.

    Args:
        source, name, trials, curves, settings: As for `assemble`.
        **chosen: Further arguments of `assemble`.

    Raises:
        TableError: If the input would invalidate a test, or if the tables and the study file disagree on the rungs.
    """
    rows = settings.get("scales")
    if settings.get("trial") is not None:
        trials, curves, own = of_own(source, trials, curves, settings)
        chosen = {**chosen, **own, "metric": chosen.get("metric") or own["metric"]}
    if not rows:
        if "rung" in trials.columns:
            raise TableError(f"{source}: the trials have a column rung; allowed: with a study file that has `scales`")
        return assemble(source, name, trials, curves, settings, **chosen)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TableError(f"{source}: key scales has {shown(rows)}; allowed: a list of mappings, one per rung")
    if "rung" not in trials.columns:
        raise TableError(f"{source}: the study file has `scales`, but the trials have no column rung")
    if len(curves) and "rung" not in curves.columns:
        raise TableError(f"{source}: the study file has `scales`, but the curves have no column rung")
    numbers = sorted(to_numbers(source, trials, "rung").unique().tolist())
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > len(rows):
        has = ", ".join(f"{number:g}" for number in numbers)
        raise TableError(f"{source}: column rung has {has}; allowed: 1 to {len(rows)}, without a gap")
    drop = bool((settings.get("ladder") or {}).get("drop"))
    rungs, absent = [], {}
    for number, row in enumerate(rows[: len(numbers)], 1):
        mine = trials[trials["rung"] == number].drop(columns="rung")
        # an arm without any trial may have been dropped; the verdicts of the lower rungs show if it was
        gone = [arm for arm in settings["arms"] if drop and number > 2 and not (mine["arm"] == arm).any()]
        if gone:
            absent[number] = tuple(map(str, gone))
        own = _of_rung(settings, number, row, len(rows), gone)
        its = curves[curves["rung"] == number].drop(columns="rung") if len(curves) else curves
        rungs.append(replace(assemble(source, name, mine, its, own, **chosen), rung=number))
    level = float((settings.get("confirm") or {}).get("level", DEFAULTS["level"]))
    if level >= MOST_LEVEL:
        raise TableError(f"{source}: level {level:g}; allowed: a number above 0 and below {MOST_LEVEL:g}")
    sizes, axis = tuple(map(training_compute, rungs)), COMPUTE
    if rungs[0].own:
        axis = COMPUTE if "compute" in rows[0] else RUNG
        if axis == COMPUTE and not all(isinstance(row.get("compute"), int | float) for row in rows):
            raise TableError(f"{source}: key scales: compute; allowed: a number on every rung, or on none")
        sizes = tuple(float(row.get("compute", 2.0**number)) for number, row in enumerate(rows[: len(rungs)], 1))
    ladder = Ladder(tuple(rungs), sizes, tuple(rows[: len(rungs)]), len(rows), level, axis, absent=absent)
    return replace(rungs[-1], ladder=ladder)


def _of_rung(
    settings: Mapping[str, Any], number: int, row: Mapping[str, Any], rungs: int, gone: list[str]
) -> dict[str, Any]:
    # the study file of a rung: its own sizes, its share of the level, and only the arms that it has
    model, fixed, confirm = (dict(settings.get(key) or {}) for key in ("model", "fixed", "confirm"))
    level = confirm.get("level", DEFAULTS["level"])
    if isinstance(level, int | float):  # `assemble` refuses any other
        confirm["level"] = level / rungs
    own_code = settings.get("trial") is not None  # whose sizes are values that its trials read
    for key, value in ({} if own_code else row).items():
        if key != "tokens_per_parameter":  # `tokens` says the same
            (model if key in {*MODEL_KEYS, *model} else fixed)[key] = value
    contrasts = [pair for pair in settings.get("contrasts") or [] if not set(map(str, pair)) & set(gone)]
    out = {key: value for key, value in settings.items() if key not in ("scales", "ladder")}
    out |= {"model": model, "fixed": fixed, "confirm": confirm, "contrasts": contrasts}
    if own_code and "budget" in row:
        out["budget"] = dict.fromkeys(settings["budget"], row["budget"])
    out["arms"] = {arm: options for arm, options in settings["arms"].items() if arm not in gone}
    if number > 1 and (settings.get("ladder") or {}).get("search", "lowest") == "lowest":
        out["stages"] = [stage for stage in settings.get("stages") or STAGES if stage != "search"]
        out.pop("search", None)
    return out


def training_compute(study: Study) -> float:
    """Return the FLOPs of training of a study's baseline, from its confirm trials; NaN if they are not known."""
    rows = confirm_rows(study.trials)
    rows = rows[rows["arm"] == study.baseline]
    if not {"flops_per_token", "tokens"} <= set(rows.columns):
        return math.nan
    found = (rows["flops_per_token"] * rows["tokens"]).dropna()
    return float(found.median()) if len(found) and found.median() > 0 else math.nan


def _without_defaults(options: Any) -> Any:
    # an earlier version did not write every default of an arm
    if not isinstance(options, dict):
        return options
    found = {key: _without_defaults(value) for key, value in options.items()}
    return {key: value for key, value in found.items() if key not in ARM_DEFAULTS or ARM_DEFAULTS[key] != value}


def together(studies: Sequence[Study]) -> Study:
    """Make a ladder of several studies, each of which is one rung, in the order of their compute.

    None of them has promised a share of its level. So p is adjusted by Holm's correction over the arms of all of them,
    at the lowest of their levels.

    Raises:
        TableError: If the studies have other baselines, metrics, arms or margins, or if a size is not known.
    """
    first = studies[0]
    for each in studies:
        if each.table is not None or each.ladder is not None:
            what = "a table" if each.table is not None else "a ladder itself"
            raise TableError(f"{each.folder or each.name} is {what}; allowed: study folders of one size each")
        if each.rule != "fixed" and each.correction != "holm":
            raise TableError(f"{each.name}: rule {each.rule} with the correction {each.correction}; allowed: holm")
        for what in ("baseline", "floor", "metric", "margin", "unpaired"):
            if getattr(each, what) != getattr(first, what):
                raise TableError(
                    f"{each.name} has the {what} {getattr(each, what)} and {first.name} {getattr(first, what)}; "
                    "allowed: studies with the same one"
                )
        arms, others = (_without_defaults(study.settings.get("arms") or {}) for study in (first, each))
        if apart := [arm for arm in dict.fromkeys([*arms, *others]) if arms.get(arm) != others.get(arm)]:
            raise TableError(
                f"{each.name} and {first.name} differ in the arms {', '.join(apart)}; allowed: the same arms in each"
            )
        if not math.isfinite(training_compute(each)):
            raise TableError(
                f"{each.name}: the baseline's training compute is not known; allowed: trials with the columns "
                "flops_per_token and tokens"
            )
    ordered = sorted(studies, key=training_compute)
    sizes = tuple(map(training_compute, ordered))
    names = [each.name for each in ordered]
    for at in range(1, len(ordered)):
        if sizes[at] == sizes[at - 1] or names[at] in names[:at]:
            raise TableError(
                f"{names[at - 1]} and {names[at]}: {sizes[at]:.3g} FLOPs of training; allowed: studies of different "
                "sizes and names"
            )
    level = min(each.level for each in studies)
    rungs = []
    for number, each in enumerate(ordered, 1):
        confirm = {**(each.settings.get("confirm") or {}), "level": level, "correction": "holm"}
        own = {**each.settings, "confirm": confirm}
        rungs.append(replace(each, rung=number, level=level, correction="holm", settings=own))
    rows = tuple({"study": name} for name in names)
    return replace(rungs[-1], ladder=Ladder(tuple(rungs), sizes, rows, len(rungs), level, joint=True))
