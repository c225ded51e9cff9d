"""A gate after attention, with Hugging Face's Trainer: `pagating sweep docs/examples/hf_trainer.yaml`.

A tiny GPT-2 learns a made language. The arm multiplies the output of each attention layer by the sigmoid of a linear
map of its input. The lines with `trial` are what the study adds. It needs `pip install accelerate`.
"""

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

WORDS, LENGTH = 16, 32
DRAW = np.random.default_rng(0)
NEXT = DRAW.dirichlet(np.full(WORDS, 0.05), size=(WORDS, WORDS)).cumsum(axis=2)  # of the last two words


def sentences(count):
    """Return rows of tokens in which the last two words choose the next one."""
    rows = DRAW.integers(0, WORDS, (count, LENGTH))
    for i in range(2, LENGTH):
        drawn = DRAW.random((count, 1)) > NEXT[rows[:, i - 2], rows[:, i - 1]]
        rows[:, i] = np.minimum(drawn.sum(1), WORDS - 1)
    return [{"input_ids": row, "labels": row} for row in torch.tensor(rows)]


TRAIN, VALIDATION, TEST = sentences(4000), sentences(200), sentences(400)


class Gated(torch.nn.Module):
    """An attention layer whose output is gated by its input."""

    def __init__(self, attention, width):
        super().__init__()
        self.attention, self.gate = attention, torch.nn.Linear(width, width)

    def forward(self, x, **options):
        """Return the gated output, and what else the layer returns."""
        out, *others = self.attention(x, **options)
        return torch.sigmoid(self.gate(x)) * out, *others


def train(trial):
    """Train one trial: an arm sets `gated`."""
    torch.manual_seed(trial.seed)
    sizes = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **sizes))
    for block in model.transformer.h if trial.gated else ():
        block.attn = Gated(block.attn, 64)
    settings = TrainingArguments(
        str(trial.folder), max_steps=trial.budget, learning_rate=trial.lr, seed=trial.seed, eval_strategy="steps",
        eval_steps=20, per_device_train_batch_size=32, per_device_eval_batch_size=200, save_strategy="no",
        logging_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    report = trial.hf_callback(val_loss="eval_loss")
    trainer = Trainer(model, settings, train_dataset=TRAIN, eval_dataset=VALIDATION, callbacks=[report])
    trainer.train()
    return {"test_loss": trainer.evaluate(TEST, metric_key_prefix="test")["test_loss"]} if trial.test else {}
