"""A study folder's verdict.json, verdict.md, figures/ and self-contained report.html.

`python -m analysis.report STUDY`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from analysis.describe import alphas, budget, calibration, hyperparameters
from analysis.describe.alphas import arms_with_alphas
from analysis.describe.calibration import GRID_COLUMNS, at_grid
from analysis.describe.curves import SLOPE_COLUMNS, over_training, slopes
from analysis.describe.fairness import COLUMNS as LEDGER_COLUMNS
from analysis.describe.fairness import ledger, slower
from analysis.io import command, formats
from analysis.io.study import Study, load
from analysis.io.text import markdown
from analysis.io.write import write_whole
from analysis.report import cell_curves, frame, plots
from analysis.report.methods import methods, would_change
from analysis.report.takeaways import takeaways
from analysis.verdict.decide import decide
from analysis.verdict.exits import add_require_verdict, end
from analysis.verdict.kinds import Result, as_object, as_rows
from analysis.verdict.words import summary_parts

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def build(folder: str | Path) -> Path:
    """Write verdict.json, verdict.md, figures/, tables/ and report.html into the study folder; the report's path.

    Figures are SVG for the page and PDF for a paper, tables CSV and LaTeX (booktabs). The same folder gives the
    same bytes. Raises: analysis.io.study.TableError.
    """
    write(load(folder), Path(folder))
    return Path(folder) / "report.html"


def write(study: Study, out: Path) -> Result:
    """Write the files of `build` for a study into a folder; return its verdict."""
    result = decide(study)
    for name in ("figures", "tables"):
        (out / name).mkdir(exist_ok=True)
    drawn = {}
    for name, draw in figures(study, result).items():
        drawn[name] = plots.render(draw, salt=name)
        write_whole(out / "figures" / f"{name}.svg", drawn[name])
        write_whole(out / "figures" / f"{name}.pdf", plots.render(draw, "pdf"))
    for name, (rows, columns) in _tables(study, result).items():
        write_whole(out / "tables" / f"{name}.csv", formats.to_csv(rows, columns) + "\n")
        write_whole(out / "tables" / f"{name}.tex", formats.to_latex(rows, columns) + "\n")
    write_whole(out / "verdict.json", formats.to_json(as_object(result)) + "\n")
    write_whole(out / "verdict.md", verdict_markdown(result))
    write_whole(out / "report.html", html(study, result, drawn))
    return result


def figures(study: Study, result: Result) -> dict[str, Callable[[], Figure]]:
    """Name -> function that draws it, for the figures that this study's tables allow."""
    columns, curves = set(study.trials.columns), study.curves
    out: dict[str, Callable[[], Figure]] = {"differences": lambda: plots.differences(study, result.comparisons)}
    if {"lr", "val_nll"} <= columns and (study.trials["stage"] != "confirm").any():
        out["learning_rate"] = lambda: plots.learning_rate(study)
    searched = budget.curves(study) if {"lr", "val_nll"} <= columns else []
    if searched:
        out["search_budget"] = lambda: plots.search_budget(study, searched)
    if len(curves) and (curves["stage"] == "confirm").any():
        out["loss_curves"] = lambda: plots.loss_curves(study)
    if not study.confirms and cell_curves.lines(study):
        out["cell_curves"] = lambda: cell_curves.cell_curves(study)
    training = over_training(study)
    if training:
        out["over_training"] = lambda: plots.over_training(study, training)
    if arms_with_alphas(study):
        out["alphas"] = lambda: plots.learned_alphas(study)
    if alphas_of := hyperparameters.against_alpha(study):
        out["against_alpha"] = lambda: plots.against_alpha(study, alphas_of)
    if any(row.path for row in result.comparisons):
        out["sequential"] = lambda: plots.sequential_path(study, result.comparisons)
    return out


PATH_COLUMNS: formats.Columns = {
    "arm": ("arm", ""),
    "n": ("seeds", "d"),
    "pairs": ("pairs", "d"),
    "t": ("t", "+.2f"),
    "p": ("p at this look", ".3g"),
    "e": ("e", ".3g"),
    "stops_at": ("stops one arm at p", ".3g"),
    "p_anytime": ("p over all looks", ".3g"),
}


