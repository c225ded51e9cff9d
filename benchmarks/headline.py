"""Compute the headline figure H: the core-hours until a study of six arms ends in the correct verdict.

    python benchmarks/headline.py [--studies 300] [--workers N] [--output docs]

H is for a baseline, a floor and six arms. One arm is 0.5% better than the baseline, and the others equal it. A study
has as many confirm seeds as give it a power of 80% for that arm. Its stages run on trials of known losses, with the
noise, the curvature and the floor gap that the published laptop studies show, and a trial costs what theirs cost.

Each lever is measured alone and in worlds without any difference, where a study must not err in more than 5%.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import performance_headline
from common import machine
from performance import keep
from scipy import stats
from simulation import expected
from simulation.confirm import confirm
from simulation.world import APART, FLAT, LOSS, MORE, TREATMENTS, Scenario, World

from analysis.stats.multiplicity import adjust
from tune.decide.stages import Stages
from tune.study.files import parse
from tune.study.study import Study

RESULTS = Path(__file__).parent.parent / "docs" / "results"
PUBLISHED = ("laptop-builtin", "laptop-wikitext-2")
GAP = 0.005  # share of the baseline's loss by which the first arm is better
POWER, LEVEL = 0.8, 0.05
MOST = 14  # confirm seeds
SEEDS = {"fixed": range(5, MOST + 1), "pooled": range(5, MOST + 1)}  # that are tried; else those of a cap
CAPS = (7, 8, 10, 12)
Tried = dict[str, Sequence[int]]  # numbers of seeds, or caps, by rule
FIRST = 70_000  # seed of the first study
ARMS = (*TREATMENTS, *MORE)
RANGE = (1e-3 / math.sqrt(10), 1e-3 * math.sqrt(10))  # a decade, as in the shipped studies; the optimum lies within


@dataclass(frozen=True)
class Design:
    """A row of the table: `tuning` names one of `TUNINGS`, and `rule` is that of the study, or `pooled`."""

    name: str
    tuning: str
    rule: str


HALF = "calibrate at half of the tokens"
TUNINGS: dict[str, dict[str, Any]] = {
    "before": {},
    "3 search trials": {"trials": 3},
    "no search": {"search_arms": "own"},
    "one selection seed": {"calibrate": "points: 4, seeds: 1"},
    "one selection seed, three points": {"calibrate": "points: 3, seeds: 1"},
    "now": {"search_arms": "own", "calibrate": "points: 4, seeds: 1"},
    HALF: {},
    "now, and " + HALF: {"search_arms": "own", "calibrate": "points: 4, seeds: 1"},
}
SHARES = {HALF: 0.5, "now, and " + HALF: 0.5}  # length of a calibrate trial, of a whole one
MOVES = 0.1  # standard deviation over arms by which a log optimum moves at half of the tokens (docs/results/LOG.md)
DESIGNS = (
    Design("before: 6 search trials, 2 selection seeds, fixed seeds", "before", "fixed"),
    Design("looks and racing (O'Brien-Fleming)", "before", "obrien-fleming"),
    Design("looks and racing (e-process)", "before", "e-process"),
    Design("3 search trials per arm", "3 search trials", "fixed"),
    Design("no search for arms with nothing of their own", "no search", "fixed"),
    Design("one selection seed on four points", "one selection seed", "fixed"),
    Design("one selection seed on three points", "one selection seed, three points", "fixed"),
    Design("one standard deviation for all arms", "before", "pooled"),
    Design(f"{HALF}, if optima move by {MOVES:g}", HALF, "fixed"),
    Design("the next row, also at half of the tokens", "now, and " + HALF, "obrien-fleming"),
    Design("now: no search, one selection seed, O'Brien-Fleming", "now", "obrien-fleming"),
)
NULLS = {
    "as published": {},
    "flat bowls, optima apart": {"curvature": FLAT, "optima_apart": APART},
    "one arm 4 times noisier, optima apart": {"noisier": {"second": 4.0}, "optima_apart": APART},
}


def published() -> dict[str, float]:
    """Return what the published laptop studies show, as medians over their arms or trials.

    `difference_sd` (of an arm and the baseline on one seed, share of the loss), `curvature` (share of the loss per
    squared unit of log learning rate), `optima_sd` (of log optimum over arms), `floor_gap` (share of the loss),
    `seconds` (of a whole trial on one core) and `tokens`.
    """
    found: dict[str, list[float]] = {key: [] for key in ("difference_sd", "curvature", "optima_sd", "floor_gap")}
    costs = []
    for name in PUBLISHED:
        trials = pd.read_parquet(RESULTS / name / "trials.parquet")
        confirm = trials[trials["stage"] == "confirm"]
        losses = confirm.pivot_table(index="seed", columns="arm", values="test_nll")
        base, others = losses["gelu"], losses.drop(columns="gelu")
        found["difference_sd"] += list(others.sub(base, axis=0).std() / base.mean())
        found["floor_gap"].append(losses["linear-floor"].mean() / base.mean() - 1)
        calibrated = trials[trials["stage"] == "calibrate"].groupby(["arm", "lr"])["val_nll"].mean()
        bowls = {arm: calibrated[arm] for arm in others.columns}
        fits = [np.polyfit(np.log(bowl.index), bowl.to_numpy() / base.mean(), 2) for bowl in bowls.values()]
        found["curvature"] += [c for c, _, _ in fits]
        found["optima_sd"].append(float(np.std([-b / (2 * c) for c, b, _ in fits], ddof=1)))
        costs.append(confirm[["seconds", "tokens"]])
    return {key: float(np.median(values)) for key, values in found.items()} | {
        key: float(value) for key, value in pd.concat(costs).median().items()
    }


def scenario(facts: Mapping[str, float], gap: float = 0.0, **changes: Any) -> Scenario:
    """Return a world with the published facts, in which the first arm is better by a share `gap` of the loss."""
    sd = facts["difference_sd"] * LOSS / math.sqrt(2)
    world = {
        "sd": sd,
        "shared_sd": 2 * sd,
        "curvature": facts["curvature"] * LOSS,
        "optima_apart": math.sqrt(3) * facts["optima_sd"],  # half the width of a uniform distribution
        "floor_gap": facts["floor_gap"] * LOSS,
        "gaps": {"first": -gap * LOSS} if gap else {},
        "more": len(MORE),
        "confirm": f"seeds: {MOST}",
    }
    return Scenario("headline", **(world | changes))


def study_of(world: Scenario, tuning: str, confirm: str = "") -> Study:
    """Return the study of a world with the keys of a tuning, and other keys of the confirm section if given."""
    changes = TUNINGS[tuning] | ({"confirm": confirm} if confirm else {})
    text, (low, high) = dataclasses.replace(world, **changes).study, RANGE
    text = text.replace("lr: {loguniform: [0.0001, 0.01]}", f"lr: {{loguniform: [{low!r}, {high!r}]}}")
    return _parsed(text.replace("alpha: {search: {uniform: [0.0, 2.0]}}", "alpha: 1.5"))  # no search of its own


@lru_cache(maxsize=100)
def _parsed(text: str) -> Study:
    return parse(text, Path("simulated.yaml"))


def tune(study: Study, world: World, length: float, seed: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Run search and calibrate; return each arm's configuration, and the whole trials that each stage cost.

    Args:
        study: The study.
        world: Its trials.
        length: Length of a calibrate trial, of a whole one. Below 1 the optima of shorter trials lie elsewhere.
        seed: Seed of where they lie.
    """
    moved = np.random.default_rng([seed, 17]).normal(0.0, MOVES if length < 1 else 0.0, len(study.arms))
    factor = dict(zip(study.arms, np.exp(moved), strict=True))
    stages = Stages(study, lambda event, **fields: None, {})
    cost = {"search": 0.0, "calibrate": 0.0}
    while (cell := stages.next_cell()) is not None and cell.stage != "confirm":
        at = cell.config["lr"] * (factor[cell.arm] if cell.stage == "calibrate" else 1.0)
        loss, outcome, share = world.trial(cell.arm, at, cell.seed), "completed", 1.0
        if not math.isfinite(loss):
            outcome, share = "infeasible", 0.5
        elif cell.stage == "search":
            half = world.curve(cell.arm, loss, study.search.spare)
            if stages.should_stop(cell, study.search.spare, half):
                loss, outcome, share = half, "stopped_early", study.search.spare
        cost[cell.stage] += share * (length if cell.stage == "calibrate" else 1.0)
        stages.complete(cell, outcome, loss, round(64 * share))
    return stages.chosen, cost


