"""Tables as other programs and people write them: each says the same, or one line says what to do."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.io.files import TableError
from analysis.io.study import load
from analysis.io.tables.columns import Options
from analysis.verdict.checks import edge_hits

RUNS = [("base", 1, 3.31), ("base", 2, 3.29), ("base", 3, 3.33), ("base", 4, 3.3)]
RUNS += [("mine", 1, 3.27), ("mine", 2, 3.252), ("mine", 3, 3.291), ("mine", 4, 3.258)]
LOSSES = pd.DataFrame(RUNS, columns=["arm", "seed", "loss"]).pivot(index="seed", columns="arm", values="loss")
RECORDS = [{"arm": arm, "seed": seed, "val_loss": loss} for arm, seed, loss in RUNS]


def text(separator: str = ",", head: str = "arm,seed,val_loss", form: str = "{:.3f}", decimal: str = ".") -> str:
    """Return the runs as delimited text; `form` formats a loss, and `decimal` replaces its point."""
    lines = [head.replace(",", separator)]
    lines += [f"{a}{separator}{s}{separator}{form.format(x).replace('.', decimal)}" for a, s, x in RUNS]
    return "\n".join(lines) + "\n"


def losses(path: Path, content: str | bytes, metric: str | None = None, **options: object) -> pd.DataFrame:
    """Return the losses of a table, lower is better."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(path, baseline="base", metric=metric, options=Options(**options)).losses()  # type: ignore[arg-type]


def refused(path: Path, content: str | bytes, metric: str | None = None, **options: object) -> str:
    """Return the error that refuses a table."""
    with pytest.raises(TableError) as error:
        losses(path, content, metric, **options)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


