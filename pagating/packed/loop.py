"""The training loop of a pack: K trials of one shape trained as one batched model.

    python -m pagating.packed trials.json

`trials.json` holds a list of trials. The command prints the final metrics as JSON, one line per trial. A small model
leaves most of a GPU idle and spends its time on kernel launches, so that K of them take little longer than one. On a
CPU, a pack is no faster than its trials one after another.

Learning rate, batches, initialisation, loss, metrics and their steps come from `pagating.train` and modules it uses. A
trial's result equals that of the trial alone up to the rounding of batched products (1e-10 relative over a trial in
float64, 1e-4 in float32; tested). Three things differ: parameters have an axis K, clipping and AdamW act by row, and
losses are read once per evaluation, so that a GPU does not wait. A trial that diverges is set to zero; others go on.

Trials of a pack agree in all fields but `VARIES`. Their units may differ (stock GELU and gates, fixed and learned
alphas) if all other parameters have the same shape. A gated linear unit packs only with gated linear units.

Axes: K trials, D their distinct seeds, B batch of each, T position, S steps, W windows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagating.data.corpus import eval_windows, open_split, step_generator
from pagating.device import resolve_device, to_device
from pagating.evaluate import autocast, pad_rows, text_rows
from pagating.gating.alpha import alpha_parameters, set_progress
from pagating.model.fused_loss import linear_nll, linear_nll_each
from pagating.model.gpt2 import GPT2, training_flops_per_token
from pagating.packed.adamw import Flat, Rows, adamw_step, clip_each, factors, flatten, silence
from pagating.packed.model import PackedGPT2, PackedUnits, unit_kind
from pagating.tasks.causal import hidden_function
from pagating.train import (
    build_model,
    check,
    device_metrics,
    evaluation_row,
    final_metrics,
    fraction_done,
    learning_rate,
    model_size,
    peak_rss_mb,
    require_finite,
)
from pagating.trial import Diverged, Trial, require_trial

VARIES = ("lr", "seed", "unit", "schedule", "warmup", "final_lr", "weight_decay", "clip")
AHEAD = 256  # steps whose windows and rates are computed at once
MOST_ON_GPU = 1 << 28  # tokens of a split that a GPU may hold, of 4 bytes each
Row = dict[str, Any]


def require_one_pack(trials: Sequence[Trial]) -> None:
    """Raise ValueError, which names the first key that differs, unless the trials agree in all fields but `VARIES`."""
    if not trials:
        raise ValueError("pack: no trials")
    for trial in trials:
        require_trial(trial)
    if trials[0].task != "causal" or trials[0].padding:
        raise ValueError("pack: only GPT-2 on packed windows can be packed; train other tasks and padded lines alone")
    for key in (field.name for field in dataclasses.fields(Trial) if field.name not in VARIES):
        values = [getattr(trial, key) for trial in trials]
        for value in values:
            if value != values[0]:
                raise ValueError(f"pack: {key} is {value!r} in one trial and {values[0]!r} in another")


def gather(model: PackedGPT2, n_trial: int) -> list[Flat]:
    """Move a pack's parameters into buffers, one per group of the optimiser: embedding, other matrices, the rest."""
    groups: list[list[Rows]] = [[], [], []]
    for name, parameter in model.named_parameters():
        if ".alpha_" not in name:
            group = 0 if parameter is model.lm_head.weight else 1 if parameter.dim() >= 3 else 2
            groups[group].append(Rows(parameter, 0))
    learned = [rows for module in model.modules() if isinstance(module, PackedUnits) for rows in module.learned()]
    groups[2] += {id(rows.parameter): rows for rows in learned}.values()  # layers may share one
    return [flatten(rows, n_trial, decays=i < 2) for i, rows in enumerate(groups)]


