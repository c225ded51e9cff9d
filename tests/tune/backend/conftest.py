"""A packed corpus for the tests of backends."""

import pytest

from pagating.data import prepare


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} the quick brown fox\n" for i in range(2000)))
    return prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 16, base / "cache", base)
