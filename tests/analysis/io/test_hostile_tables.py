"""Tables and command lines from unknown sources give a result, or one line that names the error, never a traceback."""

import importlib
import json
import os
import re
import socket
import sqlite3
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.io import command, files
from analysis.io.files import TableError
from analysis.io.study import load

SCRIPTS = ("significance", "improvement", "alphas", "budget", "claims", "report")
LOSSES = {"gelu": (3.0, 3.02, 3.01, 3.05), "x": (3.11, 3.1, 3.13, 3.16)}
ROWS = [(arm, seed, loss) for arm, losses in LOSSES.items() for seed, loss in enumerate(losses)]
GOOD = "arm,seed,val_nll\n" + "".join(f"{arm},{seed},{loss}\n" for arm, seed, loss in ROWS)


def call(script, *words, capsys=None):
    """Exit code, output and error of a script, called as its command is; fails on anything but a clean end."""
    module = "report.build" if script == "report" else script
    main = importlib.import_module(f"analysis.{module}").main
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: main(list(words)))
    out, err = capsys.readouterr() if capsys else ("", "")
    if capsys and ended.value.code == 2:
        assert err.endswith("\n")
        assert err[:-1].isprintable(), ascii(err)
        assert len(err) < 1500
        assert out == ""
    assert ended.value.code in (0, 1, 2)
    return ended.value.code, out, err


