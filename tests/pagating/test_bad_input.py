"""Bad values of a trial's file: one line with the key, the value and what is allowed, and exit code 2."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from pagating.limits import check_keys, check_number, interval
from pagating.model.size import SIZE_LIMITS
from pagating.train import main
from pagating.trial import LIMITS, Trial
from tune.study.sections import FixedSection, ModelSection

MODEL = {"n_layer": 1, "d_model": 8, "n_head": 2, "n_ctx": 16}
NAN = float("nan")


def size(**changed):
    return {"model": {**MODEL, **changed}}


def unit(**arguments):
    return {"unit": arguments}


@pytest.fixture
def run(packed, tmp_path, capsys):
    """Return a function that trains a file with some values changed and returns exit code, stdout and stderr."""
    path = tmp_path / "trial.json"

    def run(changed, *options):
        good = {"corpus": packed, "model": MODEL, "lr": 1e-2, "tokens": 64, "batch_tokens": 64, "seed": 1}
        path.write_text(changed if isinstance(changed, str) else json.dumps({**good, **changed}))
        code = main([str(path), *options])
        out, err = capsys.readouterr()
        return code, out, err.replace(str(path), "FILE")

    return run


REFUSED = [
    ({"corpus": "/none"}, "corpus='/none': /none/corpus.json: No such file or directory; allowed: a folder that"),
    ({"corpus": __file__}, f"corpus='{__file__}': {__file__}/corpus.json: Not a directory; allowed"),
    ({"corpus": 3}, "corpus=3 is not a text"),
    ({"beta1": 2}, "beta1=2 is not a number in [0, 1)"),
    ({"beta2": 1}, "beta2=1 is not a number in [0, 1)"),
    ({"seed": -1}, "seed=-1 is not a whole number in [0, 10^18]"),
    ({"seed": 1.5}, "seed=1.5 is not a whole number"),
    ({"seed": True}, "seed=True is not a whole number"),
    ({"threads": 0}, "threads=0 is not a whole number in [1, 1_024]"),
    ({"warmup": 2}, "warmup=2 is not a number in [0, 1)"),
    ({"warmup": NAN}, "warmup=nan is not a number"),
    ({"clip": 0}, "clip=0 is not a number in (0, inf)"),
    ({"clip": float("inf")}, "clip=inf is not a number"),
    ({"weight_decay": -1}, "weight_decay=-1 is not a number in [0, 10]"),
    ({"final_lr": 1.5}, "final_lr=1.5 is not a number in [0, 1]"),
    ({"lr": "1e-3"}, "lr='1e-3' is not a number in (0, inf)"),
    ({"lr": None}, "lr=None is not a number"),
    ({"tokens": 64.0}, "tokens=64.0 is not a whole number in [1, 10^13]"),
    ({"eval_every": 0}, "eval_every=0 is not a whole number in [1, 10^12]"),
    ({"eval_windows": 0}, "eval_windows=0 is not a whole number in [1, 10^9]"),
    ({"test": 1}, "test=1 is not true or false"),
    ({"device": ["cpu"]}, "device=['cpu'] is not one of cpu, cuda, auto"),
    ({"padding": "masked"}, "is packed, not a corpus of lines"),
    ({"padding": False}, "padding=False is not one of counted, masked"),
    ({"pretrained": "/none"}, "pretrained='/none': no such file; allowed: a safetensors file, or null"),
    ({"sead": 1}, "unknown key 'sead'; did you mean 'seed'? allowed: corpus"),
    (size(n_ctx=0), "n_ctx=0 is not a whole number in [2, 131_072]"),
    (size(n_ctx="16"), "n_ctx='16' is not a whole number"),
    (size(dropout=1), "dropout=1 is not a number in [0, 1)"),
    (size(n_layers=1), "model: unknown key 'n_layers'; did you mean 'n_layer'? allowed: n_ctx"),
    ({"model": {"n_ctx": 16}}, "model: missing: d_model, n_layer, n_head"),
    ({"model": "gpt2"}, "model: 'gpt2' is not a mapping; its keys are n_ctx"),
    ({**size(n_ctx=1 << 17), "batch_tokens": 1 << 17, "tokens": 1 << 17}, "one window needs n_ctx + 1 = 131073"),
    ({"unit": "relu2"}, "unit: 'relu2' is not a mapping; its keys are gate, alpha, base, form, unit"),
    (unit(gate=[]), "gate: [] is not a name, such as 'sigmoid'"),
    (unit(gate="sigmoidd"), "gate: 'sigmoidd' is not one of sigmoid, tanh"),
    (unit(unit="none"), "unit: 'none' is not one of gelu, linear"),
    (unit(alpha=NAN), "alpha: nan is not a finite number in [0, 2]"),
    (unit(alpha=[0.1, 0.2]), "alpha: a list of 2 for 1 layers"),
    (unit(alpha={"learnable": {"per": []}}), "alpha.learnable.per: [] is not one of model, layer, channel"),
    ("", "is not JSON: Expecting value"),
    ("[]", "[] is not a mapping; its keys are corpus"),
    ('{"lr": 1, "seed": 1, "lr": 2}', "key 'lr' is there twice"),
    ("[" * 100_000, "is not JSON: maximum recursion depth"),
]


@pytest.mark.parametrize(("changed", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_bad_value_ends_in_one_line_and_exit_code_2(run, changed, said):
    code, out, err = run(changed)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("FILE: ")
    assert said in err


def test_the_same_file_with_good_values_is_trained(run):
    code, out, err = run({})
    assert (code, json.loads(out)["outcome"]) == (0, "completed")
    assert err.startswith("step 1/1 val_nll ")


def test_too_many_windows_are_said_so_and_all_of_them_are_evaluated(run):
    code, out, err = run({"eval_windows": 10**9})
    first, _, _rest = err.partition("\n")
    assert code == 0
    found = int(first.partition("the validation split has ")[2].split()[0])
    assert first.startswith("pagating: eval_windows=1000000000: the validation split has ")
    assert json.loads(run({"eval_windows": found})[1])["val_nll"] == json.loads(out)["val_nll"]
    assert "eval_windows" not in run({"eval_windows": found})[2]


def test_a_unit_that_does_not_fit_into_memory_is_infeasible(run, monkeypatch):
    def full(size, unit):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 274877906944 bytes.")

    monkeypatch.setattr("pagating.tasks.causal.activations", full)
    code, out, err = run(unit(form="projected"))
    assert (code, json.loads(out)["outcome"], err) == (1, "infeasible", "")
    assert json.loads(out)["reason"].startswith("out of memory: 256.00 GiB more could not be had; lower the batch")


def test_files_and_options_that_cannot_be(tmp_path, packed):
    """Train in a fresh process, as a user does, and see no traceback."""
    good = {"corpus": packed, "model": MODEL, "lr": 1e-2, "tokens": 64, "batch_tokens": 64, "seed": 1}
    (tmp_path / "trial.json").write_text(json.dumps(good))
    (tmp_path / "latin").write_bytes(b"\xff\xfe{")
    code = "import sys; from pagating.train import main\n"
    code += (
        "for line in sys.stdin:\n    try: print(main(line.split()))\n    except SystemExit as end: print(end.code)\n"
    )
    calls = {
        "none.json": "none.json: No such file or directory",
        ".": ".: Is a directory",
        "latin": "latin: 'utf-8' codec can't decode byte 0xff",
        "trial.json --checkpoints latin": "latin: File exists",
        "trial.json --model latin": "latin: File exists",
        "trial.json --every nan": "argument --every: 'nan' is not a number of seconds in [0, inf)",
        "trial.json --every -1": "argument --every: '-1' is not a number of seconds in [0, inf)",
        "": "the following arguments are required: trial",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, input="".join(f"{line}\n" for line in calls), capture_output=True, text=True, cwd=tmp_path, check=True
    )
    said = done.stderr.splitlines()
    assert done.stdout.split() == ["2"] * len(calls)
    assert len(said) == len(calls)
    for line, expected in zip(said, calls.values(), strict=True):
        assert expected in line


@pytest.mark.parametrize("key", ["warmup", "final_lr", "weight_decay", "beta1", "beta2", "clip", "eval_windows"])
def test_a_trial_and_a_study_file_refuse_the_same_values(key):
    limits = LIMITS[key]
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt", 1e9))
    refused = []
    for value in (low - 1, low, high, high + 1):
        ends = []
        for make in (lambda v: Trial("c", MODEL, 1.0, 64, 64, 1, **{key: v}), lambda v: FixedSection(**{key: v})):
            try:
                make(value)
            except (ValueError, ValidationError):
                ends.append(True)
            else:
                ends.append(False)
        assert ends[0] == ends[1], value
        refused.append(ends[0])
    assert refused == [True, "gt" in limits, "lt" in limits, "le" in limits or "lt" in limits]


def test_the_sizes_of_a_study_have_the_limits_of_a_model():
    for key, limits in SIZE_LIMITS.items():
        if key != "vocab_size":
            (low,) = (limits[name] for name in ("ge", "gt") if name in limits)
            with pytest.raises(ValidationError, match=key):
                ModelSection(**{key: low - 1})


@pytest.mark.parametrize(
    ("limits", "shown", "inside", "outside"),
    [
        ({"ge": 0, "lt": 1}, "[0, 1)", [0, 0.999], [-1e-9, 1]),
        ({"gt": 0}, "(0, inf)", [1e-300, 1e300], [0, float("inf"), NAN]),
        ({"ge": 2, "le": 10**9}, "[2, 10^9]", [2, 10**9], [1, 10**9 + 1]),
        ({"le": 131_072}, "(-inf, 131_072]", [-5, 131_072], [131_073, "1", None, True]),
    ],
)
def test_limits(limits, shown, inside, outside):
    assert interval(limits) == shown
    for value in inside:
        check_number("key", value, limits)
    for value in outside:
        with pytest.raises(ValueError, match=r"^key=.* is not a number in "):
            check_number("key", value, limits)


def test_keys():
    check_keys("", {"a": 1}, ["a", "b"], ["a"])
    for given, said in (({"c": 1}, "^unknown key 'c'"), ({}, "^missing: a$"), (3, "^3 is not a mapping")):
        with pytest.raises(ValueError, match=said):
            check_keys("", given, ["a", "b"], ["a"])
