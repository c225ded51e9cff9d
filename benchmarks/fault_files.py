"""Faults of disks and files: full, read-only, missing, damaged, truncated, lost; and no HOME."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from disturbed import Bench, Damage, Place


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """Mount a file system of 64 MiB on `folder` during the block; yield the reason if that is not possible."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    try:
        yield done.stderr.strip() if done.returncode else None
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _on_small_disk(bench: Bench, times: int, fault: Callable[[Place], None]) -> Damage:
    """Disturb studies on their own disk by `fault`, which undoes its change."""
    damage = Damage()
    for _ in range(times):
        place = bench.place("disk")
        with small_disk(place.output) as problem:
            if problem:
                damage.notes.append(f"not run: {problem}")
                return damage
            fault(place)
            place.sweep()
            bench.compare(place, damage)
    return damage


def _fill(folder: Path) -> Path:
    """Write a file that takes all free space."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            return ballast  # the disk is full


def _check_contains(said: str, word: str) -> None:
    if word not in said:
        raise RuntimeError(f"the output does not contain '{word}': {said[-1000:]}")


def disk_full(bench: Bench, times: int) -> Damage:
    """The disk full at a random moment, then room again."""

    def fault(place: Place) -> None:
        running = bench.begun(place)
        ballast = _fill(place.output)
        _check_contains(place.wait(running, allowed=(1,)), "No space left on device")
        ballast.unlink()

    return _on_small_disk(bench, times, fault)


def cache_full(bench: Bench, times: int) -> Damage:
    """The disk full from the start, token cache included, then room again."""

    def fault(place: Place) -> None:
        ballast = _fill(place.output)
        said = place.wait(place.start(PAGATING_CACHE=str(place.output / ".cache")), allowed=(1, 2))
        _check_contains(said, "but 0 B are free there; free some space")
        ballast.unlink()

    return _on_small_disk(bench, times, fault)


def read_only(bench: Bench, times: int) -> Damage:
    """The folder of the studies read-only from a random moment, then writable again."""

    def fault(place: Place) -> None:
        running = bench.begun(place)
        # an open file keeps a file system writable, so it is covered by a read-only view of itself
        subprocess.run(["mount", "--bind", str(place.output), str(place.output)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(place.output)], check=True)
            _check_contains(place.wait(running, allowed=(1,)), "Read-only file system")
        finally:
            subprocess.run(["umount", "-l", str(place.output)], check=True)

    return _on_small_disk(bench, times, fault)


def folder_gone(bench: Bench, times: int) -> Damage:
    """The folder of the study moved away at a random moment, then back."""
    damage = Damage()
    for _ in range(times):
        place = bench.place("gone")
        running = bench.begun(place)
        away = place.folder / "away"
        place.study.rename(away)
        _check_contains(place.wait(running, allowed=(1,)), "was removed or moved while the study ran")
        shutil.rmtree(place.study, ignore_errors=True)  # remove the files that were written in the meantime
        away.rename(place.study)
        place.sweep()
        bench.compare(place, damage)
    return damage


def checkpoints_damaged(bench: Bench, times: int) -> Damage:
    """A bit flipped in every checkpoint and in the token cache while the killed study is at rest."""
    damage = Damage()
    flipped = 0
    for _ in range(times):
        place = bench.place("checkpoints")
        cache = place.folder / "cache"
        running = bench.begun(place, PAGATING_CACHE=str(cache))
        running.kill()
        place.wait(running, allowed=(-9,))
        files = [*(path for path in place.study.rglob("*.safetensors")), *(p for p in cache.rglob("*.bin"))]
        for path in files:
            raw = bytearray(path.read_bytes())
            raw[bench.random.randrange(len(raw))] ^= 1 << bench.random.randrange(8)
            path.write_bytes(raw)
        flipped += len(files)
        place.sweep(PAGATING_CACHE=str(cache))
        bench.compare(place, damage)
    if not flipped:
        raise RuntimeError("there was no file to damage")
    damage.notes.append(f"{flipped} files damaged")
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
        said = place.refused()
        if "pagating repair" not in said:
            raise RuntimeError(said)
        place.run("repair", str(place.study))
        place.sweep()
    bench.compare(place, damage, struck=times)
    damage.seconds = (place.seconds - bench.seconds * (1 + times)) if times else 0.0
    return damage


def ledger_cut(bench: Bench, times: int) -> Damage:
    """The ledger of a study cut off at a random byte of its last lines."""
    damage = Damage(seconds=None)  # sweeps of a study that was already finished: no measure of time
    place = bench.place("cut")
    place.sweep()
    path = place.study / "ledger.jsonl"
    for _ in range(times):
        raw = path.read_bytes()
        path.write_bytes(raw[: -bench.random.randrange(1, 3000)])
        place.sweep()
    bench.compare(place, damage, struck=times)
    return damage


def files_lost(bench: Bench, times: int) -> Damage:
    """MLflow's file removed, with a flipped bit, cut off; tables and report removed or overwritten: all made anew."""
    damage = Damage(seconds=None)  # sweeps of a study that was already finished: no measure of time
    place = bench.place("files")
    place.sweep()
    store = Path(place.store.removeprefix("sqlite:///"))
    for number in range(times):
        _damage(store, ("removed", "flipped", "cut")[number % 3], bench.random)
        if store.exists():
            said = place.run("sync", str(place.study), "--tracking", place.store, allowed=(1,))
            if "moved away and synced anew" not in said or said.count("\n") != 1:
                raise RuntimeError(said)
            store.rename(store.with_suffix(f".away-{number}"))
        for name in ("trials.parquet", "curves.parquet", "verdict.json", "report.html"):
            (place.study / name).unlink() if number % 2 else (place.study / name).write_bytes(os.urandom(999))
        if number % 2:
            place.sweep()
        else:
            place.run("report", str(place.study), allowed=(0, 1))
            place.run("sync", str(place.study), "--tracking", place.store)
    bench.compare(place, damage, struck=times)
    return damage


def _damage(store: Path, how: str, generator: random.Random) -> None:
    """Remove a file, flip a bit of the 16 bytes that name its format, or truncate it within its first half."""
    raw = bytearray(store.read_bytes())
    if how == "removed":
        return store.unlink()
    if how == "flipped":
        raw[generator.randrange(16)] ^= 1 << generator.randrange(8)
    store.write_bytes(raw[: generator.randrange(1, len(raw) // 2)] if how == "cut" else raw)
    return None


def no_home(bench: Bench, times: int) -> Damage:
    """No HOME, one that is not there, and one that cannot be written."""
    damage = Damage()
    for number in range(times):
        place = bench.place("home")
        place.sweep(HOME=(None, str(place.folder / "nowhere"), "/proc")[number % 3])
        bench.compare(place, damage)
    return damage
