"""Tests of the second form of a study file, for the user's own training."""

import pytest

from tests.own_trainings import named_study, own_study, own_yaml
from tune.decide.ladder import lost
from tune.errors import StudyError
from tune.plan.power import confirm_power
from tune.study.files import dump, parse
from tune.study.own_study import OwnStudy
from tune.study.sizes import scales, steps

COMMAND = "python t.py --lr {lr} --shift {shift} --seed {seed} --steps {budget}"


def test_study_is_read_and_written_again(tmp_path):
    study = own_study(tmp_path)
    assert (study.unit, study.amount, study.sign, study.baseline) == ("steps", 40, 1, "plain")
    assert steps(study) == 40
    assert study.length("short", 40) == 20
    assert study.length("shifted", 40) == 40
    text = dump(study)
    assert all(f"\n{key}:" not in text for key in ("model", "fixed", "corpus", "tokenizer", "task"))
    again = parse(text, "own.yaml")
    assert isinstance(again, OwnStudy)
    assert again == study


def test_an_arm_has_the_values_of_the_arm_that_it_names(tmp_path):
    study = own_study(
        tmp_path,
        nuisance={"decay": {"uniform": [0.0, 0.2]}},
        arms={"shifted": {"set": {"shift": 0.1}, "search": {"beta": {"uniform": [0.5, 0.9]}}}},
    )
    assert study.values("short", {"lr": 0.1}) == {"lr": 0.1, "shift": 0.0}
    assert list(study.space("shifted")) == ["lr", "decay", "beta"]
    assert list(study.space("short")) == ["lr", "decay"]
    assert study.to_read("shifted") == ["shift", "beta"]
    # a name without a meaning of its own stays inside the range that the study names
    assert (scales(study)["decay"].low, scales(study)["decay"].high) == (0.0, 0.2)


