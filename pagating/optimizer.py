"""Parameter groups of a patched model, and a mixin that brings them to the Trainer of Hugging Face.

An alpha takes no weight decay and has the model's learning rate times its `lr_multiplier`. A scheduler of torch or of
transformers multiplies the rate of each group, so the ratio stays.

    torch.optim.AdamW(pagating.param_groups(model, lr=1e-3, weight_decay=0.1))

    class Trainer(pagating.AlphaTrainerMixin, transformers.Trainer): ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pagating.gating.alpha import AlphaParameter, alpha_parameters, set_progress
from pagating.limits import check_number


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters of a model in groups for an optimiser of torch. Each one appears once.

    The groups are the matrices, with weight decay, the vectors and single numbers, without, and each alpha by itself,
    without. A group has `params`, `lr`, `weight_decay` and `multiplier`, its rate relative to `lr`. Parameters that do
    not require a gradient are left out.

    Args:
        model: A model, patched or not.
        lr: Learning rate of the model, above 0.
        weight_decay: Weight decay of the matrices, 0 or more.

    Raises:
        ValueError: An argument is not one of these.
    """
    check_number("lr", lr, {"gt": 0})
    check_number("weight_decay", weight_decay, {"ge": 0})
    alphas = [alpha for alpha in alpha_parameters(model) if alpha.parameter.requires_grad]
    separate = {id(alpha.parameter) for alpha in alphas}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in separate]
    model_wide = {"lr": lr, "multiplier": 1.0}
    return [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay, **model_wide},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, **model_wide},
        *(_group(alpha, {}, lr) for alpha in alphas),
    ]


def separate_alphas(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Move each alpha of a model into a group of its own of an optimiser, without weight decay and with its multiplier.

    Other options are those of its old group. An alpha that the optimiser does not have is left out of it. Raise
    ValueError if the optimiser has a state already, or a scheduler, which would not see the new groups.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: {type(optimizer).__name__} is not a torch.optim.Optimizer")
    if optimizer.state or any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError("optimizer: has stepped or has a scheduler; separate its alphas right after it is made")
    for alpha in alpha_parameters(model):
        for group in list(optimizer.param_groups):
            kept = [p for p in group["params"] if p is not alpha.parameter]
            if len(kept) < len(group["params"]):
                group["params"] = kept
                optimizer.add_param_group(_group(alpha, group, group["lr"]))


def _group(alpha: AlphaParameter, options: dict[str, Any], lr: Any) -> dict[str, Any]:
    own = {"params": [alpha.parameter], "weight_decay": 0.0, "lr": lr * alpha.lr_multiplier}
    return {**options, **own, "multiplier": alpha.lr_multiplier}


class AlphaTrainerMixin:
    """Mixin for `transformers.Trainer` and its subclasses, to be named before them in the bases.

    Alphas get a group of their own in the optimiser that the Trainer makes, whatever its class; all other parameters
    keep the Trainer's groups. A scheduled alpha follows the share of training done. An optimiser that is given to the
    Trainer stays as it is; make it of `param_groups`.
    """

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        """Make the optimiser as the Trainer does, and separate the alphas in it."""
        trainer: Any = self
        is_new = trainer.optimizer is None
        optimizer = super().create_optimizer(*arguments, **options)  # type: ignore[misc]
        if is_new:
            separate_alphas(trainer.optimizer, trainer.model)
        return optimizer

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """Move scheduled alphas to the midpoint of the update, then train as the Trainer does."""
        trainer: Any = self
        if trainer.state.max_steps > 0:
            done = (trainer.state.global_step + 0.5) / trainer.state.max_steps
            set_progress(trainer.model, min(done, 1.0))
        return super().training_step(*arguments, **options)  # type: ignore[misc]
