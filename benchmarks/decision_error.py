"""Measure how often the whole decision errs, from search to verdict, on trials whose true losses are known.

    python benchmarks/decision_error.py [--studies 2000] [--workers N] [--json FILE] [--write docs/protocol.md]

Each simulated study runs on the backend `Inline`, with Optuna, to `analysis.verdict.decide.decide`; only the training
is replaced, by a bowl over the log learning rate for each arm, noise by seed, divergence, and curves for
early stopping. Beside it the usual practice in the same world: the best of each arm's own random search, of as many
trials as our search and calibration take, on 5 fresh seeds an arm, Welch's t test at 0.05 for each arm.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from simulation import advice, expected, own
from simulation.page import markdown, percent, write
from simulation.work import run, workers
from simulation.world import SCENARIOS, TEST_GAP, Scenario, World

from analysis.io.study import assemble_any
from analysis.io.write import write_whole
from analysis.stats.multiplicity import adjust
from analysis.stats.sequential import RULES
from analysis.verdict import decide as verdicts
from analysis.verdict.kinds import Result, Verdict
from tune.backend.inline import Inline
from tune.cli.next_steps import MOST_SEEDS
from tune.decide.stages import Stages
from tune.plan.progress import Progress, on_stderr
from tune.run.ledger import MemoryLedger
from tune.run.study_run import StudyRun
from tune.run.tables import shown, tables
from tune.study.files import parse
from tune.study.own_study import OwnStudy
from tune.study.study import Study
from tune.subject.known import Known
from tune.subject.subject import Subject

DIFFERENT = (Verdict.BETTER, Verdict.WORSE)
FIRST = 10_000  # seed of the first study: the constants of the fit were chosen on studies with lower ones


def decide(study: Study, world: World, ledger: MemoryLedger | None = None) -> tuple[Result, Stages, pd.DataFrame]:
    """Return the verdict of one study whose trials `world` gives, its stages, and its trials.

    `ledger` is that of a study that has begun; None begins one.
    """
    subject: Subject = Known(study, world.loss, world.test)
    if isinstance(study, OwnStudy):
        subject = own.InProcess(study, own.function_of(world, study.metric.name, study.metric.test))
    run = StudyRun(study, None, subject, ledger=ledger)
    Inline().train(run)
    rows = shown(tables(study.name, run.ledger.events)[0], study)
    table = assemble_any("simulated", "simulated", rows, pd.DataFrame(), {**study.model_dump(), "name": "simulated"})
    return verdicts.decide(table), run.stages, rows


def extend(study: Study, world: World, scenario: Scenario) -> tuple[list[Result], Stages, pd.DataFrame]:
    """Decide a study, then add confirm seeds and decide again; return every verdict that was shown.

    The advice after a verdict is followed literally, or against it as many seeds are added once as an undecided arm
    needs if its effect is the true one.
    """
    found: list[tuple[Result, Stages, pd.DataFrame]] = []

    def told(study: Study, ledger: MemoryLedger) -> tuple[Result, int]:
        found.append(decide(study, world, ledger))
        return found[-1][0], len(found[-1][2])

    if scenario.added == "as advised":
        advice.follow(study, told)
    else:
        ledger = MemoryLedger()
        result, _ = told(study, ledger)
        open_ = [row for row in result.comparisons if row.kind == Verdict.UNDECIDED]
        needed = [min(MOST_SEEDS, row.seeds_needed) for row in open_ if row.seeds_needed]
        if needed and max(needed) > study.confirm.seeds:
            confirm = study.confirm.model_copy(update={"seeds": max(needed)})
            told(study.model_copy(update={"confirm": confirm}), ledger)
    return [result for result, _, _ in found], *found[-1][1:]


def simulate(scenario: Scenario, seeds: range) -> list[dict[str, Any]]:
    """One row a simulated study: each treatment's verdict, whether its interval covers, seeds used, usual practice.

    `expected`: the chance of an error given the learning rates it chose, where nothing differs and seeds are fixed.
    """
    study = parse(scenario.study, Path("simulated.yaml"))
    rows = []
    for seed in seeds:
        world = World(scenario, list(study.arms), seed)
        if scenario.added:
            shown, stages, trials = extend(study, world, scenario)
        else:
            result, stages, trials = decide(study, world)
            shown = [result]
        result = shown[-1]
        by_arm = {row.arm: row for row in result.comparisons}
        said = {row.arm: row.kind for each in shown for row in each.comparisons if row.kind in DIFFERENT}
        seeds_used = len(result.seeds["baseline"])
        each = {}
        for arm in scenario.treatments:
            row = by_arm[arm]
            true = 100 * (1 - (world.best(arm) + TEST_GAP) / (world.best("baseline") + TEST_GAP))
            each[arm] = {
                "verdict": said.get(arm, row.kind),
                "odd": bool(row.odd_runs),
                "covers": None if row.interval is None else bool(row.interval[0] <= true <= row.interval[1]),
            }
        confirm = int((trials["stage"] == "confirm").sum())
        tuned = (len(trials) - confirm) // len(study.arms)
        usual = world.usual_practice(list(study.arms), tuned)
        row = {"arms": each, "seeds": seeds_used, "capped": stages.grid_capped, "usual": usual, "tuned": tuned}
        row["confirm"] = confirm
        row["contrasts"] = [each.kind for each in result.contrasts]
        if (
            scenario.null
            and scenario.rule == "fixed"
            and scenario.floor_gap
            and not scenario.added
            and not result.contrasts
        ):
            chance = expected.error(world, stages.chosen, seeds_used, study.confirm.level, seed)
            row["expected"] = _errs(row, scenario) if chance is None else chance
        rows.append(row)
    return rows


def study_all(
    scenarios: list[Scenario],
    studies: int,
    processes: int,
    done: Callable[[list[dict[str, Any]], float], None],
    keep: Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The summary of every scenario, its studies spread over worker processes; `done` is told after each scenario.

    `keep`: a folder for the rows of every 25 studies, from which an interrupted run goes on.
    """
    out, progress = [], progress or Progress()
    counts = [max(1, round(studies * scenario.studies)) for scenario in scenarios]
    progress.begin("studies simulated", sum(counts))
    with workers(processes) as pool:
        for scenario, count in zip(scenarios, counts, strict=True):
            begun, last, rows = time.perf_counter(), FIRST + count, list[dict[str, Any]]()
            parts = [range(i, min(i + 25, last)) for i in range(FIRST, last, 25)]
            for part in pool.map(_part, [scenario] * len(parts), parts, [keep] * len(parts)):
                rows += part
                progress.done(len(part))
            out.append(summarise(scenario, rows))
            done(out, time.perf_counter() - begun)
    return out


