"""Measure the improvement in percent, nats, perplexity and bits per byte, at equal learning rate and over training.

`pagating improvement STUDY|TABLE`.
"""

import math
from typing import Any

import numpy as np

from analysis.describe import calibration, curves
from analysis.describe.calibration import at_grid
from analysis.io import command, formats
from analysis.io.assemble import Study
from analysis.io.exits import Exit
from analysis.io.trials import confirm_rows
from analysis.stats import estimates
from analysis.verdict import looks
from analysis.verdict.decide import decide
from analysis.verdict.exits import could_not
from analysis.verdict.kinds import Comparison, Result, as_object
from analysis.verdict.words import called

COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "n": ("n", "d"),
    "improvement_percent": ("improvement %", "+.3f"),
    "improvement_low": ("low", "+.3f"),
    "improvement_high": ("high", "+.3f"),
    "baseline_mean": ("baseline", ".4f"),
    "arm_mean": ("arm's mean", ".4f"),
    "mean_difference": ("nats", "+.4f"),
    "perplexity_reduction_percent": ("perplexity %", "+.3f"),
    "bits_per_byte": ("bits per byte", "+.4f"),
    "validation_percent": ("on val_nll %", "+.3f"),
    "verdict": ("verdict", ""),
}


def extend(study: Study, result: Result) -> dict[str, Any]:
    """Return the object of verdict.json with more units in each comparison, and with the tables beside it.

    `perplexity_reduction_percent` is 100 (1 - exp(arm - baseline)) of the mean losses if they are in nats.
    `bits_per_byte` is the mean paired difference of val_bpb. `validation_percent` is the improvement on val_nll if the
    metric is another one.
    """
    found = as_object(result)
    for row, shown in zip(result.comparisons, found["comparisons"], strict=True):
        b, a = row.baseline_mean, row.arm_mean
        shown["perplexity_reduction_percent"] = (
            None
            if b is None or a is None or max(b, a) >= math.log(1e300) or study.unit != "nats"
            else estimates.perplexity_reduction_percent(b, a)
        )
        shown["bits_per_byte"] = _paired_mean(study, row, "val_bpb")[0]
        other = study.metric != "val_nll" and not study.own
        shown["validation_percent"] = _paired_mean(study, row, "val_nll")[1] if other else None
    training = curves.over_training(study)
    return found | {
        "at_equal_learning_rate": at_grid(study),
        "calibration": calibration.optimum_rows(study),
        "over_training": {
            arm: [{k: _plain(v) for k, v in row.items()} for row in table.to_dict("records")]
            for arm, table in training.items()
        },
        "slopes": curves.slopes(study),
    }


def _paired_mean(study: Study, row: Comparison, column: str) -> tuple[float | None, float | None]:
    # mean paired difference and improvement in percent of another column, over the complete pairs
    if column not in study.trials.columns:
        return None, None
    rows = confirm_rows(study.trials).set_index(["arm", "seed"])[column].astype(float)
    lost = {*row.diverged_seeds_baseline, *row.diverged_seeds_arm}
    seeds = [s for s in row.seeds if s not in lost]
    b = np.array([rows[(row.baseline, s)] for s in seeds])
    a = np.array([rows[(row.arm, s)] for s in seeds])
    percent = estimates.improvement_percent(b, a)
    return (None if percent is None else float((b - a).mean())), percent


def _plain(value: Any) -> int | float | None:
    number = float(value)
    return (int(number) if number.is_integer() else number) if math.isfinite(number) else None


def main(argv: list[str] | None = None, prog: str = "python -m analysis.improvement") -> int:
    """Run the script; return the exit code."""
    options = command.parser(prog, __doc__).parse_args(argv)
    study = command.study(options)
    decided = decide(study)
    result = extend(study, decided)
    if options.format == "json":
        print(formats.to_json(result))
    else:
        rows = result["comparisons"]
        columns = COLUMNS if study.facts is None else formats.with_own_unit(COLUMNS, study.unit)
        columns = formats.with_runs(rows, columns)
        shown = {k: c for k, c in columns.items() if any(r.get(k) is not None for r in rows) or k == "arm"}
        command.emit_rows(rows, shown, options.format, title=f"Improvement over {study.baseline} on {study.metric}")
        command.say(study.table.notes if study.table else ())
        if options.format == "terminal":
            grid, slopes = result["at_equal_learning_rate"], result["slopes"]
            optima = calibration.optimum_rows(study)
            if optima:
                shown = formats.with_words(calibration.columns(optima), study.words)
                one = study.first == "lr" and "nuisance" not in shown
                title = "The learning-rate grid" if one else "The calibrated hyperparameters"
                command.emit_rows(optima, shown, "terminal", title=title)
            if grid:
                command.emit_rows(
                    *calibration.pivot(grid),
                    "terminal",
                    title=f"At equal {called(str(study.first))} ({study.own.name if study.own else 'val_nll'})",
                )
            if slopes:
                shown = formats.with_words(curves.SLOPE_COLUMNS, study.words)
                command.emit_rows(slopes, shown, "terminal", title="Over training")
            formats.print_notes(looks.not_of_slopes(study))
        else:
            command.say(looks.not_of_slopes(study))
    if decided.unfinished:
        return could_not(decided.unfinished)
    if any(row["mean_difference"] is not None for row in result["comparisons"]):
        return Exit.DONE
    reasons = [f"{row['arm']}: {row['verdict']}" for row in result["comparisons"]]
    return command.nothing_to_show("; ".join(reasons) or "no treatment runs")
