"""Check in seconds what a verdict needs from the user's own training (`pagating check`), and keep what was found."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from analysis.io.files import read_json
from analysis.io.write import write_whole
from tune.study.own_study import OwnStudy
from tune.subject.function import release, waits
from tune.subject.short import ShortTrial, ShortTrials, subject_of
from tune.subject.sources import draft

SEEDS = (1, 2)
NOISE = 0.1  # share of the difference between two seeds up to which a repeated trial counts as the same
NOT_CHECKED = "not checked"
RECORD = "check.json"  # file in a study's folder with what its last check found
LEAK_MB, LEAK_SHARE = 64.0, 1.25  # growth of memory in the second half of a trial that is reported


class Grade(StrEnum):
    """How far a trial repeats itself."""

    SAME_BITS = "same bits"
    WITHIN_NOISE = "same within noise"
    UNSEEDED = "unseeded"


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        what: What was checked.
        passed: Whether the study may run. None is a remark.
        said: What was seen.
        grade: How far a trial repeats itself, if this was checked.
    """

    what: str
    passed: bool | None
    said: str
    grade: Grade | None = None

    def __str__(self) -> str:
        word = "note" if self.passed is None else "ok" if self.passed else "REFUSED"
        return f"{word:8}{self.what}: {self.said}"


def most_trials(study: OwnStudy) -> int:
    """Return the largest number of trials of a check."""
    return len(study.arms) + 6 + 2 * study.reuse


def check(
    study: OwnStudy, base: Path, share: float, folder: Path | None = None, ended: Callable[[], None] | None = None
) -> Iterator[Finding]:
    """Yield what a few short trials show, and keep it at the end.

    Args:
        study: The study.
        base: Folder of the study file.
        share: Share of the budget that each trial has, in (0, 1].
        folder: The study's folder, which gets the file `RECORD`. None keeps nothing.
        ended: Called after each trial.

    Raises:
        StudyError: The user's files cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="pagating-check-") as scratch:
        sources = draft(study, base, Path(scratch)).write()
        before = _files(sources.working_folder)
        found = []
        for finding in _found(ShortTrials(subject_of(study, sources), Path(scratch) / "trials", ended), share):
            found.append(finding)
            yield finding
        written = sorted(name for name, at in _files(sources.working_folder).items() if before.get(name) != at)
        shared = Finding(
            "files of trials",
            not written,
            f"trials wrote {written[0]} in {sources.working_folder}, where those that run side by side overwrite each "
            "other's; write to trial.folder"
            if written
            else "none outside of the trial's folder",
        )
        yield shared
        if folder:
            _keep(folder, sources.identity(), [*found, shared], share)


def _keep(folder: Path, identity: Mapping[str, Any], found: list[Finding], share: float) -> None:
    """Write the record of a check. `identity` names the checked files, `share` the part of the budget of its trials."""
    kept = {
        "grade": next((str(finding.grade) for finding in found if finding.grade), None),
        "refused": [f"{finding.what}: {finding.said}" for finding in found if finding.passed is False],
        "share": share,
        **identity,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, json.dumps(kept, indent=1) + "\n")


def recorded(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the last check of a study found, as `grade`, `refused` and `share`.

    The grade is `not checked` if there was no check, or one of other files than those that `identity` names, and None
    if the check did not come so far.
    """
    kept = read_json(folder / RECORD)
    if any(kept.get(name) != identity.get(name) for name in ("code", "runs")):
        return {"grade": NOT_CHECKED}
    return {name: kept.get(name) for name in ("grade", "refused", "share")}


