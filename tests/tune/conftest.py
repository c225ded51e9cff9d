"""What the tests of this wing share: a small study played without training."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tune import ledger as ledgers
from tune import plan_work
from tune.ledger import Ledger
from tune.stages import Stages
from tune.study import parse

SMALL = """
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 6400, batch_tokens: 64, eval_windows: 8}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
  mine: {gate: tanh, alpha: 0.5}
"""


@pytest.fixture(scope="session")
def small_text():
    """The small study's file, of three arms."""
    return SMALL


@pytest.fixture(scope="session")
def study_of():
    """The small study, with more lines in its file."""
    return lambda more="": parse(SMALL + more, Path("small.yaml"))


@pytest.fixture(scope="session")
def models_of():
    """Parameters and FLOPs of each arm's model of a study, at a vocabulary of 300."""
    return lambda study: {arm: plan_work.arm_model(study, arm, 300) for arm in study.arms}


@pytest.fixture(scope="session")
def rows_of(models_of):
    """What a study's stages and arms are planned to take."""
    return lambda study: plan_work.work(study, models_of(study), plan_work.confirm_seeds(study))


@pytest.fixture(scope="session")
def played():
    """Cells of a whole study whose trials give `loss(cell, share of the budget)`, and their tokens: no training.

    With `folder` the ledger is written there, as a study writes it.
    """

    def play(study, loss, folder=None):
        ledger = Ledger(folder / "ledger.jsonl") if folder else None
        stages = Stages(study, ledger.append if ledger else lambda event, **fields: None, {})
        cells, tokens = [], Counter()
        batch, whole, every = study.fixed.batch_tokens, plan_work.steps(study), plan_work.interval(study)
        while (cell := stages.next_cell()) is not None:
            done, outcome = 0, "completed"
            if ledger:
                shown = {
                    name: getattr(cell, name) for name in ("stage", "arm", "index", "seed", "config", "config_key")
                }
                ledger.append("suggested", cell=cell.key, **shown)
                ledger.append("started", cell=cell.key)
            while done < whole and outcome == "completed":
                done = min(whole, done + every)
                value = loss(cell, done / whole)
                if ledger:
                    noise = np.random.default_rng(done).uniform(0.1, 1.0, 5).tolist()
                    row = dict(
                        zip(("train_nll", "lr", "grad_norm", "tokens_per_second", "val_nll"), noise, strict=True)
                    )
                    learned = getattr(study.arms[cell.arm].alpha, "learnable", None)
                    alpha = [0.1234567890123456] * study.model.n_layer if learned else []
                    ledger.append(
                        "report", cell=cell.key, row={"step": done, "tokens": done * batch, **row, "alpha": alpha}
                    )
                if done < whole and stages.should_stop(cell, done / whole, value):
                    outcome = "stopped_early"
            final = dict.fromkeys((*ledgers.FINAL, *ledgers.COST, "alpha", "compiled", "test_nll"), 1.2345678901234567)
            if ledger:
                final |= {"tokens": done * batch, "steps": done, "val_nll": value, "test_nll": value}
                ledger.append("ended", cell=cell.key, outcome=outcome, final=final, reason=None)
            stages.complete(cell, outcome, value, done)
            cells.append(cell)
            tokens[cell.stage, cell.arm] += done * batch
        assert stages.finished
        if ledger:
            ledger.close()
        return Counter((cell.stage, cell.arm) for cell in cells), tokens

    return play


@pytest.fixture(scope="session")
def inside():
    """Each later trial is better, and the grid's middle is best: nothing is stopped, nothing extended."""

    def loss(cell, share):
        if cell.stage == "search":
            return 3.0 - 0.001 * cell.index - share
        return 3.0 + 0.1 * abs(cell.index - 1)

    return loss
