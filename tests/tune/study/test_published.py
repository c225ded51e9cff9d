"""Tests of the published studies: their plan, dry run, pretrained weights and page."""

import hashlib
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis.io.text import readable
from pagating.data.corpus import read_meta
from tests.studies import SMALL, study_of, with_arm
from tests.tune.helpers import run_of
from tune.errors import StudyError
from tune.plan import dry_run, plan, space, work
from tune.study import weights
from tune.study.files import load
from tune.study.inputs import packed_corpus
from tune.study.trial_spec import trial_spec
from tune.study.weights import local_weights

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def packed_300(tmp_path_factory):
    return plan.stand_in(tmp_path_factory.mktemp("packed"), 300, 1 << 12)


# --- the dry run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_trains_each_arm_as_the_study_would(tmp_path, packed_300, monkeypatch):
    from pagating.train import train

    study = with_arm("{gate: sigmoid, alpha: 0.5, form: projected}")
    monkeypatch.setattr(dry_run, "corpus_of", lambda study, output, base: (packed_300, None))
    (found,) = dry_run.try_arms(study, tmp_path, tmp_path, 3, ["mine"])
    spec = trial_spec(study, "mine", {"lr": 1e-3}, 1, packed_300, test=False)
    rows = list(train(replace(spec, tokens=192, eval_every=1, eval_windows=1)))
    assert found.arm == "mine"
    assert [found.first_nll, found.last_nll] == [rows[0]["train_nll"], rows[2]["train_nll"]]
    assert found.parameters == work.arm_model(study, "mine", 300).parameters
    assert found.peak_mb > 50
    assert found.step_seconds > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_arm_that_cannot_be_trained_says_why(tmp_path, packed_300, monkeypatch):
    study = with_arm("{gate: own.py:mine, alpha: 0.5}")
    monkeypatch.setattr(dry_run, "corpus_of", lambda study, output, base: (packed_300, None))
    (found,) = dry_run.try_arms(study, tmp_path, tmp_path, 1, ["mine"])
    assert "own.py" in found.problem
    assert dry_run.line(found).startswith("mine: ")
    assert "\n" not in found.problem
    with pytest.raises(StudyError, match="--arm other: x has the arms gelu, mine"):
        next(dry_run.try_arms(study, tmp_path, tmp_path, 1, ["other"]))


def test_a_dry_run_may_take_fewer_micro_batches_a_step_and_none_smaller(tmp_path, packed_300):
    study = with_arm("{gate: sigmoid, alpha: 0.5}")
    fixed = study.fixed.model_copy(update={"batch_tokens": 256, "micro_batch_tokens": 64})
    study = study.model_copy(update={"fixed": fixed})
    for given, tokens in ((None, 256), (1, 64), (2, 128), (9, 256)):
        spec = dry_run.shortened(study, "mine", tmp_path, packed_300, 3, given)
        assert (spec.batch_tokens, spec.micro_batch_tokens, spec.tokens) == (tokens, 64, 3 * tokens)


def test_a_line_of_the_dry_run():
    tried = dry_run.Tried("a", 3.5, 3.25, 0.5, 2048.0, 1234567, formula="x * tanh(x)")
    assert dry_run.line(tried) == (
        "a: x * tanh(x); 1,234,567 parameters, train_nll 3.5000 -> 3.2500, 2.0 GiB at the peak, 0.5 s per step"
    )
    assert dry_run.line("a note") == "a note"


# --- the studies -----------------------------------------------------------------------------------------------------

