import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.power import TTestPower

from tune import ledger as ledgers
from tune import plan as plans
from tune import plan_page, plan_power, plan_probe, plan_space, plan_time, plan_work
from tune.ledger import Ledger
from tune.plan_probe import Calibration, Speed
from tune.search import ArmSearch
from tune.stages import Stages
from tune.study import StudyError, load, parse

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMOKE = load(ROOT / "configs" / "smoke.yaml")
SMALL = """
question: Is it better?
tokenizer: {vocab_size: 300}
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 6400, batch_tokens: 64, eval_windows: 8}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
  mine: {gate: tanh, alpha: 0.5}
"""


def study_of(more=""):
    return parse(SMALL + more, Path("small.yaml"))


def seeds_of(study):
    return plan_work.confirm_seeds(study)


def models_of(study):
    return {arm: plan_work.arm_model(study, arm, 300) for arm in study.arms}


def rows_of(study, seeds=None):
    return plan_work.work(study, models_of(study), seeds or seeds_of(study))


def played(study, loss, folder=None):
    """Cells of a whole study whose trials give `loss(cell, share of the budget)`, and their tokens: no training.

    With `folder` the ledger is written there, as a study writes it.
    """
    ledger = Ledger(folder / "ledger.jsonl") if folder else None
    stages = Stages(study, ledger.append if ledger else lambda event, **fields: None, {})
    cells, tokens = [], Counter()
    batch, whole, every = study.fixed.batch_tokens, plan_work.steps(study), plan_work.interval(study)
    while (cell := stages.next_cell()) is not None:
        done, outcome = 0, "completed"
        if ledger:
            shown = {name: getattr(cell, name) for name in ("stage", "arm", "index", "seed", "config", "config_key")}
            ledger.append("suggested", cell=cell.key, **shown)
            ledger.append("started", cell=cell.key)
        while done < whole and outcome == "completed":
            done = min(whole, done + every)
            value = loss(cell, done / whole)
            if ledger:
                noise = np.random.default_rng(done).uniform(0.1, 1.0, 5).tolist()
                row = dict(zip(("train_nll", "lr", "grad_norm", "tokens_per_second", "val_nll"), noise, strict=True))
                learned = getattr(study.arms[cell.arm].alpha, "learnable", None)
                alpha = [0.1234567890123456] * study.model.n_layer if learned else []
                ledger.append(
                    "report", cell=cell.key, row={"step": done, "tokens": done * batch, **row, "alpha": alpha}
                )
            if done < whole and stages.should_stop(cell, done / whole, value):
                outcome = "stopped_early"
        final = dict.fromkeys((*ledgers.FINAL, *ledgers.COST, "alpha", "compiled", "test_nll"), 1.2345678901234567)
        if ledger:
            final |= {"tokens": done * batch, "steps": done, "val_nll": value, "test_nll": value}
            ledger.append("ended", cell=cell.key, outcome=outcome, final=final, reason=None)
        stages.complete(cell, outcome, value, done)
        cells.append(cell)
        tokens[cell.stage, cell.arm] += done * batch
    assert stages.finished
    if ledger:
        ledger.close()
    return Counter((cell.stage, cell.arm) for cell in cells), tokens


def inside(cell, share):
    """Each later trial is better, and the grid's middle is best: nothing is stopped, nothing extended."""
    if cell.stage == "search":
        return 3.0 - 0.001 * cell.index - share
    return 3.0 + 0.1 * abs(cell.index - 1)


