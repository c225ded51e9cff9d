"""Test that only this machine reaches its Ray, and that a warning says what it means to open it."""

from pathlib import Path

import pytest
import ray
import ray.autoscaler.sdk

from tune.backend import cluster, ray_start
from tune.backend.ray_start import OPEN, QUIET, started
from tune.cli.screen import Screen
from tune.study.files import load

SMOKE = load(Path(__file__).parents[3] / "configs" / "smoke.yaml")


@pytest.fixture
def no_ray(monkeypatch):
    """Replace the start of Ray by a fake; return the list of its calls."""
    calls = []
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "check_nodes", lambda: None)
    monkeypatch.setattr(cluster, "check_capacity", lambda *given: None)
    monkeypatch.setattr(cluster, "refusal", lambda address: None)
    monkeypatch.setattr(cluster, "client_refusal", lambda place: None)
    monkeypatch.setattr(cluster, "_reach", lambda *given: None)
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: None)
    monkeypatch.setattr(ray_start, "_private_token", lambda: None)
    for name in (OPEN, "RAY_AUTH_MODE", "GLIBC_TUNABLES"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it after the test
        monkeypatch.delenv(name)
    return calls


def test_ray_is_closed_by_default():
    assert QUIET[OPEN] == "0"


@pytest.mark.parametrize("value", [None, "0", "false", "", "yes"])
def test_a_ray_that_listens_on_loopback_says_nothing(no_ray, monkeypatch, value):
    said = []
    if value is not None:
        monkeypatch.setenv(OPEN, value)
    with started(1, SMOKE, None, said.append):
        assert [call["address"] for call in no_ray] == ["local"]
    assert said == []


@pytest.mark.parametrize(
    ("mode", "who"),
    [
        (None, "anyone who reaches its ports and has Ray's token (~/.ray/auth_token, RAY_AUTH_TOKEN)"),
        ("token", "anyone who reaches its ports and has Ray's token (~/.ray/auth_token, RAY_AUTH_TOKEN)"),
        ("disabled", "anyone who reaches its ports, without any token (RAY_AUTH_MODE),"),
    ],
)
@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_a_ray_that_is_opened_says_what_that_means_before_it_starts(no_ray, monkeypatch, value, mode, who):
    monkeypatch.setenv(OPEN, value)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    said = []
    with started(1, SMOKE, None, lambda line: said.append((line, len(no_ray)))):
        pass
    line = f"{OPEN}={value} lets Ray listen to other machines: {who} can run any code here as you; unset it"
    assert said == [(line, 0)]


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://head:10001"])
@pytest.mark.parametrize(("mode", "warned"), [(None, 1), ("disabled", 1), ("token", 0), ("TOKEN", 0)])
def test_a_cluster_without_a_token_is_named(no_ray, monkeypatch, address, mode, warned):
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv(OPEN, "1")  # it concerns only a local Ray, not a cluster
    said = []
    with started(1, SMOKE, address, said.append):
        assert [call["address"] for call in no_ray] == [address]
    assert len(said) == warned
    for line in said:
        assert line.startswith(f"the cluster at '{address}' is reached without a token: anyone else who reaches its")
        assert "RAY_AUTH_MODE=token" in line


def test_a_token_that_ray_found_itself_counts(no_ray, monkeypatch):
    said = []
    monkeypatch.setattr(ray, "init", lambda **settings: monkeypatch.setenv("RAY_AUTH_MODE", "token"))
    with started(1, SMOKE, "auto", said.append):
        pass
    assert said == []


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_user_sees_the_warning(no_ray, monkeypatch, capsys, value):
    monkeypatch.setenv(OPEN, value)
    with started(1, SMOKE, None, Screen().warn):
        pass
    said = capsys.readouterr().err
    assert said.startswith(f"Warning: {OPEN}=1 lets Ray listen to other machines: ") == (value == "1")
    assert said.count("\n") == (value == "1")
