"""Trials of simulated studies with known true losses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from tune.study.cell import Cell

STUDY = """
question: Does an arm beat the baseline?
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 4096, batch_tokens: 64, eval_every: 16}
nuisance: {NUISANCE}
arms:
  baseline: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
  first: {gate: sigmoid, alpha: 0.5}
  second: {gate: sigmoid, alpha: {learnable: {init: 0.5}}}
  searched: {gate: sigmoid, alpha: {search: {uniform: [0.0, 2.0]}}}
search: SEARCH
calibrate: {CALIBRATE, choice: CHOICE}
confirm: CONFIRM
keep: {models: none}
"""
OWN_STUDY = """
question: Does an arm beat the baseline?
trial: function.py:train
metric: {name: METRIC, test: test_METRIC, goal: GOAL}
budget: {steps: 64}
nuisance: {NUISANCE}
arms:
  baseline: {baseline: true, set: {kind: baseline}}
  floor: {floor: true, set: {kind: floor}}
  first: {set: {kind: first}}
  second: {set: {kind: second}}
  searched: {set: {kind: searched}, search: {beta: {uniform: [0.0, 2.0]}}}
search: SEARCH
calibrate: {CALIBRATE, choice: CHOICE}
confirm: CONFIRM
"""
GOALS = {"loss": "minimize", "score": "maximize"}  # metrics of a user's function
MORE = {"fourth": "alpha: 0.25", "fifth": "alpha: 0.75", "sixth": "alpha: 1.0"}  # further treatments, equal ones
RANGES = {"lr": (1e-4, 1e-2), "weight_decay": (1e-2, 1.0), "clip": (0.1, 10.0)}  # nuisances that a scenario may have
CONFIRM = {rule: f"rule: {rule}" for rule in ("obrien-fleming", "e-process")} | {"fixed": "seeds: 8"}
TREATMENTS = ("first", "second", "searched")
LOSS = 3.3  # nats, of the baseline at its optimum
TEST_GAP = 0.02  # nats from validation to test loss
TEST_NOISE = 0.2  # as a share of the noise that is a run's own
USUAL_SEEDS = 5
SPIKED = 0.1  # share of the runs of a spiked arm that have a spike


@dataclass(frozen=True)
class Scenario:
    """True properties of the simulated trials, with losses in nats and learning rates as natural logarithms."""

    name: str
    gaps: dict[str, float] = field(default_factory=dict)  # of an arm's best loss to the baseline's
    curvature: float = 0.06  # loss = best + curvature * (log rate - optimum)^2, steeper above than below
    optima_apart: float = 0.0  # each arm's optimum is uniform within this distance of the common one
    # normal; heavy: Student's t with 3 degrees of freedom; skewed: exponential, of skewness 2. All of one sd
    noise: str = "normal"
    sd: float = 0.006  # of a run's own noise, on top of the part its seed shares
    noisier: dict[str, float] = field(default_factory=dict)  # factor of sd by arm
    shared_sd: float = 0.012  # of the noise that all runs of one seed share
    floor_gap: float = 0.15
    choice: str = "fit"
    rule: str = "fixed"
    studies: float = 1.0  # share of the requested number of studies
    further: dict[str, float] = field(default_factory=dict)  # curvature of each further nuisance, as that of lr
    interaction: float = 0.0  # correlation of any two nuisances in the bowl: 2 r sqrt(c1 c2) z1 z2 is added
    trials: int = 6  # search trials per arm
    diverges: float = 2.0  # distance above the optimum from which a rate diverges
    ragged: float = 0.2  # standard deviation of that distance from run to run
    spikes: dict[str, float] = field(default_factory=dict)  # height of the spikes of an arm, whose mean stays
    more: int = 0  # further treatments, of `MORE`
    confirm: str = ""  # keys of the confirm section instead of those of the rule
    keys: str = ""  # further keys of the study file
    search_arms: str = "all"  # that search: all, or those with hyperparameters of their `own`
    calibrate: str = "points: 3, seeds: 2"  # keys of the calibrate section
    metric: str = ""  # of a user's function, `loss` or `score`; empty for the built-in model
    added: str = ""  # whether confirm seeds are added after the verdict: "as advised" or "against the advice"

    @property
    def null(self) -> bool:
        """True if no treatment differs from the baseline."""
        return not any(self.gaps.values())

    @property
    def study(self) -> str:
        """Study file of the scenario."""
        ranges = {name: RANGES[name] for name in ("lr", *self.further)}
        nuisance = ", ".join(f"{name}: {{loguniform: [{low}, {high}]}}" for name, (low, high) in ranges.items())
        parts = {
            "NUISANCE": nuisance,
            "SEARCH": f"{{trials_per_arm: {self.trials}, arms: {self.search_arms}}}",
            "CALIBRATE": self.calibrate,
            "CHOICE": self.choice,
            "METRIC": self.metric,
            "GOAL": GOALS.get(self.metric, ""),
        }
        text = OWN_STUDY if self.metric else STUDY
        for part, value in {**parts, "CONFIRM": f"{{{self.confirm or CONFIRM[self.rule]}}}"}.items():
            text = text.replace(part, value)
        arms = "".join(f"  {name}: {{gate: sigmoid, {MORE[name]}}}\n" for name in self.treatments[len(TREATMENTS) :])
        return text.replace("\nsearch:", f"\n{arms}search:") + self.keys

    @property
    def treatments(self) -> tuple[str, ...]:
        """Arms that are compared with the baseline, except the floor."""
        return (*TREATMENTS, *list(MORE)[: self.more])

    @property
    def equal(self) -> list[str]:
        """Treatments that do not differ from the baseline."""
        return [arm for arm in self.treatments if not self.gaps.get(arm)]


EFFECT = {"first": -0.010, "second": -0.020, "searched": 0.020}
CLEAR = {"first": -0.020, "second": -0.030, "searched": 0.030, "fourth": 0.040}
APART = math.log(1.5)
FLAT = 0.008  # a curvature at which two grid points differ by about the noise: the hardest case for a choice
NULLS = [
    Scenario("normal noise"),
    Scenario("heavy-tailed noise (t, 3 df)", noise="heavy"),
    Scenario("unequal noise (one arm 4 times)", noisier={"second": 4.0}),
    Scenario("optima apart (up to a factor 1.5)", optima_apart=APART, studies=0.5),
    Scenario("flat bowls, optima apart", curvature=FLAT, optima_apart=APART, studies=0.5),
    Scenario("unequal noise, optima apart", noisier={"second": 4.0}, optima_apart=APART, studies=0.5),
]
SHORT = {"search_arms": "own", "calibrate": "points: 4, seeds: 1", "studies": 0.06}  # stages with fewer trials
FEWER = [
    Scenario("fewer tuning trials", **SHORT),
    Scenario("fewer tuning trials, optima apart", optima_apart=APART, **SHORT),
    Scenario("fewer tuning trials, flat bowls, optima apart", curvature=FLAT, optima_apart=APART, **SHORT),
    Scenario("fewer tuning trials, unequal noise", noisier={"second": 4.0}, **SHORT),
]
GRID = [
    Scenario("grid's best, normal noise", choice="grid", studies=0.2),
    Scenario("grid's best, optima apart", choice="grid", optima_apart=APART, studies=0.2),
    Scenario("grid's best, flat bowls", choice="grid", curvature=FLAT, optima_apart=APART, studies=0.2),
]
SEQUENTIAL = [
    Scenario("O'Brien-Fleming looks", rule="obrien-fleming", studies=0.5),
    Scenario("six arms, O'Brien-Fleming looks", rule="obrien-fleming", more=3, studies=0.15),
    Scenario("e-process", rule="e-process", studies=0.25),
]
CONTRASTS = [
    Scenario("two contrasts", keys="contrasts: [[first, second], [second, searched]]\n", studies=0.15),
]
NARROW = "seeds: 8, margin: 0.2%"  # a margin at which many arms stay undecided, so that seeds are added
OWN = [
    Scenario("a user's function, a loss", metric="loss", studies=0.5),
    Scenario("a user's function, a score to maximise", metric="score", studies=0.5),
]
MANY = [Scenario("60 confirm seeds", confirm="seeds: 60", studies=0.05)]
EXTENDED = [
    Scenario(
        "seeds added as advised, reserve 0.2", confirm=f"{NARROW}, reserve: 0.2", added="as advised", studies=0.15
    ),
    Scenario("no reserve, seeds added against the advice", confirm=NARROW, added="against the advice", studies=0.15),
]
EFFECTS = [
    Scenario("true differences", gaps=EFFECT, studies=0.25),
    Scenario("true differences, optima apart", gaps=EFFECT, optima_apart=APART, studies=0.25),
    Scenario("true differences, O'Brien-Fleming", gaps=EFFECT, rule="obrien-fleming", studies=0.2),
    Scenario("true differences, e-process", gaps=EFFECT, rule="e-process", studies=0.15),
    Scenario("six arms, four differ, e-process", gaps=CLEAR, rule="e-process", more=3, studies=0.025),
    Scenario(
        "the same, no arm stops alone",
        gaps=CLEAR,
        confirm="rule: e-process, racing: false",
        rule="e-process",
        more=3,
        studies=0.025,
    ),
]
SEVERAL = [
    Scenario(f"two nuisances, the second {kind}", further={"weight_decay": curvature}, studies=0.1)
    for kind, curvature in (("flat", 0.005), ("clear", 0.02), ("steep", 0.06))
] + [
    Scenario("two nuisances that interact", further={"weight_decay": 0.02}, interaction=0.6, studies=0.1),
    Scenario("two nuisances, 16 search trials", further={"weight_decay": 0.02}, trials=16, studies=0.1),
    Scenario("three nuisances", further={"weight_decay": 0.02, "clip": 0.02}, studies=0.1),
    Scenario(
        "three nuisances that interact", further={"weight_decay": 0.02, "clip": 0.02}, interaction=0.6, studies=0.1
    ),
]
EDGES = [
    Scenario("divergence from twice the optimum on", diverges=math.log(2.0), ragged=0.05, studies=0.1),
    Scenario("divergence from 2.7 times the optimum on", diverges=math.log(2.7), ragged=0.05, studies=0.1),
    Scenario("optima up to 4 times apart", optima_apart=math.log(4) / 2, studies=0.1),
    Scenario("optima up to 13 times apart", optima_apart=math.log(13) / 2, studies=0.1),
]
ODD = [
    Scenario("skewed noise", noise="skewed", studies=0.1),
    Scenario("skewed noise, one arm 4 times", noise="skewed", noisier={"second": 4.0}, studies=0.1),
    Scenario("spikes in one arm (10% of runs)", spikes={"second": 0.1}, studies=0.1),
]
BLIND = [Scenario("the floor does not lose", floor_gap=0.0, studies=0.1)]
SCENARIOS = [
    *NULLS,
    *FEWER,
    *SEVERAL,
    *EDGES,
    *ODD,
    *SEQUENTIAL,
    *CONTRASTS,
    *OWN,
    *MANY,
    *EXTENDED,
    *GRID,
    *BLIND,
    *EFFECTS,
]


def noise(kind: str, rng: np.random.Generator, shape: tuple[int, ...] | None = None) -> Any:
    """Draw noise of mean 0 and standard deviation 1, of the kinds that `Scenario.noise` names."""
    if kind == "skewed":
        return rng.standard_exponential(shape) - 1.0
    return rng.standard_normal(shape) if kind == "normal" else rng.standard_t(3, shape) / math.sqrt(3)


def spikes(height: float, rng: np.random.Generator, shape: tuple[int, ...] | None = None) -> Any:
    """Draw spikes: `height` in a share `SPIKED` of the runs, less their mean."""
    return height * ((rng.random(shape) < SPIKED) - SPIKED)


class World:
    """Trials of one simulated study."""

    def __init__(self, scenario: Scenario, arms: list[str], seed: int) -> None:
        self.scenario, self._rng = scenario, np.random.default_rng([seed, 7])
        centre = math.log(1e-3) + self._rng.uniform(-1, 1)
        apart = scenario.optima_apart
        self.optimum = {arm: centre + self._rng.uniform(-apart, apart) for arm in arms}
        self.slowness = {arm: self._rng.uniform(3, 6) for arm in arms}  # how fast a curve falls: slow starters
        rng = np.random.default_rng([seed, 13])  # of its own, so that a further nuisance changes nothing else
        middle = {name: math.log(math.prod(RANGES[name])) / 2 + rng.uniform(-1, 1) for name in scenario.further}
        self.further = {arm: {name: at + rng.uniform(-apart, apart) for name, at in middle.items()} for arm in arms}
        self._shared: dict[int, float] = {}
        self._ends: dict[str, float] = {}  # last validation loss by cell

    def best(self, arm: str) -> float:
        """Return the arm's loss at its optimum, without noise."""
        gap = self.scenario.floor_gap if arm == "floor" else self.scenario.gaps.get(arm, 0.0)
        return LOSS + gap

    def trial(self, arm: str, lr: float, seed: int, further: Mapping[str, float] | None = None) -> float:
        """Return the last validation loss of a run; infinite if it diverged.

        Args:
            arm: Name of the arm.
            lr: Learning rate.
            seed: Seed of the run.
            further: Values of the further nuisances; None if the scenario has none.
        """
        z, s = math.log(lr) - self.optimum[arm], self.scenario
        if z > s.diverges + s.ragged * self._rng.standard_normal():
            return math.inf
        shared = self._shared.setdefault(seed, s.shared_sd * self._rng.standard_normal())
        spike = float(spikes(s.spikes[arm], self._rng)) if arm in s.spikes else 0.0
        return self.best(arm) + self.excess(arm, lr, further) + shared + self.own_noise(arm) + spike

    def excess(self, arm: str, lr: float, further: Mapping[str, float] | None = None) -> float:
        """Return the excess of a configuration's loss over the arm's optimum, without noise, in nats."""
        z, s = math.log(lr) - self.optimum[arm], self.scenario
        out = s.curvature * z * z * (1 + 0.2 * math.tanh(z))
        seen = [(s.curvature, z)]
        for name, curvature in s.further.items():
            other = math.log((further or {})[name]) - self.further[arm][name]
            out += curvature * other * other
            out += sum(2 * s.interaction * math.sqrt(c * curvature) * each * other for c, each in seen)
            seen.append((curvature, other))
        return out

    def own_noise(self, arm: str) -> float:
        """Draw the noise that a run does not share with the other runs of its seed."""
        s = self.scenario
        return s.sd * s.noisier.get(arm, 1.0) * float(noise(s.noise, self._rng))

    def test_loss(self, arm: str, loss: float) -> float:
        """Return the test loss of a run that ends with validation loss `loss`."""
        return loss + TEST_GAP + TEST_NOISE * self.own_noise(arm)

    def curve(self, arm: str, loss: float, fraction: float) -> float:
        """Return the validation loss at a fraction of the budget, for a run that ends with `loss`."""
        return loss + 2.0 * math.exp(-self.slowness[arm] * fraction) + 0.01 * float(self._rng.standard_normal())

    def loss(self, cell: Cell, share: float) -> float:
        """Return the validation loss of a cell at a share of its budget, as `tune.subject.known.Known` calls it."""
        if cell.key not in self._ends:
            self._ends[cell.key] = self.trial(cell.arm, cell.config["lr"], cell.seed, cell.config)
        end = self._ends[cell.key]
        curved = cell.stage == "search" and share < 1 and math.isfinite(end)
        return self.curve(cell.arm, end, share) if curved else end

    def test(self, cell: Cell) -> float:
        """Return the test loss of a cell that was trained to its end."""
        return self.test_loss(cell.arm, self._ends[cell.key])

    def usual_practice(self, arms: list[str], trials: int) -> dict[str, float]:
        """Return Welch's p of each treatment under usual practice.

        The best trial of its own random search is compared with the baseline's best, on 5 seeds each.
        """
        runs: dict[str, list[float]] = {}
        for i, arm in enumerate(arms):
            drawn = {
                name: np.exp(self._rng.uniform(*np.log(RANGES[name]), trials))
                for name in ("lr", *self.scenario.further)
            }
            configs = [{name: float(values[k]) for name, values in drawn.items()} for k in range(trials)]
            best = configs[int(np.argmin([self.trial(arm, config["lr"], 1, config) for config in configs]))]
            runs[arm] = [self.trial(arm, best["lr"], 10_000 + 100 * i + k, best) for k in range(USUAL_SEEDS)]
        out = {}
        for arm in self.scenario.treatments:
            finite = all(np.isfinite(runs[arm] + runs["baseline"]))
            out[arm] = float(stats.ttest_ind(runs[arm], runs["baseline"], equal_var=False).pvalue) if finite else 0.0
        return out