R_TABLE = "arm seed val_loss\n" + "".join(f'"{i}" "{a}" {s} {x}\n' for i, (a, s, x) in enumerate(RUNS, 1))
NESTED = [{"config": {"arm": a, "seed": s}, "summary": {"val_loss": x, "_step": 9}} for a, s, x in RUNS]
LINES = text().splitlines()
SAME: dict[str, str | bytes] = {
    "semicolons": text(";"),
    "decimal commas": text(";", decimal=","),
    "tabs": text("\t"),
    "spaces": text("   "),
    "bars": text("|"),
    "Markdown": "| arm | seed | val_loss |\n|---|--:|--:|\n" + "".join(f"| {a} | {s} | {x} |\n" for a, s, x in RUNS),
    "Excel's first line": "sep=;\r\n" + text(";", decimal=",").replace("\n", "\r\n"),
    "comments": "# of 2026, by me\n#\n" + text() + "# the end\n",
    "a header behind #": "# " + text(),
    "a run behind #": text() + "#base,5,9.9\n",
    "UTF-8 with mark": "\ufeff" + text(),
    "UTF-16": text().encode("utf-16"),
    "UTF-16 without mark": text().encode("utf-16-le"),
    "UTF-32": text().encode("utf-32"),
    "old Mac": text().replace("\n", "\r"),
    "gzip": gzip.compress(text().encode()),
    "blank lines": text().replace("\n", "\n\n"),
    "spaces around": text().replace(",", " , "),
    "a last separator": text().replace("\n", ",\n"),
    "the index of pandas": "\n".join([f",{LINES[0]}", *(f"{i},{line}" for i, line in enumerate(LINES[1:]))]),
    "R": R_TABLE,
    "other case": text(head="Arm,Seed,Val_Loss"),
    "a unit in the header": text(head="arm,seed,val_loss (nats)"),
    "a unit in each cell": text(form="{:.3f} nats"),
    "exponents": text(form="{:.4e}"),
    "quoted names": text().replace("base", '"base"'),
    "spaces behind names": text().replace("mine,2", "mine ,2").replace("mine,3", "mine\u00a0,3"),
    "JSON": json.dumps(RECORDS),
    "JSON lines": "\n".join(map(json.dumps, RECORDS)),
    "JSON, nested": json.dumps(NESTED),
    "JSON, columns": json.dumps({key: [row[key] for row in RECORDS] for key in RECORDS[0]}),
    "JSON in an object": json.dumps({"version": 1, "runs": RECORDS}),
    "JSON of pandas": pd.DataFrame(RECORDS).to_json(),
    "JSON of pandas, split": pd.DataFrame(RECORDS).to_json(orient="split"),
    "one column per arm": "seed,base,mine\n"
    + "".join(f"{s},{b},{m}\n" for s, (b, m) in enumerate(LOSSES.to_numpy(), 1)),
    "one column per seed": "arm,seed1,seed2,seed3,seed4\n"
    + "".join(f"{arm},{','.join(map(str, LOSSES[arm]))}\n" for arm in LOSSES),
    "one row per metric": "arm,seed,metric,value\n"
    + "".join(f"{a},{s},val_loss,{x}\n{a},{s},acc,{x / 10}\n" for a, s, x in RUNS),
    "one row per step": "arm,seed,step,val_loss\n"
    + "".join(f"{a},{s},0,9\n{a},{s},100,{x}\n{a},{s},150,\n" for a, s, x in RUNS),
    "one row per epoch": "arm,seed,epoch,val_loss\n" + "".join(f"{a},{s},1,9\n{a},{s},2,{x}\n" for a, s, x in RUNS),
    "MLflow": "run_id,status,start_time,metrics.val_loss,metrics.train_loss,params.arm,params.seed,params.lr\n"
    + "".join(f"f{i},FINISHED,2026-01-01,{x},1.0,{a},{s},0.1\n" for i, (a, s, x) in enumerate(RUNS)),
    "W&B": "Name,State,Runtime,arm,seed,_step,val_loss\n"
    + "".join(f"r,finished,9,{a},{s},9,{x}\n" for a, s, x in RUNS),
    "W&B, its API": "summary,config,name\n"
    + "".join(f"\"{{'val_loss': {x}, '_step': 9}}\",\"{{'arm': '{a}', 'seed': {s}}}\",r\n" for a, s, x in RUNS),
    "seeds called s1": text()
    .replace(",1,", ",s1,")
    .replace(",2,", ",s2,")
    .replace(",3,", ",s3,")
    .replace(",4,", ",s4,"),
    "JSON in an object alone": json.dumps({"runs": RECORDS}),
    "JSON, one list per arm": json.dumps(
        {arm: [{"seed": s, "val_loss": x} for a, s, x in RUNS if a == arm] for arm in LOSSES}
    ),
    "empty rows of a spreadsheet": text() + ",,\n,,\n",
    "one column per seed, and their mean": "arm,s1,s2,s3,s4,mean,std\n"
    + "".join(f"{arm},{','.join(map(str, LOSSES[arm]))},9,9\n" for arm in LOSSES),
    "a setting that is called like a step": "arm,seed,warmup_steps,env_step,val_loss\n"
    + "".join(f"{a},{s},5,10,9\n{a},{s},5,20,{x}\n" for a, s, x in RUNS),
    "Ray": "val_loss,training_iteration,trial_id,config/arm,config/seed\n"
    + "".join(f"{x},9,t{i},{a},{s}\n" for i, (a, s, x) in enumerate(RUNS)),
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME.keys())
def test_every_way_of_writing_a_table_says_the_same(tmp_path, content):
    pd.testing.assert_frame_equal(losses(tmp_path / "runs.txt", content, "val_loss"), LOSSES, check_dtype=False)


def test_parquet_knows_an_empty_cell_from_a_run_that_diverged(tmp_path):
    file, table = tmp_path / "runs.parquet", pd.DataFrame(RECORDS).to_dict("list")
    pd.DataFrame(RECORDS).astype({"arm": "category"}).to_parquet(file)
    pd.testing.assert_frame_equal(load(file, baseline="base").losses(), LOSSES, check_dtype=False)
    for value, want in ((float("nan"), np.inf), (None, np.nan)):
        table["val_loss"][-1] = value
        pq.write_table(pa.table(table), file)
        np.testing.assert_equal(load(file, baseline="base").losses().loc[4, "mine"], want)


