"""Three optimisers of torch on a small network: `pagating sweep docs/examples/torch_optimizers.yaml`.

A seed draws the initial weights and the order of the data. The lines with `trial` are what the study adds. `trial.lr`
is a rate of AdamW; the others get it times a usual ratio, so that one search range fits all. Muon needs torch 2.9.
"""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

DRAW = np.random.default_rng(0)  # the data is the same for all seeds: a random network of one hidden layer labels it
INPUTS = DRAW.normal(size=(4000, 32))
LABELS = np.argmax(np.maximum(INPUTS @ DRAW.normal(size=(32, 16)), 0) @ DRAW.normal(size=(16, 8)), axis=1)
INPUTS, LABELS = torch.tensor(INPUTS, dtype=torch.float32), torch.tensor(LABELS)
TRAIN, VALIDATION, TEST = torch.arange(4000).split([2000, 1000, 1000])


def optimizers(name, model, lr):
    """Return the optimisers of the weight matrices and of everything else."""
    hidden = [layer.weight for layer in model[1:] if isinstance(layer, torch.nn.Linear)]
    rest = [each for each in model.parameters() if all(each is not weight for weight in hidden)]
    if name == "muon":
        return [torch.optim.Muon(hidden, lr=10 * lr, weight_decay=0.0), torch.optim.AdamW(rest, lr=lr)]
    if name == "sgd":
        return [torch.optim.SGD(model.parameters(), lr=30 * lr, momentum=0.9)]
    return [torch.optim.AdamW(model.parameters(), lr=lr)]


@torch.no_grad()
def loss(model, rows):
    """Return the mean cross-entropy in nats."""
    return float(cross_entropy(model(INPUTS[rows]), LABELS[rows]))


def train(trial):
    """Train one trial: an arm sets `optimizer`."""
    torch.manual_seed(trial.seed)
    first, second, last = (torch.nn.Linear(*sizes) for sizes in ((32, 128), (128, 128), (128, 8)))
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)
    chosen, batches = optimizers(trial.optimizer, model, trial.lr), trial.rng("batches")
    for step in range(1, trial.budget + 1):
        rows = TRAIN[batches.integers(0, len(TRAIN), 64)]
        cross_entropy(model(INPUTS[rows]), LABELS[rows]).backward()
        for each in chosen:
            each.step()
            each.zero_grad()
        if step % 20 == 0 or step == trial.budget:
            trial.report(step, val_loss=loss(model, VALIDATION))
    return {"test_loss": loss(model, TEST)} if trial.test else {}