def runs(world: World, chosen: Mapping[str, Mapping[str, float]], seeds: int) -> dict[str, np.ndarray]:
    """Return the test losses of each arm on fresh seeds."""
    return {
        arm: np.array([world.test_loss(arm, world.trial(arm, config["lr"], 10_000 + i, config)) for i in range(seeds)])
        for arm, config in chosen.items()
    }


def fixed(losses: Mapping[str, np.ndarray], seeds: int, pooled: bool = False) -> dict[str, bool]:
    """Return whether each arm differs: paired t tests with Holm's correction.

    With `pooled`, all differences have one standard deviation, that of all arms together. It is not the test that
    studies use.
    """
    base = losses["baseline"][:seeds]
    d = np.stack([base - losses[arm][:seeds] for arm in losses if arm != "baseline"])
    with np.errstate(invalid="ignore"):
        sd, freedom = d.std(1, ddof=1), seeds - 1
    if pooled:
        sd, freedom = np.full(len(d), math.sqrt(float((sd**2).mean()))), len(d) * (seeds - 1)
    with np.errstate(invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(d.mean(1)) / sd * math.sqrt(seeds), freedom)
    adjusted = adjust(list(np.where(np.isfinite(p), p, 0.0)), "holm")  # a diverged run decides against its arm
    return dict(zip((arm for arm in losses if arm != "baseline"), (q <= LEVEL for q in adjusted), strict=True))


