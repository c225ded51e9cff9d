"""Hostile study files: any file gives either a study or one line that says what is wrong."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tune.errors import StudyError
from tune.study.addresses import check_tracking
from tune.study.files import dump, load, parse
from tune.study.study import Study

HERE = Path("study.yaml")
VALID = """
question: Is it better?
corpus: {files: {train: [a.txt, b.txt], fractions: {validation: 0.1}}}
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 4096, batch_tokens: 64}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}, warmup: {uniform: [0.0, 0.5]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
  searched: {gate: tanh, alpha: {search: {uniform: [0.0, 2.0]}}}
  learned: {gate: silu, alpha: {learnable: {init: 0.3, lr_multiplier: {choice: [1.0, 9.0]}}}}
search: {trials_per_arm: 3}
calibrate: {points: 3, seeds: 1}
confirm: {seeds: 3, margin: 0.5%}
tracking: sqlite:///mlflow.db
"""
CONTENT = yaml.safe_load(VALID)
TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    [
        "../up",
        "/etc/passwd",
        "a\x00b",
        "\x1b[2J",
        "<script>",
        "[x](javascript:1)",
        "con",
        "\u202egnp",
        "x" * 300,
        "",
        "~",
    ]
)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | TEXT
    | st.binary(max_size=9)
)
JUNK = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def one_line_or_a_study(text):
    """Check that a text is refused in one line, or is a study that survives dump and parse; return it, or None."""
    try:
        study = parse(text, HERE)
    except StudyError as error:
        message = str(error)
        assert message.startswith(f"{HERE}")
        assert message.isprintable(), ascii(message)
        assert len(message) < 1500
        return None
    assert parse(dump(study), HERE) == study
    assert len(study.digest()) == 12
    return study


def paths(value, at=()):
    """Return the path to every value in nested mappings and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(found for key, child in inside for found in paths(child, (*at, key)))]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(paths(CONTENT)[1:]), JUNK, st.booleans())
