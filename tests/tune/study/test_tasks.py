"""Studies on padded lines and of BERT and T5: their keys, their plan, and a small study of each with Ray."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.io.study import load
from analysis.report import build
from analysis.verdict.decide import verdict
from tune import sweep
from tune.errors import StudyError
from tune.plan import child, dry_run, plan, space, time, work
from tune.study import sizes
from tune.study.files import dump, parse
from tune.study.trial_spec import trial_spec

torch.set_num_threads(1)
HEAD = """
question: Is it better?
corpus: {files: {train: train.txt}}
tokenizer: {vocab_size: 280}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 2048, batch_tokens: 256, eval_windows: 8}
nuisance: {lr: {loguniform: [1.0e-3, 1.0e-2]}}
search: {trials_per_arm: 2}
calibrate: {points: 3, seeds: 1, max_points: 3}
confirm: {seeds: 2}
arms:
  stock: {baseline: true}
  linear-floor: {gate: sigmoid, alpha: 0.0, floor: true}
  learned: {gate: sigmoid, alpha: {learnable: {init: 0.5, per: layer}}}
"""
LINES = HEAD.replace("{files: {train: train.txt}}", "{files: {train: train.txt}, rows: lines}")
HERE = Path("small.yaml")


def of(head=HEAD, more="", **replaced):
    for old, new in replaced.items():
        head = head.replace(f"{old}: {{", f"{old}: {{{new}, ")
    return parse(head + more, HERE)


def small_text(folder):
    (folder / "train.txt").write_text(
        "".join(f"{i * 7919 % 1000} the quick brown fox jumps over it\n\n" for i in range(900))
    )


# --- keys ------------------------------------------------------------------------------------------------------------


def test_lines_are_padded_and_the_padding_counted_unless_the_study_says_otherwise(tmp_path):
    spec = trial_spec(of(LINES), "stock", {"lr": 1e-3}, 1, tmp_path, test=False)
    assert spec.padding == "counted"
    masked = of(LINES, fixed="padding: masked")
    assert trial_spec(masked, "stock", {"lr": 1e-3}, 1, tmp_path, test=False).padding == "masked"
    assert trial_spec(of(), "stock", {"lr": 1e-3}, 1, tmp_path, test=False).padding is None
    assert parse(dump(masked), HERE) == masked
    with pytest.raises(StudyError, match=r"fixed\.padding=counted needs corpus\.rows: lines"):
        of(fixed="padding: counted")
    with pytest.raises(StudyError, match=r"corpus\.rows"):
        of(LINES.replace("rows: lines", "rows: words"))


def test_a_task_goes_to_its_trials_and_keys_of_gpt2_alone_are_refused(tmp_path):
    assert trial_spec(of(), "stock", {"lr": 1e-3}, 1, tmp_path, test=False).task == "causal"
    span = of(more="task: span\n")
    assert trial_spec(span, "stock", {"lr": 1e-3}, 1, tmp_path, test=False).task == "span"
    assert (of().mlps, of(more="task: masked\n").mlps, span.mlps) == (2, 2, 4)
    refused = {
        r"model\.activation=gelu_new is not for task: masked": of_model("activation: gelu_new", "masked"),
        r"model\.initializer_range=0\.06 is not for task: span": of_model("initializer_range: 0.06", "span"),
        r"corpus\.rows=lines is not for task: span": LINES + "task: span\n",
        r"arms\.mine\.base is gelu; with task: span the stock activation is ReLU": HEAD
        + "  mine: {gate: sigmoid, alpha: 0.5, base: gelu}\ntask: span\n",
        r"arms\.mine\.alpha lists 2 values; model\.n_layer=2 per side needs 4": HEAD
        + "  mine: {gate: sigmoid, alpha: [0.1, 0.2]}\ntask: span\n",
        r"arms\.mine has form glu, which does not fit BERT's MLP of two modules": HEAD
        + "  mine: {gate: sigmoid, alpha: 0.5, form: glu}\ntask: masked\n",
        r"arms\.mine has unit swiglu, which does not fit BERT's MLP": HEAD + "  mine: {unit: swiglu}\ntask: masked\n",
        r"task": HEAD + "task: denoise\n",
    }
    for message, text in refused.items():
        with pytest.raises(StudyError, match=message):
            parse(text, HERE)
    parse(of_model("initializer_range: 0.06", "masked"), HERE)


def of_model(more, task):
    return HEAD.replace("n_ctx: 16}", f"n_ctx: 16, {more}}}") + f"task: {task}\n"


# --- plan and dry run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["masked", "span"])
def test_a_model_that_is_planned_is_the_one_that_is_trained(task, tmp_path):
    from pagating.train import build_model, train

    study = of(more=f"task: {task}\n")
    folder = plan.stand_in(tmp_path, 280, 4096)
    for arm in study.arms:
        planned = work.arm_model(study, arm, 280)
        trial = replace(plan.arm_example(study, arm, tmp_path, folder), tokens=256)
        final = list(train(trial))[-1]["final"]
        assert (planned.parameters, planned.flops_per_token) == (final["parameters"], final["flops_per_token"])
        learned = sum(p.numel() for name, p in build_model(trial).named_parameters() if "alpha" in name)
        assert planned.alpha_parameters == learned == (study.mlps if arm == "learned" else 0)
    parts = space.memory_parts(study, planned, 280, 0.0)
    assert parts["state"] == 16 * planned.parameters


def test_a_plan_counts_the_padded_rows_of_every_evaluation():
    packed, padded = of(), of(LINES)
    assert sizes.validation_tokens(packed) == 8 * 16
    assert sizes.validation_tokens(padded) == 2 * 8 * 16
    models = {arm: work.arm_model(packed, arm, 280) for arm in packed.arms}
    speeds = [time.device_speeds("h100", study, models, 0.3)["stock"] for study in (packed, padded)]
    assert speeds[1].evaluation_seconds == 2 * speeds[0].evaluation_seconds
    flops = [work.work(study, models, (2.0, 2.0, 2.0)) for study in (packed, padded)]
    by_stage = [{row.stage: row.flops[1] for row in rows if row.arm == "stock"} for rows in flops]
    looks, rate = sizes.evaluations(packed), models["stock"].flops_per_token / 3
    assert by_stage[1]["calibrate"] - by_stage[0]["calibrate"] == pytest.approx(3 * looks * 8 * 16 * rate)
    assert by_stage[1]["confirm"] - by_stage[0]["confirm"] == pytest.approx(2 * (looks - 1) * 8 * 16 * rate)


@pytest.mark.parametrize("text", [LINES, HEAD + "task: masked\n", HEAD + "task: span\n"])
def test_the_calibration_of_a_plan_and_a_dry_run_take_them(text, tmp_path):
    study = parse(text, HERE)
    folder = plan.stand_in(tmp_path, 280, 4096, study.corpus.rows == "lines")
    spec = plan.arm_example(study, "learned", tmp_path, folder)
    found = child.first_steps(spec, work.arm_model(study, "learned", 280).flops_per_token, 0.05)
    assert found["tokens_per_second"] > 0
    assert dry_run.shortened(study, "stock", tmp_path, folder, 3).tokens == 3 * 256


# --- small studies ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("task", "layers"), [("masked", 2), ("span", 4)])
def test_a_small_study_of_another_model_ends_with_a_verdict_and_a_report(task, layers, tmp_path):
    small_text(tmp_path)
    study = of(more=f"task: {task}\n")
    run = sweep.sweep(study, tmp_path, tmp_path / "studies", slots=2, tracking_uri=None)
    assert run.stages.finished
    folder = tmp_path / "studies" / "small"
    trials = pd.read_parquet(folder / "trials.parquet")
    assert set(trials["outcome"]) <= {"completed", "stopped_early"}
    confirm = trials.query("stage == 'confirm'")
    assert (len(confirm), confirm["test_nll"].notna().all(), confirm["val_bpb"].isna().all()) == (6, True, True)
    learned = confirm.query("arm == 'learned'")
    assert [f"alpha_layer_{i}" for i in range(layers)] == [c for c in learned if c.startswith("alpha_layer_")]
    assert learned["alpha"].between(0, 1).all()
    table = load(folder)
    assert verdict(table)["metric"] == "test_nll"
    assert "linear-floor" in build.build(folder).read_text()


@pytest.mark.slow
def test_a_small_study_on_lines_reports_the_padded_loss_at_every_evaluation(tmp_path):
    small_text(tmp_path)
    run = sweep.sweep(of(LINES), tmp_path, tmp_path / "studies", slots=2, tracking_uri=None)
    assert run.stages.finished
    curves = pd.read_parquet(tmp_path / "studies" / "small" / "curves.parquet")
    trials = pd.read_parquet(tmp_path / "studies" / "small" / "trials.parquet")
    assert curves["padded_nll"].notna().all()
    assert trials.query("outcome == 'completed'")["padded_nll"].map(math.isfinite).all()
    assert (curves["padded_nll"] != curves["val_nll"]).all()
