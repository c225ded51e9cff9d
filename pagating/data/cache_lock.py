"""The lock of a cache of packed corpora: of several processes that need the same one, one makes it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

NAME = ".lock"


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Hold the cache's lock, which ends with the process; clear away what a process left that was killed with it.

    Where the work inside fails, the lock and the folders that were made for it go again: a failure leaves no trace.
    Raises OSError where the cache cannot be written.
    """
    lock, made = _locked(cache)
    with lock:
        for scratch in cache.glob(".corpus-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # a folder that another process uses by now is not empty, and stays
                for path in made:
                    path.rmdir() if path.is_dir() else path.unlink()
            raise


def _locked(cache: Path) -> tuple[BinaryIO, list[Path]]:
    """The open file whose lock is held; and it and the folders above it as far as they are new, the deepest first."""
    path = cache / NAME
    while True:
        made = list(itertools.takewhile(lambda one: not one.exists(), (path, *path.parents)))
        cache.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as closing:
            try:
                lock = closing.enter_context(open(path, "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                held = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
            except FileNotFoundError:  # who had it failed, and cleared it away
                continue
            if held:
                closing.pop_all()
                return lock, made
