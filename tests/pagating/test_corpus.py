import hashlib
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pagating import corpus
from pagating.corpus import CorpusError

WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them\n"
TOKENIZER = {"vocab_size": 300}


@pytest.fixture(scope="module")
def builtin():
    return corpus.builtin_texts()


@pytest.fixture
def text_files(tmp_path):
    for split, count in (("train", 200), ("valid", 30), ("test", 30)):
        (tmp_path / f"{split}.txt").write_text("".join(f"{i} {WORDS}" for i in range(count)))
    return tmp_path


def test_builtin_corpus_is_the_king_james_bible_split_by_whole_chapters(builtin):
    assert builtin["train"].startswith("In the beginning God created the heaven and the earth.")
    # chapters 10 (index 9) and 20 (index 19) of Genesis open the other two splits
    assert builtin["validation"].startswith("Now these [are] the generations of the sons of Noah")
    assert builtin["test"].startswith("And Abraham journeyed from thence toward the south country")
    sizes = {split: len(text) for split, text in builtin.items()}
    assert sum(sizes.values()) == pytest.approx(4.18e6, rel=0.01)
    assert sizes["validation"] / sum(sizes.values()) == pytest.approx(0.05, abs=0.005)
    assert sizes["test"] / sum(sizes.values()) == pytest.approx(0.05, abs=0.005)


def test_no_chapter_stands_in_two_splits(builtin):
    chapters = [set(text.strip().split("\n\n")) for text in builtin.values()]
    shared = (chapters[0] & chapters[1]) | (chapters[0] & chapters[2]) | (chapters[1] & chapters[2])
    assert not {chapter for chapter in shared if len(chapter) > 300}


def test_packed_tokens_give_the_text_back(text_files, tmp_path):
    files = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    folder = corpus.prepare({"files": files}, TOKENIZER, 16, tmp_path / "cache", text_files)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = corpus.read_meta(folder)
    for split, name in files.items():
        tokens = corpus.open_split(folder, split)
        assert tokenizer.decode(tokens.tolist()) == (text_files / name).read_text()
        assert meta["splits"][split]["tokens"] == len(tokens)
        assert meta["splits"][split]["bytes"] == (text_files / name).stat().st_size
    assert meta["vocab_size"] <= 300
    assert meta["dtype"] == "uint16"


def test_chunks_join_to_the_text_and_end_at_line_ends(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 100)
    text = WORDS * 20 + "no line end"
    pieces = list(corpus._chunks(text))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_second_preparation_reads_the_cache_and_a_damaged_one_is_made_again(text_files, tmp_path, monkeypatch):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)
    folder = corpus.prepare(*arguments)
    before = (folder / "train.bin").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(corpus, "make_tokenizer", lambda *a: pytest.fail("tokenized again"))
        assert corpus.prepare(*arguments) == folder
    (folder / "train.bin").write_bytes(before[:-2] + b"\1\0")
    assert corpus.prepare(*arguments) == folder
    assert (folder / "train.bin").read_bytes() == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_another_text_or_vocabulary_is_another_folder(text_files, tmp_path):
    source, cache = {"files": {"train": "train.txt"}}, tmp_path / "cache"
    first = corpus.prepare(source, TOKENIZER, 16, cache, text_files)
    assert corpus.prepare(source, {"vocab_size": 310}, 16, cache, text_files) != first
    (text_files / "train.txt").write_text((text_files / "train.txt").read_text() + "one more line\n")
    assert corpus.prepare(source, TOKENIZER, 16, cache, text_files) != first


def test_missing_splits_are_cut_from_the_end_between_paragraphs():
    train = "\n\n".join(f"paragraph {i} {WORDS}" for i in range(100))
    cut = corpus.cut_missing({"train": train}, {"validation": 0.1, "test": 0.2})
    assert cut["train"] + cut["validation"] + cut["test"] == train
    assert cut["validation"].startswith("paragraph")
    assert cut["test"].startswith("paragraph")
    assert len(cut["test"]) / len(train) == pytest.approx(0.2, abs=0.02)
    assert len(cut["validation"]) / len(train) == pytest.approx(0.1, abs=0.02)


def test_given_splits_are_not_cut():
    texts = {"train": WORDS * 50, "validation": "v\n", "test": "t\n"}
    assert corpus.cut_missing(texts) == texts


