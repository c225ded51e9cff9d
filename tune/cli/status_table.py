"""Table of a study's progress, used by a running sweep and by `pagating status`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from analysis.io.names import STAGES
from analysis.io.text import chosen_line, duration, one_line
from tune.run import heartbeat, ledger
from tune.run.progress import LadderProgress, Progress, progress_of
from tune.run.standing import concluded_after, verdict_of
from tune.study.cell import Record
from tune.study.study import Study

HEADINGS = {  # state of cells: (heading in a wide terminal, in a narrow one)
    "completed": ("done", "done"),
    "running": ("running", "run"),
    "stopped_early": ("stopped early", "stop"),
    "infeasible": ("infeasible", "inf"),
    "failed": ("failed", "fail"),
}
MEANING = {"search": "best of search", "calibrate": "best of calibrate", "confirm": "mean of confirm"}
NARROW = 64  # headings are short in a terminal of fewer characters
LONG = 5000  # characters of a verdict that are shown
MOST_RUNNING = 8  # trials that have a line
LEAST_ARMS = 3  # number of arms that are shown even if the terminal has too few lines


@dataclass
class View:
    """Progress of a study with the lines around it. It is rendered for the current size of the terminal.

    Attributes:
        progress: Progress of the study.
        now: Current time, seconds since 1970.
        slots: Number of cells that run in parallel, 0 if nothing runs.
        lines: Lines below the tables.
        note: Last line.
        title: Show the study's name and question above the tables.
        fit: Show only as many arms as the terminal has lines for.
        concluded: The lines have a verdict.
        failure: Cell that failed last and has not ended since, and the reason.
    """

    progress: Progress
    now: float
    slots: int = 0
    lines: list[str] = field(default_factory=list)
    note: str = ""
    title: bool = True
    fit: bool = False
    concluded: bool = False
    failure: tuple[str, str] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        lines = [pace(self), one_line(chosen_line(self.progress.chosen)), *self.lines, self.note]
        texts = [Text(line) for line in lines if line]
        above, cells = [_title(self.progress)] if self.title else [], stages(self.progress, width)
        room = None
        if self.fit:
            wrapped = sum(len(text.wrap(console, width)) for text in [*above, *texts])
            heads = 2 + 2 + 1  # lines of the two headings with their rules, and the blank line between the tables
            room = console.size.height - 1 - wrapped - heads - cells.row_count
        yield Group(*above, cells, "", *arms(self.progress, width, room), *texts)


def look(study: Study, folder: Path, now: float | None = None) -> View:
    """Read the progress of a study from its folder, running or not. Nothing is locked or written.

    Args:
        study: The study.
        folder: The study's folder.
        now: Time in seconds since 1970. None means the current time.
    """
    path = folder / "ledger.jsonl"
    beat, held, driver = heartbeat.read(folder), ledger.is_held(path), ledger.holder(path)
    if held and beat and beat.driver != driver:
        beat = None  # written by a driver that was killed; the current one has not written yet
    events = ledger.read(path)
    progress = progress_of(study, events)
    now = time.time() if now is None else now
    progress.set_running(beat.running if beat and held else ())
    view = View(progress, now, beat.slots if beat and held else 0, [f"Log:     {folder / 'logs'}"])
    view.failure = next(reversed(progress.failures.items()), None)
    if view.failure:
        view.lines.insert(0, f"Failed:  {one_line(': '.join(view.failure), LONG)}")
    last = max((moment for moment in (progress.last, beat.time if beat else None) if moment), default=now)
    age = duration(max(0.0, now - last))
    over = progress.finished or concluded_after(folder, progress.last)
    if study.shown and beat and held:
        view.lines = [*_running(study, ledger.records(events), beat.running, now), *view.lines]
    if held:
        view.note = f"It runs: {one_line(driver)}; last update {age} ago."
    elif over:
        if summary := verdict_of(folder, progress.last)[1]:
            view.lines.insert(0, f"Verdict: {one_line(summary, LONG)}")
            view.concluded = True
        view.note = f"It has ended, {age} ago. The report: {folder / 'report.html'}"
    else:
        view.note = f"It is not running; last update {age} ago. `pagating sweep` with its study file continues it."
    return view


def _running(study: Study, records: Mapping[str, Record], running: Sequence[str], now: float) -> list[str]:
    """Return a line for each trial of the user's own training that runs: how far it is, and when it last reported."""
    unit, most, lines = study.shown["tokens"], duration(study.resources.stall_timeout), []
    for record in (records[key] for key in running if key in records):
        since = record.times[-1] if record.times else record.started or now
        at = f"{record.curve[-1]['step']} {unit}" if record.curve else "no report yet"
        lines.append(
            f"Running: {record.cell.key}: {at}, silent for {duration(max(0.0, now - since))} of at most {most}"
        )
    return lines[:MOST_RUNNING] + [f"and {len(lines) - MOST_RUNNING} more"] * (len(lines) > MOST_RUNNING)


