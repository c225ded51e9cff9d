"""Faults of disks and files: full, damaged, cut off, lost; and no HOME."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from disturbed import Bench, Damage


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
