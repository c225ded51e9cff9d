"""Make a checked study of anybody's table: one row per run, with arm, seed and one metric."""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.io.assemble import COMPUTE, METRICS, Ladder, Study, TableFacts, assemble
from analysis.io.files import TableError, shown
from analysis.io.tables import cells, columns, metrics, outcomes, records, seeds, shapes, source, tasks
from analysis.io.tables.columns import Options
from analysis.io.tables.shapes import Layout
from analysis.io.trials import NUMERIC

TIMES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}  # of the letter after a size
_SIZE = re.compile(r"^(\d+(?:\.\d+)?) ?([kKmMbBgGtT])$")


@dataclass(frozen=True)
class Question:
    """Settings of the test of a table; see `analysis.io.study.load`."""

    baseline: str | None = None
    floor: str | None = None
    metric: str | None = None
    level: float | None = None
    margin: float | str | None = None
    correction: str | None = None


def load_table(path: str, question: Question, options: Options) -> Study:
    """Read a table, find its columns, and check it.

    Args:
        path: File, or "-" for standard input.
        question: What is asked of it.
        options: What the command line says of its columns.

    Raises:
        TableError: If the table cannot be read, cannot be understood without an option, or would invalidate a test.
    """
    where, name = ("standard input", "stdin") if path == "-" else (path, Path(path).stem)
    if options.resampled is not None and (options.unpaired or options.size or not 0 < options.resampled < 1):
        raise TableError(f"--resampled {options.resampled:g}; allowed: above 0, below 1, without --unpaired and --size")
    read = source.read(path, options.sheet)
    if options.size is not None:
        return _by_size(where, name, read, question, options)
    if {"stage", "rung"} <= set(read.table.columns):
        raise TableError(
            f"{where}: has a column rung: trials of a ladder, of several sizes; allowed: the study's folder, or the "
            "trials of one rung without that column"
        )
    return _checked(where, name, read, question, options)


def _written_out(sizes: pd.Series) -> pd.Series:
    """Return sizes such as 124M, 1.5B or 16k as plain numbers; other cells stay."""
    if pd.api.types.is_numeric_dtype(sizes):
        return sizes
    found = sizes.astype(str).str.strip().str.extract(_SIZE)
    values = pd.to_numeric(found[0]) * found[1].str.lower().map(TIMES)
    return sizes.mask(values.notna(), values.map(lambda value: f"{value:.17g}"))


def _by_size(where: str, name: str, read: source.Cells, question: Question, options: Options) -> Study:
    # one study per value of the column of sizes, from small to large
    column = columns.find(where, read.table, "size", options.size)
    assert column is not None
    sizes = cells.numbers(where, _written_out(read.table[column]), options.decimal, read.separator)
    values = sizes.values.mask(sizes.empty)
    if not (values > 0).all() or not np.isfinite(values).all():
        row = int(np.flatnonzero(~((values > 0) & np.isfinite(values)))[0]) + 1
        raise TableError(f"{where}: column {column} has no size in row {row}; allowed: a number above 0 in every row")
    found = sorted(values.unique().tolist())
    rungs = []
    for number, size in enumerate(found, 1):
        part = replace(
            read, table=read.table[values == size].drop(columns=column), notes=[] if number > 1 else read.notes
        )
        called = f"{where}, {column} {size:g}"
        rungs.append(replace(_checked(called, name, part, question, replace(options, size=None)), rung=number))
    rows = tuple({column: size} for size in found)
    axis = COMPUTE if {"flop", "flops", "compute"} & set(metrics.words(columns.bare(column))) else column
    ladder = Ladder(tuple(rungs), tuple(found), rows, len(found), rungs[0].level, axis, joint=True)
    return replace(rungs[-1], ladder=ladder)