@torch.no_grad()
def mean_nll_each(model: PackedGPT2, windows_WT: Tensor, batch: int, precision: str) -> list[float]:
    """Compute `pagating.evaluate.mean_nll` of each model of a pack over the same windows (W, T + 1)."""
    weight_KVC = model.lm_head.weight
    n_model = weight_KVC.shape[0]
    total_K = weight_KVC.new_zeros(n_model, dtype=torch.float64)
    for rows_BT in windows_WT.split(batch):
        tokens_BT = rows_BT.to(weight_KVC.device).repeat(n_model, 1)
        with autocast(precision, weight_KVC.device.type):
            x_KNC = model.hidden(tokens_BT[:, :-1]).view(n_model, -1, weight_KVC.shape[-1])
            nll_KN = linear_nll_each(x_KNC, weight_KVC, tokens_BT[:, 1:].reshape(n_model, -1))
        total_K += nll_KN.double().sum(1)
    return (total_K / (windows_WT.shape[0] * (windows_WT.shape[1] - 1))).tolist()


class Windows:
    """The training batches of K trials, as `pagating.data.corpus.train_batch` draws them, gathered at once.

    A GPU gets the tokens of the split once and the starts of the windows of `AHEAD` steps at once.
    """

    def __init__(self, trials: Sequence[Trial], batch: int, device: torch.device) -> None:
        self.tokens_N = np.asarray(open_split(trials[0].corpus, "train"))
        self.batch, self.device, self.steps = batch, device, trials[0].steps
        self.seeds = sorted({trial.seed for trial in trials})
        self.place_K = torch.tensor([self.seeds.index(trial.seed) for trial in trials], device=device)
        self.offset_T = torch.arange(trials[0].model["n_ctx"] + 1, device=device)
        on_gpu = device.type == "cuda" and len(self.tokens_N) <= MOST_ON_GPU
        self.on_device_N = torch.from_numpy(self.tokens_N.astype(np.int32)).to(device) if on_gpu else None
        self.starts_SDB, self.first = torch.empty(0, dtype=torch.int64), 0

    def at(self, step: int) -> Tensor:
        """Return the batches of all trials at a step, (K * B, T + 1), int64, on the device."""
        if not 0 <= step - self.first < len(self.starts_SDB):
            last = len(self.tokens_N) - len(self.offset_T) + 1
            ahead = range(step, min(step + AHEAD, self.steps))
            drawn = [[step_generator(s, each).integers(0, last, size=self.batch) for s in self.seeds] for each in ahead]
            self.starts_SDB, self.first = to_device(torch.from_numpy(np.array(drawn)), self.device), step
        starts_KB = self.starts_SDB[step - self.first][self.place_K]
        places_NT = starts_KB.flatten()[:, None] + self.offset_T
        if self.on_device_N is not None:
            return self.on_device_N[places_NT].long()
        return to_device(torch.from_numpy(self.tokens_N[places_NT.cpu().numpy()].astype(np.int64)), self.device)


