"""Faults of processes: killed, hung, interrupted, lost with their node."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from disturbed import Bench, Damage, Place, workers


def worker_killed(bench: Bench, times: int) -> Damage:
    """A trial's worker, by kill -9 at random moments."""
    damage = Damage()
    while damage.times < times:
        place = bench.place("worker")
        running = place.start()
        while running.poll() is None and damage.times < times:
            time.sleep(bench.random.uniform(0.5, 6.0))
            if found := workers(running.pid):
                bench.random.choice(found).kill()
                damage.times += 1
        place.wait(running)
        if running.returncode and damage.times:  # a cell was killed three times before it made progress
            place.sweep()
        bench.compare(place, damage, struck=0)
    return damage


def driver_killed(bench: Bench, times: int) -> Damage:
    """The driver, by kill -9 at random moments, from before Ray starts to the report."""
    damage = Damage()
    while damage.times < times:
        place = bench.place("driver")
        while True:
            running = place.start()
            if damage.times < times:
                try:
                    running.communicate(timeout=bench.random.uniform(0.5, bench.seconds))
                except subprocess.TimeoutExpired:
                    running.kill()
                    damage.times += 1
                    place.wait(running, allowed=(-9,))
                    continue
                place.seconds += time.monotonic() - place._began
                if running.returncode not in (0, 1):
                    raise RuntimeError(f"sweep ended with {running.returncode}")
            else:
                place.wait(running)
            break
        bench.compare(place, damage, struck=0)
    return damage


def _asked(bench: Bench, times: int, kind: str, signals: tuple[int, ...], code: int, group: bool = False) -> Damage:
    damage = Damage()
    longest = 0.0
    for _ in range(times):
        place = bench.place(kind)
        running = bench.begun(place)
        time.sleep(bench.random.uniform(0.0, 1.0))
        began = time.monotonic()
        for number, signum in enumerate(signals):
            time.sleep(0.5 * (number > 0))
            (os.killpg if group else os.kill)(running.pid, signum)
        place.wait(running, allowed=(code,))
        longest = max(longest, time.monotonic() - began)
        place.sweep()
        bench.compare(place, damage)
    damage.notes.append(f"ended within {longest:.1f} s")
    return damage


def ctrl_c(bench: Bench, times: int) -> Damage:
    """Ctrl-C once, as a terminal sends it: to all processes."""
    return _asked(bench, times, "ctrl-c", (signal.SIGINT,), 130, group=True)


def ctrl_c_twice(bench: Bench, times: int) -> Damage:
    """Ctrl-C twice."""
    return _asked(bench, times, "ctrl-c-twice", (signal.SIGINT, signal.SIGINT), 130, group=True)


def terminated(bench: Bench, times: int) -> Damage:
    """SIGTERM to the driver."""
    return _asked(bench, times, "sigterm", (signal.SIGTERM,), 143)


def terminated_with_ray(bench: Bench, times: int) -> Damage:
    """SIGTERM to the driver and all of Ray, as a batch system sends it."""
    return _asked(bench, times, "sigterm-all", (signal.SIGTERM,), 143, group=True)


def worker_hung(bench: Bench, times: int) -> Damage:
    """A worker that hangs (SIGSTOP), with a stall_timeout of 8 s."""
    damage = Damage()
    while damage.times < times:
        place = bench.place("hung", resources={"stall_timeout": 8.0})
        running = place.start()
        for _ in range(min(3, times - damage.times)):
            place.until(running, place.ended() + bench.random.randint(1, 4))
            if found := workers(running.pid):
                found[0].send_signal(signal.SIGSTOP)
                damage.times += 1
        place.wait(running)
        bench.compare(place, damage, struck=0)
    return damage


def node_lost(bench: Bench, times: int) -> Damage:
    """The raylet of one of two nodes, by kill -9."""
    damage = Damage()
    for _ in range(times):
        place = bench.place("node")
        began = time.monotonic()
        faults = str(Path(__file__).with_name("faults.py"))
        seed = str(bench.random.randint(0, 999))
        command = [sys.executable, faults, "--node", str(place.folder), "--seed", seed]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        place.seconds = time.monotonic() - began
        bench.compare(place, damage)
    return damage


def sweep_on_two_nodes(folder: Path, seed: int) -> None:
    """Run the study in its own process on a cluster of two nodes, one of which loses its raylet."""
    import ray
    from ray.cluster_utils import Cluster

    from tune import sweep
    from tune.backend.ray_start import QUIET
    from tune.study.files import load

    os.environ.update(QUIET)
    place = Place(folder)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    moment = random.Random(seed).randint(3, 10)

    def lose() -> None:
        while place.ended() < moment:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    sweep.sweep(load(place.config), folder, place.output, tracking_uri=place.store)
    thread.join(10)
    os._exit(int(thread.is_alive()))  # a node that was not lost proves nothing


def two_sweeps(bench: Bench, times: int) -> Damage:
    """A second sweep of the same study, and another study on the same store, at the same time."""
    damage = Damage(seconds=None)  # two studies share the machine: no measure of time
    for _ in range(times):
        place = bench.place("twice")
        running = place.start()
        place.until(running, 2)
        said = place.refused()
        if f"process {running.pid} on" not in said or said.count("\n") > 2:
            raise RuntimeError(said)
        beside = Place(place.folder / "beside", name="beside", store=place.store)
        beside.sweep()
        place.wait(running)
        bench.compare(place, damage)
        beside.compare(bench.expected, damage, beside.seconds)
    return damage
