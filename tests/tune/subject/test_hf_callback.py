"""Tests of `trial.hf_callback` with the real Trainer."""

import time
from types import SimpleNamespace

import pytest
import torch

from tune.subject.own_worker import OwnTrial, Refused, returned

ROWS = [{"x": torch.randn(3, generator=torch.Generator().manual_seed(i)), "y": torch.ones(1)} for i in range(12)]


class Linear(torch.nn.Module):
    """A model of the kind that Trainer takes."""

    main_input_name = "x"

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, y):
        return {"loss": (self.layer(x) - y).square().mean()}


def trial_of(budget, unit="steps", test=False):
    """Return a trial, and the list of its reports."""
    order = {"arm": "a", "seed": 1, "budget": budget, "unit": unit, "test": test, "folder": ".", "values": {}}
    told = []
    trial = OwnTrial(
        {**order, "metric": "val_loss", "test_metric": "test_loss"}, lambda **line: told.append(line), lambda: None
    )
    return trial, told


def trainer(trial, folder, names=None, **options):
    """Return a Trainer of 3 steps per epoch with the trial's callback."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = {"train_dataset": ROWS, "eval_dataset": options.pop("eval_dataset", ROWS[:4])}
    given = {"per_device_train_batch_size": 4, "label_names": ["y"], "report_to": "none", "use_cpu": True, **options}
    callback = trial.hf_callback(**(names or {"val_loss": "eval_loss"}))
    return Trainer(Linear(), TrainingArguments(str(folder), **given), callbacks=[callback], **data)


@pytest.mark.parametrize(
    ("budget", "unit", "options", "steps"),
    [
        (7, "steps", {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 3}, [3, 6, 7]),
        (7, "steps", {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, [2, 4, 6, 7]),
        (7, "steps", {"max_steps": 7, "eval_strategy": "epoch"}, [3, 6, 7]),
        (7, "steps", {"max_steps": 7, "eval_strategy": "no"}, [7]),
        (7, "steps", {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 2, "eval_delay": 9}, [7]),
        (4, "steps", {"max_steps": 4, "gradient_accumulation_steps": 2, "eval_strategy": "epoch"}, [2, 4]),
        (3, "epochs", {"num_train_epochs": 3, "eval_strategy": "epoch"}, [1, 2, 3]),
        (2, "epochs", {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 1}, [1, 2]),
        (2, "epochs", {"num_train_epochs": 2, "eval_strategy": "no"}, [2]),
        (50, "tokens", {"max_steps": 9, "include_num_input_tokens_seen": True, "eval_steps": 2, "eval_strategy":
            "steps"}, [24, 48, 50]),
    ],
)  # fmt: skip
def test_every_evaluation_is_reported_once_and_the_end_always_is(tmp_path, budget, unit, options, steps):
    trial, told = trial_of(budget, unit, test=True)
    made = trainer(trial, tmp_path, **options)
    made.train()
    assert [line["step"] for line in told] == steps
    losses = [line["metrics"]["val_loss"] for line in told]
    assert losses[-1] == made.evaluate()["eval_loss"]
    found = {"test_loss": made.evaluate(ROWS[6:], metric_key_prefix="test")["test_loss"]}
    assert [line["step"] for line in told] == steps  # evaluations after the training are no reports
    assert returned(trial, found, "test_loss") == found


def test_seconds_are_those_of_the_training(tmp_path):
    trial, told = trial_of(2, "seconds")
    trial._wait = lambda: time.sleep(0.6)
    made = trainer(trial, tmp_path, max_steps=10**6, eval_strategy="steps", eval_steps=50)
    began = time.monotonic()
    made.train()
    assert [line["step"] for line in told] == [1, 2]
    assert 2.6 < time.monotonic() - began < 12


def test_the_metrics_of_several_data_sets_are_one_report(tmp_path):
    trial, told = trial_of(4)
    names = {"val_loss": "eval_b_loss", "easy_loss": "eval_a_loss"}
    sets = {"a": ROWS[:4], "b": ROWS[4:8]}
    trainer(trial, tmp_path, names, max_steps=4, eval_strategy="steps", eval_steps=2, eval_dataset=sets).train()
    assert [(line["step"], sorted(line["metrics"])) for line in told] == [
        (n, ["easy_loss", "val_loss"]) for n in (2, 4)
    ]


@pytest.mark.parametrize(
    ("budget", "unit", "names", "options", "said"),
    [
        (7, "steps", None, {"max_steps": 9}, r"length is 9 and the budget 7 steps: TrainingArguments\(max_steps="),
        (7, "steps", None, {}, r"length is 9 and the budget 7 steps"),  # three epochs are the Trainer's default
        (2, "epochs", None, {}, r"length is 3.0 and the budget 2 epochs: TrainingArguments\(num_train_epochs="),
        (3, "epochs", None, {"max_steps": 9}, r"length is max_steps and the budget 3 epochs"),
        (50, "tokens", None, {"max_steps": 9}, r"counts no tokens: TrainingArguments\(include_num_input_tokens_seen"),
        (9, "steps", None, {"label_names": None}, r"had eval_loss; .*; TrainingArguments\(label_names=\["),
        (9, "steps", {"val_loss": "eval_los"}, {}, r"had eval_los; the last one had .*eval_loss"),
        (9, "steps", {"loss": "eval_loss"}, {}, r'such as hf_callback\(val_loss="eval_loss"\)'),
        (9, "files", None, {}, r"in steps, epochs, tokens, seconds; this one is in files"),
    ],
)  # fmt: skip
def test_a_trainer_that_does_not_fit_the_trial_is_refused(tmp_path, budget, unit, names, options, said):
    trial, told = trial_of(budget, unit)
    with pytest.raises(Refused, match=said):
        trainer(trial, tmp_path, names, **options).train()
    assert told == []


def test_a_training_that_ends_early_and_a_loss_that_is_no_number_are_not_hidden(tmp_path):
    trial, _ = trial_of(99, "tokens")
    trainer(trial, tmp_path, max_steps=2, include_num_input_tokens_seen=True).train()
    with pytest.raises(Refused, match="the last report was at step 24 of 99 tokens"):
        returned(trial, {}, "test_loss")
    trial, _ = trial_of(2)
    bad = [{**row, "y": torch.tensor([float("nan")])} for row in ROWS]
    with pytest.raises(trial.Infeasible, match="val_loss is nan at step 2"):
        trainer(trial, tmp_path, max_steps=2, eval_dataset=bad).train()


def test_only_the_first_process_of_several_reports(tmp_path):
    trial, told = trial_of(3)
    callback = trial.hf_callback(val_loss="eval_loss")
    state = SimpleNamespace(max_steps=3, global_step=3, is_world_process_zero=False)
    callback.on_train_begin(None, state, None)
    callback.on_evaluate(None, state, None, {"eval_loss": 1.0})
    callback.on_train_end(None, state, None)
    assert told == []
