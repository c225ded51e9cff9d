"""Contrasts of a study file: refused in words if they make no sense, and fixed before the first look."""

import pytest

from tests.studies import TINY, changed, study_of
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.run.extend import check_folder
from tune.run.study_run import StudyRun
from tune.study.files import dump
from tune.subject.known import Known

ARMS = {"one": {"gate": "tanh", "alpha": 0.5}, "two": {"gate": "relu", "alpha": 0.5}}
STUDY = changed(TINY, arms=ARMS, fixed={"tokens": 640}, keep={"models": "none"}, stages=["search", "confirm"])
REFUSED = {
    "an unknown arm": ([["one", "tow"]], "contrasts: [one, tow]: there is no arm 'tow'; the arms are gelu, "),
    "the baseline": ([["gelu", "one"]], "contrasts: [gelu, one]: gelu is the baseline, with which every arm is"),
    "one arm": ([["one"]], "contrasts: [one] is no pair; allowed: two arms"),
    "three arms": ([["one", "two", "linear-floor"]], "contrasts: [one, two, linear-floor] is no pair; allowed: two"),
    "an arm with itself": ([["one", "one"]], "contrasts: [one, one]: an arm is not compared with itself"),
    "a pair twice": ([["one", "two"], ["two", "one"]], "contrasts: [two, one] is there twice; name each pair once"),
    "no list of lists": (["one", "two"], "contrasts"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_contrast_that_makes_no_sense_is_refused_in_one_line(given, said):
    with pytest.raises(StudyError) as caught:
        study_of(STUDY, contrasts=given)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_contrasts_need_confirm_seeds():
    with pytest.raises(StudyError, match="contrasts are decided on confirm seeds; add confirm to stages"):
        study_of(STUDY, stages=["search"], contrasts=[["one", "two"]])


def test_contrasts_are_named_before_the_first_look(tmp_path):
    plain, more = study_of(STUDY), study_of(STUDY, contrasts=[["one", "two"]])
    assert more.comparisons == [("gelu", "linear-floor"), ("gelu", "one"), ("gelu", "two"), ("one", "two")]
    run = StudyRun(plain, tmp_path, Known(plain, lambda cell, share: 3.0 + cell.config["lr"] + cell.seed / 1000))
    (tmp_path / "study.yaml").write_text(dump(plain))
    check_folder(more, tmp_path)
    Inline().train(run)
    run.close()
    with pytest.raises(StudyError) as caught:
        check_folder(more, tmp_path)
    assert str(caught.value).removeprefix(f"{tmp_path}: ") == (
        "contrasts was [] and is now [[one, two]]; the family of comparisons is named before the first confirm "
        "trial has ended: undo the change, or give the study another name"
    )