def as_object(view: View) -> dict[str, Any]:
    """Return the progress of a study as an object of JSON. Losses have the sign and the name of the study's metric."""
    progress, study = view.progress, view.progress.study
    left = progress.seconds_left(view.slots, view.now) if progress.running else None
    metric = study.shown.get("val_nll", "val_nll")
    return {
        "study": study.name,
        **({"rung": progress.rung, "rungs": len(study.scales)} if isinstance(progress, LadderProgress) else {}),
        "stage": None if progress.finished else progress.stage,
        "finished": progress.finished,
        "running": progress.running,
        "slots": view.slots,
        "ended": progress.ended,
        **({"failure": dict(zip(("cell", "reason"), view.failure, strict=True))} if view.failure else {}),
        "seconds_left": None if left is None else {"expected": left[0], "most": left[1]},
        "stages": {
            stage: {state: progress.count(stage, state) for state in HEADINGS}
            | dict(zip(("least", "expected", "most"), progress.planned(stage), strict=True))
            for stage in study.stages
        },
        "arms": {
            arm: {
                stage: {metric: study.sign * found.loss, "trials": found.n}
                for stage in study.stages
                if (found := progress.best(stage, arm)) is not None
            }
            for arm in study.arms
        },
    }


def _title(progress: Progress) -> Text:
    title = Text.assemble((progress.study.name, "bold"), ": ", one_line(progress.study.question))
    if isinstance(progress, LadderProgress):
        title.append(f" (rung {progress.rung} of {len(progress.study.scales)})")
    return title


def stages(progress: Progress, width: int) -> Table:
    """Return a table with the number of cells of every stage in each state, and their planned number."""
    shown = [stage for stage in STAGES if progress.study.runs(stage)]
    states = [s for s in HEADINGS if s != "failed" or any(progress.count(stage, s) for stage in shown)]
    out = _table("stage", *(HEADINGS[state][width < NARROW] for state in states), "of")
    for stage in shown:
        least, _, most = progress.planned(stage)
        now = stage == progress.stage and not progress.finished
        counts = [str(progress.count(stage, state)) for state in states]
        of = f"{least:.0f}" if least == most else f"{least:.0f}{'-' if width < NARROW else ' to '}{most:.0f}"
        out.add_row(Text(stage), *counts, of, style="bold" if now else None)
    return out


def arms(progress: Progress, width: int, room: int | None = None) -> list[RenderableType]:
    """Return a table with each arm's best validation loss (nats per token) and setting in every stage.

    Args:
        progress: Progress of the study.
        width: Width in characters. If it is too small, empty stages are left out, then the first ones.
        room: Number of lines for the arms. None means enough for all. A last line counts the arms that do not fit.
    """
    names = list(progress.study.arms)
    shown = [stage for stage in STAGES if progress.study.runs(stage)]
    cells = {stage: [best(progress, stage, arm) for arm in names] for stage in shown}
    while len(shown) > 1 and max(map(len, names)) + sum(2 + _width(cells[stage], stage) for stage in shown) > width:
        empty = [stage for stage in shown if not any(cells[stage])]
        shown.remove(empty[-1] if empty else shown[0])
    out = _table(progress.study.shown.get("val_nll", "val nll"), *(MEANING[stage] for stage in shown))
    fits = len(names) if room is None or room >= len(names) else max(LEAST_ARMS, room - 1)
    for number, arm in enumerate(names[:fits]):
        out.add_row(Text(arm), *(cells[stage][number] for stage in shown))
    left = len(names) - fits
    return [out, Text(f"and {left} more arms", style="dim")] if left > 0 else [out]


def _width(cells: list[str], stage: str) -> int:
    return max(len(text) for text in [*cells, MEANING[stage]])


def best(progress: Progress, stage: str, arm: str) -> str:
    """Return a text with an arm's best loss in a stage, its setting and, for a mean, the number of seeds."""
    found = progress.best(stage, arm)
    if found is None:
        lost = progress.count(stage, "infeasible", arm=arm)
        return "none: infeasible" if lost and not progress.count(stage, "running", "waiting", arm=arm) else ""
    seeds = f" n={found.n}" if stage == "confirm" else ""
    return f"{progress.study.sign * found.loss:.4f}{progress.study.setting(found.setting)}{seeds}"


def pace(view: View) -> str:
    """Return a text with speed and time left. It is empty if no cells run."""
    progress, parts = view.progress, []
    if not progress.running or progress.finished:
        return ""
    if speed := progress.tokens_per_second:
        parts.append(f"{speed:,.0f} {progress.study.shown.get('tokens', 'tokens')}/s")
    if left := progress.seconds_left(view.slots, view.now):
        likely, most = (duration(seconds) for seconds in left)
        parts.append(f"about {likely} left" + (f", at most {most}" if most != likely else ""))
    parts.append(f"{progress.running} running in {view.slots} slot{'s' if view.slots != 1 else ''}")
    return "; ".join(parts)


def _table(first: str, *others: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    out.add_column(first, no_wrap=True, overflow="ellipsis")
    for name in others:
        out.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    return out
