"""The rungs of a ladder in a study file: their sizes, tokens, levels and seeds, and the files that are refused."""

import pytest

from pagating.model.gpt2 import GPT2
from pagating.model.size import GPT2Size, stock_flops_per_token
from tests.tune.decide.ladders import LADDER, ladder_of
from tune.errors import StudyError
from tune.study.files import dump, parse
from tune.study.ladder import parameters


def refused(text: str) -> str:
    with pytest.raises(StudyError) as error:
        parse(text, "x.yaml")
    return str(error.value)


def test_a_rung_has_its_own_sizes_and_twenty_tokens_per_parameter_in_whole_steps():
    study = ladder_of()
    first, second, third = study.rungs
    assert [(r.model.d_model, r.model.n_layer, r.fixed.batch_tokens) for r in study.rungs] == [
        (16, 1, 2048),
        (32, 2, 4096),
        (64, 2, 8192),
    ]
    for rung in study.rungs:
        size = GPT2Size(study.tokenizer.vocab_size, **rung.model.sizes())
        counted = sum(p.numel() for p in GPT2(size).parameters())
        assert parameters(size) == counted
        assert 20 * counted <= rung.fixed.tokens < 20 * counted + rung.fixed.batch_tokens
        assert rung.fixed.tokens % rung.fixed.batch_tokens == 0
        assert rung.compute == stock_flops_per_token(size) * rung.fixed.tokens
    assert (first.rung, second.rung, third.rung, study.rung) == (1, 2, 3, 0)
    assert [rung.searches("gelu") for rung in study.rungs] == [True, False, False]
    assert all(rung.searches("gelu") for rung in ladder_of(ladder={"search": "every"}).rungs)


def test_the_level_is_shared_and_no_seed_is_in_two_rungs():
    study = ladder_of(confirm={"level": 0.06, "seeds": 100, "first_seed": 10**6})
    assert [rung.confirm.level for rung in study.rungs] == [pytest.approx(0.02)] * 3
    seeds = [{rung.seed(s) for s in (1, 11, 20, *range(10**6, 10**6 + 100))} for rung in study.rungs]
    again = [rung.seed(1) for rung in study.model_copy(update={"replicate": 1}).rungs]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    assert not set(again) & set.union(*seeds)
    assert study.rungs[0].seed(101) == study.seed(101) == 101


def test_the_resolved_file_has_the_tokens_of_each_rung_and_reads_back_the_same():
    study = ladder_of()
    assert parse(dump(study), "x.yaml") == study
    assert [rung.tokens for rung in study.scales] == [rung.fixed.tokens for rung in study.rungs]


@pytest.mark.parametrize(
    ("row", "tokens"),
    [("tokens: 409_600", 409_600), ("steps: 100", 204_800), ("tokens_per_parameter: 2", 45_056)],
)
def test_a_rung_may_set_its_length(row, tokens):
    study = parse(LADDER.replace("{d_model: 16, n_layer: 1}", f"{{d_model: 16, n_layer: 1, {row}}}"), "x.yaml")
    assert study.rungs[0].fixed.tokens == tokens


def test_a_preset_gives_the_sizes_of_a_rung():
    rows = "{preset: gpt2, n_ctx: 128}"
    assert "n_ctx" in refused(LADDER.replace("{d_model: 64, n_layer: 2, batch_tokens: 8192}", rows))
    study = parse(LADDER.replace("{d_model: 64,", "{preset: gpt2, d_model: 72, n_head: 2,"), "x.yaml")
    assert (study.rungs[2].model.d_model, study.rungs[2].model.n_layer) == (72, 2)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("d_model: 32, n_layer: 2", "d_model: 8, n_layer: 1", "rung 2 has"),
        ("d_model: 32", "d_model: 33", "rung 2: d_model=33 is not a multiple of n_head=2"),
        ("d_model: 32", "d_modle: 32", "unknown key 'scales: rung 2.d_modle'; did you mean 'd_model'?"),
        ("d_model: 32", "d_model: wide", "scales: rung 2.d_model: 'wide' is not allowed"),
        ("name: tiny", "name: tiny\nfixed: {tokens: 10_000}", "fixed.tokens=10000 is for a study of one size"),
        ("d_model: 32", "d_model: 32, n_ctx: 64", "rung 2: n_ctx=64: the text"),
        ("d_model: 32", "d_model: 32, tokens: 4096, tokens_per_parameter: 3", "give one of them"),
        ("d_model: 32", "d_model: 32, steps: 9, tokens_per_parameter: 3", "give one of steps"),
        ("name: tiny", "name: tiny\nstages: [search, confirm]", "every size is calibrated"),
        ("name: tiny", "name: tiny\ntask: masked", "give tokens"),
        ("alpha: 0.5", "alpha: {search: {uniform: [0.0, 1.0], per: layer}}", "search: every"),
        ("name: tiny", "name: tiny\nladder: {search: top}", "ladder.search"),
    ],
)
def test_a_bad_ladder_is_refused_in_one_line(old, new, said):
    message = refused(LADDER.replace(old, new, 1))
    assert said in message, message
    assert "\n" not in message
