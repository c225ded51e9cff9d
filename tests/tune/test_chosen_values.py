"""Tests of the chosen values of searched hyperparameters: shown wherever a study is shown."""

import json

import pytest
from rich.console import Console

from analysis.io.space import chosen_values
from analysis.io.study import load
from analysis.io.text import chosen_line
from analysis.verdict import decide
from tests.studies import SMALL, study_of
from tune.backend.inline import Inline
from tune.cli.status_table import look
from tune.cli.sweep import show_verdict
from tune.run import tables
from tune.run.study_run import StudyRun
from tune.study.files import dump
from tune.subject.known import Known

ARMS = {
    "mine": {"gate": "tanh", "alpha": {"search": {"uniform": [0.0, 1.0]}}},
    "layers": {"gate": "tanh", "alpha": {"search": {"uniform": [0.0, 1.0], "per": "layer"}}},
    "learned": {"gate": "tanh", "alpha": {"learnable": {"lr_multiplier": {"loguniform": [1.0, 100.0]}}}},
}
NAMES = {
    "gelu": {"lr"},
    "floor": {"lr"},
    "mine": {"lr", "alpha"},
    "layers": {"lr", "alpha_0", "alpha_1"},
    "learned": {"lr", "alpha_lr_multiplier"},
}


def loss(cell, share):
    """Return a loss that is lowest at an alpha of 0.7; the floor loses."""
    alpha = cell.config.get("alpha", cell.config.get("alpha_0", 0.7))
    return 3.0 + (alpha - 0.7) ** 2 + 0.5 * (cell.arm == "floor") + 0.001 * (cell.seed % 7) + 0.1 * (1 - share)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the study, its folder and its chosen configurations, as the ledger has them."""
    study = study_of(SMALL, arms=ARMS, confirm={"seeds": 3})
    folder = tmp_path_factory.mktemp("studies") / "x"
    folder.mkdir()
    run = StudyRun(study, folder, Known(study, loss))
    Inline().train(run)
    run.close()
    tables.write_tables(study.name, run.ledger.events, folder)
    (folder / "study.yaml").write_text(dump(study))
    return study, folder, {e["arm"]: e["config"] for e in run.ledger.events if e["event"] == "chosen"}


def test_verdict_report_tables_and_terminal_show_what_was_chosen(done, capsys):
    study, folder, chosen = done
    assert {arm: set(values) for arm, values in chosen.items()} == NAMES
    result = show_verdict(study, folder, "").result
    out = " ".join(capsys.readouterr().out.split())
    assert result.chosen == {arm: pytest.approx(values) for arm, values in chosen.items()}
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["chosen"] == result.chosen
    text = f"mine: lr {chosen['mine']['lr']:.4g}, alpha {chosen['mine']['alpha']:.4g}"
    page, notes = (folder / "report.html").read_text(), (folder / "verdict.md").read_text()
    assert text in out
    assert text in notes
    table = page[page.index("The arms</h2>") :]
    table = table[: table.index("</table>")]
    for values in chosen.values():
        for value in values.values():
            assert f"{value:.4g}" in table
    assert (folder / "tables").is_dir()
    csv = "".join(path.read_text() for path in (folder / "tables").glob("chosen*") if path.suffix != ".parquet")
    assert "alpha_lr_multiplier" in csv
    assert f"{chosen['layers']['alpha_1']:.4g}" in csv


def test_the_status_and_the_script_show_it_too(done, capsys):
    study, folder, chosen = done
    text = chosen_line(chosen)
    assert f"layers: lr {chosen['layers']['lr']:.4g}, alpha_0 {chosen['layers']['alpha_0']:.4g}, alpha_1 " in text
    console = Console(width=1000)
    with console.capture() as caught:
        console.print(look(study, folder))
    assert text in caught.get()
    decide.main([str(folder)])
    assert " ".join(text.split()) in " ".join(capsys.readouterr().out.split())


def test_a_study_of_learning_rates_alone_has_no_line_and_a_table_of_losses_no_key(tmp_path):
    assert chosen_line({"gelu": {"lr": 1e-3}, "mine": {"lr": 2e-3}}) == ""
    assert chosen_line({}) == ""
    path = tmp_path / "losses.csv"
    path.write_text("arm,seed,loss\n" + "".join(f"{arm},{seed},{3 + seed / 10}\n" for arm in "ab" for seed in range(3)))
    study = load(path, baseline="a")
    assert chosen_values(study) == {}
    assert "chosen" not in decide.verdict(study)
