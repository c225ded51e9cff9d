"""Search of one arm: Optuna proposes from the arm's own space, and trials are stopped within the arm only.

What an arm's trial sees depends on the trial's number alone, never on which trial happened to end first: with
`parallel = k`, the suggestion and the stopping of trial i see the arm's trials 0 .. i - k. So the same study gives the
same configurations however many trials run side by side, and after any resume.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, insort
from itertools import product

import optuna

from tune.study.sections import Distribution, SearchSection
from tune.study.study import digest

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distribution(where: Distribution) -> optuna.distributions.BaseDistribution:
    """Optuna's form of a search range."""
    if where.choice is not None:
        return optuna.distributions.CategoricalDistribution(where.choice)
    low, high = where.loguniform or where.uniform or [0.0, 0.0]
    return optuna.distributions.FloatDistribution(low, high, log=where.loguniform is not None)


def grid(space: dict[str, Distribution]) -> list[dict[str, float]]:
    """Every combination of the choices of a space, the last hyperparameter changing fastest.

    Optuna's GridSampler draws them in a random order, and forgets which it had after a resume.
    """
    return [dict(zip(space, point, strict=True)) for point in product(*(where.values for where in space.values()))]


def make_sampler(kind: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """`tpe` (Bergstra et al. 2011; random for the first third, at least 3), `random`, or `qmc` (scrambled Sobol).

    For `grid`, whose trials are all given, any of them.
    """
    if kind in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind == "qmc":
            return optuna.samplers.QMCSampler(seed=0, scramble=True)  # one sequence: its points are numbered
        start = min(10, max(3, trials // 3))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=start)


class ArmSearch:
    """The search of one arm: `suggest` until `trials_per_arm`, `finish` each in any order."""

    def __init__(self, arm: str, space: dict[str, Distribution], settings: SearchSection) -> None:
        self.arm, self.settings = arm, settings
        self._grid = grid(space) if settings.sampler == "grid" else []
        self.space = {name: distribution(where) for name, where in space.items()}
        self._study = optuna.create_study(direction="minimize")
        self._asked: list[optuna.Trial] = []
        self._results: dict[int, tuple[str, float, int]] = {}
        self._halfway: dict[int, float] = {}
        self._ranked: list[float] = []  # the losses at the rung of the first `_ranked_to` trials, ascending
        self._ranked_to = 0
        self._told = 0

    def may_suggest(self) -> bool:
        """Whether the next trial may start: some are left, and those that it must see have ended."""
        asked = len(self._asked)
        return asked < self.settings.trials_per_arm and self._ended_up_to() >= asked - self.settings.parallel + 1

    def suggest(self, recorded: dict[str, float] | None = None) -> tuple[int, dict[str, float]]:
        """Number and configuration of the next trial; a `recorded` one (from the ledger) is taken as it stands."""
        index = len(self._asked)
        visible = max(0, index - self.settings.parallel + 1)
        while self._told < visible:
            self._tell(self._told)
        # a seed for each number, shared by all arms: a suggestion does not depend on how often the sampler was called
        seed = int(digest(["search", index]), 16) % (1 << 32)
        self._study.sampler = make_sampler(self.settings.sampler, seed, self.settings.trials_per_arm)
        if recorded is None and self._grid:
            recorded = self._grid[index]
        if recorded is not None:
            self._study.enqueue_trial(recorded)
        trial = self._study.ask(self.space)
        self._asked.append(trial)
        return index, dict(trial.params)

    def finish(self, index: int, outcome: str, loss: float, step: int) -> None:
        """Record how trial `index` ended: outcome, last validation loss (nats), and the step it reached."""
        self._results[index] = (outcome, loss, step)

    def should_stop(self, index: int, fraction: float, loss: float) -> bool:
        """Whether trial `index`, at `fraction` of its budget with validation loss `loss`, is stopped.

        Asynchronous successive halving (ASHA, Li et al. 2020, arXiv 1810.05934) with one rung, after `spare` of the
        budget: a trial goes on when its loss is among the best `keep` of the arm's visible trials at that rung, itself
        included; a trial that never got there counts as the worst. The first two trials always go on.
        """
        if self.settings.pruner == "none" or index in self._halfway or fraction < self.settings.spare or fraction >= 1:
            return False
        self._halfway[index] = loss
        visible = index - self.settings.parallel + 1
        if visible < 2:
            return False
        return self._better(loss, visible) >= max(1.0, self.settings.keep * (visible + 1))

    def _better(self, loss: float, visible: int) -> int:
        """How many of the first `visible` trials, all ended, had a lower loss at the rung.

        Each is ranked once. A trial that is asked about late sees fewer than one before it did: the difference, fewer
        than `parallel`, is taken off.
        """
        while self._ranked_to < visible:
            if (other := self._halfway.get(self._ranked_to, math.inf)) < math.inf:  # never a NaN: it has no rank
                insort(self._ranked, other)
            self._ranked_to += 1
        unseen = sum(self._halfway.get(i, math.inf) < loss for i in range(visible, self._ranked_to))
        return bisect_left(self._ranked, loss) - unseen

    @property
    def asked(self) -> int:
        """Trials suggested so far."""
        return len(self._asked)

    @property
    def ended(self) -> int:
        """Trials that have ended."""
        return len(self._results)

    @property
    def done(self) -> bool:
        """Whether every trial of the arm has ended."""
        return self.ended == self.settings.trials_per_arm

    @property
    def feasible(self) -> bool:
        """Whether any trial of the arm gave a loss."""
        return any(outcome in ("completed", "stopped_early") for outcome, _, _ in self._results.values())

    def best(self) -> dict[str, float]:
        """The configuration with the lowest validation loss among the trials trained to their end.

        Where none got there, the first suggestion: the calibration still tries it at every learning rate.
        """
        completed = [(loss, i) for i, (outcome, loss, _) in self._results.items() if outcome == "completed"]
        return dict(self._asked[min(completed)[1] if completed else 0].params)

    def _ended_up_to(self) -> int:
        ended = self._told
        while ended in self._results:
            ended += 1
        return ended

    def _tell(self, index: int) -> None:
        outcome, loss, step = self._results[index]
        trial = self._asked[index]
        if outcome == "completed":
            self._study.tell(trial, loss)
        elif outcome == "stopped_early":
            trial.report(loss, step)
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._told += 1
