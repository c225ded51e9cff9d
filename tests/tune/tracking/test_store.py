"""Test which store a study uses, in every kind of folder, and which stores are refused before anything is trained."""

import os
import shutil
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tune.helpers import typed, write_ledger
from tune.errors import StudyError, TrackingError
from tune.study.files import dump, load
from tune.tracking.check import check_store
from tune.tracking.store import sqlite_file, sqlite_uri, tracking_uri
from tune.tracking.tracker import sync

SMOKE = load(Path(__file__).parents[3] / "configs" / "smoke.yaml")
ODD = [
    "sp ace",
    "a%20b",
    "a#b",
    "a?b",
    "a?b=c",
    "a%3Fb",
    "ü日本",
    "it's",
    'a"b',
    "a;b&c=d",
    "a:b@c",
    "~",
    "a\\b",
    "100%",
    "$(x)",
    "***",
]


def test_the_default_store_stands_beside_the_studies(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    default = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert tracking_uri(None, None, tmp_path / "studies") == default
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(None, None, tmp_path / "studies") == default
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(None, None, tmp_path / "studies") == "http://127.0.0.1:5000"
    assert tracking_uri(None, "none", tmp_path / "studies") == "none"
    assert tracking_uri("http://127.0.0.1:5001", "none", tmp_path / "studies") == "http://127.0.0.1:5001"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    with pytest.raises(StudyError, match=r"^MLFLOW_TRACKING_URI 'file:///tmp/mlruns'"):
        tracking_uri(None, None, tmp_path / "studies")


@pytest.mark.parametrize("name", ODD)
def test_a_study_is_logged_in_a_folder_of_any_name(tmp_path, empty_store, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name / "studies" / "smoke"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(dump(SMOKE))
    write_ledger(folder)
    shutil.copy(empty_store, tmp_path / name / "mlflow.db")
    uri = tracking_uri(None, None, folder.parent)
    assert sqlite_file(uri) == tmp_path / name / "mlflow.db"
    assert check_store(uri) is None
    assert sync(uri, SMOKE, folder) == (3, 3)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no folder of an escaped or cut name
    store = sqlite3.connect(tmp_path / name / "mlflow.db")
    assert store.execute("select count(*) from runs").fetchone() == (4,)
    assert len(list((tmp_path / name / "mlruns").rglob("study.yaml"))) == 1
    client = MlflowClient(uri)
    (parent,) = client.search_runs(["1"], "tags.stage = 'study'")
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["study.yaml"]


def test_a_uri_that_a_user_wrote_may_be_escaped_relative_or_have_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sp ace", "a%20b", "a?b=c"):
        (tmp_path / name).mkdir()

    def file(path):
        uri = tracking_uri(f"sqlite:///{path}", None, Path("studies"))
        return sqlite_file(uri), uri

    assert tracking_uri(None, "sqlite:///mlflow.db", Path("studies")) == f"sqlite:///{tmp_path}/mlflow.db"
    assert file("mlflow.db") == (tmp_path / "mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")
    assert file(f"{tmp_path}/sp ace/x.db")[0] == tmp_path / "sp ace" / "x.db"
    assert file(f"{tmp_path}/sp%20ace/x.db")[0] == tmp_path / "sp ace" / "x.db"
    assert file(f"{tmp_path}/a%20b/x.db")[0] == tmp_path / "a%20b" / "x.db"
    assert file(f"{tmp_path}/a?b=c/x.db")[0] == tmp_path / "a?b=c" / "x.db"
    assert file(f"{tmp_path}/x.db?timeout=30") == (tmp_path / "x.db", f"sqlite:///{tmp_path}/x.db?timeout=30")
    path, uri = file(f"{tmp_path}/a%20b/x.db?timeout=30")
    assert (path, uri) == (tmp_path / "a%20b" / "x.db", f"{sqlite_uri(path)}?timeout=30")


def database(path, *statements):
    with sqlite3.connect(path) as store:
        for statement in statements:
            store.execute(statement)


def spoiled(tmp_path, empty_store, kind):
    path = tmp_path / "mlflow.db"
    if kind == "a folder":
        path.mkdir()
    elif kind == "no database":
        path.write_text("text " * 100)
    elif kind == "below a file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "mlflow.db"
    elif kind == "another program":
        database(path, "create table studies (x)", "create table alembic_version (v)")
    else:
        shutil.copy(empty_store, path)
        version = {"a newer MLflow": "ffffffffffff", "an older MLflow": "0584bdc529eb"}[kind]
        database(path, f"update alembic_version set version_num = '{version}'")
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("a folder", "is a folder, not an MLflow database"),
        ("no database", r"is no MLflow database \(file is not a database\)"),
        ("below a file", "file is not a folder"),
        ("another program", "is the database of another program"),
        ("a newer MLflow", r"was written by a newer MLflow \(schema ffffffffffff, here [0-9a-f]{12}\)"),
        (
            "an older MLflow",
            r"was written by an older MLflow \(schema 0584bdc529eb, now [0-9a-f]{12}\); .*mlflow db upgr",
        ),
    ],
)
def test_a_file_that_can_never_be_the_store_is_refused(tmp_path, empty_store, kind, said):
    path = spoiled(tmp_path, empty_store, kind)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StudyError, match=said) as caught:
        check_store(sqlite_uri(path))
    assert str(path) in str(caught.value)
    assert "name another store with --tracking" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_a_store_that_can_be_made_or_used_is_taken(tmp_path, empty_store):
    assert check_store(sqlite_uri(tmp_path / "new" / "folder" / "mlflow.db")) is None
    assert not (tmp_path / "new").exists()
    assert check_store(sqlite_uri(empty_store)) is None
    (tmp_path / "empty.db").touch()
    assert check_store(sqlite_uri(tmp_path / "empty.db")) is None


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_store_that_cannot_be_written_is_refused(tmp_path, empty_store, monkeypatch, what):
    path = Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    closed = path if what == "file" else tmp_path
    real = os.access
    monkeypatch.setattr(os, "access", lambda each, mode: Path(each) != closed and real(each, mode))  # root may do all
    with pytest.raises(StudyError, match=f"{closed} cannot be written"):
        check_store(sqlite_uri(path))


