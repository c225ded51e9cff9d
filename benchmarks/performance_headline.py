"""State H, the core-hours to a verdict, and its levers on the page of `performance.py`."""

from collections.abc import Mapping
from typing import Any


def lines(found: Mapping[str, Any], by: str) -> list[str]:
    """Return the section of the page. `by` names the command and the machine."""
    facts, rows, promise = found["facts"], found["rows"], found["promise"]
    before, now = rows[0], rows[-1]
    worlds = promise["worlds"]
    out = [
        "## H: core-hours to a verdict",
        "",
        f"**H = {now['core_hours']:.2f} core-hours**, {now['core_hours'] / before['core_hours']:.2f} times the "
        f"{before['core_hours']:.2f} before. H is the cost of a study of a baseline, a floor and six arms that finds "
        f"an arm that is {promise['gap']:.1%} better with a power of {promise['power']:.0%}, and that calls equal arms "
        f"different in at most {promise['level']:.0%} of studies. It has as few confirm seeds as give that power.",
        "",
        f"{by} It simulates {found['studies']:,} studies of each row, with what {' and '.join(promise['studies'])} "
        f"show: the difference to the baseline on one seed has a standard deviation of {facts['difference_sd']:.2%} of "
        f"the loss, a learning rate off by a factor e costs {facts['curvature']:.1%}, the arms' best rates spread by "
        f"{facts['optima_sd']:.2f} in log, the floor is {facts['floor_gap']:.1%} behind, and a trial of "
        f"{facts['tokens']:,.0f} tokens takes {facts['seconds']:.0f} s of a core, start and evaluations included. No "
        "arm has a search of its own.",
        "",
        "The stages are in whole trials. Each lever is alone, except in the last two rows. `most errors` are those of "
        f"studies in which all arms are equal, in the worst of {len(worlds)} worlds ({'; '.join(worlds)}), with a 95% "
        "interval. A lever counts if its errors may be 5%. Of sequential rules the caps 7, 8, 10 and 12 were tried.",
        "",
        "| design | search | calibrate | confirm | trials | seeds | power | core-hours | most errors | counts |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        parts = row["trials"]
        name, (share, low, high) = max(row["errors"].items(), key=lambda item: item[1][0])
        out.append(
            f"| {row['name']} | {parts['search']:.1f} | {parts['calibrate']:.1f} | {parts['confirm']:.1f} "
            f"| {sum(parts.values()):.1f} | {row['seeds']} | {row['power']:.0%} | {row['core_hours']:.2f} "
            f"| {100 * share:.1f}% [{100 * low:.1f}, {100 * high:.1f}] ({name}) | {'yes' if row['counts'] else 'no'} |"
        )
    return out
