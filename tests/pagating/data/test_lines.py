"""Tests of padded rows of one line each: counts by hand, and training against cross-entropy written out."""

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch.nn import functional as F

from pagating.data import corpus, lines, prepare
from pagating.data.errors import CorpusError
from pagating.data.prepare import file_names, receive
from pagating.train import build_model, train
from pagating.trial import Trial

torch.set_num_threads(1)
BYTES = {"vocab_size": 256}  # one token per byte, so that tokens can be counted by hand
MODEL = {"n_layer": 1, "d_model": 16, "n_head": 2, "n_ctx": 8}


@pytest.fixture(scope="module")
def byte_tokenizer():
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["a"], vocab_size=256, show_progress=False)
    return Tokenizer.from_str(made.to_str())


@pytest.fixture(scope="module")
def of_lines(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 97}\n\n{i} apples and pears\n" for i in range(400)))
    (base / "valid.txt").write_text("ab\n\nabcdefghij\n \nabc\n" * 5)
    source = {"files": {"train": "train.txt", "validation": "valid.txt"}, "rows": "lines"}
    return prepare.prepare(source, BYTES, 8, base / "cache", base)


def make(folder, **changed):
    settings = {"corpus": str(folder), "model": MODEL, "lr": 3e-3, "tokens": 64, "batch_tokens": 64, "seed": 5}
    return Trial(**{**settings, "padding": "counted", "eval_every": 1, **changed})


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_line_with_its_end_and_a_blank_one_is_empty(byte_tokenizer):
    text = "ab\n\n \t\ncd ef\r\nend"
    tokens, spans = lines.encode_lines(byte_tokenizer, text)
    assert byte_tokenizer.decode(tokens.tolist()) == text
    assert [byte_tokenizer.decode(tokens[a:b].tolist()) for a, b in spans] == ["ab\n", "", "", "cd ef\r\n", "end"]
    assert (tokens.dtype, spans.dtype) == (np.uint16, np.int64)


def test_lines_are_handed_to_the_tokenizer_in_parts_without_a_seam(byte_tokenizer, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(50))
    whole = lines.encode_lines(byte_tokenizer, text)
    monkeypatch.setattr(lines, "AT_A_TIME", 7)
    parts = lines.encode_lines(byte_tokenizer, text)
    assert all(np.array_equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_rows_are_cut_and_padded_and_the_share_of_padding_is_that_counted_by_hand(byte_tokenizer):
    tokens, spans = lines.encode_lines(byte_tokenizer, "ab\n\nabcdefghij\n")
    held = lines.Lines(tokens, spans, pad=7)
    rows, lengths = lines.padded_rows(held, np.array([0, 1, 2]), 8)
    a = byte_tokenizer.token_to_id("a")
    ends = byte_tokenizer.encode("\n").ids
    assert rows.tolist() == [[a, a + 1, *ends, 7, 7, 7, 7, 7], [7] * 8, list(range(a, a + 8))]
    assert lengths.tolist() == [3, 0, 8]
    assert lines.targets_of(rows, lengths, "counted").tolist() == rows[:, 1:].tolist()
    x = lines.IGNORE
    wanted = [[a + 1, *ends, x, x, x, x, x], [x] * 7, list(range(a + 1, a + 8))]
    assert lines.targets_of(rows, lengths, "masked").tolist() == wanted


def test_rows_of_a_step_depend_on_seed_and_step_alone_and_reach_every_line(of_lines):
    held = lines.open_lines(of_lines, "train")
    batch = [lines.line_batch(held, 3, step, 16, 8)[0] for step in range(200)]
    assert torch.equal(batch[7], lines.line_batch(held, 3, 7, 16, 8)[0])
    assert not torch.equal(batch[7], lines.line_batch(held, 4, 7, 16, 8)[0])
    blank = torch.cat(batch).eq(held.pad).all(1).double().mean().item()
    rows = held.spans_R2[:, 1] - held.spans_R2[:, 0]
    assert blank == pytest.approx((rows == 0).mean(), abs=0.05)  # 3,200 draws: 0.05 is six standard errors
    assert len(held.worded().spans_R2) == (rows >= 2).sum()


def test_a_text_of_blank_lines_has_nothing_to_learn_without_its_padding():
    empty = lines.Lines(np.zeros(4, np.uint16), np.zeros((4, 2), np.int64), 0)
    with pytest.raises(CorpusError, match="none of the 4 lines has two tokens"):
        empty.worded()


# --- the corpus ------------------------------------------------------------------------------------------------------


def test_a_corpus_of_lines_is_another_than_the_packed_one_and_its_index_is_checked(of_lines, tmp_path):
    meta = corpus.read_meta(of_lines)
    assert (meta["splits"]["validation"]["rows"], meta["pad"]) == (25, 0)
    assert len(file_names(of_lines)) == 8
    assert prepare.fault(of_lines) is None
    copy = tmp_path / of_lines.name
    receive(copy, meta["digest"], lambda: {name: [(of_lines / name).read_bytes()] for name in file_names(of_lines)})
    assert prepare.fault(copy) is None
    raw = (copy / "train.rows").read_bytes()
    (copy / "train.rows").write_bytes(bytes(8) + raw[8:-1] + b"\1")
    assert prepare.fault(copy) == "train.rows is damaged (its checksum does not match)"
    (tmp_path / "text.txt").write_text("ab\n\nabcdefghij\n" * 60)
    given = {"files": {"train": "text.txt"}}
    packed = prepare.prepare(given, BYTES, 8, tmp_path / "cache", tmp_path)
    assert prepare.prepare({**given, "rows": "packed"}, BYTES, 8, tmp_path / "cache", tmp_path) == packed
    assert prepare.prepare({**given, "rows": "lines"}, BYTES, 8, tmp_path / "cache", tmp_path) != packed
    with pytest.raises(CorpusError, match=r"is packed, not a corpus of lines; give the study corpus: \{rows: lines"):
        lines.open_lines(packed, "train")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 16])
