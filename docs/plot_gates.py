"""Draw every gate's unit and its derivative for several alphas, from the table of gates.

    python docs/plot_gates.py        # writes docs/figures/gates.svg

The derivative is the one that autograd gives, so the figure shows what training sees.
"""

import re
from pathlib import Path

import matplotlib
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt

from pagating.gating.gates import GATES
from pagating.gating.units import pointwise

ALPHAS = (0.0, 0.5, 1.0, 1.5, 2.0)
X = torch.linspace(-4.0, 4.0, 161, dtype=torch.float64)


def curve(gate: str, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unit with the identity base, and its derivative, at the points `X`."""
    x = X.clone().requires_grad_()
    y = pointwise(x, alpha, gate)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def draw(path: Path) -> None:
    """Draw one row per gate: the unit over the identity on the left, its derivative on the right."""
    plt.rcParams.update(
        {"svg.hashsalt": "gates", "svg.fonttype": "none", "font.size": 8, "path.simplify_threshold": 0.05}
    )
    colours = plt.get_cmap("viridis")(torch.linspace(0.0, 0.85, len(ALPHAS)).numpy())
    figure, axes = plt.subplots(len(GATES), 2, figsize=(7, 1.7 * len(GATES)), sharex=True, layout="constrained")
    for (left, right), (name, row) in zip(axes, GATES.items(), strict=True):
        for alpha, colour in zip(ALPHAS, colours, strict=True):
            value, slope = curve(name, alpha)
            left.plot(X, value, color=colour, linewidth=1, label=f"alpha = {alpha:g}" if axes[0][0] is left else None)
            right.plot(X, slope, color=colour, linewidth=1)
        left.set(ylabel=name, ylim=(-3, 5), title=row.unit)
        right.set(ylim=(-3, 5), title="derivative")
    for axis in axes[-1]:
        axis.set(xlabel="x")
    figure.legend(loc="outside upper center", ncols=len(ALPHAS), frameon=False)
    for axis in axes.flat:
        axis.axhline(0, color="0.8", linewidth=0.5, zorder=0)
        axis.axvline(0, color="0.8", linewidth=0.5, zorder=0)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    # a hundredth of a point is finer than any screen: the file is half as large
    path.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", path.read_text()))


if __name__ == "__main__":
    draw(Path(__file__).parent / "figures" / "gates.svg")
