"""The looks that a study took at its results, and the p of a comparison over all of them."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.io.assemble import Study, margin_or_zero
from analysis.io.trials import confirm_rows
from analysis.stats import estimates, sequential
from analysis.stats.pairs import Pairs, differences, pair
from analysis.verdict.comparison import bounds
from analysis.verdict.kinds import Comparison

MOST_SPENT = 20.0  # percent; with more looks, Bonferroni's bound is far above the true error rate


def paired(study: Study, losses: pd.DataFrame, reference: str, arm: str) -> Pairs:
    """Pair an arm with its reference by seed. Seeds after the last one of either are not left out: nobody planned them.

    Args:
        study: The study.
        losses: Its table of losses.
        reference: The baseline, or the first arm of a contrast.
        arm: The arm.
    """
    pairs = pair(losses, reference, arm, study.overlap)
    if not study.races:
        return pairs
    if not pairs.dropped_baseline and not pairs.dropped_arm:
        return pairs
    last = min(max(losses.index[losses[name].notna()], default=0) for name in (reference, arm))
    cut = [[seed for seed in seeds if seed <= last] for seeds in (pairs.dropped_baseline, pairs.dropped_arm)]
    return replace(pairs, dropped_baseline=cut[0], dropped_arm=cut[1])


def look(
    rows: Sequence[Comparison], paired: Mapping[tuple[str, str], Pairs], losses: pd.DataFrame, study: Study
) -> None:
    """Set the path of each comparison over the looks of its rule, and the p and the interval that follow from it.

    The level of the interval is the p at which the last look would stop this arm alone.

    Args:
        rows: The comparisons, measured on all their seeds.
        paired: Their losses by seed.
        losses: The study's table of losses.
        study: The study.
    """
    for row in rows:
        row.p_no_difference = None if row.p_worst_rank is not None else row.p_tost
    if not several(study) or study.unpaired:  # without pairs, the last look alone decides
        return
    there = order(study)
    margins = margins_at_looks(study, there, losses)
    for row in rows:
        d = in_order(there, losses, row.baseline, row.arm)
        row.path = sequential.path(d, study.rule, study.made, study.level, study.reserve, margins)
        if row.refused:
            continue
        last: dict[str, Any] = {"p_anytime": 1.0, "p_no_difference": None, "stops_at": 0.0}
        if row.path:
            last = row.path[-1]
        row.p_anytime = row.p_deciding = last["p_anytime"]
        row.p_no_difference = last["p_no_difference"]
        interval, pairs = None, paired[row.baseline, row.arm]
        if last["stops_at"] > 0 and row.p_t is not None:
            b, a = pairs.baseline[pairs.complete], pairs.arm[pairs.complete]
            interval = estimates.fieller(study.sign * b, study.sign * a, last["stops_at"])
        row.improvement_low, row.improvement_high = bounds(interval, study.sign)


def shares(study: Study) -> list[float]:
    """Return the share of the level that each look of the fixed rule has had."""
    return sequential.shares(study.reserve, len(study.made))


def next_share(study: Study) -> float:
    """Return the share of the level that a look at added seeds would have; 1 if the rule has no shares."""
    if study.table is not None or study.rule != "fixed" or not study.reserve:
        return 1.0
    return sequential.shares(study.reserve, len(study.made) + 1)[-1]


def level_lost(study: Study) -> str:
    """State that a rule has no level for the seeds that were added, or that a table lacks the rule; "" otherwise."""
    if study.table is not None and (study.table.looks or study.table.added):
        *first, last = map(str, study.table.looks or (0,))
        what = [f"looks at {', '.join(first)} and {last} seeds"] if first else []
        what += [f"arms that joined late ({', '.join(study.table.added)})"] if study.table.added else []
        return (
            f"These are trials of a study with {' and '.join(what)}: p is that of one look, and the level of "
            f"{100 * study.level:g}% does not hold; give the study's folder."
        )
    if study.table is not None or study.rule != "fixed" or study.reserve or len(study.made) < 2:
        return ""
    *first, last = map(str, study.made)
    level, spent = 100 * study.level, 100 * study.level * len(study.made)  # by Bonferroni's inequality
    share = f"up to {spent:g}%" if spent <= MOST_SPENT else f"more than {level:g}%"
    return (
        f"The level of {level:g}% no longer holds: seeds were added after a verdict, without a reserve. "
        f"With looks at {', '.join(first)} and {last} seeds, {share} of studies without a difference say better or "
        "worse."
    )


def beyond_bound(study: Study) -> str:
    """State that chosen numbers of seeds may err more often than a reserve's bound says; "" if its conditions hold."""
    if study.table is not None or study.rule != "fixed" or not study.reserve or len(study.made) < 2:
        return ""
    arms = len(study.comparisons) * 0.05 / study.level  # that have as low a level each at 5%
    if study.made[0] >= sequential.CLAIM_SEEDS and arms <= sequential.MOST_ARMS:
        return ""
    return (
        f"The level of {100 * study.level:g}% holds for numbers of seeds that were named in advance. Numbers that were "
        f"chosen by the results may err slightly more often: the first look had {study.made[0]} seeds (the bound asks "
        f"for {sequential.CLAIM_SEEDS}), and the family has {len(study.comparisons)} comparisons at a level of "
        f"{100 * study.level:g}% (it allows {sequential.MOST_ARMS} at 5%)."
    )


