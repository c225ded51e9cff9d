"""Write the tables of docs/published.md: what each study of configs/published/ costs, and its dry runs.

python docs/make_published.py [FILE]
python docs/make_published.py --try STUDY ...    # dry runs of its baseline and its largest arm, into published.json
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.io.text import readable
from tune.plan.space import largest, memory_parts, vocabulary
from tune.plan.work import Model, arm_model, total, work
from tune.study.files import load
from tune.study.sizes import confirm_seeds
from tune.study.study import Study

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!--table: python docs/make_published.py -->\n", "<!--end of table-->\n"
TRIED_BEGIN, TRIED_END = "<!--table of dry runs-->\n", "<!--end of dry runs-->\n"
TRIED = Path(__file__).with_name("published.json")
COLUMNS = ("study", "arms", "cells", "tokens per cell", "parameters", "FLOPs of the study", "memory per cell")
TRIED_COLUMNS = ("study", "arm", "parameters", "tokens per step", "planned", "peak", "peak / planned")
STEPS, MICRO_BATCHES, LIBRARIES_MB = 3, 2, 400.0  # of a dry run, and of each of its steps; a process without a model


def row(path: Path) -> list[str]:
    """Return a study's row of the table; `parameters` spans the smallest and the largest arm."""
    study = load(path)
    models = {arm: arm_model(study, arm, vocabulary(study)) for arm in study.arms}
    rows = work(study, models, confirm_seeds(study))
    sizes = sorted({round(model.parameters / 1e6) for model in models.values()})
    memory = memory_parts(study, largest(study, vocabulary(study)), vocabulary(study), 0.0)
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
    """Return the whole table."""
    rows = [row(path) for path in sorted((ROOT / "configs" / "published").glob("*.yaml"))]
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def planned(study: Study, model: Model) -> float:
    """Return the planned bytes of a process that trains this arm."""
    return sum(memory_parts(study, model, vocabulary(study), LIBRARIES_MB).values())


def try_study(path: Path) -> list[dict[str, Any]]:
    """Return the dry runs of a study's baseline and its largest arm; one that does not fit has its plan alone."""
    import psutil

    from tune.plan.dry_run import try_arms

    study = load(path)
    models = {arm: arm_model(study, arm, vocabulary(study)) for arm in study.arms}
    heaviest = max(models, key=lambda arm: models[arm].parameters)
    found = []
    for arm in dict.fromkeys((study.baseline, heaviest)):
        needs, free = planned(study, models[arm]), psutil.virtual_memory().available
        row = {"arm": arm, "parameters": models[arm].parameters, "free": free}
        micro = study.fixed.micro_batch_tokens or study.fixed.batch_tokens
        row["batch_tokens"] = min(study.fixed.batch_tokens, MICRO_BATCHES * micro)
        if needs < 0.95 * free:
            with tempfile.TemporaryDirectory() as scratch:
                said = try_arms(study, path.parent, Path(scratch), STEPS, [arm], MICRO_BATCHES)
                row |= next((asdict(tried) for tried in said if not isinstance(tried, str)), {})
        found.append(row)
    return found


def tried_row(name: str, row: dict[str, Any]) -> list[str]:
    """Return a dry run's row of its table, beside the current plan."""
    study = load(ROOT / "configs" / "published" / f"{name}.yaml")
    needs = planned(study, arm_model(study, row["arm"], vocabulary(study)))
    figures = [f"{row['parameters'] / 1e6:.0f}M", f"{row['batch_tokens']:,}", readable(needs)]
    if "peak_mb" not in row:
        return [name, row["arm"], *figures, "not tried", f"{readable(row['free'])} were free"]
    if row["problem"]:
        return [name, row["arm"], *figures, "-", row["problem"]]
    peak = row["peak_mb"] * (1 << 20)
    return [name, row["arm"], *figures, readable(peak), f"{peak / needs:.2f}"]


def tried_table() -> str:
    """Return the table of `published.json`."""
    held = json.loads(TRIED.read_text(encoding="utf-8"))
    rows = [tried_row(name, row) for name, tried in sorted(held.items()) for row in tried]
    lines = [list(TRIED_COLUMNS), ["---", "---", *["---:"] * (len(TRIED_COLUMNS) - 2)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def replaced(text: str, begin: str, end: str, new: str) -> str:
    """Return the text with the part between two marks replaced."""
    before, rest = text.split(begin)
    return before + begin + "\n" + new + "\n" + end + rest.split(end)[1]


def page(text: str) -> str:
    """Return the page with its tables made again."""
    return replaced(replaced(text, BEGIN, END, table()), TRIED_BEGIN, TRIED_END, tried_table())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--try"]:
        for name in sys.argv[2:]:
            held = json.loads(TRIED.read_text(encoding="utf-8")) if TRIED.exists() else {}
            held[name] = try_study(ROOT / "configs" / "published" / f"{name}.yaml")
            TRIED.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
            print(name, *(tried_row(name, row)[1:] for row in held[name]), flush=True)
        sys.exit(0)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "published.md"
    target.write_text(page(target.read_text(encoding="utf-8")), encoding="utf-8")
