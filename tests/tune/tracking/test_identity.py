"""Test that a study is in MLflow once, wherever its folder or its store is moved and whatever a user deletes there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.cli import gc
from mlflow.entities import ViewType

from tests.tune.helpers import write_ledger
from tune.run import ledger as ledgers
from tune.run.repair import repair
from tune.study.files import dump, load
from tune.tracking.identity import PARENT, STUDY_ID, study_id
from tune.tracking.tracker import sync

SMOKE = load(Path(__file__).parents[3] / "configs" / "smoke.yaml")
CELLS = {"confirm/gelu/key/101", "confirm/gelu/key/102", "confirm/gelu/key/103"}


def begun(folder):
    """Begin a study of three completed cells in a new folder."""
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(dump(SMOKE))
    return write_ledger(folder)


@pytest.fixture
def home(tmp_path, empty_store):
    """Return a folder with a study and its store, which has the study."""
    home = tmp_path / "home"
    begun(home / "studies" / "smoke")
    shutil.copy(empty_store, home / "mlflow.db")
    assert synced(home) == (3, 3)
    return home


def synced(home, study="studies/smoke"):
    return sync(uri(home), SMOKE, home / study)


def uri(home):
    return f"sqlite:///{home / 'mlflow.db'}"


def client(home):
    return MlflowClient(uri(home))


def runs(home, experiment="smoke"):
    """Return the parent run of an experiment and its cells by key. Fail if a cell or the parent has two runs."""
    found = client(home).search_runs([client(home).get_experiment_by_name(experiment).experiment_id])
    (parent,) = (run for run in found if run.data.tags["stage"] == "study")
    cells = {run.data.tags["cell"]: run for run in found if run is not parent}
    assert len(cells) == len(found) - 1
    assert {run.data.tags[PARENT] for run in cells.values()} == {parent.info.run_id}
    return parent, cells


def ids(home, experiment="smoke"):
    parent, cells = runs(home, experiment)
    return parent.info.run_id, {key: run.info.run_id for key, run in cells.items()}


def forget(home):
    """Turn the store into one of before studies had an identity."""
    parent, _ = runs(home)
    for tag in (STUDY_ID, "study_host"):
        client(home).delete_tag(parent.info.run_id, tag)


@pytest.mark.parametrize("old", [False, True], ids=["a new store", "a store without identities"])
def test_a_moved_folder_doubles_nothing_and_the_old_path_stays_away(home, old):
    before = ids(home)
    if old:
        forget(home)
    there = home.rename(home.with_name("there"))
    assert synced(there) == (3, 0)
    assert ids(there) == before
    assert not home.exists()
    parent, _ = runs(there)
    assert parent.info.artifact_uri == (there / "mlruns/smoke" / before[0] / "artifacts").as_uri()
    assert (there / "mlruns/smoke" / before[0] / "artifacts/study.yaml").is_file()
    assert (parent.data.tags["study_folder"], parent.data.tags[STUDY_ID]) == (
        str(there / "studies/smoke"),
        study_id(there / "studies/smoke/ledger.jsonl"),
    )


def test_a_copied_folder_has_a_store_of_its_own(home):
    before = ids(home)
    there = home.with_name("there")
    shutil.copytree(home, there)
    code = f"""if True:
        import sys
        from mlflow import MlflowClient
        from tune.cli.main import main
        sys.argv = ["pagating", "sync", "smoke", "--tracking", {uri(there)!r}]
        try:
            main()
        except SystemExit as end:
            assert not end.code
        MlflowClient({uri(there)!r}).log_text({before[0]!r}, "new", "new.txt")
    """  # MLflow keeps the path of a run's artifacts as long as a process lives
    done = subprocess.run([sys.executable, "-c", code], cwd=there, capture_output=True, text=True, check=False)
    assert "has all 3 cells of smoke; 0 were written now" in done.stdout, done.stderr
    assert ids(there) == before
    assert [path.relative_to(home.parent).parts[0] for path in home.parent.rglob("new.txt")] == ["there"]
    assert runs(home)[0].info.artifact_uri.startswith(home.as_uri())


def test_artifacts_that_did_not_move_with_the_store_stay_where_they_are(home):
    parent, _ = ids(home)
    away = home.with_name("away")
    away.mkdir()
    (home / "mlflow.db").rename(away / "mlflow.db")
    assert sync(uri(away), SMOKE, home / "studies/smoke") == (3, 0)
    assert client(away).get_run(parent).info.artifact_uri.startswith(home.as_uri())


@pytest.mark.parametrize("change", ["a renamed folder", "a copied study", "a renamed experiment"])
def test_a_study_is_known_by_its_identity(home, change):
    before, folder, experiment = ids(home), home / "studies/smoke", "smoke"
    if change == "a renamed folder":
        folder = folder.rename(home / "studies" / "it's ü")
    elif change == "a copied study":
        folder = Path(shutil.copytree(folder, home / "backup" / "smoke"))
    else:
        experiment = "a user's own name"
        client(home).rename_experiment(client(home).get_experiment_by_name("smoke").experiment_id, experiment)
    assert sync(uri(home), SMOKE, folder) == (3, 0)
    assert ids(home, experiment) == before


def deleted(home, what):
    parent, cells = ids(home)
    if what == "experiment":
        client(home).delete_experiment(client(home).get_experiment_by_name("smoke").experiment_id)
    elif what == "parent":
        client(home).delete_run(parent)
    elif what == "run":
        client(home).delete_run(cells["confirm/gelu/key/102"])
    else:
        for run in (parent, *cells.values()):
            client(home).delete_run(run)


DELETED = [(what, gone) for what in ("experiment", "parent", "run", "all runs") for gone in (False, True)]
QUICK = [("parent", True), ("all runs", False)]  # of a store without identities; the others need the slow tests


@pytest.mark.parametrize(
    ("what", "for_good", "old"),
    [
        *((*given, False) for given in DELETED),
        *(pytest.param(*given, True, marks=[] if given in QUICK else pytest.mark.slow) for given in DELETED),
    ],
)
def test_what_a_user_deleted_is_there_once_again(home, what, for_good, old):
    if old:
        forget(home)
    before = ids(home)
    deleted(home, what)
    if for_good:
        done = CliRunner().invoke(gc, ["--backend-store-uri", uri(home), "--tracking-uri", uri(home)])
        assert done.exit_code == 0, done.output
    synced(home)
    parent, cells = ids(home)
    assert cells.keys() == CELLS
    kept = [key for key in CELLS if cells[key] == before[1][key]]
    assert len(kept) == {"experiment": 0 if for_good else 3, "parent": 3, "run": 2, "all runs": 0}[what]
    if what != "all runs":
        assert (parent == before[0]) == (what == "run" or not for_good)
    assert synced(home) == (3, 0)
    assert ids(home) == (parent, cells)


def test_runs_that_were_doubled_are_merged(home):
    forget(home)
    before, store = ids(home), client(home)
    parent, cells = runs(home)
    number = parent.info.experiment_id
    second = store.create_run(number, tags={**parent.data.tags, "study_folder": "/elsewhere"}).info.run_id
    for run in cells.values():
        store.create_run(number, run.info.start_time, {**run.data.tags, PARENT: second})
    assert synced(home) == (3, 0)
    assert ids(home)[0] == before[0]
    assert ids(home)[1].keys() == CELLS
    assert store.get_run(second).info.lifecycle_stage == "deleted"


def test_a_ledger_that_lost_its_first_line_is_the_same_study(home):
    before, path = ids(home), home / "studies/smoke/ledger.jsonl"
    path.write_bytes(b"?" + path.read_bytes())
    repair(SMOKE, path.parent)
    assert study_id(path) is None
    found = len(ledgers.records(ledgers.read(path)))
    written = ledgers.Ledger(path)
    written.append("study", schema=1, study="smoke", corpus="abc")
    written.close()
    assert synced(home) == (sum(r.outcome is not None for r in ledgers.records(written.events).values()), 0)
    assert (found, ids(home)) == (3, before)


def test_another_study_of_the_same_name_has_its_own_experiment(home):
    before, other = ids(home), home / "elsewhere/smoke"
    begun(other)
    assert sync(uri(home), SMOKE, other) == (3, 3)
    name = f"smoke {study_id(other / 'ledger.jsonl')[:8]}"
    assert ids(home) == before
    assert ids(home, name)[1].keys() == CELLS
    assert sync(uri(home), SMOKE, other) == (3, 0)
    assert synced(home) == (3, 0)
    assert len(client(home).search_experiments()) == 3  # with MLflow's own


def test_a_study_that_was_begun_again_in_its_folder_takes_the_place_of_the_first(home):
    parent, cells = ids(home)
    shutil.rmtree(home / "studies/smoke")
    begun(home / "studies/smoke")
    assert synced(home) == (3, 3)
    again, others = ids(home)
    assert again == parent
    assert others.keys() == CELLS
    assert not set(others.values()) & set(cells.values())
    deleted = client(home).search_runs(["1"], run_view_type=ViewType.DELETED_ONLY)
    assert {run.info.run_id for run in deleted} == set(cells.values())  # a user can restore them