def test_a_store_that_is_locked_for_the_moment_is_away(tmp_path, empty_store):
    path = shutil.copy(empty_store, tmp_path / "mlflow.db")
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("begin exclusive")
        assert check_store(sqlite_uri(Path(path))) == "database is locked"
        other.execute("rollback")
    assert check_store(sqlite_uri(Path(path))) is None


@pytest.fixture(scope="module")
def answering():
    """Serve an answer of each kind at a path of its own."""
    answers = {
        "mlflow": (200, b"{}"),
        "page": (200, b"<html>hello</html>"),
        "list": (200, b"[]"),
        "missing": (404, b"no such page"),
        "login": (401, b"You are not authenticated."),
        "closed": (403, b"{}"),
        "broken": (503, b"busy"),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, content = answers[self.path.split("/")[1]]
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("page", r"answers \(HTTP 200\), but is no MLflow server"),
        ("list", "is no MLflow server"),
        ("missing", r"answers \(HTTP 404\), but is no MLflow server"),
        ("login", r"wants a login \(HTTP 401\); set MLFLOW_TRACKING_USERNAME"),
        ("closed", r"wants a login \(HTTP 403\)"),
    ],
)
def test_a_server_that_can_never_take_a_study_is_refused(answering, path, said):
    with pytest.raises(StudyError, match=said):
        check_store(f"{answering}/{path}")


def test_a_server_that_is_away_is_not_refused(answering):
    assert check_store(f"{answering}/mlflow") is None
    assert check_store(f"{answering}/broken") == "HTTP 503"
    assert check_store("http://127.0.0.1:9") == "Connection refused"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("postgresql://me:s3cret@h/x", "needs the Python package psycopg, which is missing"),
        ("mysql+pymysql://me:s3cret@h/x", "needs the Python package pymysql, which is missing"),
        ("mysql+nonsense://me:s3cret@h/x", "Can't load plugin: sqlalchemy.dialects:mysql.nonsense"),
        ("databricks", "no login for it; set DATABRICKS_HOST and DATABRICKS_TOKEN"),
        ("databricks://nobody", "no login for it; set DATABRICKS_HOST and DATABRICKS_TOKEN"),
    ],
)
def test_what_a_store_needs_is_named(monkeypatch, tmp_path, uri, said):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("DATABRICKS")]:
        monkeypatch.delenv(name)
    with pytest.raises(StudyError, match=said) as caught:
        check_store(uri)
    assert "s3cret" not in str(caught.value)


def test_a_sweep_says_so_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parents[3] / "configs" / "smoke.yaml", tmp_path)
    (tmp_path / "mlflow.db").write_text("text " * 100)
    code, out, err = typed(monkeypatch, capsys, "sweep", "smoke.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"pagating: {tmp_path}/mlflow.db: is no MLflow database")
    assert err.count("\n") == 1
    code, out, err = typed(monkeypatch, capsys, "sweep", "smoke.yaml", "--tracking", "./mlruns")
    assert (code, out) == (2, "")
    assert "--tracking './mlruns': MLflow has ended its support for stores that are folders" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "smoke.yaml"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon", "Failed to convert 'soon' for MLFLOW_HTTP_REQUEST_TIMEOUT"),
        ("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "x", "Failed to convert 'x' for MLFLOW_SQLALCHEMYSTORE_POOL_SIZE"),
    ],
)
def test_a_setting_of_mlflow_that_it_cannot_read_is_named(monkeypatch, empty_store, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(StudyError, match=f"cannot use the environment .*{said}"):
        check_store(sqlite_uri(empty_store))


def test_a_setting_that_only_the_store_refuses_is_one_line(place, monkeypatch):
    folder, _, uri = place
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "Nope")
    with pytest.raises(TrackingError, match="cannot be written: Invalid poolclass parameter: Nope"):
        sync(uri, SMOKE, folder)


def test_a_users_variables_change_neither_place_nor_content(place, monkeypatch, tmp_path):
    folder, _, uri = place
    write_ledger(folder)
    for name, value in {
        "MLFLOW_EXPERIMENT_NAME": "other",
        "MLFLOW_EXPERIMENT_ID": "77",
        "MLFLOW_RUN_ID": "0123456789abcdef0123456789abcdef",
        "MLFLOW_REGISTRY_URI": f"file://{tmp_path / 'registry'}",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_TOKEN": "t0ken",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": "/nowhere",
        "MLFLOW_TRUNCATE_LONG_VALUES": "false",
    }.items():
        monkeypatch.setenv(name, value)
    assert check_store(uri) is None
    assert sync(uri, SMOKE, folder) == (3, 3)
    client = MlflowClient(uri)
    assert sorted(each.name for each in client.search_experiments()) == ["Default", "smoke"]
    found = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    assert len(found) == 4
    metrics = {key.split("/")[0] for run in found for key in run.data.metrics}
    assert metrics == {"alpha", "train", "val", "val_nll"}  # and nothing of the system
    assert (tmp_path / "mlruns" / "smoke").is_dir()
    assert not (tmp_path / "registry").exists()
