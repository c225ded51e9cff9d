"""Compute the cost of a study before it runs: cells, tokens, FLOPs, hours, disk, memory and statistical power.

Nothing is written into the study. The packed corpus and the compiled code of a long trial go into the shared cache,
where the study will find them.
"""

from __future__ import annotations

import datetime
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.io.text import readable
from tune.backend.preflight import check_granted, local_slots
from tune.errors import StudyError, StudyStopped
from tune.plan import own
from tune.plan.child import ChildError, ChildTimeout
from tune.plan.ladder import join_plans, lengths
from tune.plan.power import confirm_power, percentage, study_noise
from tune.plan.probe import LIMIT_SECONDS, Calibration, Speed, arm_example, decide_precision, probe, stand_in
from tune.plan.progress import Progress
from tune.plan.space import NO_MODEL, disk_parts, largest, measured, memory_parts, vocabulary
from tune.plan.time import (
    DEVICES,
    MEASURE,
    Overheads,
    check_device,
    device_speeds,
    scaled_overheads,
    stage_seconds,
    wall_seconds,
)
from tune.plan.work import arm_model, total, work
from tune.run.extend import check_folder, own_corpus
from tune.study.files import Found, find
from tune.study.own_gates import check_gates, doubtful, with_placed_code
from tune.study.own_study import OwnStudy
from tune.study.sections import AUTO
from tune.study.sizes import confirm_seeds, design_notes, side_by_side
from tune.study.study import Study
from tune.study.weights import local_weights
from tune.subject.sources import draft

PROBE_SECONDS = 10.0
LAUNCH_SECONDS = 1e-3  # a step of any model takes longer on a device, whatever its FLOPs


def corpus_of(study: Study, output: Path, base: Path) -> tuple[Path | None, str | None]:
    """Return the packed corpus, made in the shared cache if its text is on this machine; else None and a message.

    Nothing is downloaded. A corpus or tokenizer of the hub is on this machine only if it was downloaded before. What a
    sweep would refuse is refused here too.

    Raises:
        CorpusError: The text or the tokenizer cannot be used.
        StudyError: An own gate cannot be used.
    """
    if study.corpus.hub is not None or study.tokenizer.pretrained or study.tokenizer.path:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries are imported
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from pagating.data.errors import NotDownloaded
    from tune.study import inputs

    folder = output / study.name
    check_gates(study, base, folder)
    try:
        return inputs.packed_corpus(study, output, base, own_corpus(base, folder)), None
    except NotDownloaded as error:
        with suppress(NotDownloaded):
            inputs.check_tokenizer(study, base)
        return None, f"corpus: not on this machine, planned from the study file's sizes ({error})"


