"""Tests of local folders: each layout that `datasets` reads, and what is wrong with a folder in one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile

import datasets
import pytest

from pagating.data.errors import CorpusError
from pagating.data.texts import hub_texts, load_texts

ROWS = [f"line {number} of the text" for number in range(40)]
TEXT = "".join(f"{row}\n" for row in ROWS)
JSONL = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
FIRST = JSONL.partition("\n")[0] + "\n"


def write(folder, files):
    """Write files, by their path in a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def zipped(name, content):
    """Return the bytes of a zip archive with one file."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr(name, content)
    return raw.getvalue()


def refusal(folder, **options):
    """Return the message, one line, for a folder that cannot be used."""
    with pytest.raises(CorpusError) as caught:
        hub_texts(str(folder), **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


PACKED = {
    "txt": {"book.txt": TEXT},
    "csv": {"a.csv": "n,text\n" + "".join(f"{i},{row}\n" for i, row in enumerate(ROWS))},
    "tsv": {"train.tsv": "n\ttext\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(ROWS))},
    "json": {"a.json": json.dumps([{"text": row} for row in ROWS])},
    "jsonl": {"a.jsonl": JSONL},
    "gz": {"a.jsonl.gz": gzip.compress(JSONL.encode())},
    "xz": {"train.txt.xz": lzma.compress(TEXT.encode())},
    "bz2": {"a.jsonl.bz2": bz2.compress(JSONL.encode())},
    "zip": {"train.zip": zipped("a.jsonl", JSONL)},
    "nested": {"en/a.jsonl": JSONL},
    "byte order mark": {"a.jsonl": b"\xef\xbb\xbf" + JSONL.encode()},
    "one empty file": {"a.jsonl": JSONL, "b.jsonl": ""},
}


@pytest.mark.parametrize("layout", PACKED)
def test_layouts_of_text_files(tmp_path, layout):
    write(tmp_path, PACKED[layout])
    assert hub_texts(str(tmp_path)) == {"train": TEXT}
    assert "".join(load_texts({"hub": {"name": "."}}, tmp_path).values()) != TEXT  # the parts are train, test, ...
    assert load_texts({"hub": {"name": "."}}, tmp_path)["train"] == "".join(f"{row}\n" for row in ROWS[:36])


def test_layouts_that_the_library_itself_writes(tmp_path):
    made = datasets.Dataset.from_dict({"text": ROWS})
    made.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    made.select(range(3)).to_parquet(tmp_path / "parquet" / "data" / "test-00000-of-00001.parquet")
    assert hub_texts("parquet", base=tmp_path) == {"train": TEXT, "test": "".join(f"{row}\n" for row in ROWS[:3])}
    made.save_to_disk(tmp_path / "dataset")
    assert hub_texts("dataset", base=tmp_path) == {"train": TEXT}
    both = datasets.DatasetDict(train=made.select(range(39, -1, -1)), validation=made.select([5]))
    both.save_to_disk(tmp_path / "dictionary")
    backwards = "".join(f"{row}\n" for row in reversed(ROWS))
    assert hub_texts("dictionary", base=tmp_path) == {"train": backwards, "validation": f"{ROWS[5]}\n"}


def test_splits_are_named_by_files_or_folders(tmp_path):
    write(tmp_path / "files", {"train.jsonl": JSONL, "dev.jsonl": FIRST, "test.jsonl": FIRST})
    write(tmp_path / "folders", {"train/x.jsonl": JSONL, "valid/x.jsonl": FIRST, "test/x.jsonl": FIRST})
    for name in ("files", "folders"):
        assert hub_texts(name, base=tmp_path) == {
            "train": TEXT,
            "validation": f"{ROWS[0]}\n",
            "test": f"{ROWS[0]}\n",
        }, name
    write(tmp_path / "test-only", {"test.jsonl": JSONL})
    message = refusal(tmp_path / "test-only")
    assert message.endswith("it has test. Name the files of the training text train.*, or put them into a folder train")


def test_a_card_with_several_configurations_asks_for_one(tmp_path):
    card = "---\nconfigs:\n- {config_name: one, data_files: a.jsonl}\n- {config_name: two, data_files: b.jsonl}\n---\n"
    write(tmp_path, {"README.md": card, "a.jsonl": JSONL, "b.jsonl": FIRST})
    assert "available configs: ['one', 'two']; set corpus.hub.config" in refusal(tmp_path)
    assert hub_texts(str(tmp_path), "two") == {"train": f"{ROWS[0]}\n"}


def test_the_only_column_of_text_is_used_and_of_several_one_is_asked_for(tmp_path, capsys):
    write(tmp_path / "one", {"a.jsonl": JSONL.replace('"text"', '"n": 1, "body"')})
    assert hub_texts("one", base=tmp_path) == {"train": TEXT}
    assert "has no column 'text'; its only column of text is used: body" in capsys.readouterr().err
    assert "has no column 'text'; it has n (int64), body (string). Name the column" in refusal(
        tmp_path / "one", column="text"
    )
    write(tmp_path / "two", {"a.jsonl": JSONL.replace('"text"', '"title": "x", "body"')})
    assert "it has title (string), body (string). Name the column of the text as corpus.hub.column" in refusal(
        tmp_path / "two"
    )
    assert hub_texts("two", column="body", base=tmp_path) == {"train": TEXT}
    write(tmp_path / "inside", {"a.json": json.dumps({"data": [{"text": "x"}]})})
    assert "has no column 'text'; it has data (List)" in refusal(tmp_path / "inside")


def test_empty_rows_and_words_that_look_like_missing_values(tmp_path):
    write(tmp_path / "a", {"a.jsonl": '{"text": "one"}\n{"text": null}\n{"text": ""}\n{"n": 3}\n{"text": "two\\n"}\n'})
    assert hub_texts("a", base=tmp_path) == {"train": "one\ntwo\n"}
    assert hub_texts("a", base=tmp_path, blank=True) == {"train": "one\n\n\n\ntwo\n"}
    write(tmp_path / "b", {"a.csv": 'text,n\nNA,1\nNone,2\n"null",3\n,4\n'})
    assert hub_texts("b", base=tmp_path) == {"train": "NA\nNone\nnull\n"}
    write(tmp_path / "c", {"a.jsonl": '{"text": "one"}\n{"text": 3}\n'})
    assert refusal(tmp_path / "c").endswith("split 'train', column 'text': row 2 holds int, not text")


def test_folders_that_cannot_be_used_name_the_file(tmp_path):
    cases = {
        "latin": (
            {"train.txt": "\u00e9".encode("latin-1")},
            "/latin/train.txt: is not UTF-8 text (byte 0xe9 after offset",
        ),
        "latin-json": ({"a.jsonl": b'{"text":"\xe9"}\n'}, "/latin-json/a.jsonl: is not UTF-8 text (byte 0xe9"),
        "latin-gz": ({"a.jsonl.gz": gzip.compress(b'{"text":"\xe9"}\n')}, "a.jsonl.gz: is not UTF-8 text (byte 0xe9"),
        "nothing": ({}, "holds no file of rows (.txt, .csv, "),
        "pictures": ({"a.md": "x", "b.rst": "y"}, "); it holds a.md, b.rst"),
        "hidden": ({".a.jsonl": JSONL}, "it holds .a.jsonl"),
        "empty": ({"train.csv": ""}, "corpus folder {folder}: train.csv is empty; remove it"),
        "cut": ({"a.jsonl": '{"text": "a"}\n{"text": "b'}, "cannot be loaded: JSON parse error: Missing a closing"),
        "script": ({"script.py": "x", "a.jsonl": JSONL}, "Dataset scripts are no longer supported"),
        "numbers": ({"a.csv": "text,n\n1,2\n"}, "row 1 holds int, not text"),
        "binary": ({"train.txt": b"one\n\0two\n"}, "train.txt: is binary, not text (a NUL byte at offset 4)"),
        "latin-zip": ({"train.zip": zipped("a.txt", b"\xe9\n")}, "train.zip/a.txt: is not UTF-8 text (byte 0xe9"),
        "broken-gz": ({"a.txt.gz": gzip.compress(TEXT.encode())[:60]}, "a.txt.gz cannot be loaded: EOFError"),
        "markdown": ({"train.md": TEXT}, "given as corpus: {files: {train: FOLDER/*}}"),
    }
    for name, (files, message) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder, files)
        assert message.replace("{folder}", str(folder)) in refusal(folder), name


def test_archives_pipes_and_missing_packages(tmp_path, monkeypatch):
    write(tmp_path / "zip", {"train.zip": zipped("book.txt", TEXT.encode())})
    assert hub_texts("zip", base=tmp_path) == {"train": TEXT}
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "train.txt")
    assert refusal(tmp_path / "pipe").endswith("train.txt is a pipe or device, or a link to nothing; remove it")
    write(tmp_path / "zst", {"train.txt.zst": b"(\xb5/\xfd"})
    monkeypatch.setattr("datasets.config.ZSTANDARD_AVAILABLE", False)
    assert "packed with zstd; install the package zstandard, or unpack them" in refusal(tmp_path / "zst")


def test_splits_by_other_names_are_used_or_named(tmp_path, capsys):
    rows = datasets.Dataset.from_dict({"text": ROWS})
    datasets.DatasetDict({"train": rows, "valid": rows.select([0]), "extra": rows}).save_to_disk(str(tmp_path / "a"))
    assert hub_texts("a", base=tmp_path) == {"train": TEXT, "validation": f"{ROWS[0]}\n"}
    assert "hub dataset 'a': its splits extra are not used\n" in capsys.readouterr().err
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "b"))
    load_texts({"hub": {"name": "b"}}, tmp_path)
    assert "the train and the test split of the corpus have the same text; a loss on" in capsys.readouterr().err


def test_a_local_folder_has_no_revision(tmp_path):
    write(tmp_path / "a", {"a.jsonl": JSONL})
    assert f"revision 'main' is for the hub, and {tmp_path}/a is a local folder" in refusal(
        tmp_path / "a", revision="main"
    )


def test_files_that_the_library_leaves_out_are_named(tmp_path, capsys):
    write(tmp_path / "a", {"a.jsonl": JSONL, "b.csv": "text\nx\n"})
    assert hub_texts("a", base=tmp_path) == {"train": TEXT}
    assert f"corpus folder {tmp_path}/a: `datasets` leaves out b.csv\n" in capsys.readouterr().err
    write(tmp_path / "b", {"train.jsonl": JSONL, "train-2.jsonl": JSONL, "more.jsonl": JSONL, "README.md": "x"})
    assert hub_texts("b", base=tmp_path) == {"train": TEXT + TEXT}
    assert "leaves out more.jsonl\n" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert hub_texts("link", base=tmp_path) == {"train": TEXT + TEXT}
    assert "leaves out more.jsonl\n" in capsys.readouterr().err


def test_a_file_that_changed_without_its_time_is_read_again(tmp_path):
    """The library's own cache would return the old text."""
    write(tmp_path, {"a.jsonl": JSONL})
    os.utime(tmp_path / "a.jsonl", (1e9, 1e9))
    assert hub_texts(str(tmp_path)) == {"train": TEXT}
    write(tmp_path, {"a.jsonl": JSONL.replace('text"}', 'TEXT"}')})
    os.utime(tmp_path / "a.jsonl", (1e9, 1e9))
    assert hub_texts(str(tmp_path)) == {"train": TEXT.replace("text\n", "TEXT\n")}


