"""Output projection and loss in one function, computed in chunks of tokens, so that the full logits never exist.

With a vocabulary of 50,257, the logits of a batch, their softmax and its gradient are larger than a small model and its
optimiser. Here only one chunk of them exists at a time. Its gradient is computed with it, so nothing is computed twice.
The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989), in torch operations.

Axes: N tokens, C d_model, V vocabulary; a leading K for the models of a pack (`pagating.packed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1 << 21  # logits per chunk: 8 MiB in float32, which fits in a cache
GPU_CHUNK = 1 << 27  # a GPU is faster with few large products: 512 MiB in float32
ALIGNED = 64  # a GPU multiplies matrices slowly if their rows do not start at multiples of some bytes
LEAST_ROWS = 64  # with fewer tokens per chunk, the product for the weight's gradient is limited by memory bandwidth


def chunk_rows(n_token: int, vocab_size: int, device: str = "cpu") -> int:
    """Return the number of tokens per chunk of logits: at least `LEAST_ROWS`, at most `n_token`."""
    return min(n_token, max(LEAST_ROWS, (CHUNK if device == "cpu" else GPU_CHUNK) // vocab_size))


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def padding(vocab_size: int, device: str) -> int:
    """Return the number of rows that the weight gets on a device so that products are fast, such as 47 for 50,257."""
    return -vocab_size % ALIGNED if device == "cuda" else 0


def _aligned(weight_VC: Tensor) -> Tensor:
    """Return the weight with rows of zeros at its end (`padding`)."""
    more = padding(weight_VC.shape[-2], weight_VC.device.type)
    return F.pad(weight_VC, (0, 0, 0, more)) if more else weight_VC


def _chunks(
    x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, vocab_size: int
) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
    """Yield index, inputs, float logits and targets (as a column) of each chunk.

    Logits beyond `vocab_size`, which belong to no token, are -inf.
    """
    n_token = x_NC.shape[-2]
    rows = chunk_rows(n_token, weight_VC.shape[:-1].numel(), x_NC.device.type)
    for start in range(0, n_token, rows):
        part = (..., slice(start, start + rows), slice(None))
        logits = x_NC[part] @ weight_VC.mT
        column = targets_N[..., start : start + rows, None]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if logits.shape[-1] > vocab_size:
            logits[..., vocab_size:] = -torch.inf
        yield part, x_NC[part], logits, column


def _check(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> None:
    one_model = x_NC.dim() == weight_VC.dim() == 2
    pack = x_NC.dim() == weight_VC.dim() == 3 and x_NC.shape[0] == weight_VC.shape[0]
    agree = targets_N.shape == x_NC.shape[:-1] and weight_VC.shape[-1:] == x_NC.shape[-1:]
    if not (one_model or pack) or not agree:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x_NC, weight_VC, targets_N))
        raise ValueError(f"linear_nll: shapes {shapes} are not (N, C), (V, C), (N,), each with K before it or none")


@torch.no_grad()
def linear_nll_each(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Compute `-log softmax(x @ weight.T)[target]` of each token, without gradient.

    Returns:
        Nats, (N,), float32 (float64 for float64 inputs). If the arguments have a leading axis K, so has the result.
    """
    _check(x_NC, weight_VC, targets_N)
    dtype = _compute_dtype(x_NC)
    with torch.autocast(x_NC.device.type, enabled=False):
        parts = _chunks(x_NC.to(dtype), _aligned(weight_VC.to(dtype)), targets_N, weight_VC.shape[-2])
        each = [torch.log_softmax(logits, -1).gather(-1, column)[..., 0].neg() for _, _, logits, column in parts]
    return torch.cat(each, -1)


def linear_nll(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Compute the mean over N of `-log softmax(x @ weight.T)[target]`.

    It equals `F.cross_entropy(x @ weight.T, targets)` up to rounding and can be differentiated once. Under autocast,
    products are computed in its dtype; the softmax, the loss and the sum of the weight's gradient are float32.

    Args:
        x_NC: Inputs of the output projection.
        weight_VC: Weight of the output projection.
        targets_N: int64, each in [0, V).

    Returns:
        Nats, a scalar in float32 (float64 for float64 inputs); (K,) if the arguments have a leading axis K of models.

    Raises:
        ValueError: The shapes do not fit.
        IndexError, RuntimeError: A target is outside the vocabulary (raised by torch).
    """
    _check(x_NC, weight_VC, targets_N)
    mean: Tensor = _LinearNLL.apply(x_NC, weight_VC, targets_N)
    return mean


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        dtype, share = _compute_dtype(x_NC), 1.0 / x_NC.shape[-2]
        wanted_x, wanted_weight, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x_NC) if wanted_x else None
        grad_weight = torch.zeros_like(weight_VC) if wanted_weight else None
        total = x_NC.new_zeros(x_NC.shape[:-2], dtype=torch.float64)
        with torch.autocast(x_NC.device.type, enabled=False):
            weight, vocab_size = _aligned(weight_VC.to(dtype)), weight_VC.shape[-2]
            for part, x, logits, column in _chunks(x_NC.to(dtype), weight, targets_N, vocab_size):
                top, hit = logits.amax(-1), logits.gather(-1, column)[..., 0]
                p = _softmax_(logits)
                # one exponential per logit; the largest probability is at least 1/V, so its logarithm is accurate
                total += (top - p.amax(-1).log() - hit).sum(-1, dtype=torch.float64)
                # softmax minus one at the target: the gradient of the sum by the logits
                grad = p.scatter_add_(-1, column, p.new_full((), -1.0).expand_as(column)).to(dtype)
                if grad_x is not None:
                    grad_x[part] = (grad @ weight).mul_(share)
                if grad_weight is None:
                    continue
                grad = grad[..., :vocab_size]
                if dtype == grad_weight.dtype:
                    _add_product_(grad_weight, grad.mT, x, share)
                else:
                    grad_weight.add_(grad.mT @ x, alpha=share)
        ctx.grads = (grad_x, grad_weight)
        return (total * share).to(torch.float64 if dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_nll: backward was called a second time; the gradients are returned only once")
        scale, (grad_x, grad_weight), ctx.grads = outputs[0][..., None, None], ctx.grads, None
        return (
            None if grad_x is None else grad_x.mul_(scale.to(grad_x.dtype)),
            None if grad_weight is None else grad_weight.mul_(scale.to(grad_weight.dtype)),
            None,
        )


def _softmax_(logits: Tensor) -> Tensor:
    """Compute the softmax. On a CPU it overwrites the logits, so that memory holds one chunk instead of two."""
    return torch.softmax(logits, -1, out=logits) if logits.device.type == "cpu" else torch.softmax(logits, -1)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    if total.dim() == 2:
        total.addmm_(a, b, alpha=scale)
    else:
        total.baddbmm_(a, b, alpha=scale)
