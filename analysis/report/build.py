"""Write verdict.json, verdict.md, figures/, tables/ and a self-contained report.html into a study folder.

`python -m analysis.report STUDY`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from analysis.describe import calibration, curves, fairness, hyperparameters, ladder, layers
from analysis.io import command, formats
from analysis.io.assemble import Study
from analysis.io.files import TableError
from analysis.io.study import load
from analysis.io.text import duration, markdown, percent
from analysis.io.write import write_whole
from analysis.report import plots
from analysis.report.figures import FIGURES, Drawn, drawn
from analysis.report.findings import PATH_COLUMNS, TABLES, Findings
from analysis.report.methods import arm_columns, arm_rows, caveat, methods, would_change
from analysis.verdict.exits import add_require_verdict, end
from analysis.verdict.kinds import Result, as_object, rows_of_rungs, shown_rows
from analysis.verdict.ladder.words import FAMILY, size
from analysis.verdict.ladder.words import summarise as of_ladder
from analysis.verdict.summary import Summary, summarise
from analysis.verdict.words import called

WIDTHS = (20, 26, 32, 38, 44, 50, 56, 62, 68, 74, 400)  # of tables in rem; the last is wider than any page
CHARACTER, PADDING = 0.48, 0.9  # rem per character of a table, and beside a column
MOST_TEXT = 24  # characters of a line of text in a cell, which wraps


def build(folder: str | Path) -> Path:
    """Write the report of a study into its folder; return the path of report.html.

    Figures are SVG for the page and PDF for a paper. Tables are CSV and LaTeX (booktabs). The same folder gives the
    same bytes. Raises TableError if the tables are wrong.
    """
    return write(Findings(load(folder)), Path(folder))


def write(found: Findings, out: Path) -> Path:
    """Write the files of `build` into `out`; return the path of report.html."""
    for name in ("figures", "tables"):
        (out / name).mkdir(exist_ok=True)
    shown = drawn(found)
    _remove_old(out, shown, found.tables)
    svg = {name: plots.render(figure.plot, salt=name) for name, figure in shown.items()}
    for name, figure in shown.items():
        write_whole(out / "figures" / f"{name}.svg", svg[name])
        write_whole(out / "figures" / f"{name}.pdf", plots.render(figure.plot, "pdf"))
    for name, (rows, columns) in found.tables.items():
        write_whole(out / "tables" / f"{name}.csv", formats.to_csv(rows, columns) + "\n")
        write_whole(out / "tables" / f"{name}.tex", formats.to_latex(rows, columns) + "\n")
    write_whole(out / "verdict.json", formats.to_json(as_object(found.result)) + "\n")
    write_whole(out / "verdict.md", verdict_markdown(found.result))
    write_whole(out / "report.html", html(found, shown, svg))
    return out / "report.html"


def _remove_old(out: Path, figures: Mapping[str, Drawn], tables: Mapping[str, object]) -> None:
    # figures and tables of an earlier report that this one lacks, such as those of a verdict before an extension
    for name in {row.name for row in FIGURES} - set(figures):
        for kind in ("svg", "pdf"):
            (out / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
    for name in set(TABLES) - set(tables):
        for kind in ("csv", "tex"):
            (out / "tables" / f"{name}.{kind}").unlink(missing_ok=True)


def decision(result: Result) -> list[str]:
    """Return the verdict's table, the reason of each arm and the assay sensitivity, as lines of Markdown."""
    rows = shown_rows(result.every)
    columns = formats.VERDICT_COLUMNS if result.facts is None else formats.of_table(rows, result.facts.unit)
    lines = [formats.to_markdown(rows, formats.with_training(rows, formats.with_runs(rows, columns))), ""]
    lines += [f"- {markdown(row.label)}: {markdown(row.why)}" for row in result.every]
    return [*lines, f"- assay sensitivity: {markdown(result.sensitivity.why)}", ""]


def verdict_markdown(result: Result) -> str:
    """Return the verdict as Markdown: its sentence, its table and its reasons."""
    lines = [f"# {markdown(result.study)}", "", markdown(result.question), ""]
    lines += [f"**{markdown(result.summary)}**", ""]
    for rung in [] if result.unfinished else result.rungs:
        lines += [f"## Rung {rung.rung}", "", *decision(rung.result)]
    if result.trends:
        lines += ["## Trends", "", *trend_lines(result)]
    if result.unfinished:
        return "\n".join(lines)
    lines += [] if result.rungs else decision(result)
    if any(row.path for row in result.every) and len({row.n for row in result.every}) > 1:
        lines += ["An arm that is decided trains no further. Means over different seeds cannot be compared.", ""]
    lines.append(
        f"Metric {markdown(result.metric)}, level {result.level:g}, correction {result.correction}, "
        f"margin {result.margin}."
    )
    return "\n".join(lines) + "\n"


def trend_lines(result: Result) -> list[str]:
    """Return the trends of a ladder as lines of Markdown: a table of arms and rungs, then the reasons of each arm."""
    rows = ladder.rows(result)
    lines = [formats.to_markdown(rows, ladder.columns(rows)), ""]
    said = [f"- {markdown(row.label)}: {markdown(row.said)}; {markdown(row.why)}" for row in result.trends]
    return [*lines, *said, "", FAMILY, ""]


def terminal_table(result: Result, width: int | None = None) -> Table:
    """Return the verdict's table for a terminal (rich) of a width; None: this terminal's."""
    unit = result.facts.unit if result.facts else None
    return formats.verdict_table(rows_of_rungs(result), result.summary, width or Console().width, unit)


def _summary(found: Findings) -> Summary:
    if found.result.rungs:
        return of_ladder(found.study, found.result)
    return summarise(found.result.every, found.study, found.result.sensitivity, found.result.unfinished)


