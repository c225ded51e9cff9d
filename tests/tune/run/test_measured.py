"""Test the tables of the kept models' layers and samples, from the models' folders to the report."""

import json

import pandas as pd
import torch
from tokenizers import ByteLevelBPETokenizer

from analysis.io.study import load
from analysis.report import build
from pagating.data.prepare import prepare
from tests.studies import TINY, changed, study_of
from tests.tune.helpers import run_of
from tune.backend.inline import Inline
from tune.run import ledger, tables
from tune.run.kept.measured import LAYERS, SAMPLES, TABLE, TEXTS, write_measured
from tune.run.kept.models import FACTS, best_cells
from tune.study.cell import Cell, Record
from tune.study.files import dump

torch.set_num_threads(1)
STUDY = changed(
    TINY,
    corpus={"files": {"train": "train.txt"}},
    tokenizer={"vocab_size": 280},
    model={"d_model": 16, "n_layer": 2},
    arms={"mine": {"gate": "sigmoid", "alpha": 0.5}},
    search={"trials_per_arm": 1},
    confirm={"seeds": 2},
)


def ended(arm, seed, loss, outcome="completed"):
    final = {"val_nll": loss, "test_nll": loss, "steps": 8}
    return Record(Cell("confirm", arm, 0, seed, {"lr": 1e-3}, "key"), outcome=outcome, final=final)


def keep(folder, record, text):
    """Write the description of a kept model and its layers."""
    place = folder / "models" / record.cell.arm
    place.mkdir(parents=True)
    (place / FACTS).write_text(json.dumps({"final": record.final, "cell": record.cell.key}))
    (place / LAYERS).write_text(text)


def test_only_measured_models_of_best_cells_have_rows(tmp_path):
    given = study_of(STUDY, "why", arms={"old": {"gate": "sigmoid", "alpha": 0.25}})
    best, bad, old = ended("gelu", 101, 3.0), ended("mine", 101, 3.1), ended("old", 101, 3.2)
    keep(tmp_path, best, json.dumps([{"layer": 0, "openness": 0.5}, {"layer": 1, "openness": None}]))
    keep(tmp_path, bad, "[{")
    keep(tmp_path, old, json.dumps([{"layer": 0, "openness": 0.7}]))
    diverged = ended("linear-floor", 101, 3.3, "infeasible")
    write_measured(given, tmp_path, [best, bad, ended("old", 102, 3.1), diverged])
    found = pd.read_parquet(tmp_path / TABLE)
    assert found[["arm", "seed", "layer"]].values.tolist() == [["gelu", 101, 0], ["gelu", 101, 1]]
    assert found["openness"].tolist()[0] == 0.5
    assert found["openness"].isna().tolist() == [False, True]
    write_measured(given, tmp_path, [diverged])
    assert not (tmp_path / TABLE).exists()


def test_tokens_become_text_also_if_they_cut_a_character_in_two(tmp_path):
    given, best = study_of(STUDY, "why"), ended("gelu", 101, 3.0)
    keep(tmp_path, best, "[]")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["ab"], vocab_size=256, show_progress=False)
    tokenizer.save(str(tmp_path / "models" / "gelu" / "tokenizer.json"))
    # a character per byte, as such a tokenizer has them: Ã© is an é, Ġ a space, Ċ a line end
    signs = {"prompt": "cafÃ", "text": "©!", "greedy": "ÿþĀĠokĊ", "sampled": "â"}
    row = {name: [tokenizer.token_to_id(sign) for sign in content] for name, content in signs.items()}
    file = tmp_path / "models" / "gelu" / SAMPLES
    file.write_text(json.dumps([row]))
    write_measured(given, tmp_path, [best])
    found = pd.read_parquet(tmp_path / TEXTS).iloc[0]
    assert found[["arm", "seed", "prompt"]].tolist() == ["gelu", 101, 0]
    texts = ["caf", "é!", "� ok\n", "�"]
    assert found[["beginning", "text", "greedy", "sampled"]].tolist() == texts
    for wrong in ({"prompt": [1]}, {**row, "text": "abc"}, {**row, "text": [-1]}, {**row, "more": [1]}):
        file.write_text(json.dumps([wrong]))
        write_measured(given, tmp_path, [best])
        assert not (tmp_path / TEXTS).exists()


def test_a_study_says_why_in_its_report(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"{i * 7919 % 1000} the quick brown fox jumps\n" for i in range(2000)))
    given, folder = study_of(STUDY, "why"), tmp_path / "why"
    source = given.corpus.model_dump(exclude_none=True)
    corpus = prepare(source, given.tokenizer.model_dump(), given.model.n_ctx, tmp_path / "cache", tmp_path)
    folder.mkdir()
    (folder / "study.yaml").write_text(dump(given))
    run = run_of(given, folder, corpus)
    Inline().train(run)
    run.close()
    events = ledger.read(folder / "ledger.jsonl")
    tables.write_tables("why", events, folder)
    write_measured(given, folder, ledger.records(events).values())
    found = pd.read_parquet(folder / TABLE)
    best = best_cells(given, ledger.records(events).values())
    assert found.groupby("arm")["seed"].first().to_dict() == {arm: one.cell.seed for arm, one in best.items()}
    assert found.groupby("arm").size().to_dict() == {"gelu": 2, "linear-floor": 2, "mine": 2}
    floor = found[found["arm"] == "linear-floor"]
    assert floor["openness"].round(6).tolist() == [1.0, 1.0]
    assert floor["gradient_passed"].round(6).tolist() == [1.0, 1.0]
    mine, gelu = (found[found["arm"] == arm] for arm in ("mine", "gelu"))
    assert (mine["openness"].to_numpy() > gelu["openness"].to_numpy()).all()  # 0.5 sigmoid(x) + 0.5 passes more
    assert load(folder).layers["width"].tolist() == [64] * 6
    texts = pd.read_parquet(folder / TEXTS)
    assert texts.groupby("arm").size().to_dict() == {"gelu": 3, "linear-floor": 3, "mine": 3}
    assert texts.groupby("prompt")["beginning"].nunique().tolist() == [1, 1, 1]
    assert texts["text"].str.contains("quick|brown|jumps").any()
    build.build(folder)
    page = (folder / "report.html").read_text()
    assert "What the activations do" in page
    assert "Mean share of its input that the activation lets through: gelu 0." in page
    assert "What the models write" in page
    assert pd.read_csv(folder / "tables" / "why.csv")["arm"].tolist() == ["gelu", "linear-floor", "mine"]
    assert len(pd.read_csv(folder / "tables" / "layers.csv")) == 6
