"""Shared parts of the benchmarks: description of the machine, interleaved rounds, the GEMM ceiling, a random corpus."""

from __future__ import annotations

import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagating.device import device_name, has_bfloat16
from tune.plan.plan import stand_in


def machine() -> dict[str, Any]:
    """Describe the machine of a measurement: processor, cores, instruction set, versions and date."""
    return {
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample of `n` values."""

    low: float
    median: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread(values: list[float]) -> Spread:
    """Return median and quartiles of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, middle, high, len(values))


def interleave(variants: Mapping[str, Callable[[], float]], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Call every variant once per round, so that other load on the machine slows them alike; drop the first round.

    Each round has its own order, drawn with a fixed seed. So no variant is always first, and the caches, memory and
    heat that a variant leaves behind affect a different one each time.

    Args:
        variants: Functions by name; each returns the seconds that it measured.
        seconds: Time for all rounds, in seconds.
        least: Number of rounds to run even if that takes longer.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    order, generator = list(variants), random.Random(0)
    for variant in variants.values():
        variant()
    begun = time.perf_counter()
    while len(next(iter(times.values()))) < least or time.perf_counter() - begun < seconds:
        generator.shuffle(order)
        for name in order:
            times[name].append(variants[name]())
    return times


def ratios(times: Mapping[str, list[float]], reference: str) -> dict[str, Spread]:
    """Return the speed of each variant relative to the reference, round by round."""
    return {
        name: spread([r / own for r, own in zip(times[reference], mine, strict=True)]) for name, mine in times.items()
    }


def gemm(dtype: torch.dtype, size: int = 768) -> Callable[[], float]:
    """Make a variant that returns the seconds per FLOP in square products; its speed is the GEMM ceiling."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)

    def run() -> float:
        start, calls = time.perf_counter(), 0
        while calls < 2 or time.perf_counter() - start < 0.1:
            a @ b
            calls += 1
        return (time.perf_counter() - start) / (calls * 2 * size**3)

    return run


def random_corpus(folder: Path, vocab_size: int, tokens: int = 1 << 17) -> str:
    """Write a packed corpus of uniformly random tokens; the cost of a trial does not depend on the text."""
    path = folder / f"random-{vocab_size}"
    path.mkdir(exist_ok=True)
    return str(stand_in(path, vocab_size, tokens))