def test_any_value_put_anywhere_is_a_study_or_one_line(where, junk, beside):
    content = copy.deepcopy(CONTENT)
    *parents, last = where
    section = content
    for key in parents:
        section = section[key]
    if beside and isinstance(section, dict):
        section[str(junk)[:50]] = section[last]
    else:
        section[last] = junk
    one_line_or_a_study(yaml.safe_dump(content, allow_unicode=True))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, len(VALID)),
    st.integers(0, 40),
    st.text(st.sampled_from("\t\n :-{}[]&*!|>'\"%@`#,?~<=0b1xe.é\u2028\ufeff\ud800\x00\x85"), max_size=12),
)
def test_any_cut_or_insertion_is_a_study_or_one_line(start, length, inserted):
    one_line_or_a_study(VALID[:start] + inserted + VALID[start + length :])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_one_line(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    with pytest.raises(StudyError) as caught:
        load(path)
    assert str(caught.value).isprintable()


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "an alias bomb": (LAUGHS, "more than 100000 values, with aliases written out"),
    "an alias in itself": ("question: &a [*a]", "alias *a is inside the value that it names"),
    "deep lists": ("question: " + "[" * 5000 + "]" * 5000, "more than 40 levels deep"),
    "deep mappings": ("question: " + "{a: " * 5000 + "1" + "}" * 5000, "more than 40 levels deep"),
    "a python tag": ("question: !!python/object/apply:os.system ['true']", "tag tag:yaml.org,2002:python/object/apply"),
    "a tag of YAML's own": ("question: !!timestamp abc", "tag tag:yaml.org,2002:timestamp is not allowed"),
    "a date that is none": (VALID.replace("Is it better?", "2001-99-99") + "x: 1", "unknown key 'x'"),
    "5,000 digits": (VALID.replace("4096", "9" * 5000), "has 5000 digits; allowed: 20"),
    "octal": (VALID.replace("4096", "010000"), "fixed.tokens: '010000' is not allowed"),
    "hours": (VALID.replace("4096", "1:30:00"), "fixed.tokens: '1:30:00' is not allowed"),
    "more tokens than there are": (VALID.replace("4096", "9" * 18), "fixed.tokens: 999999999999999999 is not allowed"),
    "a merge of no mapping": (VALID + "<<: 3", "expected a mapping or list of mappings for merging, but found scalar"),
    "a merge key in quotes": (VALID + "'<<': {name: x}", "unknown key '<<'"),
    "a key twice beside a merge": (VALID + "<<: {name: x}\nname: y\nname: z", "key 'name' is given twice"),
    "a list as key": (VALID + "? [1]\n: 2", "a key must be text"),
    "a tab": ("question:\n\t- a", "cannot start any token; indent with spaces, not with tabs"),
    "terminal codes": (VALID.replace("Is it better?", '"\\e[2J"'), "character '\\x1b' is not allowed"),
    "half a surrogate": (VALID.replace("Is it better?", '"\\ud800"'), "character '\\ud800' is not allowed"),
    "text that runs backwards": (VALID.replace("better", "\u202ebetter"), "character '\\u202e' is not allowed"),
    "a preset that is a list": (VALID.replace("n_layer: 2", "preset: [1]"), "model.preset: [1] is not allowed"),
    "a key in a branch": (VALID.replace("{search: {", "{serch: {"), "unknown key 'arms.searched.alpha.serch'; did you"),
    "a search beyond the range": (VALID.replace("uniform: [0.0, 2.0]", "uniform: [0.0, 9.0]"), "alpha is searched in"),
    "a warmup beyond its range": (
        VALID.replace("uniform: [0.0, 0.5]", "uniform: [0.0, 1.5]"),
        "nuisance.warmup has 1.5",
    ),
    "a learning rate beyond use": (VALID.replace("1.0e-2", "1.0e+9"), "nuisance.lr must be in (0, 100]; got"),
    "a margin without end": (VALID.replace("0.5%", "9" * 18 + "%"), "is not in (0, 100]"),
    "a long value": (VALID.replace("sigmoid", "x" * 100_000), "arms.floor.gate: "),
    "a long question": (VALID.replace("Is it better?", "x" * 2001), "question: "),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_for_their_own_reason(text, message):
    assert one_line_or_a_study(text) is None
    with pytest.raises(StudyError) as caught:
        parse(text, HERE)
    assert message in str(caught.value)


def test_a_python_tag_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    for tag in ("object/apply:os.system", "object/new:os.system", "object/apply:subprocess.check_output"):
        with pytest.raises(StudyError, match=r"tag tag:yaml\.org,2002:python"):
            parse(f"question: !!python/{tag} ['touch {mark}']", HERE)
    assert not mark.exists()


def test_aliases_that_stay_small_are_read():
    text = VALID.replace("{uniform: [0.0, 2.0]}", "&range {uniform: [0.0, 2.0]}").replace("gate: silu", "gate: tanh")
    assert parse(text, HERE).arms["searched"].searched()["alpha"].uniform == [0.0, 2.0]
    assert parse(json.dumps(CONTENT), HERE) == parse(VALID, HERE)  # JSON is YAML


def test_files_too_large_to_be_studies_and_things_that_are_no_files(tmp_path):
    big = tmp_path / "big.yaml"
    big.write_text("# " + "x" * 10_000_000)
    with pytest.raises(StudyError, match=r"big\.yaml: has more than 1,000,000 bytes"):
        load(big)
    with pytest.raises(StudyError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(StudyError, match="File name too long"):
        load(tmp_path / ("x" * 300))
    with pytest.raises(StudyError, match="has more than 1,000,000 bytes"):
        load(Path("/dev/zero"))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert isinstance(load(tmp_path / "bom.yaml"), Study)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "closed.yaml"
    path.write_text(VALID)
    path.chmod(0)
    with pytest.raises(StudyError, match="Permission denied"):
        load(path)


NAMES = ["../up", "/abs", "a/b", "a\\b", ".hidden", "..", "-rf", "x" * 65, "x" * 300, "", " a", "a ", "a\u0410", "a:b"]


@pytest.mark.parametrize("name", [*NAMES, "\uff47elu", "con", "NUL.txt", "com1"])
def test_names_cannot_leave_the_folder_of_studies(name):
    shown = json.dumps(name)
    for text in (VALID + f"name: {shown}", VALID.replace("floor: {gate", f"{shown}: {{gate")):
        with pytest.raises(StudyError, match=r"must be 1 to 64 of|given twice"):
            parse(text, HERE)


@pytest.mark.parametrize(
    "uri",
    ["", "http://", "http://[::1", "http://h:99999", "gopher://h", "h:5000", "http://a b", "sqlite:x.db", "s3://b/x"],
)
def test_tracking_uris_that_mlflow_can_make_nothing_of(uri):
    with pytest.raises(
        StudyError, match=r"tracking '.*(is not a tracking URI|Invalid IPv6|Port out of range).*allowed: "
    ):
        check_tracking(uri, "tracking")


FOLDERS = {
    "file:///tmp/mlruns": "/tmp/mlruns.db",
    "FILE:mlruns": "mlruns.db",
    "file:": "mlruns.db",
    "file://localhost/my%20runs/": "/my runs.db",
    "./mlruns": "./mlruns.db",
    "/data/mlruns/": "/data/mlruns.db",
    "~/runs": "~/runs.db",
    "mlruns": "mlruns.db",
    "mlflow.db": "mlflow.db",
}


@pytest.mark.parametrize("uri", FOLDERS)
def test_a_store_that_is_a_folder_is_refused_with_a_file_instead(uri):
    with pytest.raises(
        StudyError, match=r"^MLFLOW_TRACKING_URI '.*ended its support for stores that are folders"
    ) as no:
        check_tracking(uri, "MLFLOW_TRACKING_URI")
    assert f"such as sqlite:///{FOLDERS[uri]}, or leave out MLFLOW_TRACKING_URI" in str(no.value)


@pytest.mark.parametrize("uri", ["sqlite:///:memory:", "sqlite:///:memory:?cache=shared"])
def test_a_store_in_memory_is_refused(uri):
    with pytest.raises(StudyError, match="keeps nothing"):
        check_tracking(uri, "tracking")


@pytest.mark.parametrize(
    "uri",
    [
        "none",
        "sqlite:////sp ace/mlflow.db",
        "databricks://me",
        "sqlite:///mlflow.db",
        "http://127.0.0.1:5000",
        "https://u:p@h/x",
        "postgresql+psycopg2://u:p@h/d",
    ],
)
def test_tracking_uris_that_are_taken(uri):
    assert check_tracking(uri, "tracking") == uri


def test_the_resolved_study_holds_no_credentials():
    study = parse(VALID.replace("sqlite:///mlflow.db", "http://me:s3cret@host:5000/x?token=t0ken"), HERE)
    assert study.tracking == "http://me:s3cret@host:5000/x?token=t0ken"
    assert "s3cret" not in dump(study)
    assert "t0ken" not in dump(study)
    again = parse(dump(study), HERE)
    assert again.tracking == "http://***@host:5000/x?token=***"
    assert again.digest("tracking") == study.digest("tracking")
    with pytest.raises(StudyError, match="lacks its credentials; give the whole URI with --tracking"):
        check_tracking(str(again.tracking), "tracking")


@pytest.mark.parametrize("key", ["None", "Float", "[key]", "function-x", "1"])
def test_an_unknown_key_is_named_whatever_it_looks_like(key):
    with pytest.raises(StudyError, match=re.escape(f"x.yaml: unknown key '{key}'")):
        parse(yaml.safe_dump({**copy.deepcopy(CONTENT), key: 1}), Path("x.yaml"))
