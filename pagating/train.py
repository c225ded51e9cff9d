"""The training loop of one trial.

    python -m pagating.train trial.json [--checkpoints FOLDER] [--model FOLDER]

runs a trial without Ray and prints its final metrics as JSON. `pagating trial STUDY CELL` prints a `trial.json`.
Axes: B batch, T position in a window, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from pagating.checkpoint import EVERY_SECONDS, CheckpointFolder, capture, identity, restore
from pagating.data.corpus import CorpusError, check_corpus, read_meta
from pagating.data.errors import note
from pagating.data.lines import open_lines
from pagating.device import out_of_memory, resolve_device
from pagating.evaluate import autocast
from pagating.gating.alpha import alpha_parameters, alpha_values, set_progress
from pagating.gating.schedules import warmup_then
from pagating.layers import write_measured
from pagating.limits import check_number
from pagating.metrics import device_metrics, final_metrics, model_size, peak_rss_mb
from pagating.model.pretrained import PretrainedError
from pagating.optimizer import param_groups
from pagating.saved_model import keep_trained
from pagating.tasks.causal import padded_loss
from pagating.tasks.table import task_of
from pagating.tasks.task import in_parts, targets_in
from pagating.trial import Diverged, OutOfMemory, Trial, require_trial

Step = tuple[int, dict[str, Any] | None]


def check(trial: Trial) -> None:
    """Raise ValueError, one line, if a trial cannot start here: its device, corpus, sizes, unit or weights.

    Raise OutOfMemory if its unit does not fit into memory.
    """
    resolve_device(trial.device)
    try:
        check_corpus(trial.corpus, trial.model["n_ctx"])
        if trial.padding:
            open_lines(trial.corpus, "train")
    except CorpusError as error:
        raise CorpusError(f"corpus={trial.corpus!r}: {error}") from error
    full = None
    try:
        task_of(trial).check(trial)
    except (MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
    if full:
        raise OutOfMemory(full)
    if trial.pretrained and not Path(trial.pretrained).is_file():
        raise PretrainedError(f"pretrained={trial.pretrained!r}: no such file; allowed: a safetensors file, or null")


def build_model(trial: Trial) -> Any:
    """Make the model of a trial with its unit in every MLP, from its seed and, if named, pretrained weights."""
    return task_of(trial).build(trial)


class PlainAdamW(torch.optim.AdamW):
    """AdamW whose methods do not load torch._dynamo, which takes two seconds in each process that compiles nothing."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def step(self, closure: Any = None) -> Any:
        """Make one update."""
        with torch.no_grad():
            return _UPDATE(self, closure)


_UPDATE: Any = inspect.unwrap(torch.optim.AdamW.step)


def build_optimizer(model: nn.Module, trial: Trial) -> torch.optim.AdamW:
    """Make an AdamW (Loshchilov & Hutter 2019) with decay on matrices only and a learning-rate multiplier per alpha."""
    groups = param_groups(model, trial.lr, trial.weight_decay)
    return PlainAdamW(groups, lr=trial.lr, betas=(trial.beta1, trial.beta2), fused=True)


def learning_rate(trial: Trial, step: int) -> float:
    """Return the model's learning rate of update `step`, counted from 0."""
    fraction = fraction_done(trial, step)
    return trial.lr * warmup_then(trial.schedule, fraction, warmup=trial.warmup, final=trial.final_lr)


def fraction_done(trial: Trial, step: int) -> float:
    """Return the share of training done at the midpoint of update `step`, so that neither end has a rate of zero."""
    return (step + 0.5) / trial.steps


def require_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raise Diverged if the loss or the gradient norm of update `step`, counted from 0, is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}")


