"""Decide whether a study folder may be continued with a changed study file, and which arms were added to a study."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from analysis.io.text import one_line
from tune.decide.confirm import looks_made
from tune.errors import StudyError
from tune.run import ledger
from tune.study.files import FILE, LEDGER, parse
from tune.study.own_gates import with_moved_gates
from tune.study.sections import AUTO
from tune.study.study import Study
from tune.subject.check import RECORD

EXTENDABLE = ("confirm.seeds", "confirm.max_seeds", "confirm.reserve", "contrasts", "search.trials_per_arm")
# keys that may change freely, because no result depends on them
ANY = (
    "question",
    "tracking",
    "resources.stall_timeout",
    "address",
    "storage",
    "keep.models",
    "keep.checkpoints",
    "confirm.racing",
    "reuse",  # `pagating check` refuses a function for which it changes a result
    "model.preset",  # a name for sizes, which are compared
)
# places of inputs, which `Inputs.check_begun` compares by their digests
PLACES = ("corpus.source", "corpus.hub", "corpus.files", "tokenizer", "model.pretrained", "trial")
DECISIONS = ("grid", "corners", "chosen")  # events of the ledger
MOST_SHOWN = 3  # changes that a refusal lists


def groups(events: Iterable[dict[str, Any]], arms: Iterable[str] = ()) -> list[list[str]]:
    """Return the arms in groups that go through the stages one after the other.

    The first group is that of the arms with which the study began. Arms that were added before anything was decided
    join it. Arms that were added after the decisions of a group form the next one.

    Args:
        events: Events of the study's ledger.
        arms: All arms of the study; without them, only those that the ledger has.
    """
    found: list[list[str]] = [[]]
    seen: set[str] = set()
    decided = False
    for event in events:
        # an arm begins with a suggestion, or with a grid if it does not search
        begun = [event["arm"]] if event["event"] == "suggested" else event.get("best") or ()
        if added := [arm for arm in begun if arm not in seen]:
            seen.update(added)
            found, decided = [*found, []] if decided else found, False
            found[-1] += added
        decided |= event["event"] in DECISIONS and bool(seen)  # a study that tunes nothing chooses first
    new = [arm for arm in arms if arm not in seen]
    return [*found, new] if decided and new else [*found[:-1], [*found[-1], *new]]


def looked(study: Study, folder: Path | None, events: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of seeds at which a study of the fixed rule had a look, or must have one (`looks_made`).

    A ledger without any look was written before looks were recorded. Then the study file in the folder, which is that
    of the last run, has the number of seeds that was planned.
    """
    made = looks_made(events, study.seed(study.confirm.first_seed))
    recorded = folder / FILE if folder else None
    if any(event["event"] == "look" for event in events) or recorded is None or not recorded.exists():
        return made
    before = parse(recorded.read_text(encoding="utf-8"), recorded)
    return [before.confirm.seeds] if _confirmed(events) and before.confirm.rule == "fixed" else made


def own_corpus(base: Path, folder: Path) -> str | None:
    """Return the digest of the corpus that a study was begun with if its file is the one in its folder; else None."""
    path = folder / LEDGER
    if base.resolve() != folder.resolve() or not path.exists():
        return None
    return next((event["corpus"] for event in ledger.read(path) if event["event"] == "study"), None)


def check_folder(study: Study, folder: Path, base: Path = Path()) -> Study:
    """Return the study, with the precision that was decided for it if it has begun and its file asks for `auto`.

    Raises StudyError if the folder belongs to another configuration. More arms, seeds or trials than before are
    allowed, and other places of inputs with the same bytes.

    Args:
        study: The study.
        folder: Its folder.
        base: Folder of the study file, for own gates.
    """
    recorded = folder / "study.yaml"
    if not recorded.exists():
        if folder.exists() and any(path.name != RECORD for path in folder.iterdir()):
            raise StudyError(
                f"{folder}: has a ledger but no study.yaml; put back a copy, or choose another name or --output"
                if (folder / LEDGER).exists()
                else f"{folder}: is not empty and contains no study; choose another name or --output"
            )
        return study
    if not (folder / LEDGER).exists() and (folder / "trials.parquet").exists():
        raise StudyError(
            f"{folder}: has tables but no {LEDGER}, so the study cannot continue and a new one would replace them; put "
            "the ledger back, remove the study, or choose another name or --output"
        )
    before = with_moved_gates(parse(recorded.read_text(encoding="utf-8"), recorded), folder, study, base)
    path = folder / "ledger.jsonl"
    events = ledger.read(path) if path.exists() else []
    same = study.with_precision(before.fixed.precision) if study.fixed.precision == AUTO else study
    begun = max((event.get("rung", 0) for event in events if event["event"] == "suggested"), default=0)
    if refused := _changed(before, same, begun) or _not_an_extension(before, same, events):
        raise StudyError(f"{folder}: {refused}, or give the study another name")
    return same if events else study


