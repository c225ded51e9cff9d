"""Training steps to compare: this engine, a plain loop on Hugging Face's model, and Hugging Face's Trainer.

Each variant is a function that continues the training and returns its seconds per token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import random_corpus
from torch.nn import functional as F

from pagating.data import corpus
from pagating.evaluate import autocast
from pagating.train import Trial, train
from tune.backend.cluster import ALLOCATOR

Variant = Callable[[], float]


def make_trial(folder: Path, shape: dict[str, Any], **changed: Any) -> Trial:
    """Make a trial of a shape that lasts for all rounds: 4 layers, 1,024 tokens per step."""
    d_model, n_ctx = shape["d_model"], shape["n_ctx"]
    model = {"n_layer": 4, "d_model": d_model, "n_head": max(2, d_model // 32), "n_ctx": n_ctx}
    settings: dict[str, Any] = {
        "corpus": random_corpus(folder, shape["vocab_size"]),
        "model": {**model, "activation": "gelu_pytorch_tanh"},
        "lr": 1e-4,
        "batch_tokens": 1024,
        "tokens": 1024 * 100_000,
        "seed": 0,
        "precision": shape["precision"],
        "eval_every": 2,
        "eval_windows": 1,
        "compile": "never",
    }
    settings |= {**changed, "model": {**settings["model"], **changed.get("model", {})}}
    return Trial(**settings)


def engine(trial: Trial, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Variant:
    """Make the variant of the study's loop: seconds per token of the next `eval_every` steps, without evaluation."""
    rows: Iterator[dict[str, Any]] = train(trial)
    last = (0, 0.0)

    def run() -> float:
        nonlocal last
        with within():
            row = next(rows)
        seconds = row["tokens"] / row["tokens_per_second"]
        taken = (seconds - last[1]) / (row["tokens"] - last[0])
        last = (row["tokens"], seconds)
        return taken

    return run


def worker(trial: Trial) -> Variant:
    """Make the variant of `engine` in its own process, with a study worker's environment; it waits between calls."""
    child = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ALLOCATOR},
    )
    given, told = child.stdin, child.stdout
    assert given is not None
    assert told is not None
    print(json.dumps(trial.as_dict()), file=given, flush=True)

    def run() -> float:
        print(file=given, flush=True)
        return float(told.readline())

    return run


def hf_model(trial: Trial, **changed: Any) -> Any:
    """Make Hugging Face's model of a trial's size; `changed` overrides its defaults."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size, vocab_size = trial.model, corpus.read_meta(trial.corpus)["vocab_size"]
    sizes = {"n_positions": size["n_ctx"], "n_embd": size["d_model"], "n_layer": 4, "n_head": size["n_head"]}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **sizes, **changed))


def plain_loop(trial: Trial, **changed: Any) -> Variant:
    """Make the variant of a plain loop on Hugging Face's model: dropout 0, AdamW, clipping, the trial's precision."""
    model = hf_model(trial, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)
    tokens_N = corpus.open_split(trial.corpus, "train")
    batch, n_ctx, step = trial.batch_tokens // trial.model["n_ctx"], trial.model["n_ctx"], 0

    def run() -> float:
        nonlocal step
        start = time.perf_counter()
        for _ in range(2):
            tokens_BT = corpus.train_batch(tokens_N, 0, step, batch, n_ctx)
            with autocast(trial.precision):
                logits = model(input_ids=tokens_BT[:, :-1]).logits
            F.cross_entropy(logits.float().flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        return (time.perf_counter() - start) / (2 * trial.batch_tokens)

    return run


def hf_trainer(trial: Trial, folder: Path) -> Variant:
    """Make the variant of Hugging Face's Trainer and GPT-2 at their defaults, float32, without start and end."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, n_ctx = hf_model(trial), trial.model["n_ctx"]
    tokens_N = corpus.open_split(trial.corpus, "train")
    rows = [torch.from_numpy(tokens_N[i : i + n_ctx].astype("int64")) for i in range(0, len(tokens_N) - n_ctx, n_ctx)]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            marks.append(time.perf_counter())

    def run() -> float:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=trial.batch_tokens // n_ctx,
            max_steps=3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        marks.clear()
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        with mock.patch("builtins.print"):  # the Trainer prints a summary
            Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
        return (marks[-1] - marks[0]) / ((len(marks) - 1) * trial.batch_tokens)

    return run


def main() -> None:
    """The process of `worker`: a trial's JSON on the first line, then for each line the seconds a token."""
    run = engine(Trial.from_dict(json.loads(sys.stdin.readline())))
    for _ in sys.stdin:
        print(run(), flush=True)


if __name__ == "__main__":
    main()
