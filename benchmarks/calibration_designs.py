"""Compare two ways to calibrate several hyperparameters, on simulated studies whose true losses are known.

    python benchmarks/calibration_designs.py [--studies 200] [--only TEXT] [--json FILE] [--write docs/protocol.md]

`joint` is the study's own way: a grid for each, then corners and a joint fit. `one by one` goes through the grids
again, each around the optima found so far, until no arm's optimum moves by more than its error, at most three times.
Both have the chance of an error given the values chosen (`simulation.expected`), and the calibrate trials of an arm.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from simulation import expected
from simulation.page import between, percent
from simulation.work import run
from simulation.world import SEVERAL, Scenario, World

from analysis.io.write import write_whole
from analysis.stats.optimum import optima
from tune.decide.calibrate import Axis, Calibration
from tune.decide.stages import Stages
from tune.plan.progress import on_stderr
from tune.study.cell import Cell
from tune.study.files import parse
from tune.study.study import Study

WAYS = ("joint", "one by one")
ROUNDS = 3
FIRST = 10_000  # seed of the first study
STRONG = [replace(one, name=f"{one.name} strongly", interaction=0.8) for one in SEVERAL if one.interaction]
APART = [
    replace(one, name=f"{one.name}, optima up to 4 times apart", optima_apart=math.log(4) / 2)
    for one in (*SEVERAL, *STRONG)
    if one.interaction
]


class OneByOne(Calibration):
    """Calibrate one hyperparameter after the other, again and again, until no arm's optimum moves."""

    def __init__(self, study: Study, decided: Any) -> None:
        super().__init__(study, decided)
        self._passes, self._moves = 0, False

    def _optima(self, axis: Axis) -> dict[str, float]:
        found, at = super()._optima(axis), [math.exp(axis.scale.to(v) / axis.scale.step) for v in axis.values]
        tables = {arm: self._table(arm, [axis.config(arm, v) for v in axis.values]) for arm in axis.beside}
        errors = optima(at, {arm: table for arm, table in tables.items() if np.isfinite(table).all(1).any()})
        for arm, one in errors.items():
            moved = abs(axis.scale.to(found[arm]) - axis.scale.to(self._now[arm][axis.name]))
            self._moves |= self._passes > 0 and moved > axis.scale.step * (one.error or 0.0)
        return found

    def _corners(self) -> list[Cell]:
        self._passes += 1
        if self._passes == ROUNDS or (self._passes > 1 and not self._moves):
            return []
        self._moves, self._axes, self._axis = False, [], 0
        self._centre = {
            name: self._scales[name].mean(config[name] for config in self._now.values()) for name in self.names[1:]
        }
        return self._begin_axis([config["lr"] for config in self._now.values()]) or self.more()


def simulate(scenario: Scenario, study: Study, seed: int, joint: bool) -> tuple[float, float]:
    """Return the chance of an error of one study, and its calibrate trials per arm."""
    world = World(scenario, list(study.arms), seed)
    stages, cells = Stages(study, lambda *_, **__: None, {}), 0
    stages.calibration = stages.calibration if joint else OneByOne(study, lambda *_, **__: None)
    while stages.stage in ("search", "calibrate") and (cell := stages.next_cell()):
        loss = world.loss(cell, 1.0)
        cells += cell.stage == "calibrate"
        stages.complete(cell, "completed" if math.isfinite(loss) else "infeasible", loss, 1)
    chance = expected.error(world, stages.chosen, study.confirm.seeds, study.confirm.level, seed)
    return 1.0 if chance is None else chance, cells / len(study.arms)


def compare(scenario: Scenario, studies: int) -> list[dict[str, Any]]:
    """Simulate a scenario in both ways; return the mean chance of an error with its 95% interval, and the trials."""
    study, rows = parse(scenario.study, Path("simulated.yaml")), []
    for way in WAYS:
        found = np.array([simulate(scenario, study, seed, way == WAYS[0]) for seed in range(FIRST, FIRST + studies)])
        mean, half = float(found[:, 0].mean()), 1.96 * float(found[:, 0].std(ddof=1)) / math.sqrt(studies)
        share = {"share": mean, "low": max(0.0, mean - half), "high": mean + half}
        rows.append({"scenario": scenario.name, "way": way, "studies": studies, "chance": share})
        rows[-1]["trials"] = float(found[:, 1].mean())
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table, a line for each scenario."""
    lines = [
        "| no true difference | studies | joint: chance of an error | its trials "
        "| one by one: chance of an error | its trials |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for joint, other in zip(rows[::2], rows[1::2], strict=True):
        cells = (f"{percent(row['chance'], 2)} | {row['trials']:.1f}" for row in (joint, other))
        lines.append(f"| {joint['scenario']} | {joint['studies']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Simulate each scenario in both ways, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200, help="of each scenario and way")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the scenarios whose name has this text")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--from-json", type=Path, help="read this file, simulate nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the table into this page")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = json.loads(options.from_json.read_text()) if options.from_json else []
    chosen = [scenario for scenario in (*SEVERAL, *STRONG, *APART) if options.only in scenario.name and not rows]
    with on_stderr() as progress:
        for scenario in progress.each("scenarios simulated", chosen):
            rows += compare(scenario, options.studies)
            progress.say(markdown(rows[-2:]).splitlines()[-1])
    print(markdown(rows))
    if options.json:
        write_whole(options.json, json.dumps(rows, indent=1) + "\n")
    if options.write:
        between(options.write, "calibration_designs", markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
