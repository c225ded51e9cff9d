"""Test how a study counts slots, requests them and sends data, without a cluster. test_nodes.py has a real one."""

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray
import ray.autoscaler.sdk

from tests.studies import FROM_A_FILE, changed, study_of
from tests.tune.helpers import run_of
from tune import sweep
from tune.backend import cluster, ray_backend
from tune.backend.cluster import Capacity, ask_for, check_capacity, check_nodes, slots_of
from tune.backend.ray_faults import failure
from tune.backend.ray_private import client_refusal
from tune.errors import NODE_LOST, StudyError
from tune.run import extend
from tune.run.retries import NODES_LOST
from tune.study.addresses import check_address
from tune.study.sizes import side_by_side
from tune.study.trial_spec import trial_spec

STUDY = changed(
    FROM_A_FILE,
    search={"trials_per_arm": 4, "parallel": 3},
    calibrate={"points": 5, "seeds": 2, "max_points": None},
    confirm={"seeds": 7},
)


def study(**changes):
    return study_of(STUDY, "cluster", **changes)


# --- addresses and keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.example.org:1", "ray://head:65535", "[::1]:6379"])
def test_an_address_of_a_cluster_is_taken(address):
    assert check_address(address) == address
    assert study(address=address).address == address


def answering(answer):
    """Return the port of a server that reads once, sends `answer` and closes, or that stays silent for None."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = server.accept()
        connection.recv(100)
        if answer is None:
            time.sleep(1)
        else:
            connection.sendall(answer)
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.0 400 Bad request syntax\r\n\r\n", "what answers there is no Ray cluster"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what answers there is no Ray cluster"),
        (b"", "what answers there is no Ray cluster"),
        (None, "nothing answers there within 0 s"),
    ],
    ids=["HTTP", "SSH", "closed", "silent"],
)
def test_a_port_where_something_else_answers_is_named_at_once(monkeypatch, answer, said):
    monkeypatch.setattr(cluster, "REACH_SECONDS", 0.3)
    with pytest.raises(StudyError, match=f"^address 'x:1': {said}$"):
        cluster._reach("x:1", "127.0.0.1", answering(answer))


def test_a_port_where_a_grpc_server_answers_is_taken():
    grpc = pytest.importorskip("grpc", reason='needs grpcio: pip install "ray[client]"')
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        cluster._reach("x:1", "127.0.0.1", port)
        assert "no Ray client server answers there" in str(client_refusal(f"127.0.0.1:{port}"))
    finally:
        server.stop(None)


@pytest.mark.parametrize("address", ["", "local", "head:0", "head:65536", "http://head:1", "ray://head", "a b:1"])
def test_anything_else_is_refused_with_what_is_allowed(address):
    with pytest.raises(
        StudyError, match=r"is not an address of a Ray cluster; allowed: auto, HOST:PORT, ray://HOST:PORT"
    ):
        check_address(address)
    with pytest.raises(StudyError, match=r"cluster.yaml: address: .*allowed: auto, HOST:PORT"):
        study(address=address)


def test_storage_is_an_absolute_path_and_gpus_a_share_or_whole():
    assert study(storage="/mnt/shared").storage == "/mnt/shared"
    with pytest.raises(StudyError, match=r"storage 'shared' is not an absolute path"):
        study(storage="shared")
    for url in ("s3://bucket/pagating", "file:///mnt/shared"):
        with pytest.raises(StudyError, match=rf"storage '{url}' is a URL, where tokens cannot be mapped nor"):
            study(storage=url)
    assert study(resources={"gpus": 0.25}).resources.gpus == 0.25
    with pytest.raises(StudyError, match=r"gpus=1.5: a trial takes a share of one GPU"):
        study(resources={"gpus": 1.5})
    with pytest.raises(StudyError, match=r"gpus=1e-09: the smallest share of a GPU is 0.0001"):
        study(resources={"gpus": 1e-9})
    assert study(resources={"gpus": 1e-4}).resources.gpus == 1e-4


def test_a_trial_with_a_gpu_trains_on_it(packed):
    for gpus, device in ((0.0, "cpu"), (0.25, "cuda"), (1.0, "cuda")):
        it = study(resources={"gpus": gpus})
        assert trial_spec(it, "gelu", {"lr": 1e-3}, 1, packed, test=False).device == device


def test_where_trials_run_may_change_within_a_study(tmp_path):
    (tmp_path / "study.yaml").write_text(sweep.dump(study()))
    extend.check_folder(study(address="auto", storage="/mnt/shared"), tmp_path)
    with pytest.raises(StudyError, match=r"resources.cpus was 1 and is now 2; the study has trials of"):
        extend.check_folder(study(address="auto", resources={"cpus": 2}), tmp_path)


# --- slots -----------------------------------------------------------------------------------------------------------


def node(alive=True, **resources):
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("cpus", "gpus", "slots"),
    [
        (1, 0.0, 4 + 7 + 2),  # the dead node counts nothing
        (3, 0.0, 1 + 2 + 0),  # a trial is on one node: the 13 cores together would hold 4
        (1, 1.0, 0 + 4 + 1),
        (1, 0.25, 0 + 7 + 2),  # 16 and 4 shares, but 7 and 2 cores
        (1, 0.4, 0 + 7 + 2),  # two shares of 0.4 on each GPU
        (1, 2.0, 0 + 2 + 0),
    ],
)
def test_slots_are_what_single_nodes_hold(cpus, gpus, slots):
    nodes = [node(CPU=4.0), node(CPU=7.0, GPU=4.0), node(CPU=2.0, GPU=1.0), node(alive=False, CPU=64.0, GPU=8.0)]
    assert slots_of(nodes, cpus, gpus) == slots


def test_a_share_of_a_gpu_lies_on_one_gpu():
    assert slots_of([node(CPU=64.0, GPU=3.0)], 1, 0.4) == 6  # not floor(3 / 0.4) = 7
    assert slots_of([node(CPU=64.0, GPU=1.0)], 1, 0.1) == 10


def test_capacity_follows_the_nodes_and_looks_once_a_second():
    nodes, now, looked = [node(CPU=2.0)], [0.0], []
    room = Capacity(None, 1, 0.0, lambda: looked.append(now[0]) or nodes, clock=lambda: now[0])
    assert room() == 2
    nodes.append(node(CPU=3.0))
    now[0] = 0.9
    assert room() == 2
    now[0] = 1.0
    assert room() == 5
    nodes[0]["Alive"] = False
    now[0] = 2.5
    assert room() == 3
    assert looked == [0.0, 1.0, 2.5]
    assert Capacity(9, 1, 0.0, lambda: [])() == 9  # the user's number


@pytest.mark.parametrize(
    ("nodes", "grows", "resources", "said"),
    [
        ([node(CPU=4.0)], False, {"gpus": 1}, "resources.gpus: a trial asks for 1 cores and 1 GPUs of one node"),
        ([node(CPU=4.0), node(CPU=2.0)], False, {"cpus": 6}, "the largest of the cluster at 'x:1' has 4 cores: lower"),
        ([node(CPU=4.0), node(CPU=8.0, alive=False)], False, {"cpus": 6}, "has 4 cores: lower it, or start a larger"),
        ([node(CPU=4.0), node(CPU=1.0, GPU=1.0)], False, {"cpus": 2, "gpus": 1}, "resources.cpus: "),
    ],
    ids=["gpu", "cores of two nodes", "a lost node", "not on one node"],
)
def test_what_no_node_of_a_cluster_holds_is_refused(monkeypatch, nodes, grows, resources, said):
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "is_outside_the_cluster", lambda: not grows)
    with pytest.raises(StudyError) as caught:
        check_capacity("x:1", study(resources=resources), lambda line: None)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "grows", "resources", "said"),
    [
        ([node(CPU=4.0)], True, {"gpus": 1}, ["one that the autoscaler adds, up to 30 min"]),
        ([node(CPU=4.0)], True, {"cpus": 8}, ["one that the autoscaler adds, up to 30 min"]),
        ([node()], False, {}, ["one that joins, up to 30 min"]),
        ([node(CPU=4.0)], False, {"cpus": 4}, []),
        ([node(CPU=4.0, GPU=1.0)], False, {"gpus": 0.5}, []),
    ],
)
def test_a_cluster_that_may_grow_says_what_it_waits_for(monkeypatch, nodes, grows, resources, said):
    found = []
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "is_outside_the_cluster", lambda: False)
    monkeypatch.setattr(cluster, "may_grow", lambda address: grows)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="x:1"))
    check_capacity("x:1", study(resources=resources), found.append)
    assert [line.rpartition("waits for ")[2] for line in found] == said


def test_what_a_stage_can_use_at_a_time():
    assert [side_by_side(study(), stage) for stage in ("search", "calibrate", "confirm", "done")] == [6, 20, 14, 0]


# --- requests to the autoscaler --------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Return a list of requests to Ray's autoscaler, and a list that puts the driver outside (ray://) if not empty."""
    found, outside = [], []
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: found.append(bundles))
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: bool(outside))
    return found, outside


