"""Run, check and read studies from Python, in a script or in a notebook."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from analysis.io.text import one_line, redact
from analysis.verdict.kinds import Comparison, Result, as_object
from tune.cli.screen import plain
from tune.cli.status_table import View
from tune.cli.sweep import NOTHING_TRAINED, written
from tune.errors import StudyError, StudyStopped
from tune.run import ledger, tables
from tune.run.interrupt import CallersInterruption
from tune.run.progress import progress_of
from tune.study.files import LEDGER, Found, find, of_mapping
from tune.study.own_study import OwnStudy
from tune.study.study import Study
from tune.subject.process import IN_TRIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot
    from pandas import DataFrame

    from analysis.report.findings import Findings
    from tune.backend.backend import Backend
    from tune.run.study_run import CellEnded, StudyRun
    from tune.subject.check import Finding

STUDIES = "studies"
REFRESH_SECONDS = 1.0  # between two drawings of a notebook's table
KEYS = Path("run_study")  # named in errors of a study without a file


class ShownResult(Result):
    """Verdict of a study, with a text for the terminal and Markdown for a notebook."""

    def of(self, arm: str) -> Comparison:
        """Return the comparison of an arm with the baseline. Raises StudyError if the verdict has none."""
        for row in self.comparisons:
            if row.arm == arm:
                return row
        raise StudyError(f"the verdict has no arm '{arm}'; it has {', '.join(row.arm for row in self.comparisons)}")

    def __repr__(self) -> str:
        lines = [] if self.unfinished else [f"  {row.label}: {one_line(row.why)}" for row in self.every]
        return "\n".join([self.summary, *lines])

    def _repr_markdown_(self) -> str:
        from analysis.report.build import verdict_markdown

        return verdict_markdown(self)


@dataclass(frozen=True, eq=False, repr=False)
class Figure:
    """Figure of a report. A notebook shows it."""

    name: str
    takeaway: str
    caption: str
    plot: Plot

    @property
    def svg(self) -> str:
        """The figure as text of an SVG file."""
        from analysis.report.plots import render

        return render(self.plot, salt=self.name).decode()

    def __repr__(self) -> str:
        return f"{self.name}: {self.takeaway or self.caption}"

    def _repr_html_(self) -> str:
        image = self.svg[self.svg.index("<svg") :]
        return f'<figure style="background:white">{image}<figcaption>{escape(self.takeaway)}</figcaption></figure>'


class Figures(dict[str, Figure]):
    """Figures by name. A notebook shows all of them."""

    def _repr_html_(self) -> str:
        return "".join(figure._repr_html_() for figure in self.values())


@dataclass(frozen=True, eq=False, repr=False)
class StudyResult:
    """What a study has found. Tables, verdict and figures are computed when they are first read.

    Attributes:
        study: The study.
        folder: Its folder.
        finished: All its trials have ended.
    """

    study: Study
    folder: Path
    finished: bool

    @cached_property
    def trials(self) -> DataFrame:
        """One row per trial, in the names of the study's metric and budget."""
        import pandas as pd

        return pd.read_parquet(self.folder / "trials.parquet")

    @cached_property
    def curves(self) -> DataFrame:
        """One row per report of a trial."""
        import pandas as pd

        return pd.read_parquet(self.folder / "curves.parquet")

    @cached_property
    def verdict(self) -> ShownResult:
        """Verdict on every arm; `verdict.of(ARM)` is the comparison of one arm with the baseline."""
        return ShownResult(**vars(self._findings.result))

    @cached_property
    def figures(self) -> Figures:
        """Figures of the report, by name."""
        from analysis.report.figures import drawn

        shown = drawn(self._findings)
        return Figures({name: Figure(name, one.takeaway, one.caption, one.plot) for name, one in shown.items()})

    @cached_property
    def report(self) -> Path:
        """Path of report.html, which is written when this is first read, with verdict.json, tables and figures."""
        return written(self.study, self.folder)[1]

    @cached_property
    def _findings(self) -> Findings:
        from analysis.io.study import load
        from analysis.report.findings import Findings

        return Findings(load(self.folder))

    def __repr__(self) -> str:
        state = repr(self.verdict) if self.finished else "it has not ended; run_study continues it"
        return f"{self.study.name}: {one_line(self.study.question)}\n{state}\n{self.folder}"

    def _repr_markdown_(self) -> str:
        return self.verdict._repr_markdown_() if self.finished else repr(self)


