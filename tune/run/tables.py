"""Two tidy tables of a study, made from its ledger."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.io.write import replacing
from tune.decide.confirm import looks_made
from tune.run.extend import groups
from tune.run.ledger import of_rung, records
from tune.study.cell import COST, ELSEWHERE, FINAL, ON_GPU, Record
from tune.study.study import Study


def _layers(alphas: list[float]) -> dict[str, float]:
    return {f"alpha_layer_{layer}": value for layer, value in enumerate(alphas)}


def _searched_layers(config: dict[str, float]) -> list[float]:
    """Return the alphas of an arm that searches one alpha per layer, in the order of the layers."""
    return [config[name] for name in map("alpha_{}".format, range(len(config))) if name in config]


def _trial_rows(
    study: str, cells: dict[str, Record], chosen: dict[tuple[int, str], str], added: set[str], plans: dict[str, int]
) -> Iterator[dict[str, Any]]:
    for record in cells.values():
        if record.outcome is None:
            continue
        cell, final, last = record.cell, record.final, record.curve[-1] if record.curve else {}
        yield {
            "study": study,
            **({"rung": cell.rung} if cell.rung else {}),
            "stage": cell.stage,
            "arm": cell.arm,
            "seed": cell.seed,
            "config_key": cell.config_key,
            "trial": cell.index,
            "outcome": record.outcome,
            "reason": record.reason,
            "chosen": chosen.get((cell.rung, cell.arm)) == cell.config_key if cell.stage == "confirm" else None,
            "test_nll": final.get("test_nll"),
            **{name: final.get(name, last.get(name)) for name in FINAL},
            **({"lr": cell.config["lr"]} if "lr" in cell.config else {}),
            "alpha": final.get("alpha", cell.config.get("alpha")),
            **{name: final.get(name, last.get(name)) for name in COST},
            **{name: final[name] for name in (*ON_GPU, *ELSEWHERE) if name in final},
            **{name: value for name, value in cell.config.items() if name not in ("lr", "alpha")},
            **_layers(last.get("alpha") or _searched_layers(cell.config)),
            **({"added": cell.arm in added} if added else {}),
            **({"look": plans.get(cell.key)} if plans else {}),
            **({"axis": cell.axis} if cell.axis else {}),
        }


def tables(study: str, events: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the two tidy tables of a study.

    Returns:
        `trials`, with one row per cell that has ended, and `curves`, with one row per evaluation of such a cell. If
        arms were added to a study after a decision, `trials` has a column `added`. If a study had several looks, a
        confirm trial has the number of seeds at its own one in a column `look`. In a ladder, both have the number of
        the rung in a column `rung`. If several hyperparameters were
        calibrated, a calibrate trial has the one whose grid it belongs to, or `corners`, in a column `axis`.
    """
    cells = records(events)
    chosen = {
        (event.get("rung", 0), event["arm"]): event["config_key"] for event in events if event["event"] == "chosen"
    }
    curves = [
        {
            "study": study,
            **({"rung": record.cell.rung} if record.cell.rung else {}),
            **{name: getattr(record.cell, name) for name in ("stage", "arm", "seed", "config_key")},
            "trial": record.cell.index,
            **{name: value for name, value in row.items() if name != "alpha"},
            **_layers(row.get("alpha", [])),
        }
        for record in cells.values()
        if record.outcome is not None
        for row in record.curve
    ]
    rungs = sorted({record.cell.rung for record in cells.values()}) or [0]
    parts = [of_rung(events, rung) for rung in rungs]
    added = {arm for part in parts for group in groups(part)[1:] for arm in group}
    plans = {cell: seeds for part in parts for cell, seeds in _plans(part).items()}
    return pd.DataFrame(list(_trial_rows(study, cells, chosen, added, plans))), pd.DataFrame(curves)


def _plans(events: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of seeds at the first look after each confirm trial; empty if there was one look at most."""
    seeds = {event["cell"]: event["seed"] for event in events if event["event"] == "suggested"}
    confirm = {cell: seed for cell, seed in seeds.items() if cell.startswith("confirm/")}
    first = min(confirm.values(), default=0)
    looks = looks_made(events, first)
    if len(looks) < 2:
        return {}
    places = {cell: bisect.bisect_left(looks, seed - first + 1) for cell, seed in confirm.items()}
    return {cell: looks[place] for cell, place in places.items() if place < len(looks)}


OF_BUILT_IN = ("val_ppl", "val_bpb", "train_nll", "padded_nll", "alpha", "compiled", "parameters", "flops_per_token")


def shown(table: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Return a table of a study of the user's own training with the names and the sign of its metric."""
    if not study.shown or table.empty:
        return table
    losses = [name for name in ("val_nll", "test_nll") if name in table]
    table = table.assign(**{name: study.sign * table[name].astype(float) for name in losses})
    if study.overlap and "outcome" in table:  # a reader of the bare table has to know it
        table = table.assign(overlap=study.overlap)
    empty = [name for name in (*OF_BUILT_IN, "tokens_per_second") if name in table and table[name].isna().all()]
    same = "steps" if "steps" in table else "step"  # as many as the tokens, which have the name of the budget's unit
    return table.drop(columns=[*empty, same]).rename(columns=dict(study.shown))


def write_tables(study: str, events: list[dict[str, Any]], folder: Path, own: Study | None = None) -> None:
    """Write `trials.parquet` and `curves.parquet` into the study's folder, each in one step.

    Args:
        study: Name of the study.
        events: Events of its ledger.
        folder: The study's folder.
        own: The study, if its tables have names of its own.
    """
    for name, table in zip(("trials", "curves"), tables(study, events), strict=True):
        table = shown(table, own) if own else table
        with replacing(folder / f"{name}.parquet") as scratch:
            table.to_parquet(scratch, index=False)
