"""Every fault against a real small study: what is lost, doubled or different afterwards, and what it costs in time.

python benchmarks/faults.py [--only FAULT ...] [--times N] [--quick] [--write docs/reliability.md]

Real Ray, a real MLflow server, real processes ended at random moments (seeded). Each fault is followed by the same
command again until the study is finished, then ledger, tables and MLflow are compared with an undisturbed run. Results
are kept after each fault, in docs/reliability.json, and `--write` puts the table between the markers of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine
from disturbed import ROOT, Damage, Place, workers
from unreliable import Proxy, Server

KEPT = ROOT / "docs" / "reliability.json"
START, END = "<!-- faults: start -->", "<!-- faults: end -->"


class Bench:
    """The undisturbed run that all others are compared with, and the generator of random moments."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self._number = 0
        first = self.place("undisturbed")
        first.sweep()
        self.expected, self.seconds = first.cells(), first.seconds
        print(f"undisturbed: {len(self.expected)} cells in {self.seconds:.1f} s", flush=True)

    def place(self, kind: str, **settings: Any) -> Place:
        """A fresh place for a study."""
        self._number += 1
        return Place(self.folder / f"{kind}-{self._number}", **settings)

    def compare(self, place: Place, damage: Damage, store: str | None = None) -> None:
        """Hold a finished study against the undisturbed one."""
        place.compare(self.expected, damage, self.seconds, store)


# --- processes -------------------------------------------------------------------------------------------------------


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
        bench.compare(place, damage)
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
        bench.compare(place, damage)
    return damage


def _asked(bench: Bench, times: int, kind: str, signals: tuple[int, ...], code: int, group: bool = False) -> Damage:
    damage = Damage()
    longest = 0.0
    for _ in range(times):
        place = bench.place(kind)
        running = place.start()
        place.until(running, bench.random.randint(1, len(bench.expected) - 4))
        time.sleep(bench.random.uniform(0.0, 1.0))
        began = time.monotonic()
        for number, signum in enumerate(signals):
            time.sleep(0.5 * (number > 0))
            (os.killpg if group else os.kill)(running.pid, signum)
        place.wait(running, allowed=(code,))
        longest = max(longest, time.monotonic() - began)
        damage.times += 1
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
        bench.compare(place, damage)
    return damage


