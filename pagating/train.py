"""Training of one trial: the only loop.

    python -m pagating.train trial.json

runs a trial without Ray and prints its final metrics as JSON. `trial.json` is what `pagating trial STUDY CELL` prints.
Axes: B batch, T position in a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pagating.alpha import alpha_parameters, alpha_values, set_progress
from pagating.corpus import eval_windows, open_split, read_meta, train_batch
from pagating.engine_compile import CHOICES, compile_hidden, is_compiled
from pagating.engine_loss import linear_nll
from pagating.evaluate import (
    PRECISIONS,
    autocast,
    bits_per_byte,
    mean_nll,
    padded_nll,
    perplexity,
    text_rows,
)
from pagating.gpt2_plain import GPT2, GPT2Size, stock_flops_per_token, training_flops_per_token
from pagating.initialise import initialise_gpt2
from pagating.schedules import SCHEDULES, warmup_then

Hidden = Callable[[Any, torch.Tensor], torch.Tensor]


class Diverged(ArithmeticError):
    """The loss or the gradient norm stopped being finite: the configuration is infeasible."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration and one seed. Units: tokens, steps of the optimiser, nats.

    corpus: folder made by `pagating.corpus.prepare`. model: n_layer, d_model, n_head, n_ctx, and where they differ from
    GPT-2 activation, dropout, initializer_range.
    unit: arguments of `pagating.patch`, or None for the stock model. batch_tokens: tokens a step, a multiple of n_ctx.
    warmup: share of the steps with a linearly rising learning rate, [0, 1). weight_decay: on matrices; never on alphas.
    eval_every: steps between evaluations, None for a tenth of the trial; the last step is evaluated always.
    eval_windows: windows of n_ctx tokens of each evaluation. test: evaluate the test split too, once, at the last step,
    and `padded_nll` on as many lines of the validation split.
    compile: auto (where the trial is long enough to earn it), always, never; see `pagating.engine_compile`.
    """

    corpus: str
    model: Mapping[str, Any]
    lr: float
    tokens: int
    batch_tokens: int
    seed: int
    unit: Mapping[str, Any] | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: str = "float32"
    eval_every: int | None = None
    eval_windows: int = 64
    test: bool = False
    threads: int = 1
    compile: str = "auto"

    def __post_init__(self) -> None:
        n_ctx = self.model["n_ctx"]
        if self.batch_tokens % n_ctx or self.batch_tokens < n_ctx:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a positive multiple of n_ctx={n_ctx}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens={self.tokens} is less than one step of batch_tokens={self.batch_tokens}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule='{self.schedule}' is not one of {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision='{self.precision}' is not one of {', '.join(PRECISIONS)}")
        if self.compile not in CHOICES:
            raise ValueError(f"compile='{self.compile}' is not one of {', '.join(CHOICES)}")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} is not positive")

    @property
    def steps(self) -> int:
        """Optimiser updates of the whole trial."""
        return self.tokens // self.batch_tokens

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations."""
        return self.eval_every or max(1, math.ceil(self.steps / 10))


def build_model(trial: Trial) -> GPT2:
    """GPT-2 of the trial's size, with the trial's unit in every MLP, initialised from its seed."""
    model = GPT2(GPT2Size(vocab_size=read_meta(trial.corpus)["vocab_size"], **trial.model), trial.unit)
    initialise_gpt2(model, trial.seed)
    return model


def build_optimizer(model: nn.Module, trial: Trial) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019): decay on matrices only, each alpha with its own learning-rate multiplier."""
    alphas = alpha_parameters(model)
    separate = {id(alpha.parameter) for alpha in alphas}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in separate]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": trial.weight_decay, "multiplier": 1.0},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "multiplier": 1.0},
    ]
    groups += [{"params": [a.parameter], "weight_decay": 0.0, "multiplier": a.lr_multiplier} for a in alphas]
    return torch.optim.AdamW(groups, lr=trial.lr, betas=(trial.beta1, trial.beta2), fused=True)


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: `getrusage` would count what the parent held when it started this process
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def hidden_function(trial: Trial, model: GPT2, tokens_BT: torch.Tensor) -> Hidden:
    """The model's body as the loop calls it: `GPT2.hidden`, or its compiled form where the trial asks for one.

    The FLOPs that decide are those of the stock model, so that all arms of a study take the same path.
    """
    model.train()
    if is_compiled(trial.compile, stock_flops_per_token(model.config) * trial.tokens, model.config.dropout):
        with autocast(trial.precision):
            compiled = compile_hidden(model, tokens_BT[:, :-1], Path(trial.corpus).parent / "compiled")
        return compiled or GPT2.hidden
    return GPT2.hidden


def learning_rate(trial: Trial, step: int) -> float:
    """The model's learning rate of update `step`, from 0."""
    fraction = fraction_done(trial, step)
    return trial.lr * warmup_then(trial.schedule, fraction, warmup=trial.warmup, final=trial.final_lr)


def fraction_done(trial: Trial, step: int) -> float:
    """Share of the training done at update `step`: its midpoint, so that neither end has a rate of zero."""
    return (step + 0.5) / trial.steps


