"""A cell of a study, its record, and the columns of its result."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

FINAL = ("val_nll", "val_ppl", "val_bpb", "train_nll", "padded_nll")
COST = ("tokens", "steps", "seconds", "tokens_per_second", "compiled", "peak_rss_mb", "parameters", "flops_per_token")
ELSEWHERE = ("device", "packed")  # only for cells that were taken from files or trained in packs
ON_GPU = ("peak_gpu_mb", "flops_utilisation")  # only for trials on a GPU; the table of a CPU study lacks these columns


@dataclass(frozen=True)
class Cell:
    """One configuration to train once with one seed.

    `index` is the trial's number in its arm's search, the point of its grid in calibrate, and 0 in confirm. `config`
    holds the values of all tuned hyperparameters. `axis` is the hyperparameter whose grid a cell of calibrate belongs
    to, or `corners`; it is empty if the learning rate is the only one. `rung` is the size of a ladder, from 1, and 0 in
    a study of one size.
    """

    stage: str
    arm: str
    index: int
    seed: int
    config: dict[str, float]
    config_key: str
    axis: str = ""
    rung: int = 0

    @property
    def key(self) -> str:
        """Unique name of the cell in its study."""
        which = self.index if self.stage == "search" else self.config_key
        return f"{self.stage}/{self.arm}/{which}/{self.seed}" + (f"/rung{self.rung}" if self.rung else "")


@dataclass
class Record:
    """The ledger's entry of one cell. `final` is empty until the cell has ended."""

    cell: Cell
    outcome: str | None = None
    reason: str | None = None
    final: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # when each row of the curve was reported
    started: float | None = None
    ended: float | None = None


def folder_name(key: str) -> str:
    """Return a folder name for any text: its readable characters and a digest. It contains no path separator."""
    readable = re.sub(r"[^A-Za-z0-9._=-]+", "-", key)[:60].strip(".-")
    return f"{readable or 'cell'}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