def node_lost(bench: Bench, times: int) -> Damage:
    """The raylet of one of two nodes, by kill -9."""
    damage = Damage()
    for _ in range(times):
        place = bench.place("node")
        began = time.monotonic()
        command = [sys.executable, __file__, "--node", str(place.folder), "--seed", str(bench.random.randint(0, 999))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        place.seconds = time.monotonic() - began
        damage.times += 1
        bench.compare(place, damage)
    return damage


def _sweep_on_two_nodes(folder: Path, seed: int) -> None:
    """Inside a process of its own: the study on a cluster of two nodes, one of which loses its raylet."""
    import threading

    import ray
    from ray.cluster_utils import Cluster

    from tune import runner
    from tune.ray_part import QUIET
    from tune.study import load

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
    runner.sweep(load(place.config), folder, place.output, tracking_uri=place.store)
    thread.join(10)
    os._exit(int(thread.is_alive()))  # a node that was not lost proves nothing


def two_sweeps(bench: Bench, times: int) -> Damage:
    """A second sweep of the same study, and another study on the same store, at the same time."""
    damage = Damage()
    for _ in range(times):
        place = bench.place("twice")
        running = place.start()
        place.until(running, 2)
        said = place.run(
            "sweep", str(place.config), "--output", str(place.output), "--tracking", place.store, allowed=(2,)
        )
        if f"process {running.pid} on" not in said or said.count("\n") > 2:
            raise RuntimeError(said)
        beside = Place(place.folder / "beside", name="beside", store=place.store)
        beside.sweep()
        place.wait(running)
        damage.times += 1
        bench.compare(place, damage)
        damage.seconds -= place.seconds - bench.seconds  # two studies share the machine: no measure of time
        beside.compare(bench.expected, damage, beside.seconds)
    return damage


# --- MLflow ----------------------------------------------------------------------------------------------------------


def _tracked(bench: Bench, times: int, kind: str, disturb: Callable[[Place, Any, Server, Proxy], None]) -> Damage:
    damage = Damage()
    for _ in range(times):
        folder = bench.folder / f"{kind}-server-{bench.random.randint(0, 1 << 30)}"
        folder.mkdir()
        server = Server(folder)
        proxy = Proxy(server.port)
        try:
            place = bench.place(kind, store=server.store)
            disturb(place, place.start, server, proxy)
            proxy.mode = "ok"
            server.kill()
            server.start()
            place.run("sync", str(place.study), "--tracking", proxy.uri)
            said = place.run("sync", str(place.study), "--tracking", proxy.uri)
            if "; 0 were written now" not in said:
                raise RuntimeError(f"a second sync wrote again: {said}")
            damage.times += 1
            bench.compare(place, damage, server.store)
        finally:
            server.kill()
            proxy.close()
    return damage


def _owes(said: str) -> None:
    if "pagating sync" not in said:
        raise RuntimeError(f"the sweep does not say what is owed: {said[-1000:]}")


def mlflow_down_at_start(bench: Bench, times: int) -> Damage:
    """The MLflow server down from the start to the end."""

    def disturb(place: Place, start: Any, server: Server, proxy: Proxy) -> None:
        _owes(place.wait(start(proxy.uri)))

    return _tracked(bench, times, "mlflow-start", disturb)


def mlflow_down_between(bench: Bench, times: int) -> Damage:
    """The MLflow server killed in the middle, and back before the end."""

    def disturb(place: Place, start: Any, server: Server, proxy: Proxy) -> None:
        server.start()
        running = start(proxy.uri)
        place.until(running, 4)
        server.kill()
        place.until(running, 10)
        server.start()
        place.wait(running)

    return _tracked(bench, times, "mlflow-middle", disturb)


def mlflow_down_at_end(bench: Bench, times: int) -> Damage:
    """The MLflow server killed in the middle, for good."""

    def disturb(place: Place, start: Any, server: Server, proxy: Proxy) -> None:
        server.start()
        running = start(proxy.uri)
        place.until(running, 8)
        server.kill()
        _owes(place.wait(running))

    return _tracked(bench, times, "mlflow-end", disturb)


def _in_mode(mode: str) -> Callable[[Place, Any, Server, Proxy], None]:
    def disturb(place: Place, start: Any, server: Server, proxy: Proxy) -> None:
        server.start()
        running = start(proxy.uri)
        place.until(running, 3)
        proxy.mode = mode
        place.wait(running)

    return disturb


def mlflow_slow(bench: Bench, times: int) -> Damage:
    """The MLflow server slow: a second an answer."""
    return _tracked(bench, times, "mlflow-slow", _in_mode("slow"))


def mlflow_500(bench: Bench, times: int) -> Damage:
    """The MLflow server answering 500."""
    return _tracked(bench, times, "mlflow-500", _in_mode("error"))


def mlflow_lost(bench: Bench, times: int) -> Damage:
    """The MLflow server doing as told, its answers lost (504)."""
    return _tracked(bench, times, "mlflow-lost", _in_mode("lost"))


# --- disks and files -------------------------------------------------------------------------------------------------


def disk_full(bench: Bench, times: int) -> Damage:
    """The disk full at a random moment, then room again."""
    damage = Damage()
    for _ in range(times):
        place = bench.place("disk")
        place.output.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place.output)]
        if (done := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode:
            damage.notes.append(f"not run: no file system of limited size can be mounted ({done.stderr.strip()})")
            return damage
        try:
            running = place.start()
            place.until(running, bench.random.randint(1, len(bench.expected) - 4))
            ballast = place.output / "ballast"
            with open(ballast, "wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 12))
                        file.flush()
                except OSError:
                    pass  # full
            said = place.wait(running, allowed=(1,))
            if "No space left on device" not in said:
                raise RuntimeError(f"no word of the full disk: {said[-1000:]}")
            ballast.unlink()
            place.sweep()
            damage.times += 1
            bench.compare(place, damage)
        finally:
            subprocess.run(["umount", "-l", str(place.output)], check=True)
    return damage


def ledger_damaged(bench: Bench, times: int) -> Damage:
    """A bit flipped in a random line of a finished ledger: refused, repaired, the cell trained again."""
    damage = Damage()
    place = bench.place("ledger")
    place.sweep()
    path = place.study / "ledger.jsonl"
    for _ in range(times):
        raw = bytearray(path.read_bytes())
        where = bench.random.randrange(raw.rindex(b"\n", 0, -1))
        raw[where] ^= 1 << bench.random.randrange(8)
        path.write_bytes(raw)
        sweep = ["sweep", str(place.config), "--output", str(place.output), "--tracking", place.store]
        said = place.run(*sweep, allowed=(2,))
        if "pagating repair" not in said:
            raise RuntimeError(said)
        place.run("repair", str(place.study))
        place.sweep()
        damage.times += 1
    bench.compare(place, damage)
    damage.seconds = (place.seconds - bench.seconds * (1 + times)) if times else 0.0
    return damage


def ledger_cut(bench: Bench, times: int) -> Damage:
    """The ledger of a study cut off at a random byte of its last lines."""
    damage = Damage()
    place = bench.place("cut")
    place.sweep()
    path = place.study / "ledger.jsonl"
    for _ in range(times):
        raw = path.read_bytes()
        path.write_bytes(raw[: -bench.random.randrange(1, 3000)])
        place.sweep()
        damage.times += 1
    bench.compare(place, damage)
    damage.seconds = 0.0
    return damage


def files_lost(bench: Bench, times: int) -> Damage:
    """MLflow's file removed, tables and report removed or overwritten with noise: all of it made anew."""
    damage = Damage()
    place = bench.place("files")
    place.sweep()
    for number in range(times):
        Path(place.store.removeprefix("sqlite:///")).unlink()
        for name in ("trials.parquet", "curves.parquet", "verdict.json", "report.html"):
            (place.study / name).unlink() if number % 2 else (place.study / name).write_bytes(os.urandom(999))
        if number % 2:
            place.sweep()
        else:
            place.run("report", str(place.study), allowed=(0, 1))
            place.run("sync", str(place.study), "--tracking", place.store)
        damage.times += 1
    bench.compare(place, damage)
    damage.seconds = 0.0
    return damage


def no_home(bench: Bench, times: int) -> Damage:
    """No HOME, and a HOME that cannot be written."""
    damage = Damage()
    for number in range(times):
        place = bench.place("home")
        place.sweep(HOME="/proc" if number % 2 else "/nowhere")
        damage.times += 1
        bench.compare(place, damage)
    return damage


FAULTS: dict[str, tuple[Callable[[Bench, int], Damage], int, int]] = {  # name: (fault, times, times of --quick)
    "worker": (worker_killed, 20, 2),
    "driver": (driver_killed, 20, 2),
    "node": (node_lost, 1, 1),
    "ctrl-c": (ctrl_c, 2, 1),
    "ctrl-c-twice": (ctrl_c_twice, 2, 1),
    "sigterm": (terminated, 2, 1),
    "sigterm-all": (terminated_with_ray, 2, 1),
    "hung": (worker_hung, 3, 1),
    "two-sweeps": (two_sweeps, 1, 1),
    "mlflow-start": (mlflow_down_at_start, 1, 1),
    "mlflow-middle": (mlflow_down_between, 1, 1),
    "mlflow-end": (mlflow_down_at_end, 1, 1),
    "mlflow-slow": (mlflow_slow, 1, 1),
    "mlflow-500": (mlflow_500, 1, 1),
    "mlflow-lost": (mlflow_lost, 1, 1),
    "disk": (disk_full, 2, 1),
    "ledger-bit": (ledger_damaged, 3, 1),
    "ledger-cut": (ledger_cut, 3, 1),
    "files": (files_lost, 2, 1),
    "home": (no_home, 2, 1),
}


def page(kept: dict[str, Any]) -> str:
    """The table of what was found, in Markdown."""
    lines = [
        "| fault | times | cells lost | cells doubled | cells different | seconds lost, each | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in FAULTS:
        if found := kept["faults"].get(name):
            each = f"{found['seconds'] / found['times']:.1f}" if found["times"] else "-"
            lines.append(
                f"| {found['what']} | {found['times']} | {found['lost']} | {found['doubled']} | {found['different']} "
                f"| {each} | {'; '.join(found['notes'])} |"
            )
    here = kept["machine"]
    return "\n".join(
        [
            f"`{kept['command']}` on {here['processor']}, {here['cores']} cores, {here['date']}: a study of "
            f"{kept['cells']} cells, which takes {kept['seconds']:.0f} s undisturbed.",
            "",
            *lines,
        ]
    )


def write(target: Path, kept: dict[str, Any]) -> None:
    """Put the table between the markers of a page."""
    before, rest = target.read_text(encoding="utf-8").split(START)
    target.write_text(f"{before}{START}\n{page(kept)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    """Run the faults asked for; exit code 1 when anything is lost, doubled or different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--times", type=int, help="how often each fault strikes")
    parser.add_argument("--quick", action="store_true", help="each fault once or twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page with the markers; the table is kept up after each fault")
    parser.add_argument("--node", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        _sweep_on_two_nodes(options.node, options.seed)
    kept: dict[str, Any] = {"faults": {}}
    if options.write and KEPT.exists():
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["PAGATING_CACHE"] = str(folder / "cache")
    bad = 0
    bench = Bench(folder, options.seed)
    command = " ".join(["python benchmarks/faults.py", *(a for a in sys.argv[1:])])
    kept |= {"command": command, "machine": machine(), "cells": len(bench.expected), "seconds": bench.seconds}
    for name in options.only:
        fault, often, rarely = FAULTS[name]
        began = time.monotonic()
        damage = fault(bench, options.times or (rarely if options.quick else often))
        what = (fault.__doc__ or name).strip().rstrip(".")
        bad += damage.lost + damage.doubled + damage.different
        kept["faults"][name] = {"what": what, **vars(damage)}
        print(f"{name}: {damage}, {time.monotonic() - began:.0f} s", flush=True)
        if options.write:
            KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            write(options.write, kept)
    print(page(kept))
    shutil.rmtree(folder, ignore_errors=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
