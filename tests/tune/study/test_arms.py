"""Tests of arms and of the section `fixed`: forms, units, kinds of alpha, steps and micro-batches."""

from pathlib import Path

import pytest
import torch
import yaml

from pagating.gating.alpha import parse as parse_alpha
from pagating.gating.catalog import COMPETITORS, FORMS, GATE_ROWS, STUDY_GATES
from pagating.gating.units import PaGLU, ProjectedGLU, SplitGLU
from pagating.model.gpt2 import GPT2, GPT2Size
from tests.studies import SMALL, with_arm
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.plan import child, plan, space, work
from tune.run import tables
from tune.run.study_run import StudyRun
from tune.study import sizes
from tune.study.files import dump, parse
from tune.study.trial_spec import trial_spec
from tune.subject.known import Known
from tune.tracking.runs import numeric_alpha

torch.set_num_threads(1)
SIZE = GPT2Size(vocab_size=300, n_layer=2, d_model=16, n_head=2, n_ctx=16)


def acts(arm, config=None):
    """Return the activations of a model with the arm's unit."""
    unit = with_arm(arm).arms["mine"].arguments(config or {})
    return [block.mlp.act for block in GPT2(SIZE, unit).transformer.h]


# --- arms ------------------------------------------------------------------------------------------------------------


def test_an_arm_names_the_gates_and_forms_of_the_catalogue_that_are_for_studies():
    for gate in GATE_ROWS:
        if gate in STUDY_GATES:
            assert with_arm(f"{{gate: {gate}, alpha: 0.5}}").arms["mine"].gate == gate
            continue
        with pytest.raises(StudyError, match=rf"gate '{gate}' is not one of sigmoid, tanh, relu, gelu, mish, silu"):
            with_arm(f"{{gate: {gate}, alpha: 0.5}}")
    for name, form in FORMS.items():
        if form.in_study:
            assert with_arm(f"{{gate: sigmoid, alpha: 0.5, form: {name}}}").arms["mine"].form == name
            continue
        with pytest.raises(StudyError, match=rf"form: '{name}' is not allowed: input should be 'pointwise', 'glu' or"):
            with_arm(f"{{gate: sigmoid, alpha: 0.5, form: {name}}}")


@pytest.mark.parametrize("unit", COMPETITORS)
def test_every_unit_is_an_arm_and_counted_as_its_model_is(unit):
    study = with_arm(f"{{unit: {unit}}}")
    assert study.arms["mine"].arguments({}) == {"unit": unit}
    model = GPT2(SIZE, {"unit": unit})
    counted = work.arm_model(study, "mine", 300)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert study.arms["mine"].learns_alpha == (counted.alpha_parameters > 0)
    assert parse(dump(study), Path("x.yaml")) == study


def test_a_units_alpha_may_be_given_or_searched_where_it_has_one():
    assert acts("{unit: leaky_relu, alpha: 0.9}")[0](torch.tensor([-2.0, 3.0])).tolist() == pytest.approx([-0.2, 3.0])
    searched = with_arm("{unit: leaky_relu, alpha: {search: {uniform: [0.5, 1.0]}}}")
    assert list(searched.space("mine")) == ["lr", "alpha"]
    assert searched.arms["mine"].arguments({"alpha": 0.75}) == {"unit": "leaky_relu", "alpha": 0.75}


def test_one_alpha_a_layer_is_searched_as_so_many_hyperparameters():
    each = with_arm("{gate: sigmoid, alpha: {search: {per: layer, uniform: [0.0, 1.5]}}}")
    assert list(each.space("mine")) == ["lr", "alpha_0", "alpha_1"]
    assert each.space("mine")["alpha_1"].uniform == [0.0, 1.5]
    config = {"lr": 1e-3, "alpha_1": 0.75, "alpha_0": 0.25}
    assert trial_spec(each, "mine", config, 1, Path("c"), test=False).unit["alpha"] == [0.25, 0.75]
    assert numeric_alpha(each, "mine", config) == 0.5
    assert parse(dump(each), Path("x.yaml")) == each
    assert sizes.example(each, "mine").keys() == {"lr", "alpha_0", "alpha_1"}
    twelve = {"lr": 1e-3, **{f"alpha_{layer}": layer / 10 for layer in range(12)}}
    assert each.arms["mine"].arguments(twelve)["alpha"] == [layer / 10 for layer in range(12)]


