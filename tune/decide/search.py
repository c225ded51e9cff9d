"""Search of one arm. Optuna samples from the arm's own space, and a trial is compared only with trials of its arm.

The suggestion and the stopping of trial i use the results of the arm's trials 0 .. i - k, with `parallel = k`. They do
not depend on which trial ended first. So a study has the same configurations for any number of slots and after any
resume.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, insort
from itertools import product

import optuna

from tune.study.sections import Distribution, SearchSection
from tune.study.sizes import search_trials
from tune.study.study import digest

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distribution(where: Distribution, unit: int | None = None) -> optuna.distributions.BaseDistribution:
    """Convert a search range to a distribution of Optuna. With a `unit`, a range is that of the number of units."""
    if where.choice is not None:
        return optuna.distributions.CategoricalDistribution(where.choice)
    low, high = where.loguniform or where.uniform or [0.0, 0.0]
    if unit:
        return optuna.distributions.IntDistribution(
            int(low) // unit, int(high) // unit, log=where.loguniform is not None
        )
    return optuna.distributions.FloatDistribution(low, high, log=where.loguniform is not None)


def grid(space: dict[str, Distribution]) -> list[dict[str, float]]:
    """Return every combination of the choices of a space once. The last hyperparameter changes fastest.

    Optuna's GridSampler is not used, because its order is random and it forgets used combinations after a resume.
    """
    return [
        dict(zip(space, point, strict=True))
        for point in product(*(dict.fromkeys(where.values) for where in space.values()))
    ]


def make_sampler(kind: str, seed: int, trials: int, replicate: int = 0) -> optuna.samplers.BaseSampler:
    """Create a sampler of Optuna.

    Args:
        kind: `tpe` (Bergstra et al. 2011; random for the first third of the trials, 3 to 10), `random`, `qmc`
            (scrambled Sobol), or `grid`, whose trials are all given, so that its sampler is never used.
        seed: Seed of the sampler; `qmc` ignores it.
        trials: Number of trials of the arm.
        replicate: Seed of the sequence of `qmc`.
    """
    if kind in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind == "qmc":
            return optuna.samplers.QMCSampler(seed=replicate, scramble=True)  # one sequence: trial i is its point i
        start = min(10, max(3, trials // 3))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=start)


class ArmSearch:
    """Search of one arm. Call `suggest` until `trials_per_arm`, and `finish` for each trial in any order."""

    def __init__(
        self,
        arm: str,
        space: dict[str, Distribution],
        settings: SearchSection,
        recorded: int = 0,
        replicate: int = 0,
        unit: int | None = None,
    ) -> None:
        """Prepare the search of an arm.

        Args:
            arm: Name of the arm.
            space: Its search space.
            settings: The search section of the study.
            recorded: Number of its trials in the ledger, which may repeat each other.
            replicate: Replicate of the study. Each one has suggestions of its own.
            unit: Tokens of which `batch_tokens` is a multiple.
        """
        self.arm, self.settings, self._replicate = arm, settings, replicate
        self.trials = max(search_trials(space, settings), min(recorded, settings.trials_per_arm))
        self._choices = space if all(where.choice for where in space.values()) else {}
        self._grid = grid(space) if settings.sampler == "grid" else []
        ranges = {name for name, where in space.items() if not where.choice}
        self._units = {"batch_tokens": unit} if unit and "batch_tokens" in ranges else {}
        self.space = {name: distribution(where, self._units.get(name)) for name, where in space.items()}
        self._study = optuna.create_study(direction="minimize")
        self._asked: list[optuna.Trial] = []
        self._results: dict[int, tuple[str, float, int]] = {}
        self._halfway: dict[int, float] = {}
        self._ranked: list[float] = []  # losses halfway of the first `_ranked_to` trials, ascending
        self._ranked_to = 0
        self._told = 0

    def may_suggest(self) -> bool:
        """Return True if a trial is left and all trials that its suggestion depends on have ended."""
        asked = len(self._asked)
        return asked < self.trials and self._ended_up_to() >= asked - self.settings.parallel + 1

    def suggest(self, recorded: dict[str, float] | None = None) -> tuple[int, dict[str, float]]:
        """Return the number and the configuration of the next trial.

        Args:
            recorded: Configuration of this trial in the ledger, to be used unchanged. None asks the sampler.
        """
        index = len(self._asked)
        visible = max(0, index - self.settings.parallel + 1)
        while self._told < visible:
            self._tell(self._told)
        # one seed per number, the same in all arms: a suggestion does not depend on earlier calls of the sampler
        drawn = ["search", index, self._replicate] if self._replicate else ["search", index]
        seed = int(digest(drawn), 16) % (1 << 32)
        # a choice has no place in a Sobol sequence, whose number a replaced suggestion would also advance
        kind = "random" if self._choices and self.settings.sampler == "qmc" else self.settings.sampler
        self._study.sampler = make_sampler(kind, seed, self.settings.trials_per_arm, self._replicate)
        if recorded is None and self._grid:
            recorded = self._grid[index]
        trial = self._ask(recorded)
        if recorded is None and self._choices and (unused := self._unused(trial.params)):
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # samplers pass over failed trials
            trial = self._ask(unused[seed % len(unused)])
        self._asked.append(trial)
        return index, self._config(trial)

    def _ask(self, given: dict[str, float] | None) -> optuna.Trial:
        if given is not None:
            units = {name: int(given[name]) // unit for name, unit in self._units.items()}
            self._study.enqueue_trial({**given, **units})
        return self._study.ask(self.space)

    def _config(self, trial: optuna.Trial) -> dict[str, float]:
        found: dict[str, float] = dict(trial.params)
        return found | {name: float(found[name] * unit) for name, unit in self._units.items()}

    def _unused(self, suggested: dict[str, float]) -> list[dict[str, float]]:
        """Return the combinations of the choices that no trial has, or an empty list if `suggested` is one of them.

        A repeated configuration gives the same loss bit for bit, because all search trials have the same seed. Of the
        combinations, those that differ from the suggested one in the fewest hyperparameters are returned.
        """
        asked = [trial.params for trial in self._asked]
        if suggested not in asked:
            return []
        unused = [point for point in grid(self._choices) if point not in asked]
        apart = [sum(point[name] != suggested[name] for name in point) for point in unused]
        return [point for point, number in zip(unused, apart, strict=True) if number == min(apart)]

    def finish(self, index: int, outcome: str, loss: float, step: int) -> None:
        """Record the result of a trial.

        Args:
            index: Number of the trial.
            outcome: Its outcome.
            loss: Its last validation loss in nats per token.
            step: Its last step.
        """
        self._results[index] = (outcome, loss, step)

    def should_stop(self, index: int, fraction: float, loss: float) -> bool:
        """Return True if a trial has to stop early.

        The rule is asynchronous successive halving (ASHA, Li et al. 2020, arXiv 1810.05934) with one stopping
        point, after the fraction `spare` of the budget. A trial continues if its loss is in the best fraction `keep` of
        the arm's visible trials there, itself included. A trial that never got there counts as the worst. The first two
        trials always continue.

        Args:
            index: Number of the trial.
            fraction: Fraction of its budget that it has reached.
            loss: Its validation loss there, in nats per token.
        """
        if self.settings.pruner == "none" or index in self._halfway or fraction < self.settings.spare or fraction >= 1:
            return False
        self._halfway[index] = loss
        visible = index - self.settings.parallel + 1
        if visible < 2:
            return False
        return self._better(loss, visible) >= max(1.0, self.settings.keep * (visible + 1))

    def _better(self, loss: float, visible: int) -> int:
        """Count those of the first `visible` trials, all ended, whose loss at the stopping point was lower.

        Each trial is ranked once. A trial may be compared after a later one that saw more trials. The trials that it
        must not see, fewer than `parallel`, are then subtracted.
        """
        while self._ranked_to < visible:
            if (other := self._halfway.get(self._ranked_to, math.inf)) < math.inf:  # False for NaN, which has no rank
                insort(self._ranked, other)
            self._ranked_to += 1
        unseen = sum(self._halfway.get(i, math.inf) < loss for i in range(visible, self._ranked_to))
        return bisect_left(self._ranked, loss) - unseen

    @property
    def asked(self) -> int:
        """Number of trials suggested so far."""
        return len(self._asked)

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return len(self._results)

    @property
    def done(self) -> bool:
        """True if every trial of the arm has ended."""
        return self.ended == self.trials

    @property
    def feasible(self) -> bool:
        """True if any trial of the arm gave a loss."""
        return any(outcome in ("completed", "stopped_early") for outcome, _, _ in self._results.values())

    def best(self) -> dict[str, float]:
        """Return the configuration with the lowest validation loss among the completed trials.

        If none is completed, return the first suggestion. The calibrate stage still tries it at every learning rate.
        """
        completed = [(loss, i) for i, (outcome, loss, _) in self._results.items() if outcome == "completed"]
        return self._config(self._asked[min(completed)[1] if completed else 0])

    def _ended_up_to(self) -> int:
        """Return the largest number n such that the trials 0 .. n - 1 have all ended."""
        ended = self._told
        while ended in self._results:
            ended += 1
        return ended

    def _tell(self, index: int) -> None:
        """Report the result of a trial to Optuna."""
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
