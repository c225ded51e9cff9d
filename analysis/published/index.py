"""Write the pages over all published studies: the front page, the claims page and one figure of every decision."""

import re
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.describe import alphas, curves, growth, ladder
from analysis.io import formats
from analysis.io.assemble import Study
from analysis.io.text import markdown
from analysis.published import claims, claims_ours, page
from analysis.report import differences, plots
from analysis.verdict.decide import decide
from analysis.verdict.kinds import Result
from analysis.verdict.ladder.words import size
from analysis.verdict.words import CLAIM_SEEDS

MADE = "<!-- made by python docs/make_results.py: change the tables or the script, not this page -->"


def texts(studies: list[Study], results: Path) -> dict[str, str]:
    """Return file name -> text of the pages over all studies, for docs/results/."""
    return {"README.md": front_page(studies, results), "claims.md": claims_page(studies)}


def pages(studies: list[Study], results: Path) -> dict[str, str]:
    """Return `texts` and the figure of every decision."""
    drawn = {"verdicts.svg": page.svg(plots.styled(side_by_side, studies), "verdicts")} if studies else {}
    return texts(studies, results) | drawn


def front_page(studies: list[Study], results: Path) -> str:
    """Return the front page of the published studies."""
    first = [study for study in studies if not _follows(study) and not study.ladder]
    lines = ["# Results", "", MADE, ""]
    lines += [
        "What the published studies found. Every number on these pages is computed from the Parquet files beside them, "
        "and a test computes it again. A study answers for its own model size, number of tokens and text. The studies "
        "are shown side by side and are not pooled.",
        "",
    ]
    lines += _lacking(studies)
    for study in first:
        result = _judged(study)
        lines += [f"**[{markdown(study.name)}]({_place(study)}/README.md).** {markdown(result.summary)}", ""]
        lines += [f"Assay sensitivity: {markdown(result.sensitivity.why)}.", ""]
    if first:
        lines += ["## Side by side", "", formats.to_markdown(*decisions(studies)), ""]
        lines += [
            "Improvements are in percent of the baseline's loss. An interval holds for its arm alone. The word follows "
            "from the adjusted p.",
            "",
        ]
        lines += ["![Paired differences of every arm in every study, one dot per seed](verdicts.svg)", ""]
        lines += [differences.SHORT, ""]
    lines += _ladders(studies)
    slopes = [{"study": study.name} | row for study in first for row in growth.table(study)]
    slopes = [row for row in slopes if row["scale"] == curves.SCALES["log2"][1]]
    if slopes:
        lines += ["## Does the difference grow with tokens?", ""]
        lines += [formats.to_markdown(slopes, {"study": ("study", "")} | growth.COLUMNS), "", growth.LIMIT, ""]
        lines += page.second_half(slopes)
    learned = [{"study": study.name} | row for study in first for row in alphas.summarise(study)]
    if learned:
        lines += ["## Where do learned alphas go?", ""]
        lines += [formats.to_markdown(learned, {"study": ("study", "")} | alphas.columns(learned)), ""]
        lines += [alphas.kinds(first), "", *_freeze(first)]
    later = [study for study in studies if _follows(study) and not study.ladder]
    if later:
        lines += ["## Taken up again", ""]
        for study in later:
            lines += [f"**[{markdown(study.name)}]({_place(study)}/README.md)**, after {markdown(_follows(study))}. "]
            lines += [markdown(study.question), "", markdown(_judged(study).summary), ""]
    ladders = [study for study in studies if study.ladder]
    lines += ["## The published claims", "", *answer([*_for_a_claim(studies), *ladders]), ""]
    lines += [formats.to_markdown(claims.table(), _short(claims.COLUMNS)), ""]
    lines += ["[claims.md](claims.md) has what each study says of each claim.", ""]
    lines += not_run(results)
    if (results / "LOG.md").is_file():
        lines += ["[LOG.md](LOG.md): pilots and negative results, dated.", ""]
    return "\n".join(lines)


@lru_cache(maxsize=64)
def _judged(study: Study) -> Result:
    return decide(study)  # several tables of a page ask for it


def _ladders(studies: list[Study]) -> list[str]:
    # the studies of several sizes: the arms on every rung, and their trends
    found = [study for study in studies if study.ladder]
    lines = ["## Does it last as the model grows?", ""] if found else []
    for study in found:
        result = _judged(study)
        lines += [f"**[{markdown(study.name)}]({_place(study)}/README.md).** {markdown(study.question)}", ""]
        lines += [formats.to_markdown(*_on_rungs(result)), "", markdown(result.summary), ""]
    return lines


