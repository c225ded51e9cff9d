"""Tests of parameter groups, alone and in the Trainer of Hugging Face."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import pagating
from pagating.optimizer import separate_alphas

torch.set_num_threads(1)
PER_LAYER = {"learnable": {"per": "layer", "lr_multiplier": 5.0}}
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(12, 8) * 7 % 37]


def gpt2(**unit: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0)
    config.attn_pdrop, config.bos_token_id, config.eos_token_id = 0.0, 0, 0
    model = GPT2LMHeadModel(config)
    if unit:
        pagating.patch(model, **unit)
    return model


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    (found,) = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return found


@pytest.mark.parametrize(
    "alpha", ["learnable", PER_LAYER, {"learnable": {"per": "channel"}}, {"token": {}}, 0.5, {"schedule": {}}], ids=str
)
def test_each_parameter_is_in_one_group_with_its_decay_and_its_rate(alpha: Any) -> None:
    model = gpt2(alpha=alpha)
    groups = pagating.param_groups(model, lr=2e-3, weight_decay=0.1)
    inside = [p for group in groups for p in group["params"]]
    assert {id(p) for p in inside} == {id(p) for p in model.parameters()}
    assert len(inside) == len({id(p) for p in inside})
    alphas = pagating.alpha_parameters(model)
    optimizer = torch.optim.AdamW(groups)
    for name, parameter in model.named_parameters():
        group = group_of(optimizer, parameter)
        own = next((found for found in alphas if found.parameter is parameter), None)
        assert group["weight_decay"] == (0.1 if own is None and parameter.dim() >= 2 else 0.0), name
        assert group["lr"] == pytest.approx(2e-3 * (own.lr_multiplier if own else 1.0)), name
        assert (len(group["params"]) == 1) or own is None


def test_frozen_parameters_are_left_out_and_an_unpatched_model_has_two_groups() -> None:
    model = gpt2(alpha=PER_LAYER)
    model.transformer.wte.requires_grad_(False)
    pagating.alpha_parameters(model)[0].parameter.requires_grad_(False)
    inside = [p for group in pagating.param_groups(model, 1e-3, 0.0) for p in group["params"]]
    assert {id(p) for p in inside} == {id(p) for p in model.parameters() if p.requires_grad}
    matrices, rest = pagating.param_groups(gpt2(), 1e-3, 0.0)
    assert [p.dim() for p in matrices["params"]] == [2] * len(matrices["params"])
    assert {p.dim() for p in rest["params"]} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", 1e-3, 0.1), "model: str is not a torch.nn.Module"),
        ((nn.Linear(1, 1), 0, 0.1), r"lr=0 is not a number in \(0, inf\)"),
        ((nn.Linear(1, 1), "1e-3", 0.1), "lr='1e-3' is not a number"),
        ((nn.Linear(1, 1), 1e-3, -1), r"weight_decay=-1 is not a number in \[0, inf\)"),
        ((nn.Linear(1, 1), 1e-3, None), "weight_decay=None is not a number"),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pagating.param_groups(*arguments)


def test_a_scheduler_keeps_the_ratio_and_decay_leaves_an_alpha_alone() -> None:
    model = gpt2(alpha=PER_LAYER)
    optimizer = torch.optim.SGD(pagating.param_groups(model, lr=0.1, weight_decay=0.5))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    alpha = pagating.alpha_parameters(model)[0].parameter
    start, weight = alpha.detach().clone(), model.transformer.h[0].mlp.c_fc.weight
    for step in range(4):
        before = weight.detach().clone()
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 4))
        assert group_of(optimizer, weight)["lr"] == pytest.approx(rate)
        assert group_of(optimizer, alpha)["lr"] == pytest.approx(5 * rate)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        alpha.grad = torch.ones_like(alpha)
        optimizer.step()
        torch.testing.assert_close(weight, before * (1 - rate * 0.5))
        scheduler.step()
    moved = 5 * sum(0.1 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4))
    torch.testing.assert_close(alpha, start - moved)


def test_alphas_are_separated_in_any_optimiser_but_not_in_one_that_runs() -> None:
    model = gpt2(alpha=PER_LAYER)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2, weight_decay=0.3, momentum=0.9)
    separate_alphas(optimizer, model)
    for found in pagating.alpha_parameters(model):
        group = group_of(optimizer, found.parameter)
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (pytest.approx(5e-2), 0.0, 0.9)
    assert group_of(optimizer, model.transformer.wte.weight)["weight_decay"] == 0.3
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="has stepped or has a scheduler"):
        separate_alphas(optimizer, model)


# --- with Hugging Face's Trainer, which needs accelerate --------------------------------------------------------------


class AlphaTrainer(pagating.AlphaTrainerMixin, Trainer):
    """A Trainer that records the rates and the alphas of each step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[tuple[list[float], list[float]]] = []

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        loss = super().training_step(*arguments, **options)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.seen.append((rates, pagating.alpha_values(self.model)))
        return loss


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    given = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1, **options}
    settings = TrainingArguments(str(folder), report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True, **given)
    return AlphaTrainer(model, settings, train_dataset=ROWS)


