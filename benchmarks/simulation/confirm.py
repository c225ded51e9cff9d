"""The confirm stage of a sequential rule on known losses."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.io.assemble import margin_in_nats
from analysis.stats import sequential
from analysis.stats.pairs import differences
from tune.decide.confirm import Confirmation
from tune.study.study import Study


def confirm(study: Study, losses: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, Any]], int]:
    """Run a confirm stage; return the last look of each arm but the baseline (`sequential.path`), and the trials.

    Args:
        study: The study, whose baseline is named `baseline`.
        losses: Test losses of each arm in nats, by number of the seed; as many as the rule's cap.
    """
    stage, section = Confirmation(study, lambda *event, **fields: None), study.confirm
    seen: dict[str, list[float]] = {arm: [] for arm in study.arms}
    cells = stage.begin({arm: {"lr": 1e-3} for arm in study.arms})
    while cells:
        for cell in cells:
            loss = float(losses[cell.arm][cell.seed - section.first_seed])
            stage.record(cell, loss)
            seen[cell.arm].append(loss)
        cells = stage.extend()
    base = np.array(seen.pop("baseline"))
    bands = sequential.margins(lambda mean: margin_in_nats(section.margin, mean), base, stage.looks)
    last = {
        arm: sequential.path(
            differences(base[: len(values)], np.array(values)), section.rule, stage.looks, section.level, 0.0, bands
        )[-1]
        for arm, values in seen.items()
    }
    return last, len(base) + sum(map(len, seen.values()))
