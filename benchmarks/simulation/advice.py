"""Follow the advice that the terminal prints after a verdict, literally, until it has none left."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis.verdict.kinds import Result
from tune.cli.next_steps import ANOTHER, to_change
from tune.run.ledger import MemoryLedger
from tune.study.files import parse
from tune.study.study import Study

CHANGE = re.compile(r"([a-z]+)\.([a-z_]+): (\d+) -> (\d+)")
MOST = 12  # verdicts of one study; the advice ends long before


@dataclass(frozen=True)
class Shown:
    """A verdict that was shown, and the study that it is of."""

    study: Study
    result: Result
    trials: int


def follow(
    study: Study,
    decide: Callable[[Study, MemoryLedger], tuple[Result, int]],
    advice: Callable[[Result, Study], list[str]] = to_change,
) -> list[Shown]:
    """Return every verdict that is shown to somebody who follows the first line of advice, again and again.

    Args:
        study: The study.
        decide: Runs a study on a ledger, of which earlier looks may have written a part; returns its verdict and the
            number of its trials.
        advice: Returns the lines of advice after a verdict.
    """
    ledger, shown = MemoryLedger(), list[Shown]()
    while len(shown) < MOST:
        result, trials = decide(study, ledger)
        shown.append(Shown(study, result, trials))
        lines = [line for line in advice(result, study) if CHANGE.search(line)]
        if not lines:
            return shown
        content: dict[str, Any] = yaml.safe_load(yaml.safe_dump(study.model_dump(exclude_none=True)))
        for section, key, before, after in CHANGE.findall(lines[0]):
            if content[section].get(key, int(before)) != int(before):  # a default cap is not in the file
                raise ValueError(f"{lines[0]}: the study has {content[section][key]}")
            content[section][key] = int(after)
        if ANOTHER in lines[0]:
            ledger, content["name"] = MemoryLedger(), f"{study.name}-2"
        study = parse(yaml.safe_dump(content), Path("followed.yaml"))
    raise ValueError(f"{MOST} verdicts, and still advice: {lines[0]}")