def not_of_slopes(study: Study) -> list[str]:
    """State what the test of a slope over training leaves out: the looks of the study, and its contrasts."""
    said = []
    if study.table is None and not study.unpaired and (study.rule != "fixed" or len(study.made) > 1):
        said.append(
            "The study had looks, and seeds were added or not by the difference of the losses. The test of a slope "
            "ignores the looks, so it may err more often than its level says."
        )
        said += [lost] if (lost := level_lost(study)) else []
    if study.contrasts:
        said.append("Contrasts are left out here: each arm is compared with the baseline.")
    return said


def several(study: Study) -> bool:
    """Return True if a study may have several looks: by its rule, its reserve or an extension."""
    return study.table is None and (study.rule != "fixed" or bool(study.reserve) or len(study.made) > 1)


@dataclass(frozen=True)
class Order:
    """The confirm seeds that any arm ran, in the planned order, and the number of them up to each arm's last one."""

    seeds: list[int]
    reached: dict[str, int]


def order(study: Study) -> Order:
    """Return the order of a study's seeds, those of failed machines too."""
    last = confirm_rows(study.trials).groupby("arm")["seed"].agg(["max", "unique"])
    seeds = sorted({int(seed) for each in last["unique"] for seed in each})
    return Order(seeds, {arm: bisect.bisect_right(seeds, last["max"].get(arm, -1)) for arm in study.arms})


def in_order(there: Order, losses: pd.DataFrame, reference: str, arm: str) -> np.ndarray:
    """Return the differences of two arms in the order of the seeds, up to the last one that both reached.

    A seed on which a machine failed is NaN. A diverged run makes an infinite difference.
    """
    seeds = there.seeds[: min(there.reached[reference], there.reached[arm])]
    b, a = (losses[name].reindex(seeds).to_numpy(float) for name in (reference, arm))
    return differences(b, a)


def margins_at_looks(study: Study, there: Order, losses: pd.DataFrame) -> list[float]:
    """Return the margin at each look, in nats. A percentage is one of the baseline's mean over the seeds until then."""
    baseline = losses[study.baseline].reindex(there.seeds).to_numpy(float)
    return sequential.margins(
        lambda mean: margin_or_zero(study.margin, study.sign * mean, study.name), baseline, study.made
    )


def to_come(study: Study, there: Order, looks: tuple[int, ...]) -> dict[str, int]:
    """Return the number of seeds up to which each arm that goes on has to run, by the rule; empty if none does.

    Args:
        study: The study.
        there: Its seeds.
        looks: Numbers of seeds at the looks, with those to come.
    """
    losses = study.losses()
    return sequential.further(
        {arm: losses[arm].reindex(there.seeds[:n]).to_numpy(float) for arm, n in there.reached.items()},
        study.baseline,
        study.comparisons,
        looks,
        lambda mean: margin_or_zero(study.margin, study.sign * mean, study.name),
        rule=study.rule,
        level=study.level,
        correction=study.correction,
        reserve=study.reserve,
        racing=(study.settings.get("confirm") or {}).get("racing") is not False and not study.unpaired,
    )