def _checked(where: str, name: str, read: source.Cells, question: Question, options: Options) -> Study:
    as_read, metric = shapes.one_metric(where, records.unpack(read.table), question.metric)
    table, layout = shapes.long(where, as_read, options, question.baseline, metric)
    layout = layout or _layout(where, table, options, metric)
    _check_seed(where, as_read, layout.seed, options)
    notes = list(read.notes)
    facts = TableFacts(
        higher_is_better=_direction(where, layout.name, options, notes),
        unit=metrics.unit(layout.metric) if layout.name else "",
        unpaired=options.unpaired,
        has_seeds=layout.seed is not None,
    )
    values = cells.numbers(where, table[layout.metric], options.decimal, read.separator)
    unit = values.unit or facts.unit if options.unit is None else options.unit
    runs = _runs(where, table, layout, values, options, read.separator, notes)
    facts = replace(facts, unit=unit, notes=(*notes, *([values.note] if values.note else [])), **_came(table, runs))
    if not runs["made"].any():
        raise TableError(f"{where}: column {layout.metric} is empty in every row; allowed: a number per run")
    made = runs[runs["made"]]
    if not values.unit and metrics.is_share(layout.name):
        _check_scale(where, made, layout)
    _check_twice(where, table.loc[made.index], made, layout)
    settings: dict[str, Any] = {}
    if options.resampled is not None:
        settings = {"resampling": {"test_share": options.resampled}}
    elif {"stage", "overlap"} <= set(table.columns):  # trials of one of our studies
        settings = {"resampling": {"test_share": float(table["overlap"].iloc[0]), "train_share": 1.0}}
    return _study(where, name, runs, layout, question, facts, settings)


def _layout(where: str, table: pd.DataFrame, options: Options, metric: str | None) -> Layout:
    arm, seed, task = (columns.find(where, table, role, getattr(options, role)) for role in ("arm", "seed", "task"))
    assert arm is not None  # else `shapes.long` has refused the table
    step = columns.find(where, table, "step", options.step) if options.step else _step(table, [arm, seed, task])
    taken = {c for c in (arm, seed, task, step) if c} | {
        str(c) for c in table.columns if columns.bare(c) in columns.STEPS
    }
    _check_seed(where, table, seed, options)
    found = columns.metric(where, table, metric, taken, METRICS)
    short = columns.bare(found)
    place = found.casefold().find(short)
    return Layout(arm, seed, task, step, found, found[place : place + len(short)] if place >= 0 else found)


def _check_seed(where: str, table: pd.DataFrame, seed: str | None, options: Options) -> None:
    fold = next((c for c in map(str, table.columns) if columns.bare(c) in seeds.FOLDS), None)
    taken = fold if options.resampled is None else None
    if taken is not None and (seed == taken or (seed is None and options.task != taken and table[taken].nunique() > 1)):
        raise seeds.folds(where, taken)
    if seed is None and not options.unpaired:
        raise TableError(f"{columns.missing(where, table, 'seed')}, or if runs are not pairs: --unpaired")


def _step(table: pd.DataFrame, keys: list[str | None]) -> str | None:
    # a column called step always counts; another one only if it tells the rows of a run apart
    known = [k for k in keys if k is not None]
    several = keys[1] is not None and bool(table.duplicated(known).any())
    found = sorted((c for c in map(str, table.columns) if columns.is_step(c)), key=columns.step_order)
    for column in found:
        if columns.bare(column) == "step" or (several and not table.duplicated([*known, column]).any()):
            return column
    return next((c for c in found if several and columns.bare(c) in columns.STEPS), None)


def _direction(where: str, metric: str, options: Options, notes: list[str]) -> bool:
    known = metrics.higher_is_better(metric) if metric else None
    if options.higher_is_better is None:
        if known is None:
            asked = f"of {metric!r}" if metric else "in the cells"
            raise TableError(
                f"{where}: is a higher or a lower value {asked} better? No name says it: "
                "--higher-is-better or --lower-is-better"
            )
        return known
    if known is not None and known != options.higher_is_better:
        notes.append(
            f"{metric}: {'higher' if options.higher_is_better else 'lower'} is better, because the option says so"
        )
    return options.higher_is_better


def _runs(
    where: str,
    table: pd.DataFrame,
    layout: Layout,
    values: cells.Numbers,
    options: Options,
    separator: str,
    notes: list[str],
) -> pd.DataFrame:
    # the rows in the columns that `assemble` reads; `made` marks those that are runs
    runs = pd.DataFrame(index=table.index)
    runs["arm"] = _names(where, table[layout.arm], "arm")
    if layout.seed is not None:
        runs["seed"], note = seeds.read(where, table[layout.seed], splits=options.resampled is not None)
        notes += [note] if note else []
    elif layout.step is None and layout.task is None:
        runs["seed"] = runs.groupby("arm").cumcount() + 1
        notes.append("no column of seeds: each row counts as a run of its own")
    else:
        raise columns.missing(where, table, "seed")
    runs["task"] = "" if layout.task is None else _names(where, table[layout.task], "task")
    runs = runs.assign(**_own(where, table, layout.metric, separator))
    runs[layout.name or shapes.VALUE] = values.values
    if layout.step is not None:
        steps = cells.numbers(where, table[layout.step], values.decimal or options.decimal, separator)
        steps = replace(steps, empty=steps.empty & ~values.empty)
        runs["step"] = seeds.filled(where, layout.step, steps)
    runs["outcome"] = outcomes.outcomes(where, table, layout.metric, notes)
    confirm = runs["stage"] == "confirm" if "stage" in runs else True
    runs["made"] = ~values.empty | runs["outcome"].isin(("infeasible", "failed")) | ~pd.Series(confirm, runs.index)
    return runs


