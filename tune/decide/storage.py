"""Searches of studies in a storage of Optuna, for programs that show such storages."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune.decide.search import distribution
from tune.study.cell import Record
from tune.study.study import Study

STATES = {None: TrialState.RUNNING, "completed": TrialState.COMPLETE, "stopped_early": TrialState.PRUNED}  # else FAIL


def in_memory(studies: Iterable[tuple[Study, Iterable[Record]]]) -> optuna.storages.InMemoryStorage:
    """Return a storage with one study of Optuna for the search of each arm, and in a ladder of each rung.

    Args:
        studies: Studies, each with all its cells.
    """
    found = optuna.storages.InMemoryStorage()
    for study, records in studies:
        searches: dict[tuple[int, str], list[Record]] = {}
        for record in records:
            if record.cell.stage == "search":
                searches.setdefault((record.cell.rung, record.cell.arm), []).append(record)
        for (rung, arm), trials in searches.items():
            name = f"{study.name}: {f'rung {rung}, ' if rung else ''}{arm}"
            made = optuna.create_study(
                storage=found, study_name=name, direction="maximize" if study.sign < 0 else "minimize"
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                made.set_metric_names([study.shown.get("val_nll", "val_nll")])
            space = {key: distribution(where) for key, where in study.at(rung).space(arm).items()}
            made.add_trials([_trial(study, record, space) for record in sorted(trials, key=_index)])
    return found


def _index(record: Record) -> int:
    return record.cell.index


def _trial(study: Study, record: Record, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    state = TrialState.WAITING if record.started is None else STATES.get(record.outcome, TrialState.FAIL)
    curve = {row["step"]: row["val_nll"] for row in record.curve if row["val_nll"] is not None}
    made = create_trial(
        state=state,
        value=study.sign * record.final["val_nll"] if state == TrialState.COMPLETE else None,
        params={key: record.cell.config[key] for key in space},
        distributions=dict(space),
        user_attrs={"cell": record.cell.key, "outcome": record.outcome or "running", "reason": record.reason or ""},
        intermediate_values={step: study.sign * value for step, value in curve.items()},
    )
    made.datetime_start = _time(record.started)
    made.datetime_complete = _time(record.ended) if record.outcome else None
    return made


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds)
