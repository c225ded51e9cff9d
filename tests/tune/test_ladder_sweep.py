"""A ladder through the command: one sweep, a kill on an upper rung, and the same study after it."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from tune.run import ledger

LADDER = """
question: Does a gate last as the model grows?
tokenizer: {vocab_size: 300}
model: {n_head: 2, n_ctx: 32, initializer_range: 0.06}
fixed: {eval_windows: 8}
nuisance: {lr: {loguniform: [2.0e-3, 2.0e-2]}}
scales:
  - {d_model: 8, n_layer: 1, batch_tokens: 512, tokens_per_parameter: 5}
  - {d_model: 16, n_layer: 1, batch_tokens: 512, tokens_per_parameter: 5}
  - {d_model: 16, n_layer: 2, batch_tokens: 512, tokens_per_parameter: 5}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
search: {trials_per_arm: 2}
calibrate: {seeds: 1, max_points: 3}
confirm: {seeds: 3}
"""


def command(place, output, *words):
    environment = {**os.environ, "PAGATING_CACHE": str(place / "cache")}
    words = [sys.executable, "-m", "tune.cli", "sweep", "climb.yaml", "--output", output, "--tracking", "none", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=place, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
def test_a_ladder_that_is_killed_on_its_second_rung_ends_as_one_that_is_not(tmp_path):
    (tmp_path / "climb.yaml").write_text(LADDER)
    whole = command(tmp_path, "whole")
    said, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, said
    cut, book = command(tmp_path, "cut"), tmp_path / "cut" / "climb" / "ledger.jsonl"
    until = time.monotonic() + 300
    while not (book.exists() and any(event.get("rung") == 2 for event in ledger.read(book))):
        assert time.monotonic() < until
        assert cut.poll() is None
        time.sleep(0.05)
    cut.send_signal(signal.SIGKILL)
    cut.communicate(timeout=60)
    kept = {event["cell"] for event in ledger.read(book) if event["event"] == "ended"}
    again = command(tmp_path, "cut")
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    ended = [event["cell"] for event in ledger.read(book) if event["event"] == "ended"]
    assert len(ended) == len(set(ended))  # none doubled
    assert kept < set(ended)
    columns = ["rung", "stage", "arm", "seed", "config_key", "outcome", "val_nll", "test_nll"]
    tables = [pd.read_parquet(tmp_path / name / "climb" / "trials.parquet") for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*(t[columns].sort_values(columns[:5], ignore_index=True) for t in tables))
    assert set(tables[0]["rung"]) == {1, 2, 3}
    assert "rung 3 confirm gelu" in said
