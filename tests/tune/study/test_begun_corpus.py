"""Tests that a started study finds its corpus again."""

import pytest

from pagating.data.corpus import CorpusError, read_meta
from tests.studies import TINY, study_of
from tests.tune.helpers import run_of
from tune.study import inputs
from tune.study.inputs import packed_corpus


@pytest.fixture
def begun(tmp_path, monkeypatch):
    monkeypatch.delenv("PAGATING_CACHE", raising=False)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    study = study_of(TINY, "mine", corpus={"files": {"train": "text.txt"}}, tokenizer={"vocab_size": 260})
    folder = tmp_path / "studies" / "mine"
    folder.mkdir(parents=True)
    corpus = packed_corpus(study, folder.parent, tmp_path)
    run_of(study, folder, corpus).ledger.close()
    return study, folder, corpus


def test_a_study_finds_its_corpus_without_its_text(begun, tmp_path):
    study, folder, corpus = begun
    (tmp_path / "text.txt").unlink()
    assert inputs.begun(study, folder, read_meta(corpus)["digest"]).corpus == corpus


def test_neither_another_corpus_nor_a_damaged_one_is_taken(begun, tmp_path):
    study, folder, corpus = begun
    damaged = corpus.with_name("corpus-000")
    damaged.mkdir()
    (damaged / "corpus.json").write_text("{")
    assert inputs.begun(study, folder, read_meta(corpus)["digest"]).corpus == corpus
    digest = read_meta(corpus)["digest"]
    corpus.rename(tmp_path / "away")
    with pytest.raises(CorpusError, match=r"no file matches 'text.txt'"):
        inputs.begun(study, folder, digest)