def test_the_sampler_proposes_each_layers_alpha_and_the_tables_have_them_by_layer():
    arm = "{gate: sigmoid, alpha: {search: {per: layer, uniform: [0.0, 1.5]}}}"
    each = with_arm(arm, stages=["search"], search={"trials_per_arm": 3, "pruner": "none"})
    run = StudyRun(each, None, Known(each, lambda cell, share: 3.0))
    Inline().train(run)
    configs = [record.cell.config for record in run.records.values() if record.cell.arm == "mine"]
    assert all(set(config) == {"lr", "alpha_0", "alpha_1"} for config in configs)
    drawn = [config[name] for config in configs for name in ("alpha_0", "alpha_1")]
    assert len(set(drawn)) == len(drawn) >= 4
    assert all(0 <= value <= 1.5 for value in drawn)
    trials, _ = tables.tables("x", run.ledger.events)
    mine = trials[trials["arm"] == "mine"]
    assert mine["alpha_layer_1"].tolist() == mine["alpha_1"].tolist() == [config["alpha_1"] for config in configs]
    assert trials[trials["arm"] == "gelu"]["alpha_layer_1"].isna().all()


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (
            "{gate: sigmoid, alpha: {search: {per: layer, uniform: [0.0, 2.5]}}}",
            r"alpha_0 is searched in \[0\.0, 2\.5\]",
        ),
        ("{gate: sigmoid, alpha: {search: {per: block, uniform: [0.0, 1.0]}}}", r"per"),
        (
            "{unit: swish, alpha: {search: {per: layer, uniform: [0.5, 1.0]}}}",
            r"unit: swish has one alpha for all layers",
        ),
    ],
)
def test_a_search_by_layer_that_cannot_be_is_refused(arm, message):
    with pytest.raises(StudyError, match=message):
        with_arm(arm)


@pytest.mark.parametrize(("form", "kind"), [("pointwise", PaGLU), ("glu", SplitGLU), ("projected", ProjectedGLU)])
def test_the_form_of_an_arm_is_that_of_its_model(form, kind):
    arm = f"{{gate: sigmoid, alpha: 0.5, form: {form}}}"
    assert [type(act) for act in acts(arm)] == [kind, kind]
    d_ff, d_model = 64, 16
    h = round(2 / 3 * d_ff)
    stock, mine = (work.arm_model(with_arm(arm), name, 300).parameters for name in ("gelu", "mine"))
    glu = 2 * (d_model * 2 * h + 2 * h + h * d_model - (2 * d_model * d_ff + d_ff))
    assert mine - stock == {"pointwise": 0, "glu": glu, "projected": 2 * 2 * (d_ff**2 + d_ff)}[form]


def test_a_pointwise_arm_has_the_arguments_that_it_had_before_forms():
    assert with_arm("{gate: tanh, alpha: 0.5}").arms["mine"].arguments({}) == {
        "gate": "tanh",
        "alpha": 0.5,
        "base": "identity",
    }


def test_a_scheduled_alpha_moves_over_the_training():
    given = with_arm("{gate: sigmoid, alpha: {schedule: {cosine: [0.2, 1.0]}}}").arms["mine"].arguments({})
    assert given["alpha"] == {"schedule": {"kind": "cosine", "from": 0.2, "to": 1.0}}
    act = acts("{gate: sigmoid, alpha: {schedule: {linear: [1.5, 0.5]}}}")[1]
    for fraction, value in ((0.0, 1.5), (0.25, 1.25), (1.0, 0.5)):
        act.set_progress(fraction)
        assert act.alpha().item() == pytest.approx(value)


def test_a_token_dependent_alpha_and_the_search_of_its_rate():
    study = with_arm("{gate: sigmoid, alpha: {token: {init: 0.25, lr_multiplier: {choice: [1.0, 10.0]}}}}")
    arm = study.arms["mine"]
    assert (arm.learns_alpha, list(study.space("mine"))) == (True, ["lr", "alpha_lr_multiplier"])
    given = arm.arguments({"alpha_lr_multiplier": 10.0})
    assert given["alpha"] == {"token": {"init": 0.25, "lr_multiplier": 10.0}}
    assert parse_alpha(given["alpha"]).kind == "token"
    assert work.arm_model(study, "mine", 300).alpha_parameters == 2 * (64 + 1)


