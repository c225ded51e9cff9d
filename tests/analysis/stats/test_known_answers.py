"""Known-answer cases, each computed by an independent library that the case names."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from analysis.describe import budget
from analysis.stats import estimates, multiplicity, paired_tests, power, sequential

CASES = {
    case["id"]: case for case in json.loads((Path(__file__).parents[2] / "known_answers.json").read_text())["cases"]
}


def case(name: str) -> tuple[dict, dict, float]:
    """Return inputs, expected outputs and tolerance of a case."""
    found = CASES[name]
    return found["inputs"], found["expected"], found["abs_tol"]


def two_arms(name: str) -> tuple[np.ndarray, np.ndarray]:
    inputs = CASES[name]["inputs"]
    return np.array(inputs["baseline"], float), np.array(inputs["treatment"], float)


def differences(name: str) -> np.ndarray:
    return np.array([float(x) for x in CASES[name]["inputs"]["diff"]])


def test_published_percentages():
    inputs, expected, tol = case("doc_pct_improvement")
    loss = {split: {k: [float(v)] for k, v in values.items()} for split, values in inputs.items()}
    named = {
        "eval a0_lr5e-4 -> a0.5_lr5e-4 (same lr)": ("eval_loss", "a0_lr5e-4", "a0.5_lr5e-4"),
        "eval a0_lr1e-4 -> a0.5_lr5e-4 (best baseline)": ("eval_loss", "a0_lr1e-4", "a0.5_lr5e-4"),
        "eval a0_lr5e-4 -> a0_lr1e-4 (lr alone)": ("eval_loss", "a0_lr5e-4", "a0_lr1e-4"),
        "train same lr": ("train_loss", "a0_lr5e-4", "a0.5_lr5e-4"),
        "train best baseline": ("train_loss", "a0_lr1e-4", "a0.5_lr5e-4"),
        "eval gpt2_lr5e-5_16k -> a0_lr1e-4": ("eval_loss", "gpt2_lr5e-5_16k", "a0_lr1e-4"),
        "eval gpt2_lr5e-5_16k -> a0.5_lr5e-4": ("eval_loss", "gpt2_lr5e-5_16k", "a0.5_lr5e-4"),
        "eval gpt2_lr5e-5_16k -> a0_lr5e-4": ("eval_loss", "gpt2_lr5e-5_16k", "a0_lr5e-4"),
    }
    assert set(named) == set(expected)
    for key, (split, b, t) in named.items():
        got = estimates.improvement_percent(loss[split][b], loss[split][t])
        assert got == pytest.approx(expected[key], abs=tol)


def test_perplexity_reduction():
    inputs, expected, tol = case("pct_vs_perplexity")
    got = estimates.perplexity_reduction_percent(inputs["b"], inputs["t"])
    assert got == pytest.approx(expected["ppl_reduction_pct"], abs=tol)


def test_ratio_of_means_is_not_the_mean_of_ratios():
    _, expected, tol = case("ratio_of_means_vs_mean_of_ratios")
    got = estimates.improvement_percent(*two_arms("ratio_of_means_vs_mean_of_ratios"))
    assert got == pytest.approx(expected["ratio_of_means_pct"], abs=tol)
    assert abs(got - expected["mean_of_ratios_pct"]) > 1


def test_paired_t():
    _, expected, tol = case("paired_t_n5")
    b, t = two_arms("paired_t_n5")
    statistic, df, p = paired_tests.paired_t(b - t)
    assert (statistic, df, p) == pytest.approx((expected["t"], 4, expected["p_two_sided"]), abs=tol)
    assert estimates.improvement_percent(b, t) == pytest.approx(expected["pct_improvement"], abs=tol)
    d = b - t
    assert d.mean() / d.std(ddof=1) == pytest.approx(expected["d_z"], abs=tol)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("signflip_n5_all_positive", "p_two_sided"),
        ("ties_n8", "signflip_p"),
        ("zeros_n5", "signflip_p"),
    ],
)
def test_sign_flip(name: str, key: str):
    assert paired_tests.sign_flip(differences(name)) == pytest.approx((case(name)[1][key], 0.0), abs=1e-12)


def test_smallest_p_that_sign_flip_and_worst_rank_can_reach():
    inputs, expected, tol = case("min_attainable_p")
    for n, p, wilcoxon in zip(inputs["n"], expected["p"], expected["wilcoxon"], strict=True):
        assert paired_tests.sign_flip(np.linspace(0.1, 0.2, n))[0] == pytest.approx(p, abs=tol)
        assert paired_tests.worst_rank(np.linspace(0.1, 0.2, n)) == pytest.approx(wilcoxon, abs=tol)


def test_worst_rank_equals_exact_wilcoxon_with_ties_and_zeros():
    assert paired_tests.worst_rank(differences("ties_n8")) == pytest.approx(
        case("ties_n8")[1]["wilcoxon_exact_p"], abs=1e-9
    )
    assert paired_tests.worst_rank(differences("zeros_n5")) == pytest.approx(
        case("zeros_n5")[1]["wilcoxon_drop_zeros_p"], abs=1e-9
    )


def test_fieller_and_log_ratio_intervals():
    _, expected, tol = case("fieller_and_logratio_ci_n5")
    b, t = two_arms("fieller_and_logratio_ci_n5")
    assert estimates.fieller(b, t) == pytest.approx(tuple(expected["fieller95"]), abs=tol)
    assert estimates.log_ratio_interval(b, t) == pytest.approx(tuple(expected["logratio95"]), abs=tol)


def test_adjusted_p():
    inputs, expected, tol = case("multiplicity")
    for name, key in (("bonferroni", "bonferroni"), ("holm", "holm"), ("benjamini-hochberg", "fdr_bh")):
        assert multiplicity.adjust(inputs["p"], name) == pytest.approx(expected[key], abs=tol)


def test_dunnett_blocked_by_seed():
    inputs, expected, tol = case("dunnett_blocked_k3")
    table = np.array(inputs["columns_control_then_arms"])
    got = multiplicity.dunnett_blocked(table[:, 0], list(table[:, 1:].T))
    assert got["effect"] == pytest.approx([-x for x in expected["effect"]], abs=1e-6)  # our sign: baseline - arm
    assert got["se"] == pytest.approx(expected["se"], abs=1e-6)
    assert got["t"] == pytest.approx([-x for x in expected["t"]], abs=1e-6)
    assert got["df"] == [expected["df"]] * 3
    assert got["p"] == pytest.approx(expected["p_unadjusted"], abs=1e-6)
    assert got["p_adjusted"] == pytest.approx(expected["p_adjusted"], abs=tol)


def test_tost():
    inputs, expected, tol = case("tost_equivalent")
    b, t = two_arms("tost_equivalent")
    got = paired_tests.tost(b - t, inputs["margin"])
    assert got == pytest.approx((expected["p"], expected["p_lower"], expected["p_upper"]), abs=tol)


def test_power():
    inputs, expected, tol = case("power_paired_t")
    got = [power.power(d, n, a) for d, n, a in zip(inputs["d_z"], inputs["n"], inputs["alpha"], strict=True)]
    assert got == pytest.approx(expected["power"], abs=tol)


def test_minimum_detectable_effect_also_where_statsmodels_is_wrong():
    inputs, expected, tol = case("mde")
    for key, level in (("alpha05", 0.05), ("alpha01", 0.01)):
        got = [power.detectable_d_z(n, level) for n in inputs["n"]]
        assert got == pytest.approx(expected[key], abs=tol)


def test_e_value():
    inputs, expected, tol = case("evalue_t_gaussian_prior")
    b, t = two_arms("evalue_t_gaussian_prior")
    got = [sequential.e_process(b - t, g)[-1] for g in inputs["g"]]
    assert got == pytest.approx(expected["e_at_data"], rel=tol)
    assert got == pytest.approx(expected["closed_form_e_at_data"], rel=1e-9)
    grid = [[sequential.e_value(x, n, 1.0) for n in inputs["n"]] for x in inputs["t"]]
    assert np.array(grid) == pytest.approx(np.array(expected["e_grid_g1"]), rel=1e-6)


def test_probability_of_improvement():
    _, expected, tol = case("probability_of_improvement")
    b, t = two_arms("probability_of_improvement")
    assert estimates.probability_of_improvement(b, t) == pytest.approx(expected["poi"], abs=tol)
    assert estimates.probability_of_improvement(t, b) == pytest.approx(expected["poi_reverse"], abs=tol)


def test_expected_best_of_n():
    inputs, expected, tol = case("expected_best_of_B")
    for replacement, key in ((True, "dodge_with_replacement"), (False, "tang_without_replacement")):
        assert budget.expected_best(inputs["losses"], replacement) == pytest.approx(expected[key], abs=tol)


def test_one_sample_t_on_80_real_runs():
    inputs, expected, tol = case("modded_nanogpt_record18_80_runs")
    got = paired_tests.one_sample_t(inputs["losses"], inputs["target"], "less")
    assert got == pytest.approx(expected["p_less"], abs=tol)


def test_a_nan_difference_is_refused_before_scipy_answers_zero():
    d = differences("edge_nan_permutation")
    for test in (paired_tests.sign_flip, paired_tests.paired_t):
        with pytest.raises(ValueError, match="must be finite, got nan"):
            test(d)
    for test in (paired_tests.worst_rank, paired_tests.sign_test):
        with pytest.raises(ValueError, match="is NaN"):
            test(d)


def test_worst_rank_of_a_diverged_run():
    _, expected, tol = case("edge_diverged_worst_rank")
    d = differences("edge_diverged_worst_rank")
    assert paired_tests.sign_test(d) == pytest.approx(expected["sign_test_p"], abs=tol)
    assert paired_tests.worst_rank(d) == pytest.approx(expected["wilcoxon_worst_rank_p"], abs=tol)
    assert paired_tests.paired_t(d[np.isfinite(d)])[2] == pytest.approx(expected["complete_pairs_t_p"], abs=tol)


def test_constant_differences_get_no_t():
    _, expected, _ = case("edge_constant_difference")
    b, t = two_arms("edge_constant_difference")
    with pytest.raises(ValueError, match="zero variance"):
        paired_tests.paired_t(b - t)
    assert paired_tests.sign_flip(b - t)[0] == expected["signflip_p"]
    assert estimates.fieller(b, t) is None
    assert math.isclose(estimates.improvement_percent(b, t), 100 * 0.1 / 3.4)
