"""How often the confirm stage errs, given the learning rates that a study chose.

A study's verdict is one draw: 2,000 of them tell the error rate to one percentage point. What differs between studies
is what search and calibration chose; the chance of an error given that choice is found from many confirm stages drawn
from the known losses. Its mean over the studies is the same error rate, known ten times as closely.
"""

import math

import numpy as np
from scipy import special
from simulation.world import TEST_NOISE, TREATMENTS, World, noise

DRAWS = 400  # confirm stages a study


def rejects(differences: np.ndarray, level: float) -> np.ndarray:
    """Which arms a paired t test with Holm's correction calls different: stages x arms from stages x arms x seeds."""
    n = differences.shape[-1]
    t = differences.mean(-1) / differences.std(-1, ddof=1) * math.sqrt(n)
    p = 2 * special.stdtr(n - 1, -np.abs(t))
    order = np.argsort(p, axis=1)
    steps = level / np.arange(p.shape[1], 0, -1)
    stops = np.cumprod(np.take_along_axis(p, order, 1) <= steps, axis=1).astype(bool)
    out = np.zeros_like(stops)
    np.put_along_axis(out, order, stops, 1)
    return out


def error(world: World, rates: dict[str, float], seeds: int, level: float, seed: int, draws: int = DRAWS) -> float:
    """Share of drawn confirm stages in which an equal treatment is called different; `rates` has the chosen ones."""
    rng, s = np.random.default_rng([seed, 11]), world.scenario
    arms = ["baseline", *(arm for arm in rates if arm != "baseline")]
    own = noise(s.noise, rng, (draws, len(arms), seeds)) + TEST_NOISE * noise(s.noise, rng, (draws, len(arms), seeds))
    sd = np.array([s.sd * s.noisier.get(arm, 1.0) for arm in arms])
    loss = np.array([world.best(arm) + world.excess(arm, rates[arm]) for arm in arms])
    runs = loss[:, None] + sd[:, None] * own
    equal = [arms[1:].index(arm) for arm in TREATMENTS if arm in rates and not s.gaps.get(arm)]
    return float(rejects(runs[:, :1] - runs[:, 1:], level)[:, equal].any(1).mean())
