"""The keys that the published studies need, the studies themselves, and their dry run."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from analysis import report
from pagating.alpha import parse as parse_alpha
from pagating.competitors import COMPETITORS
from pagating.gpt2_plain import GPT2, GPT2Size
from pagating.units import PaGLU, ProjectedGLU, SplitGLU
from tune import dry_run, ledger, plan_probe, plan_space, plan_time, plan_work, runner, weights
from tune.ledger import Ledger
from tune.schema_arm import LEARNS_ALPHA, UNITS, WITH_ALPHA
from tune.stages import Stages
from tune.study import StudyError, dump, load, parse, trial_spec
from tune.study_run import StudyRun

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
HEAD = """
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 4096, batch_tokens: 64, eval_windows: 4}
nuisance: {lr: {loguniform: [1.0e-3, 1.0e-2]}}
arms:
  gelu: {baseline: true}
"""
SIZE = GPT2Size(vocab_size=300, n_layer=2, d_model=16, n_head=2, n_ctx=16)


def study_of(arm, more="", head=HEAD):
    return parse(head + f"  mine: {arm}\n" + more, Path("x.yaml"))


def acts(arm, config=None):
    """The activations that an arm puts into a model."""
    unit = study_of(arm).arms["mine"].arguments(config or {})
    return [block.mlp.act for block in GPT2(SIZE, unit).transformer.h]


# --- arms ------------------------------------------------------------------------------------------------------------


def test_the_names_of_units_are_those_of_the_table():
    assert set(UNITS) == set(COMPETITORS)
    assert {name for name, row in COMPETITORS.items() if "alpha" in row.formula} - {"xielu"} == set(WITH_ALPHA)
    learned = {name for name, row in COMPETITORS.items() if isinstance(row.settings.get("alpha"), dict)}
    assert learned == set(LEARNS_ALPHA)
    glu = {name for name, row in COMPETITORS.items() if row.settings.get("form") == "glu"}
    assert glu == set(plan_space.GLU_UNITS)


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_an_arm_and_counted_as_its_model_is(unit):
    study = study_of(f"{{unit: {unit}}}")
    assert study.arms["mine"].arguments({}) == {"unit": unit}
    model = GPT2(SIZE, {"unit": unit})
    counted = plan_work.arm_model(study, "mine", 300)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert study.arms["mine"].learns_alpha == (counted.alpha_parameters > 0)
    assert parse(dump(study), Path("x.yaml")) == study


def test_a_units_alpha_may_be_given_or_searched_where_it_has_one():
    assert acts("{unit: leaky_relu, alpha: 0.9}")[0](torch.tensor([-2.0, 3.0])).tolist() == pytest.approx([-0.2, 3.0])
    searched = study_of("{unit: leaky_relu, alpha: {search: {uniform: [0.5, 1.0]}}}")
    assert list(searched.space("mine")) == ["lr", "alpha"]
    assert searched.arms["mine"].arguments({"alpha": 0.75}) == {"unit": "leaky_relu", "alpha": 0.75}


@pytest.mark.parametrize(("form", "kind"), [("pointwise", PaGLU), ("glu", SplitGLU), ("projected", ProjectedGLU)])
def test_the_form_of_an_arm_is_that_of_its_model(form, kind):
    arm = f"{{gate: sigmoid, alpha: 0.5, form: {form}}}"
    assert [type(act) for act in acts(arm)] == [kind, kind]
    d_ff, d_model = 64, 16
    h = round(2 / 3 * d_ff)
    stock, mine = (plan_work.arm_model(study_of(arm), name, 300).parameters for name in ("gelu", "mine"))
    glu = 2 * (d_model * 2 * h + 2 * h + h * d_model - (2 * d_model * d_ff + d_ff))
    assert mine - stock == {"pointwise": 0, "glu": glu, "projected": 2 * 2 * (d_ff**2 + d_ff)}[form]


def test_a_pointwise_arm_has_the_arguments_that_it_had_before_forms():
    assert study_of("{gate: tanh, alpha: 0.5}").arms["mine"].arguments({}) == {
        "gate": "tanh",
        "alpha": 0.5,
        "base": "identity",
    }


def test_a_scheduled_alpha_moves_over_the_training():
    given = study_of("{gate: sigmoid, alpha: {schedule: {cosine: [0.2, 1.0]}}}").arms["mine"].arguments({})
    assert given["alpha"] == {"schedule": {"kind": "cosine", "from": 0.2, "to": 1.0}}
    act = acts("{gate: sigmoid, alpha: {schedule: {linear: [1.5, 0.5]}}}")[1]
    for fraction, value in ((0.0, 1.5), (0.25, 1.25), (1.0, 0.5)):
        act.set_progress(fraction)
        assert act.alpha().item() == pytest.approx(value)


def test_a_token_dependent_alpha_and_the_search_of_its_rate():
    study = study_of("{gate: sigmoid, alpha: {token: {init: 0.25, lr_multiplier: {choice: [1.0, 10.0]}}}}")
    arm = study.arms["mine"]
    assert (arm.learns_alpha, list(study.space("mine"))) == (True, ["lr", "alpha_lr_multiplier"])
    given = arm.arguments({"alpha_lr_multiplier": 10.0})
    assert given["alpha"] == {"token": {"init": 0.25, "lr_multiplier": 10.0}}
    assert parse_alpha(given["alpha"]).kind == "token"
    assert plan_work.arm_model(study, "mine", 300).alpha_parameters == 2 * (64 + 1)


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
        study_of(arm)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- steps and micro batches -----------------------------------------------------------------------------------------


def head_of(fixed):
    return HEAD.replace("fixed: {tokens: 4096, batch_tokens: 64, eval_windows: 4}", f"fixed: {fixed}")


def test_steps_are_tokens_in_other_words():
    steps = study_of("{}", head=head_of("{steps: 100, batch_tokens: 64}"))
    tokens = study_of("{}", head=head_of("{tokens: 6400, batch_tokens: 64}"))
    assert steps == tokens
    assert steps.digest() == tokens.digest()
    assert parse(dump(steps), Path("x.yaml")) == steps
    assert study_of("{}", head=head_of("{steps: 3}")).fixed.tokens == 3 * 2048


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
        study_of("{}", head=head_of(fixed))
    assert message in str(caught.value)


def test_a_micro_batch_reaches_the_trial_and_the_plan():
    whole, parts = (
        study_of("{}", head=head_of(f"{{steps: 4, batch_tokens: 256{more}}}"))
        for more in ("", ", micro_batch_tokens: 32")
    )
    assert trial_spec(parts, "gelu", {"lr": 1e-3}, 1, Path("/corpus"), test=False)["micro_batch_tokens"] == 32
    model = plan_work.arm_model(whole, "gelu", 300)
    memory = [plan_space.memory_parts(study, model, 300, 0.0)["activations"] for study in (whole, parts)]
    assert memory[0] == pytest.approx(8 * memory[1])


def test_a_calibration_keeps_the_micro_batch_or_is_smaller_than_one(packed_300):
    study = study_of("{}", head=head_of("{steps: 4, batch_tokens: 256, micro_batch_tokens: 32}"))
    spec = trial_spec(study, "gelu", {"lr": 1e-3}, 1, packed_300, test=False)
    flops = plan_work.arm_model(study, "gelu", 300).flops_per_token
    for seconds, batch, micro in ((1.0, 256, 32), (90 * flops / plan_probe.ROUGH_FLOPS, 64, 32), (1e-9, 16, None)):
        changed, _ = plan_probe.short(spec, flops, seconds)
        assert (changed["batch_tokens"], changed["micro_batch_tokens"]) == (batch, micro)


@pytest.fixture(scope="module")
def packed_300(tmp_path_factory):
    from tune.plan import stand_in

    return stand_in(tmp_path_factory.mktemp("packed"), 300, 1 << 12)


# --- the dry run -----------------------------------------------------------------------------------------------------


def test_a_dry_run_trains_each_arm_as_the_study_would(tmp_path, packed_300, monkeypatch):
    from pagating.train import Trial, train

    study = study_of("{gate: sigmoid, alpha: 0.5, form: projected}")
    monkeypatch.setattr(dry_run, "corpus_of", lambda study, output, base: (packed_300, None))
    (found,) = dry_run.try_arms(study, tmp_path, tmp_path, 3, ["mine"])
    spec = trial_spec(study, "mine", {"lr": 1e-3}, 1, packed_300, test=False)
    rows = list(train(Trial(**{**spec, "tokens": 192, "eval_every": 1, "eval_windows": 1})))
    assert found.arm == "mine"
    assert [found.first_nll, found.last_nll] == [rows[0]["train_nll"], rows[2]["train_nll"]]
    assert found.parameters == plan_work.arm_model(study, "mine", 300).parameters
    assert found.peak_mb > 50
    assert found.step_seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_an_arm_that_cannot_be_trained_says_why(tmp_path, packed_300, monkeypatch):
    study = study_of("{gate: own.py:mine, alpha: 0.5}")
    monkeypatch.setattr(dry_run, "corpus_of", lambda study, output, base: (packed_300, None))
    (found,) = dry_run.try_arms(study, tmp_path, tmp_path, 1, ["mine"])
    assert "own.py" in found.problem
    assert dry_run.line(found).startswith("mine: ")
    assert "\n" not in found.problem
    with pytest.raises(StudyError, match="--arm other: x has the arms gelu, mine"):
        next(dry_run.try_arms(study, tmp_path, tmp_path, 1, ["other"]))


def test_a_line_of_the_dry_run():
    tried = dry_run.Tried("a", 3.5, 3.25, 0.5, 2048.0, 1234567)
    assert dry_run.line(tried) == (
        "a: 1,234,567 parameters, train_nll 3.5000 -> 3.2500, 2.00 GiB at the peak, 0.5 s a step"
    )
    assert dry_run.line("a note") == "a note"


# --- the studies -----------------------------------------------------------------------------------------------------

PUBLISHED = sorted((ROOT / "configs" / "published").glob("*.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_study_can_be_planned_before_its_text_is_here(path, tmp_path, monkeypatch):
    from tune import plan as plans

    monkeypatch.setenv("PAGATING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plans, "corpus_of", lambda study, output, base: (None, "corpus: not on this machine"))
    options = {"slots": 1, "utilisation": 0.3, "effect": "0.5%", "noise": None, "form": "json"}
    plan = json.loads(plans.run(path, tmp_path, hours_from="a100", **options))
    study = load(path)
    assert set(plan["models"]) == set(study.arms)
    assert plan["total"]["cells"][0] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_study_trains_at_its_real_size_where_it_fits(path, tmp_path):
    import psutil

    study = load(path)
    arm = max(study.arms, key=lambda arm: plan_work.arm_model(study, arm, plan_space.GPT2_VOCABULARY).parameters)
    model = plan_work.arm_model(study, arm, plan_space.GPT2_VOCABULARY)
    planned = sum(plan_space.memory_parts(study, model, plan_space.GPT2_VOCABULARY, 400.0).values())
    if planned > 0.9 * psutil.virtual_memory().available:
        pytest.skip(f"{arm} needs about {plan_space.readable(planned)}")
    found = [tried for tried in dry_run.try_arms(study, path.parent, tmp_path, 3, [arm]) if not isinstance(tried, str)]
    assert [tried.problem for tried in found] == [None]
    assert found[0].parameters == model.parameters
    assert 10.0 < found[0].first_nll < 11.5  # about log(50,257) before training, whatever the text


# --- pretrained weights ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_model(tmp_path_factory):
    """A folder with tokenizer, weights and text, as a user who has downloaded them has it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("published")
    text = "".join(f"In the beginning was the word number {i * i % 97}.\n" for i in range(3000))
    (folder / "text.txt").write_text(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "gpt2").mkdir()
    tokenizer.save(str(folder / "gpt2" / "tokenizer.json"))
    size = GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_embd=16, n_head=2, n_positions=32)
    torch.manual_seed(1)
    GPT2LMHeadModel(size).save_pretrained(folder / "gpt2")
    return folder


