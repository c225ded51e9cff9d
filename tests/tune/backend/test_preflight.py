"""Test the checks before Ray starts: what this machine can never grant, its limits, network and temporary folder."""

import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.studies import SMALL, TINY, study_of, yaml_of
from tune.backend import preflight
from tune.backend.inline import Inline
from tune.backend.preflight import check_granted, check_limits, check_loopback, local_slots, temporary_folder, unfit
from tune.backend.ray_backend import RayBackend
from tune.errors import StudyError, StudyStopped


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets the cores and GPUs of this machine."""

    def set_to(cores, gpus=0):
        monkeypatch.setattr(preflight, "usable_cores", lambda: cores)
        monkeypatch.setattr(preflight, "gpus_of_this_machine", lambda: gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return set_to


def asking(**resources):
    return study_of(SMALL, resources=resources)


@pytest.mark.parametrize(
    ("cores", "gpus", "resources", "slots", "said"),
    [
        (
            2,
            0,
            {"gpus": 1},
            None,
            "resources.gpus: a trial asks for 1, and Ray sees no GPUs on this machine: lower",
        ),
        (2, 0, {"gpus": 0.25}, 1, "asks for 0.25, and Ray sees no GPUs"),
        (2, 1, {"gpus": 2}, None, "asks for 2, and Ray sees 1 GPUs on"),
        (2, 0, {"cpus": 8}, None, "resources.cpus: a trial asks for 8 cores, and this machine has 2: lower it, give "),
        (1.5, 0, {"cpus": 2}, None, "asks for 2 cores, and this machine has 1.5"),
    ],
)
def test_what_this_machine_can_never_grant_is_refused(machine, cores, gpus, resources, slots, said):
    machine(cores, gpus)
    with pytest.raises(StudyError, match=said) as caught:
        RayBackend(slots).check(asking(**resources))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cores", "gpus", "resources", "slots"),
    [
        (2, 1, {"gpus": 1}, None),
        (2, 1, {"gpus": 0.5}, None),
        (2, 0, {"cpus": 2}, None),
        (2, 0, {"cpus": 8}, 1),
        (0.5, 0, {}, None),
    ],
)
def test_what_it_can_grant_is_not_refused(machine, cores, gpus, resources, slots):
    machine(cores, gpus)
    check_granted(asking(**resources), slots)


@pytest.mark.parametrize(
    ("cores", "cpus", "slots"), [(0.5, 1, 1), (1.5, 1, 1), (2.0, 1, 2), (3.9, 2, 1), (8.0, 2, 4), (1.0, 8, 1)]
)
def test_slots_are_the_whole_trials_that_fit_on_the_cores(machine, cores, cpus, slots):
    machine(cores)
    assert local_slots(asking(cpus=cpus)) == slots


def test_hidden_gpus_are_named(machine, monkeypatch):
    machine(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StudyError, match=r"Ray sees no GPUs on this machine \(CUDA_VISIBLE_DEVICES=''\)"):
        check_granted(asking(gpus=1), None)


def test_a_cluster_and_a_backend_without_ray_are_not_checked(machine):
    machine(1)
    backends = {"cluster": RayBackend(address="10.0.0.1:6379"), "inline": Inline(), "here": RayBackend()}
    refused = []
    for name, backend in backends.items():
        try:
            backend.check(asking(gpus=4, cpus=64))
        except StudyError:
            refused.append(name)
    assert refused == ["here"]


# --- limits ----------------------------------------------------------------------------------------------------------

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture
def limits(monkeypatch):
    """Return the limits of a fake process, by kind, and unlimited by default."""
    found = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: found.get(kind, UNLIMITED))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: found.update({kind: pair}))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(preflight, "process_limit", lambda: None)
    return found


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (
            resource.RLIMIT_NPROC,
            60,
            r"ulimit -u 60: Ray cannot start with this limit on processes and threads; .* 2 slots",
        ),
        (
            resource.RLIMIT_NOFILE,
            64,
            "ulimit -n 64: Ray cannot start with this limit on open files; it needs about 288 ",
        ),
        (resource.RLIMIT_AS, 3000000 << 10, "ulimit -v 3000000: Ray cannot start with this limit on memory addresses"),
        (resource.RLIMIT_FSIZE, 100 << 10, "ulimit -f 100: Ray cannot start with this limit on the size of a file"),
        (resource.RLIMIT_DATA, 1 << 30, "ulimit -d 1048576: Ray cannot start"),
    ],
)
def test_a_limit_that_is_too_low_is_named_with_its_option(limits, kind, value, said):
    limits[kind] = (value, value)
    with pytest.raises(StudyStopped, match=said) as caught:
        check_limits(2)
    assert str(caught.value).endswith("raise the limit, or --inline trains without Ray")


def test_a_soft_limit_is_raised_as_far_as_needed(limits):
    limits[resource.RLIMIT_NOFILE] = (64, 4096)
    limits[resource.RLIMIT_AS] = (1 << 20, resource.RLIM_INFINITY)
    check_limits(2)
    assert limits[resource.RLIMIT_NOFILE] == (288, 4096)
    assert limits[resource.RLIMIT_AS][0] > 4 << 30


def test_limits_that_suffice_are_left_alone(limits):
    given = {resource.RLIMIT_NOFILE: (1024, 4096)}
    given |= dict.fromkeys((resource.RLIMIT_NPROC, resource.RLIMIT_AS), (1 << 36, 1 << 36))
    limits.update(given)
    check_limits(2)
    assert limits == given
    assert preflight.store_bytes() == preflight.STORE_BYTES  # Ray's default store may not fit


def test_the_processes_of_root_are_not_limited(limits, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    limits[resource.RLIMIT_NPROC] = (60, 60)
    check_limits(2)
    assert preflight.store_bytes() is None


def test_a_containers_limit_of_processes_is_named(limits, monkeypatch):
    monkeypatch.setattr(preflight, "process_limit", lambda: 99)
    with pytest.raises(StudyStopped, match=r"the control group .* allows 99 more processes and threads, and Ray needs"):
        check_limits(2)


def test_a_machine_without_loopback_is_named(monkeypatch):
    check_loopback()  # this machine has one

    def unreachable(*given):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(StudyStopped, match=r"no connection to 127.0.0.1 \(Network is unreachable\): .* loopback"):
        check_loopback()


# --- temporary folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Return a short folder, because the folders of pytest are too long for a socket."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


def test_a_short_folder_is_taken_as_the_user_gave_it(short, monkeypatch):
    said = []
    monkeypatch.setenv("TMPDIR", str(short))
    assert temporary_folder(said.append) == str(short / "ray")
    monkeypatch.setenv("RAY_TMPDIR", str(short / "mine"))  # Ray makes this one
    assert temporary_folder(said.append) == str(short / "mine" / "ray")
    assert said == []


@pytest.mark.parametrize(
    ("name", "make", "cause"),
    [
        ("mit Ü", "folder", "Ray needs a path of ASCII letters"),
        ("x" * 60, "folder", "letters too long for a socket"),
        ("gone", None, "it is not there"),
        ("file", "file", "it is a file"),
    ],
)
def test_another_folder_is_chosen_and_the_variable_named(short, monkeypatch, name, make, cause):
    folder = short / name
    folder.mkdir() if make == "folder" else folder.touch() if make else None
    monkeypatch.setenv("TMPDIR", str(folder))
    said = []
    chosen = temporary_folder(said.append)
    assert chosen in ("/tmp/ray", f"/tmp/ray-{os.getuid()}")
    assert len(said) == 1
    assert said[0].startswith(f"TMPDIR={folder}: Ray cannot use it for its files, because ")
    assert cause in said[0]
    assert said[0].endswith(f"they go to {chosen}")


def test_a_read_only_folder_and_a_full_one_are_not_used(short, monkeypatch):
    assert unfit(short) is None
    assert "it cannot be written" in str(unfit(Path("/proc/sys")))
    monkeypatch.setattr(psutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    assert unfit(short) == "only 1.0 MiB are free there"


def test_no_folder_at_all_is_one_line_that_names_the_variable(short, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    monkeypatch.setattr(preflight, "unfit", lambda folder: "it is bad")
    with pytest.raises(StudyStopped, match=r"^RAY_TMPDIR=/proc/nowhere: .* because it is bad; /tmp, .* cannot be used"):
        temporary_folder(print)


TRY = """
import sys
from tune.cli.main import main
for command in ("sweep", "plan", "try"):
    sys.argv = ["pagating", command, *sys.argv[-3:]]
    try:
        main()
    except SystemExit as ended:
        print(command, ended.code)
"""


def test_the_command_refuses_before_it_writes_anything(tmp_path):
    """A fresh process, as a user has one: what sweep refuses, plan and try refuse."""
    study = tmp_path / "greedy.yaml"
    study.write_text(yaml_of(TINY, resources={"cpus": 512}))
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(study), "--output", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if not line.startswith("greedy: ")]
    assert codes == ["sweep 2", "plan 2", "try 2"]
    said = [line for line in done.stderr.splitlines() if line.startswith("pagating: ")]
    refused = "pagating: resources.cpus: a trial asks for 512 cores, and this machine has "
    assert [line[: len(refused)] for line in said] == [refused] * 3
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