def test_json_knows_an_empty_cell_from_a_run_that_diverged(tmp_path):
    for last, want in (('"val_loss": NaN', np.inf), ('"val_loss": null', np.nan), ('"note": "x"', np.nan)):
        content = json.dumps(RECORDS).replace('"val_loss": 3.258', last)
        np.testing.assert_equal(losses(tmp_path / "x.json", content).loc[4, "mine"], want)


@pytest.mark.parametrize("empty", ["", "NA", "n/a", "null", "None", "-"])
def test_an_empty_cell_is_a_run_that_was_not_made(tmp_path, empty):
    content = text().replace("3.258", empty)
    assert np.isnan(losses(tmp_path / "x.csv", content).loc[4, "mine"])
    study = load(tmp_path / "x.csv", baseline="base")
    assert study.table.not_made == {"mine": [4]}


def test_the_state_of_a_run_decides_what_it_is(tmp_path):
    states = {"crashed": np.nan, "RUNNING": np.nan, "finished": 3.258}
    for state, want in states.items():
        rows = "".join(f"{a},{s},{x},{state if (a, s) == ('mine', 4) else 'finished'}\n" for a, s, x in RUNS)
        np.testing.assert_equal(losses(tmp_path / "x.csv", f"arm,seed,val_loss,State\n{rows}").loc[4, "mine"], want)
    assert "column State has 'PRUNED', a run that was stopped because of its result" in refused(
        tmp_path / "x.csv", f"arm,seed,val_loss,State\n{rows}".replace("finished", "PRUNED")
    )
    for head, words in {
        "run_status": ("finished", "OOM"),
        "status,state": ("ok,finished", "ok,crashed"),
        "failed": ("False", "True"),
        "diverged": ("0", "1"),
    }.items():
        rows = "".join(f"{a},{s},{words[(a, s) == ('mine', 4)]},{x}\n" for a, s, x in RUNS)
        want = np.inf if head == "diverged" else np.nan
        found = losses(tmp_path / "x.csv", f"arm,seed,{head},val_loss\n{rows}", "val_loss")
        np.testing.assert_equal(found.loc[4].to_list(), [3.3, want])
    rows = "".join(f"{a},{s},{x},{'diverged' if s == 4 else 'ok'}\n" for a, s, x in RUNS)
    assert losses(tmp_path / "x.csv", f"arm,seed,val_loss,outcome\n{rows}").loc[4].to_list() == [np.inf, np.inf]


def test_seeds_that_are_names_pair_runs(tmp_path):
    file, big = tmp_path / "x.csv", 2**64

    def seeds(name):
        return "arm,seed,val_loss\n" + "".join(f"{a},{name(s)},{x}\n" for a, s, x in RUNS)

    for name in (lambda s: "abcd"[s - 1], lambda s: big + s, lambda s: f"0x{s}f", lambda s: f"2026-01-0{s}"):
        np.testing.assert_array_equal(losses(file, seeds(name)), LOSSES)
    assert load(file, baseline="base").table.notes == (
        "seeds are names, numbered in the order of the table: 2026-01-01 is 1, 2026-01-02 is 2, 2026-01-03 is 3 "
        "and so on",
    )
    assert list(losses(file, seeds(lambda s: f"seed-{7 * s}")).index) == [7, 14, 21, 28]
    assert load(file, baseline="base").table.notes == ()
    for name, message in {
        (lambda s: f"s{s}" if s < 4 else s): "column seed has '4' and 's1'; allowed: all numbers, or all names",
        (lambda s: "sSab"[s - 1]): "column seed has 's' and 'S'; allowed: one spelling per seed",
        (lambda s: f"s{s}" if s < 4 else ""): "column seed is empty in row 4",
        (lambda s: f"fold {s}"): "column seed numbers folds",
    }.items():
        assert message in refused(file, seeds(name))
    own = "arm,seed,val_loss\n" + "".join(f"{a},{a}-{s},{x}\n" for a, s, x in RUNS)
    assert refused(file, own).endswith("compared by Welch's test: --unpaired")


