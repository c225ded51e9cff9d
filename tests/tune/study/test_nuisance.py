"""Which hyperparameters a study may tune in every arm, and what it says about the others."""

import pytest

from tests.studies import SMALL, changed, study_of
from tune.errors import StudyError
from tune.study.trial_spec import trial_spec


@pytest.mark.parametrize(("key", "values"), [("dropout", [0.0, 0.3]), ("initializer_range", [0.02, 0.1])])
def test_a_key_of_the_model_is_tuned_in_each_trial(key, values, tmp_path):
    study = study_of(SMALL, nuisance={key: {"uniform": values}})
    trial = trial_spec(study, "gelu", {"lr": 1e-3, key: 0.05}, 1, tmp_path, False)
    assert trial.model == {**study.model.sizes(), key: 0.05}
    with pytest.raises(StudyError, match=rf"nuisance.{key} has 7.0"):
        study_of(SMALL, nuisance={key: {"choice": [7.0]}})


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("n_layer", "n_layer cannot be tuned: it is a size of the model"),
        ("tokens", "tokens cannot be tuned: it sets the length of a trial"),
        ("nonsense", "'nonsense' is not allowed"),
    ],
)
def test_what_cannot_vary_between_trials_is_refused_in_words(key, why):
    with pytest.raises(StudyError, match=why) as caught:
        study_of(SMALL, nuisance={key: {"choice": [64, 128]}})
    assert "\n" not in str(caught.value)


def test_initial_weights_that_are_given_are_not_tuned():
    with pytest.raises(StudyError, match=r"nuisance.initializer_range has no effect: T5 has its own; leave it out"):
        study_of(
            changed(SMALL, task="span", arms={"mine": None}),
            nuisance={"initializer_range": {"uniform": [0.01, 0.1]}},
        )
