"""Write the table of docs/published.md: what each study of configs/published/ takes, as `pagating plan` counts it.

python docs/make_published.py [FILE]
"""

import sys
from pathlib import Path

from tune.plan_space import GPT2_VOCABULARY, largest, memory_parts, readable
from tune.plan_work import arm_model, confirm_seeds, total, work
from tune.study import load

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!--table: python docs/make_published.py -->\n", "<!--end of table-->\n"
COLUMNS = ("study", "arms", "cells", "tokens a cell", "parameters", "FLOPs in all", "memory a cell")


def row(path: Path) -> list[str]:
    """A study's cells of the table; `parameters` from the smallest arm's to the largest's."""
    study = load(path)
    models = {arm: arm_model(study, arm, GPT2_VOCABULARY) for arm in study.arms}
    rows = work(study, models, confirm_seeds(study))
    sizes = sorted({round(model.parameters / 1e6) for model in models.values()})
    memory = memory_parts(study, largest(study, GPT2_VOCABULARY), GPT2_VOCABULARY, 0.0)
    name = f"[{path.stem}](../configs/published/{path.name})"
    figures = (f"{total(rows, 'cells')[1]:.0f}", f"{study.fixed.tokens / 1e6:.1f}M")
    span = f"{sizes[0]}M" if len(sizes) == 1 else f"{sizes[0]}M - {sizes[-1]}M"
    return [
        name,
        str(len(study.arms)),
        *figures,
        span,
        f"{total(rows, 'flops')[1]:.1e}",
        readable(sum(memory.values())),
    ]


def table() -> str:
    """The whole table."""
    rows = [row(path) for path in sorted((ROOT / "configs" / "published").glob("*.yaml"))]
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page(text: str) -> str:
    """The page with its table written anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "published.md"
    target.write_text(page(target.read_text(encoding="utf-8")), encoding="utf-8")
