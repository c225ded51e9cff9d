"""Tests of the evaluation loss and of the published computation of it."""

import json
import math
from pathlib import Path

import pytest
import torch

from pagating.data import prepare
from pagating.evaluate import mean_nll, pad_rows, text_rows
from pagating.train import train
from pagating.trial import Trial


class Fixed(torch.nn.Module):
    """A model whose logits at each position are given."""

    def __init__(self, logits_TV):
        super().__init__()
        self.logits_TV = torch.tensor(logits_TV)

    def forward(self, input_ids):
        self.seen = input_ids
        return type("Output", (), {"logits": self.logits_TV[: input_ids.shape[1]].expand(len(input_ids), -1, -1)})


def test_the_loss_of_padded_rows_counts_the_padding_as_the_published_figures_do():
    cases = json.loads((Path(__file__).parents[1] / "known_answers.json").read_text())["cases"]
    known = next(case for case in cases if case["id"] == "padding_mask")
    labels, pads = known["inputs"]["labels"], known["inputs"]["pad_positions"]
    model, pad = Fixed(known["inputs"]["logits"]), labels[pads[0]]
    row = [0, *labels[: pads[0]]]  # the first token is given, not predicted
    padded = pad_rows([row], len(labels) + 1, pad)
    assert mean_nll(model, padded, 1) == pytest.approx(known["expected"]["unmasked"], abs=1e-6)
    assert model.seen.tolist() == [[0, *labels[:-1]]]
    assert mean_nll(model, torch.tensor([row]), 1) == pytest.approx(known["expected"]["masked"], abs=1e-6)


def test_rows_are_cut_and_padded_on_the_right():
    assert pad_rows([[1, 2, 3, 4], [5], []], 3, 9).tolist() == [[1, 2, 3], [5, 9, 9], [9, 9, 9]]
    with pytest.raises(ValueError, match="pad_rows: no rows"):
        pad_rows([], 3, 9)


MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16, "activation": "gelu_pytorch_tanh"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} apples\n" for i in range(4000)))
    (base / "validation.txt").write_text("".join(f"line {i}\n\n" for i in range(100)))
    files = {"train": "train.txt", "validation": "validation.txt"}
    return str(prepare.prepare({"files": files}, {"vocab_size": 280}, 16, base / "cache", base))


def make(packed, **changed):
    settings = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    return Trial(**{**settings, **changed})


def test_rows_of_a_packed_corpus_are_its_lines(packed):
    from tokenizers import Tokenizer

    rows, pad = text_rows(packed, "validation", 1000)
    tokenizer = Tokenizer.from_file(str(Path(packed) / "tokenizer.json"))
    assert [tokenizer.decode(row) for row in rows] == [text for i in range(100) for text in (f"line {i}", "")]
    assert pad == 0
    few, _ = text_rows(packed, "validation", 3)
    assert few == [rows[0], rows[100], rows[199]]


def test_a_confirm_trial_reports_the_padded_loss_beside_its_own(packed):
    final = list(train(make(packed, test=True)))[-1]["final"]
    assert math.isfinite(final["padded_nll"])
    assert final["padded_nll"] != final["val_nll"]
    assert "padded_nll" not in list(train(make(packed)))[-1]["final"]