def test_a_folder_that_the_librarys_cache_has_seen_is_not_taken_for_one_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "mine", {"a.jsonl": JSONL})
    datasets.load_dataset(str(tmp_path / "mine"))  # another program
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert datasets.load_dataset("mine")["train"].num_rows == 40  # found by its name alone
    assert "/else/mine does not exist, and the hub's cannot be reached" in refusal("mine", base=tmp_path / "else")


def test_a_path_with_any_letters_is_that_folder_alone(tmp_path):
    names = ["a b", "a%20b", "a#b", "a?b", "a*b", "a[b]", "it's", 'a"b', "\u00fc\u4e00", "~x", "a$b", "a;b", "{a}"]
    for number, name in enumerate(names):
        write(tmp_path / name, {"train.jsonl": json.dumps({"text": f"only {number}"}) + "\n"})
    for number, name in enumerate(names):
        assert hub_texts(f"./{name}", base=tmp_path) == {"train": f"only {number}\n"}, name


def test_paths_start_at_the_study_file(tmp_path, monkeypatch):
    write(tmp_path / "here" / "data", {"a.jsonl": JSONL})
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert hub_texts("data", base=tmp_path / "here") == {"train": TEXT}
    assert f"'data' cannot be loaded: {tmp_path}/else/data does not exist, and the hub" in refusal("data")
    monkeypatch.chdir(tmp_path / "here")
    message = refusal("data", base=tmp_path / "else")
    assert f"no such folder beside the study file ({tmp_path}/else/data)" in message
    assert message.endswith("write ../here/data")
    assert hub_texts("../here/data", base=tmp_path / "else") == {"train": TEXT}
    assert "is a file; name the folder that holds it" in refusal("data/a.jsonl", base=tmp_path / "here")
    assert "no dataset of the hub can have that name" in refusal("./nothing")