def evaluation_row(
    trial: Trial, done: int, losses: list[float], grad_norm: float, val_nll: float, seconds: float, alphas: list[float]
) -> dict[str, Any]:
    """Return the row of an evaluation; `train` describes it.

    Args:
        trial: The trial.
        done: Updates made.
        losses: Training losses since the last row, nats.
        grad_norm: Gradient norm of the last update, before clipping.
        val_nll: Validation loss, nats per token.
        seconds: Training time so far.
        alphas: Effective alpha of each layer, or an empty list.

    Raises:
        Diverged: The validation loss is not finite.
    """
    if not math.isfinite(val_nll):
        raise Diverged(f"step {done}: validation loss {val_nll}")
    return {
        "step": done,
        "tokens": done * trial.batch_tokens,
        "val_nll": val_nll,
        "train_nll": sum(losses) / len(losses),
        "lr": learning_rate(trial, done - 1),
        "grad_norm": grad_norm,
        "tokens_per_second": done * trial.batch_tokens / seconds,
        "alpha": alphas,
    }


@dataclasses.dataclass
class Progress:
    """The state of the loop beside model, optimiser and random generators. JSON preserves it exactly."""

    step: int = 0  # updates made
    losses: list[float] = dataclasses.field(default_factory=list)  # since the last row
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds_training: float = 0.0
    seconds: float = 0.0


def record_losses(progress: Progress, unseen: list[torch.Tensor], done: int) -> float:
    """Move the losses of the last of `done` updates to `progress` and return the last gradient norm.

    `unseen` has (loss, gradient norm) of each of them and is emptied. The call waits for a GPU. Raise Diverged at the
    first value that is not finite.
    """
    grad_norm = math.nan
    for step, (loss, grad_norm) in enumerate(torch.stack(unseen).tolist(), done - len(unseen)):
        require_finite(step, loss, grad_norm)
        progress.losses.append(loss)
    unseen.clear()
    return grad_norm


def trial_identity(trial: Trial) -> str:
    """Return the digest of a trial in the names of its checkpoints. Of files it uses the bytes, not the paths."""
    unit, own = dict(trial.unit or {}), trial.own_code
    if own:
        unit[own.key] = [hashlib.sha256(Path(own.file).read_bytes()).hexdigest(), own.name]
    device, corpus = resolve_device(trial.device).type, read_meta(trial.corpus)["digest"]
    fields = trial.as_dict() | {"unit": unit, "device": device, "corpus": corpus}
    for key, value in {"pretrained": None, "padding": None, "task": "causal"}.items():
        if fields[key] == value:
            del fields[key]  # keeps the identity of checkpoints from before these fields existed
    if trial.pretrained:
        with open(trial.pretrained, "rb") as file:
            fields["pretrained"] = hashlib.file_digest(file, "sha256").hexdigest()
    return identity(fields)


def train(trial: Trial, checkpoints: CheckpointFolder | None = None) -> Iterator[dict[str, Any]]:
    """Train one trial and yield a row at each evaluation.

    A row has step, tokens, val_nll, train_nll (mean over the steps since the last row), lr, grad_norm (of this step,
    before clipping), tokens_per_second (training only), alpha (per layer; empty if none is learned), and padded_nll if
    the trial trains on lines. The last row has `final`, the metrics of the whole trial. The result depends only on the
    trial, not on earlier or parallel work or on thread settings.

    With `checkpoints`, the trial continues from the newest one to the same bits. The earlier rows are yielded again
    unchanged, and `seconds` is the sum over all processes. The checkpoints are removed after the last row.

    Raises:
        Diverged: A loss or gradient norm is not finite.
        OutOfMemory: Memory is exhausted.
    """
    return (row for _, row in steps(trial, checkpoints) if row)


def steps(
    trial: Trial, checkpoints: CheckpointFolder | None = None, model_folder: Path | None = None
) -> Iterator[Step]:
    """Train one trial and yield after each update the number of updates and the row, or None if none is due.

    Arguments and errors are those of `heartbeats`.
    """
    return (step for step in heartbeats(trial, checkpoints, model_folder) if step)


