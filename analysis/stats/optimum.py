"""Estimate of each arm's best learning rate from the shared grid, by a local quadratic fit.

The best point of the grid would let one of two equal arms win: its best point is the luckier of two near-equal points,
or lies nearer to the bottom of its curve. The confirm seeds would then measure this difference in tuning precisely.
The minimum of a fitted curve is wrong only in second order. Shrinking the arms' optima towards each other reduces
the remaining noise. `docs/protocol.md` has the error rates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from analysis.stats.scale import Scale

FADE = 4.0  # standard errors above the best mean over which a point's weight fades
STEADY = 0.5  # standard errors of the curvature that are added to it, for stability in flat curves
LEAST_FREEDOM = 4  # degrees of freedom of the noise of one seed (`bends`) with which a choice is no luck
ROUND_OFF = 1e-12  # of the losses
SHARED = 0.5  # upper bound on the shift towards the other arms' optima, in standard errors


class Bracket(StrEnum):
    """State of the best point of a grid: closed if it lies between two feasible neighbours, else the reason why not."""

    CLOSED = "closed"
    END = "end of the grid"
    DIVERGES = "divergence next to it"
    FEW = "too few finite points"


def bracket(means: Sequence[float], legal_ends: tuple[bool, bool] = (False, False)) -> Bracket:
    """Return whether the best point of a grid is bracketed.

    Args:
        means: Mean losses of the points in the order of the grid, +inf if a run was infeasible.
        legal_ends: True for an end of the grid beyond which no legal value lies. It needs no neighbour there.
            Between two such ends, two points are enough.
    """
    finite = np.isfinite(np.asarray(means, float))
    if not finite.any():
        return Bracket.FEW
    best, last = int(np.argmin(means)), len(means) - 1
    if (best == 0 and not legal_ends[0]) or (best == last and not legal_ends[1]):
        return Bracket.END
    if not finite[max(best - 1, 0) : best + 2].all():
        return Bracket.DIVERGES
    return Bracket.CLOSED if finite.sum() >= 3 or all(legal_ends) else Bracket.FEW


def enclosed(chosen: float, tried: Iterable[float], scale: Scale) -> Bracket:
    """Return whether a value that a joint fit chose lies between values that were tried, or at a legal end.

    Args:
        chosen: The value.
        tried: Values of all points that count.
        scale: Scale of the hyperparameter.
    """
    low, high = min(tried), max(tried)
    below, above = chosen > low or scale.is_end(low, -1), chosen < high or scale.is_end(high, 1)
    return Bracket.CLOSED if below and above else Bracket.END


@dataclass(frozen=True)
class Optimum:
    """Optimal learning rates of one arm: `grid_best` on the grid, `own` from its fit, and `fitted` after `share`.

    `own`, `error`, `reach` and `fitted` are None if no fit is possible.
    """

    grid_best: float
    fitted: float | None
    curvature: float | None  # c of the fit, in nats per squared unit of log learning rate
    standard_error: float  # of a point's mean, in nats
    own: float | None = None
    error: float | None = None  # standard error of log(own)
    reach: tuple[float, float] | None = None  # lower and upper bound of the fitted rate

    @property
    def rate(self) -> float:
        """The fitted optimum, or the grid's best point if there is no fit."""
        return self.grid_best if self.fitted is None else self.fitted


def optima(rates: Sequence[float], losses: Mapping[str, np.ndarray], bent: bool = True) -> dict[str, Optimum]:
    """Estimate the optimum of each arm; `share` then combines the optima.

    The noise of a run is the larger of the arm's own estimate and the median over arms. Few runs sometimes give an
    estimate that is far too low, and one noisy arm says nothing about the others. With one seed it is `bends`.

    Args:
        rates: Learning rates.
        losses: Losses by arm, rates x seeds, +inf for an infeasible run.
        bent: False: one seed shows no noise, as in ledgers of an earlier version.

    Raises:
        ValueError: If an arm has no rate with a finite loss on every seed.
    """
    tables = {arm: np.asarray(table, float) for arm, table in losses.items()}
    sd = noise(tables)
    if bent and all(table.shape[1] == 1 for table in tables.values()):
        sd = dict.fromkeys(tables, bends(rates, tables))
    return share({arm: optimum(rates, table, sd[arm]) for arm, table in tables.items()})


