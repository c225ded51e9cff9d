"""Write the page of one published study from its study.yaml, provenance.json and Parquet files alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.describe import alphas, calibration, curves, growth, layers
from analysis.describe.fairness import PUBLISHED as LEDGER_COLUMNS
from analysis.describe.fairness import slower
from analysis.io import formats
from analysis.io.assemble import Study
from analysis.io.names import STAGES
from analysis.io.text import markdown, readable
from analysis.report import plots
from analysis.report.build import decision, trend_lines
from analysis.report.figures import Drawn
from analysis.report.findings import Findings
from analysis.report.methods import arm_columns, arm_rows, methods, would_change
from analysis.stats.scale import calibrated
from analysis.verdict import looks
from analysis.verdict.grids import ranges

FILES = ("study.yaml", "trials.parquet", "curves.parquet", "verdict.json")
OPTIONAL = ("layers.parquet",)
NOT_MEASURED = "no measurements"  # in the note of a study whose seconds and speeds say nothing
STANDING_LIMITS = (
    "It answers for this model size, number of tokens and text. Ranks change between short and long trials.",
    "The seeds sample initialisation and data order, not texts. The interval covers new seeds on this corpus.",
    "A searched alpha is the best of few search trials; another value may be better.",
)
OTHER_BITS = (
    "The text behind the link of the corpus gives the same question, not the same bits. The SHA-256 below identifies "
    "the files of this study."
)


def page(found: Findings, drawn: Mapping[str, Drawn]) -> str:
    """Return the Markdown of a published study; every number in it is computed from the study's tables."""
    study, result, rows = found.study, found.result, found.fairness
    came = study.settings.get("provenance") or {}
    lines = [f"# {markdown(study.name)}", "", markdown(study.question), "", f"**{markdown(result.summary)}**", ""]
    lines += [_size(study, rows, came), ""]
    if result.trends:
        lines += ["## Does it last?", "", *trend_lines(result), *_shown(drawn, "ladder")]
    for rung in result.rungs[:-1]:
        lines += [f"## The decision on rung {rung.rung}", "", markdown(rung.result.summary), "", *decision(rung.result)]
    top = f" on rung {study.rung}" if result.rungs else ""
    lines += [f"## The decision{top}", "", *([f"From here on, this page is about{top[3:]}.", ""] if top else [])]
    lines += [*decision(result), *_shown(drawn, "differences")]
    arms = arm_rows(found)
    lines += ["## The arms", "", formats.to_markdown(arms, formats.with_values(arms, arm_columns(found))), ""]
    lines += ["## At equal learning rate", ""]
    optimum = found.calibration
    lines += [formats.to_markdown(optimum, calibration.columns(optimum)), ""] if optimum else []
    grid, grid_columns = calibration.pivot(found.equal_learning_rate)
    if grid:
        lines += ["Improvement on `val_nll` at each rate of the grid, on the selection seeds (it tests nothing):", ""]
        lines += [formats.to_markdown(grid, grid_columns), ""]
    lines += _shown(drawn, "learning_rate", "against_alpha")
    if found.growth:
        lines += ["## Over training", "", formats.to_markdown(found.growth, growth.COLUMNS), "", growth.LIMIT, ""]
        lines += [line for said in looks.not_of_slopes(study) for line in (said, "")]
        lines += _shown(drawn, "over_training", "growth")
        lines += [*second_half(found.growth), *_shown(drawn, "loss_curves")]
    if learned := found.alphas:
        lines += ["## Learned alpha", "", formats.to_markdown(*alpha_table(learned)), "", *_shown(drawn, "alphas")]
    if found.layers:
        lines += ["## Why", "", formats.to_markdown(found.why, layers.ARM_COLUMNS), "", *_shown(drawn, "layers")]
    shown = formats.with_values(rows, LEDGER_COLUMNS)
    lines += ["## What each arm cost", "", formats.to_markdown(rows, shown), ""]
    note = came.get("note") or ""
    costs = [slower(rows) if NOT_MEASURED not in note else "", note]
    lines += [line for cost in costs if cost for line in (markdown(cost), "")]
    change = would_change(found)
    if change:
        lines += ["## What would change the conclusion", "", *(f"- {markdown(line)}" for line in change), ""]
    lines += ["## Methods", "", *(f"- {markdown(line)}" for line in methods(study)), ""]
    limits = [*STANDING_LIMITS, _tuned(study), *([OTHER_BITS] if _files(study) and came.get("source") else [])]
    lines += ["## Limits", "", *(f"- {line}" for line in limits), ""]
    lines += _origin(study, came)
    return "\n".join(lines)


def _tuned(study: Study) -> str:
    names = calibrated(ranges(study))
    return f"Equally tuned means: {' and '.join(names)} on shared points. Nothing else was tuned."