def at_the_edge(cell, share):
    """Each later trial is worse, and the largest rate is always best."""
    if cell.stage == "search":
        return 3.0 + 0.001 * cell.index - share
    return 3.0 - 0.01 * math.log(cell.config["lr"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_cells_and_tokens_are_those_of_a_study_played_through_the_real_stages(path):
    study = load(path)
    if study.confirm.rule != "fixed" or study.calibrate.points != 3:
        pytest.skip("its end is not known from its file")
    rows = {(row.stage, row.arm): row for row in rows_of(study)}
    cells, tokens = played(study, inside)
    assert {key: row.cells[0] for key, row in rows.items()} == cells
    unstopped = {key: row.tokens[2 if key[0] == "search" else 0] for key, row in rows.items()}
    assert unstopped == tokens
    cells, tokens = played(study, at_the_edge)
    assert {key: row.cells[2] for key, row in rows.items()} == cells
    stopped = {key: row.tokens[0 if key[0] == "search" else 2] for key, row in rows.items()}
    assert stopped == tokens
    assert plan_space.most_cells(study) == sum(cells.values())


@pytest.mark.slow
def test_cells_of_a_sequential_rule_lie_between_its_first_look_and_its_cap():
    study = study_of("confirm: {rule: obrien-fleming}\n")

    def losses(away):
        def loss(cell, share):
            if cell.stage != "confirm":
                return inside(cell, share)
            return 3.0 + away[cell.arm] + 0.01 * np.random.default_rng([cell.seed, *cell.arm.encode()]).normal()

        return loss

    clear, equal = losses({"gelu": 0.0, "floor": 0.5, "mine": -0.5}), losses({"gelu": 0.0, "floor": 0.0, "mine": 0.0})
    rows = {(row.stage, row.arm): row for row in rows_of(study)}
    assert rows["confirm", "mine"].cells == (3, 10, 10)
    assert played(study, clear)[0]["confirm", "mine"] in (3, 5)
    assert played(study, equal)[0]["confirm", "mine"] == 10


def test_the_chance_of_being_stopped_is_that_of_the_rung_rule_on_equal_trials():
    study = study_of("search: {trials_per_arm: 7, keep: 0.4, parallel: 2}\n")
    draw, stops, rounds = np.random.default_rng(3), np.zeros(7), 3000
    for _ in range(rounds):
        search = ArmSearch("gelu", {}, study.search)
        stops += [search.should_stop(index, 0.5, loss) for index, loss in enumerate(draw.uniform(size=7))]
    chances = np.array([plan_work.stop_chance(study, index) for index in range(7)])
    assert np.all(chances[:3] == 0)
    assert np.all(stops[:3] == 0)
    assert np.all(np.abs(stops / rounds - chances) < 4 * np.sqrt(0.25 / rounds))
    assert plan_work.stopped(study)[1] == pytest.approx(chances.sum())
    by_hand = [plan_work.stop_chance(study_of(), index) for index in range(6)]  # keep 0.5, one at a time
    assert by_hand == pytest.approx([0, 0, 1 / 3, 2 / 4, 2 / 5, 3 / 6])


def test_no_trial_is_stopped_without_a_pruner_or_a_look_before_the_end():
    for more in ("search: {pruner: none}\n", "search: {spare: 0.95}\n"):
        assert plan_work.stopped(study_of(more)) == (0, 0, 0)
        assert rows_of(study_of(more))[0].tokens[0] == 6 * 6400


@pytest.mark.parametrize(("spare", "step"), [(0.5, 50), (0.41, 50), (0.4, 40), (0.3, 30), (0.91, 100)])
def test_the_rung_is_the_first_evaluation_at_or_after_its_share(spare, step):
    assert plan_work.rung(study_of(f"search: {{spare: {spare}}}\n")) == step


def test_flops_are_those_computed_by_hand():
    study = study_of()
    layers, width, vocab, n_ctx = 2, 16, 300, 16
    rate = 6 * (12 * layers * width**2 + vocab * width + 2 * n_ctx * width * layers)
    parameters = vocab * width + n_ctx * width + layers * (12 * width**2 + 13 * width) + 2 * width
    models = models_of(study)
    assert {(m.flops_per_token, m.parameters) for m in models.values()} == {(rate, parameters)}
    confirm = next(row for row in rows_of(study) if (row.stage, row.arm) == ("confirm", "gelu"))
    evaluated = 10 * 8 * n_ctx + 2 * 8 * n_ctx  # ten evaluations, the test split and the padded lines
    assert confirm.flops == pytest.approx([10 * (rate * 6400 + rate / 3 * evaluated)] * 3)
    short = plan_work.work(study, models, seeds_of(study), {"validation": 4, "test": 3})
    confirm = next(row for row in short if (row.stage, row.arm) == ("confirm", "gelu"))
    assert confirm.flops[1] == pytest.approx(10 * (rate * 6400 + rate / 3 * (10 * 4 + 3 + 8) * n_ctx))


def test_parameters_of_learned_alphas_are_counted():
    study = load(ROOT / "configs" / "sweep.yaml")
    found = {arm: plan_work.arm_model(study, arm, 512) for arm in study.arms}
    assert {arm: model.alpha_parameters for arm, model in found.items()} == {
        **dict.fromkeys(("gelu", "linear-floor", "paglu-searched"), 0),
        "paglu-learnable": 1,
        "paglu-per-layer": 2,
    }
    assert found["paglu-per-layer"].parameters == found["gelu"].parameters + 2


def test_an_own_gate_is_counted_without_its_file():
    study = parse(SMALL.replace("gate: tanh", "gate: 'missing/own.py:hard'"), Path("small.yaml"))
    assert models_of(study)["mine"] == models_of(study_of())["mine"]


def test_the_grid_is_hardly_extended_where_many_trials_found_the_optimum():
    assert sum(plan_work.grid_chances(SMOKE).values()) == pytest.approx(1)
    few, many = study_of("search: {trials_per_arm: 2}\n"), study_of("search: {trials_per_arm: 200}\n")
    assert 3.0 <= plan_work.grid_points(many)[1] < 3.1 < plan_work.grid_points(few)[1] < 9
    capped = study_of("search: {trials_per_arm: 1}\ncalibrate: {max_points: 4}\n")
    assert set(plan_work.grid_chances(capped)) == {3, 4}


# --- time ------------------------------------------------------------------------------------------------------------


def test_seconds_of_a_cell_by_hand():
    study, speed = study_of(), Speed(tokens_per_second=640.0, evaluation_seconds=0.5, build_seconds=2.0)
    assert plan_time.cell_seconds(study, speed, "search") == pytest.approx(2 + 10 + 10 * 0.5)
    assert plan_time.cell_seconds(study, speed, "search", 50) == pytest.approx(2 + 5 + 5 * 0.5)
    assert plan_time.cell_seconds(study, speed, "confirm", rows=0.25) == pytest.approx(2 + 10 + 12 * 0.5 + 0.25)


def test_cells_on_slots_by_hand():
    assert plan_time.pool_seconds([3, 3, 3], 1) == 9
    assert plan_time.pool_seconds([4, 1, 1, 1, 2], 2) == 5
    assert plan_time.pool_seconds([4, 1], 8) == 4
    assert plan_time.pool_seconds([], 2) == 0
    # two arms on four slots: an arm's trials follow one another unless `parallel` allows more
    assert plan_time.search_seconds([[2, 2, 2], [1, 1, 1]], 1, 4) == 6
    assert plan_time.search_seconds([[2, 2, 2], [1, 1, 1]], 2, 4) == 4
    assert plan_time.search_seconds([[2, 2, 2], [1, 1, 1]], 1, 1) == 9


def test_hours_of_a_study_by_hand():
    study = study_of("search: {trials_per_arm: 2}\ncalibrate: {seeds: 1, max_points: 3}\nconfirm: {seeds: 2}\n")
    speeds = dict.fromkeys(study.arms, Speed(640.0, 0.0, 0.0))  # ten seconds a trial, and one between two
    stages = plan_time.stage_seconds(study, speeds, 3, seeds_of(study), 1.0, 0.0)
    assert stages == {"search": (22, 22, 22), "calibrate": (33, 33, 33), "confirm": (22, 22, 22)}
    overheads = plan_time.Overheads(start=5.0, slot=6.0, cell=1.0, end=7.0)
    assert plan_time.wall_seconds(stages, overheads, 0.1) == pytest.approx((18 + 77 / 1.1, 95, 18 + 77 * 1.1))
    slower = plan_time.stage_seconds(study, {**speeds, "mine": Speed(320.0, 0.0, 0.0)}, 3, seeds_of(study), 1.0, 0.0)
    assert slower["search"][1] == 42


def test_an_extended_grid_and_a_stopped_trial_change_the_range():
    study = study_of("search: {trials_per_arm: 3}\ncalibrate: {seeds: 1, max_points: 5}\nconfirm: {seeds: 2}\n")
    speeds = dict.fromkeys(study.arms, Speed(640.0, 0.0, 0.0))
    stages = plan_time.stage_seconds(study, speeds, 3, seeds_of(study), 0.0, 0.0)
    assert stages["search"] == pytest.approx((25, 30 - 5 / 3, 30))
    assert (stages["calibrate"][0], stages["calibrate"][2]) == (30, 50)
    assert 30 < stages["calibrate"][1] < 50
    looks = study_of("confirm: {rule: e-process, max_seeds: 5}\n")
    stages = plan_time.stage_seconds(looks, speeds, 3, (3.0, 3.5, 5.0), 0.0, 0.0)
    assert stages["confirm"] == pytest.approx((30, 35, 50))


def test_overheads_scale_with_the_machine():
    found = {"loop_seconds": 0.2, "start_seconds": 4.0, "slot_seconds": 9.0, "cell_seconds": 0.5, "end_seconds": 6.0}
    assert plan_time.scaled_overheads(found, None) == plan_time.Overheads(4.0, 9.0, 0.5, 6.0)
    here = Calibration({}, 3.0, 2.0, 400.0, 500.0, 0.1, loop_seconds=0.1, spread=0.0, processes=2)
    assert plan_time.scaled_overheads(found, here) == plan_time.Overheads(2.0, 5.0, 0.25, 3.0)


def test_a_devices_speed_is_peak_times_utilisation_over_flops():
    study = study_of()
    models = models_of(study)
    speed = plan_time.device_speeds("a100", study, models, 0.5)["gelu"]
    assert speed.tokens_per_second == pytest.approx(19.5e12 / 2 / models["gelu"].flops_per_token)
    assert speed.evaluation_seconds == pytest.approx(8 * 16 / speed.tokens_per_second / 3)
    half = study_of("").model_copy(update={"fixed": study.fixed.model_copy(update={"precision": "bfloat16"})})
    assert plan_time.device_speeds("h100", half, models, 1.0)["gelu"].tokens_per_second == pytest.approx(
        989e12 / models["gelu"].flops_per_token
    )
    with pytest.raises(StudyError, match=r"--hours-from gt200: allowed: measure, t4, "):
        plan_time.device_speeds("gt200", study, models, 0.5)
    with pytest.raises(StudyError, match=r"--utilisation 1.5: it must lie in \(0, 1\]"):
        plan_time.device_speeds("a100", study, models, 1.5)


def test_processes_are_combined_as_slots_that_share_the_cells():
    def one(fast, slow=None):
        arms = {"a": {"tokens_per_second": fast, "evaluation_seconds": 1.0, "build_seconds": 2.0}}
        arms |= {"b": {"tokens_per_second": slow, "evaluation_seconds": 3.0, "build_seconds": 0.0}} if slow else {}
        rest = {"import_seconds": fast, "first_seconds": 1.0, "base_mb": 400.0, "peak_mb": 500.0, "rows_seconds": 0.0}
        return {"arms": arms, **rest}

    found = plan_probe.combine([one(100.0, 50.0), one(300.0, 50.0)], ["a", "b"], {"a": 1, "b": 1}, 0.2)
    assert found.speeds == {"a": Speed(150.0, 1.0, 2.0), "b": Speed(50.0, 3.0, 0.0)}  # harmonic mean
    assert (found.spread, found.import_seconds, found.processes) == (1.0, 200.0, 2)
    scaled = plan_probe.combine(
        [one(100.0)], ["a", "b"], {"a": 1, "b": 4}, 0.2
    )  # b was not reached: four times the work
    assert scaled.speeds["b"] == Speed(25.0, 4.0, 2.0)


# --- disk and memory -------------------------------------------------------------------------------------------------


def test_ledger_and_tables_are_as_large_as_planned(tmp_path):
    cells, _ = played(SMOKE, inside, tmp_path)
    events = ledgers.read(tmp_path / "ledger.jsonl")
    ledgers.write_tables("smoke", events, tmp_path)
    model = plan_work.arm_model(SMOKE, "gelu", 300)
    planned = plan_space.disk_parts(SMOKE, sum(cells.values()), 2, model)
    assert (tmp_path / "ledger.jsonl").stat().st_size == pytest.approx(planned["ledger"], rel=0.1)
    tables = sum((tmp_path / f"{name}.parquet").stat().st_size for name in ("trials", "curves"))
    assert tables / 1.5 < planned["tables"] < 2 * tables
    assert planned["checkpoints"] == 3 * 2 * 12 * model.parameters


def test_what_is_needed_grows_with_cells_slots_and_vocabulary():
    needed = plan_space.disk_needed(SMOKE)
    assert needed == plan_space.disk_needed(SMOKE, 1, vocab_size=300, cells=plan_space.most_cells(SMOKE))
    width = SMOKE.model.d_model
    assert (
        plan_space.disk_needed(SMOKE, vocab_size=1300) - needed
        == (3 * 12 + (2 * len(SMOKE.arms) + 1) * 4) * 1000 * width
    )
    assert plan_space.disk_needed(SMOKE, cells=5) < needed < plan_space.disk_needed(SMOKE, slots=2)


def test_the_models_that_may_stand_are_planned():
    model = plan_space.largest(SMOKE, 300)
    arms, one = len(SMOKE.arms), 4 * model.parameters
    planned = {cells: plan_space.disk_parts(SMOKE, cells, 2, model)["models"] for cells in (0, 1, 50)}
    assert planned == {0: 0, 1: (1 + arms + 2) * one, 50: (arms + arms + 2) * one}  # folder, MLflow, one a slot
    none = SMOKE.model_copy(update={"keep": SMOKE.keep.model_copy(update={"models": "none"})})
    assert plan_space.disk_parts(none, 50, 2, model)["models"] == 0


def test_too_little_space_is_one_line(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=3 << 20)

    monkeypatch.setattr(plan_space.shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "there"
    plan_space.check_space(folder, 3 << 20)
    with pytest.raises(StudyError, match=r"may need 3\.5 MiB and 3\.0 MiB are free there; free some space or give"):
        plan_space.check_space(folder, 7 << 19)
    assert asked == [tmp_path.resolve()] * 2
    assert not folder.exists()


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB")]
)
def test_bytes_are_readable(size, text):
    assert plan_space.readable(size) == text


def trained_mb(tmp_path, study, name):
    """Peak memory of `python -m pagating.train` on one of a study's cells, MiB."""
    folder = tmp_path / name
    folder.mkdir()
    corpus = plans.stand_in(folder, study.tokenizer.vocab_size, 1 << 14)
    spec = plans.trial_spec(study, "mine", plan_work.example(study, "mine"), 1, corpus, test=False)
    (folder / "trial.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "pagating.train", str(folder / "trial.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)["peak_rss_mb"]


@pytest.mark.slow
def test_memory_of_a_trial_is_within_a_factor_of_what_is_planned(tmp_path):
    tiny = study_of()
    text = SMALL.replace(
        "n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16", "n_layer: 6, d_model: 256, n_head: 4, n_ctx: 64"
    )
    text = text.replace("tokens: 6400, batch_tokens: 64", "tokens: 8192, batch_tokens: 4096").replace("300", "4096")
    large = parse(text, Path("large.yaml"))
    base = trained_mb(tmp_path, tiny, "tiny")
    parts = plan_space.memory_parts(large, plan_work.arm_model(large, "mine", 4096), 4096, base)
    held = trained_mb(tmp_path, large, "large") - base  # what the model and its step take
    planned = (sum(parts.values()) - parts["base"]) / (1 << 20)
    assert planned > 250
    assert held / 1.4 < planned < 1.4 * held


# --- power -----------------------------------------------------------------------------------------------------------


def test_power_of_the_fixed_rule_is_that_of_the_paired_t_test():
    study = study_of("confirm: {seeds: 10}\n")
    found = plan_power.confirm_power(study, 0.005, 0.004)
    assert found["level"] == 0.025  # two comparisons: Holm's first step
    reference = TTestPower()
    assert found["power"] == pytest.approx(reference.power(1.25, 10, 0.025), abs=1e-6)
    assert reference.power(found["smallest"] / 0.004, 10, 0.025) == pytest.approx(0.8, abs=1e-6)
    assert reference.power(1.25, found["needed"], 0.025) >= 0.8 > reference.power(1.25, found["needed"] - 1, 0.025)
    alone = plan_power.confirm_power(study_of("confirm: {correction: none}\n"), 0.005, 0.004)
    assert (alone["level"], alone["level_is"]) == (0.05, "no correction")


def test_power_of_a_sequential_rule_is_simulated():
    study = study_of("confirm: {rule: obrien-fleming}\n")
    clear = plan_power.confirm_power(study, 0.02, 0.002)
    assert clear["power"] == 1.0
    assert 3 <= clear["seeds"] <= 5
    none = plan_power.confirm_power(study, 1e-9, 0.002)
    assert none["power"] < stats.binom.ppf(0.999, plan_power.SIMULATED, 0.025) / plan_power.SIMULATED
    assert none["seeds"] > 9.5


def test_noise_of_a_study_is_the_spread_of_its_paired_differences(tmp_path):
    study = study_of("confirm: {seeds: 4}\n")
    shared, own = (np.random.default_rng(seed).normal(0, scale, (3, 4)) for seed, scale in ((1, 0.05), (2, 0.01)))
    arms = list(study.arms)

    def loss(cell, share):
        if cell.stage != "confirm":
            return inside(cell, share)
        return 3.0 + shared[0, cell.seed - 101] + own[arms.index(cell.arm), cell.seed - 101]

    played(study, loss, tmp_path)
    (tmp_path / "study.yaml").write_text(SMALL + "confirm: {seeds: 4}\nname: small\n")
    ledgers.write_tables("small", ledgers.read(tmp_path / "ledger.jsonl"), tmp_path)
    noise, each = plan_power.study_noise(tmp_path)
    baseline = (3.0 + shared[0] + own[0]).mean()
    assert noise == pytest.approx((own[0] - own[2]).std(ddof=1) / baseline)
    assert each["floor"] == pytest.approx((own[0] - own[1]).std(ddof=1) / baseline)
    with pytest.raises(StudyError, match=r"--noise .*no-such: .*no such file or folder"):
        plan_power.study_noise(tmp_path / "no-such")


@pytest.mark.parametrize("text", ["0.5", "x%", "-1%", "0%", "inf%", "nan%", ""])
def test_a_percentage_is_asked_for(text):
    with pytest.raises(StudyError, match=r"--effect .*: allowed: a percentage of the baseline's loss above 0, such as"):
        plan_power.percentage(text, "--effect")


def test_percentages():
    assert plan_power.percentage("0.5%", "--effect") == 0.005
    assert plan_power.percentage(" 2 % ", "--effect") == 0.02


# --- the command -----------------------------------------------------------------------------------------------------

OPTIONS = {"slots": 2, "hours_from": "a100", "utilisation": 0.3, "effect": "0.5%", "noise": None, "form": "json"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture
def cache(packed, monkeypatch):
    monkeypatch.setenv("PAGATING_CACHE", str(packed))
    return packed


def test_a_plan_writes_nothing_but_the_token_cache(tmp_path, cache):
    text = plans.run(ROOT / "configs" / "smoke.yaml", tmp_path / "studies", **{**OPTIONS, "noise": "0.3%"})
    found = json.loads(text)
    assert list(tmp_path.iterdir()) == []
    assert found["total"]["cells"] == [45, pytest.approx(plan_work.grid_points(SMOKE)[1] * 5 + 30), 55]
    assert found["total"]["tokens"][2] == 55 * 20_480
    assert found["disk"]["corpus"] == sum(path.stat().st_size for path in cache.glob("corpus-*/*"))
    assert found["hours_from"] == "a100, one a slot: 19.5 TFLOP/s in float32 x 30% assumed utilisation"
    assert found["seconds"]["wall"][0] < found["seconds"]["wall"][1] < found["seconds"]["wall"][2]
    assert found["power"]["level"] == 0.05 / 4
    page = plan_page.show(found, "terminal")
    assert "49.3 (45 - 55)" in page
    assert "assumed utilisation" in page
    assert "Holm's first step" in page


def test_a_corpus_that_is_not_here_is_planned_from_the_file(tmp_path, cache, monkeypatch):
    config = tmp_path / "far.yaml"
    config.write_text(SMALL.replace("{vocab_size: 300}", "{pretrained: gpt2}") + "corpus: {hub: {name: far/away}}\n")

    def gone(*arguments):
        from pagating.corpus import CorpusError

        raise CorpusError("hub dataset 'far/away' cannot be loaded: offline")

    monkeypatch.setattr("tune.runner.packed_corpus", gone)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = json.loads(plans.run(config, tmp_path / "studies", **OPTIONS))
    assert found["notes"] == [
        "corpus: not on this machine, planned from the study file's sizes "
        "(hub dataset 'far/away' cannot be loaded: offline)"
    ]
    assert found["models"]["gelu"]["parameters"] == (50_257 + 16) * 16 + 2 * (12 * 256 + 13 * 16) + 32
    assert found["disk"]["corpus"] is None


@pytest.mark.parametrize(
    ("slots", "parallel", "advice"),
    [
        (3, 1, None),
        (4, 1, "3 of 4 slots can be busy.* search.parallel: 2 keeps 4 busy, and shows each suggestion 1 fewer"),
        (6, 2, None),
        (40, 2, "6 of 40 slots can be busy.* search.parallel: 3 keeps 9 busy"),  # 3 trials an arm are all there are
        (40, 3, None),
    ],
)
def test_slots_that_the_search_leaves_idle_are_said(slots, parallel, advice):
    notes = plans.idle_slots(study_of(f"search: {{trials_per_arm: 3, parallel: {parallel}}}\n"), slots)
    assert len(notes) == (advice is not None)
    assert all(re.search(advice, note) for note in notes)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("hours_from", "gt200", "--hours-from gt200: allowed: measure, t4, v100"),
        ("form", "yaml", "--format yaml: allowed: terminal, json"),
        ("effect", "half", "--effect half: allowed: a percentage"),
        ("noise", "nothing", "--noise nothing: no study of that name in .*studies and no percentage"),
        ("utilisation", 0.0, r"--utilisation 0.0: it must lie in \(0, 1\]"),
    ],
)
def test_bad_options_are_one_line(tmp_path, cache, option, value, message):
    with pytest.raises(StudyError, match=message):
        plans.run(ROOT / "configs" / "smoke.yaml", tmp_path / "studies", **{**OPTIONS, option: value})


def test_bad_input_of_the_command_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "tune.cli", "plan"]
    for arguments, message in (
        ([str(tmp_path / "none.yaml")], "none.yaml: No such file or directory"),
        ([str(ROOT / "configs" / "smoke.yaml"), "--hours-from", "abacus"], "--hours-from abacus: allowed: measure, t4"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (200_000, "2.3 days")]
)
def test_durations(seconds, text):
    assert plan_page.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (20_480, "20.5k"), (2e13, "20T"), (3e20, "300E")])
