"""Checked study tables from a folder or a CSV; input that would invalidate a test is refused here."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.io.files import TableError, read_json, read_settings, read_table, shown
from analysis.io.names import OUTCOMES, STAGES
from analysis.stats.sequential import RULES, plan

CORRECTIONS = ("holm", "bonferroni", "benjamini-hochberg", "none")
METRICS = ("test_nll", "val_nll")  # the default is the first one that the table has
DEFAULTS = {"level": 0.05, "correction": "holm", "margin": "0.5%"}  # for a table without a study file
NUMERIC = (
    *("test_nll", "val_nll", "val_ppl", "val_bpb", "train_nll", "padded_nll", "lr", "alpha", "step", "tokens"),
    *("steps", "seconds", "tokens_per_second", "peak_rss_mb", "parameters", "flops_per_token", "grad_norm"),
    *("compiled", "peak_gpu_mb", "flops_utilisation"),
)
MOST_LOSS = 1e100  # squares of larger losses overflow
MOST_NAME = 200
_DESCRIPTIVE = ("study", "stage", "arm", "seed", "step", "config_key", "outcome", "reason", "chosen")


@dataclass(frozen=True, eq=False)
class Study:
    """Tables of one study, and the decision rule that was fixed before it ran.

    `trials` has one row per cell (stage, arm, configuration, seed). `curves` has one row per cell and evaluation step.
    Losses are in nats per token. `margin` is in nats, or a text such as "0.5%" of the baseline's mean loss.
    """

    name: str
    question: str
    baseline: str
    floor: str | None
    arms: list[str]
    level: float
    correction: str
    margin: float | str
    metric: str
    trials: pd.DataFrame
    curves: pd.DataFrame
    folder: Path | None
    settings: dict[str, Any]

    @property
    def rule(self) -> str:
        """Rule for adding seeds: fixed, obrien-fleming or e-process."""
        return str((self.settings.get("confirm") or {}).get("rule") or "fixed")

    @property
    def confirms(self) -> bool:
        """True if the study has a confirm stage, the only one whose runs a test may use."""
        return "confirm" in (self.settings.get("stages") or STAGES)

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of seeds at the looks of a sequential rule; empty for the fixed rule."""
        cap = (self.settings.get("confirm") or {}).get("max_seeds")
        return () if self.rule == "fixed" else plan(self.rule, cap)

    @property
    def added(self) -> list[str]:
        """Arms that joined the study after the configurations of the other arms had been chosen."""
        if self.folder is None or "added" not in self.trials.columns:
            return []
        later = set(self.trials.loc[self.trials["added"] == True, "arm"])  # noqa: E712 (the column may hold null)
        return [arm for arm in self.arms if arm in later]

    def losses(self, metric: str | None = None) -> pd.DataFrame:
        """Return the confirm losses, seeds down and arms across: +inf = infeasible (diverged), NaN = no such run.

        A `failed` trial counts as no run, because the machine failed and not the arm. A diverged run keeps its place.
        """
        rows = confirm_rows(self.trials)
        rows = rows[rows["outcome"] != "failed"]
        loss = rows[metric or self.metric].astype(float)
        loss = loss.where((rows["outcome"] == "completed") & np.isfinite(loss), np.inf)
        table = rows.assign(_loss=loss).pivot(index="seed", columns="arm", values="_loss")
        return table.sort_index().reindex(columns=self.arms)


