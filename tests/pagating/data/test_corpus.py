import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pagating.data import corpus, prepare, texts
from pagating.data.errors import CorpusError
from pagating.data.tokenizer import chunks, encode, make_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them\n"
TOKENIZER = {"vocab_size": 300}


@pytest.fixture(scope="module")
def builtin():
    return texts.builtin_texts()


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
    folder = prepare.prepare({"files": files}, TOKENIZER, 16, tmp_path / "cache", text_files)
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
    monkeypatch.setattr("pagating.data.tokenizer.CHUNK", 100)
    text = WORDS * 20 + "no line end"
    pieces = list(chunks(text))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_second_preparation_reads_the_cache_and_a_damaged_one_is_made_again(text_files, tmp_path, monkeypatch):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)
    folder = prepare.prepare(*arguments)
    before = (folder / "train.bin").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "make_tokenizer", lambda *a: pytest.fail("tokenized again"))
        assert prepare.prepare(*arguments) == folder
    (folder / "train.bin").write_bytes(before[:-2] + b"\1\0")
    assert prepare.prepare(*arguments) == folder
    assert (folder / "train.bin").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", folder.name]


def sizes_kept(raw):
    yield "a bit", raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
    yield "the first bit", bytes([raw[0] ^ 128]) + raw[1:]
    yield "zeros", bytes(len(raw))


def other_sizes(raw):
    yield "cut off", raw[: len(raw) // 2]
    yield "empty", b""
    yield "longer", raw + b"\0\0"


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "test.bin", "tokenizer.json", "corpus.json", "none"])
def test_a_cache_damaged_in_any_way_is_found_and_made_again_with_one_line(text_files, tmp_path, capsys, name):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)
    folder = prepare.prepare(*arguments)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    if name == "none":
        assert prepare.fault(folder) is None
        return
    for kind, damaged in [*sizes_kept(whole[name]), *other_sizes(whole[name]), ("missing", None)]:
        (folder / name).unlink()
        if damaged is not None:
            (folder / name).write_bytes(damaged)
        assert prepare.fault(folder), kind
        assert prepare.prepare(*arguments) == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole, kind
        assert prepare.fault(folder) is None
        line = capsys.readouterr().err
        assert line.startswith(f"pagating: {folder}: "), kind
        assert line.endswith("; it is packed again\n")
        assert line.count("\n") == 1


def test_a_trial_refuses_a_split_of_another_size_and_a_damaged_description(text_files, tmp_path):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)
    folder = prepare.prepare(*arguments)
    raw = (folder / "test.bin").read_bytes()
    (folder / "test.bin").write_bytes(raw[:-2])
    with pytest.raises(CorpusError, match=rf"test\.bin: has {len(raw) - 2} bytes, not {len(raw)}: it is cut off"):
        corpus.open_split(folder, "test")
    text = (folder / "corpus.json").read_text()
    for damaged in (text.replace("uint16", "uint32"), text[:-5], "", "[]", "\0"):
        (folder / "corpus.json").write_text(damaged)
        with pytest.raises(CorpusError, match=r"corpus\.json is damaged \(its digest does not match\)"):
            corpus.read_meta(folder)


def test_a_cache_of_another_version_is_made_again(text_files, tmp_path, monkeypatch):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)
    folder = prepare.prepare(*arguments)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "FORMAT", 99)
        assert prepare.fault(folder) == "format 2 is not 99"
        assert prepare.prepare(*arguments) != folder
    meta = json.loads((folder / "corpus.json").read_text())
    old = {name: value for name, value in meta.items() if name not in ("tokenizer", "digest")} | {"format": 1}
    (folder / "corpus.json").write_text(json.dumps({**old, "digest": corpus.meta_digest(old)}))
    assert prepare.fault(folder) == "format 1 is not 2"


