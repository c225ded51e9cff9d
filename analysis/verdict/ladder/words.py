"""Word the verdict of a ladder: its rungs, the trend of each arm with its reasons, and the first lines of all."""

import re
from collections.abc import Sequence

from analysis.io.assemble import COMPUTE, RUNG, Study
from analysis.io.text import amount
from analysis.verdict import words
from analysis.verdict.kinds import Comparison, Result, Rung, Verdict
from analysis.verdict.ladder.kinds import ArmTrend, ComputeGain, Trend
from analysis.verdict.summary import Summary
from analysis.verdict.summary import summarise as of_study

LEAST = 3  # rungs of a trend
TIMES = 3.0  # factor of compute from which it is said as a multiple
FAMILY = "The adjusted p of a slope counts the trends alone: they are a family apart from the verdicts on the rungs."


def listed(parts: Sequence[object]) -> str:
    """Join words with commas, and the last with `and`."""
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last


def rungs_named(numbers: Sequence[int]) -> str:
    """Return rungs by their numbers: `rung 2`, `rungs 1 and 3`."""
    return f"rung{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


def rows_of(row: ArmTrend, rungs: Sequence[Rung], counted: bool = True) -> list[Comparison]:
    """Return the comparisons of an arm on the rungs that count, or on all that it ran, from the lowest."""
    return [
        each
        for rung in rungs
        for each in rung.result.every
        if (each.baseline, each.arm) == (row.baseline, row.arm) and (not counted or rung.rung in row.rungs)
    ]


def size(rung: Rung, axis: str = COMPUTE) -> str:
    """Return the size of a rung in words: parameters, tokens and compute, or the value of a table's column."""
    if axis not in (COMPUTE, RUNG):
        return f"{axis} {amount(rung.compute or 0.0)}"
    if "compute" in rung.sizes or axis == RUNG:  # the user's own training
        shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in rung.sizes.items()}
        return ", ".join(f"{key} {value}" for key, value in shown.items())
    said = [str(rung.sizes["study"])] if "study" in rung.sizes else []
    if rung.parameters:
        said.append(f"{amount(rung.parameters)} parameters")
    elif not rung.compute:
        said += [f"{key} {value}" for key, value in rung.sizes.items()]
    said += [f"{amount(rung.tokens)} tokens"] if rung.tokens else []
    said += [f"{rung.compute:.2g} FLOPs"] if rung.compute else []
    return ", ".join(said)


def say(row: ArmTrend, rungs: Sequence[Rung], study: Study) -> None:
    """Set the sentence and the reasons of a decided trend.

    Args:
        row: The trend.
        rungs: The rungs of the ladder.
        study: Its study.
    """
    rows = rows_of(row, rungs)
    whole = rows_of(row, rungs, counted=False)
    behind = bool(whole) and all((each.improvement_percent or 0.0) < 0 for each in whole)
    steep, by = _slope(row, 1), _slope(row, 1 if row.trend is Trend.GROWS else -1)
    if row.trend is Trend.TURNS:
        better, worse = (_where(row, rungs, kind) for kind in (Verdict.BETTER, Verdict.WORSE))
        row.said = f"turns: better on {rungs_named(better)}, worse on {rungs_named(worse)}"
    elif row.trend is Trend.GROWS:
        row.said = f"grows by {by}" + (", but it is behind on every rung and merely loses less" if behind else "")
    elif row.trend is Trend.SHRINKS:
        row.said = f"shrinks by {by}" + (", and it is behind on every rung" if behind else "")
    elif row.trend is Trend.HOLDS:
        each = words.headline(rows[0], study.margin, study.unit)
        row.said = f"holds on {len(rows)} rungs: {each} on each"
    else:
        row.said = _open(row, steep)
    why = _reasons(row, rungs, study)
    if steep and steep not in row.said and row.trend in (Trend.TURNS, Trend.HOLDS, Trend.UNDECIDED):
        why.insert(0, f"slope {steep}")
    if row.p_adjusted is not None:
        why.append(f"adjusted p of the slope = {row.p_adjusted:.3g} ({study.correction}), level {row.level:g}")
    gains = [gain for gain in rungs[-1].gains if (gain.baseline, gain.arm) == (row.baseline, row.arm)] if rungs else []
    why += [f"on rung {rungs[-1].rung} {said}" for gain in gains if (said := worth(gain))]
    if rungs:
        why.append(f"nothing is claimed beyond rung {rungs[-1].rung}")
    row.why = "; ".join(why)