def test_what_is_no_run_is_not_taken_for_one(tmp_path):
    file = tmp_path / "x.csv"
    for name in ("mean", "diff", "p_value"):
        wide = f"seed,base,mine,{name}\n1,3.3,3.2,0.1\n2,3.4,3.2,0.2\n"
        assert refused(file, wide, "loss").endswith("which ones are? --wide base,mine")
    metrics = "seed,base,base_acc,mine\n1,3.3,0.8,3.2\n2,3.4,0.8,3.2\n"
    assert refused(file, metrics, "loss").endswith(
        "column 'base_acc' seems to be no arm; which ones are? --wide base,mine"
    )
    tasks = "arm,seed,task,value\nbase,1,acc,0.8\nbase,1,loss,3\nmine,1,acc,0.9\nmine,1,loss,2\n"
    assert "'acc', where higher is better, and 'loss', where lower is" in refused(file, tasks, higher_is_better=False)
    settings = "arm,seed,num_epochs,loss\nbase,1,10,3\nbase,1,20,2\nmine,1,10,3\n"
    assert refused(file, settings).endswith("tells them apart: --step num_epochs")
    settings = "arm,seed,lr,loss\nbase,1,0.1,3\nbase,1,0.2,2\nmine,1,0.1,3\n"
    assert refused(file, settings).endswith(
        "with lr 0.1 and 0.2; allowed: one row per run, or the column that tells them apart: --arm, --step or --task lr"
    )
    assert "numbers folds" in refused(file, text(head="arm,fold,val_loss"), unpaired=True)
    assert "is the first line a run?" in refused(file, "base,1,3.3\nbase,2,3.4\n")
    chart = "Step,base - loss,base - loss__MIN,base - loss__MAX\n1,2,3,4\n"
    assert "is a chart of Weights & Biases" in refused(file, chart)


@pytest.mark.parametrize("names", [("None", "NA"), ("null", "nan"), ("001", "01"), ("1.0", "1e3"), ("True", "False")])
def test_names_are_text(tmp_path, names):
    file = tmp_path / "x.csv"
    file.write_text(text().replace("base", names[0]).replace("mine", names[1]))
    assert load(file, baseline=names[0]).arms == list(names)


@pytest.mark.parametrize("name", ["Mine", "MINE", "m ine", "mi\u200bne", "m\u0456ne", "\uff4dine"])
def test_two_spellings_of_a_name_are_refused(tmp_path, name):
    assert "column arm has 'mine' and" in refused(tmp_path / "x.csv", text().replace("mine,2", f"{name},2"))
    tasks = "arm,seed,task,loss\n" + "".join(f"{a},{s},{t},{x}\n" for a, s, x in RUNS for t in ("mine", name))
    assert "column task has 'mine' and" in refused(tmp_path / "x.csv", tasks)


def number(cell: str) -> str:
    """Return a table whose metric, a reward, is `cell` in one run and 1000 more in each other one."""
    return "arm;seed;reward\nbase;1;" + cell + "\nbase;2;2.000,5\nmine;1;3.000,5\nmine;2;4.000,5\n"


def test_thousands_and_units(tmp_path):
    file = tmp_path / "x.csv"
    for cell in ("1.000,5", "1000,5", "1 000,5", "1'000,5", "1000,50", "+1.000,5", "1,0005e3"):
        assert losses(file, number(cell)).loc[1, "base"] == -1000.5, cell
    for cell in ("\u22121.000,5", "-1000,5"):
        assert losses(file, number(cell)).loc[1, "base"] == 1000.5, cell
    percent = "arm,seed,acc\nbase,1,81%\nbase,2,82.5 %\nmine,1,83%\nmine,2,84%\n"
    assert losses(file, percent).loc[2, "base"] == -82.5
    assert load(file, baseline="base").unit == "%"


