"""Test the start of Ray and its workers: retries, the token, and early imports of a trial's modules."""

import os
import pwd
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tests.studies import SMALL, study_of
from tune.backend import ray_start
from tune.backend.ray_adapters import Session, StopWithinArm
from tune.backend.ray_start import started
from tune.errors import StudyError, StudyStopped
from tune.study.files import load

SMOKE = load(Path(__file__).parents[3] / "configs" / "smoke.yaml")


@pytest.mark.parametrize(
    ("problem", "times", "said"),
    [
        (Exception("The current node timed out during startup."), 2, None),
        (ConnectionError("no answer"), 3, r"Ray did not start \(3 attempts; a busy machine\?\): no answer"),
    ],
)
def test_a_ray_that_does_not_come_up_is_tried_again_then_said_in_a_line(monkeypatch, problem, times, said):
    calls = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def init(**settings):
        assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"  # Ray passes it on to its workers
        calls.append(settings["num_cpus"])
        if len(calls) <= times:
            raise problem

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(StudyStopped, match=said) if said else nullcontext(), started(2, SMOKE, None):
        assert calls == [2, 2, 2]
    assert calls == [2, 2, 2]


@pytest.fixture
def fake_ray(monkeypatch):
    """Replace Ray's `init` and `shutdown` by fakes; return the list of their calls."""
    asked = []
    monkeypatch.setattr(ray, "init", lambda **settings: asked.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_start, "serve_prestarted", lambda: None)
    return asked


def test_what_is_done_beside_the_start_of_ray_does_not_wait_for_it(fake_ray, monkeypatch):
    looked = threading.Event()
    monkeypatch.setattr(ray, "init", lambda **settings: fake_ray.append(looked.wait(60)))
    with started(2, SMOKE, None, beside=looked.set):
        assert fake_ray == [True]  # the other thread had done its part while Ray started
    assert fake_ray == [True, "shutdown"]


def test_what_goes_wrong_beside_the_start_of_ray_ends_that_ray(fake_ray):
    def look():
        raise StudyError("the disk is full")

    with pytest.raises(StudyError, match="the disk is full"), started(2, SMOKE, None, beside=look):
        fake_ray.append("trained")
    assert fake_ray == ["init", "shutdown"]


def test_a_ray_that_is_asked_for_nonsense_is_not_tried_again(monkeypatch):
    calls = []

    def init(**settings):
        calls.append(1)
        raise ValueError("num_cpus must not be negative")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="must not be negative"), started(2, SMOKE, None):
        pass
    assert calls == [1]


@pytest.mark.parametrize(
    ("home", "entry", "given"),
    [
        ("/proc", "/proc", True),
        ("/nowhere", "/nowhere", True),
        ("", "", False),
        (None, "", False),
        (None, "/nowhere", True),
        (None, None, True),
    ],
    ids=["read-only", "not there", "writable", "unset", "unset, not there", "unset, of no known user"],
)
def test_ray_gets_a_token_where_home_cannot_keep_one(tmp_path, monkeypatch, home, entry, given):
    """Set HOME to `home`, and the home in the machine's list of users to `entry`. None: no value, "": writable."""

    def user(uid):
        if entry is None:
            raise KeyError(f"getpwuid(): uid not found: {uid}")
        return SimpleNamespace(pw_dir=entry or str(tmp_path))

    monkeypatch.setattr(pwd, "getpwuid", user)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home or str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    ray_start._private_token()
    assert (len(os.environ.pop("RAY_AUTH_TOKEN", "")) == 64) == given


COLD = {ray_start.PRESTART: "0", **ray_start.GUARDED}  # no early worker; a worker still finds our packages first


@pytest.mark.parametrize(
    ("slots", "resources", "load", "told"),
    [
        (2, {}, True, ray_start.LOADED),
        (2, {}, False, COLD),
        (50, {}, True, COLD),  # more than a search of three arms uses side by side
        (2, {"cpus": 2}, True, COLD),
        (2, {"gpus": 0.5}, True, COLD),
    ],
)
def test_workers_load_what_a_trial_needs_where_each_will_have_one(fake_ray, monkeypatch, slots, resources, load, told):
    names = {*ray_start.LOADED, ray_start.PRESTART}
    monkeypatch.setattr(ray, "init", lambda **settings: fake_ray.append({n: os.environ.get(n) for n in names}))
    with started(slots, study_of(SMALL, resources=resources), None, load=load):
        assert fake_ray == [{name: told.get(name) for name in names}]
    assert not names & set(os.environ)  # another Ray of this process may need other settings


def test_what_the_user_says_of_workers_stays(fake_ray, monkeypatch):
    name = next(iter(ray_start.LOADED))
    monkeypatch.setenv(name, "mine")
    monkeypatch.setattr(ray, "init", lambda **settings: fake_ray.append(os.environ[name]))
    with started(1, SMOKE, None, load=True):
        pass
    assert fake_ray == ["mine", "shutdown"]
    assert os.environ[name] == "mine"


@dataclass(frozen=True)
class Waiting:
    """Fake trial of Tune."""

    trial_id: str
    status: str


@pytest.mark.parametrize(
    ("trials", "starting", "chosen"),
    [
        ({"a": "RUNNING", "b": "PENDING", "c": "PENDING", "d": "PENDING"}, "ab", "c"),
        ({"a": "RUNNING", "b": "PENDING", "c": "PENDING"}, "abc", "b"),  # or its worker, once it is there, had nothing
        ({"a": "PENDING", "b": "PENDING"}, "", "a"),
        ({"a": "RUNNING"}, "a", None),
        ({}, "", None),
    ],
    ids=["another waits", "none waits without", "none starts", "none waits", "none"],
)
def test_a_free_worker_takes_no_trial_whose_own_worker_starts_while_another_waits(trials, starting, chosen):
    live = {name: Waiting(name, status) for name, status in trials.items()}
    controller = SimpleNamespace(
        get_live_trials=live.values, _trial_to_actor={live[name]: object() for name in starting}
    )
    run = SimpleNamespace(study=SMOKE)
    found = StopWithinArm(Session(run, lambda: 2)).choose_trial_to_run(controller)
    assert (found and found.trial_id) == chosen


class Probe:
    """Actor that returns when its process started, and if that process has imported a trial's modules."""

    def process(self) -> tuple[float, bool]:
        return psutil.Process().create_time(), {"tune.backend.ray_trial", "pagating.train"} <= set(sys.modules)


@pytest.mark.slow
def test_an_actor_of_tune_is_a_worker_that_was_started_before():
    with started(1, SMOKE, None, load=True):
        group = ray.util.placement_group([{"CPU": 1}])  # as Tune takes one first: then Ray ends what is idle
        ray.get(group.ready())
        time.sleep(5)
        asked = time.time()
        where = PlacementGroupSchedulingStrategy(group)
        actor = class_cache._ActorClassCache().get(Probe).options(num_cpus=1, scheduling_strategy=where).remote()
        began, loaded = ray.get(actor.process.remote(), timeout=60)
    assert began < asked - 5
    assert loaded