def test_the_autoscaler_is_asked_for_one_bundle_a_trial_and_none_takes_the_wish_back(asked):
    found, _ = asked
    ask_for(study(resources={"cpus": 2}), 3)
    ask_for(study(resources={"cpus": 2, "gpus": 0.25}), 2)
    ask_for(study(), 0)
    assert found == [[{"CPU": 2}] * 3, [{"CPU": 2, "GPU": 0.25}] * 2, []]


def test_a_driver_outside_the_cluster_asks_for_nothing(asked):
    found, outside = asked
    outside.append(True)
    ask_for(study(), 3)
    assert found == []


@pytest.mark.parametrize(("slots", "wishes"), [(None, [6, 20, 14, 0]), (8, [6, 8, 8, 0])])
def test_each_stage_wishes_for_what_it_can_use_and_no_more_than_the_users_slots(asked, packed, tmp_path, slots, wishes):
    it = run_of(study(), tmp_path, packed)
    for stage in ("search", "calibrate", "confirm", "done"):
        ray_backend._request_slots(it.study, slots, stage)
    it.ledger.close()
    assert [len(bundles) for bundles in asked[0]] == wishes
    assert all(bundle == {"CPU": 1} for bundles in asked[0] for bundle in bundles)


# --- versions on the nodes -------------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """Return a dict of each node's answer to a request for its versions. An exception in it is raised."""
    given = {}

    class Asks:
        def __init__(self, function):
            self.function, self.node = function, None

        def options(self, scheduling_strategy):
            assert scheduling_strategy.soft is False  # that node or none
            self.node = scheduling_strategy.node_id.lstrip("0")
            return self

        def remote(self):
            return self.node

    def get(node, timeout):
        if isinstance(given[node], Exception):
            raise given[node]
        return given[node]

    def nodes():
        return [
            {"NodeID": name.zfill(56), "Alive": name != "gone", "NodeManagerAddress": f"10.0.0.{name}"}
            for name in given
        ]

    monkeypatch.setattr(ray, "remote", lambda **options: Asks)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "nodes", nodes)
    return given


