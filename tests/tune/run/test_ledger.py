import json
import subprocess
import sys
import zlib

import pytest

from tune.errors import LedgerError
from tune.run import tables
from tune.run.ledger import Ledger, read, records
from tune.study.cell import Cell

CONFIG = {"lr": 1e-3}


def fill(path):
    ledger = Ledger(path)
    for seed, outcome in ((1, "completed"), (2, "infeasible"), (3, None)):
        cell = Cell("confirm", "gelu", 0, seed, CONFIG, "k")
        fields = {"stage": "confirm", "arm": "gelu", "index": 0, "seed": seed, "config": CONFIG, "config_key": "k"}
        ledger.append("suggested", cell=cell.key, **fields)
        ledger.append("started", cell=cell.key)
        row = {
            "step": 5,
            "tokens": 50,
            "val_nll": 3.0 + seed,
            "train_nll": 2.5,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "alpha": [0.25, 0.75],
        }
        ledger.append("report", sync=False, cell=cell.key, row=row)
        if outcome:
            final = (
                {"val_nll": 3.0 + seed, "test_nll": 4.0, "alpha": 0.5, "tokens": 50} if outcome == "completed" else {}
            )
            ledger.append(
                "ended", cell=cell.key, outcome=outcome, final=final, reason=None if final else "step 6: loss nan"
            )
    ledger.append("chosen", arm="gelu", config=CONFIG, config_key="k", at_edge=False)
    return ledger


def test_what_was_written_is_read_back(tmp_path):
    ledger = fill(tmp_path / "ledger.jsonl")
    ledger.close()
    assert read(tmp_path / "ledger.jsonl") == ledger.events
    found = records(ledger.events)
    assert [record.outcome for record in found.values()] == ["completed", "infeasible", None]
    assert found["confirm/gelu/k/2"].reason == "step 6: loss nan"
    assert found["confirm/gelu/k/1"].curve[0]["val_nll"] == 4.0


def test_each_line_is_json_with_its_checksum(tmp_path):
    fill(tmp_path / "ledger.jsonl").close()
    for line in (tmp_path / "ledger.jsonl").read_text().splitlines():
        crc = json.loads(line)["crc"]
        body = line.replace(f',"crc":"{crc}"', "")
        assert f"{zlib.crc32(body.encode()):08x}" == crc


def test_a_cut_off_last_line_is_dropped_wherever_it_is_cut(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill(path).close()
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        ledger = Ledger(path)
        count = len(ledger.events)
        ledger.append("stage", n=1)
        ledger.close()
        assert count == len(whole.splitlines()) - 1
        assert read(path)[-1]["event"] == "stage"


def test_every_flipped_bit_in_the_middle_is_found(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill(path).close()
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for position in range(0, first, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(LedgerError, match=r"line 1 is damaged .its checksum does not match"):
            Ledger(path)


def test_the_lock_refuses_a_second_sweep_and_ends_with_the_process(tmp_path):
    path = tmp_path / "ledger.jsonl"
    code = (
        "import sys; from pathlib import Path; from tune.run.ledger import Ledger\n"
        f"ledger = Ledger(Path({str(path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LedgerError, match="another sweep is running this study"):
        Ledger(path)
    holder.kill()
    holder.wait()
    Ledger(path).close()


def test_a_cell_that_starts_again_loses_its_old_curve(tmp_path):
    ledger = fill(tmp_path / "ledger.jsonl")
    ledger.append("started", cell="confirm/gelu/k/3")
    assert records(ledger.events)["confirm/gelu/k/3"].curve == []


def test_tables_hold_a_row_a_cell_that_ended(tmp_path):
    ledger = fill(tmp_path / "ledger.jsonl")
    trials, curves = tables.tables("s", ledger.events)
    assert trials["seed"].tolist() == [1, 2]
    assert trials["outcome"].tolist() == ["completed", "infeasible"]
    assert trials["test_nll"].tolist()[0] == 4.0
    assert trials["test_nll"].isna().tolist() == [False, True]
    assert trials["val_nll"].tolist() == [4.0, 5.0]  # the infeasible one's last evaluation
    assert trials["chosen"].tolist() == [True, True]
    assert trials[["alpha_layer_0", "alpha_layer_1"]].iloc[0].tolist() == [0.25, 0.75]
    assert curves[["seed", "step", "val_nll"]].values.tolist() == [[1, 5, 4.0], [2, 5, 5.0]]


def test_the_table_says_which_path_ran_and_what_a_gpu_did(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    finals = {
        1: {"compiled": 1.0, "peak_gpu_mb": 512.5, "flops_utilisation": 0.25},
        2: {"compiled": 0.0},
        3: {},
    }
    for seed, final in finals.items():
        cell = Cell("confirm", "gelu", 0, seed, CONFIG, "k")
        fields = {"stage": "confirm", "arm": "gelu", "index": 0, "seed": seed, "config": CONFIG, "config_key": "k"}
        ledger.append("suggested", cell=cell.key, **fields)
        ledger.append("ended", cell=cell.key, outcome="completed" if final else "infeasible", final=final, reason=None)
    every, _ = tables.tables("s", ledger.events)
    found = every[["compiled", "peak_gpu_mb", "flops_utilisation"]]
    assert found.iloc[0].tolist() == [1.0, 512.5, 0.25]
    assert found.iloc[1:].fillna(-1).values.tolist() == [[0.0, -1, -1], [-1, -1, -1]]
    on_cpu = [event for event in ledger.events if event["cell"] != "confirm/gelu/k/1"]
    assert not {"peak_gpu_mb", "flops_utilisation"} & set(tables.tables("s", on_cpu)[0].columns)


def test_tables_are_written_whole(tmp_path):
    import pandas as pd

    ledger = fill(tmp_path / "ledger.jsonl")
    tables.write_tables("s", ledger.events, tmp_path)
    expected = tables.tables("s", ledger.events)
    for name, table in zip(("trials", "curves"), expected, strict=True):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), table)
    assert not list(tmp_path.glob(".*.parquet"))
