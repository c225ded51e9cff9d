"""Joint optimum of several hyperparameters for each arm, by a second-order fit through all of its points.

Hyperparameters may interact: the best learning rate depends on the weight decay. An optimum that is found along one
axis after the other then stays off the true one, in each arm by another distance. `docs/protocol.md` has the error
rates of both ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis.stats.optimum import SHARED, STEADY, noise, towards_others

FADE = 12.0  # standard errors above the best mean over which a point's weight fades
NEAR = 1.6  # steps around the best point within which a point has weight 1
SMALLEST = 1e-9  # nats: standard error of a point if the seeds show no noise
UNKNOWN = 1e6  # nats: standard error of a coefficient that the points do not determine
LEAST_EIGENVALUE = 0.05  # of the Hessian, scaled to a diagonal of 1


@dataclass(frozen=True)
class JointOptimum:
    """Joint optimum of one arm, in steps of each axis.

    `hessian` is A of the fit (gradient at the centre) x + x' A x, in nats. `error` is the standard error of `at`.
    """

    at: np.ndarray
    error: np.ndarray
    hessian: np.ndarray
    standard_error: float  # of a point's mean, in nats

    def gain(self, before: Sequence[float]) -> float:
        """Return by how much the fitted loss at another point exceeds that of the optimum, in nats."""
        moved = self.at - np.asarray(before, float)
        return float(moved @ self.hessian @ moved)


def joint_optima(
    points: Mapping[str, Sequence[Sequence[float]]], losses: Mapping[str, np.ndarray]
) -> dict[str, JointOptimum]:
    """Estimate the joint optimum of each arm by least squares of mean loss = a + b' x + x' A x.

    - Weights: 1 for the points less than 1.6 steps from the best one on every axis, exp(-(excess / (12 s))^2 / 2)
      for the others. A point that is infeasible on a seed is left out.
    - The second-order coefficients are shrunk towards the arms' common mean as far as noise explains the distance
      (DerSimonian and Laird, as in `share`, without a bound), because arms mostly differ in their optima. Half of the
      standard error that remains is added to each curvature. A cross term g with the standard error e is multiplied by
      max(0, 1 - e^2 / g^2). The scaled Hessian is kept positive definite.
    - The gradient is fitted again with A fixed. The optimum is the minimum of the fit within the smallest box that has
      the best point, its neighbours and the points within 12 s of it.
    - Each optimum then moves towards the other arms' as in `share`, one axis after the other from the last to the
      first. The earlier axes follow along the fitted valley, so that the loss stays low.

    An arm with fewer feasible points than an intercept, slopes and curvatures need has no optimum here. A cross term
    that an arm's points do not determine is that of the others.

    Args:
        points: Points per arm, in steps of each axis: points x axes.
        losses: Losses in nats per arm, points x seeds, +inf for an infeasible run.
    """
    sd = noise(losses)
    fits = {}
    for arm, at in points.items():
        table, x = np.asarray(losses[arm], float), np.asarray(at, float)
        feasible = np.isfinite(table).all(1)
        axes = x.shape[1]
        if feasible.sum() >= 1 + 2 * axes:
            s = max(sd[arm] / float(np.sqrt(table.shape[1])), SMALLEST)
            fits[arm] = _Fit(x[feasible], table[feasible].mean(1), s)
    if not fits:
        return {}
    estimates = np.array([fit.second for fit in fits.values()])
    errors = np.array([fit.second_error for fit in fits.values()])
    if len(fits) > 1:
        moved = [towards_others(x, e) for x, e in zip(estimates.T, errors.T, strict=True)]
        estimates = estimates + np.array([step for step, _ in moved]).T
        errors = np.array([error for _, error in moved]).T
    for fit, second, error in zip(fits.values(), estimates, errors, strict=True):
        fit.solve(_hessian(second, error, fit.axes))
    if len(fits) > 1:
        _share(list(fits.values()))
    return {
        arm: JointOptimum(fit.at, np.sqrt(np.diag(fit.covariance)), fit.hessian, fit.s) for arm, fit in fits.items()
    }


class _Fit:
    """The fit of one arm: `x` points x axes in steps, their mean losses and the standard error `s` of a mean."""

    hessian: np.ndarray
    at: np.ndarray
    covariance: np.ndarray  # of the optimum

    def __init__(self, x: np.ndarray, mean: np.ndarray, s: float) -> None:
        self.mean, self.s, self.axes = mean, s, x.shape[1]
        excess = mean - mean.min()
        near = (np.abs(x - x[mean.argmin()]) <= NEAR).all(1)
        self.weight = np.where(near, 1.0, np.exp(-0.5 * (excess / (FADE * s)) ** 2))
        self.centre = self.weight @ x / self.weight.sum()
        self.z = x - self.centre
        self.low, self.high = (f(x[near | (excess < FADE * s)], axis=0) for f in (np.min, np.max))
        cross = [self.z[:, j] * self.z[:, k] for j, k in combinations(range(self.axes), 2)]
        design = np.column_stack([np.ones(len(x)), self.z, self.z**2, *cross])
        linear = self._linear(design)  # maps means to the coefficients
        known = np.diag(linear @ design)[1 + self.axes :] > 1 - 1e-6
        self.second = (linear @ mean)[1 + self.axes :]
        self.second_error = np.where(known, s * np.linalg.norm(linear, axis=1)[1 + self.axes :], UNKNOWN)

    def _linear(self, design: np.ndarray) -> np.ndarray:
        weighted = design * self.weight[:, None]
        out: np.ndarray = np.linalg.pinv(design.T @ weighted, rcond=1e-9, hermitian=True) @ weighted.T
        return out

    def solve(self, hessian: np.ndarray) -> None:
        """Fit the gradient with a given Hessian, and set the optimum within the box."""
        self.hessian = hessian
        linear = self._linear(np.column_stack([np.ones(len(self.z)), self.z]))[1:]
        gradient = linear @ (self.mean - np.einsum("ij,jk,ik->i", self.z, hessian, self.z))
        inverse = np.linalg.inv(hessian) / 2
        low, high = self.low - self.centre, self.high - self.centre
        x = np.clip(-inverse @ gradient, low, high)
        for _ in range(200):  # coordinate descent: the minimum of a convex function within a box
            before = x.copy()
            for k in range(self.axes):
                others = gradient[k] + 2 * (hessian[k] @ x - hessian[k, k] * x[k])
                x[k] = np.clip(-others / (2 * hessian[k, k]), low[k], high[k])
            if np.abs(x - before).max() < 1e-9:
                break
        self.at = self.centre + x
        self.covariance = self.s**2 * inverse @ (linear @ linear.T) @ inverse


def _hessian(second: np.ndarray, error: np.ndarray, axes: int) -> np.ndarray:
    """Return a positive definite Hessian from second-order coefficients (curvatures, then cross terms) and errors."""
    diagonal = np.maximum(second[:axes], 0.0) + STEADY * error[:axes]
    scale = np.sqrt(np.outer(diagonal, diagonal))
    out = np.eye(axes)
    for (j, k), g, e in zip(combinations(range(axes), 2), second[axes:], error[axes:], strict=True):
        kept = g * max(0.0, 1 - e**2 / g**2) if g else 0.0
        out[j, k] = out[k, j] = kept / 2 / scale[j, k]
    least = float(np.linalg.eigvalsh(out)[0])
    if least < LEAST_EIGENVALUE:
        part = (1 - LEAST_EIGENVALUE) / (1 - least)
        out = (1 - part) * np.eye(axes) + part * out
    return out * scale


def _share(fits: list[_Fit]) -> None:
    """Move the optima towards each other, axis by axis; the earlier axes follow along the fitted valley."""
    left = [fit.covariance for fit in fits]  # given the axes that have moved
    for k in reversed(range(fits[0].axes)):
        x, error = np.array([fit.at[k] for fit in fits]), np.sqrt([c[k, k] for c in left])
        step = np.clip(towards_others(x, error)[0], -SHARED * error, SHARED * error)
        for i, fit in enumerate(fits):
            at, h = fit.at.copy(), fit.hessian
            at[k] = np.clip(x[i] + step[i], fit.low[k], fit.high[k])
            if k:
                at[:k] -= np.linalg.solve(h[:k, :k], h[:k, k]) * (at[k] - fit.at[k])
            fit.at = np.clip(at, fit.low, fit.high)
            left[i] = left[i][:k, :k] - np.outer(left[i][:k, k], left[i][k, :k]) / left[i][k, k]