def _slope(row: ArmTrend, sign: int) -> str:
    # the slope with its interval, or with a fall as a positive number
    if row.slope is None or row.slope_low is None or row.slope_high is None:
        return ""
    low, high = sorted((sign * row.slope_low, sign * row.slope_high))
    plus = "+" if row.trend not in (Trend.GROWS, Trend.SHRINKS) else ""
    number = f"{sign * row.slope:{plus}.3g} [{low:{plus}.3g}, {high:{plus}.3g}]"
    return f"{number} points per {row.axis if row.axis == RUNG else f'doubling of {row.axis}'}"


def _open(row: ArmTrend, steep: str) -> str:
    if row.dropped_after:
        return f"undecided: dropped after rung {row.dropped_after}, worse on two rungs"
    if len(row.rungs) < LEAST and not steep:
        many = (
            rungs_named(row.rungs) + (" counts" if len(row.rungs) == 1 else " count") if row.rungs else "no rung counts"
        )
        return f"undecided: {many}, and a trend needs three or more sizes"
    return f"undecided ({steep})" if steep else "undecided"


def _reasons(row: ArmTrend, rungs: Sequence[Rung], study: Study) -> list[str]:
    # what limits the trend
    out = []
    for rung in rungs:
        each = next(iter(rows_of(row, [rung], counted=False)), None)
        if each is None and not rung.dropped:
            out.append(f"no run on rung {rung.rung}")
        elif each is not None and each.kind is Verdict.NOT_TESTABLE:
            stays = "; its noise is in the error of the slope" if row.slope is not None else ""
            out.append(f"the verdict on rung {rung.rung} does not count: {each.verdict}{stays}")
        elif each is not None and (lost := [*each.diverged_seeds_baseline, *each.diverged_seeds_arm]):
            runs = f"{len(lost)} run{'s' if len(lost) > 1 else ''}"
            out.append(f"no slope, because {runs} diverged on rung {rung.rung}: ranks decide there, and have no mean")
        elif each is not None and each.improvement_percent is None:
            out.append(f"no slope, because rung {rung.rung} has no percentage: the baseline's mean is not above zero")
    if row.dropped_after and row.trend is not Trend.UNDECIDED:
        out.append(f"dropped after rung {row.dropped_after}: the trend is that of the rungs it ran")
    ladder = study.ladder
    if ladder and len(row.rungs) >= LEAST and row.slope is None and not out:
        known = all(rung.compute for rung in rungs)
        out.append("no slope, because " + ("no run varies" if known else f"the {row.axis} is not known"))
    return out


def _where(row: ArmTrend, rungs: Sequence[Rung], kind: Verdict) -> list[int]:
    return [rung.rung for rung in rungs if any(each.kind is kind for each in rows_of(row, [rung]))]


def in_compute(gain: ComputeGain) -> str:
    """Return what an arm's loss is worth in compute, for a cell of a table: `+13.0% [8.1, 19.2]` or `4.1x [3.2, 5.3]`.

    It is "" if it is not known.
    """
    if (found := _in_compute(gain)) is None:
        return ""
    (low, value, high), times = found
    return f"{value:.3g}x [{low:.3g}, {high:.3g}]" if times else f"{value:+.1f}% [{low:.1f}, {high:.1f}]"