BAD_ARMS = {
    "no such unit": ("{unit: gelo}", "arms.mine.unit: unit 'gelo' is not one of gelu, linear"),
    "a unit and a gate": ("{unit: silu, gate: sigmoid, alpha: 0.5}", "unit: silu settles gate; give one or the other"),
    "a unit and a form": ("{unit: silu, form: glu}", "unit: silu settles form"),
    "a unit without an alpha": ("{unit: silu, alpha: 0.5}", "silu has no alpha; those that have: leaky_relu"),
    "a form without a gate": ("{form: glu}", "form: glu needs a gate and an alpha"),
    "no such form": ("{gate: sigmoid, alpha: 0.5, form: wide}", "arms.mine.form: 'wide' is not allowed"),
    "a form and a base": (
        "{gate: sigmoid, alpha: 0.5, form: projected, base: gelu}",
        "base: gelu has no meaning for form projected",
    ),
    "two kinds of alpha": (
        "{gate: sigmoid, alpha: {learnable: {}, token: {}}}",
        "give exactly one of search, learnable, schedule and token",
    ),
    "two schedules": (
        "{gate: sigmoid, alpha: {schedule: {linear: [0, 1], cosine: [0, 1]}}}",
        "give exactly one of linear and cosine",
    ),
    "a schedule of one end": ("{gate: sigmoid, alpha: {schedule: {linear: [1]}}}", "linear [1.0] must be two numbers"),
    "a schedule beyond 2": ("{gate: sigmoid, alpha: {schedule: {cosine: [0, 3]}}}", "must be two numbers in [0, 2]"),
    "a schedule of letters": (
        "{gate: sigmoid, alpha: {schedule: {cosine: [low, 1]}}}",
        "alpha.schedule.cosine.0: 'low' is not allowed",
    ),
    "a token's start": ("{gate: sigmoid, alpha: {token: {init: 1.0}}}", "alpha.token.init: 1.0 is not allowed"),
    "a token's rate": ("{gate: sigmoid, alpha: {token: {lr_multiplier: 0.0}}}", "lr_multiplier=0.0 is not positive"),
}


@pytest.mark.parametrize(("arm", "message"), BAD_ARMS.values(), ids=BAD_ARMS.keys())
def test_a_bad_arm_is_one_line(arm, message):
    with pytest.raises(StudyError) as caught:
        with_arm(arm)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- steps and micro batches -----------------------------------------------------------------------------------------


def with_fixed(fixed):
    """Return a small study with this section `fixed`, given as YAML."""
    return with_arm("{}", fixed={**dict.fromkeys(SMALL["fixed"]), **yaml.safe_load(fixed)})


def test_steps_are_tokens_in_other_words():
    steps = with_fixed("{steps: 100, batch_tokens: 64}")
    tokens = with_fixed("{tokens: 6400, batch_tokens: 64}")
    assert steps == tokens
    assert steps.digest() == tokens.digest()
    assert parse(dump(steps), Path("x.yaml")) == steps
    assert with_fixed("{steps: 3}").fixed.tokens == 3 * 2048


BAD_FIXED = {
    "{steps: 100, tokens: 6400, batch_tokens: 64}": "fixed: give one of tokens and steps, not both",
    "{steps: many}": "fixed.steps: 'many' is not allowed",
    "{steps: 0}": "fixed.steps: 0 is not allowed",
    "{steps: 10, batch_tokens: 4.5}": "fixed.batch_tokens: 4.5 is not allowed",
    "{steps: 10, batch_tokens: 64, micro_batch_tokens: 24}": "fixed.micro_batch_tokens=24 is not a multiple of",
    "{steps: 10, batch_tokens: 64, micro_batch_tokens: 48}": "divides fixed.batch_tokens=64",
}


@pytest.mark.parametrize(("fixed", "message"), BAD_FIXED.items(), ids=BAD_FIXED.keys())
def test_bad_steps_and_micro_batches_are_one_line(fixed, message):
    with pytest.raises(StudyError) as caught:
        with_fixed(fixed)
    assert message in str(caught.value)


def test_a_micro_batch_reaches_the_trial_and_the_plan():
    whole, parts = (with_fixed(f"{{steps: 4, batch_tokens: 256{more}}}") for more in ("", ", micro_batch_tokens: 32"))
    assert trial_spec(parts, "gelu", {"lr": 1e-3}, 1, Path("/corpus"), test=False).micro_batch_tokens == 32
    model = work.arm_model(whole, "gelu", 300)
    memory = [space.memory_parts(study, model, 300, 0.0) for study in (whole, parts)]
    assert memory[0]["activations"] == pytest.approx(8 * memory[1]["activations"])
    # the embedding of 300 tokens has two gradients at a time beside the sum over the earlier micro-batches
    assert [row["embedding"] for row in memory] == [4 * 300 * whole.model.d_model, 8 * 300 * whole.model.d_model]


