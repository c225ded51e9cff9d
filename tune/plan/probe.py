"""Train first steps for some seconds in processes like a worker's: to calibrate a plan, and to decide a precision.

The figures of a calibration include the contention of the slots for cores, caches and memory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from pagating.trial import PRECISIONS, Trial
from tune.errors import StudyError
from tune.plan.child import ChildError, answers, start
from tune.plan.work import arm_model
from tune.study.own_gates import file_of
from tune.study.sections import AUTO
from tune.study.sizes import example
from tune.study.study import Study
from tune.study.trial_spec import trial_spec


@dataclass(frozen=True)
class Speed:
    """The speed of one arm on one slot. `build_seconds` is the time to make the model."""

    tokens_per_second: float
    evaluation_seconds: float
    build_seconds: float


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration, as the mean over processes.

    Attributes:
        speeds: Speed by arm.
        import_seconds: Import time of a worker.
        first_seconds: Time by which a worker's first trial is longer than the next.
        base_mb: Memory of a worker without a model, MiB.
        rows_seconds: Time to cut the validation text into lines, once per confirm trial.
        loop_seconds: Time of `loop_seconds`, this machine's speed outside of training.
        spread: Largest relative deviation of a process's speed.
        processes: Number of processes.
    """

    speeds: dict[str, Speed]
    import_seconds: float
    first_seconds: float
    base_mb: float
    rows_seconds: float
    loop_seconds: float
    spread: float
    processes: int


LIMIT_SECONDS = 600.0  # longest wait for a calibration; a step of a large model may take minutes on a slow machine


def loop_seconds(rounds: int = 200) -> float:
    """Return the seconds of a fixed work in Python: `rounds` times a table of 1,000 numbers to JSON and back."""
    table = {str(i): i / 7 for i in range(1_000)}
    begun = time.perf_counter()
    for _ in range(rounds):
        json.loads(json.dumps(table))
    return time.perf_counter() - begun


def probe(trials: Mapping[str, Trial], flops: Mapping[str, int], processes: int, seconds: float) -> Calibration:
    """Train each arm's first steps in several processes at once, each starting with another arm.

    `flops` are training FLOPs per token, `seconds` the training time per process. Raises ChildError if one fails, and
    ChildTimeout if one gives no answer within `LIMIT_SECONDS`.
    """
    arms = list(trials)
    loop, threads = loop_seconds(), next(iter(trials.values())).threads
    turns = [[arms[(i + number) % len(arms)] for i in range(len(arms))] for number in range(processes)]
    each = [[(arm, trials[arm].as_dict(), flops[arm]) for arm in turn] for turn in turns]
    running = [start("calibrate", threads, arms=mine, seconds=seconds) for mine in each]
    return combine(answers(*running, limit=LIMIT_SECONDS), arms, flops, loop)


def combine(found: list[dict[str, Any]], arms: list[str], flops: Mapping[str, int], loop: float) -> Calibration:
    """Combine the answers of all processes. An arm that no process reached is scaled from another by its FLOPs."""
    speeds, deviations = {}, [0.0]
    for arm in arms:
        own = [one["arms"][arm] for one in found if arm in one["arms"]]
        scale = 1.0
        if not own:
            other = next(name for name in arms if any(name in one["arms"] for one in found))
            own, scale = [one["arms"][other] for one in found if other in one["arms"]], flops[other] / flops[arm]
        rate = len(own) / sum(1 / one["tokens_per_second"] for one in own)  # slots share cells, not seconds
        deviations += [abs(one["tokens_per_second"] / rate - 1) for one in own]
        evaluation, build = (mean(one[name] for one in own) for name in ("evaluation_seconds", "build_seconds"))
        speeds[arm] = Speed(rate * scale, evaluation / scale, build)
    names = ("import_seconds", "first_seconds", "base_mb", "rows_seconds")
    means = {name: mean(one[name] for one in found) for name in names}
    return Calibration(speeds=speeds, loop_seconds=loop, spread=max(deviations), processes=len(found), **means)


# --- what they train on ---

SPLITS = ("train", "validation", "test")


def stand_in(folder: Path, vocab_size: int, tokens: int, lines: bool = False) -> Path:
    """Write a corpus of random tokens, which cost a trial as much as text. `lines` adds rows of 64 tokens."""
    import numpy as np
    from tokenizers import ByteLevelBPETokenizer

    from pagating.data.corpus import ROW_DTYPE, meta_digest, rows_file

    draw = np.random.default_rng(0)
    for split in SPLITS:
        draw.integers(0, vocab_size, tokens, dtype=np.uint32).tofile(folder / f"{split}.bin")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a plan without its text\n"], vocab_size=300, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    counts = {split: {"tokens": tokens, "bytes": 4 * tokens} for split in SPLITS}
    meta: dict[str, Any] = {"dtype": "uint32", "vocab_size": vocab_size, "splits": counts}
    if lines:
        ends = np.arange(0, tokens + 1, 64, dtype=ROW_DTYPE)
        for split in SPLITS:
            np.stack([ends[:-1], ends[1:]], 1).tofile(folder / rows_file(split))
            counts[split]["rows"] = len(ends) - 1
        meta["pad"] = 0
    (folder / "corpus.json").write_text(json.dumps({**meta, "digest": meta_digest(meta)}), encoding="utf-8")
    return folder