def _in_compute(gain: ComputeGain) -> tuple[tuple[float, float, float], bool] | None:
    # low, value and high as factors, if the factor is large (True), or in percent more compute; None if not known
    if gain.factor is None or gain.factor_low is None or gain.factor_high is None:
        return None
    low, value, high = gain.factor_low, gain.factor, gain.factor_high
    if value >= TIMES:
        return (low, value, high), True
    return (100 * (low - 1), 100 * (value - 1), 100 * (high - 1)), False


def worth(gain: ComputeGain) -> str:
    """State what an arm's loss is worth in training compute of the baseline; "" if it is not known."""
    if (found := _in_compute(gain)) is None:
        return ""
    (low, value, high), times = found
    if times:
        return f"worth {value:.3g} times the compute [{low:.3g}, {high:.3g}]"
    return words.worth_percent(low, value, high, "compute")


def summarise(study: Study, result: Result) -> Summary:
    """Return the verdict of a ladder in words: the trend of each arm, then its rungs.

    Args:
        study: The study with the ladder.
        result: Its verdict, with rungs and trends.
    """
    ladder = study.ladder
    assert ladder is not None
    each = tuple(_rung(rung, own, ladder.axis) for rung, own in zip(result.rungs, ladder.rungs, strict=True))
    if result.unfinished:
        done = tuple(said for said, rung in zip(each, result.rungs, strict=True) if not rung.result.unfinished)
        head = f"Unfinished: {result.unfinished}. No trend is stated before the last rung has ended."
        ended = [rung for rung in result.rungs if not rung.result.unfinished]
        return Summary(head, [], " ".join(brief(rung, ladder.axis) for rung in ended), done)
    top = result.rungs[-1]
    said = of_study(top.result.every, ladder.rungs[-1], top.result.sensitivity, "")
    verdicts = dict(zip([row.label for row in top.result.in_question], said.parts, strict=bool(said.parts)))
    parts = []
    for row in result.trends:
        trend = row.trend if row.trend is Trend.UNDECIDED and not row.dropped_after else row.said
        parts.append(f"{verdicts.get(row.label, row.label)}; trend: {trend}")
    largest = size(top, ladder.axis).split(",")[0]
    over = f"Largest of {len(result.rungs)} rungs{f': {largest}' if largest else ''}; nothing is claimed beyond it"
    joint = f", with one correction ({study.correction}) over the arms of all rungs at level {ladder.level:g}"
    below = [brief(rung, ladder.axis) for rung in result.rungs[:-1]]
    head = f"{over}{joint if ladder.joint else ''}. {said.head}"
    return Summary(head, parts, " ".join([said.after, *below]).strip(), each)


def brief(rung: Rung, axis: str = COMPUTE) -> str:
    """Return the verdicts on a rung in one sentence: the arms by their verdict, and what warnings go with them."""
    rows = rung.result.in_question
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(row.kind.replace("_", " "), []).append(row.label)
    said = "; ".join(f"{kind}: {listed(labels)}" for kind, labels in kinds.items())
    if rows and all(row.refusal and row.refusal.of_floor for row in rows):
        said = str(rows[0].verdict)
    named = size(rung, axis).split(",")[0]
    where = f"Rung {rung.rung}" + (f" ({named})" if named else "")
    kinds_of = dict.fromkeys(re.findall(r"Warning: ([^:;(]+)", rung.result.summary))
    warned = f" Warned of: {listed([kind.strip(' .') for kind in kinds_of])}." if kinds_of else ""
    return f"{where}: {said}.{warned}"


def _rung(rung: Rung, study: Study, axis: str) -> str:
    # the verdict of one rung: its arms by their word, without the numbers, which the tables have
    result = rung.result
    part = of_study(result.every, study, result.sensitivity, result.unfinished)
    groups: dict[str, list[str]] = {}
    for row in result.in_question if part.parts else ():
        groups.setdefault(words.headline(row, study.margin, study.unit), []).append(row.label)
    said = "; ".join(f"{word}: {listed(arms)}" for word, arms in groups.items())
    return f"Rung {rung.rung} ({size(rung, axis)}): {Summary(part.head, [said] if said else [], part.after)}"
