"""Judge each published claim by its own numbers, and set beside it what our studies say.

`pagating claims [--study FOLDER]...`. The numbers are read from published.yaml.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from analysis.io import command, formats
from analysis.io.assemble import Study
from analysis.published.claims_ours import BYTES, notes, said, text
from analysis.stats import estimates
from analysis.verdict.kinds import Refusal
from analysis.verdict.words import not_testable

COLUMNS: formats.Columns = {
    "id": ("id", ""),
    "claim": ("claim", ""),
    "own_numbers": ("what its own numbers give", ""),
    "verdict": ("verdict", ""),
    "page": ("page", ""),
}
ONE_SEED = not_testable(Refusal.ONE_SEED)


@cache
def published() -> dict[str, Any]:
    """Return the published numbers, read from published.yaml."""
    return dict(yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")))


def own_numbers(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the comparisons of a claim, each with the improvement in percent that the published losses give."""
    cells = published()["cells"]
    out = []
    for row in claim["compare"]:
        b, a = (cells[row[side]][row["split"]] for side in ("baseline", "arm"))
        out.append(row | {"improvement_percent": estimates.improvement_percent([b], [a])})
    return out


def extra_parameters(n_layer: int, d_ff: int) -> int:
    """Count the parameters that the projected form adds: two d_ff x d_ff projections with biases per layer."""
    return n_layer * 2 * (d_ff * d_ff + d_ff)


def judge(claim: dict[str, Any]) -> tuple[str, str]:
    """Return in words what the numbers of a claim give, and the verdict that they allow."""
    model = published()["model"]
    numbers = "; ".join(
        f"{row['what']}: {row['improvement_percent']:+.3f}% ({row['split']})" for row in own_numbers(claim)
    )
    if claim["kind"] == "parameters":
        extra = extra_parameters(model["n_layer"], model["d_ff"])
        total = model["parameters"] + extra
        share = 100 * extra / model["parameters"]
        words = f"pointwise form: +0; projected form inside GPT-2: +{extra:,} ({total:,}, {share:+.1f}%)"
        return words, "true of the pointwise form, false of the projected form"
    if claim["kind"] == "memory":
        weights = model["parameters"] * 4 / 1e6
        training = model["parameters"] * BYTES / 1e6
        words = f"float32 weights alone: {weights:.0f} MB; with gradients and AdamW's moments: {training:.0f} MB"
        held = claim["megabytes"] >= training
        return words, "possible" if held else "false of training in float32 (below what it must hold)"
    if claim["kind"] == "identical":
        return f"at alpha = 0 the published MLP is linear; {numbers}", "false by the formula (base = identity)"
    if claim["kind"] == "padding":
        return "positions that hold no text are averaged in", "false: not comparable with a loss of text"
    if claim["kind"] == "significance":
        return f"{published()['seeds_per_cell']} seed per cell: no variance, no test", ONE_SEED
    return numbers or "the losses behind it are not published", ONE_SEED


def _notes(*studies: Study) -> dict[str, str]:
    return notes(int(published()["model"]["parameters"]), *studies)


def table(*studies: Study) -> list[dict[str, Any]]:
    """Return one row per claim: its text, what its own numbers give, the verdict, and what each study says.

    `study NAME` has the words of a study as text, `said` as rows by study. `note` is the sentence of `notes`.
    """
    by_study, together = {study.name: said(study) for study in studies}, _notes(*studies)
    rows = []
    for claim in published()["claims"]:
        words, judged = judge(claim)
        row = {"id": claim["id"], "claim": claim["text"], "own_numbers": words, "verdict": judged}
        row["page"] = claim["page"]
        row |= {"comparisons": own_numbers(claim), "note": together.get(claim["kind"])}
        row["said"] = {name: of_study.get(claim["kind"], []) for name, of_study in by_study.items()}
        rows.append(row | {f"study {name}": text(words) or None for name, words in row["said"].items()})
    return rows


def columns(*studies: Study) -> formats.Columns:
    """Return the columns of `table`."""
    return COLUMNS | {f"study {study.name}": (f"what {study.name} says", "") for study in studies}


def source_note() -> str:
    """Return in one sentence where the published numbers come from."""
    source = published()["source"]
    said = f"{source['what']} ({source['authors']}, '{source['title']}', {source['manuscript']})"
    pages = f"pages are of {source['repository']} at commit {source['commit'][:7]}"
    return f"Numbers: {said}; {pages} (analysis/published/published.yaml)."


def source_link() -> str:
    """Return the address of the publication's files at the commit that is quoted."""
    source = published()["source"]
    return f"https://{source['repository']}/tree/{source['commit']}"


def main(argv: list[str] | None = None, prog: str = "python -m analysis.claims") -> int:
    """Run the script; return the exit code."""
    options = command.parser(prog, __doc__, many=True).parse_args(argv)
    studies = command.studies(options)
    command.emit_rows(table(*studies), columns(*studies), options.format, title="The published claims")
    command.say(
        f"{each.name} is a table from elsewhere: it says something of a claim only if its arms and its model are those "
        "of the claim"
        for each in studies
        if each.table
    )
    if options.format == "terminal":
        formats.print_notes([*dict.fromkeys(_notes(*studies).values()), source_note()])
    return 0