def calibrate(
    study: Study, base: Path, corpus: Path | None, vocab_size: int, slots: int
) -> tuple[Calibration, list[str]]:
    """Calibrate on this machine with as many processes as fit; return the result and a note if fewer than `slots` fit.

    `base` is the folder of the study file, for the user's own gates. Raises StudyError if no trial fits into memory,
    ChildError if a process fails.
    """
    import psutil

    models = {arm: arm_model(study, arm, vocab_size) for arm in study.arms}
    need = sum(memory_parts(study, largest(study, vocab_size), vocab_size, measured()["worker_mb"]).values())
    room = psutil.virtual_memory().available
    processes = min(slots, local_slots(study), int(room // need))
    if not processes:
        raise StudyError(
            f"a trial needs about {readable(need)} of memory, but {readable(room)} are free here, too little to "
            f"calibrate; give --hours-from {', '.join(DEVICES)}"
        )
    notes = []
    if processes < slots:
        notes.append(f"calibrated with {processes} trials at a time, as many as this machine holds, instead of {slots}")
    with tempfile.TemporaryDirectory(prefix="pagating-plan-") as scratch:
        if corpus is None:
            tokens = max(1 << 16, 4 * study.model.n_ctx)
            corpus = stand_in(Path(scratch), vocab_size, tokens, study.corpus.rows == "lines")
        trials = {arm: arm_example(study, arm, base, corpus) for arm in study.arms}
        flops = {arm: model.flops_per_token for arm, model in models.items()}
        return probe(trials, flops, processes, PROBE_SECONDS), notes


def make_plan(
    study: Study,
    corpus: Path | None,
    *,
    slots: int,
    speeds: Mapping[str, Speed],
    overheads: Overheads,
    calibration: Calibration | None = None,
    effect: float = 0.005,
    noise: float | None = None,
    peak_mb: float | None = None,
) -> dict[str, Any]:
    """Return the whole plan as one JSON object, with spans [least, expected, most]. Read only the corpus's meta.

    Args:
        study: The study.
        corpus: Folder of the packed corpus, or None.
        slots: Number of trials that run in parallel.
        speeds: Speed of each arm.
        overheads: Seconds beside training.
        calibration: Result of the calibration, if there was one.
        effect: Difference to detect, as a share of the baseline's loss.
        noise: Standard deviation of paired differences, as a share of the baseline's loss.
        peak_mb: Peak memory of a trial of the user's own training in MiB, if it is known.
    """
    from pagating.data.corpus import read_meta

    meta = read_meta(corpus) if corpus else None
    vocab_size = meta["vocab_size"] if meta else vocabulary(study)
    unknown = isinstance(study, OwnStudy)  # models
    models = {arm: NO_MODEL if unknown else arm_model(study, arm, vocab_size) for arm in study.arms}
    n_ctx = study.model.n_ctx
    windows = {split: (held["tokens"] - 1) // n_ctx for split, held in meta["splits"].items()} if meta else None
    power = confirm_power(study, effect, noise) if noise is not None and study.runs("confirm") else None
    seeds = confirm_seeds(study, _mean_seeds(study, power) if power else None)
    rows = work(study, models, seeds, windows)
    stages = stage_seconds(
        study, speeds, slots, seeds, overheads.cell, calibration.rows_seconds if calibration else 0.0
    )
    seconds = wall_seconds(stages, overheads, calibration.spread if calibration else 0.0)
    biggest, cells = NO_MODEL if unknown else largest(study, vocab_size), total(rows, "cells")
    parts = [disk_parts(study, n, slots, biggest) for n in cells]
    disk = {name: [part[name] for part in parts] for name in parts[0]}
    base_mb = calibration.base_mb if calibration else measured()["worker_mb"]
    trial = {} if peak_mb is None else {"trial": peak_mb * (1 << 20)}
    return {
        "study": study.name,
        "question": study.question,
        "slots": slots,
        "work": [
            {"stage": row.stage, "arm": row.arm, "cells": row.cells, "tokens": row.tokens, "flops": row.flops}
            for row in rows
        ],
        "total": {name: total(rows, name) for name in ("cells", "tokens", "flops")},
        "models": {arm: asdict(model) for arm, model in models.items()},
        "speeds": {arm: speed.tokens_per_second for arm, speed in speeds.items()},
        "seconds": {**stages, "start": overheads.start, "slot": overheads.slot, "end": overheads.end, "wall": seconds},
        "disk": {**disk, "corpus": _corpus_bytes(corpus)},
        "memory": {"worker": base_mb * (1 << 20), **trial}
        if unknown
        else memory_parts(study, biggest, vocab_size, base_mb),
        "power": power,
    }


def _mean_seeds(study: Study, power: dict[str, Any]) -> float:
    """Return the expected confirm seeds of an arm. An arm that is decided stops; the baseline goes on with the last."""
    if not study.confirm.racing:
        return float(power["study_seeds"])
    others = len(study.arms) - 1
    return float(power["study_seeds"] + others * power["seeds"]) / (others + 1)


def _corpus_bytes(corpus: Path | None) -> int | None:
    return sum(path.stat().st_size for path in corpus.iterdir() if path.is_file()) if corpus else None


# --- the command -----------------------------------------------------------------------------------------------------


def run(
    config: Path | Found,
    output: Path,
    *,
    slots: int | None,
    hours_from: str,
    utilisation: float,
    effect: str,
    noise: str | None,
    form: str,
    progress: Progress | None = None,
) -> str:
    """Return the plan of a study, or of its file, as text.

    Raises CorpusError or StudyError, and StudyStopped if the calibration takes too long.
    """
    from tune.plan.page import FORMS, show

    progress = progress or Progress()
    found = config if isinstance(config, Found) else find(config, output)
    where = found.study.name if isinstance(config, Found) else config
    study, base, share = found.study, found.base, percentage(effect, "--effect")
    if form not in FORMS:
        raise StudyError(f"--format {form}: allowed: {', '.join(FORMS)}")
    spread, source = _noise(noise, output)
    wanted = slots or local_slots(study)
    if not isinstance(study, OwnStudy):
        check_device(hours_from, utilisation)
    if hours_from == MEASURE and not study.address:
        check_granted(study, slots)
    folder = found.output / study.name
    study = check_folder(study, folder, base)
    if isinstance(study, OwnStudy):
        draft(study, base, folder)  # refuses what cannot be trained, also if nothing is trained here
        plans, how = _own_plans(study, base, wanted, hours_from, share, spread, progress)
        notes = idle_slots(study, wanted) + design_notes(study)
        plan = join_plans(study, plans) if study.scales else plans[0]
        return show(_finished(plan, how, source, notes), form)
    corpus, missing = corpus_of(study, found.output, base)
    from pagating.data.corpus import read_meta

    meta = read_meta(corpus) if corpus else None
    _, lacking = local_weights(study, base, meta["vocab_size"] if meta else None)
    notes = [line for line in (missing, lacking) if line] + idle_slots(study, wanted)
    notes += doubtful(study, base, folder) + design_notes(study)
    study = with_placed_code(study, base, folder)
    vocab_size = meta["vocab_size"] if meta else vocabulary(study)
    if study.fixed.precision == AUTO:
        if hours_from == MEASURE:
            decision = decide_precision(study, base, vocab_size, progress.say)
            chosen, why = decision.chosen, decision.reason
        else:
            chosen = "bfloat16" if DEVICES[hours_from].bfloat16 else "float32"
            why = f"{hours_from} has {'' if DEVICES[hours_from].bfloat16 else 'no '}bfloat16 units"
        notes.append(f"fixed.precision: {AUTO} is decided when the study starts; planned in {chosen}: {why}")
        study = study.with_precision(chosen)
    if hours_from == MEASURE:
        sizes = f" at {len(study.rungs)} sizes" if study.scales else ""
        progress.say(
            f"calibrating: the first steps of {len(study.arms)} arms{sizes} are trained here, which takes seconds for "
            f"a small model and minutes for a large one, {LIMIT_SECONDS / 60:.0f} at most; "
            f"--hours-from {next(iter(DEVICES))} needs none"
        )
        size = PROBE_SECONDS + measured()["slot_seconds"]
        progress.begin("sizes calibrated", len(study.rungs), size * len(study.rungs))
    plans = []
    for rung in study.rungs:
        calibration: Calibration | None = None
        if hours_from == MEASURE:
            try:
                calibration, held = calibrate(rung, base, corpus, vocab_size, wanted)
            except ChildTimeout as error:
                raise StudyStopped(
                    f"{where}: the calibration was ended: {error}; this machine is too slow or too busy for it; "
                    f"--hours-from {next(iter(DEVICES))} needs none"
                ) from error
            except ChildError as error:
                raise StudyError(f"{where}: the calibration failed: {error}") from error
            progress.done()
            notes += [note for note in held if note not in notes]
            speeds = calibration.speeds
            how = f"{PROBE_SECONDS:.0f} s of training on this machine, {calibration.processes} trials at a time"
        else:
            models = {arm: arm_model(rung, arm, vocab_size) for arm in study.arms}
            speeds = device_speeds(hours_from, rung, models, utilisation)
            peak = DEVICES[hours_from].rate(study.fixed.precision)
            assumed = f"{peak:g} TFLOP/s in {study.fixed.precision} x {utilisation:.0%} assumed utilisation"
            how = f"{hours_from}, one per slot: {assumed}"
            step = rung.fixed.batch_tokens / max(speed.tokens_per_second for speed in speeds.values())
            if step < LAUNCH_SECONDS and not plans:
                notes.append(
                    f"a step is {1e3 * step:.2g} ms of computing on that device, and starting its operations takes "
                    "longer: these hours are far too few for so small a model"
                )
        plans.append(
            make_plan(
                rung,
                corpus,
                slots=wanted,
                speeds=speeds,
                overheads=scaled_overheads(measured(), calibration),
                calibration=calibration,
                effect=share,
                noise=spread,
            )
        )
    plan = plans[0]
    train_tokens = meta["splits"]["train"]["tokens"] if meta else None
    if study.scales:
        plan = join_plans(study, plans)
        notes += lengths(study, plans, train_tokens)
    elif train_tokens and study.fixed.tokens > train_tokens:
        notes.append(f"a trial reads the training text {study.fixed.tokens / train_tokens:.2g} times")
    return show(_finished(plan, how, source, notes), form)


def _finished(plan: dict[str, Any], how: str, noise_from: str | None, notes: list[str]) -> dict[str, Any]:
    """Return a plan with the sources of its numbers, the expected end of the study, and notes."""
    end = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=plan["seconds"]["wall"][1])
    sources = {"hours_from": how, "noise_from": noise_from, "expected_end": end.isoformat(timespec="minutes")}
    return {**plan, **sources, "notes": notes}


def _own_plans(
    study: OwnStudy,
    base: Path,
    slots: int,
    hours_from: str,
    effect: float,
    noise: float | None,
    progress: Progress,
) -> tuple[list[dict[str, Any]], str]:
    """Return the plan of each rung of a study of the user's own training, and where its hours come from."""
    measure, plans = hours_from == MEASURE, []
    if measure:
        progress.say(
            f"calibrating: a trial of each of {len(study.arms)} arms runs here for {own.PROBE_SECONDS:.0f} s, or to "
            "its second report; --hours-from 90s, the seconds of a trial, needs none"
        )
        progress.begin("trials timed", len(study.rungs) * own.probes(study, slots))
    for rung in study.rungs:
        assert isinstance(rung, OwnStudy)
        calibration, peak_mb = own.calibrate(rung, base, slots, progress.done) if measure else (None, None)
        speeds = calibration.speeds if calibration else own.given_speeds(rung, hours_from)
        overheads = scaled_overheads(measured(), calibration)
        plan = make_plan(
            rung,
            None,
            slots=slots,
            speeds=speeds,
            overheads=overheads,
            calibration=calibration,
            effect=effect,
            noise=noise,
            peak_mb=peak_mb,
        )
        plans.append(plan | {"names": {"budget": study.unit, "metric": study.metric.test}})
    here = f"the first reports of a trial of each arm on this machine, {slots} at a time"
    return plans, here if measure else f"{hours_from} per trial, as given"


def idle_slots(study: Study, slots: int) -> list[str]:
    """Return a note with a better `search.parallel` if the search cannot keep all slots busy; else an empty list."""
    busy, arms = side_by_side(study, "search"), sum(map(study.searches, study.arms))
    if not arms:
        return []
    fills = min(math.ceil(slots / arms), study.search.trials_per_arm)
    if busy >= slots or fills <= study.search.parallel:
        return []
    return [
        f"search: {busy} of {slots} slots can be busy, because an arm's trials wait for each other; search.parallel: "
        f"{fills} keeps {min(slots, arms * fills)} busy, but each suggestion then lacks the last {fills - 1} results"
    ]


def _noise(noise: str | None, output: Path) -> tuple[float | None, str | None]:
    """Return the noise and its source, from a percentage, a study's folder or a study's name; None if not given."""
    if noise is None:
        return None, None
    for folder in (Path(noise), output / noise):
        if (folder / "study.yaml").is_file():
            value, each = study_noise(folder)
            return value, f"{folder} ({', '.join(f'{arm} {sd:.2%}' for arm, sd in each.items())})"
    if not noise.strip().endswith("%"):
        raise StudyError(
            f"--noise {noise}: no study of that name in {output} and no percentage; allowed: a study, or such as 0.3%"
        )
    return percentage(noise, "--noise"), "given"