def test_hub_layout_on_disk_goes_through_the_same_door(tmp_path):
    rows = [" = Title = \n", "", "a line without an end", WORDS]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    texts = corpus.load_texts({"hub": {"name": str(tmp_path)}})
    assert texts["train"] == " = Title = \n" + "a line without an end\n" + WORDS
    with pytest.raises(CorpusError, match="no column 'body'; it has text"):
        corpus.load_texts({"hub": {"name": str(tmp_path), "column": "body"}})


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(CorpusError, match=r"^hub dataset 'no-such/dataset' \(x\) cannot be loaded: [^\n]+$"):
        corpus.hub_texts("no-such/dataset", "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"abc\0def", "is binary, not text .a NUL byte at offset 3"),
        (b"abc\xff\n", "is not UTF-8 text .byte 0xff at offset 3"),
    ],
)
def test_unusable_files_say_what_is_wrong(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        corpus.read_text(tmp_path / "bad.txt")


def test_missing_files_name_the_pattern(tmp_path):
    with pytest.raises(CorpusError, match=r"corpus files for 'train': no file matches 'nothing\*\.txt'"):
        corpus.files_texts(tmp_path, train="nothing*.txt")


def test_globs_join_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    assert corpus.files_texts(tmp_path, train="*.txt") == {"train": "a.txtb.txtc.txt"}


def test_a_split_shorter_than_a_window_is_refused(text_files, tmp_path):
    with pytest.raises(CorpusError, match=r"the validation split has \d+ tokens; one window needs n_ctx \+ 1 = 4097"):
        corpus.prepare(
            {"files": {"train": "train.txt", "validation": "valid.txt"}}, TOKENIZER, 4096, tmp_path / "c", text_files
        )


def test_a_pretrained_tokenizer_that_is_nowhere_says_what_to_do(tmp_path):
    with pytest.raises(CorpusError, match=r"download tokenizer\.json"):
        corpus.make_tokenizer({"path": str(tmp_path / "nothing")}, "")


def test_a_pretrained_tokenizer_folder_is_used_as_it_stands(text_files, tmp_path):
    from transformers import PreTrainedTokenizerFast

    trained = corpus.make_tokenizer({"vocab_size": 280}, (text_files / "train.txt").read_text())
    PreTrainedTokenizerFast(tokenizer_object=trained).save_pretrained(tmp_path / "tokenizer")
    loaded = corpus.make_tokenizer({"path": "tokenizer"}, "", tmp_path)
    assert loaded.encode(WORDS).ids == trained.encode(WORDS).ids


def test_batches_are_a_pure_function_of_seed_and_step():
    tokens = np.arange(1000, dtype=np.uint16)
    first = corpus.train_batch(tokens, 7, 3, 4, 8)
    assert torch.equal(first, corpus.train_batch(tokens, 7, 3, 4, 8))
    assert not torch.equal(first, corpus.train_batch(tokens, 7, 4, 4, 8))
    assert not torch.equal(first, corpus.train_batch(tokens, 8, 3, 4, 8))
    assert first.shape == (4, 9)
    assert torch.equal(first - first[:, :1], torch.arange(9).expand(4, 9))  # each row is a run of consecutive tokens
    # numpy's Philox with this key and counter, drawn here directly
    expected = np.random.Generator(np.random.Philox(key=7, counter=[0, 0, 0, 3])).integers(0, 992, size=4)
    assert first[:, 0].tolist() == expected.tolist()


def test_batches_reach_both_ends_of_the_split():
    tokens = np.arange(12, dtype=np.uint16)
    starts = {int(s) for step in range(200) for s in corpus.train_batch(tokens, 1, step, 4, 8)[:, 0]}
    assert starts == {0, 1, 2, 3}  # 12 tokens hold windows of 9 at 0 .. 3


def test_evaluation_windows_do_not_overlap_and_are_spread_evenly():
    tokens = np.arange(1001, dtype=np.uint16)
    windows = corpus.eval_windows(tokens, 10, 1000)
    assert windows.shape == (100, 11)
    targets = windows[:, 1:].flatten().tolist()
    assert targets == list(range(1, 1001))  # every token after the first is predicted once
    few = corpus.eval_windows(tokens, 10, 4)
    assert few[:, 0].tolist() == [0, 330, 660, 990]


def test_large_vocabularies_take_four_bytes(monkeypatch):
    class Wide:
        def get_vocab_size(self):
            return 70_000

        def encode_batch_fast(self, texts, add_special_tokens):
            return [type("E", (), {"ids": [69_999]})() for _ in texts]

    assert corpus.encode(Wide(), "x").tolist() == [69_999]
    assert corpus.encode(Wide(), "x").dtype == np.uint32


def test_digest_tells_parts_apart():
    assert corpus._digest("ab", "c") != corpus._digest("a", "bc")
    assert corpus._digest("a") == hashlib.sha256((1).to_bytes(8, "little") + b"a").hexdigest()
