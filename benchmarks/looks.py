"""Measure what racing saves: draw the confirm stage of a baseline, a floor and six arms.

    python benchmarks/looks.py [--studies 200] [--json FILE] [--write docs/protocol.md]

Each stage is drawn three times from the same losses: with racing; with all arms going on until each is decided; and
with all arms going on until each is better or worse, no difference being tested at the cap only. `saved` compares the
first with the last. `benchmarks/decision_error.py` has the error rates of whole studies, added seeds included.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats
from simulation.confirm import confirm
from simulation.page import between
from simulation.work import run

from analysis.io.assemble import margin_in_nats
from analysis.io.write import write_whole
from analysis.stats import paired_tests, sequential
from analysis.stats.multiplicity import adjust
from tune.plan.progress import on_stderr
from tune.study.files import parse
from tune.study.study import Study

FIRST = 50_000  # seed of the first study
SIX = ("a", "b", "c", "d", "e", "f")
LOSS, SHARED, OWN = 3.3, 0.012, 0.0061  # nats: the baseline's loss, its noise by seed, that of a run
WAYS = ("racing", "all arms together", "TOST at the cap only")
MARGIN = 0.005  # share of the loss
MIXED = dict(zip(SIX, (-0.03, -0.012, 0.0, 0.0, 0.012, 0.03), strict=True))
EFFECTS = {  # nats above the baseline, and the margin as a share of the loss
    "no true differences": (dict.fromkeys(SIX, 0.0), MARGIN),
    "no true differences, a narrow margin": (dict.fromkeys(SIX, 0.0), MARGIN / 5),
    "mixed differences": (MIXED, MARGIN),
    "mixed differences, a narrow margin": (MIXED, MARGIN / 5),
    "all arms at the margin": (dict.fromkeys(SIX, MARGIN * LOSS), MARGIN),
}
STUDY = """
question: What does a look cost?
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 4096, batch_tokens: 64}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms: {baseline: {baseline: true}, floor: {gate: sigmoid, alpha: 0.0, floor: true}}
stages: [search, confirm]
"""


def raced(rule: str, gaps: dict[str, float], margin: float, seeds: range) -> dict[str, Any]:
    """Draw confirm stages with racing, without it, and without stopping for no difference; return counts of each."""
    content = yaml.safe_load(STUDY)
    content["arms"] |= {arm: {"gate": "sigmoid", "alpha": 0.5} for arm in SIX}
    studies = []
    for racing in (True, False):
        content["confirm"] = {"rule": rule, "racing": racing, "margin": f"{100 * margin:g}%"}
        studies.append(parse(yaml.safe_dump(content), Path("simulated.yaml")))
    true = {"baseline": 0.0, "floor": 0.15, **gaps}
    cells, wrong, same, decided = np.zeros((4, 3))
    for seed in seeds:
        draw, cap = np.random.default_rng([seed, 13]), studies[0].confirm.looks[-1]
        shared = SHARED * draw.standard_normal(cap)
        losses = {arm: LOSS + gap + shared + OWN * draw.standard_normal(cap) for arm, gap in true.items()}
        for i, study in enumerate([*studies, studies[0]]):
            kinds, trained = _confirm(study, losses) if i < 2 else _all_arms(study, losses)
            cells[i] += trained
            wrong[i] += any(kind == "better" and true[arm] >= 0 for arm, kind in kinds.items())
            wrong[i] += any(kind == "worse" and true[arm] <= 0 for arm, kind in kinds.items())
            same[i] += any(kind == "same" and abs(true[arm]) >= margin * LOSS for arm, kind in kinds.items())
            decided[i] += sum(kind != "undecided" for kind in kinds.values())
    n = len(seeds)
    counts = {"cells": cells / n, "wrong": wrong, "same": same, "decided": decided / n}
    return {"of": n, **{key: values.tolist() for key, values in counts.items()}}


def _all_arms(study: Study, losses: dict[str, np.ndarray]) -> tuple[dict[str, str], int]:
    """Return decisions and trials if all arms go on until each one is better or worse, and TOST is made at the cap."""
    confirm, looks = study.confirm, study.confirm.looks
    arms = [arm for arm in study.arms if arm != "baseline"]
    paths = {arm: sequential.path(losses["baseline"] - losses[arm], confirm.rule, looks, confirm.level) for arm in arms}
    for j, n in enumerate(looks):
        p = adjust([path[j]["p_anytime"] for path in paths.values()], "holm")
        if max(p) <= confirm.level or n == looks[-1]:
            words = {arm: "better" if paths[arm][j]["t"] > 0 else "worse" for arm in arms}
            margin = margin_in_nats(confirm.margin, float(losses["baseline"].mean()))
            d = {arm: (losses["baseline"] - losses[arm])[:n] for arm in arms}
            same = adjust([paired_tests.tost(x, margin)[0] for x in d.values()], "holm")
            for arm, own, q in zip(arms, p, same, strict=True):
                if own > confirm.level:
                    words[arm] = "same" if q <= confirm.level and n == looks[-1] else "undecided"
            return {arm: word for arm, word in words.items() if arm != "floor"}, n * len(study.arms)
    raise AssertionError


def _confirm(study: Study, losses: dict[str, np.ndarray]) -> tuple[dict[str, str], int]:
    """Run a confirm stage on known losses; return the decision on each arm but the floor, and the trials."""
    last, trials = confirm(study, losses)
    differ, same = (adjust([row[key] for row in last.values()], "holm") for key in ("p_anytime", "p_no_difference"))
    kinds = {}
    for arm, p, q in zip(last, differ, same, strict=True):
        word = "better" if last[arm]["t"] > 0 else "worse"
        kinds[arm] = word if p <= study.confirm.level else "same" if q <= study.confirm.level else "undecided"
    return {arm: kind for arm, kind in kinds.items() if arm != "floor"}, trials


def share(hits: float, of: int) -> str:
    """Return a share in percent with its 95% interval (Wilson 1927)."""
    interval = stats.binomtest(round(hits), of).proportion_ci(method="wilson")
    return f"{100 * hits / of:.1f}% [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def simulate(studies: int) -> list[dict[str, Any]]:
    """Draw the confirm stages of each rule and of each of `EFFECTS`; return their counts in the three ways."""
    rows = []
    with on_stderr() as progress:
        for rule, name in progress.each("rows simulated", product(("e-process", "obrien-fleming"), EFFECTS)):
            found = raced(rule, *EFFECTS[name], range(FIRST, FIRST + studies))
            rows.append({"name": f"{rule}, {name}", **found})
            progress.say(markdown(rows[-1:]).splitlines()[2])
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the counts as a table with a line for each way. Shares have their 95% interval."""
    lines = [
        "| six arms | studies | way | confirm trials | saved | errs | says no difference wrongly | arms decided |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        of, most = row["of"], row["cells"][-1]
        for way, cells, wrong, same, decided in zip(
            WAYS, *(row[key] for key in ("cells", "wrong", "same", "decided")), strict=True
        ):
            lines.append(
                f"| {row['name']} | {of} | {way} | {cells:.1f} | {100 * (1 - cells / most):.0f}% | {share(wrong, of)} "
                f"| {share(same, of)} | {decided:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Simulate the table, print it, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200, help="of each row")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--from-json", type=Path, help="read this file, simulate nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the table between the page's marks")
    options = parser.parse_args(arguments)
    rows = json.loads(options.from_json.read_text()) if options.from_json else simulate(options.studies)
    print(markdown(rows))
    if options.json:
        write_whole(options.json, json.dumps(rows, indent=1) + "\n")
    if options.write:
        between(options.write, "racing", markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
