"""Bound how often a study with a reserve errs, if every number of added seeds is chosen to the best effect.

    python benchmarks/reserve.py [--json FILE] [--write docs/protocol.md]

Dynamic programming over the statistic z of one arm that equals the baseline, for normal differences of a known
variance. Somebody sees z at each look and takes, of all larger numbers of seeds up to the cap, the one that leads to an
error most often. `one arm` is the chance that some look stops. Holm's correction tests the smallest p at
level / arms, so `16 arms` is at most 16 times the chance of one arm at a sixteenth of the level, however the arms
depend on each other. So is every other number of arms.
"""

import argparse
import json
import sys
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special, stats
from simulation.page import between

from analysis.io.write import write_whole
from analysis.stats.sequential import shares

LEVEL = 0.05
Z = np.linspace(-6.0, 6.0, 601)  # grid of the statistic
STEPS = np.linspace(-5.5, 5.5, 221)  # of its growth, in standard deviations
WEIGHTS = stats.norm.pdf(STEPS) / stats.norm.pdf(STEPS).sum()
NUMBERS = 26  # of seeds that may be chosen, evenly apart on a logarithmic scale
RESERVES, FIRST, CAPS, ARMS = (0.2, 0.25), (8, 6, 3), (100, 100_000), (1, 16, 48)


@lru_cache(maxsize=1024)
def _grown(ratio: float) -> np.ndarray:
    """Return z after the seeds have grown by a ratio, from each z of the grid by each of the steps."""
    return Z[:, None] / np.sqrt(ratio) + np.sqrt(1 - 1 / ratio) * STEPS


def chance(reserve: float, first: int, cap: int, level: float = LEVEL, looks: int = 4) -> float:
    """Return the largest chance that an arm without a difference is declared different at some look.

    Args:
        reserve: Share of the level that is kept for added seeds.
        first: Seeds of the first look.
        cap: Largest number of seeds.
        level: Level of the arm, after the correction for several arms.
        looks: Number of looks.
    """
    limits = stats.norm.isf(level / 2 * np.array(shares(reserve, looks)))
    numbers = sorted({first, *np.unique(np.round(np.geomspace(first + 1, cap, NUMBERS)).astype(int))})
    value = {n: np.zeros_like(Z) for n in numbers}  # chance of a stop at a later look, by z at a look of n seeds
    for look in range(looks - 1, 0, -1):
        after, value = value, {n: np.zeros_like(Z) for n in numbers}
        for n, more in product(numbers if look > 1 else [first], numbers):
            if more > n:
                grown, mean, sd = _grown(more / n), Z * np.sqrt(n / more), np.sqrt(1 - n / more)
                now = special.ndtr((mean - limits[look]) / sd) + special.ndtr((-mean - limits[look]) / sd)
                later = np.where(np.abs(grown) < limits[look], np.interp(grown, Z, after[more]), 0.0) @ WEIGHTS
                value[n] = np.maximum(value[n], now + later)
    later = np.where(np.abs(Z) >= limits[0], 0.0, value[first]) @ stats.norm.pdf(Z) * (Z[1] - Z[0])
    return float(2 * stats.norm.sf(limits[0]) + later)


def bounds() -> list[dict[str, Any]]:
    """Return the bound for each reserve, first look and cap, by the number of arms."""
    rows = []
    for reserve, cap, first in product(RESERVES, CAPS, FIRST):
        if cap == CAPS[0] or first == FIRST[0]:
            found = {str(arms): arms * chance(reserve, first, cap, LEVEL / arms) for arms in ARMS}
            rows.append({"reserve": reserve, "first": first, "cap": cap, **found})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the bounds as a table."""
    heads = [f"{m} arm{'s' if m > 1 else ''}" for m in ARMS]
    lines = [f"| reserve | first look at | at most | {' | '.join(heads)} |"]
    lines.append("| ---: | ---: | ---: |" + " ---: |" * len(ARMS))
    for row in rows:
        most = f"{row['cap']} seeds" if row["cap"] == CAPS[0] else "any number"
        found = " | ".join(f"{100 * row[str(m)]:.2f}%" for m in ARMS)
        lines.append(f"| {row['reserve']:g} | {row['first']} seeds | {most} | {found} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compute the table, print it, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the table into this page")
    options = parser.parse_args(arguments)
    rows = bounds()
    print(markdown(rows))
    if options.json:
        write_whole(options.json, json.dumps(rows, indent=1) + "\n")
    if options.write:
        between(options.write, "reserve", markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
