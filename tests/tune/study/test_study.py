from pathlib import Path

import pytest

from pagating.model.gpt2 import GPT2, GPT2Size
from tune.errors import StudyError
from tune.study.files import dump, load, parse
from tune.study.study import digest
from tune.study.trial_spec import trial_spec

CONFIGS = sorted(p for p in Path(__file__).parents[3].glob("configs/**/*.yaml") if p.parent.name != "cluster")
SMALL = """
question: Is it better?
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 4096, batch_tokens: 64}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
"""


def changed(old, new):
    assert old in SMALL
    return SMALL.replace(old, new)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_studies_load_and_come_back_from_their_resolved_form(path):
    study = load(path)
    assert study.name == path.stem
    assert parse(dump(study), path) == study


def test_the_looks_of_a_rule():
    assert parse(SMALL, Path("x.yaml")).confirm.looks == (10,)
    study = parse(SMALL + "confirm: {rule: obrien-fleming}", Path("x.yaml"))
    assert study.confirm.looks == (3, 5, 8, 10)
    assert parse(dump(study), Path("x.yaml")) == study
    assert parse(SMALL + "confirm: {rule: e-process, max_seeds: 6}", Path("x.yaml")).confirm.looks == (3, 4, 5, 6)


def test_there_are_shipped_studies():
    assert {"sweep", "smoke", "laptop"} <= {path.stem for path in CONFIGS}


def test_defaults_are_filled_in_and_the_name_is_the_files():
    study = parse(SMALL, Path("mine.yaml"))
    assert (study.name, study.baseline) == ("mine", "gelu")
    assert (study.fixed.schedule, study.confirm.correction, study.search.sampler) == ("cosine", "holm", "tpe")


