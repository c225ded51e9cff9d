"""Error rate of the confirm stage, given the learning rates that a study chose.

A study's verdict is one draw, so 2,000 verdicts give the error rate to one percentage point. Studies differ only in the
choices of search and calibration. The chance of an error given that choice is estimated from many confirm stages drawn
from the known losses. Its mean over studies is the same error rate, with a tenth of the uncertainty.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy import special
from simulation.world import TEST_NOISE, World, noise, spikes

DRAWS = 400  # confirm stages per study


def rejects(differences: np.ndarray, level: float) -> np.ndarray:
    """Return the arms that a paired t test with Holm's correction calls different.

    `differences` has the axes stages x arms x seeds, and the result stages x arms.
    """
    n = differences.shape[-1]
    t = differences.mean(-1) / differences.std(-1, ddof=1) * math.sqrt(n)
    p = 2 * special.stdtr(n - 1, -np.abs(t))
    order = np.argsort(p, axis=1)
    steps = level / np.arange(p.shape[1], 0, -1)
    stops = np.cumprod(np.take_along_axis(p, order, 1) <= steps, axis=1).astype(bool)
    out = np.zeros_like(stops)
    np.put_along_axis(out, order, stops, 1)
    return out


def error(
    world: World,
    chosen: Mapping[str, float | Mapping[str, float]],
    seeds: int,
    level: float,
    seed: int,
    draws: int = DRAWS,
) -> float | None:
    """Return the share of drawn confirm stages in which an equal treatment is called different.

    Return None if a chosen learning rate may diverge, because no diverged run is drawn.

    Args:
        world: The world.
        chosen: The chosen learning rate of each arm, or its configuration.
        seeds: Number of confirm seeds.
        level: Level of the family.
        seed: Seed of the drawn stages.
        draws: Number of drawn stages.
    """
    rng, s = np.random.default_rng([seed, 11]), world.scenario
    arms = ["baseline", *(arm for arm in chosen if arm != "baseline")]
    configs = {arm: {"lr": at} if isinstance(at, float) else at for arm, at in chosen.items()}
    if any(math.log(configs[arm]["lr"]) - world.optimum[arm] > s.diverges - 4 * s.ragged for arm in arms):
        return None
    own = noise(s.noise, rng, (draws, len(arms), seeds)) + TEST_NOISE * noise(s.noise, rng, (draws, len(arms), seeds))
    sd = np.array([s.sd * s.noisier.get(arm, 1.0) for arm in arms])
    loss = np.array([world.best(arm) + world.excess(arm, configs[arm]["lr"], configs[arm]) for arm in arms])
    runs = loss[:, None] + sd[:, None] * own
    for arm, height in s.spikes.items():
        runs[:, arms.index(arm)] += spikes(height, rng, (draws, seeds))
    equal = [arms[1:].index(arm) for arm in s.equal if arm in chosen]
    return float(rejects(runs[:, :1] - runs[:, 1:], level)[:, equal].any(1).mean())