def path_rows(result: Result) -> list[dict[str, Any]]:
    """A row an arm and look of a sequential rule."""
    return [{"arm": row.arm, **look} for row in result.comparisons for look in row.path]


def _tables(study: Study, result: Result) -> dict[str, tuple[list[dict[str, Any]], formats.Columns]]:
    learned = alphas.summarise(study)
    every: dict[str, tuple[list[dict[str, Any]], formats.Columns]] = {
        "verdict": (as_rows(result.comparisons), formats.VERDICT_COLUMNS),
        "fairness": (ledger(study), LEDGER_COLUMNS),
        "sequential": (path_rows(result), PATH_COLUMNS),
        "calibration": (calibration.optimum_rows(study), calibration.COLUMNS),
        "equal_learning_rate": (at_grid(study), GRID_COLUMNS),
        "over_training": (slopes(study), SLOPE_COLUMNS),
        "search_budget": (budget.curves(study), budget.COLUMNS),
        "importance": (hyperparameters.importance(study), hyperparameters.COLUMNS),
        "against_alpha": (hyperparameters.against_alpha(study), hyperparameters.ALPHA_COLUMNS),
        "alphas": (learned, alphas.columns(learned)),
    }
    return {name: table for name, table in every.items() if table[0]}


def verdict_markdown(result: Result) -> str:
    """The verdict as Markdown: the sentence, the table, why."""
    lines = [f"# {markdown(result.study)}", "", markdown(result.question), ""]
    lines += [f"**{markdown(result.summary)}**", ""]
    lines += [formats.to_markdown(as_rows(result.comparisons), formats.VERDICT_COLUMNS), ""]
    lines += [f"- {markdown(row.arm)}: {markdown(row.why)}" for row in result.comparisons]
    lines += [f"- assay sensitivity: {markdown(result.sensitivity.why)}", ""]
    lines.append(
        f"Metric {markdown(result.metric)}, level {result.level:g}, correction {result.correction}, "
        f"margin {result.margin}."
    )
    return "\n".join(lines) + "\n"


def terminal_table(result: Result) -> Table:
    """The verdict table for a terminal (rich), as wide as the terminal allows."""
    return formats.verdict_table(as_rows(result.comparisons), result.summary, Console().width)


def html(study: Study, result: Result, drawn: dict[str, bytes]) -> str:
    """The report's text; every name in it is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    rows = ledger(study)
    grid, grid_columns = calibration.pivot(at_grid(study))
    shown = {k: c for k, c in LEDGER_COLUMNS.items() if any(r[k] is not None for r in rows)}
    return template.render(
        study=study,
        result=result,
        summary=summary_parts(result.comparisons, study),
        takeaways=takeaways(study, result),
        outside={name: frame.note(draw()) for name, draw in figures(study, result).items() if name in frame.CUT},
        figures={name: Markup(plots.inline(svg, name)) for name, svg in drawn.items()},
        verdict_rows=as_rows(result.comparisons),
        verdict_columns=formats.REPORT_COLUMNS,
        ledger=rows,
        slower=slower(rows),
        ledger_columns=shown,
        importance=hyperparameters.importance(study),
        importance_columns=hyperparameters.COLUMNS,
        path=path_rows(result),
        path_columns=PATH_COLUMNS,
        calibration=calibration.optimum_rows(study),
        calibration_columns=calibration.COLUMNS,
        grid=grid,
        grid_columns=grid_columns,
        slopes=slopes(study),
        slope_columns=SLOPE_COLUMNS,
        methods=methods(study),
        would_change=would_change(study, result, rows),
        cell=formats.cell,
    )


def main(argv: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    p = command.Parser(prog="python -m analysis.report", description=__doc__)
    p.add_argument("study", metavar="STUDY", help="a study folder")
    add_require_verdict(p)
    options = p.parse_args(argv)
    result = write(load(options.study), Path(options.study))
    print(Path(options.study) / "report.html")
    return end(result, options.require_verdict)
