"""The denoising tasks: BERT's masked language model and T5's span corruption, at small sizes.

The models are those of transformers, patched by `pagating.patch`. Their stock activation (exact GELU in BERT, ReLU in
T5) is the baseline. Only trials of these tasks import this module, and with it transformers.

The hidden tokens are a function of (seed, step), drawn from a random stream of their own. All arms get the same windows
with the same hidden tokens, and a resumed trial gives the same bits. Ids of special tokens follow the V ids of the
corpus's vocabulary.

Axes: B rows, T position in a window, S position of an encoder's input, U of a decoder's, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from pagating.data.corpus import eval_windows, open_split, read_meta, step_generator, train_batch
from pagating.data.lines import IGNORE
from pagating.device import warn_of_emulation
from pagating.evaluate import Evaluation, autocast
from pagating.gating.own_gate import load_own_of
from pagating.gating.patch import patch
from pagating.tasks.task import Batch, Loss, Task
from pagating.trial import Trial

SHARE = 0.15  # share of hidden tokens: Devlin et al. 2019 (BERT), section 3.1; Raffel et al. 2020 (T5), 3.1.4
SPAN = 3  # mean length of a hidden span: Raffel et al. 2020, section 3.3.4
MASKED, RANDOM = 0.8, 0.1  # shares of hidden tokens shown as mask and as random token; others unchanged (Devlin et al.)
TRAINING, HELD = 1, 2  # random streams; stream 0 draws the windows
Pair = tuple[np.ndarray, np.ndarray]
Corrupt = Callable[[np.random.Generator, np.ndarray, int], Pair]


def hidden_count(length: int) -> int:
    """Return the number of hidden tokens of a window: `SHARE` of its length, at least 1."""
    return max(1, round(SHARE * length))


def span_count(length: int) -> int:
    """Return the number of spans of hidden tokens in a window, at least 1."""
    return max(1, round(hidden_count(length) / SPAN))


def mask_tokens(generator: np.random.Generator, tokens_BT: np.ndarray, vocab_size: int) -> Pair:
    """Corrupt windows as BERT does. Return inputs and targets, both (B, T); targets are IGNORE at other positions.

    The mask has id `vocab_size`. Each row has exactly `hidden_count` targets, so that all batches have equal weight.
    """
    rows, length = tokens_BT.shape
    hidden = np.zeros((rows, length), dtype=bool)
    np.put_along_axis(hidden, generator.random((rows, length)).argsort(1)[:, : hidden_count(length)], True, 1)
    shown, other = generator.random((rows, length)), generator.integers(0, vocab_size, (rows, length))
    put = np.where(shown < MASKED, vocab_size, np.where(shown < MASKED + RANDOM, other, tokens_BT))
    return np.where(hidden, put, tokens_BT), np.where(hidden, tokens_BT, IGNORE)


def cut_spans(generator: np.random.Generator, tokens_BT: np.ndarray, vocab_size: int) -> Pair:
    """Corrupt windows as T5 does. Return inputs (B, S) with a sentinel per hidden span, and targets (B, U).

    S = T - hidden + spans. U = hidden + spans + 1: sentinel, span, sentinel, span, ..., last sentinel. The start token
    of the decoder has id `vocab_size`; the sentinels have the ids after it. Spans are random and never adjacent.
    """
    rows, length = tokens_BT.shape
    hidden, spans = hidden_count(length), span_count(length)
    kept_BN = random_lengths(generator, rows, length - hidden, spans)
    lengths_BN = np.stack([kept_BN, random_lengths(generator, rows, hidden, spans)], 2).reshape(rows, -1)
    mask_BT = np.stack([np.repeat(np.arange(2 * spans) % 2 == 1, lengths) for lengths in lengths_BN])
    targets_BU = collapsed(tokens_BT, ~mask_BT, vocab_size + 1)
    last_B1 = np.full((rows, 1), vocab_size + 1 + spans, dtype=targets_BU.dtype)
    return collapsed(tokens_BT, mask_BT, vocab_size + 1), np.concatenate([targets_BU, last_B1], 1)


def random_lengths(generator: np.random.Generator, rows: int, items: int, parts: int) -> np.ndarray:
    """Draw lengths (rows, parts), each at least 1, that sum to `items` per row. All such lengths are equally likely.

    Raise ValueError if `items` is less than `parts`.
    """
    if items < parts:
        raise ValueError(f"{items} tokens cannot be cut into {parts} spans: give a larger model.n_ctx")
    cuts = np.sort(generator.random((rows, items - 1)).argsort(1)[:, : parts - 1], 1) + 1
    ends = np.full((rows, 1), items)
    return np.diff(np.concatenate([np.zeros_like(ends), cuts, ends], 1), axis=1)


def collapsed(tokens_BT: np.ndarray, dropped_BT: np.ndarray, sentinel: int) -> np.ndarray:
    """Replace each run of dropped tokens by one token: in each row `sentinel`, `sentinel + 1`, ... from the left."""
    first_BT = dropped_BT & ~np.pad(dropped_BT, ((0, 0), (1, 0)))[:, :-1]
    put_BT = np.where(first_BT, sentinel + first_BT.cumsum(1) - 1, tokens_BT)
    return put_BT[~dropped_BT | first_BT].reshape(len(tokens_BT), -1)


# --- models ----------------------------------------------------------------------------------------------------------


def bert(vocab_size: int, size: Mapping[str, Any]) -> BertForMaskedLM:
    """Make a BERT over `vocab_size` ids and the mask: d_ff = 4 d_model, exact GELU, tied embeddings."""
    dropout = size.get("dropout", 0.0)
    config = BertConfig(
        vocab_size=vocab_size + 1,
        hidden_size=size["d_model"],
        num_hidden_layers=size["n_layer"],
        num_attention_heads=size["n_head"],
        intermediate_size=4 * size["d_model"],
        max_position_embeddings=size["n_ctx"],
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=size.get("initializer_range", 0.02),
        pad_token_id=None,  # there is no padding, and the embedding of a padding id would not be trained
    )
    return BertForMaskedLM(config)


def t5(vocab_size: int, size: Mapping[str, Any]) -> T5ForConditionalGeneration:
    """Make a T5 with n_layer blocks per side over `vocab_size` ids, the start token and the sentinels.

    d_ff = 4 d_model, ReLU, tied embeddings. It is initialised by T5's own rule, which has no `initializer_range`.
    """
    config = T5Config(
        vocab_size=vocab_size + 2 + span_count(size["n_ctx"]),
        d_model=size["d_model"],
        d_kv=size["d_model"] // size["n_head"],
        d_ff=4 * size["d_model"],
        num_layers=size["n_layer"],
        num_decoder_layers=size["n_layer"],
        num_heads=size["n_head"],
        dropout_rate=size.get("dropout", 0.0),
        feed_forward_proj="relu",
        pad_token_id=vocab_size,
        decoder_start_token_id=vocab_size,
        eos_token_id=None,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def bert_logits(model: BertForMaskedLM, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Compute logits (N, V) of the N hidden tokens, the only positions with a target."""
    x_BTC = model.bert(input_ids=inputs_BT).last_hidden_state
    logits: Tensor = model.cls(x_BTC[targets_BT != IGNORE])
    return logits


