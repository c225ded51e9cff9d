"""The best learning rate of each arm from the shared grid: a local quadratic fit, steadied where the curve is flat.

The grid's best point lets one arm beat an equal one: it is the luckier of two near-equal points, or it lies nearer to
the bottom of that arm's bowl. The confirm seeds then measure a difference in tuning with great precision. The bottom of
a fitted curve is wrong in second order only. `docs/protocol.md` has the error rates of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FADE = 3.0  # standard errors above the best mean over which a point loses its say


@dataclass(frozen=True)
class Optimum:
    """Learning rates: of the lowest mean (`grid_best`) and of the fit (`fitted`, None where no fit can be made)."""

    grid_best: float
    fitted: float | None
    curvature: float | None  # c of the fit, nats per squared unit of log learning rate
    standard_error: float  # of a point's mean, nats

    @property
    def rate(self) -> float:
        """The fitted optimum, or the grid's best where there is no fit."""
        return self.grid_best if self.fitted is None else self.fitted


def optima(rates: Sequence[float], losses: Mapping[str, np.ndarray]) -> dict[str, Optimum]:
    """The optimum of each arm; `losses` holds rates x seeds for each arm, +inf where a run was infeasible.

    The noise of a run is the larger of the arm's own and the arms' root mean square: few runs give an arm's own now
    and then far too low. Raises ValueError where an arm has no rate that is finite on every seed.
    """
    variances = {arm: _variance(np.asarray(table, float)) for arm, table in losses.items()}
    known = [v for v in variances.values() if v is not None]
    pooled = float(np.mean(known)) if known else 0.0
    sd = {arm: float(np.sqrt(max(own or 0.0, pooled))) for arm, own in variances.items()}
    return {arm: optimum(rates, table, sd[arm]) for arm, table in losses.items()}


def _variance(losses: np.ndarray) -> float | None:
    # of one run: what is left after a mean a point and a mean a seed; None where that leaves nothing
    losses = losses[np.isfinite(losses).all(1)]
    points, seeds = losses.shape
    if points < 2 or seeds < 2:
        return None
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    return float((left**2).sum() / ((points - 1) * (seeds - 1)))


def optimum(rates: Sequence[float], losses: np.ndarray, sd: float) -> Optimum:
    """The learning rate with the lowest expected loss; `losses` is rates x seeds, `sd` the noise of a run (nats).

    Least squares of mean loss = a + b x + c x^2, x = log(rate) from the weighted centre. The best point and its two
    neighbours weigh 1, any other exp(-(excess / (3 s))^2 / 2), with its excess over the lowest mean and s = sd /
    sqrt(seeds). The optimum is at x = -b / (2 (max(c, 0) + se(c))): the standard error of the curvature draws a bowl
    that noise alone may have bent towards the centre, which is nearly the same for all arms, and changes nothing where
    the bowl is clear. It stays among the best point, its neighbours and the points less than 3 s above it: nothing is
    extrapolated. A rate that was infeasible on a seed takes no part. With fewer than three rates there is no fit.
    """
    x, table = np.log(np.asarray(rates, float)), np.asarray(losses, float)
    order = np.argsort(x)
    order = order[np.isfinite(table[order]).all(1)]
    if not len(order):
        raise ValueError(f"none of {len(x)} learning rates has a finite loss on every seed")
    x, mean = x[order], table[order].mean(1)
    best = int(mean.argmin())
    grid_best, s = float(np.asarray(rates, float)[order[best]]), sd / float(np.sqrt(table.shape[1]))
    if len(x) < 3:
        return Optimum(grid_best, None, None, s)
    excess, middle = mean - mean[best], min(max(best, 1), len(x) - 2)
    weight = np.exp(-0.5 * (excess / (FADE * s)) ** 2) if s > 0 else np.zeros(len(x))
    weight[middle - 1 : middle + 2] = 1.0
    centre = float(weight @ x / weight.sum())
    z = x - centre
    design = np.stack([np.ones_like(z), z, z * z], 1)
    inverse = np.linalg.inv(design.T @ (weight[:, None] * design))
    _, b, c = (float(value) for value in inverse @ (design.T @ (weight * mean)))
    steadied = max(c, 0.0) + s * float(np.sqrt(inverse[2, 2]))
    if steadied <= 0:  # one seed, and no bowl
        return Optimum(grid_best, None, c, s)
    near = x[(excess < FADE * s) | (np.abs(np.arange(len(x)) - best) <= 1)]
    at = np.clip(centre - b / (2 * steadied), near.min(), near.max())
    return Optimum(grid_best, float(np.exp(at)), c, s)