def test_tokens_that_are_mapped_stay_when_their_folder_goes_or_is_made_again(text_files, tmp_path):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)
    folder = prepare.prepare(*arguments)
    mapped = corpus.open_split(folder, "train")
    before = mapped.tolist()
    (folder / "tokenizer.json").write_text("damaged")
    prepare.prepare(*arguments)
    assert mapped.tolist() == before
    shutil.rmtree(folder)
    assert mapped.tolist() == before
    with pytest.raises(FileNotFoundError, match=r"corpus\.json"):
        corpus.open_split(folder, "train")


def test_what_a_killed_process_left_half_written_is_cleared_away(text_files, tmp_path):
    left = tmp_path / "cache" / ".corpus-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "train.bin").write_bytes(b"half")
    folder = prepare.prepare({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)
    assert not left.exists()
    os.umask(mask := os.umask(0))
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


PREPARE = """
import sys
from pathlib import Path
from pagating.data import prepare
whole = prepare.make_tokenizer
prepare.make_tokenizer = lambda *given: print("packed") or whole(*given)
base = Path(sys.argv[1])
print(prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 300}, 16, base / "cache", base))
"""


@pytest.mark.slow
def test_of_two_processes_that_need_the_same_corpus_one_packs_it(text_files):
    command = [sys.executable, "-c", PREPARE, str(text_files)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [err for _, err in said] == ["", ""]
    lines = [out.splitlines() for out, _ in said]
    assert lines[0][-1] == lines[1][-1]
    assert sorted(map(len, lines)) == [1, 2]
    assert prepare.fault(Path(lines[0][-1])) is None


def test_a_cache_that_is_full_or_in_the_way_says_so_and_leaves_nothing(text_files, tmp_path, monkeypatch):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "cache", text_files)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prepare.os, "fsync", full)
        with pytest.raises(CorpusError, match="cache: the packed corpus cannot be written: No space left on device"):
            prepare.prepare(*arguments)
    assert not (tmp_path / "cache").exists()
    folder = prepare.prepare(*arguments)
    assert prepare.fault(folder) is None
    with monkeypatch.context() as patched:
        patched.setattr(prepare.os, "fsync", full)
        with pytest.raises(CorpusError, match="cache: the packed corpus cannot be written: No space left on device"):
            prepare.prepare(arguments[0], {"vocab_size": 290}, *arguments[2:])
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", folder.name]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match=r"file: the packed corpus cannot be written: (Not a directory|File exists)"):
        prepare.prepare(*arguments[:3], tmp_path / "file", text_files)


def test_another_text_or_vocabulary_is_another_folder(text_files, tmp_path):
    source, cache = {"files": {"train": "train.txt"}}, tmp_path / "cache"
    first = prepare.prepare(source, TOKENIZER, 16, cache, text_files)
    assert prepare.prepare(source, {"vocab_size": 310}, 16, cache, text_files) != first
    (text_files / "train.txt").write_text((text_files / "train.txt").read_text() + "one more line\n")
    assert prepare.prepare(source, TOKENIZER, 16, cache, text_files) != first


def test_missing_splits_are_cut_from_the_end_between_paragraphs():
    train = "\n\n".join(f"paragraph {i} {WORDS}" for i in range(100))
    cut = texts.cut_missing({"train": train}, {"validation": 0.1, "test": 0.2})
    assert cut["train"] + cut["validation"] + cut["test"] == train
    assert cut["validation"].startswith("paragraph")
    assert cut["test"].startswith("paragraph")
    assert len(cut["test"]) / len(train) == pytest.approx(0.2, abs=0.02)
    assert len(cut["validation"]) / len(train) == pytest.approx(0.1, abs=0.02)


def test_given_splits_are_not_cut():
    given = {"train": WORDS * 50, "validation": "v\n", "test": "t\n"}
    assert texts.cut_missing(given) == given


def test_hub_layout_on_disk_goes_through_the_same_door(tmp_path):
    rows = [" = Title = \n", "", "a line without an end", WORDS]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = texts.load_texts({"hub": {"name": str(tmp_path)}})
    assert found["train"] == " = Title = \n" + "a line without an end\n" + WORDS
    with pytest.raises(CorpusError, match="no column 'body'; it has text"):
        texts.load_texts({"hub": {"name": str(tmp_path), "column": "body"}})


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(CorpusError, match=r"^hub dataset 'no-such/dataset' \(x\) cannot be loaded: [^\n]+$"):
        texts.hub_texts("no-such/dataset", "x")


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
        texts.read_text(tmp_path / "bad.txt")