def test_a_calibration_keeps_the_micro_batch_or_is_smaller_than_one(packed_300):
    study = with_fixed("{steps: 4, batch_tokens: 256, micro_batch_tokens: 32}")
    spec = trial_spec(study, "gelu", {"lr": 1e-3}, 1, packed_300, test=False)
    flops = work.arm_model(study, "gelu", 300).flops_per_token
    for seconds, batch, micro in ((1.0, 256, 32), (90 * flops / child.ROUGH_FLOPS, 64, 32), (1e-9, 16, None)):
        changed, _ = child.short(spec, flops, seconds)
        assert (changed.batch_tokens, changed.micro_batch_tokens) == (batch, micro)


@pytest.fixture(scope="module")
def packed_300(tmp_path_factory):
    return plan.stand_in(tmp_path_factory.mktemp("packed"), 300, 1 << 12)


# --- formulas --------------------------------------------------------------------------------------------------------

FORMULAS = {
    "{gate: tanh, alpha: 1.0}": "x * tanh(x)",
    "{gate: tanh, alpha: 0.0}": "x",
    "{gate: tanh, alpha: 0.0, base: gelu}": "gelu(x)",
    "{gate: tanh, alpha: 0.25}": "0.25 * x * tanh(x) + 0.75 * x",
    "{gate: tanh, alpha: 0.3, base: gelu}": "0.3 * x * tanh(x) + 0.7 * gelu(x)",
    "{gate: tanh, alpha: 1.25}": "1.25 * x * tanh(x) + -0.25 * x",
    "{gate: tanh, alpha: {learnable: {}}}": "alpha * x * tanh(x) + (1 - alpha) * x",
    "{gate: tanh, alpha: [0.1, 0.2]}": "alpha * x * tanh(x) + (1 - alpha) * x",
    "{gate: tanh, alpha: {search: {uniform: [0, 1]}}}": "alpha * x * tanh(x) + (1 - alpha) * x",
    "{gate: a/act.py:snake, alpha: 1.0}": "x * snake(x)",
    "{gate: tanh, alpha: 1.0, form: glu}": "a * tanh(b)",
    "{gate: tanh, alpha: 0.5, form: glu}": "a * (0.5 * tanh(b) + 0.5)",
    "{gate: tanh, alpha: 0.5, form: projected}": "A(x) * (0.5 * tanh(B(x)) + 0.5)",
    "{unit: a/act.py:snake}": "snake(x)",
    "{unit: leaky_relu, alpha: 0.75}": "max(x, 0) + (1 - 0.75) * min(x, 0)",
    "{unit: leaky_relu}": "max(x, 0) + (1 - 0.99) * min(x, 0)",
    "{unit: swish}": "x * sigmoid(alpha * x)",
    "{unit: gelu}": "x * Phi(x)",
    "{}": "the stock activation",
}


@pytest.mark.parametrize(("arm", "formula"), FORMULAS.items(), ids=FORMULAS)
def test_the_formula_of_an_arm(arm, formula):
    assert with_arm(arm).arms["mine"].formula == formula


@pytest.mark.parametrize(
    "arm", [arm for arm in FORMULAS if "act.py" not in arm and ("tanh" in arm or "leaky" in arm)][:6]
)
def test_the_formula_is_what_the_arm_computes(arm):
    x = torch.linspace(-3, 3, 64)
    names = {"x": x, "tanh": torch.tanh, "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}
    torch.testing.assert_close(acts(arm)[0](x), eval(with_arm(arm).arms["mine"].formula, names))


@pytest.mark.parametrize(
    ("arm", "problem"),
    [
        ("{unit: act.py:snake, alpha: 0.5}", "unit: act.py:snake has no alpha"),
        ("{unit: act.py:snake, gate: tanh}", "unit: act.py:snake settles gate"),
        ("{unit: act.py:snake, form: glu}", "unit: act.py:snake settles form"),
        ("{unit: act.py}", "unit 'act.py' is not one of gelu, .*, nor FILE.py:NAME"),
    ],
)
def test_an_own_activation_has_no_alpha_gate_or_form(arm, problem):
    with pytest.raises(StudyError, match=problem):
        with_arm(arm)
