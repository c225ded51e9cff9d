"""Tests on real Ray nodes on one machine. Each has its own address, processes, temporary folder, hostname and cache.

Only the head node sees the repository's packages and the corpus. A link is cut by taking its end down. A node is killed
with all its processes at once. The tests need root, `ip`, `unshare` and `nsenter`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.own_trainings import FUNCTION, own_study
from tests.studies import STEADY, changed, yaml_of
from tune.backend.cluster import WINGS
from tune.backend.inline import Inline
from tune.errors import NODE_LOST
from tune.run import heartbeat, ledger
from tune.sweep import sweep

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
TIMES = ("seconds", "tokens_per_second", "peak_rss_mb", "memory_growth_mb")
STUDY = changed(
    STEADY,
    corpus={"files": {"train": "text.txt"}},
    model={"d_model": 32},
    fixed={"tokens": 102_400},
    arms={"mine": {"gate": "mine.py:hard", "alpha": 0.5}},
    search={"parallel": 2},
    confirm={"seeds": 3},
)
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "a" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # listen to other machines: another test may have said 0
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
INSIDE = """
hostname $NODE; mount --make-rprivate /; mkdir -p /tmp/pgray; mount --bind "$HERE/ray" /tmp/pgray
for hidden in $HIDDEN; do mount --bind "$HERE/nothing" "$hidden"; done
cd "$HERE"; exec "$@"
"""


def needed():
    """Return the reason why this machine cannot have such nodes, or None if it can."""
    for tool in ("ip", "unshare", "nsenter", "pgrep"):
        if shutil.which(tool) is None:
            return f"needs {tool} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    made = subprocess.run(["ip", "netns", "add", f"pg{os.getpid()}"], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    linked = subprocess.run(["ip", "-n", f"pg{os.getpid()}", "link", "add", "br0", "type", "bridge"])
    subprocess.run(["ip", "netns", "del", f"pg{os.getpid()}"], check=True)
    return None if linked.returncode == 0 else "no bridge can be made in a network namespace here"


class Nodes:
    """Nodes 1 (the head), 2, ... on one bridge, with the addresses 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, folder):
        self.folder, self.name, self.running = folder, f"pg{os.getpid()}", {}
        self._ip("netns", "add", f"{self.name}h")
        self._ip("-n", f"{self.name}h", "link", "add", "br0", "type", "bridge")
        self._ip("-n", f"{self.name}h", "link", "set", "br0", "up")

    @staticmethod
    def _ip(*arguments):
        subprocess.run(["ip", *arguments], check=True)

    def start(self, number, hide=True, cpus=1, hidden=()):
        net, here = f"{self.name}-{number}", self.folder / f"node-{number}"
        for name in ("ray", "cache", "nothing"):
            (here / name).mkdir(parents=True)
        self._ip("netns", "add", net)
        self._ip(
            "link", "add", "eth0", "netns", net, "type", "veth", "peer", "name", f"p{number}", "netns", f"{self.name}h"
        )
        self._ip("-n", f"{self.name}h", "link", "set", f"p{number}", "master", "br0", "up")
        self._ip("-n", net, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._ip("-n", net, "link", "set", device, "up")
        role = ["--address", "10.77.0.1:6379"]
        if number == 1:
            role = ["--head", "--port", "6379", "--temp-dir", "/tmp/pgray", "--include-dashboard=false"]
        environment = {"HERE": str(here), "NODE": f"node-{number}", "PAGATING_CACHE": str(here / "cache")}
        environment["HIDDEN"] = " ".join(map(str, [*hidden, *(ROOT / wing for wing in WINGS if hide)]))
        spaces = ["--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        ray = [BIN / "python", BIN / "ray", "start", "--node-ip-address", f"10.77.0.{number}", "--num-cpus", str(cpus)]
        ray += ["--object-store-memory", "100000000", "--block", *role]
        with open(here / "log", "wb") as said:
            self.running[number] = subprocess.Popen(
                ["ip", "netns", "exec", net, "unshare", *spaces, "sh", "-ec", INSIDE, "sh", *ray],
                env={**os.environ, **ENVIRONMENT, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        log = here / "log"
        wait(lambda: "block forever" in log.read_text() or self.running[number].poll() is not None, 120)
        assert self.running[number].poll() is None, log.read_text()

    def command(self, number, *command):
        """Run a command on a node."""
        (first,) = (
            Path(f"/proc/{self.running[number].pid}/task/{self.running[number].pid}/children").read_text().split()
        )
        cache = f"PAGATING_CACHE={self.folder / f'node-{number}' / 'cache'}"
        return ["nsenter", "-t", first, "-n", "-m", "-u", "-p", "env", cache, *map(str, command)]

    def hold(self, number, seconds):
        """Pause a trial on a node in the middle of its training, so that a failure of the node hits a running cell."""
        deadline = time.monotonic() + seconds
        while True:
            training = self._training(number)
            if training:
                subprocess.run(self.command(number, "kill", "-STOP", *training), check=True)
                if self._training(number) == training:  # it has not ended just before
                    return
                subprocess.run(self.command(number, "kill", "-CONT", *training), check=True)
            assert time.monotonic() < deadline, f"no trial trains on node {number}"
            time.sleep(0.05)

    def _training(self, number):
        asked = self.command(number, "pgrep", "-f", r"ray::\w+\.train$")
        return subprocess.run(asked, capture_output=True, text=True).stdout.split()

    def cut(self, number):
        self._ip("-n", f"{self.name}h", "link", "set", f"p{number}", "down")

    def kill(self, number):
        """Kill all processes of a node at once."""
        self.running.pop(number).send_signal(signal.SIGKILL)

    def close(self):
        for number in list(self.running):
            self.running[number].kill()
            self.running.pop(number).wait()
        time.sleep(0.5)
        for path in Path("/run/netns").glob(f"{self.name}[h-]*"):
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", path.name)


def wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


@pytest.fixture
def nodes(tmp_path):
    if why := needed():
        pytest.skip(why)
    made = Nodes(tmp_path)
    try:
        yield made
    finally:
        made.close()


def events(folder, kind):
    path = folder / "ledger.jsonl"
    return [event for event in ledger.read(path) if event["event"] == kind] if path.exists() else []


def lost(folder):
    return [event for event in events(folder, "ended") if event["outcome"] == "failed"]


def finals(folder):
    found = ledger.records(ledger.read(folder / "ledger.jsonl"))
    kept = {key: {k: v for k, v in record.final.items() if k not in TIMES} for key, record in found.items()}
    return {key: (found[key].outcome, found[key].cell.config, final) for key, final in kept.items()}


def write(folder, **changes):
    words = "the quick brown fox jumps over the lazy dog and runs away from all of them"
    (folder / "text.txt").write_text("".join(f"{i * 7919 % 1000} {words}\n" for i in range(4000)))
    (folder / "mine.py").write_text("def hard(x):\n    return (x / 6 + 0.5).clamp(0, 1)\n")
    (folder / "nodes.yaml").write_text(yaml_of(STUDY, **changes))
    return folder / "nodes.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["own-disks", "storage"])
def test_a_study_across_nodes_that_come_and_go_ends_as_on_one_node(nodes, tmp_path, shared):
    config = write(tmp_path, **({"storage": str(tmp_path / "shared")} if shared else {}))
    sweep = [BIN / "python", "-m", "tune.cli", "sweep", config, "--tracking", "none", "--output"]
    nodes.start(1, hide=False)
    nodes.start(2)
    across, alone = tmp_path / "across", tmp_path / "alone"
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = nodes.command(1, *sweep, across, "--address", "10.77.0.1:6379")
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        folder = across / "nodes"

        def until(condition):
            wait(lambda: condition() or running.poll() is not None, 300)
            assert running.poll() is None, running.communicate()

        until(lambda: len(events(folder, "ended")) >= 2)
        shown = subprocess.run(
            [BIN / "python", "-m", "tune.cli", "status", folder], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert "It runs: process " in shown.stdout  # from another terminal, while it runs
        nodes.hold(2, 60)
        nodes.cut(2)
        nodes.start(3, cpus=2)  # joins late, and holds more than the others
        until(lambda: len(lost(folder)) == 1)
        nodes.hold(3, 60)
        until(lambda: (beat := heartbeat.read(folder)) is not None and beat.slots == 3)  # the head's and two of node 3
        nodes.kill(3)
        said, _ = running.communicate(timeout=300)
    assert running.returncode in (0, 1), said
    one = subprocess.run(
        [*sweep, alone, "--slots", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert one.returncode == running.returncode, one.stdout + one.stderr
    assert finals(folder) == finals(alone / "nodes")
    reasons = [event["reason"].partition(":")[0] for event in lost(folder)]
    assert set(reasons) == {NODE_LOST}
    assert 2 <= len(reasons) <= 3  # one of node 2, one or two of node 3
    assert all(finals(folder)[event["cell"]][0] != "failed" for event in lost(folder))  # trained again elsewhere
    assert bool(list((tmp_path / "node-2" / "cache").glob("corpus-*"))) is not shared
    assert not (tmp_path / "shared" / "nodes" / "checkpoints").exists()


@pytest.mark.slow
def test_an_own_training_travels_to_nodes_that_see_none_of_its_files(nodes, tmp_path):
    """Kill the node in a running trial, after both nodes have trained. The losses are those of one process."""
    mine = tmp_path / "mine"
    slower = FUNCTION.replace("        trial.report", "        import time; time.sleep(0.1)\n        trial.report")
    slower = slower.replace("    off =", "    open(__file__ + '.ran', 'w').close()\n    off =")
    study = own_study(mine, slower, confirm={"seeds": 6})
    alone = sweep(study, mine, tmp_path / "alone", Inline())
    nodes.start(1, hide=False)
    nodes.start(2, hidden=[mine])
    command = [BIN / "python", "-m", "tune.cli", "sweep", mine / "own.yaml", "--tracking", "none"]
    command += ["--output", tmp_path / "across", "--address", "10.77.0.1:6379"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    folder, cache = tmp_path / "across/own", tmp_path / "node-2/cache"
    with subprocess.Popen(
        nodes.command(1, *command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        wait(lambda: len(events(folder, "ended")) >= 4 or running.poll() is not None, 120)
        nodes.hold(2, 60)
        nodes.kill(2)
        said, _ = running.communicate(timeout=200)
    assert running.returncode == 0, said
    assert finals(folder) == finals(alone.folder)
    assert {event["reason"].partition(":")[0] for event in lost(folder)} == {NODE_LOST}
    assert sorted(path.name for path in cache.glob("code-*/*.py")) == ["mine.py", "noise.py"]
    assert list(cache.glob("code-*/mine.py.ran"))
    assert not list((tmp_path / "node-1/cache").glob("code-*"))  # on the driver's node it ran where it lies


@pytest.mark.slow
def test_a_driver_that_is_no_node_of_the_cluster_reaches_it_by_rays_client(nodes, tmp_path):
    """Check a driver that shares only the head's network. The head has neither the repository nor the corpus."""
    pytest.importorskip("grpc", reason='needs grpcio: pip install "ray[client]"')
    config = write(tmp_path, fixed={"tokens": 10_240, "batch_tokens": 512}, confirm={"seeds": 2})
    sweep = [BIN / "python", "-m", "tune.cli", "sweep", config, "--tracking", "none", "--output"]
    nodes.start(1)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    outside = ["ip", "netns", "exec", f"{nodes.name}-1", *sweep, tmp_path / "outside"]
    ended = []
    for command in ([*outside, "--address", "ray://10.77.0.1:10001"], [*sweep, tmp_path / "alone", "--slots", "1"]):
        ended.append(subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT))
        assert "verdict" in ended[-1].stdout, ended[-1].stdout + ended[-1].stderr
    assert ended[0].returncode == ended[1].returncode, ended[0].stdout + ended[0].stderr
    assert finals(tmp_path / "outside" / "nodes") == finals(tmp_path / "alone" / "nodes")
    assert list((tmp_path / "node-1" / "cache").glob("corpus-*"))


@pytest.mark.slow
def test_what_no_study_can_run_on_is_said_in_one_line(nodes, tmp_path):
    config = write(tmp_path)
    nodes.start(1, hide=False)
    sweep = [BIN / "python", "-m", "tune.cli", "sweep", config, "--tracking", "none", "--output", tmp_path / "out"]

    def said(address, number=1, **environment):
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            nodes.command(number, *sweep, "--address", address), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "address '10.77.0.1:6380': nothing answers there: Connection refused" in said("10.77.0.1:6380")
    for address in ("10.77.0.1:6379", "ray://10.77.0.1:10001"):
        assert f"address '{address}': it wants a token" in said(address, RAY_AUTH_TOKEN="b" * 64)
