"""What a figure leaves outside its frame, as a sentence for its caption."""

import numpy as np
from matplotlib.figure import Figure


def above(fig: Figure) -> int:
    """The number of marked points that lie above the frame of their axes; not of those placed by the frame itself."""
    return sum(
        int(np.count_nonzero(np.asarray(line.get_ydata(), dtype=float) > ax.get_ylim()[1]))
        for ax in fig.axes
        for line in ax.lines
        if line.get_transform() is ax.transData and str(line.get_marker()) not in ("None", "", " ")
    )


def note(fig: Figure) -> str:
    """`above` as a sentence; empty where every point is shown."""
    count = above(fig)
    return "" if not count else f"{count} point{' lies' if count == 1 else 's lie'} above the frame."