def noise(losses: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the noise of a run (standard deviation) by arm: the larger of its own estimate and the arms' median.

    `losses` holds an array of points x seeds per arm, +inf for an infeasible run.
    """
    variances = {arm: variance(np.asarray(table, float)) for arm, table in losses.items()}
    known = [v for v in variances.values() if v is not None]
    common = float(np.median(known)) if known else 0.0
    return {arm: float(np.sqrt(max(own or 0.0, common))) for arm, own in variances.items()}


def bends(rates: Sequence[float], losses: Mapping[str, np.ndarray]) -> float:
    """Estimate the noise of a run (standard deviation, nats) from one seed: what parabolas leave of the arms' losses.

    A parabola in log(rate) is fitted to each arm, and its residuals are reduced by their mean over the arms at each
    rate, because true curves bend alike. This needs four rates that are finite for all of at least two arms. Otherwise
    the residuals of arms with four finite rates count whole, and the noise is 0 if there is none. It is 0 too if
    nothing but round-off is left.

    Args:
        rates: Learning rates.
        losses: Losses by arm, rates x 1, +inf for an infeasible run.
    """
    x, values = np.log(np.asarray(rates, float)), np.stack([table[:, 0] for table in losses.values()])
    shared = np.isfinite(values).all(0)
    if shared.sum() > 3 and len(values) > 1:
        left = _unexplained(x[shared], values[:, shared])
        left, freedom = left - left.mean(0), (len(values) - 1) * (int(shared.sum()) - 3)
        return _above_round_off(float((left**2).sum() / freedom), values)
    whole = [(x[finite], row[finite]) for row in values if (finite := np.isfinite(row)).sum() > 3]
    freedom = sum(len(at) - 3 for at, _ in whole)
    squares = sum(float((_unexplained(*each) ** 2).sum()) for each in whole)
    return _above_round_off(squares / freedom, values) if freedom else 0.0


def _above_round_off(variance: float, losses: np.ndarray) -> float:
    """Return the root of a variance, or 0 if it is within the rounding of the losses, of which some may be infinite."""
    sd = float(np.sqrt(variance))
    return sd if sd > ROUND_OFF * float(np.abs(losses[np.isfinite(losses)]).max()) else 0.0


def _unexplained(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return what parabolas in x leave of values (... x points)."""
    design = np.vander(x - x.mean(), 3)
    return values - values @ (design @ np.linalg.pinv(design)).T


def share(found: Mapping[str, Optimum]) -> dict[str, Optimum]:
    """Shrink each arm's fitted optimum towards the arms' common optimum, as far as noise explains the distance.

    With x = log(own), e = error and w = 1 / e^2, the variance of the true optima is tau^2 = max(0, (Q - (k - 1)) / (sum
    w - sum w^2 / sum w)). Q = sum w (x - sum w x / sum w)^2 over the k arms with a fit and an error above 0. With m the
    mean weighted by 1 / (e^2 + tau^2), x moves by e^2 / (e^2 + tau^2) * (m - x), at most by e / 2. The bound protects
    an arm whose true optimum differs. Sources: DerSimonian and Laird, Control. Clin. Trials 7 (1986) 177-188; for the
    bound, Efron and Morris, J. Am. Stat. Assoc. 67 (1972) 130-139.
    """
    out = dict(found)
    noisy = {arm: (np.log(one.own), one.error) for arm, one in found.items() if one.own and one.error}
    if len(noisy) < 2:
        return out
    x, error = np.array(list(noisy.values())).T
    moved = np.exp(x + np.clip(towards_others(x, error)[0], -SHARED * error, SHARED * error))
    for arm, rate in zip(noisy, moved, strict=True):
        low, high = found[arm].reach or (rate, rate)
        out[arm] = replace(found[arm], fitted=float(np.clip(rate, low, high)))
    return out


def towards_others(x: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each estimate moves towards the common mean, as in `share` without its bound.

    Return also the standard errors of the moved estimates. With w = 1 / (e^2 + tau^2), they are the root of e^2 tau^2 w
    + (e^2 w)^2 / sum w.

    Args:
        x: Estimates of the same quantity, one per arm; two or more.
        error: Their standard errors, above 0.
    """
    w = error**-2
    q = float(w @ (x - w @ x / w.sum()) ** 2)
    spare = float(w.sum() - w @ w / w.sum())
    tau2 = max(0.0, (q - (len(x) - 1)) / spare) if spare > 0 else 0.0  # 0 if one estimate has all the weight
    weight = 1 / (error**2 + tau2)
    left = np.sqrt(error**2 * tau2 * weight + (error**2 * weight) ** 2 / weight.sum())
    return error**2 * weight * (weight @ x / weight.sum() - x), left


def variance(losses: np.ndarray) -> float | None:
    """Return the variance of one run of one arm: the residuals after a mean per point and a mean per seed.

    `losses` is an array of points x seeds. Returns None if nothing remains, as with one seed.
    """
    losses = losses[np.isfinite(losses).all(1)]
    points, seeds = losses.shape
    if points < 2 or seeds < 2:
        return None
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    return float((left**2).sum() / ((points - 1) * (seeds - 1)))


def optimum(rates: Sequence[float], losses: np.ndarray, sd: float) -> Optimum:
    """Estimate the learning rate with the lowest expected loss by least squares of mean loss = a + b x + c x^2.

    x is log(rate) minus its weighted mean. The best point and its two neighbours have weight 1. Any other point has
    weight exp(-(excess / (4 s))^2 / 2), with its excess over the lowest mean and s = sd / sqrt(seeds). The optimum is
    at x = -b / (2 (max(c, 0) + se(c) / 2)). If noise alone may have bent the curve, se(c) / 2 moves its optimum towards
    the centre, which is nearly the same for all arms. It changes nothing if the curvature is clear. Nothing is
    extrapolated: the optimum stays among the best point, its neighbours and the points less than 4 s above it. Its
    error follows from the delta method in b and c.

    Args:
        rates: Learning rates. A rate with an infeasible run is left out; fewer than three remaining rates give no fit.
        losses: Losses in nats, rates x seeds, +inf for an infeasible run.
        sd: Noise (standard deviation) of a run, in nats.

    Raises:
        ValueError: If no rate has a finite loss on every seed.
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
    linear = inverse @ (design * weight[:, None]).T  # maps means to a, b, c
    _, b, c = (float(value) for value in linear @ mean)
    steadied = max(c, 0.0) + STEADY * s * float(np.sqrt(inverse[2, 2]))
    if steadied <= 0:  # one seed, and no minimum
        return Optimum(grid_best, None, c, s)
    near = x[(excess < FADE * s) | (np.abs(np.arange(len(x)) - best) <= 1)]
    at = float(np.exp(np.clip(centre - b / (2 * steadied), near.min(), near.max())))
    slope = np.array([0.0, -1 / (2 * steadied), b / (2 * steadied**2)])
    error = s * float(np.linalg.norm(slope @ linear))
    return Optimum(grid_best, at, c, s, at, error, (float(np.exp(near.min())), float(np.exp(near.max()))))