def arm_example(study: Study, arm: str, base: Path, corpus: Path) -> Trial:
    """Return a trial of an arm at the lowest learning rate. `base` is the study file's folder, for own gates."""
    config = {**example(study, arm), "lr": _lowest_rate(study)}
    trial = replace(trial_spec(study, arm, config, 1, corpus, test=False), pretrained=None)  # same cost
    code = trial.own_code
    return trial.with_own(file_of(code.reference, base.resolve(), base.resolve())) if code else trial


def _lowest_rate(study: Study) -> float:
    where = study.nuisance["lr"]
    return min(where.choice or where.loguniform or where.uniform or [1e-3])


# --- the precision of a study that asks for `auto` ---

PRECISION_SECONDS = 10.0
MARGIN = 1.1  # ratio of the speeds from which on bfloat16 is chosen: its losses are rounded more


@dataclass(frozen=True)
class Decision:
    """The precision of a study that asked for `auto`.

    Attributes:
        chosen: An entry of `PRECISIONS`.
        reason: Why, in a few words.
        processor: Name of the processor, or of the card, that decided.
        ratio: Speed in bfloat16 over speed in float32, the median of the probe's rounds; None without a probe.
        float32, bfloat16: Training speed, tokens per second; None without a probe.
    """

    chosen: str
    reason: str
    processor: str
    ratio: float | None = None
    float32: float | None = None
    bfloat16: float | None = None

    def __str__(self) -> str:
        return f"fixed.precision: auto is {self.chosen}, because {self.reason} ({self.processor})"

    def as_dict(self) -> dict[str, Any]:
        """Return what was asked and the fields that are known."""
        return {"asked": AUTO} | {name: value for name, value in asdict(self).items() if value is not None}


def decide_precision(study: Study, base: Path, vocab_size: int, say: Callable[[str], None] | None = None) -> Decision:
    """Decide the precision of a study that asks for `auto`; of a ladder, by its largest size.

    Args:
        study: The study.
        base: Folder of the study file, for own gates.
        vocab_size: Tokens of the vocabulary.
        say: Called with a line before a wait.

    Raises:
        StudyError: There is no GPU here for a study on GPUs, or the probe failed.
    """
    from pagating import device as devices  # loads torch

    name = "cuda" if study.resources.gpus else "cpu"
    try:
        device = devices.resolve_device(name)
    except ValueError as error:
        raise StudyError(
            f"fixed.precision: {AUTO} is decided on the machine that starts the study, and torch sees no GPU here; "
            f"allowed: {', '.join(PRECISIONS)}"
        ) from error
    processor = devices.device_name(device)
    if not devices.has_bfloat16(device):
        return Decision("float32", "bfloat16 is emulated here, which is slower", processor)
    if say:
        say(
            f"fixed.precision: {AUTO} is decided by about {PRECISION_SECONDS:.0f} s of training in float32 and bfloat16"
        )
    try:
        rounds = in_both(study.rungs[-1], base, vocab_size)
    except ChildError as error:
        raise StudyError(
            f"fixed.precision: {AUTO}: the probe failed: {error}; allowed: {', '.join(PRECISIONS)}"
        ) from error
    return judge(rounds, processor)


def in_both(study: Study, base: Path, vocab_size: int) -> dict[str, list[float]]:
    """Train the first steps of the baseline in both precisions, in turns, in a process like a worker's.

    Returns:
        Seconds per token of each turn, by precision.
    """
    with tempfile.TemporaryDirectory(prefix="pagating-precision-") as scratch:
        tokens = max(1 << 16, 4 * study.model.n_ctx)
        corpus = stand_in(Path(scratch), vocab_size, tokens, study.corpus.rows == "lines")
        study = study.with_precision("float32")  # a trial has no `auto`
        trial = arm_example(study, study.baseline, base, corpus)
        trials = {name: replace(trial, precision=name).as_dict() for name in PRECISIONS}
        flops = arm_model(study, study.baseline, vocab_size).flops_per_token
        child = start("in_turns", trial.threads, trials=trials, flops=flops, seconds=PRECISION_SECONDS)
        return answers(child, limit=LIMIT_SECONDS)[0]


def judge(rounds: dict[str, list[float]], processor: str) -> Decision:
    """Return the decision on the seconds per token of each round, by precision."""
    ratio = median(single / half for single, half in zip(rounds["float32"], rounds["bfloat16"], strict=True))
    speeds = {name: round(1 / median(seconds), 1) for name, seconds in rounds.items()}
    chosen, reason = "bfloat16", f"it is {ratio:.2f} times as fast as float32"
    if ratio < MARGIN:
        chosen, reason = "float32", f"bfloat16 is {ratio:.2f} times as fast, and {MARGIN:g} would be a clear gain"
    return Decision(chosen, reason, processor, round(ratio, 3), **speeds)
