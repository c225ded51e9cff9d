"""AdamW and gradient clipping for K trials at once, each with its own learning rate, weight decay and clipping limit.

torch's AdamW has one learning rate per list of tensors. K trials would need K optimisers, each with kernel launches of
its own. Here a step is a dozen operations for any K. The formula is torch's (tested).

Axes: K trials, P parameters of a trial in one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPS = 1e-8  # torch's default


@dataclass
class Flat:
    """Parameters of K trials as one buffer (K, P), with gradient and moments of the same shape.

    The modules' parameters and gradients are views of `value` and `grad`. `multiplier` scales the learning rate.
    """

    value: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor
    decays: bool
    multiplier: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """A parameter with a leading axis of trials: rows of the buffer from `start`."""

    parameter: nn.Parameter
    start: int
    multiplier: Sequence[float] = ()


def flatten(parameters: Sequence[Rows], n_trial: int, decays: bool) -> Flat:
    """Move parameters into one new buffer. Each takes columns that are free in the rows of its trials."""
    width, places = [0] * n_trial, []
    for rows in parameters:
        mine = slice(rows.start, rows.start + rows.parameter.shape[0])
        first, size = max(width[mine]), rows.parameter[0].numel()
        width[mine] = [first + size] * rows.parameter.shape[0]
        places.append((mine, slice(first, first + size)))
    like = parameters[0].parameter
    value, grad, one, two = (like.new_zeros(n_trial, max(width)) for _ in range(4))
    multiplier = torch.ones_like(value)
    for rows, place in zip(parameters, places, strict=True):
        parameter = rows.parameter
        value[place] = parameter.detach().flatten(1)
        parameter.data, parameter.grad = value[place].view(parameter.shape), grad[place].view(parameter.shape)
        if rows.multiplier:
            multiplier[place] = multiplier.new_tensor(rows.multiplier)[:, None]
    scaled = any(rows.multiplier for rows in parameters)
    return Flat(value.detach(), grad, one, two, decays, multiplier if scaled else None)


@torch.no_grad()
def clip_each(flats: Sequence[Flat], limit_K: Tensor) -> Tensor:
    """Scale each trial's gradient to a norm of at most its limit. Return the norms before scaling, (K,).

    The factor is `limit / (norm + 1e-6)`, at most 1, as in `torch.nn.utils.clip_grad_norm_`.
    """
    parts = torch.stack([torch.linalg.vector_norm(flat.grad, dim=1) for flat in flats])
    norm_K = torch.linalg.vector_norm(parts, dim=0)
    factor_K1 = (limit_K / (norm_K + 1e-6)).clamp(max=1.0)[:, None]
    for flat in flats:
        flat.grad.mul_(factor_K1)
    return norm_K


def factors(step: int, lr_K: Sequence[float], decay_K: Sequence[float], beta1: float) -> list[list[float]]:
    """Return what `adamw_step` needs of each trial's rates: `1 - lr decay` and `lr / (1 - b1^t)`.

    Args:
        step: `t`, counted from 1.
        lr_K: Learning rate of each trial.
        decay_K: Weight decay of each trial.
        beta1: `b1`, of all trials.
    """
    kept = [1.0 - lr * decay for lr, decay in zip(lr_K, decay_K, strict=True)]
    return [kept, [lr / (1.0 - beta1**step) for lr in lr_K]]


@torch.no_grad()
def adamw_step(flats: Sequence[Flat], step: int, factors_2K: Tensor, beta1: float, beta2: float) -> None:
    """Update all trials by AdamW (Loshchilov & Hutter 2019), then set their gradients to zero.

    `p <- p (1 - lr decay)`, `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`,
    `p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)`.

    Args:
        flats: Buffers of the trials.
        step: `t`, counted from 1.
        factors_2K: Result of `factors`, on the device of the buffers.
        beta1: `b1`, of all trials.
        beta2: `b2`, of all trials.
    """
    kept_K1, rate_K1 = factors_2K[..., None]
    for flat in flats:
        if flat.decays:
            flat.value.mul_(kept_K1)
        flat.first.lerp_(flat.grad, 1.0 - beta1)
        flat.second.mul_(beta2).addcmul_(flat.grad, flat.grad, value=1.0 - beta2)
        change = flat.second.sqrt().div_((1.0 - beta2**step) ** 0.5).add_(EPS)
        torch.div(flat.first, change, out=change).mul_(rate_K1)
        flat.value.sub_(change if flat.multiplier is None else change.mul_(flat.multiplier))
        flat.grad.zero_()


@torch.no_grad()
def silence(flats: Sequence[Flat], trial: int) -> None:
    """Set parameters, gradients and moments of one trial to zero, so that values that are not finite do not spread."""
    for flat in flats:
        for tensor in (flat.value, flat.grad, flat.first, flat.second):
            tensor[trial] = 0.0
