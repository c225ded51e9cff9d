"""What the code must never do, whoever asks: run what it reads, show a password, listen to others, show HTML."""

import ast
import os
import re
import socket
import stat
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for wing in ("pagating", "tune", "analysis") for path in (ROOT / wing).glob("*.py"))
# a gate of the user's own is Python that the study names: the one place where code from outside runs
OWN_CODE = {"own_gate.py", "own_gates.py"}
LOADERS = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads",
    "joblib.load", "cloudpickle.load", "cloudpickle.loads", "pd.read_pickle", "pandas.read_pickle", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen",
}  # fmt: skip
MUST = {"torch.load": ("weights_only", True)}
NEVER = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "verify": False}


def problems(source):
    """Calls in Python text that run or unpickle what they are given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import {name}" for name in names if name in ("pickle", "dill", "joblib", "marshal", "shelve")]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in LOADERS:
            found.append(name)
        if name in MUST and given.get(MUST[name][0]) != str(MUST[name][1]):
            found.append(f"{name} without {MUST[name][0]}={MUST[name][1]}")
        found += [f"{word}={value}" for word, value in NEVER.items() if given.get(word) == str(value)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_that_is_read_is_run_or_unpickled(path):
    found = problems(path.read_text(encoding="utf-8"))
    assert [name for name in found if not (path.name in OWN_CODE and name in ("exec", "compile"))] == []


def test_the_search_for_such_calls_finds_them():
    bad = "import pickle\npickle.loads(x)\ntorch.load(f)\nm(trust_remote_code=True)\nyaml.load(t)\nrun(c, shell=True)"
    assert sorted(problems(bad)) == [
        "import pickle", "pickle.loads", "shell=True", "torch.load without weights_only=True", "trust_remote_code=True",
        "yaml.load",
    ]  # fmt: skip
    assert problems("torch.load(f, weights_only=True)\nyaml.safe_load(t)\nm(trust_remote_code=False)") == []


EVIL = {
    "question": '<script>alert(1)</script> [x](javascript:alert(2)) <img src=x onerror="alert(3)"> "\'&',
    "reason": "<b onmouseover=alert(4)>loss</b> ](javascript:alert(5))",
}


class Page(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_report_and_notes_show_names_as_text(tmp_path):
    import numpy as np
    import pandas as pd

    from analysis import report

    rng, folder = np.random.default_rng(3), tmp_path / "evil"
    folder.mkdir()
    arms = {"gelu": {"baseline": True}, '"><svg onload=alert(6)>': {}, "$\\frac{[y](javascript:alert(7))": {}}
    rows = [
        {
            "stage": "confirm",
            "arm": arm,
            "seed": seed,
            "config_key": "k",
            "outcome": "completed",
            "reason": EVIL["reason"],
        }
        | {"test_nll": 3 + 0.1 * i + rng.normal(0, 0.01), "val_nll": 3.0, "lr": 1e-3, "tokens": 10, "seconds": 1.0}
        for i, arm in enumerate(arms)
        for seed in range(4)
    ]
    rows[-1] |= {"outcome": "infeasible", "test_nll": None}
    pd.DataFrame(rows).to_parquet(folder / "trials.parquet")
    content = {"name": "<i>", "question": EVIL["question"], "arms": arms}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    page = Page()
    page.feed(report.build(folder).read_text())
    assert not {"script", "img", "b", "i", "iframe", "object"} & {tag for tag, _ in page.found}
    attributes = [(name, value or "") for _, attrs in page.found for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert not [value for name, value in attributes if name in ("href", "src") and "javascript:" in value]
    notes = (folder / "verdict.md").read_text()
    assert "<" not in notes
    assert not re.search(r"(?<!\\)\]\s*\(", notes)


def run(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "tune.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        **kwargs,
    )


USAGE = [
    ("sweep",), ("swep",), ("--version",), ("sweep", "x", "y"), ("sweep", "x", "--slots", "0"),
    ("sweep", "x", "--slots", "a"), ("sweep", "x", "--sloots"), ("sweep", "none.yaml"), ("sweep", "configs"),
    ("status", "../../etc"), ("status", "x" * 300), ("report", "a\nb\x1b[2J"), ("trial", "none"), ("ui", "--port", "0"),
    ("ui", "--host", "everywhere"), ("ui", "--tracking", "http://me:s3cret@"), ("ui", "--tracking", "none"),
    ("ui", "--output", "nowhere/studies"), ("sweep", "configs/smoke.yaml", "--tracking", "gopher://me:s3cret@h"),
]  # fmt: skip


def in_process(words, monkeypatch, capsys):
    from tune import cli

    monkeypatch.setattr(sys, "argv", ["pagating", *words])
    monkeypatch.setattr(os, "execve", lambda *a: pytest.fail("a server was started"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("words", USAGE, ids=lambda words: " ".join(words)[:40].encode("unicode_escape").decode())
def test_wrong_use_is_one_line_and_writes_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.yaml").write_text((ROOT / "configs" / "smoke.yaml").read_text())
    before = sorted(tmp_path.rglob("*"))
    code, out, err = in_process(words, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("pagating: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert "s3cret" not in err
    assert sorted(tmp_path.rglob("*")) == before


COMMANDS = ["sweep", "report", "status", "trial", "ui", "plan", "sync", "repair", "none", ""]
WORDS = ["--output", "--slots", "--tracking", "--resume", "--port", "--host", "--hours-from", "--effect", "--format"]
VALUES = [
    "none.yaml",
    "none",
    "../x",
    "-1",
    "0",
    "nan",
    "1e999",
    "",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "x" * 300,
    "--",
    "-",
    "\0",
]
PLACES = ["http://me:s3cret@[::1", "sqlite:///none.db", "gopher://me:s3cret@h", "/proc/none", "/dev/null", "none/none"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(COMMANDS), st.lists(st.sampled_from([*WORDS, *VALUES, *PLACES]) | st.text(max_size=5), max_size=5)
)
def test_any_command_line_ends_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, command, words):
    assume("--help" not in words)
    monkeypatch.chdir(tmp_path)
    code, out, err = in_process([command, *words], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("pagating: ")
    assert err[:-1].isprintable()
    assert err.endswith("\n")
    assert "s3cret" not in err
    assert not list(tmp_path.iterdir())


def test_the_real_command_says_one_line_too(tmp_path):
    done = run("sweep", tmp_path / "none.yaml", "--tracking", "http://me:s3cret@h", env={**os.environ, "LC_ALL": "C"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pagating: {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_opening_the_ui_to_others_warns_and_loopback_does_not(tmp_path, monkeypatch, capsys):
    from tune import cli

    started, before = [], dict(os.environ)
    given = {}
    monkeypatch.setattr(os, "execve", lambda path, words, settings: (started.append(words), given.update(settings)))
    for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "192.0.2.7"):
        words = ["pagating", "ui", "--tracking", "http://me:s3cret@127.0.0.1:1", "--host", host]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit):
            cli.main()
        out, err = capsys.readouterr()
        assert ("without a password" in err) == (host in ("0.0.0.0", "::", "192.0.2.7"))
        assert started[-1][started[-1].index("--host") + 1] == host
        assert "s3cret" not in out + err + " ".join(started[-1])
        assert given["MLFLOW_BACKEND_STORE_URI"] == "http://me:s3cret@127.0.0.1:1"
    assert dict(os.environ) == before


def listening(process):
    """Addresses that a process and its children listen on."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            found |= {link.laddr for link in one.net_connections("inet") if link.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found


