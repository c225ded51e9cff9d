"""Tests that trials on one node share one copy of the packed tokens: each maps the file."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from pagating.data.corpus import meta_digest, open_split, train_batch

TOKENS, PROCESSES = 1 << 20, 20
SIZE = 4 * TOKENS
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")


@pytest.fixture
def corpus(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, TOKENS, dtype=np.uint32)
    with (tmp_path / "train.bin").open("wb") as file:
        ids.tofile(file)
        os.fsync(file.fileno())  # unwritten pages would count as dirty
    meta = {"dtype": "uint32", "vocab_size": 300, "splits": {"train": {"tokens": TOKENS, "bytes": SIZE}}}
    (tmp_path / "corpus.json").write_text(json.dumps({**meta, "digest": meta_digest(meta)}))
    return tmp_path, int(ids.sum(dtype=np.int64))


def mapped(path):
    """Return the fields of /proc/self/smaps in bytes, summed over the mappings of a file."""
    found, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.endswith(" kB"):
            name, value = line.removesuffix(" kB").split(":")
            found[name] = found.get(name, 0) + int(value) * 1024
    return found


def at_once(processes, function):
    """Return the results of `function(wait)` in forked processes; `wait` returns once all have called it."""
    (go, start), (leave, stay) = os.pipe(), os.pipe()
    children = []
    for _ in range(processes):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.close(start)
                os.close(stay)
                result = function(lambda tell=tell: (os.write(tell, b"r"), os.read(go, 1)))
                os.write(tell, json.dumps(result).encode())
                os.close(tell)
                os.read(leave, 1)
            os._exit(0)
        os.close(tell)
        children.append((child, told))
    assert [os.read(told, 1) for _, told in children] == [b"r"] * processes
    os.close(start)
    results = [b"".join(iter(lambda told=told: os.read(told, 65536), b"")) for _, told in children]
    os.close(stay)  # until here all processes keep their memory
    for child, told in children:
        os.waitpid(child, 0)
        os.close(told)
    os.close(go)
    os.close(leave)
    return [json.loads(result) for result in results]


def test_twenty_processes_hold_the_tokens_once(corpus):
    folder, total = corpus

    def trial(wait):
        tokens_N = open_split(folder, "train")
        train_batch(tokens_N, 0, 0, 8, 128)
        seen = int(tokens_N.sum(dtype=np.int64))  # every page
        wait()
        return [seen, mapped(folder / "train.bin")]

    found = at_once(PROCESSES, trial)
    for seen, memory in found:
        assert seen == total
        assert memory["Rss"] == SIZE
        assert memory["Anonymous"] == memory["Private_Dirty"] == 0
        # pages of the file, shared with the other processes; dirty if the file system is in memory
        assert memory["Shared_Clean"] + memory["Shared_Dirty"] == SIZE
    # the shares of all processes sum to one copy of the file, not to twenty
    assert sum(memory["Pss"] for _, memory in found) == pytest.approx(SIZE, rel=0.01)


def test_a_copy_would_be_seen(corpus):
    folder, _ = corpus

    def copied(wait):
        tokens_N = np.memmap(folder / "train.bin", dtype=np.uint32, mode="c")
        tokens_N[:] += 1  # private pages
        wait()
        return mapped(folder / "train.bin")

    found = at_once(2, copied)
    assert sum(memory["Pss"] for memory in found) == pytest.approx(2 * SIZE, rel=0.01)
    assert all(memory["Anonymous"] == SIZE for memory in found)


def test_the_tokens_cannot_be_written(corpus):
    tokens_N = open_split(corpus[0], "train")
    with pytest.raises(ValueError, match="read-only"):
        tokens_N[0] = 1
