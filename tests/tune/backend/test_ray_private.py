"""Test the private names of Ray that this project uses. Check them again with another version of Ray."""

import inspect

import pytest
import ray
from ray.train._internal import storage
from ray.tune import run
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment.trial import Trial, _TemporaryTrialState
from ray.util import client

from tune.backend import ray_private

LOOKED_AT = "2.60"  # after checking tune/backend/ray_private.py, raise it together with pins.txt


def test_the_version_is_the_one_that_was_looked_at():
    assert ray.__version__.startswith(f"{LOOKED_AT}.")


def test_the_names_are_there():
    source = inspect.getsource(TuneController.__init__)
    assert "self._actor_cache" in source
    assert "self._trial_to_actor" in source
    assert hasattr(storage, "_get_ray_train_session_dir")
    assert "_remote" in inspect.signature(run).parameters
    assert callable(client.ray.is_connected)
    assert "ray_actor" in inspect.getsource(_TemporaryTrialState)
    assert {"temporary_state", "run_metadata"} <= set(inspect.getsource(Trial).replace("self.", " ").split())


def test_the_variables_that_tune_names_are_the_lists_that_are_emptied(monkeypatch):
    monkeypatch.setattr(class_cache, "DEFAULT_ENV_VARS", {"A": "1"})
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {"B"})
    ray_private.serve_prestarted()
    assert not class_cache.DEFAULT_ENV_VARS
    assert not class_cache.ENV_VARS_TO_PROPAGATE


def test_a_missing_name_fails():
    with pytest.raises(AttributeError):
        _ = storage._no_such_name
