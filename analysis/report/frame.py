"""Count the points outside a figure's frame, for its caption."""

import numpy as np
from matplotlib.figure import Figure


def above(fig: Figure) -> int:
    """Count the marked points above the frame of their axes, without those placed in units of the frame."""
    return sum(
        int(np.count_nonzero(np.asarray(line.get_ydata(), dtype=float) > ax.get_ylim()[1]))
        for ax in fig.axes
        for line in ax.lines
        if line.get_transform() is ax.transData and str(line.get_marker()) not in ("None", "", " ")
    )


def note(fig: Figure) -> str:
    """Return the count of `above` as a sentence; return "" if every point is shown."""
    count = above(fig)
    return "" if not count else f"{count} point{' lies' if count == 1 else 's lie'} above the frame."