def test_a_rung_has_its_sizes_budget_level_and_seeds(tmp_path):
    rows = [{"width": 8, "compute": 1.0, "budget": 20}, {"width": 16, "compute": 4.0, "budget": 40}]
    study = own_study(tmp_path, scales=rows)
    assert parse(dump(study), "own.yaml") == study
    low, high = study.rungs
    assert low.values("short", {"lr": 0.1}) == {"lr": 0.1, "shift": 0.0, "width": 8}
    assert high.to_read("plain") == ["shift", "width"]
    assert [(rung.amount, steps(rung), rung.compute, rung.rung) for rung in (low, high)] == [
        (20, 20, 1.0, 1),
        (40, 40, 4.0, 2),
    ]
    assert high.confirm.level == study.confirm.level / 2
    assert high.seed(3) != low.seed(3) == 3
    assert list(study.at(2, ["shifted"]).arms) == ["plain", "short"]
    assert (study.values("plain", {}), study.scales) == ({"shift": 0.0, "width": 8}, rows)
    assert [rung.compute for rung in own_study(tmp_path, scales=[{"width": 8}, {"width": 16}]).rungs] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"n_layer": 2}}, "model is of the built-in model"),
        ({"fixed": {"tokens": 100}}, "fixed is of the built-in model"),
        ({"corpus": {"source": "builtin"}}, "corpus is of the built-in model"),
        ({"task": "masked"}, "task is of the built-in model"),
        ({"scales": [{"width": 8}, {"depth": 2}]}, "scales: width is missing on rung 2"),
        ({"scales": [{"budget": 8}]}, "scales: its rungs have no size"),
        ({"scales": [{"width": 8, "budget": 0.5}]}, "rung 1: budget 0.5 must be a whole number of steps"),
        ({"scales": [{"width": 8, "compute": -1}]}, "rung 1: compute -1 must be a number above 0"),
        ({"scales": [{"width": n, "compute": 1} for n in (1, 2)]}, "rung 2 has compute 1, the one below 1; order them"),
        ({"scales": [{"shift": 8}]}, "arms.plain.set.shift is in scales too"),
        ({"scales": [{"width": 8}], "stages": ["search", "confirm"]}, "scales needs the stages"),
        ({"scales": [{"width": 8}], "trial": {"command": COMMAND}}, "the command never uses {width}"),
        ({"keep": {"models": "best"}}, "keep.models=best is of the built-in model"),
        ({"arms": {"shifted": {"gate": "tanh", "alpha": 0.5}}}, "gate is of the built-in model"),
        ({"trial": "mine.train"}, "no FILE.py:FUNCTION"),
        ({"metric": None}, "key 'metric' is missing"),
        ({"metric": {"test": "val_loss"}}, "name and test are both 'val_loss'"),
        (
            {"metric": {"name": "seed"}},
            "metric: name 'seed': trial.seed is set by the study; choose another name than lr, arm, ",
        ),
        ({"metric": {"name": "val loss"}}, "name 'val loss': a name is up to 64 letters, digits and _"),
        ({"metric": {"goal": "up"}}, "minimize"),
        ({"budget": {"tokens": 3}}, "one unit and one number"),
        ({"budget": {"steps": 0}}, "from 1 to 10"),
        ({"budget": {"steps": None, "seed": 4}}, "trial.seed is set by the study; choose another name than arm, "),
        ({"budget": 20}, "budget 20 must be one unit and one number, such as {steps: 20}"),
        ({"arms": {"plain": None, "shifted": None, "short": None}}, "arms: has no arm; name two or more"),
        (
            {"nuisance": {"l-r": {"uniform": [0.1, 0.2]}}},
            "nuisance.l-r: a name is up to 64 letters, digits and _, and ",
        ),
        (
            {"nuisance": {"step": {"uniform": [0.1, 0.2]}}},
            "nuisance.step: step is taken; choose another name than arm, ",
        ),
        ({"nuisance": {"lr": None}, "stages": ["search"]}, "nothing is tuned: add confirm to stages"),
        ({"seeds": 5}, "unknown key 'seeds'; seeds is a key of calibrate and of confirm; allowed: name, question, "),
        ({"confirm": {"search": 4}}, "search is a key at the top of the file and of each of arms and of ladder; "),
        ({"colour": 5}, "unknown key 'colour'; allowed: name, question, nuisance, arms, contrasts, "),
        ({"stages": ["confirm"]}, "stages [confirm] is for a study that tunes nothing"),
        ({"stages": ["confirm", "search"]}, "must be search, then calibrate or confirm"),
        ({"nuisance": {"folder": {"uniform": [0.1, 0.2]}}}, "nuisance.folder: trial.folder is set by the study; "),
        ({"nuisance": {"shift": {"uniform": [0.1, 0.2]}}}, "arms.plain.set.shift is in nuisance too"),
        ({"arms": {"shifted": {"set": {"val_loss": 1}}}}, "name of the metric"),
        ({"arms": {"short": {"of": "plian", "budget": 0.5}}}, "no other arm 'plian'; did you mean 'plain'?"),
        ({"arms": {"short": {"of": "shifted"}, "shifted": {"of": "plain"}}}, "shifted has an `of` itself"),
        ({"arms": {"plain": {"baseline": True, "budget": 0.5}}}, "the baseline has the whole budget"),
        ({"arms": {"shifted": {"sets": {"a": 1}}}}, "did you mean 'set'?"),
        ({"trial": {"command": COMMAND.replace("{lr}", "{lrr}")}}, "no value for {lrr}; did you mean {lr}?"),
        ({"trial": {"command": COMMAND.replace("{shift}", "1")}}, "arms.plain: the command never uses {shift}"),
        ({"trial": {"command": COMMAND.replace("{seed}", "1")}}, "has no {seed}"),
        ({"trial": {"command": COMMAND.replace("{budget}", "1")}}, "has no {budget}"),
    ],
)
def test_a_wrong_study_is_refused_in_a_line(changes, said):
    with pytest.raises(StudyError) as refused:
        parse(own_yaml(**changes), "own.yaml")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_splits_of_one_data_set_widen_the_test_and_refuse_looks():
    plain, split, half = (
        parse(own_yaml(resampling=shares), "own.yaml")
        for shares in (None, {"test_share": 0.2, "train_share": 0.6}, {"test_share": 0.2})
    )
    assert [each.overlap for each in (plain, split, half)] == pytest.approx([0.0, 1 / 3, 0.25])
    wide, usual = (confirm_power(each, 0.01, 0.005) for each in (split, plain))
    assert wide["smallest"] == pytest.approx(usual["smallest"] * (1 + 4 / 3) ** 0.5)
    assert wide["power"] < 0.5 * usual["power"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resampling": {"test_share": 0.5, "train_share": 0.6}}, "test_share 0.5 and train_share 0.6 are more than 1"),
        ({"resampling": {"test_share": 0.2}, "confirm": {"reserve": 0.2}}, "known for the paired test and one look"),
        ({"resampling": {"test_share": 0.2}, "confirm": {"test": "welch"}}, "leave out confirm.rule"),
        ({"resampling": {"test_share": 0.2}, "scales": [{"width": 4}, {"width": 8}]}, "leave out scales"),
        ({"resampling": {}}, "resampling.test_share"),
    ],
)
def test_resampling_that_cannot_be_decided_is_refused(changes, said):
    with pytest.raises(StudyError, match=said):
        parse(own_yaml(**changes), "own.yaml")


def test_a_rung_can_be_lost_on_a_metric_that_grows(tmp_path):
    study = named_study(tmp_path)
    worse = {"plain": 0.0, "new": 0.1, "short": 0.2}  # as losses, which lie below zero here
    losses = {(arm, seed): -0.9 + worse[arm] + seed**2 * worse[arm] / 1e6 for arm in worse for seed in range(101, 106)}
    assert lost(study, losses) == {"new", "short"}
