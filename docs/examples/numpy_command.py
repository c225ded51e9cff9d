"""A script of its own in numpy, run by a command: `pagating sweep docs/examples/numpy_command.yaml`.

Linear regression by gradient descent with momentum. The lines that print METRIC are what the study adds: any language
can print them.
"""

import argparse

import numpy as np

FEATURES = 30
parser = argparse.ArgumentParser()
for name, kind in (("lr", float), ("beta", float), ("seed", int), ("steps", int), ("test", int)):
    parser.add_argument(f"--{name}", type=kind, default=0)
given = parser.parse_args()


def examples(rng, count):
    """Return inputs of different sizes, and noisy outputs."""
    x = rng.normal(size=(count, FEATURES)) * np.geomspace(0.1, 1.0, FEATURES)
    return x, x @ np.linspace(3, 1, FEATURES) + 2 * rng.normal(size=count)


def r2(weights, x, y):
    """Return the share of the variance of the outputs that the weights explain."""
    return 1 - float(np.mean((x @ weights - y) ** 2) / np.var(y))


data = np.random.default_rng(0)  # the same examples for all seeds
train, validation, test = examples(data, 2000), examples(data, 2000), examples(data, 2000)
rng = np.random.default_rng(given.seed)  # initial weights and the order of the examples
weights, speed = rng.normal(size=FEATURES), np.zeros(FEATURES)
for step in range(1, given.steps + 1):
    rows = rng.integers(0, 2000, 32)
    x, y = train[0][rows], train[1][rows]
    speed = given.beta * speed + x.T @ (x @ weights - y) / len(y)
    weights = weights - given.lr * speed
    if step % 20 == 0 or step == given.steps:
        print(f"METRIC val_r2={r2(weights, *validation)} step={step}", flush=True)
if given.test:
    print(f"METRIC test_r2={r2(weights, *test)}")
