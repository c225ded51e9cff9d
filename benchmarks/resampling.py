"""Measure how often a test over splits of one data set errs, with and without the corrected variance.

    python benchmarks/resampling.py [--studies 2000] [--json FILE] [--write docs/protocol.md]

Two learners are equally good in truth: one sees the first half of the features, the other the second half, and both
halves have the same part in the labels. A study draws a data set, splits it by each seed, trains both learners on each
split, and tests their difference. `wrong` counts the studies that find one.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from looks import share
from simulation.page import between
from simulation.work import run

from analysis.io.write import write_whole
from analysis.stats.paired_tests import paired_t
from tune.plan.progress import on_stderr

FEATURES, NEIGHBOURS, LEVEL = 5, 5, 0.05  # features of each learner


@dataclass(frozen=True)
class Setting:
    """Design of the studies of one row of the table.

    Attributes:
        name: What the seeds do.
        learner: "least squares" or "5 nearest neighbours".
        rows: Size of the data set.
        test_share: Share of the data in the test set.
        train_share: Share of the data that trains.
        splits: Number of seeds.
        how: "splits" of one data set, its "folds", or "fresh" data for each seed.
    """

    name: str
    learner: str
    rows: int
    test_share: float
    train_share: float
    splits: int
    how: str = "splits"

    @property
    def overlap(self) -> float:
        """Size of a test set, divided by that of its training set."""
        return self.test_share / self.train_share


SQUARES, NEAREST = "least squares", f"{NEIGHBOURS} nearest neighbours"
SETTINGS = (
    Setting("fresh data for each seed", SQUARES, 200, 0.2, 0.8, 10, "fresh"),
    Setting("splits of one data set", SQUARES, 200, 0.2, 0.8, 5),
    Setting("splits of one data set", SQUARES, 200, 0.2, 0.8, 10),
    Setting("splits of one data set", SQUARES, 200, 0.2, 0.8, 30),
    Setting("splits of one data set", SQUARES, 1000, 0.2, 0.8, 10),
    Setting("splits of one data set", SQUARES, 200, 0.1, 0.9, 10),
    Setting("splits of one data set", SQUARES, 200, 0.5, 0.5, 10),
    Setting("splits with a validation set", SQUARES, 200, 0.2, 0.6, 10),
    Setting("the ten folds of one data set", SQUARES, 200, 0.1, 0.9, 10, "folds"),
    Setting("splits of one data set", NEAREST, 200, 0.2, 0.8, 10),
    Setting("splits of one data set", NEAREST, 200, 0.2, 0.8, 30),
    Setting("splits of one data set", NEAREST, 1000, 0.2, 0.8, 10),
)


def drawn(
    setting: Setting, draw: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the features, the labels, and the rows that train and test, of each seed of a study."""
    rows, tested = setting.rows, round(setting.test_share * setting.rows)
    order = draw.permutation(rows)
    for seed in range(setting.splits):
        if seed == 0 or setting.how == "fresh":
            x = draw.normal(size=(rows, 2 * FEATURES))
            y = x.sum(1) / np.sqrt(2 * FEATURES) + draw.normal(size=rows)
        order = np.roll(order, tested) if setting.how == "folds" else draw.permutation(rows)
        yield x, y, order[tested : tested + round(setting.train_share * rows)], order[:tested]


def loss(learner: str, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Train a learner; return its mean squared error on the test rows, or its share of wrong signs."""
    if learner == SQUARES:
        weights = np.linalg.lstsq(x[train], y[train], rcond=None)[0]
        return float(np.mean((x[test] @ weights - y[test]) ** 2))
    apart = ((x[test][:, None] - x[train]) ** 2).sum(2)
    nearest = np.argpartition(apart, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    return float(np.mean(np.sign(np.sign(y[train])[nearest].sum(1)) != np.sign(y[test])))


def simulate(setting: Setting, studies: int) -> dict[str, Any]:
    """Return the numbers of studies that find a difference, with the plain and with the corrected variance."""
    wrong = {"plain": 0, "corrected": 0}
    for study in range(studies):
        draw = np.random.default_rng([study, 29])
        pairs = [
            [loss(setting.learner, part, y, train, test) for part in (x[:, :FEATURES], x[:, FEATURES:])]
            for x, y, train, test in drawn(setting, draw)
        ]
        d = np.subtract(*np.transpose(pairs))
        if not np.ptp(d):
            continue
        wrong["plain"] += paired_t(d)[2] <= LEVEL
        wrong["corrected"] += paired_t(d, setting.overlap)[2] <= LEVEL
    return {"setting": asdict(setting), "of": studies, "wrong": {key: int(n) for key, n in wrong.items()}}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the counts as a table. Shares have their 95% interval."""
    lines = [
        "| seeds | learner | rows | test / train | seeds | errs with s^2 / n | errs with (1/n + test / train) s^2 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        s, of = Setting(**row["setting"]), row["of"]
        plain, corrected = (share(row["wrong"][key], of) for key in ("plain", "corrected"))
        corrected = "-" if s.how == "fresh" else corrected
        lines.append(f"| {s.name} | {s.learner} | {s.rows} | {s.overlap:.3g} | {s.splits} | {plain} | {corrected} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Simulate the table, print it, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="of each row")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the table between the page's marks")
    options = parser.parse_args(arguments)
    rows = []
    with on_stderr() as progress:
        for setting in progress.each("rows simulated", SETTINGS):
            rows.append(simulate(setting, options.studies))
            progress.say(markdown(rows[-1:]).splitlines()[2])
    if options.json:
        write_whole(options.json, json.dumps(rows, indent=1) + "\n")
    if options.write:
        between(options.write, "resampling", markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