def confirm_rows(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that a test may use: the confirm stage, and only `chosen` rows if the table has that column."""
    rows = trials[trials["stage"] == "confirm"]
    if "chosen" in rows.columns:
        rows = rows[rows["chosen"].isna() | (rows["chosen"] == True)]  # noqa: E712 (the column holds null too)
    return rows


def load(
    path: str | Path,
    *,
    baseline: str | None = None,
    floor: str | None = None,
    metric: str | None = None,
    level: float | None = None,
    margin: float | str | None = None,
    correction: str | None = None,
) -> Study:
    """Read a study folder, or a CSV or Parquet table of (arm, seed, loss), and check it.

    A study folder names its own baseline, floor, level, margin and correction. The last three were fixed before the
    study ran and cannot be changed here. A table with a `step` column is reduced to the last step of each run.

    Args:
        path: Study folder, or a .csv or .parquet file.
        baseline: Arm to use as baseline instead of the marked one.
        floor: Arm to use as floor instead of the marked one.
        metric: Column to use as metric instead of the default.
        level: Significance level.
        margin: Margin in nats, or a text such as "0.5%" of the baseline's mean loss.
        correction: Correction of p for several arms, one of `CORRECTIONS`.

    Raises:
        TableError: If the input cannot be read or would invalidate a test.
    """
    source = Path(path)
    if os.path.isdir(source):  # False also for a name that is not possible for a folder
        for name, value in (("level", level), ("margin", margin), ("correction", correction)):
            if value is not None:
                raise TableError(f"--{name} {value}: {source}/study.yaml fixed it before the study ran")
        return _load_folder(source, baseline, floor, metric)
    if not os.path.isfile(source):
        raise TableError(f"{source}: no such file or folder; allowed: a study folder, a .csv or a .parquet file")
    trials = read_table(source)
    settings = {"confirm": {"level": level, "margin": margin, "correction": correction}}
    settings["confirm"] = {k: v for k, v in settings["confirm"].items() if v is not None}
    return assemble(
        str(source),
        source.stem,
        trials,
        pd.DataFrame(),
        settings,
        baseline=baseline,
        floor=floor,
        metric=metric,
    )


def assemble(
    source: str,
    name: str,
    trials: pd.DataFrame,
    curves: pd.DataFrame,
    settings: dict[str, Any],
    *,
    baseline: str | None = None,
    floor: str | None = None,
    metric: str | None = None,
    folder: Path | None = None,
) -> Study:
    """Check two tables and a study's settings, and make a `Study` of them.

    Args:
        source: Name of the input in error messages.
        name: Name of the study if the settings give none.
        trials: One row per cell.
        curves: One row per cell and evaluation step; may be empty.
        settings: Content of the study file; may be empty.
        baseline, floor, metric: As for `load`.
        folder: Folder of the study, if it has one.

    Raises:
        TableError: If the input would invalidate a test.
    """
    trials = _normalise(source, trials)
    declared = settings.get("arms") or {}
    arms = list(declared) if declared else list(dict.fromkeys(trials["arm"]))
    if unknown := sorted(set(trials["arm"]) - set(arms)):
        raise TableError(f"{source}: column arm has {unknown[0]!r}; allowed: {', '.join(arms)}")
    confirm = {**DEFAULTS, **(settings.get("confirm") or {})}
    study = Study(
        name=str(settings.get("name") or name),
        question=str(settings.get("question") or ""),
        baseline=_one_arm(source, "baseline", baseline, declared, arms),
        floor=_one_arm(source, "floor", floor, declared, arms) if floor or _marked_arms(declared, "floor") else None,
        arms=arms,
        level=_level(source, confirm["level"]),
        correction=_choice(source, "correction", confirm["correction"], CORRECTIONS),
        margin=confirm["margin"],
        metric=_metric(source, trials, metric),
        trials=trials,
        curves=_numeric_columns(f"{source} (curves)", curves),
        folder=folder,
        settings=settings,
    )
    if study.floor == study.baseline:
        raise TableError(f"{source}: {study.floor!r} is both baseline and floor; allowed: two different arms")
    margin_in_nats(study.margin, 1.0, source)
    _choice(source, "rule", study.rule, RULES)
    study = replace(study, trials=_last_step(source, study.trials, study.metric))
    _check_confirm(source, study)
    return study


def margin_in_nats(margin: float | str, baseline_mean: float, source: str = "study") -> float:
    """Return the margin in nats.

    Args:
        margin: A number in nats, or a text "m%" for m percent of the baseline's mean loss.
        baseline_mean: Mean loss of the baseline in nats.
        source: Name of the input in error messages.

    Raises:
        TableError: If the margin is not above 0, or is a percentage of a mean that is not above 0.
    """
    text = str(margin).strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = float("nan")
    if isinstance(margin, bool) or not (np.isfinite(value) and value > 0):
        raise TableError(f"{source}: margin {margin!r}; allowed: nats above 0, or a percentage such as 0.5%")
    if not text.endswith("%"):
        return value
    if baseline_mean <= 0:
        raise TableError(f"{source}: margin {margin!r} of a mean of {baseline_mean:g}; allowed: a number in nats")
    return value / 100 * baseline_mean


def _load_folder(folder: Path, baseline: str | None, floor: str | None, metric: str | None) -> Study:
    settings_file, trials_file, curves_file = (folder / f for f in ("study.yaml", "trials.parquet", "curves.parquet"))
    for file in (settings_file, trials_file):
        if not file.is_file():
            raise TableError(f"{file}: missing; a study folder holds study.yaml and trials.parquet")
    settings = read_settings(settings_file)
    if provenance := read_json(folder / "provenance.json"):
        settings["provenance"] = provenance
    curves = read_table(curves_file) if curves_file.is_file() else pd.DataFrame()
    given = {"baseline": baseline, "floor": floor, "metric": metric}
    trials, name = read_table(trials_file), folder.resolve().name
    return assemble(str(folder), name, trials, curves, settings, folder=folder, **given)


def _normalise(source: str, trials: pd.DataFrame) -> pd.DataFrame:
    for column in ("arm", "seed"):
        if column not in trials.columns:
            raise TableError(f"{source}: column {column} is missing; it has {', '.join(map(str, trials.columns))}")
        if trials[column].isna().any():
            row = int(np.flatnonzero(trials[column].isna())[0]) + 1
            raise TableError(f"{source}: column {column} is empty in row {row}; allowed: a value in every row")
    seed = _to_numbers(source, trials, "seed")
    whole = (seed == np.floor(seed)) & (seed.abs() < 2**53)
    if not whole.all():
        raise TableError(f"{source}: column seed has {seed[~whole].iloc[0]}; allowed: whole numbers below 2^53")
    trials = trials.assign(arm=trials["arm"].astype(str), seed=seed.astype("int64"))
    for arm in trials["arm"].unique():
        if not arm.isprintable() or not 0 < len(arm) <= MOST_NAME:
            raise TableError(
                f"{source}: column arm has {shown(arm)}; allowed: printable names, {MOST_NAME} letters at most"
            )
    if (
        "chosen" in trials.columns
        and not (known := trials["chosen"].isna() | trials["chosen"].isin([True, False])).all()
    ):
        raise TableError(
            f"{source}: column chosen has {shown(trials.loc[~known, 'chosen'].iloc[0])}; allowed: true, false"
        )
    for column, allowed, default in (("stage", STAGES, "confirm"), ("outcome", OUTCOMES, "completed")):
        if column not in trials.columns:
            trials = trials.assign(**{column: default})
        if not (known := trials[column].isin(allowed)).all():
            value = shown(trials.loc[~known, column].iloc[0])
            raise TableError(f"{source}: column {column} has {value}; allowed: {', '.join(allowed)}")
    return _numeric_columns(source, trials)


def _numeric_columns(source: str, table: pd.DataFrame) -> pd.DataFrame:
    names = [c for c in table.columns if c in NUMERIC or str(c).startswith("alpha_layer_")]
    return table.assign(**{c: _to_numbers(source, table, c) for c in names})


def _to_numbers(source: str, table: pd.DataFrame, column: str) -> pd.Series:
    if pd.api.types.is_numeric_dtype(table[column]):
        return table[column].astype(float)
    numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
    text = table[column].astype(str).str.strip().str.lower()
    bad = numbers.isna() & table[column].notna() & (text != "nan")
    if bad.any():
        raise TableError(f"{source}: column {column} has {shown(table.loc[bad, column].iloc[0])}; allowed: numbers")
    return numbers


def _marked_arms(declared: dict[str, Any], key: str) -> list[str]:
    return [arm for arm, options in declared.items() if isinstance(options, dict) and options.get(key) is True]


def _one_arm(source: str, key: str, given: str | None, declared: dict[str, Any], arms: list[str]) -> str:
    names = [given] if given is not None else _marked_arms(declared, key)
    if len(names) != 1:
        found = f"{len(names)} arms are marked {key}: {', '.join(names)}" if names else f"no arm is marked {key}"
        raise TableError(f"{source}: {found}; allowed: exactly one (--{key} NAME) of {', '.join(arms)}")
    if names[0] not in arms:
        raise TableError(f"{source}: {key} {names[0]!r} is not an arm; allowed: {', '.join(arms)}")
    return names[0]


def _choice(source: str, key: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise TableError(f"{source}: {key} {value!r}; allowed: {', '.join(allowed)}")
    return str(value)


def _level(source: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 0.5:
        raise TableError(f"{source}: level {value!r}; allowed: a number above 0 and below 0.5")
    return float(value)


def _metric(source: str, trials: pd.DataFrame, metric: str | None) -> str:
    candidates = [c for c in trials.columns if c not in _DESCRIPTIVE]
    if metric is not None and metric not in candidates:
        raise TableError(f"{source}: no column {metric!r} for the metric; allowed: {', '.join(map(str, candidates))}")
    rows = confirm_rows(trials)
    found = [metric] if metric else [m for m in METRICS if m in candidates and rows[m].notna().any()]
    found = found or [m for m in METRICS if m in candidates] or candidates
    if not found or (len(found) > 1 and found[0] not in METRICS):
        raise TableError(f"{source}: which column is the metric? Name it with --metric: {', '.join(map(str, found))}")
    values = _to_numbers(source, trials, found[0])
    if np.isneginf(values).any():
        raise TableError(f"{source}: column {found[0]} has -inf; allowed: a loss, or NaN or inf for a diverged run")
    if (large := np.isfinite(values) & (values.abs() > MOST_LOSS)).any():
        raise TableError(f"{source}: column {found[0]} has {values[large].iloc[0]:g}; allowed: up to {MOST_LOSS:g}")
    return str(found[0])


def _last_step(source: str, trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    # Checkpoints of one run are never samples: the unit of analysis is the run, at its last step.
    if "step" not in trials.columns:
        return trials
    trials = trials.assign(step=_to_numbers(source, trials, "step"))
    if not (finite := np.isfinite(trials["step"])).all():
        raise TableError(
            f"{source}: column step has {trials.loc[~finite, 'step'].iloc[0]}; allowed: a number in each row"
        )
    run = ["stage", "arm", "seed"] + [c for c in ("config_key",) if c in trials.columns]
    if (twice := trials.duplicated([*run, "step"], keep=False)).any():
        row = trials[twice].iloc[0]
        raise TableError(
            f"{source}: arm {row['arm']!r} seed {row['seed']} has step {row['step']:g} twice; allowed: one row per step"
        )
    last = trials.sort_values("step", kind="stable").drop_duplicates(run, keep="last").sort_index()
    confirm = confirm_rows(last)
    cut = confirm[(confirm["step"] < confirm["step"].max()) & np.isfinite(confirm[metric].astype(float))]
    if len(cut):
        row = cut.iloc[0]
        raise TableError(
            f"{source}: arm {row['arm']!r} seed {row['seed']} ends at step {row['step']:g}, others at "
            f"{confirm['step'].max():g}; allowed: runs of equal length (a run stopped early is not evidence)"
        )
    return last


def _check_confirm(source: str, study: Study) -> None:
    rows = confirm_rows(study.trials)
    early = rows[rows["outcome"] == "stopped_early"]
    if len(early):
        cells = ", ".join(f"{r.arm} seed {r.seed}" for r in early.head(5).itertuples())
        raise TableError(
            f"{source}: column outcome is stopped_early in the confirm stage ({cells}); "
            "allowed: completed, infeasible, failed"
        )
    if (twice := rows.duplicated(["arm", "seed"], keep=False)).any():
        cells = ", ".join(f"{a} seed {s}" for a, s in rows.loc[twice, ["arm", "seed"]].drop_duplicates().head(5).values)
        raise TableError(
            f"{source}: duplicated confirm rows ({cells}); allowed: one row per arm and seed "
            "(checkpoints of one run need a step column; they are not samples)"
        )
    selection = set(study.trials.loc[study.trials["stage"] != "confirm", "seed"])
    if shared := sorted(selection & set(rows["seed"])):
        raise TableError(
            f"{source}: confirm seeds {', '.join(map(str, shared[:10]))} were used in search or calibrate; "
            "allowed: fresh seeds, because a seed that chose a configuration cannot test it"
        )
