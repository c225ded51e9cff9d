"""Count the points outside a figure's frame, for its caption."""

import numpy as np
from matplotlib.figure import Figure


def above(fig: Figure) -> int:
    """Count the marked points above the frame of their axes, without those placed in units of the frame.

    Of an axis that is upside down, count those below the frame.
    """
    return sum(
        int(np.count_nonzero(np.asarray(line.get_ydata(), dtype=float) > max(ax.get_ylim())))
        for ax in fig.axes
        for line in ax.lines
        if line.get_transform() is ax.transData and str(line.get_marker()) not in ("None", "", " ")
    )


def note(fig: Figure) -> str:
    """Return the count of `above` as a sentence; return "" if every point is shown."""
    count, side = above(fig), "below" if any(ax.yaxis_inverted() for ax in fig.axes) else "above"
    return "" if not count else f"{count} point{' lies' if count == 1 else 's lie'} {side} the frame."
