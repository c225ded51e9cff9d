"""A training of your own in a study: `pagating sweep docs/examples/own_training.yaml`, about half a minute on 2 cores.

Logistic regression in numpy, by plain gradient descent or with momentum. The test data is used only if the trial says
so, after the last step.
"""

import numpy as np

FEATURES, STEPS_BETWEEN_REPORTS = 30, 20


def examples(rng, count, weights):
    """Return inputs and noisy labels."""
    x = rng.normal(size=(count, FEATURES)) * np.geomspace(0.1, 1.0, FEATURES)
    return x, (rng.random(count) < 1 / (1 + np.exp(-x @ weights))).astype(float)


def loss(weights, x, y):
    """Return the mean cross-entropy in nats."""
    z = x @ weights
    return float(np.mean(np.logaddexp(0.0, z) - y * z))


def train(trial):
    """Train one trial: `trial.lr` is tuned, `trial.optimizer` is what an arm sets, `trial.beta` what it searches."""
    truth = np.linspace(-3, 3, FEATURES)
    data, batches = trial.rng("data"), trial.rng("batches")
    (x, y), validation, test = examples(data, 500, truth), examples(data, 2000, truth), examples(data, 2000, truth)
    weights, speed = trial.rng("init").normal(size=FEATURES), np.zeros(FEATURES)
    beta = trial.beta if trial.optimizer == "momentum" else 0.0
    for step in range(1, trial.budget + 1):
        rows = batches.integers(0, len(y), 32)
        gradient = x[rows].T @ (1 / (1 + np.exp(-x[rows] @ weights)) - y[rows]) / len(rows)
        speed = beta * speed + gradient
        weights = weights - trial.lr * speed
        if step % STEPS_BETWEEN_REPORTS == 0 or step == trial.budget:
            trial.report(step, val_loss=loss(weights, *validation))
    return {"test_loss": loss(weights, *test)} if trial.test else {}
