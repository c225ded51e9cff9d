"""Results of the simulated studies as Markdown tables and a figure."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from simulation.world import LOSS, NULLS, ODD, USUAL_SEEDS

from analysis.io.write import write_whole
from analysis.report import palette, plots

# rows that may err more often than promised, because the runs of one arm are distributed differently
WARNED = [scenario.name for scenario in (*NULLS, *ODD) if scenario.spikes or scenario.noisier]


def percent(share: dict[str, Any] | None, digits: int = 1) -> str:
    if share is None or share["share"] is None:
        return "-"
    value, low, high = (f"{100 * share[key]:.{digits}f}" for key in ("share", "low", "high"))
    return f"{value}% [{low}, {high}]"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the tables of the results."""
    lines = [
        "| no true difference | studies | says better or worse | chance of it, given the choices "
        "| usual practice does | with Holm | interval covers | tuning trials | mean seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        if r["scenario"]["null"]:
            lines.append(
                f"| {r['scenario']['name']} | {r['studies']} | {percent(r['family_error'])} "
                f"| {percent(r['family_error_expected'], 2)} | {percent(r['family_error_usual'])} "
                f"| {percent(r['family_error_usual_holm'])} | {percent(r['coverage'])} "
                f"| {_mean(r['mean_tuning_trials'])} | {_mean(r['mean_seeds'])} |"
            )
    blind = [r for r in results if r["scenario"]["floor_gap"] == 0]
    lines += [""] + [
        f"Where {r['scenario']['name']}, {percent(r['not_testable'])} of {r['studies']} studies end as not testable."
        for r in blind
    ]
    odd = [r for r in results if r["scenario"]["name"] in WARNED and r["errors_warned"]]
    lines += [
        f"With `{r['scenario']['name']}`, {percent(r['warned'])} of the studies warn of runs far from the rest, and "
        f"{percent(r['errors_warned'])} of those that err."
        for r in odd
    ]
    several = [r for r in results if not r["scenario"]["null"] and r["scenario"]["more"]]
    effects = [r for r in results if not r["scenario"]["null"] and not r["scenario"]["more"]]
    if effects:
        gaps = effects[0]["scenario"]["gaps"]
        heads = [f"finds {-100 * gap / LOSS:+.1f}%" for gap in gaps.values()]
        heads = ["true differences", "studies", *heads, "wrong direction", "interval covers", "mean seeds"]
        lines += ["", "| " + " | ".join(heads) + " |"]
        lines.append("| --- |" + " ---: |" * (len(heads) - 1))
        for r in effects:
            found = " | ".join(percent(share) for share in r["power"].values())
            lines.append(
                f"| {r['scenario']['name']} | {r['studies']} | {found} | {percent(r['wrong_direction'])} "
                f"| {percent(r['coverage'])} | {r['mean_seeds']:.1f} |"
            )
        usual = " | ".join(percent(share) for share in effects[0]["power_usual"].values())
        lines.append(
            f"| usual practice, on the first row's trials | {effects[0]['studies']} | {usual} | - | - | {USUAL_SEEDS} |"
        )
    if several:
        heads = ["many arms", "studies", "finds a difference", "calls an equal arm different", "confirm trials"]
        lines += ["", "| " + " | ".join(heads) + " |", "| --- | ---: | ---: | ---: | ---: |"]
        for r in several:
            found = sum(share["share"] for share in r["power"].values()) / len(r["power"])
            lines.append(
                f"| {r['scenario']['name']} | {r['studies']} | {100 * found:.1f}% | {percent(r['family_error'])} "
                f"| {_mean(r['mean_confirm_trials'])} |"
            )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]]) -> Figure:
    """Draw the family-wise error of each null scenario with its interval, for this protocol and for usual practice.

    This protocol's is the chance given the choices if it is known, which is the closer one.
    """
    nulls = [r for r in results if r["scenario"]["null"] and r["scenario"]["floor_gap"] > 0]
    fig = Figure(figsize=(7.2, 1.4 + 0.42 * len(nulls)))
    ax = fig.subplots()
    ax.axvline(5, color=palette.INK, lw=1, ls="--")
    for y, r in enumerate(nulls):
        ours = not r["scenario"]["name"].startswith("grid's best")
        for key, colour, marker, shift in (
            ("family_error_expected", palette.COLOURS[0] if ours else palette.COLOURS[4], "o", -0.12),
            ("family_error_usual", palette.COLOURS[1], "s", 0.12),
        ):
            share = r[key] or r["family_error"]
            ax.plot([100 * share["low"], 100 * share["high"]], [y + shift] * 2, color=colour, lw=2)
            ax.plot([100 * share["share"]], [y + shift], marker, color=colour, ms=5)
    ax.set_yticks(range(len(nulls)), [r["scenario"]["name"] for r in nulls])
    ax.set_ylim(len(nulls) - 0.4, -0.6)
    highest = max(r[key]["high"] for r in nulls for key in ("family_error", "family_error_usual"))
    ax.set_xlim(0, min(100, 100 * highest + 5))
    ax.set_xlabel("studies that call an equal arm better or worse (%); dashed: the promised 5%")
    entries = [
        ax.plot([], [], marker, color=colour, label=label)[0]
        for marker, colour, label in (
            ("o", palette.COLOURS[0], "this protocol"),
            ("o", palette.COLOURS[4], "with the grid's best point"),
            ("s", palette.COLOURS[1], "usual practice"),
        )
    ]
    ax.legend(handles=entries, loc="upper center", bbox_to_anchor=(0.4, -0.6 / (1.4 + 0.42 * len(nulls))), ncols=3)
    return fig


def between(page: Path, name: str, table: str) -> None:
    """Put a table between the marks of a name in a page."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: needs the markers {start} and {end} once each")
    before, rest = text.split(start)
    write_whole(page, f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}")


def write(results: list[dict[str, Any]], page: Path) -> None:
    """Put the tables between the page's markers and the figure beside it."""
    between(page, "decision_error", markdown(results))
    figure = page.parent / "img" / "decision_error.svg"
    figure.parent.mkdir(exist_ok=True)
    figure.write_bytes(plots.render(plots.styled(draw, results), salt="decision_error"))
