"""Divide trials into packs, and train them pack by pack or one by one."""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pagating.checkpoint import CheckpointFolder
from pagating.device import out_of_memory, resolve_device
from pagating.model.gpt2 import GPT2
from pagating.model.size import GPT2Size
from pagating.packed.loop import VARIES, heartbeats_packed, require_one_pack
from pagating.packed.model import parameter_shapes, unit_kind
from pagating.train import heartbeats
from pagating.trial import Diverged, OutOfMemory, Trial

Row = dict[str, Any]


@dataclass
class Ended:
    """A trial that has ended.

    Attributes:
        outcome: `completed` or `infeasible`.
        reason: Cause of an infeasible outcome.
        rows: Its evaluations.
        final: Its final metrics, with `device`, the name of the card or processor, and `packed`, the trials that
            trained together.
    """

    outcome: str = ""
    reason: str | None = None
    rows: list[Row] = field(default_factory=list)
    final: Row = field(default_factory=dict)

    def take(self, row: Row) -> None:
        """Add an evaluation; the last one has the final metrics."""
        self.final = row.pop("final", {})
        self.rows.append(row)
        self.outcome = "completed" if self.final else self.outcome

    def fail(self, reason: str) -> None:
        """End as infeasible."""
        self.outcome, self.reason = "infeasible", reason


def device_name(trial: Trial) -> str:
    """Return the name of the card that a trial trains on, or of the kind of processor."""
    device = resolve_device(trial.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def packs(trials: Sequence[Trial], most: int) -> list[list[int]]:
    """Divide trials into packs of at most `most`, of about equal sizes; one that fits into no pack is alone.

    Returns:
        Places of the trials, pack by pack, in the order of the first trial of each shape.
    """
    shapes: dict[str, list[int]] = {}
    alone = []
    units: dict[str, str | None] = {}
    for place, trial in enumerate(trials):
        shape = _shape(trial, units) if most > 1 else None
        if shape is None:
            alone.append(place)
        else:
            shapes.setdefault(shape, []).append(place)
    found = []
    for places in shapes.values():
        count = -(-len(places) // most)
        sizes = [len(places) // count + (i < len(places) % count) for i in range(count)]
        starts = [sum(sizes[:i]) for i in range(count)]
        found += [places[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return sorted([*found, *([place] for place in alone)])


def _shape(trial: Trial, units: dict[str, str | None]) -> str | None:
    """Return a text that is equal for two trials if and only if they can be one pack; None if a trial must be alone.

    `units` keeps the shapes of models that were seen before.
    """
    try:
        require_one_pack([trial])
    except ValueError:
        return None
    fields = {name: value for name, value in trial.as_dict().items() if name not in VARIES}
    model = json.dumps([dict(trial.model), trial.unit], sort_keys=True)
    if model not in units:
        try:
            with torch.device("meta"):
                one = GPT2(GPT2Size(vocab_size=1, **trial.model), trial.unit)
            unit_kind(one)
            units[model] = None if one.config.dropout else json.dumps(sorted(parameter_shapes(one).items()))
        except ValueError:  # no packed form
            units[model] = None
    shape = units[model]
    return shape and json.dumps([fields, shape], sort_keys=True)


def train_together(
    trials: Sequence[Trial],
    stop: Callable[[], bool],
    checkpoints: CheckpointFolder | None = None,
    say: Callable[[str], None] = print,
) -> list[Ended] | None:
    """Train trials as one pack, or a single one by the loop of one trial.

    Args:
        trials: The trials; more than one must be a pack (`packs`).
        stop: Called after each step; if it returns True, training ends without results.
        checkpoints: Folder of checkpoints of a single trial. A pack has none.
        say: Called with one line if a pack does not fit into memory; its halves are then trained.

    Returns:
        The trials' ends in their order, or None if `stop` ended the training.
    """
    ends: list[Ended] = []
    queue = deque([list(trials)])
    while queue:
        part = queue.popleft()
        found, full = _attempt(part, stop, checkpoints)
        if full is not None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = len(part) // 2
            say(f"a pack of {len(part)} does not fit into memory; {half} at a time")
            queue.extendleft([part[half:], part[:half]])
        elif found is None:
            return None
        else:
            ends += found
    return ends


def _attempt(
    trials: list[Trial], stop: Callable[[], bool], checkpoints: CheckpointFolder | None
) -> tuple[list[Ended] | None, str | None]:
    """Train trials once. Return their ends or None if `stop` ended them, and a text if memory was too small."""
    ends, full = [Ended() for _ in trials], None
    try:
        done = _alone(trials[0], ends[0], stop, checkpoints) if len(trials) == 1 else _pack(trials, ends, stop)
    except (MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
    if full is not None:  # outside the handler, so that no traceback keeps the tensors alive
        return None, full
    name = device_name(trials[0])
    for end in ends:
        end.final |= {"device": name, "packed": len(trials) if len(trials) > 1 else 0}
    return (ends if done else None), None


def _alone(trial: Trial, end: Ended, stop: Callable[[], bool], checkpoints: CheckpointFolder | None) -> bool:
    stopping = False
    try:
        for step in heartbeats(trial, checkpoints):
            if step and step[1]:
                end.take(dict(step[1]))
            if stopping and step and not end.outcome:
                return False
            if not stopping and stop():
                stopping = True  # after the update that writes a checkpoint
                if checkpoints:
                    checkpoints.request()
    except (Diverged, OutOfMemory) as error:
        end.fail(str(error))
    return True


def _pack(trials: list[Trial], ends: list[Ended], stop: Callable[[], bool]) -> bool:
    done = False
    if resolve_device(trials[0].device).type == "cuda":  # each size of a pack would be compiled anew, for a minute
        trials = [dataclasses.replace(trial, compile="never") for trial in trials]
    for entries in heartbeats_packed(trials):
        for end, entry in zip(ends, entries or [], strict=False):
            if isinstance(entry, Diverged):
                end.fail(str(entry))
            elif entry is not None:
                end.take(dict(entry))
        done = all(end.outcome for end in ends)
        if not done and stop():
            break
    return done


def on_device(trial: Trial, device: str | None) -> Trial:
    """Return the trial for another device; None keeps its own."""
    return dataclasses.replace(trial, device=device) if device else trial
