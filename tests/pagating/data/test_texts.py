"""Tests of texts of users: read correctly, or refused in one line with the source."""

import os

import pytest

from pagating.data import corpus, prepare, texts
from pagating.data.errors import CorpusError
from pagating.data.texts import files_texts, read_text
from pagating.data.tokenizer import chunks

LINES = "the quick brown fox jumps over the lazy dog\n"


def refused(message, function, *arguments, **options):
    with pytest.raises(CorpusError, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_a_pipe_and_a_device_are_refused_without_waiting(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        refused(rf"{name}: is a folder, pipe or device; give a text file", files_texts, tmp_path, train=name)
    refused(r"^/dev/zero: is a folder, pipe or device", files_texts, train="/dev/zero")
    (tmp_path / "a.txt").write_text("a")
    assert files_texts(tmp_path, train="*") == {"train": "a"}  # a pattern skips folders and devices


def test_links_that_lead_in_a_circle_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(r"a: cannot be read: Too many levels of symbolic links", files_texts, tmp_path, train="a")
    refused(r"for 'train': no file matches '\*'", files_texts, tmp_path, train="*")
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    for name in ("x", "y", "z"):  # three links: followed, they would give 3^40 paths
        (deep / name).symlink_to(tmp_path / "deep")
    (deep / "text.txt").write_text("once\n")
    (tmp_path / "deep" / ".hidden.txt").write_text("never\n")
    assert files_texts(tmp_path, train="deep/**/*.txt") == {"train": "once\n"}
    assert files_texts(tmp_path, train="deep/**") == {"train": "once\n"}
    refused("no file matches", files_texts, tmp_path, train="deep/**/*.md")


def test_empty_files_beside_others_are_left_out_and_named(tmp_path, capsys):
    for name, text in {"a.txt": "one\n", "b.txt": "", "c.txt": " \n\t\n", "d.txt": "two\n"}.items():
        (tmp_path / name).write_text(text)
    for given in ("*.txt", ["a.txt", "b.txt", "c.txt", "d.txt"], ["*.txt"]):
        assert files_texts(tmp_path, train=given) == {"train": "one\ntwo\n"}
        line = f"pagating: corpus files for 'train': empty and left out: {tmp_path}/b.txt, {tmp_path}/c.txt\n"
        assert capsys.readouterr().err == line
    refused(r"/b\.txt: is empty", files_texts, tmp_path, train=["b.txt", "c.txt"])
    refused(r"/b\.txt: is empty", files_texts, tmp_path, train="b.txt")
    for number in range(5):
        (tmp_path / f"e{number}.txt").write_text("")
    assert files_texts(tmp_path, train="*.txt") == {"train": "one\ntwo\n"}
    assert capsys.readouterr().err.endswith(f"/c.txt, {tmp_path}/e0.txt and 4 more\n")


def test_a_file_in_two_splits_or_twice_in_one_is_named(tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert files_texts(tmp_path, train="a.txt", validation="b.txt")["validation"] == "b.txt"
    assert not capsys.readouterr().err
    files_texts(tmp_path, train="a.txt", validation=["b.txt", "link.txt"])
    assert f"{tmp_path}/link.txt is in two splits, train and validation; a loss on" in capsys.readouterr().err
    assert files_texts(tmp_path, train=["*.txt", "b.txt"]) == {"train": "a.txtb.txta.txtb.txt"}
    assert f"'train': {tmp_path}/b.txt is named more than once, and read as often\n" in capsys.readouterr().err


def test_files_of_columns_are_read_as_text_with_a_line_that_says_so(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    assert files_texts(tmp_path, train="a.jsonl") == {"train": '{"text": "one"}\n'}
    assert "a.jsonl is read as plain text, its markup included; to read a column" in capsys.readouterr().err
    (tmp_path / "a.parquet").write_bytes(b"PAR1\0")
    refused(
        r"a binary|is binary.*to read a column of it, name its folder as corpus: ", files_texts, tmp_path, train="a.p*"
    )


def test_two_stars_find_what_glob_finds_where_no_link_is(tmp_path):
    import glob

    for name in ("a.txt", "d/b.txt", "d/e/c.txt", "d/e/.f/g.txt", ".h.txt", "d/i.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in ("**/*.txt", "d/**/*.txt", "**", "**/e/*.txt", "d/**/c.txt"):
        everything = glob.glob(str(tmp_path / pattern), recursive=True)
        expected = sorted(path for path in everything if os.path.isfile(path))
        assert texts.matching_files(tmp_path, pattern) == expected, pattern
        assert texts.matching_files(None, str(tmp_path / pattern)) == expected, pattern


def test_a_name_with_brackets_is_that_file(tmp_path):
    (tmp_path / "part[1].txt").write_text("one")
    (tmp_path / "part1.txt").write_text("two")
    assert files_texts(tmp_path, train="part[1].txt") == {"train": "one"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "a").write_text("text")
    (tmp_path / "a").chmod(0)
    refused("a: cannot be read: Permission denied", read_text, tmp_path / "a")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("text")

    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    refused("a: cannot be read: Permission denied", read_text, tmp_path / "a")


@pytest.mark.parametrize("change", ["grows", "shrinks", "is written over"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change):
    path = tmp_path / "a.txt"
    path.write_text(LINES * 10)
    os.utime(path, (1e9, 1e9))
    looked, real = [], os.fstat

    def fstat(descriptor):
        if len(looked) == 1:  # after the first call
            text = {"grows": LINES * 11, "shrinks": LINES * 9, "is written over": LINES.upper() * 10}[change]
            path.write_text(text)
        looked.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(texts.os, "fstat", fstat)
    refused(r"a\.txt: changed while it was read; try again when it is complete", read_text, path)
    monkeypatch.undo()
    assert read_text(path)


def test_windows_line_ends_and_a_byte_order_mark_stay_as_they_are(tmp_path):
    text = "\ufeffone\r\n\r\ntwo\r\n" * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_text(tmp_path / "a.txt") == text
    cut = texts.load_texts({"files": {"train": "a.txt"}}, tmp_path)
    assert cut["train"] + cut["validation"] + cut["test"] == text
    assert all(part.endswith("\r\n") for part in cut.values())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_other_encodings_are_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("été, naïve\n".encode(encoding))
    refused("is not UTF-8 text|is binary, not text", read_text, tmp_path / "a.txt")


def test_one_byte_is_too_little(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("x")
    refused("no line end where the test split could be cut", texts.load_texts, {"files": {"train": "a"}}, tmp_path)
    files = {"files": {"train": "a", "validation": "b", "test": "c"}}
    arguments = (files, {"vocab_size": 260}, 8, tmp_path / "cache", tmp_path)
    refused(r"the train split has 1 tokens; one window needs n_ctx \+ 1 = 9", prepare.prepare, *arguments)


def test_a_long_line_without_an_end_cannot_be_cut_in_three(tmp_path):
    (tmp_path / "a").write_text("word " * 1000)
    refused("no line end where the test split", texts.load_texts, {"files": {"train": "a"}}, tmp_path)


def test_a_line_longer_than_a_chunk_is_packed_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr("pagating.data.tokenizer.CHUNK", 100)
    long = "word and more " * 60 + "x" * 777  # spaces, then none for several chunks
    pieces = list(chunks(long + "\nend\n"))
    assert "".join(pieces) == long + "\nend\n"
    assert all(100 <= len(piece) <= 200 for piece in pieces[:-1])
    assert all(piece.startswith(" ") for piece in pieces[1:5])  # cut before a space, as the tokenizer does
    (tmp_path / "a").write_text(long)
    files = {"files": {"train": "a", "validation": "a", "test": "a"}}
    folder = prepare.prepare(files, {"vocab_size": 280}, 8, tmp_path / "cache", tmp_path)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(corpus.open_split(folder, "train").tolist()) == long


@pytest.mark.slow
def test_a_hundred_megabytes_in_one_line(tmp_path):
    from tokenizers import Tokenizer

    text = ("the quick brown fox " * 5_000_000)[: 100 << 20]
    (tmp_path / "a").write_text(text)
    (tmp_path / "b").write_text(LINES * 100)
    files = {"files": {"train": "a", "validation": "b", "test": "b"}}
    folder = prepare.prepare(files, {"vocab_size": 280}, 8, tmp_path / "cache", tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = corpus.open_split(folder, "train")
    assert corpus.read_meta(folder)["splits"]["train"]["bytes"] == len(text)
    assert text.startswith(tokenizer.decode(tokens[:10_000].tolist()))
    assert text.endswith(tokenizer.decode(tokens[-10_000:].tolist()))