def test_amounts(value, text):
    assert plan_page.amount(value) == text


@pytest.mark.slow
def test_a_calibration_trains_every_arm_in_as_many_processes_as_asked(tmp_path):
    corpus = plans.stand_in(tmp_path, 300, 1 << 14)
    study = study_of()
    trials = {
        arm: plans.trial_spec(study, arm, plan_work.example(study, arm), 1, corpus, test=False) for arm in study.arms
    }
    flops = {arm: model.flops_per_token for arm, model in models_of(study).items()}
    found = plan_probe.probe(trials, flops, 2, 1.0)
    assert (set(found.speeds), found.processes) == (set(study.arms), 2)
    assert all(speed.tokens_per_second > 0 <= speed.build_seconds for speed in found.speeds.values())
    assert min(found.import_seconds, found.loop_seconds) > 0
    assert found.base_mb > 100
    broken = {arm: {**spec, "corpus": str(tmp_path / "none")} for arm, spec in trials.items()}
    with pytest.raises(plan_probe.ProbeError, match=r"the calibration failed: FileNotFoundError"):
        plan_probe.probe(broken, flops, 1, 1.0)


@pytest.mark.slow
def test_a_real_study_takes_what_was_planned(tmp_path):
    environment = {**os.environ, "PAGATING_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tune.cli", "sweep", str(ROOT / "configs" / "smoke.yaml"), "--slots", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "studies")], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode in (0, 1), done.stderr
    folder = tmp_path / "studies" / "smoke"
    found = ledgers.records(ledgers.read(folder / "ledger.jsonl")).values()
    cells = Counter((record.cell.stage, record.cell.arm) for record in found)
    rows = {(row.stage, row.arm): row for row in rows_of(SMOKE)}
    assert cells.keys() == rows.keys()
    for key, row in rows.items():
        assert row.cells[0] <= cells[key] <= row.cells[2]
        trained = sum(r.final["tokens"] for r in found if (r.cell.stage, r.cell.arm) == key)
        assert row.tokens[0] <= trained <= row.tokens[2]
    planned = plan_space.disk_parts(SMOKE, len(found), 2, plan_work.arm_model(SMOKE, "gelu", 300))
    kept = {"ledger": folder / "ledger.jsonl", "mlflow": tmp_path / "mlflow.db"}
    for name, path in kept.items():
        assert path.stat().st_size / 1.3 < planned[name] < 1.3 * path.stat().st_size, name
    used = sum(path.stat().st_size for path in (*tmp_path.rglob("mlflow.db"), *folder.rglob("*")) if path.is_file())
    assert used < plan_space.disk_needed(SMOKE, 2)