def _part(scenario: Scenario, seeds: range, keep: Path | None) -> list[dict[str, Any]]:
    if keep is None:
        return simulate(scenario, seeds)
    name = "".join(c if c.isalnum() else "-" for c in scenario.name)
    path = keep / f"{name}-{seeds.start}-{len(seeds)}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["scenario"] != asdict(scenario):
            raise ValueError(f"{path}: is of another scenario of that name; use an empty folder")
        return list(kept["rows"])
    rows = simulate(scenario, seeds)
    write_whole(path, json.dumps({"scenario": asdict(scenario), "rows": rows}))
    return rows


def _share(hits: int, of: int) -> dict[str, float | int | None]:
    """A share with its 95% interval (Wilson 1927)."""
    if not of:
        return {"hits": hits, "of": of, "share": None, "low": None, "high": None}
    interval = stats.binomtest(hits, of).proportion_ci(method="wilson")
    return {"hits": hits, "of": of, "share": hits / of, "low": float(interval.low), "high": float(interval.high)}


def _mean(values: list[float]) -> dict[str, float | int | None] | None:
    """A mean of probabilities with its 95% interval (normal, from their spread)."""
    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"of": len(values), "share": mean, "low": mean - half, "high": mean + half}


def _errs(row: dict[str, Any], scenario: Scenario) -> bool:
    """Return whether a study called an equal arm better or worse, or one of two equal arms of a contrast."""
    said = [row["arms"][arm]["verdict"] for arm in scenario.equal]
    return any(word in DIFFERENT for word in said + row.get("contrasts", []))


