"""Show what the kept models write: how each arm's continues the same beginnings of validation text.

`pagating.tasks.samples` says how they are made. Nothing is tested.
"""

from dataclasses import dataclass

from analysis.io.assemble import Study
from analysis.io.files import TableError

COLUMNS = ("arm", "prompt", "beginning", "text", "greedy", "sampled")


@dataclass(frozen=True)
class Continued:
    """Two continuations by one model: its likeliest token at each place, and tokens drawn from its distribution."""

    arm: str
    greedy: str
    sampled: str


@dataclass(frozen=True)
class Sample:
    """A beginning of validation text, how the text itself goes on, and how each arm's model does."""

    beginning: str
    text: str
    arms: list[Continued]


def by_prompt(study: Study) -> list[Sample]:
    """Return the samples of a study by prompt, each with the arms in the study's order, the baseline first.

    Raises TableError if the table of samples lacks a column or has an unknown arm.
    """
    table, source = study.samples, f"{study.folder}/samples.parquet"
    if not len(table):
        return []
    for name in COLUMNS:
        if name not in table.columns:
            raise TableError(f"{source}: column {name} is missing; it has {', '.join(map(str, table.columns))}")
    if unknown := sorted(set(table["arm"].astype(str)) - set(study.arms)):
        raise TableError(f"{source}: column arm has {unknown[0]!r}; allowed: {', '.join(study.arms)}")
    arms = [study.baseline, *(arm for arm in study.arms if arm != study.baseline)]
    out = []
    for _, mine in table.groupby("prompt", sort=True):
        first, rows = mine.iloc[0], {row["arm"]: row for row in mine.to_dict("records")}
        continued = [Continued(arm, rows[arm]["greedy"], rows[arm]["sampled"]) for arm in arms if arm in rows]
        out.append(Sample(str(first["beginning"]), str(first["text"]), continued))
    return out