def heartbeats(
    trial: Trial, checkpoints: CheckpointFolder | None = None, model_folder: Path | None = None
) -> Iterator[Step | None]:
    """Train one trial and yield as `steps` does, and also None after each micro-batch and each evaluated batch.

    The None is a heartbeat: one update of a large model may take longer than the time limit of a hung process. It does
    not change a result.

    Args:
        trial: The trial.
        checkpoints: Folder to continue from and to save in (see `train`).
        model_folder: Folder for the trained model (`pagating.saved_model`). If it cannot be written, one line goes to
            stderr and the trial still succeeds.

    Raises:
        Diverged, OutOfMemory: As in `train`.
        ValueError: `trial` is not a trial.
    """
    require_trial(trial)
    full = None
    try:
        yield from _steps(trial, checkpoints, model_folder)
    except Diverged:
        if checkpoints:
            checkpoints.remove()
        raise
    except (MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
    if full:  # raised outside the handler, so that no traceback keeps the tensors alive
        raise OutOfMemory(full)
    if checkpoints:
        checkpoints.remove()


def _steps(trial: Trial, checkpoints: CheckpointFolder | None, model_folder: Path | None) -> Iterator[Step | None]:
    torch.set_num_threads(trial.threads)
    started = time.perf_counter()
    device = resolve_device(trial.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    n_ctx, batch = trial.model["n_ctx"], trial.batch_tokens // trial.model["n_ctx"]
    micro = (trial.micro_batch_tokens or trial.batch_tokens) // n_ctx
    task = task_of(trial)
    batches, held = task.batches(trial), task.held(trial, "validation")
    model = build_model(trial).to(device)
    optimizer = build_optimizer(model, trial)
    learned = bool(alpha_parameters(model))
    yield None
    loss_of = task.loss(trial, model, in_parts(batches(0), device, micro)[0])
    yield None
    torch.manual_seed(trial.seed)  # dropout is the only user of the global generator
    progress = Progress()
    saved = checkpoints.resume(trial_identity(trial)) if checkpoints else None
    if saved:
        restore(model, optimizer, saved.tensors)
        progress = Progress(**saved.facts)
        started -= progress.seconds
        del saved
        yield from ((row["step"], row) for row in progress.rows)
    unseen: list[torch.Tensor] = []
    for step in range(progress.step, trial.steps):
        step_started = time.perf_counter()
        set_progress(model, fraction_done(trial, step))
        rate = learning_rate(trial, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        rows = batches(step)
        counts, parts = targets_in(rows, micro), in_parts(rows, device, micro)
        loss = torch.zeros((), device=device)
        for part, count in zip(parts, counts, strict=True):
            with autocast(trial.precision, device.type):
                mean = loss_of(model, part) / (sum(counts) / count)
            mean.backward()
            loss = loss + mean.detach()
            progress.seconds_training += time.perf_counter() - step_started
            yield None
            step_started = time.perf_counter()
        norm = nn.utils.clip_grad_norm_(model.parameters(), trial.clip)
        unseen.append(torch.stack([loss, norm]))
        due = (step + 1) % trial.evaluation_interval == 0 or step + 1 == trial.steps
        if due or device.type == "cpu":  # reading losses at every step would make a GPU wait
            grad_norm = record_losses(progress, unseen, step + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.seconds_training += time.perf_counter() - step_started
        progress.step = step + 1
        row = None
        if due:
            val_nll = yield from task.evaluate(model, held, batch, trial.precision)
            alphas = alpha_values(model) if learned else []
            seconds = progress.seconds_training
            row = evaluation_row(trial, progress.step, progress.losses, grad_norm, val_nll, seconds, alphas)
            if trial.padding:
                row["padded_nll"] = yield from padded_loss(trial, model)
            progress.losses = []
            progress.rows.append(row)
        if progress.step == trial.steps:
            break
        if checkpoints and checkpoints.due():
            if unseen:
                record_losses(progress, unseen, progress.step)
            progress.seconds = time.perf_counter() - started
            checkpoints.save(progress.step, capture(model, optimizer), dataclasses.asdict(progress))
        yield progress.step, row
    row = progress.rows[-1]
    final = final_metrics(trial, row, alpha_values(model)) | model_size(model, task.flops(trial, model))
    final["compiled"] = float(task.compiled(loss_of))
    if trial.test:
        final["test_nll"] = yield from task.evaluate(model, task.held(trial, "test"), batch, trial.precision)
        if not math.isfinite(final["test_nll"]):
            raise Diverged(f"step {trial.steps}: test loss {final['test_nll']}")
        if trial.task == "causal":
            final["padded_nll"] = row["padded_nll"] if trial.padding else (yield from padded_loss(trial, model))
    final |= device_metrics(device, final)
    final |= {"seconds": time.perf_counter() - started, "peak_rss_mb": peak_rss_mb()}
    if model_folder and (
        problem := keep_trained(model, trial, model_folder, final) or write_measured(model, trial, model_folder)
    ):
        print(f"pagating: {problem}", file=sys.stderr, flush=True)
        if checkpoints:
            checkpoints.notes.append(problem)
    yield progress.step, {**row, "final": final}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raise ValueError if a key is there twice, of which JSON would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error


def _note_windows(trial: Trial) -> None:
    """Write one line to stderr if the validation split has fewer windows than a trial wants to evaluate."""
    n_ctx = trial.model["n_ctx"]
    available = (read_meta(trial.corpus)["splits"]["validation"]["tokens"] - 1) // n_ctx
    if available < trial.eval_windows:
        wanted = f"eval_windows={trial.eval_windows}"
        note(f"{wanted}: the validation split has {available} windows of n_ctx={n_ctx}; all of them are evaluated")


def _seconds(given: str) -> float:
    try:
        check_number("seconds", float(given), {"ge": 0})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number of seconds in [0, inf)") from error
    return float(given)


def _infeasible(error: Diverged | OutOfMemory) -> str:
    return json.dumps({"outcome": "infeasible", "reason": str(error)})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None, prog: str = "python -m pagating.train") -> int:
    """Run the trial of a JSON file, print its final metrics, and return the exit code.

    Exit codes: 0 done, 1 infeasible (diverged, out of memory), 2 bad input, 130 interrupted by SIGINT, 143 by SIGTERM.
    An interrupted trial first saves a checkpoint if it has a folder for them. A second signal ends it at once.
    """
    parser = _Parser(prog=prog, description="Train one trial, without Ray.")
    parser.add_argument("trial", type=Path, help="JSON file, as printed by `pagating trial STUDY CELL`")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="save checkpoints and continue from them")
    parser.add_argument("--every", type=_seconds, default=EVERY_SECONDS, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the last checkpoints when the trial is done")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="save the trained model")
    given = parser.parse_args(arguments)
    try:
        trial = Trial.from_dict(_parsed(given.trial.read_text(encoding="utf-8"))).beside(given.trial.parent)
        check(trial)
        _note_windows(trial)
        for folder in (given.model, given.checkpoints):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"{error.filename or given.trial}: {error.strerror or error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"{given.trial}: {error}", file=sys.stderr)
        return 2
    except OutOfMemory as error:
        print(_infeasible(error))
        return 1
    checkpoints = CheckpointFolder(given.checkpoints, given.every, given.keep) if given.checkpoints else None
    interrupted: list[int] = []
    final: dict[str, Any] = {}

    def interrupt(number: int, frame: object) -> None:
        interrupted.append(number)
        if checkpoints:
            checkpoints.request()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for _, row in steps(trial, checkpoints, given.model):
            if row:
                print(f"step {row['step']}/{trial.steps} val_nll {row['val_nll']:.6f}", file=sys.stderr)
                final = row.get("final", {})
            if interrupted and not final:
                return 128 + interrupted[0]
    except (Diverged, OutOfMemory) as error:
        print(_infeasible(error))
        return 1
    except (CorpusError, PretrainedError) as error:
        print(f"{given.trial}: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(json.dumps({"outcome": "completed", **final}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