def summarise(scenario: Scenario, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the studies, or of the comparisons, of one scenario."""
    words = [[row["arms"][arm]["verdict"] for arm in scenario.treatments] for row in rows]
    equal = scenario.equal
    false = [_errs(row, scenario) for row in rows]
    usual = [any(row["usual"][arm] <= 0.05 for arm in equal) for row in rows]
    holm = [dict(zip(row["usual"], adjust(list(row["usual"].values()), "holm"), strict=True)) for row in rows]
    usual_holm = [any(p[arm] <= 0.05 for arm in equal) for p in holm]
    warned = [any(arm.get("odd") for arm in row["arms"].values()) for row in rows]
    covers = [row["arms"][arm]["covers"] for row in rows for arm in scenario.treatments]
    power, wrong, by_usual = {}, 0, {}
    for arm, gap in scenario.gaps.items():
        right, opposite = ("better", "worse") if gap < 0 else ("worse", "better")
        said = [row["arms"][arm]["verdict"] for row in rows]
        power[arm] = _share(said.count(right), len(said))
        wrong += said.count(opposite)
        by_usual[arm] = _share(sum(row["usual"][arm] <= 0.05 for row in rows), len(rows))
    return {
        "scenario": asdict(scenario) | {"null": scenario.null},
        "studies": len(rows),
        "family_error": _share(sum(false), len(rows)) if equal else None,
        "family_error_expected": _mean([row["expected"] for row in rows if "expected" in row]),
        "family_error_usual": _share(sum(usual), len(rows)) if equal else None,
        "family_error_usual_holm": _share(sum(usual_holm), len(rows)) if equal else None,
        "power": power,
        "power_usual": by_usual,
        "wrong_direction": _share(wrong, len(rows) * len(scenario.gaps)) if scenario.gaps else None,
        "coverage": _share(sum(c is True for c in covers), sum(c is not None for c in covers)),
        "equivalent": _share(sum(w.startswith("no difference") for s in words for w in s), sum(map(len, words))),
        "warned": _share(sum(warned), len(rows)),
        "errors_warned": _share(sum(w and f for w, f in zip(warned, false, strict=True)), sum(false)),
        "not_testable": _share(sum(all(w == Verdict.NOT_TESTABLE for w in s) for s in words), len(rows)),
        "grid_capped": _share(sum(row["capped"] for row in rows), len(rows)),
        "mean_confirm_trials": float(np.mean([row["confirm"] for row in rows])),
        "mean_seeds": float(np.mean([row["seeds"] for row in rows])),
        "mean_tuning_trials": float(np.mean([row["tuned"] for row in rows])),
    }


def main(arguments: list[str] | None = None) -> int:
    """Simulate every scenario, print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="of each main scenario")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rule", choices=RULES, help="only the scenarios with this rule of confirmation")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the scenarios whose name has this text")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write tables and figure into this page")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each 25 studies there, and go on from there")
    parser.add_argument("--from-json", type=Path, nargs="+", help="join these files, simulate nothing")
    options = parser.parse_args(arguments)
    chosen = [s for s in SCENARIOS if options.rule in (None, s.rule) and options.only in s.name]
    if options.from_json:
        found = [row for file in options.from_json for row in json.loads(file.read_text())["results"]]
        by_name = {row["scenario"]["name"]: row for row in found}  # of a scenario that two files have, the later file's
        results = [by_name[scenario.name] for scenario in chosen if scenario.name in by_name]
        if options.json:
            options.json.write_text(json.dumps({"studies": options.studies, "results": results}, indent=1) + "\n")
    else:

        def done(so_far: list[dict[str, Any]], seconds: float) -> None:
            last = so_far[-1]
            line = f"{last['scenario']['name']}: {last['studies']} studies, {seconds:.0f} s"
            progress.say(f"{line}, {percent(last['family_error'])}")
            if options.json:  # after each scenario: an hour's work is not lost with the last minute's
                options.json.write_text(json.dumps({"studies": options.studies, "results": so_far}, indent=1) + "\n")

        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
        with on_stderr(ticks=False) as progress:
            results = study_all(chosen, options.studies, options.workers, done, options.keep, progress)
    print(markdown(results))
    if options.write:
        write(results, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
