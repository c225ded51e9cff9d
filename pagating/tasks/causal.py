"""The causal task: GPT-2 predicts the next token.

A batch is a tuple of tensors with rows as first axis. The last tensor holds the targets; `IGNORE` means no target.
Axes: B rows of a batch, T position, R rows held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pagating.data.corpus import eval_windows, open_split, read_meta, train_batch
from pagating.data.lines import IGNORE, line_batch, open_lines, spread_rows, targets_of
from pagating.device import warn_of_emulation
from pagating.evaluate import Evaluation, autocast, evaluation, pad_rows, text_rows, token_nll
from pagating.model.compile import compile_hidden, is_compiled
from pagating.model.fused_loss import linear_nll
from pagating.model.gpt2 import GPT2, activations, training_flops_per_token
from pagating.model.initialise import initialise_gpt2
from pagating.model.pretrained import load_pretrained
from pagating.model.size import GPT2Size, stock_flops_per_token
from pagating.tasks.task import Batch, Hidden, Task
from pagating.trial import Trial


def build_gpt2(trial: Trial) -> GPT2:
    """Make the trial's GPT-2, initialised from its seed, and load pretrained weights if the trial names them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)  # for the random start values of a user's module
        model = GPT2(GPT2Size(vocab_size=read_meta(trial.corpus)["vocab_size"], **trial.model), trial.unit)
    initialise_gpt2(model, trial.seed)
    if trial.pretrained:
        load_pretrained(model, trial.pretrained)
    return model


def causal_batches(trial: Trial) -> Callable[[int], Batch]:
    """Return a function of the step that gives its inputs and targets (B, T).

    Rows are packed windows, or padded lines if the trial has a `padding`.
    """
    n_ctx, batch = trial.model["n_ctx"], trial.batch_tokens // trial.model["n_ctx"]
    padding = trial.padding
    if padding is None:
        train_N = open_split(trial.corpus, "train")

        def windows(step: int) -> Batch:
            tokens_BT = train_batch(train_N, trial.seed, step, batch, n_ctx)
            return tokens_BT[:, :-1], tokens_BT[:, 1:]

        return windows
    lines = open_lines(trial.corpus, "train")
    lines = lines if padding == "counted" else lines.worded()

    def rows(step: int) -> Batch:
        rows_BT, lengths_B = line_batch(lines, trial.seed, step, batch, n_ctx)
        return rows_BT[:, :-1], targets_of(rows_BT, lengths_B, padding)

    return rows


def hidden_function(trial: Trial, model: GPT2, inputs_BT: Tensor) -> Hidden:
    """Return `GPT2.hidden`, or its compiled form if the trial asks for one (see `is_compiled`).

    The FLOPs of the stock model decide, so that all arms of a study take the same path.
    """
    model.train()
    if trial.precision == "bfloat16":
        warn_of_emulation(inputs_BT.device)
    if is_compiled(trial.compile, stock_flops_per_token(model.config) * trial.tokens, model.config.dropout):
        with autocast(trial.precision, inputs_BT.device.type):
            compiled = compile_hidden(model, inputs_BT, Path(trial.corpus).parent / "compiled")
        return compiled or GPT2.hidden
    return GPT2.hidden


@dataclass(frozen=True)
class CausalLoss:
    """The mean negative log-likelihood of the next token, in nats.

    Attributes:
        hidden: `GPT2.hidden` or its compiled form.
        masked: Skip targets that are IGNORE.
    """

    hidden: Hidden
    masked: bool

    def __call__(self, model: GPT2, batch: Batch) -> Tensor:
        inputs_BT, targets_BT = batch
        x_NC, targets_N = self.hidden(model, inputs_BT).flatten(0, 1), targets_BT.flatten()
        if self.masked:
            wanted_N = targets_N != IGNORE
            x_NC, targets_N = x_NC[wanted_N], targets_N[wanted_N]
        return linear_nll(x_NC, model.lm_head.weight, targets_N)


def causal_loss(trial: Trial, model: GPT2, batch: Batch) -> CausalLoss:
    """Return the loss of a trial. Its model may be compiled for the shape of `batch`."""
    return CausalLoss(hidden_function(trial, model, batch[0]), trial.padding == "masked")


def causal_windows(trial: Trial, split: str) -> Tensor:
    """Return the packed windows (R, T + 1) of a split for `val_nll` or `test_nll`, for trials on lines too."""
    return eval_windows(open_split(trial.corpus, split), trial.model["n_ctx"], trial.eval_windows)


def mean_loss(model: nn.Module, windows_RT: Tensor, rows: int) -> Tensor:
    """Compute the mean loss of the first rows of `causal_windows`, nats per token, with a gradient."""
    device = next(model.parameters()).device
    tokens_BT = windows_RT[:rows].to(device)
    if isinstance(model, GPT2):  # its full logits never exist
        return CausalLoss(GPT2.hidden, masked=False)(model, (tokens_BT[:, :-1], tokens_BT[:, 1:]))
    return token_nll(model, tokens_BT).mean()


def padded_loss(trial: Trial, model: GPT2) -> Evaluation:
    """Compute `padded_nll` batch by batch: the loss as in the published figures, on lines of the validation split.

    Each row is a line of text, padded to `n_ctx`. There are at most as many rows as evaluation windows. The mean is
    over all positions but the first of all rows, padding included, and there is no attention mask. If lines are short,
    most of the mean is padding, so that it depends more on the lengths of the lines than on the model. It cannot be
    compared with `val_nll`. A model trained without padding does not predict padding. The metric shows this difference
    and decides nothing.
    """
    n_ctx = trial.model["n_ctx"]
    batch = trial.batch_tokens // n_ctx
    if trial.padding:
        rows_RT = spread_rows(open_lines(trial.corpus, "validation"), n_ctx, trial.eval_windows)
        return evaluation(model, rows_RT, batch, trial.precision)
    rows, pad = text_rows(trial.corpus, "validation", trial.eval_windows)
    return evaluation(model, pad_rows(rows, n_ctx, pad), batch, trial.precision)


CAUSAL = Task(
    build=build_gpt2,
    batches=causal_batches,
    loss=causal_loss,
    held=causal_windows,
    evaluate=evaluation,
    mean=mean_loss,
    flops=lambda trial, model: training_flops_per_token(model),
    check=lambda trial: activations(GPT2Size(vocab_size=1, **trial.model), trial.unit),
    compiled=lambda loss: isinstance(loss, CausalLoss) and loss.hidden is not GPT2.hidden,
)