def pretrained_study(folder, sizes="n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16"):
    text = HEAD.replace("{n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}", f"{{{sizes}, pretrained: gpt2}}")
    text = text.replace("{vocab_size: 300}", "{path: gpt2}") + "  mine: {gate: sigmoid, alpha: 0.5, form: projected}\n"
    (folder / "pre.yaml").write_text(text + "corpus: {files: {train: text.txt}}\n")
    return load(folder / "pre.yaml")


def test_a_study_finds_its_weights_once_and_its_trials_load_them(published_model, tmp_path):
    study = pretrained_study(published_model)
    corpus = runner.packed_corpus(study, tmp_path, published_model)
    found = weights.check_pretrained(study, published_model, tmp_path / "pre", corpus)
    file = published_model / "gpt2" / "model.safetensors"
    assert found == {"path": str(file.resolve()), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (tmp_path / "pre").mkdir()
    spec = trial_spec(study, "gelu", {"lr": 1e-3}, 1, corpus, test=False)
    assert spec["pretrained"] == "gpt2"
    with pytest.raises(StudyError, match=r"has no pretrained\.json, which names the weights"):
        weights.place_weights(spec, tmp_path / "pre")
    weights.note(found, tmp_path / "pre")
    placed = weights.place_weights(spec, tmp_path / "pre")
    assert placed == {**spec, "pretrained": str(file.resolve())}
    run = StudyRun(study, tmp_path / "pre", corpus)
    assert run.start(run.next_cell())["pretrained"] == str(file.resolve())
    assert next(e for e in run.ledger.events if e["event"] == "study")["pretrained"] == found["sha256"]
    run.ledger.close()


def test_weights_that_have_changed_are_refused(published_model, tmp_path):
    study = pretrained_study(published_model)
    corpus = runner.packed_corpus(study, tmp_path, published_model)
    (tmp_path / "pre").mkdir()
    weights.note({"path": "elsewhere", "sha256": "0" * 64}, tmp_path / "pre")
    with pytest.raises(StudyError, match="is not the file that the study was begun with"):
        weights.check_pretrained(study, published_model, tmp_path / "pre", corpus)


def test_weights_of_another_size_are_one_line_before_anything_runs(published_model, tmp_path):
    study = pretrained_study(published_model, "n_layer: 3, d_model: 16, n_head: 2, n_ctx: 16")
    corpus = runner.packed_corpus(study, tmp_path, published_model)
    with pytest.raises(StudyError, match=r"has no 'transformer\.h\.2\.ln_1\.weight', which a GPT-2 of n_layer=3"):
        weights.check_pretrained(study, published_model, tmp_path / "pre", corpus)
    assert weights.check_pretrained(study_of("{}"), tmp_path, tmp_path / "x", corpus) is None


def test_weights_need_the_tokenizer_that_they_were_trained_with():
    with pytest.raises(StudyError, match=r"model\.pretrained=gpt2 needs the tokenizer that its weights were trained"):
        study_of("{}", head=HEAD.replace("n_ctx: 16}", "n_ctx: 16, pretrained: gpt2}"))


def test_a_dry_run_starts_from_the_weights_that_are_here(published_model, tmp_path):
    study = pretrained_study(published_model)
    corpus = runner.packed_corpus(study, tmp_path, published_model)
    file = published_model / "gpt2" / "model.safetensors"
    assert dry_run.local_weights(study, published_model, corpus) == (str(file.resolve()), None)
    none, line = dry_run.local_weights(study, tmp_path, corpus)
    assert none is None
    assert "download model.safetensors" in line


# --- stages that are left out, and the grid --------------------------------------------------------------------------

GRID = """
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 640, batch_tokens: 64, eval_windows: 4}
nuisance: {lr: {choice: [1.0e-3, 1.0e-2]}, warmup: {choice: [0.0, 0.1, 0.2]}}
search: {sampler: grid, trials_per_arm: 6, pruner: none}
stages: [search]
arms:
  gelu: {baseline: true}
"""
MINE = "  mine: {gate: sigmoid, alpha: 0.5}\n"


def play(study, folder=None, until=None):
    """A study's cells in order, `lr + warmup` their loss; with `folder` the ledger and tables are written there."""
    book = Ledger(folder / "ledger.jsonl") if folder else None
    events = []
    stages = Stages(study, lambda event, **fields: events.append((event, fields)), {})
    cells = []
    while (cell := stages.next_cell()) is not None and len(cells) != until:
        loss = 3 + cell.config["lr"] + cell.config.get("warmup", 0.0)
        if book:
            shown = {name: getattr(cell, name) for name in ("stage", "arm", "index", "seed", "config", "config_key")}
            book.append("suggested", cell=cell.key, **shown)
            book.append("started", cell=cell.key)
            for step in (5, 10):
                row = {"step": step, "tokens": 64 * step, "val_nll": loss + 1 / step, "train_nll": loss, "lr": 1e-3}
                row |= {"grad_norm": 1.0, "tokens_per_second": 1.0, "alpha": []}
                book.append("report", cell=cell.key, row=row)
            final = {"val_nll": loss + 0.1, "test_nll": loss, "train_nll": loss, "tokens": 640, "steps": 10}
            book.append("ended", cell=cell.key, outcome="completed", final=final, reason=None)
        stages.complete(cell, "completed", loss, 10)
        cells.append(cell)
    if book:
        book.close()
        ledger.write_tables(study.name, ledger.read(folder / "ledger.jsonl"), folder)
        (folder / "study.yaml").write_text(dump(study))
    return cells, stages, events


def test_a_grid_is_every_combination_once_for_every_arm():
    study = parse(GRID + MINE, Path("x.yaml"))
    cells, stages, events = play(study)
    points = [(lr, warmup) for lr in (1e-3, 1e-2) for warmup in (0.0, 0.1, 0.2)]
    for arm in ("gelu", "mine"):
        mine = [cell for cell in cells if cell.arm == arm]
        assert [(cell.config["lr"], cell.config["warmup"]) for cell in mine] == points
        assert {(cell.stage, cell.seed) for cell in mine} == {("search", 1)}
    assert stages.finished
    assert stages.remaining() == 0
    assert [(name, fields["arm"], fields["config"]) for name, fields in events] == [
        ("chosen", arm, {"lr": 1e-3, "warmup": 0.0}) for arm in ("gelu", "mine")
    ]
    assert [[study.tests(stage) for stage in ("search", "calibrate", "confirm")]] == [[True, False, False]]


def test_a_grid_that_was_interrupted_goes_on_with_what_is_left():
    study = parse(GRID, Path("x.yaml"))
    first, _, _ = play(study, until=4)
    recorded = {(cell.arm, cell.index): cell.config for cell in first}
    stages = Stages(study, lambda event, **fields: None, recorded)
    again = []
    while (cell := stages.next_cell()) is not None:
        stages.complete(cell, "completed", 3.0, 10)
        again.append(cell)
    assert again == play(study)[0]


def test_a_study_may_confirm_the_best_of_its_search_without_a_grid_of_rates():
    study = parse(GRID.replace("[search]", "[search, confirm]") + MINE + "confirm: {seeds: 3}", Path("x.yaml"))
    cells, stages, _ = play(study)
    assert [(cell.stage, cell.arm, cell.seed) for cell in cells[12:]] == [
        ("confirm", arm, seed) for seed in (101, 102, 103) for arm in ("gelu", "mine")
    ]
    assert {(cell.config["lr"], cell.config["warmup"]) for cell in cells[12:]} == {(1e-3, 0.0)}
    assert stages.finished
    assert stages.remaining() == 0


@pytest.mark.parametrize("stages", ["[search]", "[search, calibrate]", "[search, confirm]"])
def test_the_plan_counts_the_stages_that_there_are(stages):
    study = parse(GRID.replace("[search]", stages) + MINE + "confirm: {seeds: 3}", Path("x.yaml"))
    cells, _, _ = play(study)
    models = {arm: plan_work.arm_model(study, arm, 300) for arm in study.arms}
    rows = plan_work.work(study, models, plan_work.confirm_seeds(study))
    counted = {(row.stage, row.arm): row.cells for row in rows}
    played = Counter((cell.stage, cell.arm) for cell in cells)
    for key, (least, _, most) in counted.items():
        assert least <= played[key] <= most
        assert (most == 0) == (not study.runs(key[0]))
    assert len(cells) <= plan_space.most_cells(study)
    speeds = {arm: plan_probe.Speed(1000.0, 0.1, 0.1) for arm in study.arms}
    seconds = plan_time.stage_seconds(study, speeds, 2, plan_work.confirm_seeds(study), 0.0, 0.0)
    assert {stage: span[2] > 0 for stage, span in seconds.items()} == {s: study.runs(s) for s in seconds}


@pytest.mark.parametrize("arms", ["", MINE], ids=["one arm", "two arms"])
def test_a_study_that_only_searches_is_reported_and_decides_nothing(arms, tmp_path):
    study = parse(GRID + arms, tmp_path / "grid.yaml")
    play(study, tmp_path)
    page = report.build(tmp_path).read_text()
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    said = [row["verdict"] for row in verdict["comparisons"]]
    assert said == ["not testable (no confirm stage: one seed a configuration)"] * (len(study.arms) - 1)
    assert [row["p_adjusted"] for row in verdict["comparisons"]] == [None] * len(said)
    assert "nothing is tested or decided" in page
    assert "Confirmation:" not in page
    assert "Calibration:" not in page


BAD_GRIDS = {
    "a range": (
        GRID.replace("warmup: {choice: [0.0, 0.1, 0.2]}", "warmup: {uniform: [0.0, 0.2]}"),
        "search.sampler: grid takes choices only; arm 'gelu' searches a range of warmup",
    ),
    "a number of trials": (
        GRID.replace("trials_per_arm: 6", "trials_per_arm: 5"),
        "search.trials_per_arm=5 is not the 6 combinations that arm 'gelu' has",
    ),
    "an order": (GRID.replace("[search]", "[confirm, search]"), "must be search, then calibrate or confirm or both"),
    "no search": (GRID.replace("[search]", "[confirm]"), "stages ['confirm'] must be search"),
    "a stage twice": (GRID.replace("[search]", "[search, search]"), "must be search, then"),
    "one arm to confirm": (GRID.replace("[search]", "[search, confirm]"), "at least one arm to compare with it"),
}


@pytest.mark.parametrize(("text", "message"), BAD_GRIDS.values(), ids=BAD_GRIDS.keys())
def test_a_bad_grid_is_one_line(text, message):
    with pytest.raises(StudyError) as caught:
        parse(text, Path("x.yaml"))
    assert message in str(caught.value)
