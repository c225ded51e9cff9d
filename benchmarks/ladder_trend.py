"""Measure how often the trend of a ladder errs, on laws of the improvement that are known.

    python benchmarks/ladder_trend.py [--studies 2000] [--whole 200] [--json FILE] [--write docs/protocol.md]

`--studies` ladders of each row have their confirm losses drawn, without calibration. `--whole` ladders of each row run
all stages of three rungs on the backend `Inline` with known losses, to `analysis.verdict.decide.decide`, so that the
error of the calibration is in them. Arms have the same noise and pairing as in benchmarks/decision_error.py.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from decision_error import _share
from looks import share
from simulation.work import run, workers
from simulation.world import LOSS, TEST_GAP, Scenario, World

from analysis.io.assemble import margin_in_nats
from analysis.io.study import assemble_any
from analysis.io.write import write_whole
from analysis.stats import sequential, trend
from analysis.stats.multiplicity import adjust
from analysis.verdict import decide as verdicts
from analysis.verdict.kinds import Verdict
from analysis.verdict.ladder.decide import decided
from analysis.verdict.ladder.kinds import Trend
from tune.backend.inline import Inline
from tune.plan.progress import Progress, on_stderr
from tune.run.ledger import MemoryLedger
from tune.run.study_run import StudyRun
from tune.run.tables import tables
from tune.study.files import parse
from tune.subject.known import Known

FIRST = 70_000  # seed of the first study
MARKS = {kind: (f"<!-- ladder {kind}: start -->\n", f"<!-- ladder {kind}: end -->") for kind in ("trend", "remedies")}
RUNGS, LEVEL, MARGIN = 3, 0.05, 0.005
LARGEST = {"first": 0.4, "second": 0.9, "searched": 1.7}  # percent; a law is a share of it on each rung
MOVES = -0.3  # of the logarithm of the optimal learning rate, from rung to rung
RULES = ("fixed", "obrien-fleming")
LOOKS = {"fixed": (8,)} | {rule: sequential.plan(rule) for rule in ("obrien-fleming", "e-process")}
REMEDIES = ("none", "spread of all arms, if larger", "one degree of freedom less", "factor of the error (in use)")
MOVING = (Trend.GROWS, Trend.SHRINKS, Trend.TURNS)


@dataclass(frozen=True)
class Law:
    """Improvement on each rung as a share of the arm's largest, the words that are false of it, and the right one."""

    shares: tuple[float, ...]
    false: tuple[Trend, ...]
    right: Trend


LAWS = {
    "constant gain": Law((1.0, 1.0, 1.0), MOVING, Trend.HOLDS),
    "no gain": Law((0.0, 0.0, 0.0), MOVING, Trend.HOLDS),
    "gain that shrinks to zero": Law((1.0, 0.5, 0.0), (Trend.GROWS, Trend.TURNS), Trend.SHRINKS),
    "gain that changes sign": Law((1.0, 0.0, -1.0), (Trend.GROWS,), Trend.TURNS),
}


@dataclass(frozen=True)
class Seen:
    """Word of one ladder on one arm, and whether the interval of its slope covers the true one."""

    trend: str
    covers: bool


@dataclass(frozen=True)
class Pairs:
    """Losses of the baseline and an arm on one rung, its verdict, and if a look before the last one ended it."""

    baseline: np.ndarray
    arm: np.ndarray
    kind: Verdict
    stopped: bool

    def mean(self, stopped: bool | None = None) -> trend.Mean:
        """Return the improvement, with the widened error of a pair that a look ended; `stopped` replaces that."""
        return trend.improvement(self.baseline, self.arm, stopped=self.stopped if stopped is None else stopped)


X = [float(3 * rung) for rung in range(RUNGS)]  # log2 of compute