ADVICE = {
    "no direction": (text(head="arm,seed,quux"), "--higher-is-better or --lower-is-better"),
    "no direction, one column per arm": ("seed,base,mine\n1,2,3\n", "--higher-is-better or --lower-is-better"),
    "no arm": (text(head="method,seed,val_loss"), "--arm method"),
    "no arm in a tracker": (text(head="params.model,seed,val_loss"), "--arm params.model"),
    "no seed": (text(head="arm,random_state,val_loss"), "--seed random_state, or if runs are not pairs: --unpaired"),
    "no pairs": (text().replace("mine,", "mine,9"), "compared by Welch's test: --unpaired"),
    "two metrics": ("arm,seed,acc,loss\nbase,1,2,3\n", "which column is the metric? acc, loss: --metric acc"),
    "two prefixes": ("params.arm,tags.arm,seed,loss\nbase,x,1,2\n", "name one: --arm params.arm"),
    "three digits": (text("\t", decimal=","), "3310 or 3.310? Name the decimal sign: --decimal . or --decimal ,"),
    "tasks": (
        "arm,dataset,seed,loss\n" + "".join(f"{a},{t},{s},{x}\n" for a, s, x in RUNS for t in "uv"),
        "tells them apart: --task dataset",
    ),
    "steps": (
        "arm,tokens,seed,loss\n" + "".join(f"{a},{t},{s},{x}\n" for a, s, x in RUNS for t in (1, 2)),
        "tells them apart: --step tokens",
    ),
    "a spread": (text(form="{:.2f}\u00b10.1"), "because a test needs the single runs"),
    "a spread in brackets": (text(form="{:.2f} (0.10)"), "because a test needs the single runs"),
    "a column that is no arm": ("seed,base,mine,run\n1,2,3,4\n", "which ones are? --wide base,mine"),
    "an unknown outcome": (text(head="arm,seed,val_loss").replace("3.258", "crashed"), "inf or nan: diverged)"),
    "two units": (text(form="{:.3f} s").replace("3.258 s", "3258 ms"), "allowed: one unit in all rows"),
    "shares and percentages": ("arm,seed,acc\nbase,1,0.8\nmine,1,81\n", "all as shares or all as percentages"),
    "two decimal signs": (text(";", decimal=",").replace("3,258", "3.258"), "--decimal . or --decimal ,"),
    "two decimal signs, one of them sure": (text(";").replace("3.258", "3,26"), "--decimal . or --decimal ,"),
    "an arm called #2": (text().replace("mine", "#2"), "comments of another shape, or a name in quotes"),
    "a file that was cut": (text()[:-12], "has 1 cells, the header 3: was the file cut?"),
    "gzip that was cut": (gzip.compress(text().encode())[:-9], "end-of-stream marker was reached"),
    "folds": (text(head="arm,fold,val_loss"), "--resampled SHARE (of the data in a test set) --seed fold"),
    "whole numbers of four digits": (
        "arm;seed;cost\nbase;1;3.310\nbase;2;990\nmine;1;1.000\n",
        "3310 or 3.310? Name the decimal sign: --decimal . or --decimal ,",
    ),
    "a melted table": ("seed,variable,value\n1,base,3\n1,mine,2\n", "--arm variable"),
    "a nested name": (text(head="params.model.arm,seed,val_loss"), "--arm params.model.arm"),
    "train and validation": ("arm,seed,train_loss,val_loss\nbase,1,2,3\n", "--metric val_loss"),
    "only empty cells": (text(form=""), "is empty in every row; allowed: a number per run"),
    "a run that ends early": (str(SAME["one row per step"]).replace("100,3.258", "100,"), "early is not evidence)"),
    "a workbook": (b"PK\x03\x04", ""),
    "an old workbook": (b"\xd0\xcf\x11\xe0", "allowed: CSV, JSON, Parquet or .xlsx (save it as CSV)"),
}