def _top_rung(found: Findings) -> str:
    rungs, known = found.result.rungs, found.study.ladder
    return f"rung {rungs[-1].rung} ({size(rungs[-1], known.axis)})" if rungs and known else ""


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name)


def html(found: Findings, figures: Mapping[str, Drawn], svg: Mapping[str, bytes]) -> str:
    """Return the text of the report; every name in it is escaped.

    Args:
        found: The tables of the study.
        figures: Its figures by name.
        svg: The SVG files of the same figures by name.
    """
    grid, grid_columns = calibration.pivot(found.equal_learning_rate)
    text = _template("report.html.j2").render(
        found=found,
        study=found.study,
        result=found.result,
        summary=_summary(found),
        figures=figures,
        svg={name: Markup(plots.inline(content, name)) for name, content in svg.items()},
        ladder_table=ladder.short(found.ladder),
        top_rung=_top_rung(found),
        verdict_columns=_verdict_columns(found),
        arms=arm_rows(found),
        arm_columns=formats.with_values(arm_rows(found), arm_columns(found)),
        slower=fairness.slower(found.fairness, found.study.budget_unit),
        ledger_columns=found.in_words(formats.with_values(found.fairness, fairness.COLUMNS)),
        importance_columns=hyperparameters.COLUMNS,
        path_columns=PATH_COLUMNS,
        calibration_columns=found.in_words(calibration.columns(found.calibration)),
        grid=grid,
        grid_columns=grid_columns,
        why_columns=layers.ARM_COLUMNS,
        without_model=layers.without_model(found.study, found.layers),
        slope_columns=found.in_words(curves.SLOPE_COLUMNS),
        methods=methods(found.study),
        caveat=caveat(found.study),
        would_change=would_change(found),
        cell=formats.cell,
        called=called,
        percent=percent,
        run=ran(found.study),
        widest=widest,
        widths=WIDTHS,
    )
    return _with_contents(text)


@dataclass(frozen=True)
class Part:
    """One study on a page of several: its verdict, its comparisons, and a link to its report."""

    result: Result
    summary: Summary
    rows: list[dict[str, object]]
    columns: formats.Columns
    link: str


def several(reports: Mapping[Path, Findings], page: Path) -> Path:
    """Write one page of several studies, with the verdict of each and a link to its report; return the page's path.

    Args:
        reports: The tables of each study, by the path of its report.
        page: Path of the page.
    """
    parts = [
        Part(
            found.result,
            _summary(found),
            found.verdict,
            _verdict_columns(found),
            quote(Path(os.path.relpath(report, page.parent)).as_posix()),
        )
        for report, found in reports.items()
    ]
    text = _template("several.html.j2").render(reports=parts, cell=formats.cell, widest=widest, widths=WIDTHS)
    write_whole(page, _with_contents(text))
    return page


def _verdict_columns(found: Findings) -> formats.Columns:
    columns = formats.with_runs(found.verdict, formats.REPORT_COLUMNS)
    own = formats.with_own_unit(columns, found.study.unit) if found.study.facts else columns
    return found.in_words(formats.with_values(found.verdict, formats.with_training(found.verdict, own)))


def ran(study: Study) -> dict[str, str]:
    """Return when, how long, where and with what a study ran, from its provenance; empty if it has none."""
    known = study.settings.get("provenance") or {}
    slots, decided = known.get("slots"), known.get("precision")
    said = {
        "begun": known.get("begun"),
        "ended": known.get("ended"),
        "training": f"{duration(known['trial_seconds'])} in all trials" if known.get("trial_seconds") else None,
        "machine": known.get("machine") and f"{known['machine']}, {slots} trial{'s' if slots != 1 else ''} at a time",
        "devices": ", ".join(f"{name}: {count} trials" for name, count in (known.get("devices") or {}).items()),
        "precision": decided and f"{decided['chosen']}, decided at the start: {decided['reason']}",
        "code": known.get("git_commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in (known.get("versions") or {}).items()),
    }
    return {name: str(text) for name, text in said.items() if text}


def widest(rows: Sequence[Mapping[str, object]], columns: formats.Columns) -> int:
    """Return the width in rem up to which a table has a card per row, because it would not fit: one of `WIDTHS`."""
    need = 0.0
    for key, (heading, spec) in columns.items():
        longest = max((len(line) for row in rows for line in formats.cell(row.get(key), spec).split("\n")), default=1)
        word = max(map(len, heading.split()), default=1)
        need += max(word, longest if spec else min(longest, MOST_TEXT)) * CHARACTER + PADDING
    return next((width for width in WIDTHS if width >= need), WIDTHS[-1])


def _with_contents(text: str) -> str:
    # the headings of a page as links in front of the first one
    links: list[str] = []

    def linked(found: re.Match[str]) -> str:
        links.append(f'<li><a href="#part-{len(links) + 1}">{found[1]}</a></li>')
        return f'<h2 id="part-{len(links)}">{found[1]}</h2>'

    text = re.sub(r"<h2>(.*?)</h2>", linked, text)
    return text.replace("<!-- contents -->", f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>', 1)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return the exit code."""
    p = command.Parser(prog="python -m analysis.report", description=__doc__)
    p.add_argument("study", metavar="STUDY", help="a study folder")
    add_require_verdict(p)
    options = p.parse_args(argv)
    if options.study == "-" or Path(options.study).is_file():
        advice = f"python -m analysis.significance {options.study}"
        raise TableError(f"{options.study}: is a file; allowed: a study folder (the verdict on a table: {advice})")
    found = Findings(load(options.study))
    print(write(found, Path(options.study)))
    return end(found.result, options.require_verdict)
