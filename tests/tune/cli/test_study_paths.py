"""Tests of studies with paths of every kind, through the command in a process of its own, from another folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.studies import TINY, yaml_of

ROOT = Path(__file__).parents[3]
TEXT = "the quick brown fox jumps over the lazy dog\n" * 400
ODD = "o dd%20#1? \u00fc\u4e00 'q\" [x]"  # spaces, what a URI or a pattern has, other letters, quotes
SMALL = {"arms": {"linear-floor": None}, "stages": ["search"], "search": {"trials_per_arm": 1}}
RUN = """
import json, sys, io
from tune.cli.main import main
for words, given in json.loads(sys.argv[1]):
    sys.argv = ["pagating", *words]
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()))
    print("===", flush=True)
    try:
        main()
    except SystemExit as ended:
        print(f"exit {ended.code or 0}", flush=True)
"""


def commands(folder, *rows):
    """Call `pagating` several times in one new process, in a folder. Return exit code and output of each."""
    given = json.dumps([[[str(word) for word in words], text] for words, text in rows])
    settings = {name: value for name, value in os.environ.items() if name != "PAGATING_CACHE"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, given],
        cwd=folder,
        env={**settings, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stdout, done.stdout
    found = []
    for part in done.stdout.split("===\n")[1:]:
        text, _, code = part.rpartition("exit ")
        found.append((int(code), text))
    assert len(found) == len(rows), done.stdout
    return found


@pytest.fixture
def here(tmp_path):
    """Return a folder of an odd name, with a corpus in files and in a data folder, and a tokenizer."""
    from pagating.data.tokenizer import make_tokenizer

    here = tmp_path / ODD
    (here / f"data {ODD}").mkdir(parents=True)
    (here / f"text {ODD}.txt").write_text(TEXT)
    rows = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    (here / f"data {ODD}" / "train.jsonl").write_text(rows)
    make_tokenizer({"vocab_size": 260}, TEXT).save(str(here / f"tokenizer {ODD}.json"))
    return here


@pytest.mark.slow
def test_a_study_runs_from_elsewhere_and_from_its_own_folder(here, tmp_path):
    tokenizer = {"vocab_size": None, "path": f"tokenizer {ODD}.json"}
    corpora = {"files": {"files": {"train": f"text {ODD}.txt"}}, "hub": {"hub": {"name": f"data {ODD}"}}}
    for name, corpus in corpora.items():
        (here / f"{name} {ODD}.yaml").write_text(yaml_of(TINY, **SMALL, corpus=corpus, tokenizer=tokenizer, name=name))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "link.yaml").symlink_to(here / f"files {ODD}.yaml")
    output = here / f"out {ODD}"
    run = ("--inline", "--tracking", "none")
    stream = (here / f"hub {ODD}.yaml").read_text().replace("name: hub", "name: stream")
    done = commands(
        tmp_path / "else",
        (("sweep", here / f"files {ODD}.yaml", "--output", output, *run), ""),
        (("sweep", here / f"hub {ODD}.yaml", "--output", output, *run), ""),
        (("sweep", "-", "--output", output, *run), stream),
        (("plan", "link.yaml", "--output", output, "--hours-from", "a100"), ""),
    )
    assert [code for code, _ in done] == [0, 0, 2, 0], done
    missing = tmp_path / "else" / f"data {ODD}"
    assert f"cannot be loaded: {missing} does not exist" in done[2][1]
    (here / f"text {ODD}.txt").unlink()
    file = output / "files" / "study.yaml"
    file.write_text(file.read_text().replace("trials_per_arm: 1", "trials_per_arm: 2"))
    again = commands(
        tmp_path / "else",
        (("sweep", "files", "--output", output, *run), ""),
        (("sweep", file, *run), ""),
        (("trial", output / "files"), ""),
    )
    assert [code for code, _ in again] == [0, 0, 0], again
    assert again[2][1].count("completed") == 2
    assert not (tmp_path / "else" / "studies").exists()


def test_what_sweep_refuses_plan_and_try_refuse(here):
    data = {"name": f"data {ODD}"}
    bare = here / "bare"
    bare.mkdir()
    refused = {
        "column": ({"corpus": {"hub": {**data, "column": "body"}}}, "has no column 'body'; it has text (string)"),
        "corpus": ({"corpus": {"hub": {"name": "nothing"}}}, "/nothing does not exist"),
        "folder": ({"corpus": {"hub": {"name": "./no/thing"}}}, "/no/thing does not exist"),
        "file": ({"corpus": {"files": {"train": "no.txt"}}}, "corpus files for 'train': no file matches 'no.txt' in /"),
        "split": ({"corpus": {"files": {"train": f"text {ODD}.txt", "test": "no*.txt"}}}, "for 'test': no file"),
        "short": ({"corpus": {"hub": data}, "model": {"n_ctx": 4096}, "fixed": {"batch_tokens": 4096, "tokens": 8192},
                   "tokenizer": {"vocab_size": 280}},
                  "one window needs n_ctx + 1 = 4097"),
        "tokenizer": ({"tokenizer": {"vocab_size": None, "path": "nowhere"}}, "/nowhere does not exist"),
        "far": (
            {"corpus": {"hub": {"name": "far/away"}}, "tokenizer": {"vocab_size": None, "path": "nowhere"}},
            "/nowhere does not exist",
        ),
        "weights": (
            {"model": {"pretrained": "bare"}, "tokenizer": {"vocab_size": None, "path": f"tokenizer {ODD}.json"}},
            "/bare has no model.safetensors",
        ),
        "gate": ({"arms": {"mine": {"gate": "none.py:f", "alpha": 0.5}}}, "none.py"),
    }  # fmt: skip
    rows = []
    for name, (changes, _) in refused.items():
        (here / f"{name}.yaml").write_text(yaml_of(TINY, **changes))
        rows += [(("plan", f"{name}.yaml", "--hours-from", "a100"), "")]
        if name in ("column", "tokenizer", "weights"):
            rows += [(("try", f"{name}.yaml"), "")]
        if name != "far":  # a sweep may download it
            rows += [(("sweep", f"{name}.yaml", "--inline", "--tracking", "none"), "")]
    (here / "begun.yaml").write_text(yaml_of(TINY, name="begun"))
    (here / "studies" / "begun").mkdir(parents=True)
    (here / "studies" / "begun" / "study.yaml").write_text(yaml_of(TINY, name="begun", confirm={"seeds": 3}))
    done = commands(here, *rows, (("plan", "begun.yaml", "--hours-from", "a100"), ""))
    for ((command, file, *_), _), (code, text) in zip(rows, done, strict=False):
        assert code == 2, (command, file, text)
        assert refused[file.removesuffix(".yaml")][1] in text, (command, file, text)
        assert text.count("\n") == 1 + (command == "sweep"), (command, file, text)  # after the question
    assert done[-1][0] == 2
    assert "confirm.seeds was 3 and is now 2; it can only grow: undo the change" in done[-1][1]
