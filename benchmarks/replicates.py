"""Repeat one small study with all seeds new, and compare the spread of its results with each study's own interval.

    python benchmarks/replicates.py [--replicates 12] [--output FOLDER] [--json FILE] [--write docs/protocol.md]

Each replicate is a whole study: search, calibration, confirm stage and verdict. The study key `replicate` gives it
seeds that no other replicate has. The text and its splits are the same. The trials of a replicate train one after the
other in this process. An interrupted run goes on where it stopped.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from simulation.work import run

from analysis.io.study import load
from analysis.io.trials import confirm_rows
from analysis.io.write import write_whole
from analysis.verdict.decide import decide
from tune.backend.inline import Inline
from tune.plan.progress import on_stderr
from tune.study.files import parse
from tune.sweep import sweep

STUDY = """
name: replicate-{number}
replicate: {number}
question: How much do the results of one study vary if it is repeated?
tokenizer: {{vocab_size: 300}}
model: {{n_layer: 1, d_model: 32, n_head: 2, n_ctx: 32, initializer_range: 0.1}}
fixed: {{tokens: 40_960, batch_tokens: 512, eval_windows: 128, eval_every: 40}}
nuisance: {{lr: {{loguniform: [2.0e-3, 3.0e-2]}}}}
arms:
  gelu: {{baseline: true}}
  relu2: {{unit: relu2}}
  paglu-searched: {{gate: sigmoid, alpha: {{search: {{uniform: [0.0, 2.0]}}}}}}