BAD = {
    "a cap for the fixed rule": (
        SMALL + "confirm: {seeds: 8, max_seeds: 12}",
        "confirm: max_seeds=12 is for a sequential rule; the fixed rule takes seeds",
    ),
    "seeds for a sequential rule": (
        SMALL + "confirm: {rule: e-process, seeds: 8}",
        "confirm: seeds=8 is for the fixed rule; e-process takes max_seeds",
    ),
    "an unknown rule": (SMALL + "confirm: {rule: pocock}", "confirm.rule: 'pocock' is not allowed"),
    "unknown key": (changed("question:", "modle: {}\nquestion:"), "unknown key 'modle'; did you mean 'model'?"),
    "a key of another section": (
        changed("question:", "tokens: 5\nquestion:"),
        "tokens is a key of fixed; allowed",
    ),
    "unknown key in a section": (
        changed("batch_tokens", "batch_token"),
        "unknown key 'fixed.batch_token'; did you mean 'batch_tokens'?",
    ),
    "unknown key in an arm": (
        changed("alpha: 0.0,", "alhpa: 0.0,"),
        "unknown key 'arms.floor.alhpa'; did you mean 'alpha'?",
    ),
    "unknown nuisance": (changed("{lr: {", "{lrr: {"), "nuisance.lrr"),
    "a choice twice": (changed("{loguniform: [1.0e-4, 1.0e-2]}", "{choice: [0.01, 1e-2]}"), "choice has 0.01 twice"),
    "missing key": (changed("question: Is it better?", ""), "key 'question' is missing"),
    "text for a number": (changed("1.0e-4", "'1e-4'"), r"nuisance.lr.loguniform.0: '1e-4' is not allowed"),
    "text for a number says how to write it": (changed("1.0e-4", "'1e-4'"), "write the number without quotes"),
    "thousands": (changed("tokens: 4096", "tokens: 4'096"), "it is text: write the number without quotes"),
    "a whole number with an exponent": (
        changed("tokens: 4096", "tokens: 4.096e3"),
        "4096.0 is not allowed: input should",
    ),
    "and what to write": (changed("tokens: 4096", "tokens: 4.096e3"), "; write 4096"),
    "a number for text": (changed("Is it better?", "1e5"), "; YAML reads it as a number: put text in quotes"),
    "a word that is no text": (changed("Is it better?", "no"), "; YAML reads it as false: put text in quotes"),
    "an empty section": (changed("question: ", "search:\nquestion: "), "search: is empty; write {} or leave it out"),
    "an empty value": (changed("Is it better?", ""), "question: is empty; give it a value, or leave the key out"),
    "two documents": ("---\nquestion: a\n---\nquestion: b\n", "the file has two documents, divided by ---; give one"),
    "a colon": ("question: Is it: better?", "put text that contains a colon and a space in quotes"),
    "nothing": ("# only a comment\n", "bad.yaml: is empty, not a mapping of keys such as question"),
    "one word": ("question", "bad.yaml: holds text, not a mapping of keys such as question"),
    "text for an integer": (
        changed("tokens: 4096", "tokens: many"),
        "fixed.tokens: 'many' is not allowed: input should be",
    ),
    "fraction for an integer": (changed("tokens: 4096", "tokens: 4096.5"), "fixed.tokens: 4096.5 is not allowed"),
    "too small": (changed("n_layer: 2", "n_layer: 0"), "model.n_layer: 0 is not allowed: input should be greater than"),
    "not a number": (changed("alpha: 0.0", "alpha: .nan"), "arms.floor.alpha"),
    "no arms": (
        SMALL[: SMALL.index("arms:")] + "arms: {}",
        "arms: has no arm; name two or more, one of them with baseline: true",
    ),
    "no baseline": (changed("{baseline: true}", "{}"), "no arm of gelu, floor has baseline: true; exactly one must"),
    "two baselines": (
        changed("floor: true", "baseline: true"),
        "2 arms are the baseline (gelu, floor); only one can be",
    ),
    "one arm": (changed("  floor: {gate: sigmoid, alpha: 0.0, floor: true}\n", ""), "at least one arm to compare with"),
    "range upside down": (changed("[1.0e-4, 1.0e-2]", "[1.0e-2, 1.0e-4]"), "[0.01, 0.0001] is upside down"),
    "range below zero": (changed("[1.0e-4, 1.0e-2]", "[-1.0, 1.0e-2]"), "must lie above 0"),
    "two distributions": (changed("1.0e-2]}", "1.0e-2], uniform: [0.1, 0.2]}"), "give exactly one of uniform"),
    "no learning rate": (changed("lr: {log", "warmup: {log"), "nuisance.lr is missing"),
    "alpha without a gate": (changed("gate: sigmoid, ", ""), "arms.floor: gate and alpha come together"),
    "a layer's alpha beyond -10": (changed("alpha: 0.0", "alpha: [0, -11]"), "alpha=-11.0 of a layer is outside [-10"),
    "alpha beyond 2": (changed("alpha: 0.0", "alpha: 2.5"), "alpha=2.5 is outside [0, 2]"),
    "too few alphas": (changed("alpha: 0.0", "alpha: [0.1]"), "arms.floor.alpha lists 1 values; model.n_layer=2 needs"),
    "sigmoid at its limit": (
        changed("alpha: 0.0", "alpha: {learnable: {init: 1.0}}"),
        "a sigmoid cannot start at 0, at 1 or beyond",
    ),
    "heads": (changed("n_head: 2", "n_head: 3"), "d_model=16 is not a multiple of n_head=3"),
    "batch": (
        changed("batch_tokens: 64", "batch_tokens: 60"),
        "fixed.batch_tokens=60 is not a multiple of model.n_ctx=16",
    ),
    "too many seeds": (SMALL + "confirm: {seeds: 101}", "confirm.seeds: 101 is not allowed: input should be less than"),
    "margin": (SMALL + "confirm: {margin: wide}", "margin 'wide' is neither a percentage such as 0.5% nor"),
    "name": (SMALL + "name: ../up", "name '../up' must be 1 to 64 of"),
    "arm's name": (changed("  floor:", "  'a/b':"), "arm 'a/b' must be 1 to 64 of"),
    "two sources": (SMALL + "corpus: {hub: {name: x}, files: {train: y}}", "give one of hub and files"),
    "key given twice": (SMALL + "question: Twice?\n", "key 'question' is given twice"),
    "not YAML": ("arms: [", "is not YAML"),
    "not a mapping": ("- 1", "holds a list, not a mapping of keys"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_naming_file_key_and_what_is_allowed(text, message):
    with pytest.raises(StudyError) as caught:
        parse(text, Path("bad.yaml"))
    assert str(caught.value).startswith("bad.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_one_line(tmp_path):
    with pytest.raises(StudyError, match="No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(StudyError, match=r"is not UTF-8 text \(offset 3\); save it as UTF-8"):
        load(tmp_path / "bin.yaml")


def test_yaml_tags_are_never_executed():
    with pytest.raises(StudyError, match="is not YAML"):
        parse("question: !!python/object/apply:os.system ['true']", Path("x.yaml"))


def test_presets_are_the_published_sizes_and_single_sizes_override_them():
    study = parse(
        changed("model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}", "model: {preset: gpt2, n_ctx: 64}"), Path("x")
    )
    sizes = study.model
    assert (sizes.n_layer, sizes.d_model, sizes.n_head, sizes.n_ctx) == (12, 768, 12, 64)


ARMS = """
arms:
  gelu: {baseline: true}
  fixed: {gate: sigmoid, alpha: 0.5}
  layers: {gate: tanh, alpha: [0.1, 0.2], base: gelu}
  searched: {gate: sigmoid, alpha: {search: {uniform: [0.0, 2.0]}}}
  learned: {gate: sigmoid, alpha: {learnable: {init: 0.3, per: layer, range: free, lr_multiplier: {choice: [1.0, 9]}}}}
"""


def test_units_of_every_kind_of_arm():
    study = parse(SMALL[: SMALL.index("arms:")] + ARMS, Path("x.yaml"))
    config = {"lr": 1e-3, "alpha": 1.25, "alpha_lr_multiplier": 10.0}
    units = {arm: study.arms[arm].arguments(config) for arm in study.arms}
    assert units["gelu"] is None
    assert units["fixed"] == {"gate": "sigmoid", "alpha": 0.5, "base": "identity"}
    assert units["layers"] == {"gate": "tanh", "alpha": [0.1, 0.2], "base": "stock"}
    assert units["searched"] == {"gate": "sigmoid", "alpha": 1.25, "base": "identity"}
    learnable = {"init": 0.3, "per": "layer", "range": "free", "lr_multiplier": 10.0}
    assert units["learned"] == {"gate": "sigmoid", "alpha": {"learnable": learnable}, "base": "identity"}
    assert list(study.space("gelu")) == ["lr"]
    assert list(study.space("searched")) == ["lr", "alpha"]
    assert list(study.space("learned")) == ["lr", "alpha_lr_multiplier"]


def test_trial_arguments_are_the_fixed_ones_with_the_tuned_put_in():
    study = parse(changed("1.0e-2]}}", "1.0e-2]}, weight_decay: {choice: [0.0, 0.5]}}"), Path("x.yaml"))
    trial = trial_spec(study, "floor", {"lr": 2e-3, "weight_decay": 0.5}, 7, Path("/corpus"), test=True)
    assert (trial.lr, trial.weight_decay, trial.seed, trial.test) == (2e-3, 0.5, 7, True)
    assert trial.model == {
        "n_layer": 2,
        "d_model": 16,
        "n_head": 2,
        "n_ctx": 16,
        "dropout": 0.0,
        "initializer_range": 0.02,
        "activation": "gelu_pytorch_tanh",
    }
    assert trial.steps == 64


def test_digest_leaves_out_what_it_is_told_to():
    one, two = (parse(SMALL + f"confirm: {{seeds: {n}}}", Path("x.yaml")) for n in (5, 6))
    assert one.digest() != two.digest()
    assert one.digest("confirm.seeds") == two.digest("confirm.seeds")
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})


def test_every_arm_of_the_laptop_study_has_the_parameters_of_its_baseline():
    study = load(next(path for path in CONFIGS if path.stem == "laptop"))
    size = GPT2Size(vocab_size=study.tokenizer.vocab_size, **study.model.sizes())

    def parameters(arm):
        arguments = study.arms[arm].arguments(dict.fromkeys(study.arms[arm].searched(), 0.5))
        return sum(p.numel() for p in GPT2(size, arguments).parameters())

    stock = parameters(study.baseline)
    assert "swiglu" in study.arms
    for arm in study.arms:
        assert parameters(arm) == pytest.approx(stock, rel=3e-3), arm  # 2/3 of d_ff is rounded
    wide = GPT2(size, {"form": "projected"})
    assert sum(p.numel() for p in wide.parameters()) > 1.5 * stock
