"""Write the table of docs/plan.md: the noise of each published study, for plans of similar studies.

python docs/make_plan.py [FILE]
"""

import sys
from pathlib import Path

from analysis.io.study import load
from tune.plan.power import study_noise

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!--table: python docs/make_plan.py -->\n", "<!--end of table-->\n"
COLUMNS = ("study", "corpus", "model", "tokens per trial", "seeds", "noise", "least noise", "most noise")


def row(folder: Path) -> list[str]:
    """Return a published study's row of the table."""
    study = load(folder)
    model, fixed, seeds = (study.settings[name] for name in ("model", "fixed", "confirm"))
    noise, each = study_noise(folder)
    arms = {arm: value for arm, value in each.items() if arm != study.floor}
    corpus = study.settings["corpus"]
    train = (corpus.get("files") or {}).get("train")
    text = corpus["source"] if not train else Path(train if isinstance(train, str) else train[0]).parent.name
    least, most = min(arms, key=arms.__getitem__), max(arms, key=arms.__getitem__)
    return [
        f"[{folder.name}](results/{folder.name}/README.md)",
        text,
        f"{model['n_layer']} x {model['d_model']}",
        f"{fixed['tokens'] / 1e6:.2g}M",
        str(seeds["seeds"]),
        f"{noise:.2%}",
        f"{arms[least]:.2%} ({least})",
        f"{arms[most]:.2%} ({most})",
    ]


def table(results: Path = RESULTS) -> str:
    """Return the table of all published studies, those with the most tokens first."""
    folders = sorted(file.parent for file in results.glob("*/trials.parquet"))
    folders.sort(key=lambda folder: -load(folder).settings["fixed"]["tokens"])
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- | --- |" + " ---: |" * (len(COLUMNS) - 3)]
    return "\n".join(lines + ["| " + " | ".join(row(folder)) + " |" for folder in folders]) + "\n"


def page(text: str, results: Path = RESULTS) -> str:
    """Return docs/plan.md with its table of noise made again."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the page, or FILE."""
    source = Path(__file__).with_name("plan.md")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else source
    target.write_text(page(source.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