def second_half(slopes: list[dict[str, Any]]) -> list[str]:
    """Return the slopes of `growth.table` in the second half of training, per doubling of tokens, as Markdown lines."""
    rows = [row for row in slopes if row["scale"] == curves.SCALES["log2"][1]]
    columns = {key: column for key, column in growth.LATE_COLUMNS.items() if key != "scale"}
    named = {"study": ("study", "")} if all("study" in row for row in rows) else {}
    text = f"{growth.EXPLORATORY} In percent per doubling of tokens:"
    lines = [text, "", formats.to_markdown(rows, named | columns), ""]
    turned = growth.turned(rows)
    return [*lines, markdown(turned), ""] if turned else lines


def alpha_table(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], formats.Columns]:
    """Return the rows of `alphas.summarise` with one more column per seed, its alpha."""
    seeds = sorted({int(seed) for row in rows for seed in row["values"]})
    columns = alphas.columns(rows) | {f"seed {seed}": (f"seed {seed}", ".3f") for seed in seeds}
    return [row | {f"seed {s}": row["values"].get(str(s)) for s in seeds} for row in rows], columns


def svg(plot: Figure, name: str) -> str:
    """Return a figure as SVG on a white ground, for dark pages, without the notes of the program that wrote it."""
    text = plots.inline(plots.render(plot, salt=name), name).replace("currentColor", plots.INK)
    head, body = text.split(">", 1)
    return f'{head}>\n<rect width="100%" height="100%" fill="#ffffff"/>{body}'.rstrip() + "\n"


def _shown(drawn: Mapping[str, Drawn], *names: str) -> list[str]:
    # each figure with its takeaway in bold, how to read it, and the number of points outside its frame
    lines = []
    for figure in (drawn[name] for name in names if name in drawn):
        name, said = figure.row.name, f"**{markdown(figure.takeaway)}**" if figure.takeaway else ""
        caption = " ".join(part for part in (said, figure.row.short, figure.outside) if part)
        lines += [f"![{name.replace('_', ' ')}](figures/{name}.svg)", "", caption, ""]
    return lines


def _size(study: Study, rows: list[dict[str, Any]], came: dict[str, Any]) -> str:
    s = study.settings
    model, tokens = s.get("model") or {}, (s.get("fixed") or {}).get("tokens")
    base = next(row for row in rows if row["arm"] == study.baseline)
    sizes = ", ".join(f"{key} {model[key]}" for key in ("n_layer", "d_model", "n_head", "n_ctx") if key in model)
    text = f"GPT-2 of {sizes}" + ("" if base["parameters"] is None else f" ({base['parameters']:,.0f} parameters)")
    text += "" if tokens is None else f", {tokens:,} training tokens per trial"
    vocabulary = (s.get("tokenizer") or {}).get("vocab_size")
    text += "" if vocabulary is None else f", a vocabulary of {vocabulary:,}"
    trials = sum(row[stage] for row in rows for stage in STAGES)
    text += f". {trials} trials."
    return text + (f" Corpus: {markdown(came['source'])}." if came.get("source") else "")


def _origin(study: Study, came: dict[str, Any]) -> list[str]:
    lines = ["## Where it comes from", ""]
    rows: list[tuple[str, Any]] = [("command", f"`{came['command']}`")] if came.get("command") else []
    if study.folder:
        rows = [("command", f"`pagating sweep docs/results/{study.folder.name}/study.yaml`")]
    if files := _files(study):
        rows += [("put beside study.yaml first", ", ".join(f"`{name}`" for name in files))]
    rows += [("corpus", markdown(came["source"]))] if came.get("source") else []
    rows += [("corpus digest", came.get("corpus_digest"))]
    rows += [(f"SHA-256 of {markdown(name)}", value) for name, value in (came.get("files_sha256") or {}).items()]
    rows += [("commit of the code", came.get("git_commit")), ("machine", came.get("machine"))]
    rows += [("trials side by side", came.get("slots"))]
    rows += [("seconds, all trials together", came.get("trial_seconds"))]
    rows += [("seconds, from the first line of the ledger to the last", came.get("wall_seconds"))]
    versions = {"python": came.get("python")} | (came.get("versions") or {}) | (came.get("analysis") or {})
    rows += [("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value))]
    lines += ["| what | |", "| --- | --- |"]
    lines += [
        f"| {name} | {value:,} |" if isinstance(value, int | float) else f"| {name} | {value} |"
        for name, value in rows
        if value
    ]
    if study.folder:
        there = [name for name in (*FILES, *OPTIONAL) if (study.folder / name).is_file()]
        lines += ["", "Files: " + ", ".join(_file(study.folder, name) for name in there) + ".", ""]
    lines += [
        "`python docs/make_results.py` writes this page from the files beside it, and a test compares the two. The "
        "same decision on the terminal: `pagating significance FOLDER`.",
        "",
    ]
    return lines


def _files(study: Study) -> list[str]:
    """Return the text files that a study names, relative to its study file."""
    given = ((study.settings.get("corpus") or {}).get("files") or {}).values()
    return [str(name) for names in given if names for name in ([names] if isinstance(names, str) else names)]


def _file(folder: Path, name: str) -> str:
    return f"[{name}]({name}) ({readable((folder / name).stat().st_size)})"