def is_loopback(address):
    return address.ip.removeprefix("::ffff:").startswith("127.") or address.ip == "::1"


@pytest.mark.slow
def test_the_ui_listens_on_loopback_only(tmp_path):
    from tune.cli import main  # noqa: F401 (imported, so that a broken command fails here)

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(tracking_uri=store).search_experiments(max_results=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tune.cli", "ui", "--tracking", store, "--port", str(port)]
    server = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, env=os.environ)
    try:
        deadline = time.monotonic() + 120
        while port not in {address.port for address in listening(server)}:
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.5)
        assert all(is_loopback(address) for address in listening(server)), listening(server)
    finally:
        for process in [*server.children(recursive=True), server]:
            process.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_study_shows_no_password_listens_to_nobody_and_writes_by_the_umask(tmp_path, umask):
    config = tmp_path / "leaky.yaml"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config.write_text(
        (ROOT / "configs" / "smoke.yaml").read_text() + f"tracking: http://me:s3cret@127.0.0.1:{port}/?k=t0ken\n"
    )
    output, said = tmp_path / "studies", tmp_path / "said.txt"
    words = [sys.executable, "-m", "tune.cli", "sweep", str(config), "--output", str(output), "--slots", "1"]
    with said.open("w") as out:
        sweep = psutil.Popen(words, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, umask=umask)
        seen = set()
        while sweep.poll() is None:
            seen |= listening(sweep)
            time.sleep(0.3)
    assert sweep.returncode in (0, 1), said.read_text()
    assert len(seen) >= 3  # Ray's own processes
    assert all(is_loopback(address) for address in seen), seen
    said.chmod(0o666 & ~umask)
    config.unlink()  # the one place where they may stand
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            continue
        if path.is_file():
            raw = path.read_bytes()
            assert b"s3cret" not in raw, path
            assert b"t0ken" not in raw, path
            assert mode & 0o666 == 0o666 & ~umask, (path, oct(mode))
        elif path.is_dir() and path != tmp_path:
            assert mode & 0o777 == 0o777 & ~umask, (path, oct(mode))
    assert "***@127.0.0.1" in (output / "leaky" / "study.yaml").read_text()
    assert f"http://***@127.0.0.1:{port}" in said.read_text()
