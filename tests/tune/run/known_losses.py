"""Study of known losses, in which one arm is better, one is equal, and the floor loses."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from analysis.io.assemble import assemble
from analysis.verdict.decide import decide
from tests.studies import TINY, changed, study_of
from tune.backend.inline import Inline
from tune.run.ledger import MemoryLedger
from tune.run.study_run import StudyRun
from tune.run.tables import tables
from tune.subject.known import Known

STUDY = changed(
    TINY,
    fixed={"tokens": 640},
    keep={"models": "none"},
    arms={"one": {"gate": "tanh", "alpha": 0.5}, "two": {"gate": "relu", "alpha": 0.5}},
    search={"pruner": "none"},
    stages=["search", "confirm"],
    confirm={"seeds": 6},
)


GAIN = {"gelu": 0.0, "linear-floor": -0.5, "one": 0.03, "two": 0.0}  # nats below the baseline


def study(**changes):
    return study_of(STUDY, name="s", **changes)


def loss(cell, share):
    """Return a loss with noise that a cell always has; `one` is better, and `two` is equal to the baseline."""
    own = np.random.default_rng([cell.seed, *map(ord, cell.arm)]).normal()
    return 3.0 + 0.1 * math.sin(cell.seed) + 0.01 * own - GAIN[cell.arm]


def run(study, ledger=None, test=loss):
    """Run a study on a ledger, of which earlier studies may have written a part. Return the run."""
    run = StudyRun(study, None, Known(study, test), ledger=ledger or MemoryLedger())
    Inline().train(run)
    assert run.stages.finished
    assert run.stages.remaining() == 0
    assert run.progress.finished
    return run


def table(run):
    rows, _ = tables("s", run.ledger.events)
    return assemble("s", "s", rows, pd.DataFrame(), run.study.model_dump())


def decided(run, study):
    assert run.study == study
    return decide(table(run))


def differences(run, arm, n, reference="gelu"):
    """Return the differences of the first n seeds, from the ledger's own lines."""
    found = {}
    for event in run.ledger.events:
        if event["event"] == "ended" and event["cell"].startswith("confirm/"):
            _, name, _, seed = event["cell"].split("/")
            found[name, int(seed)] = event["final"]["test_nll"]
    return np.array([found[reference, 101 + i] - found[arm, 101 + i] for i in range(n)])


def p_of(d):
    return stats.ttest_1samp(d, 0.0).pvalue


def of(event, arm):
    return event["event"] == "ended" and event["cell"].startswith(f"confirm/{arm}/")
