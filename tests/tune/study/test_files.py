"""Tests of study files as people write and name them, and of where their paths start."""

import io
import json
import os
from pathlib import Path

import pytest
import yaml

from tests.studies import SMALL, changed, study_of, yaml_of
from tune.errors import StudyError
from tune.study.cell import folder_name
from tune.study.files import Found, dump, find, load, parse
from tune.study.inputs import relocated
from tune.study.own_gates import copy_of, file_of

TEXT = yaml_of(SMALL)
HERE = Path("x.yaml")
SAME = parse(TEXT, HERE)


@pytest.mark.parametrize("name", ["yes", "no", "on", "off", "true", "null", "1", "1.5", "1e5", "2020-01-01", "0x1f"])
def test_any_word_is_an_arms_name(name):
    study = parse(TEXT.replace("  mine:", f"  {name}:"), HERE)
    assert list(study.arms) == ["gelu", "floor", name]
    assert parse(dump(study), HERE) == study


def test_text_that_looks_like_a_number_comes_back_as_text():
    for question in ("1e5", "1.", "-3e-2", "no", "12e4567", "0x1f", "1_000"):
        study = SAME.model_copy(update={"question": question})
        assert parse(dump(study), HERE).question == question


def test_json_of_other_programs_is_read():
    content = changed(SMALL, question="Is it \U0001f600 better?", nuisance={"lr": {"loguniform": [1e-05, 1e-2]}})
    wanted = study_of(content, "x")
    for text in (json.dumps(content), json.dumps(content, indent="\t"), json.dumps(content, indent=2)):
        assert parse(text, HERE) == wanted
    assert "1e-05" in json.dumps(content)
    assert "\\ud83d" in json.dumps(content)
    for written in ("[1e-05, 1E-2]", "[1.e-5, 0.01]", "[.1e-4, 1e-2]"):
        lr = f"nuisance: {{lr: {{loguniform: {written}}}}}\n"
        assert parse(yaml_of(SMALL, nuisance=None) + lr, HERE).nuisance["lr"].loguniform == [1e-05, 0.01]


def test_merge_keys_and_anchors():
    arms = """
x-gate: &gate {gate: tanh, alpha: 0.25}
arms:
  gelu: {baseline: true}
  one: &one {<<: *gate}
  two: {<<: *gate, alpha: 0.75}
  three: {<<: [*one, {alpha: 1.0, base: gelu}]}
"""
    found = parse(yaml_of(SMALL, arms=None) + arms, HERE).arms
    assert [(found[name].gate, found[name].alpha, found[name].base) for name in ("one", "two", "three")] == [
        ("tanh", 0.25, "identity"),
        ("tanh", 0.75, "identity"),
        ("tanh", 0.25, "gelu"),
    ]
    with pytest.raises(StudyError, match="unknown key 'y-gate'"):
        parse(TEXT + "y-gate: 1\n", HERE)


def test_encodings_that_name_themselves(tmp_path):
    text = TEXT.replace("better", "bess\u00e9r").replace("\n", "\r\n")
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "x.yaml").write_bytes(text.encode(encoding))
        assert load(tmp_path / "x.yaml").question == "Is it bess\u00e9r?"
    (tmp_path / "x.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(StudyError, match=r"x\.yaml: is not UTF-8 text \(offset \d+\); save it as UTF-8"):
        load(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my study", "my-study"),
        ("a (1)", "a-1"),
        ("\u00e9t\u00e9.v2", "ete.v2"),
        ("-x", "x"),
        ("a  b!", "a-b"),
        ("it's", "it-s"),
    ],
)
def test_a_study_is_named_after_its_file(file, name):
    assert parse(TEXT, Path(f"{file}.yaml")).name == name
    assert parse(f"name: own\n{TEXT}", Path(f"{file}.yaml")).name == "own"


@pytest.mark.parametrize("file", ["\u7814\u7a76", "con", "x" * 65])
def test_a_file_without_a_name_for_its_study_says_what_to_add(file):
    with pytest.raises(StudyError, match=r"must be 1 to 64 of .*\(without the key name, it is the file's name\)"):
        parse(TEXT, Path(f"{file}.yaml"))


def begun(output, study=SAME):
    """Write the folder of a study that has begun. Return it."""
    folder = output / study.name
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(dump(study))
    (folder / "ledger.jsonl").write_text("")
    return folder


def test_paths_start_at_the_file_and_of_a_link_at_the_file_that_it_names(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "far" / "x.yaml").write_text(TEXT)
    (tmp_path / "near" / "link.yaml").symlink_to("../far/x.yaml")
    monkeypatch.chdir(tmp_path)
    assert find(Path("far/x.yaml"), Path("studies")) == Found(SAME, tmp_path / "far", Path("studies"))
    linked = find(Path("near/link.yaml"), Path("studies"))
    assert (linked.base, linked.study.name) == (tmp_path / "far", "link")