def t5_logits(model: T5ForConditionalGeneration, inputs_BS: Tensor, targets_BU: Tensor) -> Tensor:
    """Compute logits (N, V) of all N = B * U targets. The decoder gets the targets before each position."""
    before_BU = F.pad(targets_BU[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    logits: Tensor = model(input_ids=inputs_BS, decoder_input_ids=before_BU).logits
    return logits.flatten(0, 1)


@dataclass(frozen=True)
class Kind:
    """A denoising task: its model, its logits at a batch's targets, and its corruption."""

    model: Callable[[int, Mapping[str, Any]], Any]
    logits: Callable[[Any, Tensor, Tensor], Tensor]
    corrupt: Corrupt


KINDS = {"masked": Kind(bert, bert_logits, mask_tokens), "span": Kind(t5, t5_logits, cut_spans)}


def make_model(task: str, vocab_size: int, size: Mapping[str, Any], unit: Mapping[str, Any] | None) -> Any:
    """Make the model of a task with a unit in every MLP, initialised with torch's global generator.

    Raise ValueError as `pagating.patch` does.
    """
    model = KINDS[task].model(vocab_size, size)
    if unit is not None:
        load_own_of(unit)
        patch(model, **unit)
    return model


def build(trial: Trial) -> nn.Module:
    """Make the trial's model from its seed.

    The stock model is initialised before its patch, so that parameters that arms share start from the same bits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        made: nn.Module = make_model(trial.task, read_meta(trial.corpus)["vocab_size"], trial.model, trial.unit)
        return made


# --- functions of the task -------------------------------------------------------------------------------------------


def corrupted(task: str, generator: np.random.Generator, windows_BT: Tensor, vocab_size: int) -> Batch:
    """Return inputs and targets of a batch of windows (B, T + 1). The last token of each window is not used."""
    pair = KINDS[task].corrupt(generator, windows_BT[:, :-1].numpy(), vocab_size)
    return tuple(torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in pair)


def batches(trial: Trial) -> Callable[[int], Batch]:
    """Return a function of the step that gives its inputs and targets: corrupted windows of a causal trial's seed."""
    n_ctx, vocab_size = trial.model["n_ctx"], read_meta(trial.corpus)["vocab_size"]
    train_N, rows = open_split(trial.corpus, "train"), trial.batch_tokens // n_ctx

    def batch(step: int) -> Batch:
        windows_BT = train_batch(train_N, trial.seed, step, rows, n_ctx)
        return corrupted(trial.task, step_generator(trial.seed, step, TRAINING), windows_BT, vocab_size)

    return batch


def held(trial: Trial, split: str) -> tuple[str, Batch]:
    """Return the task and the evaluation windows of a split, corrupted in the same way for all trials.

    The windows are those of a causal trial.
    """
    windows = eval_windows(open_split(trial.corpus, split), trial.model["n_ctx"], trial.eval_windows)
    vocab_size = read_meta(trial.corpus)["vocab_size"]
    return trial.task, corrupted(trial.task, step_generator(0, 0, HELD), windows, vocab_size)


def nll(task: str, model: Any, batch: Batch, reduction: str) -> Tensor:
    """Compute the negative log-likelihood of a batch's targets, nats, float32. `reduction` is `mean` or `sum`."""
    inputs, targets = batch
    logits_NV = KINDS[task].logits(model, inputs, targets)
    return F.cross_entropy(logits_NV.float(), targets[targets != IGNORE], reduction=reduction)


def loss(trial: Trial, model: Any, batch: Batch) -> Loss:
    """Return the loss of a trial. It is never compiled."""
    model.train()
    if trial.precision == "bfloat16":
        warn_of_emulation(batch[0].device)
    return lambda trained, part: nll(trial.task, trained, part, "mean")


@torch.no_grad()
def evaluate(model: Any, rows: tuple[str, Batch], at_a_time: int, precision: str) -> Evaluation:
    """Compute nats per target, the mean over all targets of all rows, batch by batch."""
    task, batch = rows
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for part in zip(*(tensor.split(at_a_time) for tensor in batch), strict=True):
        with autocast(precision, device.type):
            total += nll(task, model, tuple(tensor.to(device) for tensor in part), "sum").item()
        yield
    model.train(was_training)
    return total / int((batch[-1] != IGNORE).sum())


def mean_loss(model: Any, rows: tuple[str, Batch], count: int) -> Tensor:
    """Compute the mean loss of the first windows of `held`, nats per target, with a gradient."""
    task, batch = rows
    device = next(model.parameters()).device
    return nll(task, model, tuple(part[:count].to(device) for part in batch), "mean")


def training_flops_per_token(
    task: str, vocab_size: int, size: Mapping[str, Any], unit: Mapping[str, Any] | None
) -> int:
    """Return forward and backward FLOPs per token: three times the forward of one window, as torch counts it."""
    n_ctx = size["n_ctx"]
    windows = torch.zeros(1, n_ctx + 1, dtype=torch.int64)
    inputs, targets = (part.to("meta") for part in corrupted(task, step_generator(0, 0), windows, vocab_size))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make_model(task, vocab_size, {**size, "dropout": 0.0}, unit)
        if task == "masked":  # a selection by value has no size on `meta`
            model.cls(model.bert(input_ids=inputs).last_hidden_state[:, : hidden_count(n_ctx)])
        else:
            KINDS[task].logits(model, inputs, targets)
    return round(3 * counter.get_total_flops() / n_ctx)


def flops(trial: Trial, model: Any) -> int:
    """Return training FLOPs per token of a trial's model."""
    vocab_size = read_meta(trial.corpus)["vocab_size"]
    return training_flops_per_token(trial.task, vocab_size, trial.model, trial.unit)


def check(trial: Trial) -> None:
    """Raise ValueError if no model can have the trial's sizes or unit."""
    with torch.device("meta"):
        make_model(trial.task, 1, trial.model, trial.unit)


TASK = Task(
    build=build, batches=batches, loss=loss, held=held, evaluate=evaluate, mean=mean_loss, flops=flops, check=check
)
TASKS = dict.fromkeys(KINDS, TASK)