class Pack:
    """The state of K trials that train together: model, optimiser and unread losses.

    Trials are sorted by their units: trial i of the pack is `trials[order[i]]` of the given list.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        require_one_pack(trials)
        device = resolve_device(trials[0].device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        singles = [build_model(trial) for trial in trials]
        self.order = sorted(range(len(trials)), key=lambda i: unit_kind(singles[i]))
        self.trials = [trials[i] for i in self.order]
        self.sizes = [model_size(singles[i], training_flops_per_token(singles[i])) for i in self.order]
        self.learned = [bool(alpha_parameters(singles[i])) for i in self.order]
        self.model = PackedGPT2([singles[i] for i in self.order]).to(device)
        self.flats = gather(self.model, len(trials))
        self.limit_K = self.flats[0].value.new_tensor([trial.clip for trial in self.trials])
        self.shared, self.device = self.trials[0], device
        self.n_ctx = self.shared.model["n_ctx"]
        self.batch = self.shared.batch_tokens // self.n_ctx
        self.micro = (self.shared.micro_batch_tokens or self.shared.batch_tokens) // self.n_ctx
        self.windows = Windows(self.trials, self.batch, device)
        first_KBT = self.windows.at(0).unflatten(0, (len(trials), -1))[:, : self.micro]
        self.hidden = hidden_function(self.shared, self.model, first_KBT.flatten(0, 1)[:, :-1])
        self.alive = set(range(len(trials)))
        self.unseen: list[Tensor] = []
        self.factors, self.factors_from = self.limit_K[:0], 0

    def rates(self, step: int) -> list[float]:
        """Return each trial's learning rate at a step; 0 if it diverged."""
        return [learning_rate(trial, step) if i in self.alive else 0.0 for i, trial in enumerate(self.trials)]

    def factors_at(self, step: int) -> Tensor:
        """Return the optimiser's factors of a step, (2, K). Those of `AHEAD` steps go to the device at once."""
        if not 0 <= step - self.factors_from < len(self.factors):
            decays = [trial.weight_decay for trial in self.trials]
            ahead = range(step, min(step + AHEAD, self.shared.steps))
            rows = [factors(each + 1, self.rates(each), decays, self.shared.beta1) for each in ahead]
            self.factors, self.factors_from = self.limit_K.new_tensor(rows), step
        return self.factors[step - self.factors_from]

    def step(self, step: int) -> None:
        """Make one update of every trial."""
        n_trial = len(self.trials)
        set_progress(self.model, fraction_done(self.shared, step))
        parts = self.windows.at(step).unflatten(0, (n_trial, -1)).split(self.micro, 1)
        total_K = self.limit_K.new_zeros(n_trial)
        for part_KBT in parts:
            with autocast(self.shared.precision, self.device.type):
                x_KNC = self.hidden(self.model, part_KBT[..., :-1].flatten(0, 1)).unflatten(0, (n_trial, -1))
                targets_KN = part_KBT[..., 1:].flatten(1)
                loss_K = linear_nll(x_KNC.flatten(1, 2), self.model.lm_head.weight, targets_KN) / len(parts)
            with warnings.catch_warnings():
                # each gradient is a view of the optimiser's buffer, and torch warns about its strides
                warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
                loss_K.sum().backward()
            total_K += loss_K.detach()
        norm_K = clip_each(self.flats, self.limit_K)
        self.unseen.append(torch.stack([total_K, norm_K]))
        adamw_step(self.flats, step + 1, self.factors_at(step), self.shared.beta1, self.shared.beta2)

    def take_losses(self) -> list[tuple[list[float], list[float]]]:
        """Return losses and gradient norms of each trial since the last call. It waits for the GPU."""
        seen_K2S = torch.stack(self.unseen, -1).transpose(0, 1).tolist()
        self.unseen = []
        return [(losses, norms) for losses, norms in seen_K2S]

    def drop(self, trial: int) -> None:
        """Remove a diverged trial, so that its values do not spread."""
        self.alive.discard(trial)
        self.factors = self.factors[:0]  # its rate is 0 from now on
        silence(self.flats, trial)

    def mean_nll(self, windows_WT: Tensor) -> list[float]:
        """Return the mean loss of each trial over windows (W, T + 1), in nats."""
        return mean_nll_each(self.model, windows_WT, self.batch, self.shared.precision)


Entries = list[Row | Diverged | None]


def train_packed(trials: Sequence[Trial]) -> Iterator[Entries]:
    """Train all trials together. Yield at each evaluation a list with one entry per trial, in the given order.

    An entry is the row that `pagating.train.train` yields for the trial; the last one has `final`. If the trial has
    diverged since the last evaluation, the entry is the `Diverged` that `train` would raise; later entries are None.
    The iterator ends when all trials are done or diverged. `seconds` and `tokens_per_second` are a trial's share: the
    pack's time divided by K. `final` has `packed` = K. Raise ValueError if the trials cannot be one pack (see
    `require_one_pack` and `PackedGPT2`).
    """
    return (entries for entries in heartbeats_packed(trials) if entries)