def test_streams_have_no_name_and_their_paths_start_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = f"name: mine\n{TEXT}".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(named)))
    assert find(Path("-"), Path("s")) == Found(study_of(SMALL, "mine"), tmp_path, Path("s"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    with pytest.raises(StudyError, match=r"^standard input: key 'name' is missing$"):
        find(Path("-"), Path("s"))
    reader, writer = os.pipe()  # as <(command) of a shell
    os.write(writer, named)
    os.close(writer)
    assert find(Path(f"/dev/fd/{reader}"), Path("s")).base == tmp_path
    os.close(reader)


def test_a_begun_study_is_found_by_name_by_folder_and_by_file(tmp_path, monkeypatch):
    output = tmp_path / "studies"
    folder = begun(output)
    monkeypatch.chdir(tmp_path)
    own = Found(SAME, folder, output, own=True)
    for given in ("x", "studies/x", "studies/x/study.yaml"):
        assert find(Path(given), Path("studies")) == own, given
    (tmp_path / "x").mkdir()  # a folder of that name that is no study
    assert find(Path("x"), Path("studies")) == own
    folder.rename(output / "renamed")
    assert find(Path("renamed"), Path("studies")).study.name == "renamed"
    (tmp_path / "x.yaml").write_text(TEXT)
    assert find(Path("x.yaml"), Path("studies")).base == tmp_path


def test_what_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun(tmp_path / "studies", study_of(SMALL, "smoke"))
    (tmp_path / "mine.yaml").write_text(TEXT)
    (tmp_path / "folder").mkdir()
    for given, message in {
        "nothing.yaml": f"nothing.yaml: No such file or directory; looked in {tmp_path}, and for a study of ",
        "smok": r"did you mean smoke\?$",
        "mine": r"did you mean mine.yaml\?$",
        "folder": "folder: is a folder without a study.yaml; name a study file",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(StudyError, match=message):
            find(Path(given), Path("studies"))


def test_the_file_in_a_studys_folder_names_the_same_inputs(tmp_path):
    base, folder = tmp_path / "my files", tmp_path / "out" / "studies" / "x"
    for name in ("my files/data", "my files/weights", "my files/gpt2", "out/studies/x"):
        (tmp_path / name).mkdir(parents=True)
    files = {"train": ["a.txt", "/b/c.txt", "~/d.txt"], "test": "../e/*.txt"}
    given = study_of(
        SMALL,
        corpus={"files": files},
        tokenizer={"vocab_size": None, "path": "tok/tokenizer.json"},
        model={"pretrained": "weights"},
    )
    moved = relocated(given, base, folder)
    up = "../../../my files"
    assert moved.corpus.files.train == [f"{up}/a.txt", "/b/c.txt", "~/d.txt"]
    assert moved.corpus.files.test == "../../../e/*.txt"
    assert (moved.tokenizer.path, moved.model.pretrained) == (f"{up}/tok/tokenizer.json", f"{up}/weights")
    assert parse(dump(moved), HERE) == moved
    named = study_of(SMALL, corpus={"hub": {"name": "data"}}, tokenizer={"vocab_size": None, "pretrained": "gpt2"})
    assert relocated(named, base, folder).corpus.hub.name == f"{up}/data"
    assert relocated(named, base, folder).tokenizer.pretrained == f"{up}/gpt2"
    assert relocated(named, tmp_path, folder) == named  # names on the hub
    assert relocated(moved, folder, folder) == moved


def test_a_gate_that_is_gone_is_the_studys_copy(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "study"
    assert file_of("g.py:mine", base, folder) == base / "g.py"
    copy = copy_of("g.py:mine", folder)
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    assert file_of("g.py:mine", base, folder) == copy
    base.mkdir()
    (base / "g.py").write_text("")
    assert file_of("g.py:mine", base, folder) == base / "g.py"


def test_the_resolved_file_is_plain_yaml(tmp_path):
    assert yaml.safe_load(dump(SAME))["arms"]["gelu"]["baseline"] is True


@pytest.mark.parametrize(
    "key",
    [
        "search/paglu/3/1",
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\0b",
        "a" * 300,
        "C:\\x",
        "é" * 300,
        "\ud800",
    ],
)
def test_a_cells_folder_cannot_leave_its_parent(tmp_path, key):
    name = folder_name(key)
    assert len(name) < 100
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert not name.startswith(".")
    (tmp_path / name).mkdir()
    assert name != folder_name(key + "x")
    assert folder_name("search/a-b/1") != folder_name("search/a/b/1")
