"""Test the number of usable cores and processes on fake control groups of versions 1 and 2."""

import os

import pytest

from pagating import hardware


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return a function that writes control groups: the process's own paths, and files with their content."""
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(own, **files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


V1 = "4:memory:/x\n1:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8.0),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "50000 50000\n"}, 1.0),
        ("0::/host/path\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "50000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, 0.5),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "200000\n"}, 1.5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8.0),
        ("1:cpu:/\n0::/u\n", {"unified/u/cpu.max": "250000 100000\n"}, 2.5),
        ("", {}, 8.0),
    ],
    ids=[
        "half", "one and a half", "none", "many", "around", "both", "the host's path", "v1", "v1 mount",
        "v1 none", "hybrid", "not in a group",
    ],
)  # fmt: skip
def test_the_smallest_quota_of_all_groups_around_counts(groups, own, files, cores):
    groups(own, **files)
    assert hardware.usable_cores() == cores


def test_no_control_groups_and_fewer_cores_by_affinity(groups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert hardware.usable_cores() == 1.0
    assert hardware.process_limit() is None


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/a\n", {"a/pids.max": "60\n", "a/pids.current": "10\n"}, 50),
        ("0::/a\n", {"a/pids.max": "max\n", "a/pids.current": "10\n"}, None),
        ("3:pids:/a\n", {"pids/a/pids.max": "100\n", "pids/a/pids.current": "7\n", "pids/pids.current": "9\n"}, 93),
        ("3:cpu:/a\n", {"pids/a/pids.max": "100\n", "pids/a/pids.current": "7\n"}, None),
    ],
)
def test_processes_that_a_group_still_allows(groups, own, files, left):
    groups(own, **files)
    assert hardware.process_limit() == left