def test_nodes_with_the_drivers_versions_are_taken_and_those_that_left_are_not_asked(answers):
    mine = cluster.versions()
    answers |= {"1": mine, "gone": {"python": "2.7"}, "2": mine}
    answers |= {"3": ray.exceptions.NodeDiedError("it went"), "4": ray.exceptions.TaskUnschedulableError("no node")}
    check_nodes()


@pytest.mark.parametrize("name", ["python", *cluster.SAME])
def test_a_node_of_another_version_is_refused_with_both(answers, name):
    mine = cluster.versions()
    answers |= {"1": mine, "2": {**mine, name: "0.1"}}
    said = rf"node 10\.0\.0\.2 has {name} 0\.1; a study needs the same everywhere, as here: .*{re.escape(mine[name])}"
    with pytest.raises(StudyError, match=said):
        check_nodes()


def test_a_node_that_lacks_what_a_study_imports_is_named(answers):
    answers |= {"7": ray.exceptions.RuntimeEnvSetupError("first line\nNo module named 'tokenizers'")}
    said = r"node 10.0.0.7 cannot run the study: No module named 'tokenizers'; every node needs the packages"
    with pytest.raises(StudyError, match=said):
        check_nodes()


# --- lost nodes ------------------------------------------------------------------------------------------------------


def test_a_lost_node_is_told_from_a_dead_worker():
    died = "ActorDiedError: it died.\n\tThe actor died because its node has died. Node Id: 5f\n\tIt was terminated."
    assert failure(died) == ("failed", {}, f"{NODE_LOST}: It was terminated.")
    broke = ray.exceptions.ActorUnavailableError("RPC error: recvmsg:Connection reset by peer rpc_code: 14", None)
    assert failure(str(broke)) == ("failed", {}, f"{NODE_LOST}: {broke}")
    assert failure("ActorDiedError: The actor died.\n\tThe worker went away")[2] == "The worker went away"


def test_a_lost_node_counts_against_no_attempt_of_the_cell(packed, tmp_path):
    it = run_of(study(), tmp_path, packed)
    cell = it.next_cell()
    for _ in range(NODES_LOST - 1):
        it.start(cell)
        it.end(cell, "failed", {}, f"{NODE_LOST}: as spot machines are")
        assert it.next_cell() == cell
    it.start(cell)
    it.end(cell, "failed", {}, "its worker died: once")  # this does not count as an attempt
    assert it.next_cell() == cell
    it.start(cell)
    it.cell_heartbeat(cell, 0.5)
    it.end(cell, "failed", {}, f"{NODE_LOST}: again")  # more progress than before resets both counts
    assert it.next_cell() == cell
    for _ in range(NODES_LOST - 1):
        it.start(cell)
        it.end(cell, "failed", {}, f"{NODE_LOST}: for ever")
        following = it.next_cell()
    assert following != cell
    assert it.records[cell.key].outcome == "failed"