def _names(where: str, column: pd.Series, role: str) -> pd.Series:
    codes, texts = pd.factorize(column)
    known = [cells.name(source.as_text(text)) for text in texts]
    if "" in known:
        row = int(np.flatnonzero(codes == known.index(""))[0]) + 1
        raise TableError(f"{where}: column {role} is empty in row {row}; allowed: a value in every row")
    if twins := cells.twins(known):
        raise TableError(
            f"{where}: column {role} has {shown(twins[0])} and {shown(twins[1])}, which differ in case, spaces or "
            "look-alike letters only; allowed: one spelling per name"
        )
    return pd.Series(np.array(known, object)[codes], index=column.index)


def _own(where: str, table: pd.DataFrame, metric: str, separator: str) -> dict[str, pd.Series]:
    # the columns of a study's own table that other rooms read
    out: dict[str, pd.Series] = {}
    for column in map(str, table.columns):
        if column == metric or column in ("step", "outcome"):
            continue
        if column in NUMERIC or column.startswith("alpha_layer_"):
            found = cells.numbers(where, table[column], None, separator)
            out[column] = found.values.mask(found.empty)
        elif column in ("stage", "config_key", "reason", "axis"):
            out[column] = table[column]
        elif column == "chosen":
            out[column] = table[column].map(lambda v: outcomes.TRUTH.get(str(v).casefold(), v)).astype(object)
    return out


def _came(table: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any]:
    # how the seeds and the arms of one of our studies came about, which decides what its p means
    if "stage" not in runs:
        return {}
    looks = pd.to_numeric(table.get("look", pd.Series(dtype=float)), errors="coerce").dropna().unique()
    late = table.get("added", pd.Series(dtype=str)).astype(str).str.casefold().map(outcomes.TRUTH) == True  # noqa: E712
    return {
        "looks": tuple(sorted(map(int, looks))) if len(looks) > 1 else (),
        "added": tuple(dict.fromkeys(runs.loc[late[late].index, "arm"])),
    }


def _not_made(runs: pd.DataFrame) -> dict[str, list[int]]:
    # runs without a value in any of their rows
    made = runs.groupby(["arm", "seed"], sort=False)["made"].any()
    absent = made[~made].reset_index()
    return {str(arm): sorted({int(s) for s in rows["seed"]}) for arm, rows in absent.groupby("arm", sort=False)}


def _check_twice(where: str, table: pd.DataFrame, runs: pd.DataFrame, layout: Layout) -> None:
    known = ("arm", "seed", "task", "step", "stage", "config_key", "chosen")
    keys = [c for c in known if c in runs]
    if not (twice := runs.duplicated(keys, keep=False)).any():
        return
    first = runs[twice].iloc[0]
    same = table[(runs[keys] == first[keys]).all(axis=1)]
    apart = [str(c) for c in table.columns if c != layout.metric and same[c].nunique() > 1]
    if "stage" in runs or layout.step is not None:
        return  # `assemble` names the rows
    said = f"{where}: arm {first['arm']!r} seed {first['seed']:g} has several rows"
    allowed = "allowed: one row per run"
    likely = [c for c in apart if columns.bare(c) in columns.LIKELY["task"].split()]
    if likely and layout.task is None:
        raise TableError(f"{said}; {allowed}, or the column that tells them apart: {columns.option('task', likely[0])}")
    if likely := [c for c in apart if columns.like_step(c)]:
        raise TableError(f"{said}; {allowed}, or the column that tells them apart: {columns.option('step', likely[0])}")
    if apart:
        values = " and ".join(map(str, same[apart[0]].unique()[:2]))
        raise TableError(
            f"{said}, with {apart[0]} {values}; {allowed}, or the column that tells them apart: "
            f"--arm, --step or {columns.option('task', apart[0])}"
        )