def _on_rungs(result: Result) -> tuple[list[dict[str, Any]], formats.Columns]:
    rows = ladder.rows(result)
    left_out = ("p", "slope_low", "slope_high")
    return rows, {key: column for key, column in ladder.columns(rows).items() if key not in left_out}


def _lacking(studies: list[Study]) -> list[str]:
    # what a study of today's configs/laptop.yaml has, and no published one
    arms = [options or {} for study in studies for options in (study.settings.get("arms") or {}).values()]
    said = []
    if not any(options.get("unit") == "swiglu" for options in arms):
        said.append("No study here has the arm `swiglu`, which `configs/laptop.yaml` has gained since.")
    if not any(len(study.layers) for study in studies):
        said.append("No study here has a `layers.parquet`, so these pages do not show what the layers of an arm do.")
    return [" ".join(said), ""] if studies and said else []


def _freeze(studies: list[Study]) -> list[str]:
    for study in studies:
        arms = study.settings.get("arms") or {}
        gated = [row["arm"] for row in alphas.summarise(study) if (arms.get(row["arm"]) or {}).get("gate")]
        if gated:
            command = f"pagating freeze docs/results/{_place(study)} --arm {gated[-1]} > new.yaml"
            asked = "Does a learned pattern do as well if it is frozen from the start? This writes the study:"
            return [asked, "", "```sh", command, "```", ""]
    return []


def readme_block(studies: list[Study]) -> str:
    """Return the table of the project's README, with the verdict on each arm in the studies of `_for_a_claim`."""
    lines = [
        "Against an equally tuned GELU, on the test split. The studies are shown side by side and are not pooled.",
        "",
        formats.to_markdown(*decisions(_for_a_claim(studies))),
        "",
        *(line for study in studies if study.ladder for line in _in_readme(study)),
        "[docs/results](docs/results/README.md) has all published studies, and what they say of the published claims.",
    ]
    return "\n".join([*lines, ""])


def _in_readme(study: Study) -> list[str]:
    result = _judged(study)
    sizes = "; ".join(f"rung {rung.rung}: {size(rung)}" for rung in result.rungs)
    asked = f"{markdown(study.question)} [{markdown(study.name)}](docs/results/{_place(study)}/README.md) ({sizes}):"
    return [asked, "", formats.to_markdown(*_on_rungs(result)), ""]


def _for_a_claim(studies: list[Study]) -> list[Study]:
    """Return the studies of one size with at least `CLAIM_SEEDS` seeds, or all of one size if none has as many."""
    studies = [study for study in studies if not study.ladder]
    enough = [study for study in studies if min(len(s) for s in _judged(study).seeds.values()) >= CLAIM_SEEDS]
    return enough or studies


def answer(studies: list[Study]) -> list[str]:
    """Return the published claim in words, what its own numbers give, and what these studies say of its formula."""
    claim = next(claim for claim in claims.published()["claims"] if claim["kind"] == "improvement")
    numbers, seeds = claims.judge(claim)[0], claims.published()["seeds_per_cell"]
    lines = [
        f"**Claimed**: {markdown(claim['text'])} ({seeds} seed per cell; its baseline is alpha = 0, a linear MLP). "
        f"Its own numbers: {markdown(numbers)}.",
        "",
        "**Our answer**, for the arms with the published formula, each tuned like the baseline:",
        "",
    ]
    found = []
    for study in studies:
        arms = study.settings.get("arms") or {}
        for row in claims_ours.said(study)["improvement"]:
            if published_formula(options := arms.get(row["arm"]) or {}):
                words = "; ".join(f"{heading}: {text}" for heading, text in row.items() if heading != "arm")
                line = f"- {markdown(row['arm'])} ({markdown(_named(study))}), {markdown(words)}."
                found.append((not claims_ours.is_claimed(options), line))
    lines += [line for _, line in sorted(found, key=itemgetter(0))]  # the arm that the claim is about comes first
    missing = claims_ours.notes(0, *studies).get("improvement")
    return [*lines, *(["", markdown(missing)] if missing else [])]


def published_formula(options: dict[str, Any]) -> bool:
    """Return whether an arm is `alpha * x * sigmoid(x) + (1 - alpha) * x`, for any alpha."""
    form = (options.get("gate"), options.get("base", "identity"), options.get("form", "pointwise"))
    return form == ("sigmoid", "identity", "pointwise")


def _named(study: Study) -> str:
    # a ladder's verdict is that of its largest size
    return f"{study.name}, rung {study.rung}" if study.ladder else study.name