PUBLISHED = sorted((ROOT / "configs" / "published").glob("*.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_study_can_be_planned_before_its_text_is_here(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "corpus_of", lambda study, output, base: (None, "corpus: not on this machine"))
    options = {"slots": 1, "utilisation": 0.3, "effect": "0.5%", "noise": None, "form": "json"}
    found = json.loads(plan.run(path, tmp_path, hours_from="a100", **options))
    assert set(found["models"]) == set(load(path).arms)
    assert found["total"]["cells"][0] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_study_trains_at_its_real_size_where_it_fits(path, tmp_path):
    import psutil

    study = load(path)
    tokens = space.vocabulary(study)
    arm = max(study.arms, key=lambda arm: work.arm_model(study, arm, tokens).parameters)
    model = work.arm_model(study, arm, tokens)
    planned = sum(space.memory_parts(study, model, tokens, 400.0).values())
    if planned > 0.9 * psutil.virtual_memory().available:
        pytest.skip(f"{arm} needs about {readable(planned)}")
    found = [tried for tried in dry_run.try_arms(study, path.parent, tmp_path, 3, [arm]) if not isinstance(tried, str)]
    assert [tried.problem for tried in found] == [None]
    assert found[0].parameters == model.parameters
    assert found[0].first_nll == pytest.approx(math.log(tokens), abs=0.8)  # before training, whatever the text


# --- pretrained weights ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_model(tmp_path_factory):
    """Return a folder with a tokenizer, weights and a text, as downloaded by a user."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("published")
    text = "".join(f"In the beginning was the word number {i * i % 97}.\n" for i in range(3000))
    (folder / "text.txt").write_text(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "gpt2").mkdir()
    tokenizer.save(str(folder / "gpt2" / "tokenizer.json"))
    size = GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_embd=16, n_head=2, n_positions=32)
    torch.manual_seed(1)
    GPT2LMHeadModel(size).save_pretrained(folder / "gpt2")
    return folder


def pretrained_study(n_layer=2):
    return study_of(
        SMALL,
        "pre",
        corpus={"files": {"train": "text.txt"}},
        tokenizer={"vocab_size": None, "path": "gpt2"},
        model={"n_layer": n_layer, "pretrained": "gpt2"},
        arms={"floor": None, "mine": {"gate": "sigmoid", "alpha": 0.5, "form": "projected"}},
    )


def vocab_size(corpus):
    return read_meta(corpus)["vocab_size"]


def test_a_study_finds_its_weights_once_and_its_trials_load_them(published_model, tmp_path):
    study = pretrained_study()
    corpus = packed_corpus(study, tmp_path, published_model)
    found = weights.check_pretrained(study, published_model, tmp_path / "pre", vocab_size(corpus))
    file = published_model / "gpt2" / "model.safetensors"
    assert found == {"path": str(file.resolve()), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (tmp_path / "pre").mkdir()
    spec = trial_spec(study, "gelu", {"lr": 1e-3}, 1, corpus, test=False)
    assert spec.pretrained == "gpt2"
    with pytest.raises(StudyError, match=r"has no pretrained\.json, which names the weights"):
        weights.place_weights(spec, tmp_path / "pre")
    weights.note(found, tmp_path / "pre")
    placed = weights.place_weights(spec, tmp_path / "pre")
    assert placed == replace(spec, pretrained=str(file.resolve()))
    run = run_of(study, tmp_path / "pre", corpus)
    assert run.start(run.next_cell()).trial.pretrained == str(file.resolve())
    assert next(e for e in run.ledger.events if e["event"] == "study")["pretrained"] == found["sha256"]
    run.ledger.close()


def test_weights_that_have_changed_are_refused(published_model, tmp_path):
    study = pretrained_study()
    corpus = packed_corpus(study, tmp_path, published_model)
    (tmp_path / "pre").mkdir()
    weights.note({"path": "elsewhere", "sha256": "0" * 64}, tmp_path / "pre")
    with pytest.raises(StudyError, match="is not the file that the study was begun with"):
        weights.check_pretrained(study, published_model, tmp_path / "pre", vocab_size(corpus))


def test_weights_of_another_size_are_one_line_before_anything_runs(published_model, tmp_path):
    study = pretrained_study(n_layer=3)
    corpus = packed_corpus(study, tmp_path, published_model)
    with pytest.raises(StudyError, match=r"has no 'transformer\.h\.2\.ln_1\.weight', which a GPT-2 of n_layer=3"):
        weights.check_pretrained(study, published_model, tmp_path / "pre", vocab_size(corpus))
    assert weights.check_pretrained(with_arm("{}"), tmp_path, tmp_path / "x", vocab_size(corpus)) is None


def test_weights_need_the_tokenizer_that_they_were_trained_with():
    with pytest.raises(StudyError, match=r"model\.pretrained=gpt2 needs the tokenizer that its weights were trained"):
        with_arm("{}", model={"pretrained": "gpt2"})


def test_a_dry_run_starts_from_the_weights_that_are_here(published_model, tmp_path):
    study = pretrained_study()
    file = published_model / "gpt2" / "model.safetensors"
    assert local_weights(study, published_model, None) == (str(file.resolve()), None)
    none, line = local_weights(study, tmp_path, None)
    assert none is None
    assert "download model.safetensors" in line


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_what_the_plan_counts():
    spec = importlib.util.spec_from_file_location("make_published", ROOT / "docs" / "make_published.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    page = (ROOT / "docs" / "published.md").read_text()
    assert make.page(page) == page, "stale: run `python docs/make_published.py`"
    cells = {line.split("](")[0][3:]: line.split(" | ") for line in page.splitlines() if line.startswith("| [")}
    assert set(cells) == {path.stem for path in PUBLISHED}
    assert (cells["phase1"][1:4], cells["phase2"][1:4]) == (["1", "1", "8.2M"], ["5", "10", "10.2M"])
    assert cells["phase2"][4] == "124M - 350M"  # 351.0M as published, less the positions beyond 128
