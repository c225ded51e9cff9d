"""The built-in GPT-2 through the door of a user's function: docs/examples/gpt2_function.py."""

from pathlib import Path

import pytest
from own_training import BUILT_IN

from analysis.io.study import load as load_tables
from analysis.verdict.decide import decide
from tests.studies import study_of
from tests.tune.helpers import trained_to_the_end
from tune.backend.inline import Inline
from tune.study.cell import Cell
from tune.study.files import load
from tune.study.inputs import packed_corpus
from tune.subject.function import Function, release
from tune.subject.gpt2 import Gpt2
from tune.subject.sources import draft
from tune.subject.subject import Job
from tune.sweep import sweep

EXAMPLES = Path(__file__).parents[3] / "docs/examples"
GATED = {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 1.5]}}}


def test_the_function_has_the_bits_of_the_built_in_subject(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    given, own = study_of(BUILT_IN, arms={"gated": GATED}), load(EXAMPLES / "gpt2_function.yaml")
    built_in = Gpt2.at(given, tmp_path, packed_corpus(given, tmp_path, tmp_path))
    (tmp_path / "out").mkdir()
    function = Function(own, draft(own, EXAMPLES, tmp_path / "out").write())
    for cell in (
        Cell("confirm", "gelu", 0, 101, {"lr": 0.01}, "key"),
        Cell("search", "gated", 0, 3, {"lr": 0.02, "alpha": 0.7}, "key"),
    ):
        found = []
        for subject in (built_in, function):
            result, rows = trained_to_the_end(Job("a", subject.trial(cell), subject.train, None, 80))
            assert result["outcome"] == "completed", result["reason"]
            losses = [(row["tokens"], row["val_nll"]) for row in rows]
            found.append((losses, result["final"]["val_nll"], result["final"].get("test_nll")))
        assert found[0] == found[1]
        assert len(found[0][0]) == 10
        assert (found[0][2] is not None) == (cell.stage == "confirm")
    release()


@pytest.mark.slow
def test_the_example_ends_in_a_verdict(tmp_path):
    """Run the example of the docs; it takes a minute or two."""
    run = sweep(load(EXAMPLES / "gpt2_function.yaml"), EXAMPLES, tmp_path, Inline())
    assert run.stages.finished
    assert decide(load_tables(run.folder)).sensitivity.testable
