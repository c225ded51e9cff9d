"""Measure what a user's function costs: its start, with and without `reuse`, and GPT-2 through it.

    python benchmarks/own_training.py [--seconds 60] [--json docs/own_training.json] [--write docs/own-training.md]

The table has the seconds of a trial of one step, from its start to its result. The sentence below it compares the
processor time per step of docs/examples/gpt2_function.py with that of the same cell of a built-in study, pair by pair.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from common import Spread, interleave, machine, ratios, spread
from simulation.page import between

from analysis.io.write import write_whole
from tune.study.cell import Cell
from tune.study.files import load, parse
from tune.study.inputs import packed_corpus
from tune.study.own_study import OwnStudy
from tune.study.study import Study
from tune.subject.function import Function, release
from tune.subject.gpt2 import Gpt2
from tune.subject.sources import draft

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs/examples/gpt2_function.yaml"
IMPORTS = {"no library": "", "numpy": "import numpy", "torch": "import torch"}
ONE_STEP = """
{imported}


def train(trial):
    trial.report(1, val_loss=trial.lr)
"""
STUDY = """
question: What does a trial cost?
trial: {name}.py:train
metric: {{name: val_loss, test: test_loss}}
budget: {{steps: 1}}
nuisance: {{lr: {{loguniform: [0.1, 1.0]}}}}
arms: {{a: {{baseline: true}}, b: {{}}}}
reuse: {reuse}
"""
BUILT_IN = {
    "question": "What does GPT-2 cost?",
    "tokenizer": {"vocab_size": 300},
    "model": {"n_layer": 1, "d_model": 32, "n_head": 2, "n_ctx": 32, "initializer_range": 0.06},
    "fixed": {"tokens": 40_960, "batch_tokens": 512, "eval_windows": 32},
    "nuisance": {"lr": {"loguniform": [2.0e-3, 3.0e-2]}},
    "arms": {"gelu": {"baseline": True}, "linear": {"gate": "sigmoid", "alpha": 0.0}},
}
CELL = Cell("search", "gelu", 0, 1, {"lr": 0.01}, "key")


def subject_in(folder: Path, study: Study, base: Path) -> Function:
    """Return the subject of a study of a user's function, with its files in `folder`."""
    assert isinstance(study, OwnStudy)
    folder.mkdir()
    return Function(study, draft(study, base, folder).write())


def whole(subject: Function) -> float:
    """Return the seconds of a trial, from its start to its result."""
    began = time.perf_counter()
    cell = Cell("search", "a", 0, 1, {"lr": 0.5}, "key")
    assert [row for _, row in filter(None, subject.train(subject.trial(cell), None, None)) if row]
    return time.perf_counter() - began


def used() -> float:
    """Return the seconds of processor time that this process and those that it started have used."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def per_step(subject: Gpt2 | Function, tokens: int) -> float:
    """Return the seconds of processor time per step of GPT-2, between its first and its last evaluation but one.

    Other work on the machine changes it less than it changes the time that passes.
    """
    steps: Iterator[Any] = filter(None, subject.train(subject.trial(CELL), None, None))
    seen = [(row["tokens"], used()) for _, row in steps if row and "final" not in row]
    (first, began), (last, ended) = seen[0], seen[-1]
    return (ended - began) / ((last - first) / tokens)


def starts(folder: Path, seconds: float) -> dict[str, dict[str, Spread]]:
    """Measure the seconds of a trial of one step, by what the function imports, fresh and reused."""
    found = {}
    for name, imported in IMPORTS.items():
        variants: dict[str, Callable[[], float]] = {}
        for key in ("fresh", "reused"):
            base = folder / f"{name.split()[0]}-{key}"
            base.mkdir()
            (base / "one.py").write_text(ONE_STEP.format(imported=imported), encoding="utf-8")
            study = parse(STUDY.format(name="one", reuse=str(key == "reused").lower()), base / "study.yaml")
            subject = subject_in(base / "out", study, base)
            variants[key] = lambda subject=subject: whole(subject)
        # one after the other: a fresh trial would end the process that waits
        found[name] = {key: spread(interleave({key: run}, seconds / 6)[key]) for key, run in variants.items()}
        release()
    return found


def gpt2(folder: Path, seconds: float) -> dict[str, Any]:
    """Compare GPT-2 as a user's function with the built-in subject: processor time per step, the ratio of each pair."""
    given = parse(yaml.safe_dump(BUILT_IN), folder / "built-in.yaml")
    built_in = Gpt2.at(given, folder, packed_corpus(given, folder, folder))
    function = subject_in(folder / "gpt2", load(EXAMPLE), EXAMPLE.parent)
    tokens = given.fixed.batch_tokens
    times = interleave(
        {"built in": lambda: per_step(built_in, tokens), "function": lambda: per_step(function, tokens)}, seconds, 20
    )
    release()
    return {
        "seconds_per_step": {name: spread(one) for name, one in times.items()},
        "speed": ratios(times, "built in")["function"],
    }


def markdown(found: dict[str, Any]) -> str:
    """Return both tables and the machine, in Markdown."""
    lines = ["| the function's file imports | fresh process, s | reused process, s |", "| --- | ---: | ---: |"]
    for name, row in found["start"].items():
        fresh, reused = (f"{row[key]['median']:.2g} ({row[key]['low']:.2g}-{row[key]['high']:.2g})" for key in row)
        lines.append(f"| {name} | {fresh} | {reused} |")
    speed, at = found["gpt2"]["speed"], found["machine"]
    lines += [
        "",
        "Seconds of a trial of one step, median and quartiles. GPT-2 as a function ([example](examples/"
        f"gpt2_function.py)) makes {speed['median']:.3f} times the steps of a built-in one per second of a processor "
        f"(quartiles {speed['low']:.3f} to {speed['high']:.3f} of {speed['n']} pairs), with the same bits. Measured on "
        f"{at['date']} with {at['cores']} cores ({at['processor']}) and torch {at['torch']}.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two parts")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the tables between the page's marks")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        measured = {"start": starts(Path(scratch), options.seconds), "gpt2": gpt2(Path(scratch), options.seconds)}
    found = json.loads(json.dumps({"machine": machine(), **measured}, default=asdict))
    print(markdown(found))
    if options.json:
        write_whole(options.json, json.dumps(found, indent=1) + "\n")
    if options.write:
        between(options.write, "own_training", markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