@pytest.mark.parametrize(("content", "end"), ADVICE.values(), ids=ADVICE.keys())
def test_what_cannot_be_known_is_asked_for(tmp_path, content, end):
    assert refused(tmp_path / "runs.csv", content).endswith(end)


def test_what_was_asked_for_is_taken(tmp_path):
    file = tmp_path / "x.csv"
    np.testing.assert_array_equal(losses(file, text(head="arm,seed,quux"), higher_is_better=True), -LOSSES)
    np.testing.assert_array_equal(losses(file, text(head="arm,seed,acc"), higher_is_better=False), LOSSES)
    np.testing.assert_array_equal(losses(file, text("\t", decimal=","), decimal=","), LOSSES)
    np.testing.assert_array_equal(losses(file, text("\t", decimal=","), decimal="."), 1000 * LOSSES)
    np.testing.assert_array_equal(losses(file, text(head="params.model,id,loss"), arm="model", seed="id"), LOSSES)
    wide = "run,note,base,mine\n" + "".join(f"{s},x,{b},{m}\n" for s, (b, m) in enumerate(LOSSES.to_numpy(), 1))
    np.testing.assert_array_equal(losses(file, wide, "loss", wide="base,mine", seed="run"), LOSSES)
    assert refused(file, wide, "loss", wide="base,mne", seed="run").endswith("it has run, note, base, mine")
    assert refused(file, text(head="arm,seed,val_loss"), "val_lss").endswith("--metric val_loss")
    assert refused(file, text(), arm="amr").endswith("--arm arm")


def test_a_spreadsheet(tmp_path):
    file = tmp_path / "runs.xlsx"
    pd.DataFrame(RECORDS).to_excel(file, index=False)
    pd.testing.assert_frame_equal(load(file, baseline="base").losses(), LOSSES, check_dtype=False)
    with pd.ExcelWriter(file) as book:
        for name in ("one", "two"):
            pd.DataFrame(RECORDS).to_excel(book, sheet_name=name, index=False)
    with pytest.raises(TableError, match="has sheets one, two; name one: --sheet 'one'"):
        load(file, baseline="base")
    assert load(file, baseline="base", options=Options(sheet="two")).losses().shape == (4, 2)


def test_a_table_from_standard_input_and_a_guessed_encoding(tmp_path):
    command = [sys.executable, "-m", "analysis.significance", "-", "--baseline", "base", "--format", "json"]
    content = text(head="arm,seed,acc").replace("mine", "caf\u00e9").encode("latin-1")
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["notes"] == ["not UTF-8: read as Windows-1252 (Latin-1)"]
    assert [(row["arm"], row["kind"]) for row in found["comparisons"]] == [("caf\u00e9", "worse")]
    assert found["higher_is_better"] is True


def test_the_bare_table_of_a_study_keeps_the_grids_of_its_hyperparameters_apart(tmp_path):
    rates = {"lr": (1e-3, 2e-3, 4e-3), "corners": (1.4e-3, 8e-3), "weight_decay": (2.6e-3,)}
    rows = [
        {
            "stage": "calibrate",
            "arm": arm,
            "seed": 1,
            "lr": lr,
            "axis": axis,
            "val_nll": 3.0 + lr,
            "config_key": f"{lr}",
        }
        for arm in ("base", "mine")
        for axis, points in rates.items()
        for lr in points
    ]
    rows += [
        {"stage": "confirm", "arm": arm, "seed": 100 + seed, "lr": 4e-3, "val_nll": loss, "config_key": "0.004"}
        for arm, seed, loss in RUNS
    ]
    table = pd.DataFrame(rows)

    def ends(table):
        table.to_csv(tmp_path / "t.csv", index=False)
        return edge_hits(load(tmp_path / "t.csv", baseline="base"))

    assert ends(table) == ["base", "mine"]  # 0.004 is the end of the grid of learning rates
    assert ends(table.drop(columns="axis")) == []  # as if the corners were a part of it
