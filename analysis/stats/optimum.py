"""The best learning rate of each arm from the shared grid: a local quadratic fit, steadied where the curve is flat.

The grid's best point lets one arm beat an equal one: it is the luckier of two near-equal points, or it lies nearer to
the bottom of that arm's bowl. The confirm seeds then measure a difference in tuning with great precision. The bottom of
a fitted curve is wrong in second order only, and what noise leaves in it shrinks when the arms' optima are read
together. `docs/protocol.md` has the error rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

FADE = 4.0  # standard errors above the best mean over which a point loses its say
STEADY = 0.5  # standard errors of the curvature that are added to it
SHARED = 0.5  # standard errors at most by which the other arms' optima move an arm's own


@dataclass(frozen=True)
class Optimum:
    """Learning rates: of the lowest mean (`grid_best`), and of the fit (`own` of the arm alone, `fitted` as decided).

    The last two, `error` and `reach` are None where no fit can be made.
    """

    grid_best: float
    fitted: float | None
    curvature: float | None  # c of the fit, nats per squared unit of log learning rate
    standard_error: float  # of a point's mean, nats
    own: float | None = None
    error: float | None = None  # standard error of log(own)
    reach: tuple[float, float] | None = None  # the rates between which the fit may lie

    @property
    def rate(self) -> float:
        """The fitted optimum, or the grid's best where there is no fit."""
        return self.grid_best if self.fitted is None else self.fitted


def optima(rates: Sequence[float], losses: Mapping[str, np.ndarray]) -> dict[str, Optimum]:
    """The optimum of each arm; `losses` holds rates x seeds for each arm, +inf where a run was infeasible.

    The noise of a run is the larger of the arm's own and the arms' median: few runs give an arm's own now and then far
    too low, and one loud arm says nothing of the others. The optima are then read together (`share`). Raises
    ValueError where an arm has no rate that is finite on every seed.
    """
    variances = {arm: _variance(np.asarray(table, float)) for arm, table in losses.items()}
    known = [v for v in variances.values() if v is not None]
    common = float(np.median(known)) if known else 0.0
    sd = {arm: float(np.sqrt(max(own or 0.0, common))) for arm, own in variances.items()}
    return share({arm: optimum(rates, table, sd[arm]) for arm, table in losses.items()})


def share(found: Mapping[str, Optimum]) -> dict[str, Optimum]:
    """Each arm's fitted optimum, moved towards the arms' common one by as much as noise may have drawn it away.

    With x = log(own), e = error and w = 1 / e^2: the variance of the true optima is tau^2 = max(0, (Q - (k - 1)) /
    (sum w - sum w^2 / sum w)), Q = sum w (x - sum w x / sum w)^2 over the k arms with a fit and an error above 0. With
    m the mean weighted by 1 / (e^2 + tau^2), x moves by e^2 / (e^2 + tau^2) * (m - x), at most by half of e, so that
    an arm whose optimum does lie elsewhere loses little. Sources: DerSimonian and Laird, Control. Clin. Trials 7 (1986)
    177-188; the limit is that of Efron and Morris, J. Am. Stat. Assoc. 67 (1972) 130-139.
    """
    out = dict(found)
    noisy = {arm: (np.log(one.own), one.error) for arm, one in found.items() if one.own and one.error}
    if len(noisy) < 2:
        return out
    x, error = np.array(list(noisy.values())).T
    w = error**-2
    q = float(w @ (x - w @ x / w.sum()) ** 2)
    tau2 = max(0.0, (q - (len(x) - 1)) / float(w.sum() - w @ w / w.sum()))
    weight = 1 / (error**2 + tau2)
    step = error**2 * weight * (weight @ x / weight.sum() - x)
    moved = np.exp(x + np.clip(step, -SHARED * error, SHARED * error))
    for arm, rate in zip(noisy, moved, strict=True):
        low, high = found[arm].reach or (rate, rate)
        out[arm] = replace(found[arm], fitted=float(np.clip(rate, low, high)))
    return out


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
    neighbours weigh 1, any other exp(-(excess / (4 s))^2 / 2), with its excess over the lowest mean and s = sd /
    sqrt(seeds). The optimum is at x = -b / (2 (max(c, 0) + se(c) / 2)): the standard error of the curvature draws a
    bowl that noise alone may have bent towards the centre, which is nearly the same for all arms, and changes nothing
    where the bowl is clear. It stays among the best point, its neighbours and the points less than 4 s above it:
    nothing is extrapolated. Its error is by the delta method in b and c. A rate that was infeasible on a seed takes no
    part. With fewer than three rates there is no fit.
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
    linear = inverse @ (design * weight[:, None]).T  # means -> a, b, c
    _, b, c = (float(value) for value in linear @ mean)
    steadied = max(c, 0.0) + STEADY * s * float(np.sqrt(inverse[2, 2]))
    if steadied <= 0:  # one seed, and no bowl
        return Optimum(grid_best, None, c, s)
    near = x[(excess < FADE * s) | (np.abs(np.arange(len(x)) - best) <= 1)]
    at = float(np.exp(np.clip(centre - b / (2 * steadied), near.min(), near.max())))
    slope = np.array([0.0, -1 / (2 * steadied), b / (2 * steadied**2)])
    error = s * float(np.linalg.norm(slope @ linear))
    return Optimum(grid_best, at, c, s, at, error, (float(np.exp(near.min())), float(np.exp(near.max()))))