def raced(study: Study, losses: Mapping[str, np.ndarray]) -> tuple[dict[str, bool], int]:
    """Run the confirm stage of a sequential rule; return whether each arm differs, and the trials."""
    last, trials = confirm(study, losses)
    adjusted = adjust([look["p_anytime"] for look in last.values()], "holm")
    return dict(zip(last, (q <= LEVEL for q in adjusted), strict=True)), trials


def one(world: Scenario, tuning: str, tried: Tried, seed: int) -> dict[str, Any]:
    """Simulate one study; return its tuning cost and, per rule and largest number of seeds, what it found."""
    study = study_of(world, tuning)
    drawn = World(world, list(study.arms), seed)
    chosen, cost = tune(study, drawn, SHARES.get(tuning, 1.0), seed)
    losses, found = runs(drawn, chosen, MOST), {}
    for rule, seeds in ((rule, n) for rule, numbers in tried.items() for n in numbers):
        if rule in SEEDS:
            differs, cells = fixed(losses, seeds, rule == "pooled"), seeds * len(study.arms)
        else:
            differs, cells = raced(study_of(world, tuning, f"rule: {rule}, max_seeds: {seeds}"), losses)
        better = losses["first"][:seeds].mean() < losses["baseline"][:seeds].mean()
        wrong = any(differs[arm] for arm in world.equal) or (bool(world.gaps) and differs["first"] and not better)
        found[f"{rule} {seeds}"] = [float(differs["first"] and better), float(wrong), float(cells)]
    n = max(tried.get("fixed", (0,)))
    return {"cost": cost, "found": found, "chance": expected.error(drawn, chosen, n, LEVEL, seed) if n else None}


