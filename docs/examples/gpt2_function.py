"""GPT-2 of this project as a function of your own: `pagating sweep docs/examples/gpt2_function.yaml`.

It trains the same bits as a built-in study of these sizes. Start here to change what no study file can say.
"""

import os
import tempfile
from pathlib import Path

from pagating.data.prepare import prepare
from pagating.train import train as rows_of
from pagating.trial import Diverged, Trial

MODEL = {
    "n_layer": 1,
    "d_model": 32,
    "n_head": 2,
    "n_ctx": 32,
    "activation": "gelu_pytorch_tanh",  # as in a built-in study; `gelu_new` is the same function, rounded otherwise
    "initializer_range": 0.06,
}
CACHE = Path(os.environ.get("PAGATING_CACHE") or Path(tempfile.gettempdir()) / "pagating-cache")  # of the packed text


def train(trial):
    """Train GPT-2 with the activation of an arm; report its loss in nats per token."""
    corpus = prepare({"source": "builtin"}, {"vocab_size": 300}, MODEL["n_ctx"], CACHE)
    unit = {"gate": trial.gate, "alpha": trial.alpha} if trial.gate else None
    settings = Trial(
        corpus=str(corpus),
        model=MODEL,
        lr=trial.lr,
        tokens=trial.budget,
        batch_tokens=512,
        seed=trial.seed,
        unit=unit,
        eval_windows=32,
        test=trial.test,
    )
    try:
        for row in rows_of(settings):
            trial.report(row["tokens"], val_loss=row["val_nll"])
    except Diverged as error:
        raise trial.Infeasible(str(error)) from error
    return {"test_loss": row["final"]["test_nll"]} if trial.test else {}