def _found(trials: ShortTrials, share: float) -> Iterator[Finding]:
    study = trials.study

    def run(stage: str, arm: str, seed: int) -> ShortTrial:
        return trials.run(stage, arm, seed, trials.budget(arm, share))

    ended: dict[str, ShortTrial] = {}
    for arm in study.arms:
        ended[arm] = one = run("search", arm, SEEDS[0])
        said = f"{one.outcome}, {study.metric.name} {study.sign * one.losses[-1]:.6g}" if one.final else one.reason
        yield Finding(f"arm {arm} trains", one.outcome == "completed", said)
    first = ended[study.baseline]
    if not first.final:
        return
    again, other = (run("search", study.baseline, seed) for seed in SEEDS)
    if not again.final or not other.final:
        yield Finding("the same seed again", False, again.reason or other.reason)
        return
    apart, of_seeds = (_apart(one.losses, first.losses) for one in (again, other))
    yield Finding(
        "another seed",
        of_seeds > 0,
        f"changes {study.metric.name} by {of_seeds:.3g}" if of_seeds else "gives the same bits: the seed is not used",
    )
    grade = Grade.SAME_BITS if again.losses == first.losses else Grade.WITHIN_NOISE
    if apart > NOISE * of_seeds:
        grade = Grade.UNSEEDED
    said = "" if grade is Grade.SAME_BITS else f" ({study.metric.name} {apart:.3g} apart; two seeds: {of_seeds:.3g})"
    if grade is Grade.UNSEEDED and of_seeds:
        said += "; draw every random number, the order of the data too, from trial.rng or trial.seed"
    yield Finding("the same seed again", grade is not Grade.UNSEEDED, f"{grade}{said}", grade)
    if grade is not Grade.UNSEEDED:
        yield _resumed(trials, trials.budget(study.baseline, share), first, NOISE * of_seeds)
    for arm, one in ended.items():
        if arm != study.baseline and study.arms[arm].share == 1 and one.final and grade is not Grade.UNSEEDED:
            same = one.losses == first.losses
            said = f"gives the bits of {study.baseline}: its settings have no effect" if same else "have an effect"
            yield Finding(f"settings of {arm}", not same, said)
    if study.reuse and grade is not Grade.UNSEEDED:
        yield _reused(trials, share, first, NOISE * of_seeds)
    last = run(study.stages[-1], study.baseline, SEEDS[0])
    test = f"{study.metric.test} {study.sign * last.final['test_nll']:.6g}" if last.final else last.reason
    yield Finding("the last stage", bool(last.final), test)
    grown, peak = first.final.get("memory_growth_mb", 0.0), first.final.get("peak_rss_mb")
    if peak is not None:
        leaks = grown > LEAK_MB and peak > LEAK_SHARE * (peak - grown)
        said = f"at most {peak:.0f} MB" + (
            f"; it grew by {grown:.0f} MB in the second half of a trial" if leaks else ""
        )
        yield Finding("memory", None if leaks else True, said)


def _resumed(trials: ShortTrials, budget: int, whole: ShortTrial, most: float) -> Finding:
    """Stop a trial of the baseline at its first report, start it again in its folder, and compare it with a whole one.

    Args:
        trials: What runs short trials.
        budget: Length of the trial.
        whole: The same trial without a stop.
        most: Largest difference of two losses that counts as noise.
    """
    what, arm, place = "a stopped trial", trials.study.baseline, trials.place()
    if len(whole.rows) < 2:
        return Finding(what, True, "has to start anew: the only report is at its end")
    stopped = trials.run("search", arm, SEEDS[0], budget, place, enough=lambda reports, seconds: reports > 0)
    again = trials.run("search", arm, SEEDS[0], budget, place)
    if not again.final:
        return Finding(what, False, f"does not train again in its folder: {again.reason}")
    at = stopped.rows[-1]["step"]
    goes_on = again.rows[0]["step"] > at
    said = f"goes on after step {at}" if goes_on else "starts anew"
    before = {row["step"]: row["val_nll"] for row in whole.rows}
    apart = max(abs(row["val_nll"] - before.get(row["step"], row["val_nll"])) for row in again.rows)
    how = "the same bits" if apart == 0 else f"{trials.study.metric.name} {apart:.3g} apart"
    return Finding(what, apart <= most, f"{said}: {how}")


def _reused(trials: ShortTrials, share: float, fresh: ShortTrial, noise: float) -> Finding:
    """Compare a trial in a fresh process with the same one in the process of another arm and seed."""
    study, what = trials.study, "a reused process"
    other = next((arm for arm in study.arms if arm != study.baseline), study.baseline)
    release()
    trials.run("search", other, SEEDS[1], trials.budget(other, share), reuse=True)
    if not waits():
        return Finding(what, None, "none: a trial leaves a process or memory behind, so that each has a fresh process")
    again = trials.run("search", study.baseline, SEEDS[0], fresh.budget, reuse=True)
    release()
    if not again.final or again.losses == fresh.losses:
        return Finding(what, bool(again.final), "same bits as in a fresh one" if again.final else again.reason)
    apart = _apart(again.losses, fresh.losses)
    said = f"{study.metric.name} {apart:.3g} apart from a fresh one"
    if apart <= noise:
        return Finding(what, None, said)
    return Finding(what, False, f"{said}: the function keeps state between trials, such as a global; leave reuse out")


def _apart(one: list[float], other: list[float]) -> float:
    """Return the largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(one, other, strict=False))


def _files(folder: Path) -> dict[str, int]:
    """Return the times of the last change of the files in a folder, without those of Python's cache."""
    return {
        path.name: path.stat().st_mtime_ns
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".")
    }