def _check_scale(where: str, runs: pd.DataFrame, layout: Layout) -> None:
    # 0.81 in one arm and 84 in another are a share and a percentage
    of_arm = runs[np.isfinite(runs[layout.name])].groupby("arm", sort=False)[layout.name]
    largest, smallest = of_arm.max(), of_arm.min()
    shares, percents = largest[(largest > 0) & (largest <= 1)], largest[(largest > 1.5) & (smallest > 1)]
    if len(shares) and len(percents):
        raise TableError(
            f"{where}: {layout.name} is up to {shares.iloc[0]:g} for {shares.index[0]} and {percents.iloc[0]:g} for "
            f"{percents.index[0]}; allowed: all as shares or all as percentages"
        )


def _study(
    where: str,
    name: str,
    runs: pd.DataFrame,
    layout: Layout,
    question: Question,
    facts: TableFacts,
    settings: dict[str, Any],
) -> Study:
    confirm = {key: getattr(question, key) for key in ("level", "margin", "correction")}
    settings = settings | {"confirm": {key: value for key, value in confirm.items() if value is not None}}
    arms = list(dict.fromkeys(runs["arm"]))
    baseline = _arm(where, "baseline", question.baseline, arms)
    floor = _arm(where, "floor", question.floor, arms, baseline)

    def part(rows: pd.DataFrame, called: str, known: TableFacts) -> Study:
        study = assemble(
            where,
            called,
            rows[rows["made"]].drop(columns=["task", "made"]),
            pd.DataFrame(),
            settings,
            baseline=baseline,
            floor=floor,
            metric=layout.name or shapes.VALUE,
            facts=replace(known, arms=known.arms or tuple(rows["arm"].unique()), not_made=_not_made(rows)),
        )
        _check_pairs(where, study)
        return study

    if layout.task is None:
        return part(runs, name, facts)
    ways = {metrics.higher_is_better(task): task for task in runs["task"].unique()}
    if True in ways and False in ways:
        raise TableError(
            f"{where}: column {layout.task} has {ways[True]!r}, where higher is better, and "
            f"{ways[False]!r}, where lower is; allowed: tasks with one metric"
        )
    parts = []
    for task, rows in runs.groupby("task", sort=False):
        if lacking := {baseline, floor} - {None, *rows["arm"]}:
            raise TableError(
                f"{where}: task {task!r} has no run of {lacking.pop()!r}; allowed: tasks with the baseline"
            )
        parts.append(part(rows, str(task), replace(facts, notes=(), task=str(task))))
    if len(parts) == 1:
        return part(runs, name, replace(facts, task=parts[0].name))
    mean = tasks.together(where, parts)
    whole = replace(facts, unit="% of the baseline", tasks=tuple(parts), arms=tuple(arms))
    lacking_runs = tuple(
        f"mean over tasks: {n} of the runs of {arm} left out for lack of a task"
        for arm, n in tasks.lacking(parts, mean)
    )
    return part(mean.assign(task="", made=True), name, replace(whole, notes=(*facts.notes, *lacking_runs)))


def _arm(where: str, key: str, given: str | None, arms: list[str], baseline: str | None = None) -> str | None:
    if given is None:
        if key == "floor":
            return None
        end = columns.option("baseline", arms[0])
        raise TableError(f"{where}: no arm is marked baseline; allowed: exactly one of {columns.listed(arms)}: {end}")
    name = cells.name(given)
    if name in arms:
        return name
    free = [arm for arm in arms if key == "baseline" or arm != baseline]
    twin = [arm for arm in arms if cells.twins([arm, name])]
    near = next(iter(twin or difflib.get_close_matches(name, free, n=1, cutoff=0) or arms))
    raise TableError(
        f"{where}: {key} {name!r} is not an arm; allowed: {columns.listed(arms)}: {columns.option(key, near)}"
    )


def _check_pairs(where: str, study: Study) -> None:
    # without any pair, the runs can only be compared as two samples
    assert study.table is not None
    losses = study.losses().notna()
    others = [arm for arm in study.arms if arm != study.baseline and losses[arm].any()]
    base = losses[study.baseline]
    if study.table.unpaired or not others or not base.any() or any((losses[arm] & base).any() for arm in others):
        return
    within = f" in task {study.table.task}" if study.table.task else ""
    raise TableError(
        f"{where}: {study.baseline} and {others[0]} have no seed in common{within}; runs that are not pairs are "
        "compared by Welch's test: --unpaired"
    )
