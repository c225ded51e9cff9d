"""Shared fixture: a small packed corpus."""

import pytest
import torch

from pagating.data import prepare

WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them\n"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Pack 2,000 numbered lines, vocabulary 280, for windows of 16 tokens."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} {WORDS}" for i in range(2000)))
    return str(prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 16, base / "cache", base))
