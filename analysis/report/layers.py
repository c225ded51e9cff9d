"""Draw and state what the arms' activations do inside the kept models, layer by layer."""

from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from analysis.io.assemble import Study
from analysis.report.plots import WIDTH, arm_style, legend
from analysis.report.takeaways import listed

PANELS = (  # column, heading, logarithmic
    ("openness", "openness", False),
    ("negative_slope", "share of negative slope", False),
    ("gradient_norm", "gradient norm", True),
    ("hidden_rank", "effective rank", False),
)
CAPTION = (
    "The kept model of each arm, one per arm, on the same validation windows; nothing is tested. Openness is the share "
    "of its input that the activation lets through: 1 for the identity. The slope is negative if a larger input gives "
    "a smaller output. The gradient is that of the loss by the input of the activation, and shows how much of the "
    "training signal reaches the layer before it. The effective rank is that of the hidden layer, the output of the "
    "activation: how many directions it uses."
)
SHORT = "The kept model of each arm by layer, on the same validation windows: one model per arm, nothing is tested."
SAME = 0.05  # ratios within 5% of 1 count as equal


def layers(study: Study, rows: list[dict[str, Any]]) -> Figure:
    """Draw openness, negative slope, gradient norm and effective rank by layer, one line per arm."""
    fig = Figure(figsize=(WIDTH, 5.4))
    axes = fig.subplots(2, 2).flat
    entries: dict[str, Artist] = {}
    numbers = sorted({row["layer"] for row in rows})
    for ax, (name, heading, logarithmic) in zip(axes, PANELS, strict=True):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            colour, marker = arm_style(study, arm)
            known = [(row["layer"], row[name]) for row in rows if row["arm"] == arm and row[name] is not None]
            known = [(layer, value) for layer, value in known if value > 0 or not logarithmic]
            (line,) = ax.plot(*zip(*known, strict=True) if known else ((), ()), color=colour, marker=marker, ms=4.5)
            entries.setdefault(arm, line)
        if logarithmic and any(row[name] for row in rows):
            ax.set_yscale("log")
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                axis(FuncFormatter(lambda value, _: f"{value:g}"))  # not the formula of a power of ten
        ax.set_title(heading, fontsize=10)
        ax.set_xticks(numbers if len(numbers) <= 8 else numbers[:: -(-len(numbers) // 8)])
        ax.set_xlabel("layer (0 = first)")
    fig.tight_layout()
    legend(fig, [(line, arm) for arm, line in entries.items()])
    return fig


def takeaway(rows: list[dict[str, Any]], baseline: str) -> str:
    """State in three sentences how the activations differ from the baseline's; leave one out if it has no data.

    Args:
        rows: The rows of `analysis.describe.layers.by_arm`.
        baseline: The arm to compare with.
    """
    base = next((row for row in rows if row["arm"] == baseline), None)
    others = [row for row in rows if row["arm"] != baseline]
    if base is None or not others:
        return ""
    sentences = [_openness(base, others)]
    if said := _against(others, "gradient_ratio"):
        sentences.append(f"The gradient at the hidden layer, against {baseline}: {said}.")
    if said := _against(others, "rank_ratio"):
        of_base = "" if base["hidden_rank"] is None else f" (mean {base['hidden_rank']:.0f} of {base['width']})"
        sentences.append(f"The effective rank of the hidden layer, against {baseline}{of_base}: {said}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _openness(base: dict[str, Any], others: list[dict[str, Any]]) -> str:
    each = [f"{row['arm']} {row['openness']:.2f}" for row in (base, *others) if row["openness"] is not None]
    return f"Mean share of its input that the activation lets through: {', '.join(each)}." if each else ""


def _against(rows: list[dict[str, Any]], name: str) -> str:
    """Group arms into larger, smaller and about equal, with their ratio to the baseline."""
    known = [row for row in rows if row[name] is not None]
    groups = {
        "larger for": [row for row in known if row[name] > 1 + SAME],
        "smaller for": [row for row in known if row[name] < 1 - SAME],
        "about equal for": [row for row in known if abs(row[name] - 1) <= SAME],
    }
    arms = {word: [f"{row['arm']} ({row[name]:.2f} times)" for row in group] for word, group in groups.items()}
    return "; ".join(f"{word} {listed(named)}" for word, named in arms.items() if named)
