"""Check what the code must never do: run files that it reads, show a password, listen to other machines, show HTML."""

import ast
import json
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
SOURCES = sorted(path for wing in ("pagating", "tune", "analysis") for path in (ROOT / wing).rglob("*.py"))
# a user's own gate is Python that the study names; no other code from outside runs
OWN_CODE = {"own_gate.py", "own_gates.py"}
LOADERS = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads",
    "joblib.load", "cloudpickle.load", "cloudpickle.loads", "pd.read_pickle", "pandas.read_pickle", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen",
}  # fmt: skip
MUST = {"torch.load": ("weights_only", True)}
# methods of a transformers class; without the argument, it asks on the terminal to run downloaded code
MUST_METHOD = {"from_pretrained": ("trust_remote_code", False), "from_config": ("trust_remote_code", False)}
OURS = {"PaGPT2Config", "PaGPT2LMHeadModel"}  # classes of this package, which name no code
NEVER = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "verify": False}


def problems(source):
    """Find calls in Python text that run or unpickle what they are given."""
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
        owner, _, method = name.rpartition(".")
        word, value = MUST.get(name) or (owner not in OURS and MUST_METHOD.get(method)) or (None, None)
        if word and given.get(word) != str(value):
            found.append(f"{name} without {word}={value}")
        found += [f"{word}={value}" for word, value in NEVER.items() if given.get(word) == str(value)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run_or_unpickled(path):
    found = problems(path.read_text(encoding="utf-8"))
    assert [name for name in found if not (path.name in OWN_CODE and name in ("exec", "compile"))] == []


def test_the_search_for_such_calls_finds_them():
    bad = "import pickle\npickle.loads(x)\ntorch.load(f)\nm(trust_remote_code=True)\nyaml.load(t)\nrun(c, shell=True)"
    assert sorted(problems(bad)) == [
        "import pickle", "pickle.loads", "shell=True", "torch.load without weights_only=True", "trust_remote_code=True",
        "yaml.load",
    ]  # fmt: skip
    silent = "AutoTokenizer.from_pretrained(n)\nt.AutoConfig.from_pretrained(n)\nAutoModel.from_config(c)"
    assert problems(silent) == [
        "AutoTokenizer.from_pretrained without trust_remote_code=False",
        "t.AutoConfig.from_pretrained without trust_remote_code=False",
        "AutoModel.from_config without trust_remote_code=False",
    ]
    assert problems("AutoTokenizer.from_pretrained(n, trust_remote_code=asked)")
    assert problems("AutoTokenizer.from_pretrained(n, trust_remote_code=False)") == []
    assert problems("torch.load(f, weights_only=True)\nyaml.safe_load(t)\nm(trust_remote_code=False)") == []


EVIL = {
    "question": '<script>alert(1)</script> [x](javascript:alert(2)) <img src=x onerror="alert(3)"> "\'&',
    "reason": "<b onmouseover=alert(4)>loss</b> ](javascript:alert(5))",
}


class Page(HTMLParser):
    """Collector of a page's tags with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_report_and_notes_show_names_as_text(tmp_path):
    import numpy as np
    import pandas as pd

    from analysis.report import build

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
    page.feed(build.build(folder).read_text())
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
    ("sweep",), ("swep",), ("--versions",), ("sweep", "x", "y"), ("sweep", "x", "--slots", "0"),
    ("sweep", "x", "--slots", "a"), ("sweep", "x", "--sloots"), ("sweep", "none.yaml"), ("sweep", "configs"),
    ("status", "../../etc"), ("status", "x" * 300), ("report", "a\nb\x1b[2J"), ("trial", "none"), ("ui", "--port", "0"),
    ("ui", "--host", "everywhere"), ("ui", "--tracking", "http://me:s3cret@"), ("ui", "--tracking", "none"),
    ("ui", "--output", "nowhere/studies"), ("sweep", "configs/smoke.yaml", "--tracking", "gopher://me:s3cret@h"),
]  # fmt: skip


def in_process(words, monkeypatch, capsys):
    from tune.cli import main as cli

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


COMMANDS = ["sweep", "report", "status", "trial", "try", "ui", "plan", "sync", "repair", "none", ""]
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


# --- valid study files, on damaged texts and tokenizers ---------------------------------------------------------------

STUDY = (ROOT / "configs" / "smoke.yaml").read_text().replace("\ntokenizer: {vocab_size: 300}\n", "\n")
TEXT = "the quick brown fox jumps over the lazy dog, and runs away from all of them\n" * 400
HEAD = "s: Does the whole path work, from text to verdict?\n"  # a sweep prints this before it reads the text
EVIL_CODE = "open({mark!r}, 'w').close()\nclass Evil:\n    pass\n"


@pytest.fixture(scope="module")
def good_tokenizer():
    """Return tokenizer.json of a valid tokenizer."""
    from pagating.data.tokenizer import make_tokenizer

    return make_tokenizer({"vocab_size": 280}, TEXT).to_str()


def put(folder, files):
    """Write the files of a study, its text and its tokenizer; return the files that are then there."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return snapshot(folder)


def snapshot(folder):
    """Return every path below a folder, with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(folder, before, words, monkeypatch, capsys):
    """Run a command that must end with exit code 2 and write nothing; return its one line."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PAGATING_CACHE", raising=False)
    code, out, err = in_process(words, monkeypatch, capsys)
    assert (code, out) == (2, HEAD if words[0] == "sweep" else "")
    assert err.startswith("pagating: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert snapshot(folder) == before
    return err


def test_the_studys_text_is_found_where_it_is_put():
    assert "tokenizer" not in STUDY
    assert "corpus" not in STUDY


SOURCES_OF_TEXT = {"files": "corpus: {files: {train: text.txt}}\n", "hub": "corpus: {hub: {name: HERE/data}}\n"}
WELL = {"s.yaml": STUDY + SOURCES_OF_TEXT["files"] + "tokenizer: {path: tok}\n", "text.txt": TEXT}
ROWS = '{"text": "a b\\n"}\n' * 40
OF_A_HUB = {"s.yaml": STUDY + SOURCES_OF_TEXT["hub"] + "tokenizer: {vocab_size: 300}\n"}
WEIGHTS = STUDY.replace("model: {", "model: {pretrained: none, ")
UNUSABLE = {
    "an empty text": ({"text.txt": ""}, "text.txt: is empty"),
    "a binary text": ({"text.txt": b"a\0b"}, "is binary, not text"),
    "a short text": ({"text.txt": "a b c\n" * 40}, "tokens; one window needs n_ctx + 1 ="),
    "a text without a line end": ({"text.txt": "a b c " * 4000}, "no line end where the test split"),
    "no tokenizer": ({"s.yaml": WELL["s.yaml"].replace("tok}", "none}")}, "none does not exist; download"),
    "a list for a tokenizer": ({"tok/tokenizer.json": "[]"}, "tokenizer.json: is damaged: holds a list, not an object"),
    "an empty object": ({"tok/tokenizer.json": "{}"}, "tokenizer.json: is damaged: has no 'model'"),
    "text for a tokenizer": ({"tok/tokenizer.json": '"x"'}, "tokenizer.json: is damaged: holds text, not an object"),
    "half a tokenizer": ({"tok/tokenizer.json": '{"model"'}, "tokenizer.json: is damaged: no JSON ("),
    "a list of settings": ({"tok/tokenizer_config.json": "[]"}, "tokenizer_config.json: is damaged: holds a list"),
    "a class that is 3": ({"tok/tokenizer_config.json": '{"tokenizer_class": 3}'}, "its 'tokenizer_class' is a number"),
    "code that is 3": ({"tok/tokenizer_config.json": '{"auto_map": 3}'}, "its 'auto_map' is a number"),
    "no weights": (
        {"s.yaml": WEIGHTS + SOURCES_OF_TEXT["files"] + "tokenizer: {path: tok}\n"},
        "pretrained 'none' cannot be loaded: no such folder (",
    ),
    "a script for a data set": (OF_A_HUB | {"data/data.py": "1"}, "it holds data.py"),
    "a card that is no YAML": (OF_A_HUB | {"data/train.jsonl": ROWS, "data/README.md": "---\n{[\n---\n"}, "Parser"),
    "numbers for text": (OF_A_HUB | {"data/train.jsonl": '{"text": 3}\n' * 9}, "holds int, not text"),
    "a data set of nothing": (OF_A_HUB | {"data/train.jsonl": ""}, "data: train.jsonl is empty; remove it"),
    "a zip that is none": (OF_A_HUB | {"data/train.zip": b"PK\3\4"}, "File is not a zip file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_a_study_cannot_use_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, good_tokenizer, kind):
    changed, message = UNUSABLE[kind]
    files = {"tok/tokenizer.json": good_tokenizer, **WELL, **changed}
    files["s.yaml"] = files["s.yaml"].replace("HERE", str(tmp_path))
    before = put(tmp_path, files)
    assert message in refused(tmp_path, before, ["sweep", "s.yaml", "--tracking", "none"], monkeypatch, capsys)


def test_a_yes_on_the_terminal_runs_nothing_of_a_tokenizer(tmp_path, good_tokenizer):
    mark = tmp_path / "ran"
    config = '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    files = {"tok/tokenizer.json": good_tokenizer, "tok/tokenizer_config.json": config}
    before = put(tmp_path, {**files, "tok/evil.py": EVIL_CODE.format(mark=str(mark)), **WELL})
    environment = {name: value for name, value in os.environ.items() if name != "PAGATING_CACHE"}
    done = run("sweep", tmp_path / "s.yaml", "--output", tmp_path / "studies", env=environment, input="y\n" * 9)
    assert (done.returncode, done.stdout) == (2, HEAD)
    assert done.stderr.startswith(f"pagating: tokenizer '{tmp_path / 'tok'}' needs Python code of its own (auto_map)")
    assert done.stderr.count("\n") == 1
    assert not mark.exists()
    assert snapshot(tmp_path) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
BYTES = st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode())
TRAINED = WELL | {"s.yaml": STUDY + SOURCES_OF_TEXT["files"] + "tokenizer: {vocab_size: 300}\n"}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["sweep", "try", "plan"]), BYTES)
def test_a_real_study_on_any_short_junk_is_one_line_and_writes_nothing(
    tmp_path_factory, monkeypatch, capsys, command, junk
):
    folder = tmp_path_factory.mktemp("junk")
    before = put(folder, {**TRAINED, "text.txt": junk})
    refused(folder, before, [command, "s.yaml"], monkeypatch, capsys)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), BYTES)