search: {{trials_per_arm: 3}}
calibrate: {{points: 3, seeds: 2, max_points: 5}}
confirm: {{seeds: 6}}
keep: {{models: none}}
"""
START, END = "<!-- replicates: start -->", "<!-- replicates: end -->"


@dataclass(frozen=True)
class Repeated:
    """Result of one arm in one replicate.

    Attributes:
        replicate: Number of the replicate.
        arm: Name of the arm.
        verdict: Its verdict in words.
        improvement: Improvement over the baseline in percent.
        low: Lower end of its interval in percent.
        high: Upper end of its interval in percent.
        n: Number of confirm seeds.
        lr: Learning rate that was confirmed.
        alpha: Alpha that was confirmed; None if the arm has no fixed or searched one.
    """

    replicate: int
    arm: str
    verdict: str
    improvement: float
    low: float
    high: float
    n: int
    lr: float
    alpha: float | None


def repeat(number: int, output: Path) -> list[Repeated]:
    """Train a replicate, or what is missing of it, and return the result of each arm."""
    study = parse(STUDY.format(number=number), Path("replicate.yaml"))
    sweep(study, Path(), output, Inline())
    return results(number, output / study.name)


def results(number: int, folder: Path) -> list[Repeated]:
    """Return the result of each arm of a study that has ended."""
    study = load(folder)
    rows = confirm_rows(study.trials).groupby("arm").first()
    out = []
    for row in decide(study).comparisons:
        if row.interval is None or row.improvement_percent is None:
            raise ValueError(f"{folder}: {row.arm} has no interval: {row.why}")
        alpha = rows["alpha"].get(row.arm) if "alpha" in rows else None
        out.append(
            Repeated(
                number,
                row.arm,
                row.kind.replace("_", " "),
                row.improvement_percent,
                *row.interval,
                row.n,
                float(rows.loc[row.arm, "lr"]),
                None if alpha is None or not np.isfinite(alpha) else float(alpha),
            )
        )
    return out


def spread(rows: list[Repeated]) -> dict[str, Any]:
    """Compare the replicates of one arm: spread between studies, error within a study, and intervals that agree.

    `covered` is the share of ordered pairs of replicates in which the interval of the first has the estimate of the
    second. `covered_wanted` is that share if an interval described the whole spread: both estimates have the same
    error, so that their difference over `sqrt(2)` standard errors has Student's t distribution.
    """
    found = np.array([row.improvement for row in rows])
    half = np.array([(row.high - row.low) / 2 for row in rows])
    limits = np.array([stats.t.ppf(0.975, row.n - 1) for row in rows])
    sd, error = float(found.std(ddof=1)), float(np.sqrt(np.mean((half / limits) ** 2)))
    degrees = len(rows) - 1
    low, high = (sd * float(np.sqrt(degrees / stats.chi2.ppf(q, degrees))) for q in (0.975, 0.025))
    inside = [a.low <= b.improvement <= a.high for a in rows for b in rows if a is not b]
    wanted = [2 * stats.t.cdf(limit / np.sqrt(2), row.n - 1) - 1 for limit, row in zip(limits, rows, strict=True)]
    return {
        "mean": float(found.mean()),
        "sd": sd,
        "sd_low": low,
        "sd_high": high,
        "error": error,
        "covered": float(np.mean(inside)),
        "covered_wanted": float(np.mean(wanted)),
        "verdicts": Counter(row.verdict for row in rows),
    }


def markdown(rows: list[Repeated]) -> str:
    """Return the tables of the replicates."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    by_arm = {arm: [row for row in rows if row.arm == arm] for arm in arms}
    heads = [
        "arm",
        "studies",
        "mean improvement %",
        "sd between studies",
        "standard error within a study",
        "estimate in another study's interval",
        "the same, if the interval told all",
        "learning rates",
        "alphas",
        "verdicts",
    ]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * 6 + " --- | --- | --- |"]
    for arm, some in by_arm.items():
        s = spread(some)
        alphas = [row.alpha for row in some if row.alpha is not None]
        varied = f"{min(alphas):.2f} to {max(alphas):.2f}" if len(set(alphas)) > 1 else ""
        words = ", ".join(f"{word} {count}" for word, count in s["verdicts"].most_common())
        lines.append(
            f"| {arm} | {len(some)} | {s['mean']:+.2f} | {s['sd']:.2f} [{s['sd_low']:.2f}, {s['sd_high']:.2f}] "
            f"| {s['error']:.2f} | {100 * s['covered']:.0f}% | {100 * s['covered_wanted']:.0f}% "
            f"| {min(row.lr for row in some):.2g} to {max(row.lr for row in some):.2g} | {varied} | {words} |"
        )
    lines += ["", "| replicate | " + " | ".join(arms) + " |", "| ---: |" + " --- |" * len(arms)]
    for number in dict.fromkeys(row.replicate for row in rows):
        cells = [_cell(row) for row in rows if row.replicate == number]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Repeated) -> str:
    alpha = f", alpha {row.alpha:.2f}" if row.arm.endswith("searched") and row.alpha is not None else ""
    return f"{row.verdict}: {row.improvement:+.2f} [{row.low:+.2f}, {row.high:+.2f}]; lr {row.lr:.2g}{alpha}"


def write(rows: list[Repeated], page: Path) -> None:
    """Put the tables between the page's markers."""
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: needs the markers {START} and {END} once each")
    before, rest = text.split(START)
    page.write_text(f"{before}{START}\n{markdown(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the replicates, print their tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=12, help="number of studies")
    parser.add_argument("--output", type=Path, help="folder of the studies; a run goes on with what it has")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--from-json", type=Path, help="read this file, train nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the tables into this page")
    options = parser.parse_args(arguments)
    if options.from_json:
        rows = [Repeated(**row) for row in json.loads(options.from_json.read_text())]
    else:
        rows = []
        with tempfile.TemporaryDirectory() as temporary, on_stderr(ticks=False) as progress:
            for number in progress.each("replicates", range(1, options.replicates + 1)):
                begun = time.monotonic()
                rows += repeat(number, options.output or Path(temporary))
                progress.say(f"replicate {number}: {time.monotonic() - begun:.0f} s")
    print(markdown(rows))
    if options.json:
        write_whole(options.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.write:
        write(rows, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
