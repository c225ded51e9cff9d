"""A process that trains for a plan: one JSON request on standard input, one JSON answer on standard output.

    python -m tune.plan.child < request.json

`start` starts such a process. `answers` waits for several of them and returns their answers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from pagating.trial import Diverged, OutOfMemory, Trial
from pagating_study import python_m

NICENESS = 15  # Ray's default for its workers; RAY_worker_niceness changes both
ROUGH_FLOPS = 2e10  # rough speed of a core; it decides only the number of steps between two clock readings
LONGEST = 10_000  # clock readings per arm
LEAST_ROUNDS = 3


class ChildError(RuntimeError):
    """A process ended without an answer. The message gives the reason in one line."""


class ChildTimeout(ChildError):
    """A process was ended because it gave no answer in time."""


def start(task: str, threads: int, **request: Any) -> subprocess.Popen[str]:
    """Start a process that runs one of `TASKS` with the arguments in `request`, on `threads` threads."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as given:
        json.dump({"task": task, **request}, given)
        given.seek(0)
        return subprocess.Popen(
            python_m("tune.plan.child"),
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )


def answers(*processes: subprocess.Popen[str], limit: float | None = None) -> list[dict[str, Any]]:
    """Wait for processes of `start` and return their answers.

    Args:
        processes: The processes.
        limit: Longest wait for all answers, in seconds. Then all processes are ended.

    Raises:
        ChildError: A process failed.
        ChildTimeout: The answers did not come in time.
    """
    end = time.monotonic() + (math.inf if limit is None else limit)
    try:
        said = [process.communicate(timeout=_until(end)) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise ChildTimeout(f"no answer within {limit:.0f} s") from error
    finally:  # an interruption ends them too
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return [_answer(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def _until(end: float) -> float | None:
    """Return the seconds until a moment of the monotonic clock, at least 0; None for an infinite one."""
    return max(0.0, end - time.monotonic()) if math.isfinite(end) else None


def _answer(code: int, out: str, error: str) -> dict[str, Any]:
    if code == 0:
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found
    if code < 0:
        reason = ", which is typical of too little memory" if code == -9 else ""
        raise ChildError(f"its process was killed by signal {-code}{reason}")
    lines = [line for line in error.splitlines() if line.strip()] or [f"exit code {code}"]
    raise ChildError(lines[-1])


# --- inside the process ----------------------------------------------------------------------------------------------


def be_nice() -> None:
    """Take the niceness of a Ray worker."""
    wanted = int(os.environ.get("RAY_worker_niceness", NICENESS))  # noqa: SIM112 (Ray's own spelling)
    os.nice(max(0, wanted - os.nice(0)))


def calibrate(arms: list[tuple[str, dict[str, Any], int]], seconds: float) -> dict[str, Any]:
    """Train the first steps of all arms for `seconds` in total, with the niceness and the imports of a Ray worker.

    Each item of `arms` is a name, the fields of a `Trial` and the training FLOPs per token.
    """
    be_nice()
    begun = time.perf_counter()
    import tune.backend.ray_trial  # noqa: F401 (what a worker imports)
    from pagating.evaluate import text_rows
    from pagating.metrics import peak_rss_mb

    imported = time.perf_counter() - begun
    trials = [(arm, Trial.from_dict(fields), flops) for arm, fields, flops in arms]
    each, trial = seconds / len(trials), trials[0][1]
    first = seconds_of(tiny(trial))
    found: dict[str, Any] = {"import_seconds": imported, "first_seconds": max(0.0, first - seconds_of(tiny(trial)))}
    found |= {"base_mb": peak_rss_mb(), "arms": {}}
    begun = time.perf_counter()
    text_rows(trial.corpus, "validation", trial.eval_windows)
    found["rows_seconds"] = time.perf_counter() - begun
    begun = time.perf_counter()
    for arm, trial, flops in trials:
        if found["arms"] and time.perf_counter() - begun > 2 * seconds:
            break  # the model is large: `combine` scales the other arms by their FLOPs
        found["arms"][arm] = first_steps(trial, flops, each)
    return found


def try_out(trial: dict[str, Any]) -> dict[str, Any]:
    """Train a trial to its end. Return the fields of `tune.plan.dry_run.Tried`. Exit with 1 if it fails."""
    from pagating.train import heartbeats

    rows, silence, seen = [], 0.0, time.monotonic()
    try:
        for step in heartbeats(Trial.from_dict(trial)):
            silence, seen = max(silence, time.monotonic() - seen), time.monotonic()
            if step and step[1]:
                rows.append(step[1])
    except (Diverged, OutOfMemory) as error:
        raise SystemExit(str(error)) from error
    seconds = [row["tokens"] / row["tokens_per_second"] for row in rows]  # of training so far
    later = len(seconds) > 1  # leave out the first step, a warm-up
    final = rows[-1]["final"]
    return {
        "first_nll": rows[0]["train_nll"],
        "last_nll": rows[-1]["train_nll"],
        "step_seconds": (seconds[-1] - seconds[0]) / (len(seconds) - 1) if later else seconds[0],
        "peak_mb": final.get("peak_gpu_mb", final["peak_rss_mb"]),
        "parameters": final["parameters"],
        "silence": silence,
    }


def short(trial: Trial, flops: int, seconds: float) -> tuple[Trial, float]:
    """Return a trial with clock readings close enough for `seconds`, and the cost of a full evaluation over its own.

    A step or an evaluation that would take longer than the whole calibration is made smaller.
    """
    from pagating.data.corpus import read_meta
    from pagating.model.compile import is_compiled
    from pagating.model.size import GPT2Size, stock_flops_per_token

    size = GPT2Size(vocab_size=read_meta(trial.corpus)["vocab_size"], **trial.model)
    whole = stock_flops_per_token(size) * trial.tokens
    affordable = seconds * ROUGH_FLOPS / flops  # tokens
    batch_tokens = min(trial.batch_tokens, max(1, int(affordable // size.n_ctx)) * size.n_ctx)
    micro = trial.micro_batch_tokens
    if micro:
        batch_tokens = batch_tokens // micro * micro or batch_tokens
    every = max(1, min(16, round(affordable / 4 / batch_tokens)))
    windows = min(trial.eval_windows, max(1, every * batch_tokens // size.n_ctx))
    compiled = trial.task == "causal" and is_compiled(trial.compile, whole, size.dropout)
    shorter = replace(
        trial,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro if micro and batch_tokens % micro == 0 else None,
        tokens=LONGEST * every * batch_tokens,
        eval_every=every,
        eval_windows=windows,
        test=False,
        compile="always" if compiled else "never",
    )
    return shorter, trial.eval_windows / windows


def first_steps(trial: Trial, flops: int, seconds: float) -> dict[str, float]:
    """Measure the speed of one arm during about `seconds`, without the first interval, which is a warm-up."""
    from pagating.train import train

    trial, share = short(trial, flops, seconds)
    every = trial.evaluation_interval
    begun = time.perf_counter()
    trained, clock, evaluations = [], [], []
    for row in train(trial):
        trained.append(row["tokens"] / row["tokens_per_second"])  # seconds of training so far
        clock.append(time.perf_counter())
        if len(clock) > 1:
            evaluations.append(clock[-1] - clock[-2] - (trained[-1] - trained[-2]))
            if clock[-1] - clock[0] >= seconds:
                break
    # medians, because a burst of other work is not this machine's speed
    step = median(after - before for before, after in pairwise(trained)) / every
    evaluation = max(0.0, median(evaluations))
    return {
        "tokens_per_second": trial.batch_tokens / step,
        "evaluation_seconds": evaluation * share,
        "build_seconds": max(0.0, clock[0] - begun - evaluation - every * step),
    }


def in_turns(trials: dict[str, dict[str, Any]], flops: int, seconds: float) -> dict[str, list[float]]:
    """Train the first steps of several trials in turns; return the seconds per token of each turn, by trial.

    The first turn of each is a warm-up and is left out, and so is evaluation. Every other round has the reverse order.

    Args:
        trials: Fields of each `Trial`, by name.
        flops: Training FLOPs per token.
        seconds: Time of all turns, without the warm-up.
    """
    from pagating.train import train

    be_nice()
    running, spent = {}, dict.fromkeys(trials, 0.0)
    for name, fields in trials.items():
        trial, _ = short(Trial.from_dict(fields), flops, seconds / len(trials))
        running[name] = (train(trial), trial.evaluation_interval * trial.batch_tokens)
    order = list(running)
    found: dict[str, list[float]] = {name: [] for name in order}
    begun = 0.0
    while not begun or len(found[order[0]]) < LEAST_ROUNDS or time.perf_counter() - begun < seconds:
        for name in order:
            rows, tokens = running[name]
            row = next(rows)
            trained = row["tokens"] / row["tokens_per_second"]  # seconds of training so far
            if begun:
                found[name].append((trained - spent[name]) / tokens)
            spent[name] = trained
        order.reverse()
        begun = begun or time.perf_counter()
    return found


def tiny(trial: Trial) -> Trial:
    """Return a trial of one step of one window of a tiny model without a gate."""
    n_ctx = trial.model["n_ctx"]
    return replace(
        trial,
        model={**trial.model, "n_layer": 1, "d_model": 8, "n_head": 1},
        batch_tokens=n_ctx,
        micro_batch_tokens=None,
        tokens=n_ctx,
        eval_windows=1,
        unit=None,
        test=False,
        compile="never",
    )


def seconds_of(trial: Trial) -> float:
    """Return the seconds that a trial takes. Of a tiny one they are mostly the process's first loading of libraries."""
    from pagating.train import train

    begun = time.perf_counter()
    for _ in train(trial):
        pass
    return time.perf_counter() - begun


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"calibrate": calibrate, "try": try_out, "in_turns": in_turns}


def main() -> None:
    """Run the request on standard input and print its answer as JSON."""
    request = json.load(sys.stdin)
    print(json.dumps(TASKS[request.pop("task")](**request)))


if __name__ == "__main__":
    main()
