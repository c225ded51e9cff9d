"""`Trial` and the catalogue: what needs no torch, and the functions that other modules attach to its names."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pagating.gating import catalog, gates, units
from pagating.hardware import PEAKS, peak_tflops
from pagating.model.gpt2 import ACTIVATION_FUNCTIONS
from pagating.model.size import ACTIVATIONS, PRESETS, GPT2Size
from pagating.tasks.denoising import KINDS
from pagating.trial import CHOICES, TASKS, Trial, evaluation_interval, step_count

MODEL = {"n_layer": 1, "d_model": 8, "n_head": 2, "n_ctx": 16}


def make(**changed):
    fields = {"corpus": "/corpus", "model": MODEL, "lr": 1e-3, "tokens": 640, "batch_tokens": 64, "seed": 5}
    return Trial(**{**fields, **changed})


def test_trial_and_catalogue_load_neither_torch_nor_numpy():
    modules = "pagating.trial, pagating.gating.catalog, pagating.hardware, pagating.model.size"
    code = f"import sys, {modules}; print(sorted({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_of_the_catalogue_has_its_function_and_no_other_name_has():
    built_in = [name for name in gates.GATES if not catalog.OWN_CODE.fullmatch(name)]  # other tests register own ones
    assert list(gates.FUNCTIONS) == list(catalog.GATE_ROWS) == built_in[: len(catalog.GATE_ROWS)]
    assert tuple(units.BASES) == catalog.BASES
    assert {*units.ELEMENTWISE, "glu", "projected"} == set(catalog.FORMS)
    assert tuple(ACTIVATION_FUNCTIONS) == ACTIVATIONS
    assert ("causal", *KINDS) == TASKS
    for name, row in catalog.GATE_ROWS.items():
        assert vars(row).items() <= vars(gates.GATES[name]).items()


def test_what_the_catalogue_says_of_a_known_activation():
    rows = catalog.COMPETITORS
    assert [name for name, row in rows.items() if row.is_glu] == ["swiglu", "geglu", "glu", "bilinear"]
    assert [name for name, row in rows.items() if row.has_alpha] == [
        "leaky_relu2", "leaky_relu", "prelu", "swish", "xsilu", "xgelu", "xatlu",
    ]  # fmt: skip
    assert [name for name, row in rows.items() if row.learns_alpha] == ["prelu", "swish", "xsilu", "xgelu", "xatlu"]
    assert all(row.settings.get("gate", "sigmoid") in catalog.GATE_ROWS for row in rows.values())
    assert all(row.settings.get("form", "pointwise") in catalog.FORMS for row in rows.values())


def test_a_trial_comes_back_from_its_dict_and_from_json():
    learned = {"gate": "own.py:g", "alpha": {"learnable": {"init": 0.25}}, "base": "identity"}
    for trial in (
        make(),
        make(unit=learned, eval_every=3, micro_batch_tokens=32, padding="masked", device="auto", test=True),
        make(lr=0.1 + 0.2, task="span", unit={"unit": "swiglu"}, schedule="linear", compile="never"),
        make(pretrained="/weights", precision="bfloat16", compile="always", final_lr=1 / 3),
    ):
        assert Trial.from_dict(trial.as_dict()) == trial
        assert Trial.from_dict(json.loads(json.dumps(trial.as_dict()))) == trial
        assert list(trial.as_dict()) == [field.name for field in dataclasses.fields(Trial)]


def test_a_file_without_the_fields_that_have_defaults_is_the_same_trial():
    required = ("corpus", "model", "lr", "tokens", "batch_tokens", "seed")
    assert Trial.from_dict({name: make().as_dict()[name] for name in required}) == make()
    with pytest.raises(ValueError, match=r"unknown key 'warm_up'; did you mean 'warmup'\?"):
        Trial.from_dict({**make().as_dict(), "warm_up": 0.1})
    with pytest.raises(ValueError, match=r"^missing: seed$"):
        Trial.from_dict({name: value for name, value in make().as_dict().items() if name != "seed"})


@pytest.mark.parametrize("field", CHOICES)
def test_a_name_that_is_no_choice_is_refused_with_those_that_are(field):
    with pytest.raises(ValueError, match=f"{field}='other' is not one of {', '.join(CHOICES[field])}"):
        make(**{field: "other"})


def test_own_code_is_found_and_replaced():
    for plain in (make(unit={"gate": "sigmoid", "alpha": 1.0}), make(unit={"unit": "relu"}), make()):
        assert plain.own_code is None
        assert plain.with_own("c.py") is plain
    for key, rest in (("gate", {"alpha": 1.0}), ("unit", {})):
        own = make(unit={key: "a/b.py:mine", **rest})
        assert own.own_code == catalog.OwnCode(key, "a/b.py", "mine")
        assert own.with_own("c.py").unit == {key: "c.py:mine", **rest}
        assert own.unit[key] == own.own_code.reference == "a/b.py:mine"


@pytest.mark.parametrize(
    ("tokens", "every", "steps", "interval"),
    [(640, None, 10, 1), (1343, None, 20, 2), (703, 4, 10, 4), (64, None, 1, 1)],
)
def test_steps_and_evaluation_interval(tokens, every, steps, interval):
    trial = make(tokens=tokens, eval_every=every)
    assert (trial.steps, trial.evaluation_interval) == (steps, interval)
    assert (step_count(tokens, 64), evaluation_interval(steps, every)) == (steps, interval)


def test_published_sizes_are_sizes_and_every_peak_is_found_by_its_name():
    assert [GPT2Size(vocab_size=1, **sizes).d_model for sizes in PRESETS.values()] == [768, 1024, 1280]
    for name, peak in PEAKS.items():
        assert peak_tflops(f"NVIDIA {name} 80GB") == peak.bfloat16
    assert PEAKS["V100"].rate("bfloat16") == PEAKS["V100"].rate("float32") == 15.7
    assert (PEAKS["A100"].rate("bfloat16"), PEAKS["A100"].rate("float32")) == (312.0, 19.5)
    assert peak_tflops("a device that nobody knows") is None
