"""Training steps to compare: this engine, Hugging Face's Trainer, a plain loop on its model, and one like nanoGPT's.

Each variant is a function that continues the training and returns its seconds per token.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import random_corpus
from torch import Tensor, nn
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
    """Make the variant of `engine` in its own process, with a study worker's environment."""
    return apart("engine", trial, **ALLOCATOR)


def apart(name: str, trial: Trial, **environment: str) -> Variant:
    """Make a variant of `APART` in a process of its own, which waits between calls."""
    child = subprocess.Popen(
        [sys.executable, __file__, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
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


class NanoBlock(nn.Module):
    """One layer in nanoGPT's layout: no biases, query, key and value in one product, PyTorch's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream."""
        q, k, v = (
            part_BTC.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part_BTC in self.qkv(self.norm_1(x_BTC)).chunk(3, dim=2)
        )
        mixed_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(mixed_BHTD.transpose(1, 2).flatten(2))
        return x_BTC + self.down(F.gelu(self.up(self.norm_2(x_BTC))))


class NanoGPT(nn.Module):
    """A GPT in nanoGPT's layout: learned positions, the embedding tied to the head, a vocabulary of whole 64s."""

    def __init__(self, size: Mapping[str, Any], vocab_size: int) -> None:
        super().__init__()
        width, vocab_size = size["d_model"], -(-vocab_size // 64) * 64
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(size["n_ctx"], width)
        self.blocks = nn.Sequential(*(NanoBlock(width, size["n_head"]) for _ in range(size["n_layer"])))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02) if weight.dim() > 1 else nn.init.ones_(weight)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean loss, nats."""
        x_BTC = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1]))
        logits_BTV = self.head(self.norm(self.blocks(x_BTC)))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def nano_loop(trial: Trial) -> Variant:
    """Make the variant of a loop in the manner of nanoGPT (github.com/karpathy/nanoGPT), not compiled.

    Its model, random windows, autocast in the trial's precision, clipping, fused AdamW with weight decay of matrices
    only, and a cosine of the learning rate.
    """
    model = NanoGPT(trial.model, corpus.read_meta(trial.corpus)["vocab_size"])
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=trial.lr, betas=(0.9, 0.95), fused=True)
    tokens_N = torch.from_numpy(corpus.open_split(trial.corpus, "train").astype("int64"))
    batch, n_ctx, step = trial.batch_tokens // trial.model["n_ctx"], trial.model["n_ctx"], 0

    def run() -> float:
        nonlocal step
        start = time.perf_counter()
        for _ in range(2):
            rate = trial.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / trial.steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            begins = torch.randint(len(tokens_N) - n_ctx, (batch,)).tolist()
            ids_BT = torch.stack([tokens_N[i : i + n_ctx] for i in begins])
            targets_BT = torch.stack([tokens_N[i + 1 : i + 1 + n_ctx] for i in begins])
            with autocast(trial.precision):
                loss = model(ids_BT, targets_BT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        return (time.perf_counter() - start) / (2 * trial.batch_tokens)

    return run


def hf_trainer(trial: Trial, compiled: bool = False) -> Variant:
    """Make the variant of Hugging Face's Trainer and GPT-2 at their defaults, float32, without start and end.

    `compiled` sets `torch_compile`. That needs a process of its own: the Trainer keeps it in the environment.
    """
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
            output_dir=str(Path(trial.corpus).parent / "trainer"),
            per_device_train_batch_size=trial.batch_tokens // n_ctx,
            max_steps=3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            torch_compile=compiled,
        )
        marks.clear()
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        with mock.patch("builtins.print"):  # the Trainer prints a summary
            Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
        return (marks[-1] - marks[0]) / ((len(marks) - 1) * trial.batch_tokens)

    return run


APART: dict[str, Callable[[Trial], Variant]] = {
    "engine": engine,
    "compiled Trainer": lambda trial: hf_trainer(trial, compiled=True),
}


def main() -> None:
    """Run the process of `apart`: a trial's JSON on the first line, then for each line the seconds per token."""
    torch.set_num_threads(1)
    told = sys.stdout
    with redirect_stdout(sys.stderr):  # a library may print
        run = APART[sys.argv[1]](Trial.from_dict(json.loads(sys.stdin.readline())))
        for _ in sys.stdin:
            print(run(), file=told, flush=True)


if __name__ == "__main__":
    main()