def simulate(world: Scenario, tuning: str, tried: Tried, studies: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Return means over studies: the cost of each stage, and power, error and confirm trials by rule and seeds."""
    rows = list(pool.map(partial(one, world, tuning, tried), range(FIRST, FIRST + studies), chunksize=5))
    print(
        f"{tuning}, {'equal arms' if world.null else 'one arm better'}: {studies} studies", file=sys.stderr, flush=True
    )
    cost = {stage: float(np.mean([row["cost"][stage] for row in rows])) for stage in rows[0]["cost"]}
    found = {key: np.mean([row["found"][key] for row in rows], axis=0).tolist() for key in rows[0]["found"]}
    chances = [row["chance"] for row in rows if row["chance"] is not None]
    return {"cost": cost, "found": found, "chance": _mean(chances)}


def _mean(values: list[float]) -> list[float] | None:
    """Return a mean with its 95% interval (normal, from the spread of the values)."""
    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def measure(studies: int, workers: int) -> dict[str, Any]:
    """Simulate all designs; return the facts, one row per design, and the machine."""
    facts, rows = published(), []
    with ProcessPoolExecutor(workers) as pool:
        for tuning in TUNINGS:
            designs = [design for design in DESIGNS if design.tuning == tuning]
            tried: Tried = {design.rule: SEEDS.get(design.rule, CAPS) for design in designs}
            power = simulate(scenario(facts, GAP), tuning, tried, studies, pool)
            enough: Tried = {}
            for rule, numbers in tried.items():
                least = [n for n in numbers if power["found"][f"{rule} {n}"][0] >= POWER]
                enough[rule] = least[:1] or numbers[-1:]
            nulls = {
                name: simulate(scenario(facts, **changes), tuning, enough, studies, pool)
                for name, changes in NULLS.items()
            }
            rows += [
                _row(design, enough[design.rule][0], power, nulls, studies, facts["seconds"]) for design in designs
            ]
    rows.sort(key=lambda row: [design.name for design in DESIGNS].index(row["name"]))
    promise = {"gap": GAP, "power": POWER, "level": LEVEL, "worlds": list(NULLS), "studies": list(PUBLISHED)}
    return {"machine": machine(), "studies": studies, "facts": facts, "promise": promise, "rows": rows}


def _row(
    design: Design, seeds: int, power: dict[str, Any], nulls: dict[str, dict[str, Any]], studies: int, seconds: float
) -> dict[str, Any]:
    """Return a row of the table: the power and the cost of a design with a number of seeds, and its errors by world."""
    key = f"{design.rule} {seeds}"
    hit, _, confirm = power["found"][key]
    worlds = {}
    for name, null in nulls.items():
        share = null["found"][key][1]
        interval = stats.binomtest(round(share * studies), studies).proportion_ci(method="wilson")
        drawn = [share, float(interval.low), float(interval.high)]
        worlds[name] = null["chance"] if design.rule == "fixed" and null["chance"] else drawn
    parts = {**power["cost"], "confirm": confirm}
    return (
        dataclasses.asdict(design)
        | {"seeds": seeds, "power": hit, "trials": parts, "errors": worlds, "counts": _counts(worlds)}
        | {"core_hours": sum(parts.values()) * seconds / 3600}
    )


def _counts(worlds: Mapping[str, Sequence[float]]) -> bool:
    """Return if no world shows an error rate above the level: each interval reaches down to it."""
    return all(low <= LEVEL for _, low, _ in worlds.values())


def main(arguments: list[str] | None = None) -> int:
    """Simulate, print the table and write it into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=300, help="simulated studies of each design and world")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="folder of performance.json and performance.md")
    options = parser.parse_args(arguments)
    found = measure(options.studies, options.workers)
    print("\n".join(performance_headline.lines(found, "")))
    if options.output:
        keep(options.output, "headline", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