def require_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raise Diverged where the loss or the gradient norm of update `step`, from 0, is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}")


def model_size(model: GPT2) -> dict[str, Any]:
    """The metrics of a trial that follow from its model alone."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, "flops_per_token": training_flops_per_token(model)}


def final_metrics(trial: Trial, row: Mapping[str, Any], alphas: list[float]) -> dict[str, Any]:
    """The metrics of a trial that follow from its last row and its alphas, one a layer (empty: stock)."""
    counts = read_meta(trial.corpus)["splits"]["validation"]
    return {
        "val_nll": row["val_nll"],
        "val_ppl": perplexity(row["val_nll"]),
        "val_bpb": bits_per_byte(row["val_nll"], counts["tokens"], counts["bytes"]),
        "train_nll": row["train_nll"],
        "alpha": sum(alphas) / len(alphas) if alphas else 0.0,  # the stock activation is the gate switched off
        "tokens": row["tokens"],
        "steps": trial.steps,
        "tokens_per_second": row["tokens_per_second"],
    }


def train(trial: Trial) -> Iterator[dict[str, Any]]:
    """Train one trial; yield a row at each evaluation, and with the last row `final`: the metrics of the whole trial.

    A row: step, tokens, val_nll, train_nll (mean over the steps since the last row), lr, grad_norm (of this step,
    before clipping), tokens_per_second (training only), alpha (per layer; empty where none is learned).
    The result depends on the trial alone: not on the process's history, its neighbours, or its thread settings.
    Raises Diverged at the first loss or gradient norm that is not finite.
    """
    torch.set_num_threads(trial.threads)
    started = time.perf_counter()
    n_ctx, batch = trial.model["n_ctx"], trial.batch_tokens // trial.model["n_ctx"]
    train_N = open_split(trial.corpus, "train")
    val_WT = eval_windows(open_split(trial.corpus, "validation"), n_ctx, trial.eval_windows)
    model = build_model(trial)
    optimizer = build_optimizer(model, trial)
    learned = bool(alpha_parameters(model))
    hidden = hidden_function(trial, model, train_batch(train_N, trial.seed, 0, batch, n_ctx))
    torch.manual_seed(trial.seed)  # dropout is the only user of the global generator
    losses: list[float] = []
    seconds_training = 0.0
    row: dict[str, Any] = {}
    for step in range(trial.steps):
        step_started = time.perf_counter()
        set_progress(model, fraction_done(trial, step))
        rate = learning_rate(trial, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        tokens_BT = train_batch(train_N, trial.seed, step, batch, n_ctx)
        with autocast(trial.precision):
            x_BTC = hidden(model, tokens_BT[:, :-1])
            loss = linear_nll(x_BTC.flatten(0, 1), model.lm_head.weight, tokens_BT[:, 1:].flatten())
        loss.backward()
        grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), trial.clip))
        losses.append(loss.item())
        require_finite(step, losses[-1], grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds_training += time.perf_counter() - step_started
        done = step + 1
        if done % trial.evaluation_interval and done != trial.steps:
            continue
        val_nll = mean_nll(model, val_WT, batch, trial.precision)
        if not math.isfinite(val_nll):
            raise Diverged(f"step {done}: validation loss {val_nll}")
        row = {
            "step": done,
            "tokens": done * trial.batch_tokens,
            "val_nll": val_nll,
            "train_nll": sum(losses) / len(losses),
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens_per_second": done * trial.batch_tokens / seconds_training,
            "alpha": alpha_values(model) if learned else [],
        }
        losses = []
        if done != trial.steps:
            yield row
    final = final_metrics(trial, row, alpha_values(model)) | model_size(model)
    final["compiled"] = float(hidden is not GPT2.hidden)
    if trial.test:
        test_WT = eval_windows(open_split(trial.corpus, "test"), n_ctx, trial.eval_windows)
        final["test_nll"] = mean_nll(model, test_WT, batch, trial.precision)
        rows, pad = text_rows(trial.corpus, "validation", trial.eval_windows)
        final["padded_nll"] = padded_nll(model, rows, n_ctx, pad, batch, trial.precision)
    final |= {"seconds": time.perf_counter() - started, "peak_rss_mb": peak_rss_mb()}
    yield {**row, "final": final}


def main(arguments: list[str] | None = None) -> int:
    """Run the trial of a JSON file; print its final metrics. Exit codes: 0 done, 1 diverged, 2 bad input."""
    paths = sys.argv[1:] if arguments is None else arguments
    if len(paths) != 1:
        print("usage: python -m pagating.train trial.json", file=sys.stderr)
        return 2
    try:
        trial = Trial(**json.loads(Path(paths[0]).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{paths[0]}: {error}", file=sys.stderr)
        return 2
    try:
        for row in train(trial):
            print(f"step {row['step']}/{trial.steps} val_nll {row['val_nll']:.6f}", file=sys.stderr)
    except Diverged as error:
        print(json.dumps({"outcome": "infeasible", "reason": str(error)}))
        return 1
    print(json.dumps({"outcome": "completed", **row["final"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
