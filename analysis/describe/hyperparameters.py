"""Importance of the hyperparameters in the search trials, and the loss against alpha."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.io.assemble import Study
from analysis.io.formats import Columns
from analysis.io.space import searched

COLUMNS: Columns = {
    "arm": ("arm", ""),
    "hyperparameter": ("hyperparameter", ""),
    "importance": ("importance", ".3f"),
    "trials": ("trials", "d"),
}
ALPHA_COLUMNS: Columns = {
    "arm": ("arm", ""),
    "alpha": ("alpha", ".3f"),
    "loss": ("val_nll", ".4f"),
    "low": ("low", ".4f"),
    "high": ("high", ".4f"),
    "trials": ("trials", "d"),
}
FEWEST = 8  # fewest fully trained trials for an importance or a curve


def completed(study: Study, arm: str) -> pd.DataFrame:
    """Return the arm's search trials that were trained to their end; losses after other budgets are not comparable."""
    trials = study.trials
    if "val_nll" not in trials.columns:
        return trials.iloc[:0]
    mine = (trials["stage"] == "search") & (trials["arm"] == arm) & (trials["outcome"] == "completed")
    return trials[mine & np.isfinite(trials["val_nll"].astype(float))]


def importance(study: Study) -> list[dict[str, Any]]:
    """Compute each hyperparameter's share of the variance among an arm's better trials, by Optuna's PED-ANOVA.

    The shares of an arm sum to 1. Only arms with two or more tuned hyperparameters and 8 or more completed search
    trials are included. Source: Watanabe, Bansal and Hutter 2023, arXiv 2304.10255.
    """
    rows = []
    for arm in study.arms:
        space, trials = searched(study, arm), completed(study, arm)
        if len(space) < 2 or len(trials) < FEWEST:
            continue
        for name, share in _ped_anova(space, trials).items():
            rows.append({"arm": arm, "hyperparameter": name, "importance": share, "trials": len(trials)})
    return rows


def _ped_anova(space: dict[str, dict[str, Any]], trials: pd.DataFrame) -> dict[str, float]:
    import optuna  # the import takes a second that only this table needs

    ranges: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, where in space.items():
        if where.get("choice") is not None:
            ranges[name] = optuna.distributions.CategoricalDistribution(where["choice"])
        else:
            low, high = where.get("loguniform") or where["uniform"]
            ranges[name] = optuna.distributions.FloatDistribution(low, high, log=where.get("loguniform") is not None)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        known = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)
    for _, row in trials.iterrows():
        params = {name: float(row[name]) for name in ranges}
        known.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=float(row["val_nll"])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(known, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}


def against_alpha(study: Study, points: int = 21) -> list[dict[str, Any]]:
    """Fit the expected val_nll against alpha for each arm that searched alpha, with the interval of the curve.

    The fit is least squares of the completed search trials on alpha, alpha^2, log(lr) and log(lr)^2. The curve is at
    the learning rate with the lowest fitted loss within the trials, so its interval includes the learning rate's
    uncertainty (t, level of the study). An arm needs 8 trials. The curve describes and tests nothing,
    because these trials chose the configuration.
    """
    rows = []
    for arm in study.arms if study.own is None else ():
        trials = completed(study, arm)
        if "alpha" not in searched(study, arm) or len(trials) < FEWEST:
            continue
        alpha, rate = trials["alpha"].to_numpy(float), np.log(trials["lr"].to_numpy(float))
        loss, centre = trials["val_nll"].to_numpy(float), float(rate.mean())
        design = _design(alpha, rate - centre)
        inverse = np.linalg.pinv(design.T @ design)
        coefficients = inverse @ design.T @ loss
        df = len(loss) - int(np.linalg.matrix_rank(design))
        variance = float(((loss - design @ coefficients) ** 2).sum()) / df
        candidates = np.linspace(rate.min(), rate.max(), 101) - centre
        best = candidates[np.argmin(_design(np.zeros(101), candidates) @ coefficients)]
        at = np.linspace(alpha.min(), alpha.max(), points)
        x = _design(at, np.full(points, best))
        half = stats.t.isf(study.level / 2, df) * np.sqrt(variance * np.einsum("ij,jk,ik->i", x, inverse, x))
        for a, mean, h in zip(at, x @ coefficients, half, strict=True):
            row = {"arm": arm, "alpha": float(a), "loss": float(mean), "low": float(mean - h)}
            rows.append(row | {"high": float(mean + h), "trials": len(loss)})
    return rows


def _design(alpha: np.ndarray, rate: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(alpha), alpha, alpha**2, rate, rate**2], 1)