def ladder(law: Law, rule: str, seed: int) -> dict[str, list[Pairs]]:
    """Draw the confirm losses of a ladder, without calibration, and decide each rung; return the rungs of each arm."""
    rng = np.random.default_rng([seed, 21])
    out: dict[str, list[Pairs]] = {arm: [] for arm in LARGEST}
    for part in law.shares:
        last, plain = LOOKS[rule][-1], Scenario("x")
        true = {"baseline": 0.0, "floor": -100 * plain.floor_gap / LOSS} | {a: g * part for a, g in LARGEST.items()}
        shared = plain.shared_sd * rng.standard_normal(last)
        own = {arm: plain.sd * rng.standard_normal(last) for arm in true}
        losses = {arm: LOSS * (1 - gain / 100) + shared + own[arm] for arm, gain in true.items()}
        found, seeds = _confirmed(losses, rule)
        for arm, rungs in out.items():
            n = seeds[arm]
            rungs.append(Pairs(losses["baseline"][:n], losses[arm][:n], found[arm], n < last))
    return out


def drawn(law: Law, rule: str, seed: int) -> dict[str, Seen]:
    """Return what a ladder with drawn confirm losses says of each arm."""
    arms = ladder(law, rule, seed)
    slopes = {arm: trend.slope(X, [pairs.mean() for pairs in rungs], LEVEL) for arm, rungs in arms.items()}
    p = dict(zip(slopes, adjust([row.p if row else 1.0 for row in slopes.values()], "holm"), strict=True))
    out = {}
    for arm, row in slopes.items():
        assert row is not None
        said = decided([pairs.kind for pairs in arms[arm]], row.value, p[arm], LEVEL)
        out[arm] = Seen(said, row.low <= _slope(law, arm) <= row.high)
    return out


def _slope(law: Law, arm: str) -> float:
    return float(np.polyfit(X, [LARGEST[arm] * part for part in law.shares], 1)[0])


def remedied(rule: str, seeds: range) -> dict[str, dict[str, tuple[bool, float]]]:
    """Return by remedy, and by study and arm, if the interval of the slope covers, and its width; the gain is constant.

    Remedies are for the error of a rung whose arm a look ended: none; the larger of the arm's spread and that of all
    arms of the rung; a degree of freedom less, in error and in t; and the factor that is in use.
    """
    law = LAWS["constant gain"]
    out: dict[str, dict[str, tuple[bool, float]]] = {name: {} for name in REMEDIES}
    for seed in seeds:
        arms = ladder(law, rule, seed)
        spread = []
        for rung in range(RUNGS):
            each = [rungs[rung].mean(False) for rungs in arms.values()]
            of_all = sum(m.df * (m.df + 1) * m.error**2 for m in each) / sum(m.df for m in each)
            spread.append(math.sqrt(of_all))
        for arm, rungs in arms.items():
            plain, wide = ([pairs.mean(stopped) for pairs in rungs] for stopped in (False, None))
            pooled = [
                replace(m, error=max(m.error, s / math.sqrt(m.df + 1))) for m, s in zip(plain, spread, strict=True)
            ]
            fewer = [replace(m, df=m.df - pairs.stopped) for m, pairs in zip(wide, rungs, strict=True)]
            for name, means in zip(REMEDIES, (plain, pooled, fewer, wide), strict=True):
                row = trend.slope(X, means, LEVEL)
                assert row is not None
                out[name][f"{seed} {arm}"] = (row.low <= _slope(law, arm) <= row.high, row.high - row.low)
    return out


def _confirmed(losses: Mapping[str, np.ndarray], rule: str) -> tuple[dict[str, Verdict], dict[str, int]]:
    """Return the verdict of each arm at a third of the level, and the seeds that it ran."""
    looks, level = LOOKS[rule], LEVEL / RUNGS
    seeds = dict.fromkeys(losses, looks[0])
    pairs = [("baseline", arm) for arm in losses if arm != "baseline"]
    settings: dict[str, Any] = {"rule": rule, "level": level, "correction": "holm", "reserve": 0.0, "racing": True}

    def of_mean(mean: float) -> float:
        return margin_in_nats(MARGIN * LOSS, mean)

    while rule != "fixed":
        seen = {arm: losses[arm][:n] for arm, n in seeds.items()}
        further = sequential.further(seen, "baseline", pairs, looks, of_mean, **settings)
        more = {arm: n for arm, n in further.items() if n > seeds[arm]}
        if not more:
            break
        seeds |= more
    bands = sequential.margins(of_mean, losses["baseline"], looks)
    last = {}
    for _, arm in pairs:
        d = (losses["baseline"] - losses[arm])[: seeds[arm]]
        last[arm] = sequential.path(d, rule, looks, level, 0.0, bands)[-1]
    differ, same = (adjust([row[key] for row in last.values()], "holm") for key in ("p_anytime", "p_no_difference"))
    kinds = {}
    for (arm, row), p, q in zip(last.items(), differ, same, strict=True):
        word = Verdict.BETTER if row["direction"] > 0 else Verdict.WORSE
        kinds[arm] = word if p <= level else Verdict.NO_DIFFERENCE if q <= level else Verdict.UNDECIDED
    return kinds, seeds