def run_study(
    study: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike[str] = STUDIES,
    backend: Literal["inline", "ray"] | Backend = "inline",
    slots: int | None = None,
    tracking: str | None = None,
    progress: bool = True,
    **keys: Any,
) -> StudyResult:
    """Run a study, or its missing trials, and return what it found.

    An interrupted call keeps the trials that have ended, and the same call continues. It works in a notebook and in any
    thread; only the main thread can be interrupted in order.

    Args:
        study: Study file, name of a study in `output`, or the keys of a study file as a dict.
        output: Folder of studies.
        backend: `inline` trains one trial after the other in this process, `ray` several side by side.
        slots: Number of trials at the same time with Ray. None means as many as cores.
        tracking: MLflow tracking URI. None means that of the study or of MLFLOW_TRACKING_URI, or else no tracking.
        progress: Show the progress: a table in a notebook, a line per trial elsewhere.
        keys: Keys of a study file, in place of those in a dict. `trial` may be a function of a file that Python can
            import. `name` is by default that of the file of `trial`.

    Returns:
        Tables, verdict, figures and report.

    Raises:
        StudyError, CorpusError, LedgerError: The study cannot start or continue. The message is one line.
        StudyStopped, OSError: The study stopped early. The trials that have ended are kept.
        KeyboardInterrupt: The study was interrupted. The trials that have ended are kept.
    """
    from tune.sweep import sweep

    if IN_TRIAL in os.environ:
        raise StudyError(
            "run_study was called in the process of a trial, which loads the file of your function: write the call "
            'below `if __name__ == "__main__":`, or into another file'
        )
    found = _found(study, keys, Path(output))
    shown = _Progress(progress)
    with CallersInterruption(shown.warn) as interruption:
        run = sweep(
            found.study,
            found.base,
            found.output,
            _backend(backend, slots, found.study, shown.warn),
            tracking_uri=_tracking(tracking, found.study),
            listen=shown.ended,
            interruption=interruption,
            warn=shown.warn,
            say=shown.say,
            watch=shown.watch,
        )
    if not run.stages.finished:
        raise KeyboardInterrupt(f"{found.study.name}: what has ended is kept; the same call continues")
    if run.stages.hopeless:
        reason = next(record.reason for record in run.records.values() if record.reason)
        raise StudyStopped(f"{NOTHING_TRAINED}: {one_line(redact(reason))}")
    result = StudyResult(run.study, run.folder, finished=True)
    assert result.report
    if owed := run.tracker.finish(as_object(result.verdict)):
        shown.warn(owed)
    return result


def load_study(study: str | os.PathLike[str], *, output: str | os.PathLike[str] = STUDIES) -> StudyResult:
    """Return what a study has found so far. Nothing is trained.

    Args:
        study: Name of a study in `output`, its folder, or its file.
        output: Folder of studies.

    Raises:
        StudyError: There is no such study, or no trial of it has ended.
    """
    found = find(Path(study), Path(output))
    folder = found.output / found.study.name
    if not (folder / LEDGER).is_file():
        raise StudyError(f"{folder}: the study was not begun; run_study begins it")
    events = ledger.read(folder / LEDGER)
    if all(record.outcome is None for record in ledger.records(events).values()):
        raise StudyError(f"{folder}: no trial has ended; run_study continues it")
    tables.write_tables(found.study.name, events, folder, found.study)
    return StudyResult(found.study, folder, progress_of(found.study, events).finished)


class StudyPlan(dict[str, Any]):
    """Cost of a study before it runs, as `pagating plan --format json` has it."""

    def __repr__(self) -> str:
        from tune.plan.page import show

        return show(self, "terminal")


def plan_study(
    study: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike[str] = STUDIES,
    slots: int = 1,
    effect: str = "0.5%",
    noise: str | None = None,
    **keys: Any,
) -> StudyPlan:
    """Train for some seconds; return what a study will cost, and the differences that it can see.

    Args:
        study: Study file, or its keys as a dict.
        output: Folder of studies.
        slots: Number of trials at the same time.
        effect: Difference to detect, a percentage of the baseline's metric.
        noise: Standard deviation of paired differences: an earlier study, or a percentage. None leaves the power out.
        keys: Keys of a study file, as for `run_study`.

    Raises:
        StudyError, CorpusError: The study or its inputs cannot be used.
    """
    from pagating.hardware import UTILISATION
    from tune.plan.plan import run
    from tune.plan.time import MEASURE

    text = run(
        _found(study, keys, Path(output)),
        Path(output),
        slots=slots,
        hours_from=MEASURE,
        utilisation=UTILISATION,
        effect=effect,
        noise=noise,
        form="json",
    )
    return StudyPlan(json.loads(text))


class CheckResult(list["Finding"]):
    """Findings of a check, one line each. `passed` is true if none is refused."""

    @property
    def passed(self) -> bool:
        """True if the study may run."""
        return all(finding.passed is not False for finding in self)

    def __repr__(self) -> str:
        return "\n".join(map(str, self))


