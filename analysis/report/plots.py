"""Draw figures as SVG, to be read on a dark and on a light page; the same table gives the same bytes.

Text and axes have one colour, which `inline` replaces by the text colour of the page.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from analysis.describe.alphas import alpha_columns, arms_with_alphas
from analysis.describe.curves import SCALES, confirm_curves
from analysis.io.assemble import COMPUTE, RUNG, Study
from analysis.io.trials import confirm_rows
from analysis.report.palette import INK, colour_of
from analysis.verdict.grids import grid_rows, grids, ranges
from analysis.verdict.kinds import Comparison, Result
from analysis.verdict.ladder.words import rows_of
from analysis.verdict.words import called

Source = TypeVar("Source")
MARKERS = "sD^vP<>Xph*"  # tell arms apart in grey print; the baseline has the dot
WIDTH = 5.8  # inches of every figure: its 10 pt text can be read on a phone
DRAWN = 100  # seeds drawn as points; means and intervals use all seeds
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # an arm's name is text, not a formula
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "xtick.minor.size": 3.5,  # equal to the major ticks: on a log axis their labels share a row
    "xtick.minor.pad": 3.5,
    "savefig.transparent": True,
}


def arm_style(study: Study, arm: str) -> tuple[str, str]:
    """Return colour and marker of an arm: the baseline is in ink, the others follow their place in the study."""
    if arm == study.baseline:
        return INK, "o"
    i = [a for a in study.arms if a != study.baseline].index(arm)
    return colour_of(i), MARKERS[i % len(MARKERS)]


def styled(draw: Callable[[Source], Figure], source: Source) -> Figure:
    """Draw a figure of `source` in the style of all figures."""
    with matplotlib.rc_context(_STYLE):
        return draw(source)


def render(fig: Figure, kind: str = "svg", salt: str = "figure") -> bytes:
    """Return a figure's file, without a date, so that equal input gives equal bytes.

    Args:
        fig: The figure.
        kind: Format, svg or pdf.
        salt: Seed of the ids in an SVG.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt, "savefig.transparent": kind == "svg"}):
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None, "ModDate": None}
        fig.savefig(out, format=kind, metadata=metadata, bbox_inches="tight")
        return out.getvalue()


def inline(svg: bytes, name: str) -> str:
    """Turn an SVG file into an element of an HTML page: the page's text colour, own ids, no prologue, no fixed size."""
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def metric_axis(ax: Axes, study: Study) -> None:
    """Label the axis of the validation metric. One that grows is drawn as a loss, so its axis is turned upside down."""
    ax.set_ylabel(study.validation)
    if study.turn < 0:
        ax.invert_yaxis()
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{0.0 - y:.6g}"))


def legend(ax: Axes | Figure, entries: Sequence[tuple[Artist, str]]) -> None:
    """Add a legend of (artist, label) below the axes, or below a figure of several, in as many columns as fit."""
    # matplotlib hides a label with a leading underscore, so it gets a space in front
    handles = [h for h, _ in entries]
    labels = [f" {label}" if label.startswith("_") else label for _, label in entries]
    columns = max(1, min(3, 64 // (8 + max(map(len, labels), default=0))))  # 8: marker and gap
    below = -0.17 if isinstance(ax, Axes) else 0.0
    ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, below), ncols=columns)