def decisions(studies: list[Study]) -> tuple[list[dict[str, Any]], formats.Columns]:
    """Return one row per arm and one column per study: the verdict and the improvement with its interval."""
    rows: dict[str, dict[str, Any]] = {}
    columns: formats.Columns = {"arm": ("arm", "")}
    for study in studies:
        columns[f"study {study.name}"] = (_named(study), "")
        for row in _judged(study).comparisons:
            text = row.verdict
            if row.improvement_percent is not None:
                text += f": {row.improvement_percent:+.2f}%"
            if row.interval is not None:
                text += " [{:+.2f}, {:+.2f}]".format(*row.interval)
            rows.setdefault(row.arm, {"arm": row.arm})[f"study {study.name}"] = f"{text}, n = {row.n}"
    return list(rows.values()), columns


def side_by_side(studies: list[Study]) -> Figure:
    """Draw the paired differences of every study, one panel below the other."""
    results = [[r for r in _judged(s).comparisons if r.improvement_percent is not None] for s in studies]
    heights = [1.1 + 0.5 * max(1, len(rows)) for rows in results]
    fig = Figure(figsize=(7.2, sum(heights)), layout="constrained")
    axes = fig.subplots(len(studies), 1, squeeze=False, height_ratios=heights)
    baselines = list(dict.fromkeys(study.baseline for study in studies))
    every = list(dict.fromkeys(arm for study in studies for arm in study.arms if arm not in baselines))
    for ax, study, rows in zip(axes.flat, studies, results, strict=True):
        # an arm has one colour in all panels: by its place among the arms of all studies
        differences.draw_differences(ax, replace(study, arms=[*every, *baselines]), rows)
        ax.set_title(_named(study), fontsize=10, loc="left")
    return fig


def claims_page(studies: list[Study]) -> str:
    """Return the page of the published claims: what their own numbers give, and what each study says of them."""
    rows = claims.table(*studies)
    lines = ["# The published claims", "", MADE, "", claims.source_note(), ""]
    lines += [f"[The publication at that commit]({claims.source_link()}).", ""]
    lines += [formats.to_markdown(rows, claims.COLUMNS), ""]
    for row in rows:
        lines += [f"## {markdown(row['id'])}", "", f"Claimed: {markdown(row['claim'])}.", ""]
        lines += [f"Its own numbers: {markdown(row['own_numbers'])}. Verdict: {markdown(row['verdict'])}.", ""]
        said = [{"study": study.name} | words for study in studies for words in row["said"][study.name]]
        headings = {heading: (markdown(heading), "") for words in said for heading in words}
        lines += [formats.to_markdown(said, headings), ""] if said else []
        lines += [markdown(row["note"]), ""] if row["note"] else []
    named = " ".join(f"--study docs/results/{_place(study)}" for study in studies)
    lines += [f"The same on the terminal: `pagating claims {named}`".rstrip() + ".", ""]
    return "\n".join(lines)


def pilots(table: pd.DataFrame) -> str:
    """Return one row per pilot: the last losses of baseline and floor, and their gap in percent of the baseline's."""
    keys = [name for name in table.columns if name not in ("arm", "val_nll")]
    wide = table.pivot(index=keys, columns="arm", values="val_nll").reset_index()
    wide["gap"] = 100 * (wide["linear-floor"] / wide["gelu"] - 1)
    columns: formats.Columns = {key: (key, "" if key in ("date", "corpus") else "g") for key in keys}
    columns |= {"tokens": ("tokens", ",.0f"), "gelu": ("gelu", ".4f"), "linear-floor": ("linear floor", ".4f")}
    columns |= {"gap": ("floor behind, %", "+.2f")}
    return formats.to_markdown([{str(k): v for k, v in row.items()} for row in wide.to_dict("records")], columns)


def not_run(results: Path) -> list[str]:
    """Return what was not run and what `pagating plan` printed of its cost.

    plan.txt holds the commands, an empty line and the output.
    """
    file = results / "plan.txt"
    if not file.is_file():
        return []
    commands, output = file.read_text(encoding="utf-8").split("\n\n", 1)
    lines = ["## Not run: GPT-2 small", ""]
    lines += [
        "The same question on the same text at GPT-2's real size needs a GPU and was not run. No result is guessed.",
        "",
    ]
    lines += ["<!-- not run: takes a GPU for hours -->", "```sh", commands, "```", ""]
    lines += ["The second command printed this, from sizes and a device's data sheet; nothing was measured:", ""]
    return [*lines, "```text", re.sub(r"; expected end \S+", "", output).rstrip(), "```", ""]


def _short(columns: formats.Columns) -> formats.Columns:
    return {key: column for key, column in columns.items() if key != "page"}


def _follows(study: Study) -> str:
    return str((study.settings.get("provenance") or {}).get("follows") or "")


def _place(study: Study) -> str:
    return study.name if study.folder is None else study.folder.name