def test_missing_files_name_the_pattern(tmp_path):
    with pytest.raises(CorpusError, match=r"corpus files for 'train': no file matches 'nothing\*\.txt'"):
        texts.files_texts(tmp_path, train="nothing*.txt")


def test_globs_join_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    assert texts.files_texts(tmp_path, train="*.txt") == {"train": "a.txtb.txtc.txt"}


def test_a_split_shorter_than_a_window_is_refused(text_files, tmp_path):
    with pytest.raises(CorpusError, match=r"the validation split has \d+ tokens; one window needs n_ctx \+ 1 = 4097"):
        prepare.prepare(
            {"files": {"train": "train.txt", "validation": "valid.txt"}}, TOKENIZER, 4096, tmp_path / "c", text_files
        )
    assert not (tmp_path / "c").exists()


def test_a_split_that_is_long_enough_for_one_study_only_is_refused_from_the_cache_too(text_files, tmp_path):
    source = {"files": {"train": "train.txt", "validation": "valid.txt"}}
    folder = prepare.prepare(source, TOKENIZER, 16, tmp_path / "c", text_files)
    with pytest.raises(CorpusError, match="the validation split has"):
        prepare.prepare(source, TOKENIZER, 4096, tmp_path / "c", text_files)
    assert prepare.fault(folder) is None


def test_what_a_study_refuses_is_not_written_and_what_it_is_shown_is_what_is_written(text_files, tmp_path):
    arguments, shown = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "a" / "c", text_files), []

    def refuse():
        with prepare.drafted(*arguments) as draft:
            shown.append(draft.meta)
            raise ValueError("not with these weights")

    with pytest.raises(ValueError, match="not with these weights"):
        refuse()
    assert not (tmp_path / "a").exists()
    with prepare.drafted(*arguments) as draft:
        shown.append(draft.meta)
        folder = draft.write()
    with prepare.drafted(*arguments) as draft:
        shown.append(draft.meta)
        assert draft.files == {}
        assert draft.write() == folder
    assert shown == [corpus.read_meta(folder)] * 3


def test_an_error_of_the_caller_is_not_taken_for_one_of_the_cache(text_files, tmp_path):
    arguments = ({"files": {"train": "train.txt"}}, TOKENIZER, 16, tmp_path / "c", text_files)
    with pytest.raises(OSError, match="validate_socket_filename failed"), prepare.drafted(*arguments):
        raise OSError("validate_socket_filename failed")


def test_a_pretrained_tokenizer_that_is_nowhere_says_what_to_do(tmp_path):
    with pytest.raises(CorpusError, match=r"download tokenizer\.json"):
        make_tokenizer({"path": str(tmp_path / "nothing")}, "")


def test_a_pretrained_tokenizer_folder_is_used_as_it_stands(text_files, tmp_path):
    from transformers import PreTrainedTokenizerFast

    trained = make_tokenizer({"vocab_size": 280}, (text_files / "train.txt").read_text())
    PreTrainedTokenizerFast(tokenizer_object=trained).save_pretrained(tmp_path / "tokenizer")
    loaded = make_tokenizer({"path": "tokenizer"}, "", tmp_path)
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


def test_large_vocabularies_take_four_bytes():
    class Wide:
        def get_vocab(self, with_added_tokens):
            return {"x": 69_999}

        def encode_batch_fast(self, texts, add_special_tokens):
            return [type("E", (), {"ids": [69_999]})() for _ in texts]

    assert encode(Wide(), "x").tolist() == [69_999]
    assert encode(Wide(), "x").dtype == np.uint32


def test_digest_tells_parts_apart():
    assert corpus.digest_of("ab", "c") != corpus.digest_of("a", "bc")
    assert corpus.digest_of("a") == hashlib.sha256((1).to_bytes(8, "little") + b"a").hexdigest()