def _changed(before: Study, now: Study, begun: int = 0) -> str:
    """Return the changes that a begun study cannot take, and what to do instead; "" without any.

    Args:
        before: The study as it was begun.
        now: The study as it is now.
        begun: Number of rungs that have trials. Those above may have other sizes, because nothing depends on them yet.
    """
    gone = [arm for arm in before.arms if arm not in now.arms]
    if gone:
        new = [arm for arm in now.arms if arm not in before.arms]
        how = f" (if it is now called {new[0]}: an arm cannot be renamed)" if len(gone) == len(new) == 1 else ""
        return f"arms.{gone[0]} is no longer in the study file{how}; an arm cannot be removed: put it back"
    if before.baseline != now.baseline:
        return (
            f"the baseline was {before.baseline} and is now {now.baseline}; it cannot change: mark the first one again"
        )
    was, is_now = (item.model_dump(exclude_none=True) for item in (before, now))
    if before.scales and len(before.scales) == len(now.scales):  # their number sets the level of each
        for content in (was, is_now):
            del content["scales"][begun:]
    is_now["arms"] = {arm: is_now["arms"][arm] for arm in was["arms"]}
    free = (*ANY, *PLACES, *EXTENDABLE)
    changes = [
        change
        for change in _differences(was, is_now)
        if not f"{change[0]}.".startswith(tuple(f"{key}." for key in free))
    ]
    if not changes:
        return ""
    shown = [f"{key} was {_words(old)} and is now {_words(new)}" for key, old, new in changes[:MOST_SHOWN]]
    more = f", and {len(changes) - MOST_SHOWN} more" if len(changes) > MOST_SHOWN else ""
    in_arms = all(key.startswith("arms.") for key, _, _ in changes)
    instead = "keep the arm as it was and add the changed one as a new arm" if in_arms else "undo the change"
    return f"{', '.join(shown)}{more}; the study has trials of the earlier configuration: {instead}"


def _not_an_extension(before: Study, now: Study, events: list[dict[str, Any]]) -> str:
    """Return the reason why a study cannot change its arms or its numbers of seeds and trials, or "" if it can.

    The fixed rule allows more seeds, at a price (`analysis.stats.sequential.shares`). An e-process does too, because it
    is valid at any number of seeds. The bounds of
    an O'Brien-Fleming rule belong to its looks and to their arms, so its cap cannot change, and no arm can be added
    after the learning rates were chosen. Search trials may be added until the grid of learning rates is centred on the
    best of them.
    """
    sizes = {
        "confirm.seeds": (before.confirm.seeds, now.confirm.seeds),
        "confirm.max_seeds": (before.confirm.looks[-1], now.confirm.looks[-1]),
        "search.trials_per_arm": (before.search.trials_per_arm, now.search.trials_per_arm),
    }
    changes = {key: f"{key} was {old} and is now {new}" for key, (old, new) in sizes.items() if old != new}
    for key, change in changes.items():
        if sizes[key][0] > sizes[key][1]:
            return f"{change}; it can only grow: undo the change"
    if before.confirm.reserve != now.confirm.reserve and _confirmed(events):
        return (
            f"confirm.reserve was {before.confirm.reserve:g} and is now {now.confirm.reserve:g}; it is named before "
            "the first confirm trial has ended: undo the change"
        )
    if now.overlap and "confirm.seeds" in changes and _confirmed(events):
        return (
            f"{changes['confirm.seeds']}; the variance of splits of one data set (resampling) is known for one look: "
            "undo the change"
        )
    if before.contrasts != now.contrasts and _confirmed(events):
        return (
            f"contrasts was {_words(before.contrasts)} and is now {_words(now.contrasts)}; the family of comparisons "
            "is named before the first confirm trial has ended: undo the change"
        )
    decided = any(event["event"] in DECISIONS for event in events)
    added = [arm for arm in now.arms if arm not in before.arms]
    if now.confirm.rule == "obrien-fleming":
        if "confirm.max_seeds" in changes:
            return (
                f"{changes['confirm.max_seeds']}; the bounds of obrien-fleming hold only for the looks that were set "
                "before the first one: undo the change"
            )
        if added and decided:
            return (
                f"arms.{added[0]} is new, and the bounds of obrien-fleming hold only for the arms that were set before "
                "the learning rates were chosen: leave it out"
            )
    if "search.trials_per_arm" in changes and decided and now.stages != ["search"]:  # else nothing builds on a choice
        return (
            f"{changes['search.trials_per_arm']}; the learning rates were already chosen around the best trials, and "
            "more trials would change that choice: undo the change"
        )
    return ""


def _confirmed(events: list[dict[str, Any]]) -> bool:
    """Return True if a confirm trial has ended, of which somebody may have seen the loss."""
    return any(event["event"] == "ended" and event["cell"].startswith("confirm/") for event in events)


def _differences(before: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key, the earlier value and the present one of each value that differs in two nested mappings."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif where == "scales" and len(before) == len(now):
        for number, rungs in enumerate(zip(before, now, strict=True), 1):
            yield from _differences(*rungs, f"scales: rung {number}")
    elif where == "scales":
        yield "scales", f"a ladder of {len(before)} rungs", f"one of {len(now)}"
    elif before != now:
        yield where, before, now


def _words(value: Any) -> str:
    """Return a value as a study file has it, on one line."""
    if value is None:
        return "not set"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return one_line(text.removesuffix("...\n"), 120)