def learning_rate(study: Study) -> Figure:
    """Draw validation loss against each calibrated hyperparameter: search trials as dots, shared grids as lines."""
    shared = grids(study)
    names = list(shared) or [str(study.first)]
    fig = Figure(figsize=(WIDTH, 3.7 * len(names)))
    for ax, name in zip(fig.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        given = "lr" if name == "lr" else next(iter(ranges(study).get(name, {})), "")
        logarithmic = shared[name].scale.logarithmic if name in shared else given in ("lr", "loguniform")
        entries = _against(ax, study, name, logarithmic)
    legend(ax, entries)
    return fig


def _against(ax: Axes, study: Study, name: str, logarithmic: bool) -> list[tuple[Artist, str]]:
    """Draw validation loss against one hyperparameter; return the entries of a legend."""
    entries: list[tuple[Artist, str]] = []
    seen: list[float] = []
    trials, shared = study.trials, grid_rows(study, name)
    for arm in study.arms:
        colour, marker = arm_style(study, arm)
        search = trials[(trials["arm"] == arm) & (trials["stage"] == "search") & trials[name].notna()]
        search = search[search[name] > 0] if logarithmic else search
        done = search[search["outcome"] == "completed"]
        early = search[search["outcome"] == "stopped_early"]
        ax.plot(done[name], done["val_nll"], marker, color=colour, ms=3.5, alpha=0.45, mew=0)
        ax.plot(early[name], early["val_nll"], marker, mfc="none", mec=colour, ms=3.5, alpha=0.45)
        grid = shared[(shared["arm"] == arm) & np.isfinite(shared["_loss"])]
        means = grid.groupby(name)["val_nll"].agg(["mean", "min", "max"])
        (line,) = ax.plot(means.index, means["mean"], marker=marker, color=colour, ms=6, lw=1.8)
        ax.vlines(means.index, means["min"], means["max"], color=colour, lw=1)
        entries.append((line, arm))
        seen += [*done["val_nll"], *means["min"], *means["max"], *means["max"]]
    tried = pd.concat([trials[trials["stage"] == "search"], shared])
    lost = tried[(tried["outcome"] == "infeasible") & (tried[name] > 0 if logarithmic else tried[name].notna())]
    for arm in lost["arm"].unique():
        rows = lost[lost["arm"] == arm]
        colour, _ = arm_style(study, arm)
        edge = 0.985 if study.turn > 0 else 0.015
        ax.plot(
            rows[name],
            np.full(len(rows), edge),
            "x",
            color=colour,
            ms=6,
            transform=ax.get_xaxis_transform(),
        )
    finite = np.array([x for x in seen if np.isfinite(x)])
    if len(finite):
        low, high = finite.min(), np.quantile(finite, 0.9)
        room = max(high - low, 1e-3 * abs(low))
        ax.set_ylim(low - 0.08 * room, high + 0.15 * room)  # keep one diverging trial from flattening the rest
    if logarithmic:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.xaxis.set_minor_formatter(FuncFormatter(power_text))
        ax.xaxis.set_major_formatter(FuncFormatter(power_text))
    ax.set_xlabel(called(name) + (" (log scale)" if logarithmic else ""))
    metric_axis(ax, study)
    return entries


def loss_curves(study: Study) -> Figure:
    """Draw the validation loss of the confirm runs against tokens: mean over seeds, band from lowest to highest."""
    fig = Figure(figsize=(WIDTH, 3.7))
    ax = fig.subplots()
    curves = confirm_curves(study)
    entries, last = [], []
    for arm in study.arms:
        colour, marker = arm_style(study, arm)
        rows = curves[(curves["arm"] == arm) & np.isfinite(curves["val_nll"].astype(float))]
        if not len(rows):
            continue
        by_tokens = rows.groupby("tokens")["val_nll"].agg(["mean", "min", "max"])
        (line,) = ax.plot(by_tokens.index, by_tokens["mean"], color=colour, lw=1.6, marker=marker, ms=4.5)
        ax.fill_between(by_tokens.index, by_tokens["min"], by_tokens["max"], color=colour, alpha=0.18, lw=0)
        entries.append((line, arm))
        last += [by_tokens["mean"].iloc[-1], by_tokens["mean"].iloc[min(len(by_tokens) - 1, len(by_tokens) // 6)]]
    if last:
        room = max(max(last) - min(last), 1e-3 * abs(min(last)))
        ax.set_ylim(min(last) - 0.1 * room, max(last) + 0.25 * room)  # the range of the first steps would hide the last
    ax.set_xlabel(f"training {study.budget_unit}")
    ax.xaxis.set_major_formatter(FuncFormatter(tokens_text))
    metric_axis(ax, study)
    legend(ax, entries)
    return fig


def tokens_text(x: float, _: object) -> str:
    """Format a number of tokens with k, M or B, for an axis."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= unit:
            return f"{x / unit:g}{letter}"
    return f"{x:g}"


def power_text(x: float, _: object) -> str:
    """Format a number on a logarithmic axis: 5e-4, 0.2 as 2e-1, 2 without a power, 1e12."""
    digit, power = f"{x:.0e}".split("e")
    return f"{digit}e{int(power)}" if int(power) else digit


def learned_alphas(study: Study) -> Figure:
    """Draw the last alpha by layer, one panel per arm: a thin line per seed, a thick line for their mean."""
    rows, arms = confirm_rows(study.trials), arms_with_alphas(study)
    columns = alpha_columns(rows)
    across = min(2, len(arms))
    down = -(-len(arms) // across)
    fig = Figure(figsize=(WIDTH, 2.6 * down))
    axes = fig.subplots(down, across, squeeze=False, sharey=True)
    for ax, arm in zip(axes.flat, arms, strict=False):
        colour, marker = arm_style(study, arm)
        table = rows.loc[rows["arm"] == arm, columns].dropna(axis=1, how="all").astype(float)
        layers = np.array([int(c.rsplit("_", 1)[1]) for c in table.columns])
        ax.plot(layers, table.to_numpy()[:DRAWN].T, color=colour, lw=0.8, alpha=0.55, marker=".", ms=3)
        ax.plot(layers, table.mean(), color=colour, lw=2.4, marker=marker)
        for level in (0, 1):
            ax.axhline(level, color=INK, lw=0.8, ls=":")
        ax.set_xticks(layers if len(layers) <= 16 else layers[:: len(layers) // 8])
        ax.set_title(arm, fontsize=10)
        ax.set_xlabel("layer (0 = first)")
    for ax in axes[:, 0]:
        ax.set_ylabel("alpha at the last step")
    for ax in list(axes.flat)[len(arms) :]:
        ax.set_visible(False)
    fig.tight_layout()
    return fig


def over_training(study: Study, training: dict[str, pd.DataFrame]) -> Figure:
    """Draw the improvement at each evaluation, with its interval as a band."""
    fig = Figure(figsize=(WIDTH, 3.6))
    ax = fig.subplots()
    ax.axhline(0, color=INK, lw=1)
    entries = []
    for arm, rows in training.items():
        colour, marker = arm_style(study, arm)
        (line,) = ax.plot(rows["tokens"], rows["improvement_percent"], color=colour, lw=1.6, marker=marker, ms=4.5)
        ax.fill_between(rows["tokens"], rows["low"], rows["high"], color=colour, alpha=0.18, lw=0)
        entries.append((line, arm))
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(tokens_text))
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.xaxis.set_minor_formatter(FuncFormatter(tokens_text))
    ax.set_xlabel(f"training {study.budget_unit} (log scale)")
    ax.set_ylabel(f"improvement over {study.baseline} (%)")
    legend(ax, entries)
    return fig


def sequential_path(study: Study, rows: Sequence[Comparison]) -> Figure:
    """Draw the p over all looks against seeds, one line per arm; an arm stops if its adjusted p is below the level."""
    fig = Figure(figsize=(WIDTH, 3.4))
    ax = fig.subplots()
    entries = []
    for row in rows:
        colour, marker = arm_style(study, row.arm)
        p = [max(look["p_anytime"], 1e-6) for look in row.path]
        seeds = [look["n"] for look in row.path]
        (line,) = ax.plot(seeds, p, color=colour, marker=marker, ms=5, drawstyle="steps-post")
        line.set_linestyle("--" if row.contrast else "-")
        entries.append((line, row.label))
    ax.axhline(study.level, color=INK, lw=1, ls=":")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda p, _: f"{p:g}"))  # not the formula of a power of ten
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("confirm seeds")
    ax.set_ylabel("p over all looks so far")
    legend(ax, entries)
    return fig


def against_alpha(study: Study, rows: list[dict]) -> Figure:
    """Draw the search trials of arms that searched alpha, with the fit `hyperparameters.against_alpha` and its band."""
    fig = Figure(figsize=(WIDTH, 3.4))
    ax = fig.subplots()
    entries, seen = [], []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        colour, marker = arm_style(study, arm)
        mine = pd.DataFrame([row for row in rows if row["arm"] == arm])
        trials = study.trials[(study.trials["stage"] == "search") & (study.trials["arm"] == arm)]
        trials = trials[trials["outcome"] == "completed"]
        ax.plot(trials["alpha"], trials["val_nll"], marker, color=colour, ms=4, alpha=0.6, mew=0)
        (line,) = ax.plot(mine["alpha"], mine["loss"], color=colour, lw=1.8)
        ax.fill_between(mine["alpha"], mine["low"], mine["high"], color=colour, alpha=0.18, lw=0)
        entries.append((line, arm))
        seen += [*trials["val_nll"], *mine["loss"]]
    low, high = min(seen), float(np.quantile(seen, 0.9))
    room = max(high - low, 1e-3 * abs(low))
    ax.set_ylim(low - 0.2 * room, high + 0.3 * room)  # keep one high loss from flattening the rest
    ax.set_xlabel("alpha (searched)")
    ax.set_ylabel(study.validation)
    legend(ax, entries)
    return fig


def search_budget(study: Study, rows: list[dict]) -> Figure:
    """Draw the expected best val_nll of n search trials by arm: solid without replacement, dotted with replacement."""
    fig = Figure(figsize=(WIDTH, 3.4))
    ax = fig.subplots()
    entries = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        colour, marker = arm_style(study, arm)
        mine = pd.DataFrame([row for row in rows if row["arm"] == arm])
        (line,) = ax.plot(mine["budget"], mine["without_replacement"].astype(float), color=colour, marker=marker, ms=4)
        ax.plot(mine["budget"], mine["with_replacement"].astype(float), color=colour, lw=1, ls=":")
        entries.append((line, arm))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("search trials")
    ax.set_ylabel(f"expected best\n{study.validation}")
    legend(ax, entries)
    return fig


def ladder(study: Study, result: Result) -> Figure:
    """Draw the improvement of each arm against compute, one panel per arm: rungs with intervals, and the slope."""
    assert study.ladder is not None
    arms, axis = result.trends, study.ladder.axis
    size = {rung.rung: rung.compute or (2.0**rung.rung if axis == RUNG else 0.0) for rung in result.rungs}
    across = min(2, len(arms))
    down = -(-len(arms) // across)
    fig = Figure(figsize=(WIDTH, 0.6 + 2.1 * down))
    axes = fig.subplots(down, across, squeeze=False, sharey=True, sharex=True)
    for ax, trend in zip(axes.flat, arms, strict=False):
        found = [
            (rung, row) for rung in result.rungs if size[rung.rung] for row in rows_of(trend, [rung], counted=False)
        ]
        seen = [(rung, row) for rung, row in found if row.improvement_percent is not None]
        colour, marker = arm_style(study, trend.arm)
        ax.axhline(0, color=INK, lw=1)
        at = np.array([size[rung.rung] for rung, _ in seen])
        value = np.array([float(row.improvement_percent or 0) for _, row in seen])
        ends = [row.interval or (middle, middle) for (_, row), middle in zip(seen, value, strict=True)]
        for x, interval in zip(at, ends, strict=True):
            ax.plot([x, x], interval, color=colour, lw=1.8, marker="_", ms=11, mew=1.5)
        counts = np.array([each.rung in trend.rungs for each, _ in seen], bool)
        ax.plot(at[counts], value[counts], marker, color=colour, ms=5)
        ax.plot(at[~counts], value[~counts], marker, color=colour, ms=5, mfc="none")
        line = [each.rung in trend.slope_rungs for each, _ in seen]
        if trend.slope is not None:
            x = np.log2(at)
            middle = x[line].mean(), value[line].mean()
            ax.plot(at[line], middle[1] + trend.slope * (x[line] - middle[0]), color=INK, lw=1, ls="--")
        ax.set_title(f"{trend.label}: {trend.trend}", fontsize=10)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=4))
        ax.xaxis.set_major_formatter(FuncFormatter(power_text))
        ax.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        if axis == RUNG:
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(list(size.values()), list(map(str, size)))
    for ax in axes[:, 0]:
        ax.set_ylabel("improvement (%)")
    for ax in list(axes.flat)[len(arms) :]:
        ax.set_visible(False)
        axes[-2, -1].tick_params(labelbottom=True)  # it has no panel below it
    of_compute = "training compute (log scale)" if study.own else "training compute (FLOPs, log scale)"
    fig.supxlabel({COMPUTE: of_compute, RUNG: RUNG}.get(axis, f"{axis} (log scale)"), fontsize=10)
    fig.tight_layout()
    return fig


def figure(study: Study, rows: list[dict[str, Any]]) -> Figure:
    """Draw every seed's slope on log2(tokens) as a dot, with the mean and the interval that decides."""
    rows = [row for row in rows if row["scale"] == SCALES["log2"][1] and row["slope"] is not None]
    fig = Figure(figsize=(WIDTH, 1.1 + 0.5 * max(1, len(rows))))
    ax = fig.subplots()
    ax.axvline(0, color=INK, lw=1)
    for y, row in enumerate(rows):
        colour, marker = arm_style(study, row["arm"])
        values = np.array(list(row["values"].values())[:DRAWN])
        ax.plot(values, np.full(len(values), y + 0.17), marker, color=colour, ms=4.5, alpha=0.65, mew=0)
        if row["decision_low"] is not None:
            ax.plot([row["decision_low"], row["decision_high"]], [y - 0.17] * 2, color=colour, lw=3)
        ax.plot([row["slope"]], [y - 0.17], "|", color=INK, ms=13, mew=2)
    ax.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(
        f"slope of the improvement over {study.baseline} (% per doubling of {study.budget_unit}; right of 0 = it rises)"
    )
    return fig