@pytest.mark.parametrize("padding", ["counted", "masked"])
def test_the_training_loss_is_cross_entropy_over_what_is_counted(of_lines, padding, micro):
    trial = make(of_lines, padding=padding, micro_batch_tokens=micro)
    held = lines.open_lines(of_lines, "train")
    rows, lengths = lines.line_batch(held if padding == "counted" else held.worded(), 5, 0, 8, 8)
    logits = build_model(trial)(input_ids=rows[:, :-1]).logits
    targets = rows[:, 1:].clone()
    if padding == "masked":
        for row, length in zip(targets, lengths.tolist(), strict=True):
            row[max(0, length - 1) :] = -100
        assert (targets == -100).any()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    (found,) = train(trial)
    assert found["train_nll"] == pytest.approx(expected.item(), rel=1e-5)


def test_each_evaluation_has_the_loss_with_the_padding_counted_beside_the_one_that_decides(of_lines):
    trial = make(of_lines, tokens=192, lr=1e-9, eval_windows=1000)
    rows = list(train(trial))
    model = build_model(trial)
    tokens = corpus.open_split(of_lines, "validation").tolist()[
        :21
    ]  # ab, -, abcdefghij, blank, abc: 3 + 1 + 11 + 2 + 4
    by_hand = [tokens[:3], [], tokens[4:12], [], tokens[17:]] * 5
    table = torch.tensor([row + [0] * (8 - len(row)) for row in by_hand])
    with torch.no_grad():
        wanted = F.cross_entropy(model(input_ids=table[:, :-1]).logits.flatten(0, 1), table[:, 1:].flatten()).item()
    assert rows[0]["padded_nll"] == pytest.approx(wanted, rel=1e-5)
    assert rows[0]["padded_nll"] != pytest.approx(rows[0]["val_nll"], rel=1e-3)
    final = rows[-1]["final"]
    assert "padded_nll" not in final
    tested = list(train(make(of_lines, test=True)))[-1]
    assert tested["final"]["padded_nll"] == tested["padded_nll"]


def test_a_padding_that_is_none_and_lines_of_a_packed_corpus_are_refused(of_lines):
    with pytest.raises(ValueError, match="padding='left' is not one of counted, masked"):
        make(of_lines, padding="left")
    with pytest.raises(ValueError, match="task='denoise' is not one of causal, masked, span"):
        make(of_lines, padding=None, task="denoise")
    with pytest.raises(ValueError, match="task='span' takes packed windows"):
        make(of_lines, task="span")