REFUSED = {
    "empty": (b"", "it is empty"),
    "header only": (b"arm,seed,val_nll\n", "has no rows"),
    "binary": (bytes(range(256)), "cannot be read as a table"),
    "zeros": (b"\0" * 1000, "it is binary"),
    "JSON that is cut": ('[{"arm": "gelu", "seed": 1, "val', "cannot be read as a table: Unterminated string"),
    "JSON of numbers": ("[1, 2]", "JSON holds '1'; allowed: objects with a name for each value"),
    "no arm": (GOOD.replace("arm", "arn", 1), "column arm is missing; it has arn, seed, val_nll"),
    "no seed": (GOOD.replace("seed", "sede", 1), "column seed is missing"),
    "no metric": ("arm,seed\ngelu,1\nx,1\n", "which column is the metric"),
    "one decimal comma": (GOOD.replace("3.02", '"3,02"'), "column val_nll has '3,02' and '3.0': two decimal signs"),
    "decimal commas between commas": (re.sub(r"(\d)\.", r"\1,", GOOD), "a decimal comma needs quotes"),
    "text": (GOOD.replace("3.02", "abc"), "column val_nll has 'abc'; allowed: numbers"),
    "truth": (GOOD.replace("3.02", "True"), "column val_nll has 'True'; allowed: numbers"),
    "a row twice": (GOOD + "x,1,3.1\n", r"duplicated confirm rows \(x seed 1\)"),
    "a column twice": ("arm,seed,val_nll,val_nll\ngelu,1,3,3\n", "column 'val_nll' appears twice"),
    "too many cells": (GOOD + "x,9,3,4,5\n", "Expected 3 fields in line 10, saw 5"),
    "an open quote": (GOOD + '"x,9,3\n', "EOF inside string"),
    "an infinite seed": (GOOD.replace("x,3", "x,inf"), "column seed has inf; allowed: whole numbers below 2"),
    "a seed that is rounded": (GOOD.replace("x,3", "x,1e17"), r"column seed has 1e\+17; allowed: whole numbers below"),
    "a loss without bounds": (GOOD.replace("3.02", "1e308"), r"column val_nll has 1e\+308; allowed: up to 1e\+100"),
    "minus infinity": (GOOD.replace("3.02", "-inf"), "column val_nll has -inf"),
    "terminal codes": (GOOD.replace("x,", "\x1b[2Jx,"), r"column arm has '\\x1b\[2Jx'; allowed: printable names"),
    "two lines": (GOOD.replace("x,", '"a\nb",'), r"column arm has 'a\\nb'; allowed: printable names, 200"),
    "a long arm": (
        GOOD.replace("x,", "x" * 10**6 + ","),
        "column arm has 'x.* [.]{3} .*x'; allowed:",
    ),
    "a stage": ("arm,seed,val_nll,stage\ngelu,1,3,later\n", "column stage has 'later'; allowed: search, calibrate"),
    "an outcome": ("arm,seed,val_nll,outcome\ngelu,1,3,1\n", "column outcome has '1'; allowed: completed"),
    "what is chosen": ("arm,seed,val_nll,chosen\ngelu,1,3,yes\n", "column chosen has 'yes'; allowed: true, false"),
    "an empty step": (
        "arm,seed,val_nll,step\ngelu,1,3,\nx,1,3,1\n",
        "column step is empty in row 1; allowed: a value in every row",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_table_that_cannot_be_analysed_is_refused_in_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "runs.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = call("significance", str(file), "--baseline", "gelu", capsys=capsys)
    assert code == 2
    assert err.startswith((str(file), f"{file.stem}: "))
    assert re.search(message, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs.csv"]


SAME = {
    "semicolons": GOOD.replace(",", ";").encode(),
    "tabs": GOOD.replace(",", "\t").encode(),
    "UTF-16": GOOD.encode("utf-16"),
    "BOM": b"\xef\xbb\xbf" + GOOD.encode(),
    "CRLF": GOOD.replace("\n", "\r\n").encode(),
    "spaces": GOOD.replace(",", ", ").encode(),
    "quotes": re.sub(r"([^,\n]+)", r'"\1"', GOOD).encode(),
    "other columns": re.sub(r"\n(?=.)", ',"hé"\n', GOOD.replace("\n", ",note\n", 1)[:-1]).encode() + b",x\n",
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME.keys())
def test_a_table_written_another_way_says_the_same(tmp_path, content):
    (tmp_path / "good.csv").write_text(GOOD)
    (tmp_path / "same.csv").write_bytes(content)
    want, got = (load(tmp_path / name, baseline="gelu", metric="val_nll") for name in ("good.csv", "same.csv"))
    pd.testing.assert_frame_equal(want.losses(), got.losses())


@pytest.mark.parametrize(
    "arm", ["seed", "arm", "_loss", "val_nll", "β→é", "[red]x", "<script>", "=1+1", "| x |", "%$_{}"]
)
def test_an_arm_may_be_named_like_anything(tmp_path, capsys, arm):
    file = tmp_path / "runs.csv"
    file.write_text(GOOD.replace("x,", f"{arm},"))
    words = (str(file), "--baseline", "gelu", "--format", "json")
    found = json.loads(call("significance", *words, capsys=capsys)[1])["comparisons"]
    assert [row["arm"] for row in found] == [arm]
    np.testing.assert_allclose(found[0]["improvement_percent"], 100 * (1 - sum(LOSSES["x"]) / sum(LOSSES["gelu"])))


def test_nan_and_infinity_are_runs_that_diverged(tmp_path):
    file = tmp_path / "runs.csv"
    for value in ("nan", "inf", "NaN"):
        file.write_text(GOOD.replace("3.02", value))
        assert load(file, baseline="gelu").losses().loc[1, "gelu"] == np.inf
    file.write_text(GOOD.replace("3.02", ""))
    assert np.isnan(load(file, baseline="gelu").losses().loc[1, "gelu"])


ODD = ["gelu", "x", "", "nan", "inf", "-inf", "3.01", "1e999", "0x1", '"', ",", ";", "\0", "\ufeff", "é", "1e17"]
CELL = st.sampled_from(ODD) | st.text(max_size=6) | st.integers().map(str) | st.floats().map(str)
COLUMN = st.sampled_from(["arm", "seed", "val_nll", "step", "stage", "lr", "alpha", "outcome", "chosen", "config_key"])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(COLUMN | st.text(max_size=4), max_size=5), st.lists(st.lists(CELL, max_size=6), max_size=6))
def test_any_table_is_a_study_or_one_line(tmp_path_factory, columns, rows):
    file = tmp_path_factory.getbasetemp() / "any.csv"
    text = "\n".join(",".join(row) for row in [["arm", "seed", "val_nll", *columns], *rows])
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load(file, baseline="gelu")
    except TableError as error:
        message = str(error)
    else:
        message = str(file)
    assert message.startswith(str(file))


def test_parquet_that_is_cut_flipped_or_another_thing(tmp_path, capsys):
    whole = tmp_path / "runs.parquet"
    pd.DataFrame(ROWS, columns=["arm", "seed", "val_nll"]).to_parquet(whole)
    assert call("significance", str(whole), "--baseline", "gelu", capsys=capsys)[0] in (0, 1)
    raw, bad = whole.read_bytes(), tmp_path / "bad.parquet"
    rng = np.random.default_rng(1)
    cuts = [raw[:size] for size in (0, 4, len(raw) // 2, len(raw) - 1)]
    flips = []
    for place in rng.integers(0, len(raw), 10):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << rng.integers(8)
        flips.append(bytes(flipped))
    for content in [*cuts, b"PAR1" + b"\0" * 100 + b"PAR1"]:
        bad.write_bytes(content)
        code, _, err = call("significance", str(bad), "--baseline", "gelu", capsys=capsys)
        assert code == 2
        assert "bad.parquet: cannot be read as a table" in err
    for content in flips:
        bad.write_bytes(content)
        call("significance", str(bad), "--baseline", "gelu", capsys=capsys)
    nested = pd.DataFrame({"arm": ["gelu", "x"], "seed": [1, 1], "val_nll": [[1.0], [2.0]]})
    nested.to_parquet(bad)
    code, _, err = call("significance", str(bad), "--baseline", "gelu", capsys=capsys)
    assert (code, "allowed: numbers" in err) == (2, True)


def test_things_that_are_no_tables(tmp_path, capsys):
    places = {
        str(tmp_path): "study.yaml: missing",
        str(tmp_path / "none.csv"): "no such file or folder",
        str(tmp_path / ("x" * 300)): "no such file or folder",
        "/dev/null": "no such file or folder",
        "": "study.yaml: missing",
    }
    for place, message in places.items():
        code, _, err = call("significance", place, capsys=capsys)
        assert code == 2
        assert message in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_table_without_permission(tmp_path, capsys):
    file = tmp_path / "runs.csv"
    file.write_text(GOOD)
    file.chmod(0)
    code, _, err = call("significance", str(file), "--baseline", "gelu", capsys=capsys)
    assert (code, "Permission denied" in err) == (2, True)


BAD_STUDY = ["", "- 1", "arms: 3", "arms: {gelu: 1}", "arms: {gelu: {baseline: true}}\nconfirm: often", "a: {", "\0"]
BROKEN = {
    "study.yaml": BAD_STUDY,
    "provenance.json": ["", "[]", "{", "[" * 100_000, "\0"],
    "trials.parquet": ["", "PAR1"],
    "curves.parquet": ["", "PAR1"],
    "layers.parquet": ["", "PAR1"],
    "samples.parquet": ["", "PAR1"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_a_study_folder_with_a_broken_file_is_one_line(demo, capsys, name, text):
    (demo / name).write_text(text)
    code, _, err = call("significance", str(demo), capsys=capsys)
    assert code == 2
    assert name in err


OPTIONS = ["baseline", "floor", "metric", "level", "margin", "correction", "format", "mlflow", "study", "help2"]
VALUES = ["gelu", "x", "val_nll", "0.1", "nan", "-1", "1e999", "0.5%", "%", "holm", "json", "{}", "", "a\nb", "\x1b[2J"]
PLACES = ["sqlite:///none.db", "http://[::1", "gopher://x", "--", "-", "none.csv", "\udcff"]
WORDS = st.sampled_from([*(f"--{name}" for name in OPTIONS), *VALUES, *PLACES])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=st.sampled_from(SCRIPTS), words=st.lists(WORDS, max_size=5), with_table=st.booleans())
def test_any_command_line_ends_cleanly(tmp_path_factory, capsys, script, words, with_table):
    file = tmp_path_factory.getbasetemp() / "good.csv"
    if not file.exists():
        file.write_text(GOOD)
    before = sorted(file.parent.iterdir())
    call(script, *([str(file)] if with_table else []), *words, capsys=capsys)
    assert sorted(file.parent.iterdir()) == before


def test_a_database_that_is_not_mlflows_is_left_as_it_was(tmp_path, capsys):
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    with sqlite3.connect(other) as store:
        store.execute("create table mine (x)")
    text.write_text("no database")
    before = other.read_bytes()
    for file, message in ((other, "has no table experiments"), (text, "file is not a database")):
        code, _, err = call("significance", "--mlflow", f"sqlite:///{file}", "--study", "s", capsys=capsys)
        assert code == 2
        assert message in err
    assert other.read_bytes() == before


@pytest.mark.parametrize("answers", [pytest.param("never", marks=pytest.mark.slow), "closed"])
def test_an_mlflow_server_that_does_not_answer_is_given_up_on_without_its_password(monkeypatch, capsys, answers):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the default is 10 s, tried three times
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if answers == "closed":
            server.close()
        done: list[tuple] = []
        uri = f"http://me:s3cret@127.0.0.1:{port}/?token=t0ken"
        words = ("--mlflow", uri, "--study", "s")
        thread = threading.Thread(target=lambda: done.append(call("significance", *words, capsys=capsys)), daemon=True)
        thread.start()
        thread.join(60)
    assert done, "still waiting after a minute"
    code, _, err = done[0]
    assert code == 2
    assert f"http://***@127.0.0.1:{port}" in err
    assert "s3cret" not in err
    assert "t0ken" not in err


def test_more_rows_than_are_read_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "MOST_ROWS", 7)
    (tmp_path / "runs.csv").write_text(GOOD)
    code, _, err = call("significance", str(tmp_path / "runs.csv"), "--baseline", "gelu", capsys=capsys)
    assert (code, "has 8 rows; allowed: 7" in err) == (2, True)


@pytest.mark.slow
def test_ten_million_rows_in_four_gigabytes(tmp_path):
    import resource
    import subprocess

    steps, seeds = 50_000, 100  # checkpoints of 200 runs, each reduced to its last
    file = tmp_path / "runs.csv"
    with file.open("w") as out:
        out.write("arm,seed,step,val_nll\n")
        for arm, shift in (("gelu", 0.0), ("x", 0.1)):
            for seed in range(seeds):
                noise = (seed * 7919 % 101) / 1e4 + (seed * 104729 % 97) / 1e5 * (shift > 0)
                out.writelines(f"{arm},{seed},{step},{3 + shift + noise}\n" for step in range(steps))
    words = [sys.executable, "-m", "analysis.significance", str(file), "--baseline", "gelu", "--format", "json"]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout)["comparisons"]
    assert (row["n"], row["verdict"]) == (seeds, "worse")