def check_study(
    study: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    share: float = 0.1,
    output: str | os.PathLike[str] = STUDIES,
    **keys: Any,
) -> CheckResult:
    """Train a part of a trial of each arm; return what would spoil a verdict on your own training.

    Args:
        study: Study file, or its keys as a dict.
        share: Share of the budget that each trial has, in (0, 1].
        output: Folder of studies. The record of the check is kept in the study's folder.
        keys: Keys of a study file, as for `run_study`.

    Raises:
        StudyError: The study or its files cannot be used.
    """
    from tune.subject.check import check

    found = _found(study, keys, Path(output))
    if not isinstance(found.study, OwnStudy):
        raise StudyError(f"{found.study.name}: has no trial: a check is for your own training")
    return CheckResult(check(found.study, found.base, share, found.output / found.study.name))


# --- what is given ---------------------------------------------------------------------------------------------------


def _found(study: Any, keys: dict[str, Any], output: Path) -> Found:
    if isinstance(study, str | os.PathLike):
        if keys:
            raise StudyError(f"{os.fspath(study)}: got the keys {', '.join(keys)} too; give a file or keys, not both")
        return find(Path(study), output)
    if study is not None and not isinstance(study, Mapping):
        raise StudyError(f"study is a {type(study).__name__}; give a path, a dict or keys such as question=...")
    content = {**(study or {}), **keys}
    if callable(content.get("trial")):
        content["trial"] = reference(content["trial"])
    default = Path(content["trial"].partition(":")[0]).stem if isinstance(content.get("trial"), str) else None
    return Found(of_mapping(content, KEYS, default), Path.cwd(), output)


def reference(function: Callable[..., Any]) -> str:
    """Return FILE.py:NAME of a function, with the path from the working directory.

    Raises StudyError if a fresh process could not load it, for example one of a notebook's cell.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    file = inspect.getsourcefile(function) if inspect.isfunction(function) or inspect.isclass(function) else None
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None or not os.path.isfile(file) or (function.__module__ == "__main__" and main is None):
        raise StudyError(
            f"trial: {name} is in no file, so that a fresh process cannot load it: begin its cell with "
            "`%%writefile my_train.py`, with all that it imports, and give trial='my_train.py:"
            f"{name.rpartition('.')[2]}'"
        )
    if not name.isidentifier():
        raise StudyError(f"trial: {name} of {file} is inside another function or class: define it at the top level")
    return f"{os.path.relpath(file)}:{name}"


def _backend(given: Any, slots: int | None, study: Study, warn: Callable[[str], None]) -> Backend:
    if given == "inline":
        from tune.backend.inline import Inline  # loads torch

        return Inline()
    if given == "ray":
        from tune.backend.ray_backend import RayBackend

        return RayBackend(slots, study.address, warn=warn, say=warn)
    if isinstance(given, str):
        raise StudyError(f"backend '{given}' must be 'inline' or 'ray'")
    return given


def _tracking(given: str | None, study: Study) -> str | None:
    uri = given or study.tracking or os.environ.get("MLFLOW_TRACKING_URI") or "none"
    return None if uri == "none" else uri


# --- progress --------------------------------------------------------------------------------------------------------


class _Progress:
    """Progress of a study: a table in a notebook that is drawn anew, a line per trial elsewhere."""

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._handle, self._drawn = wanted, None, 0.0

    def ended(self, event: CellEnded) -> None:
        """Print a line on a trial that ended, unless there is a table."""
        if self._wanted and self._handle is None:
            print(plain(event), flush=True)

    def say(self, line: str) -> None:
        """Print a line on what happens."""
        if self._wanted:
            print(line, flush=True)

    def warn(self, line: str) -> None:
        """Print a warning, also without progress."""
        print(f"Warning: {one_line(redact(line))}" if not line.startswith("Stopping") else line, file=sys.stderr)

    @contextmanager
    def watch(self, run: StudyRun) -> Iterator[None]:
        """Show a run inside the `with` block."""
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        if not self._wanted or shell is None or not hasattr(shell, "kernel"):
            yield
            return
        display = import_module("IPython.display")
        self._handle = display.display(display.HTML(self._html(run)), display_id=True)

        def draw() -> None:
            if time.monotonic() - self._drawn >= REFRESH_SECONDS:
                self._draw(run, display.HTML)

        run.on_heartbeat = draw
        try:
            yield
        finally:
            run.on_heartbeat = None
            self._draw(run, display.HTML)

    def _draw(self, run: StudyRun, html: Any) -> None:
        self._drawn = time.monotonic()
        if self._handle is not None:
            self._handle.update(html(self._html(run)))

    @staticmethod
    def _html(run: StudyRun) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=100, color_system=None).print(View(run.progress, time.time(), run.slots_now))
        return f"<pre>{escape(text.getvalue())}</pre>"
