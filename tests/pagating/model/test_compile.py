"""Tests of compiled against uncompiled trials, and of the modules that a trial's process imports."""

import json
import os
import subprocess
import sys

import pytest

from pagating.data import prepare
from pagating.gating.catalog import COMPETITORS
from pagating.model.compile import LEAST_FLOPS, is_compiled
from pagating.train import train
from pagating.trial import COMPILE, Trial

GATED = [
    {"alpha": 0.7, "base": "gelu"},
    {"alpha": {"learnable": {"init": 0.3}}},
    {"alpha": {"learnable": {"init": 0.4, "per": "layer", "range": "free"}}, "gate": "tanh"},
    {"alpha": {"learnable": {"per": "channel"}}, "gate": "mish"},
    {"alpha": {"schedule": {"from": 0.2}}, "gate": "gelu"},
    {"alpha": {"token": {"init": 0.4}}, "gate": "relu"},
    {"form": "projected", "alpha": 0.5},
]
MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16, "activation": "gelu_pytorch_tanh"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} apples\n" for i in range(4000)))
    return str(prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 16, base / "cache", base))


def make(packed, **changed):
    settings = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    return Trial(**{**settings, **changed})


def test_whether_a_trial_is_compiled_follows_from_its_specification(packed):
    assert [is_compiled(choice, LEAST_FLOPS, 0.0) for choice in COMPILE] == [True, True, False]
    assert [is_compiled(choice, 0.99 * LEAST_FLOPS, 0.0) for choice in COMPILE] == [False, True, False]
    assert [is_compiled(choice, LEAST_FLOPS, 0.1) for choice in COMPILE] == [False, True, False]
    with pytest.raises(ValueError, match="compile='sometimes' is not one of auto, always, never"):
        make(packed, compile="sometimes")
    assert list(train(make(packed)))[-1]["final"]["compiled"] == 0.0


def test_a_trial_needs_no_transformers(packed, tmp_path):
    code = (
        "import sys\nfrom pagating.train import Trial, train\n"
        f"*_, row = train(Trial(corpus={packed!r}, model={MODEL!r}, lr=3e-3, tokens=128, batch_tokens=64, seed=5,"
        " unit={'alpha': 0.5}, test=True))\n"
        "assert row['final']['steps'] == 2\n"
        "print([name for name in ('transformers', 'pandas') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


RUN = """
import json, sys
import torch._dynamo
from pagating.train import Trial, train
spec, units, choices = json.loads(sys.argv[1])
def losses(unit, choice):
    rows = list(train(Trial(**spec, unit=unit, compile=choice)))
    assert rows[-1]["final"]["compiled"] == float(sys.argv[2] == "works" and choice == "always")
    return [[r["val_nll"], r["train_nll"], r["grad_norm"], r["alpha"]] for r in rows]
result, graphs = [], []
for unit in units:
    result.append([losses(unit, choice) for choice in choices])
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
print(json.dumps([result, graphs]))
"""


def run_apart(packed, cache, units, choices, expect="works", **environment):
    """Return losses of each unit and choice, and the number of graphs after each unit, from a new process."""
    spec = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", RUN, json.dumps([spec, units, choices]), expect]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_compiled_trials_agree_with_uncompiled_ones_and_share_graphs(packed, tmp_path):
    """Compare every loss of 12 float32 steps, tolerance 1e-5 relative."""
    units = [None, {"alpha": 0.0, "base": "stock"}, {"alpha": 0.3}, {"alpha": 0.6}, {"alpha": 1.7}, {"alpha": 0.0}]
    found, graphs, _ = run_apart(packed, tmp_path / "c", units, ["never", "always"])
    for eager, compiled in found:
        for one, other in zip(eager, compiled, strict=True):
            assert other[:3] == pytest.approx(one[:3], rel=1e-5)
            assert other[3] == one[3]
    assert found[0] == found[1]  # a gate at 0 is the stock model, bit for bit, also when compiled
    assert found[2] != found[3]
    assert graphs[2] == graphs[3] == graphs[4]  # one graph for every value of alpha
    again, _, _ = run_apart(packed, tmp_path / "c", list(reversed(units)), ["always"])  # cached, in another order
    assert [row[0] for row in reversed(again)] == [row[1] for row in found]
    fresh, _, _ = run_apart(packed, tmp_path / "d", units[2:3], ["always"])
    assert fresh[0][0] == found[2][1]


@pytest.mark.slow
def test_every_arm_compiles_and_agrees(packed, tmp_path):
    units = [None, *GATED, *({"unit": name} for name in COMPETITORS)]
    found, _, _ = run_apart(packed, tmp_path, units, ["never", "always"])
    for unit, (eager, compiled) in zip(units, found, strict=True):
        for one, other in zip(eager, compiled, strict=True):
            assert other[:3] == pytest.approx(one[:3], rel=1e-4), unit


@pytest.mark.slow
def test_without_a_compiler_a_trial_runs_uncompiled_and_says_so_in_one_line(packed, tmp_path):
    nothing = str(tmp_path / "nothing")
    found, _, err = run_apart(packed, tmp_path, [{"alpha": 0.3}], ["never", "always"], "fails", CXX=nothing)
    eager, fallen_back = found[0]
    assert fallen_back == eager
    assert err.count("\n") == 1
    assert err.startswith("pagating: torch.compile does not work here (")
    assert err.endswith("); the trial runs uncompiled\n")