def test_a_real_study_with_any_junk_for_a_tokenizer_is_one_line_and_writes_nothing(
    tmp_path_factory, monkeypatch, capsys, name, junk
):
    folder = tmp_path_factory.mktemp("junk")
    before = put(folder, {**WELL, "tok/tokenizer.json": "{}", f"tok/{name}": junk})
    refused(folder, before, ["sweep", "s.yaml"], monkeypatch, capsys)


def test_the_real_command_says_one_line_too(tmp_path):
    done = run("sweep", tmp_path / "none.yaml", "--tracking", "http://me:s3cret@h", env={**os.environ, "LC_ALL": "C"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pagating: {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_opening_the_ui_to_others_warns_and_loopback_does_not(tmp_path, monkeypatch, capsys):
    from tune.cli import main as cli
    from tune.cli import ui as cli_ui

    started, before = [], dict(os.environ)
    given = {}
    monkeypatch.setattr(cli_ui, "_free_port", lambda *_: 5000)  # this machine may lack an address
    monkeypatch.setattr(
        cli_ui, "_serve", lambda words, settings: (started.append(words), given.update(settings), 0)[-1]
    )
    for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "192.0.2.7"):
        words = ["pagating", "ui", "--tracking", "postgresql://me:s3cret@127.0.0.1:1/db", "--host", host]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit):
            cli.main()
        out, err = capsys.readouterr()
        assert ("without a password" in err) == (host in ("0.0.0.0", "::", "192.0.2.7"))
        assert started[-1][started[-1].index("--host") + 1] == host
        assert "s3cret" not in out + err + " ".join(started[-1])
        assert given["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:s3cret@127.0.0.1:1/db"
    assert dict(os.environ) == before


def listening(process):
    """Return the addresses on which a process and its children listen."""
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
    from tune.cli.main import main  # noqa: F401 (imported, so that a broken command fails here)

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
    config.unlink()  # the only file that may contain them
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
