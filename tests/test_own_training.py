"""The benchmark of a user's function."""

import json
from pathlib import Path

import own_training
import pytest

from tests.own_trainings import own_study
from tune.subject.function import release

ROOT = Path(__file__).parents[1]


def test_the_page_says_what_was_measured():
    page = (ROOT / "docs/own-training.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs/own_training.json").read_text(encoding="utf-8"))
    assert f"<!-- own_training: start -->\n{own_training.markdown(found)}\n<!-- own_training: end -->" in page
    for row in found["start"].values():
        assert row["reused"]["median"] < row["fresh"]["median"]
    speed = found["gpt2"]["speed"]
    assert speed["low"] < 1.05
    assert speed["high"] > 0.95


def test_a_trial_is_measured_from_its_start_to_its_result(tmp_path):
    one = own_training.ONE_STEP.format(imported="import time; time.sleep(0.3)")
    arms = {"a": {"baseline": True}, "b": {}, "plain": None, "shifted": None, "short": None}
    study = own_study(tmp_path, one, reuse=True, budget={"steps": 1}, arms=arms)
    subject = own_training.subject_in(tmp_path / "out", study, tmp_path)
    first, second = own_training.whole(subject), own_training.whole(subject)
    release()
    assert first > 0.3 > second
    with pytest.raises(FileExistsError):
        own_training.subject_in(tmp_path / "out", study, tmp_path)