def whole(law: Law, rule: str, seed: int) -> dict[str, Seen]:
    """Run all stages of a ladder whose losses are known, and decide it."""
    rows = "".join(f"  - {{d_model: {16 * 2**rung}, tokens: 4096}}\n" for rung in range(RUNGS))
    plain = Scenario("x", rule=rule, keys=f"scales:\n{rows}")
    study = parse(plain.study, Path("simulated.yaml"))
    arms, worlds = list(study.arms), {}
    for rung, part in enumerate(law.shares, 1):
        gaps = {arm: -LOSS * gain * part / 100 for arm, gain in LARGEST.items()}
        worlds[rung] = World(replace(plain, gaps=gaps), arms, RUNGS * seed + rung)
        worlds[rung].optimum = {arm: at + MOVES * (rung - 1) for arm, at in worlds[1].optimum.items()}
    known = Known(study, lambda cell, part: worlds[cell.rung].loss(cell, part), lambda c: worlds[c.rung].test(c))
    run = StudyRun(study, None, known, ledger=MemoryLedger())
    Inline().train(run)
    trials, _ = tables(study.name, run.ledger.events)
    settings = {**study.model_dump(exclude_none=True), "name": "simulated"}
    result = verdicts.decide(assemble_any("simulated", "simulated", trials, pd.DataFrame(), settings))
    x, out = np.log2([rung.compute for rung in result.rungs]), {}
    for row in result.trends:
        best = [[worlds[rung].best(arm) + TEST_GAP for rung in worlds] for arm in ("baseline", row.arm)]
        true_slope = float(np.polyfit(x, 100 * (1 - np.array(best[1]) / best[0]), 1)[0])
        covers = row.slope_low is not None and row.slope_high is not None
        out[row.arm] = Seen(row.trend, covers and row.slope_low <= true_slope <= row.slope_high)
    return out