def heartbeats_packed(trials: Sequence[Trial]) -> Iterator[Entries | None]:
    """Train all trials together and yield as `train_packed` does, and also None after each other step."""
    started, seconds = time.perf_counter(), 0.0
    pack = Pack(trials)
    shared, n_trial = pack.shared, len(trials)
    torch.set_num_threads(shared.threads)
    val_WT = eval_windows(open_split(shared.corpus, "validation"), pack.n_ctx, shared.eval_windows)
    begun = time.perf_counter()
    for step in range(shared.steps):
        pack.step(step)
        done = step + 1
        if done % shared.evaluation_interval and done != shared.steps:
            yield None
            continue
        seen = pack.take_losses()
        seconds += time.perf_counter() - begun
        val_nll, alphas = pack.mean_nll(val_WT), pack.model.alphas()
        entries: list[Row | Diverged | None] = [None] * n_trial
        for i in sorted(pack.alive):
            losses, norms = seen[i]
            own = alphas[i] if pack.learned[i] else []
            try:
                for each, (loss, norm) in enumerate(zip(losses, norms, strict=True), done - len(losses)):
                    require_finite(each, loss, norm)
                row = evaluation_row(pack.trials[i], done, losses, norms[-1], val_nll[i], seconds / n_trial, own)
            except Diverged as diverged:
                entries[pack.order[i]] = diverged
                pack.drop(i)
            else:
                entries[pack.order[i]] = row
        if done == shared.steps:
            _finish(pack, entries, alphas, started)
        yield entries
        if not pack.alive:
            return
        begun = time.perf_counter()


def _finish(pack: Pack, entries: list[Any], alphas: list[list[float]], started: float) -> None:
    """Add `final` to the last row of each trial that did not diverge."""
    shared = pack.shared
    extra: list[Row] = [{} for _ in pack.trials]
    if shared.test:
        test_WT = eval_windows(open_split(shared.corpus, "test"), pack.n_ctx, shared.eval_windows)
        rows, pad = text_rows(shared.corpus, "validation", shared.eval_windows)
        both = pack.mean_nll(test_WT), pack.mean_nll(pad_rows(rows, pack.n_ctx, pad))
        extra = [{"test_nll": test, "padded_nll": padded} for test, padded in zip(*both, strict=True)]
    share = (time.perf_counter() - started) / len(pack.trials)
    for i in sorted(pack.alive):
        if not math.isfinite(extra[i].get("test_nll", 0.0)):
            entries[pack.order[i]] = Diverged(f"step {shared.steps}: test loss {extra[i]['test_nll']}")
            continue
        row = entries[pack.order[i]]
        row["final"] = {
            **final_metrics(pack.trials[i], row, alphas[i]),
            **pack.sizes[i],
            "compiled": float(pack.hidden is not GPT2.hidden),
            **extra[i],
            **device_metrics(
                pack.device, pack.sizes[i] | {"tokens_per_second": len(pack.trials) * row["tokens_per_second"]}
            ),
            "packed": len(pack.trials),
            "seconds": share,
            "peak_rss_mb": peak_rss_mb(),
        }


def main(arguments: list[str] | None = None) -> int:
    """Train the trials of a JSON file as one pack. Return the exit code: 0 all done, 1 some diverged, 2 bad input."""
    paths = sys.argv[1:] if arguments is None else arguments
    if len(paths) != 1:
        print("usage: python -m pagating.packed trials.json", file=sys.stderr)
        return 2
    try:
        trials = [Trial.from_dict(fields) for fields in json.loads(Path(paths[0]).read_text(encoding="utf-8"))]
        for trial in trials:
            check(trial)
        pack = train_packed(trials)
        results: list[Row] = [{} for _ in trials]
        for entries in pack:
            for i, entry in enumerate(entries):
                if isinstance(entry, Diverged):
                    results[i] = {"outcome": "infeasible", "reason": str(entry)}
                elif entry is not None and "final" in entry:
                    results[i] = {"outcome": "completed", **entry["final"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{paths[0]}: {error}", file=sys.stderr)
        return 2
    for result in results:
        print(json.dumps(result))
    return int(any(result["outcome"] == "infeasible" for result in results))
