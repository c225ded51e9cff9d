"""Test that MLflow gets a study's question and reasons as plain text, whatever they contain."""

from types import SimpleNamespace

from tests.studies import SMALL, study_of
from tune.study.files import dump
from tune.tracking import runs

QUESTION = "<script>alert(1)</script> [x](javascript:alert(2)) ![y](z)\n# **no** heading"


def test_the_note_of_a_study_is_text_and_its_tags_hold_no_credentials(tmp_path):

    study = study_of(SMALL, question=QUESTION, tracking="http://me:s3cret@host?token=t0ken")
    (tmp_path / "study.yaml").write_text(dump(study))
    told = []

    def create_run(experiment, run_name, tags):
        told.append((run_name, tags))
        return SimpleNamespace(info=SimpleNamespace(run_id="1"))

    client = SimpleNamespace(
        create_run=create_run,
        log_text=lambda *words: told.append(words),
        log_inputs=lambda *words: None,
        log_batch=lambda *words, **named: None,
    )
    runs.Runs(study.tracking, study, tmp_path, "digest")._create_parent(client, {})
    (_, tags), artifact = told
    first, _, question = tags["mlflow.note.content"].split("\n")[:3]
    assert (first, question) == (
        "Running: no verdict yet.",
        "**&lt;script\\>alert(1)&lt;/script\\> [x\\](javascript:alert(2)) \\![y\\](z) \\# \\*\\*no\\*\\* heading**",
    )
    assert "s3cret" not in repr(told)
    assert "t0ken" not in repr(told)
    assert "***@host" in artifact[1]