def summary(name: str, rule: str, stages: bool, found: list[dict[str, Seen]]) -> dict[str, Any]:
    """Return the row of a law: coverage and right words by arm, false words by study."""
    law, arms = LAWS[name], [seen for study in found for seen in study.values()]
    false = [any(seen.trend in law.false for seen in study.values()) for study in found]
    right = [seen.trend == law.right for seen in arms]
    return {
        "law": name,
        "rule": rule,
        "calibrated": stages,
        "studies": len(found),
        "coverage": _share(sum(seen.covers for seen in arms), len(arms)),
        "false": _share(sum(false), len(found)),
        "right": _share(sum(right), len(arms)),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows of the laws as a table of Markdown."""
    lines = [
        "| law | rule | trials | ladders | the interval covers | a false grows, shrinks or turns | the right word |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        of = (row["coverage"], row["false"], row["right"])
        said = " | ".join(share(each["hits"], each["of"]) for each in of)
        what = "all stages" if row["calibrated"] else "confirm only"
        lines.append(f"| {row['law']} | {row['rule']} | {what} | {row['studies']} | {said} |")
    return "\n".join(lines) + "\n"


def compared(rows: list[dict[str, Any]]) -> str:
    """Return the rows of the remedies as a table of Markdown."""
    lines = [
        "| rule | remedy | ladders | the interval covers | of the arm that it covers least | width, to none |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        said = " | ".join(share(row[key]["hits"], row[key]["of"]) for key in ("coverage", "least"))
        lines.append(f"| {row['rule']} | {row['remedy']} | {row['studies']} | {said} | {row['width']:.2f} |")
    return "\n".join(lines) + "\n"


def compare(rule: str, studies: int, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Return the row of each remedy of a rule."""
    parts = [range(i, min(i + 25, FIRST + studies)) for i in range(FIRST, FIRST + studies, 25)]
    found: dict[str, dict[str, tuple[bool, float]]] = {name: {} for name in REMEDIES}
    for part in pool.map(remedied, [rule] * len(parts), parts):
        for name in REMEDIES:
            found[name] |= part[name]
    plain = float(np.mean([width for _, width in found[REMEDIES[0]].values()]))
    rows = []
    for name, seen in found.items():
        of_arm = {a: [hit for key, (hit, _) in seen.items() if key.endswith(f" {a}")] for a in LARGEST}
        least = min(of_arm.values(), key=sum)
        covers, width = sum(hit for hit, _ in seen.values()), float(np.mean([width for _, width in seen.values()]))
        row = {"rule": rule, "remedy": name, "studies": studies, "coverage": _share(covers, len(seen))}
        rows.append(row | {"least": _share(sum(least), len(least)), "width": width / plain})
    return rows


def _part(
    draw: Callable[[Law, str, int], dict[str, Seen]], name: str, rule: str, seeds: range
) -> list[dict[str, Seen]]:
    return [draw(LAWS[name], rule, seed) for seed in seeds]


def simulate(
    studies: int, stages: int, processes: int, done: Callable[[dict[str, Any]], None], progress: Progress
) -> dict[str, Any]:
    """Return the row of each law, rule and kind of trials, and those of the remedies; `done` is told after each."""
    out: dict[str, Any] = {"results": [], "remedies": []}
    progress.begin("rows simulated", 2 * bool(studies) + len(RULES) * len(LAWS) * (bool(studies) + bool(stages)))
    with workers(processes) as pool:
        for rule, part in (("obrien-fleming", 0.75), ("e-process", 0.2)) if studies else ():
            out["remedies"] += compare(rule, round(part * studies), pool)
            progress.done()
            done(out)
        for draw, count in ((drawn, studies), (whole, stages)):
            for rule in RULES if count else ():
                for name in LAWS:
                    parts = [range(i, min(i + 25, FIRST + count)) for i in range(FIRST, FIRST + count, 25)]
                    found = pool.map(_part, *zip(*((draw, name, rule, part) for part in parts), strict=True))
                    out["results"].append(summary(name, rule, draw is whole, [seen for part in found for seen in part]))
                    progress.done()
                    done(out)
    return out


def write(found: dict[str, Any], page: Path) -> None:
    """Put both tables between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    for (begin, end), table in zip(
        MARKS.values(), (markdown(found["results"]), compared(found["remedies"])), strict=True
    ):
        before, rest = text.split(begin)
        text = before + begin + table + end + rest.split(end)[1]
    write_whole(page, text.encode())


def main(arguments: list[str] | None = None) -> int:
    """Simulate every row, print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="ladders of each row without calibration")
    parser.add_argument("--whole", type=int, default=60, help="ladders of each row with all stages")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables between the page's marks")
    parser.add_argument("--from-json", type=Path, nargs="+", help="join these files, simulate nothing")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()

    def done(found: dict[str, Any]) -> None:
        said = markdown(found["results"][-1:]) if found["results"] else compared(found["remedies"][-len(REMEDIES) :])
        progress.say(f"{said}{time.perf_counter() - begun:.0f} s")
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    if options.from_json:
        parts = [json.loads(file.read_text()) for file in options.from_json]
        found = {key: [row for part in parts for row in part.get(key, [])] for key in ("results", "remedies")}
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    else:
        with on_stderr(ticks=False) as progress:
            found = simulate(options.studies, options.whole, options.workers, done, progress)
    print(markdown(found["results"]), compared(found["remedies"]), sep="\n")
    if options.write:
        write(found, options.write)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