def test_the_trainer_decays_no_alpha_and_multiplies_its_rate_at_every_step(tmp_path: Path) -> None:
    model = gpt2(alpha=PER_LAYER)
    made = trainer(model, tmp_path, warmup_steps=2, lr_scheduler_type="cosine")
    made.train()
    for found in pagating.alpha_parameters(model):
        assert group_of(made.optimizer, found.parameter)["weight_decay"] == 0.0
    assert group_of(made.optimizer, model.transformer.wte.weight)["weight_decay"] == 0.1
    assert group_of(made.optimizer, model.transformer.ln_f.weight)["weight_decay"] == 0.0
    assert len(made.seen) == 6
    for rates, _ in made.seen:
        assert rates[2:] == pytest.approx([5 * rates[0]] * 2)
    assert [rates[0] for rates, _ in made.seen][:3] == pytest.approx([0.0, 5e-3, 1e-2])


def test_the_trainer_is_a_plain_loop_over_the_same_groups(tmp_path: Path) -> None:
    model, other = gpt2(alpha=PER_LAYER), gpt2(alpha=PER_LAYER)
    made = trainer(model, tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0, per_device_train_batch_size=12)
    made.train()
    optimizer = torch.optim.AdamW(pagating.param_groups(other, lr=1e-2, weight_decay=0.1))
    batch = torch.stack([row["input_ids"] for row in ROWS])
    for _ in range(6):
        other(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(pagating.alpha_values(model), pagating.alpha_values(other), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
        assert abs(mine - 0.5) > 0.01


def test_a_scheduled_alpha_follows_the_trainer_also_with_accumulation(tmp_path: Path) -> None:
    model = gpt2(alpha={"schedule": {"kind": "linear", "from": 0.0, "to": 1.0}})
    made = trainer(model, tmp_path, max_steps=4, gradient_accumulation_steps=3)
    made.train()
    values = [alphas for _, alphas in made.seen]
    assert values == [pytest.approx([(step + 0.5) / 4] * 2) for step in range(4) for _ in range(3)]


def test_a_trainer_continues_from_its_checkpoint_to_the_same_alphas(tmp_path: Path) -> None:
    whole, half = gpt2(alpha=PER_LAYER), gpt2(alpha=PER_LAYER)
    options = {"save_steps": 3, "save_strategy": "steps", "seed": 1}
    trainer(whole, tmp_path / "whole", **options).train()
    again = trainer(half, tmp_path / "half", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert pagating.alpha_values(half) == pytest.approx(pagating.alpha_values(whole), abs=1e-6)
    assert len(again.seen) == 3


def test_an_optimiser_that_is_given_to_the_trainer_stays(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = gpt2(alpha=PER_LAYER)
    optimizer = torch.optim.SGD(pagating.param_groups(model, lr=1e-2, weight_decay=0.0))
    settings = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2, disable_tqdm=True)
    made = Trainer(model, settings, train_dataset=ROWS, optimizers=(optimizer, None))
    made.train()
    ends = made.lr_scheduler.base_lrs
    assert ends == pytest.approx([1e-2, 1e-2, 5e-2, 5e-2])
