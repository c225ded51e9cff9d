"""The joint optimum of several hyperparameters, against numpy's least squares and scipy's bounded minimum."""

import numpy as np
import pytest
from scipy.optimize import minimize

from analysis.stats.surface import joint_optima

STAR = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
CORNERS = [(0.7, -0.7), (-0.7, 0.7), (0.7, 0.7)]
A = np.array([[0.03, 0.012], [0.012, 0.02]])


def losses(points, optimum, hessian=A, noise=0.0, seeds=2, rng=None):
    z = np.asarray(points, float) - optimum
    exact = 3 + np.einsum("ij,jk,ik->i", z, hessian, z)
    drawn = (rng or np.random.default_rng(0)).normal(size=(len(z), seeds)) * noise
    return exact[:, None] + drawn


def test_the_optimum_of_an_exact_quadratic_is_found_with_its_interaction():
    points = [*STAR, *CORNERS]
    optima = {"a": (0.4, -0.3), "b": (-0.2, 0.5)}
    found = joint_optima(
        dict.fromkeys(optima, points), {arm: losses(points, at, noise=1e-7) for arm, at in optima.items()}
    )
    for arm, at in optima.items():
        assert found[arm].at == pytest.approx(at, abs=1e-4)
        assert found[arm].hessian == pytest.approx(A, abs=1e-4)
        design = [[1, x, y, x * x, y * y, x * y] for x, y in points]
        mean = losses(points, at, noise=1e-7).mean(1)
        _, b1, b2, c1, c2, g = np.linalg.lstsq(np.array(design), mean, rcond=None)[0]
        alone = np.linalg.solve([[2 * c1, g], [g, 2 * c2]], [-b1, -b2])
        assert found[arm].at == pytest.approx(alone, abs=1e-4)
        assert found[arm].gain((0.0, 0.0)) == pytest.approx(np.array(at) @ A @ at, rel=1e-3)


def test_an_optimum_outside_the_points_is_the_minimum_within_their_box():
    points = [*STAR, *CORNERS]
    table = losses(points, (2.5, 0.3), noise=1e-7)
    found = joint_optima({"a": points, "b": points}, {"a": table, "b": table})["a"]
    z = lambda x: np.asarray(x) - (2.5, 0.3)  # noqa: E731
    near = np.array([p for p in points if max(abs(np.subtract(p, (1, 0)))) <= 1.6 + 1e-9])
    limits = list(zip(near.min(0), near.max(0), strict=True))
    best = minimize(lambda x: z(x) @ A @ z(x), (0, 0), bounds=limits)
    assert found.at == pytest.approx(best.x, abs=1e-3)
    assert found.at[0] <= near[:, 0].max() + 1e-9


def test_a_cross_term_within_its_noise_is_left_out_and_a_hessian_stays_positive_definite():
    points, rng = [*STAR, *CORNERS], np.random.default_rng(1)
    diagonal = np.diag([0.03, 0.02])
    tables = {arm: losses(points, (0.1, 0.1), diagonal, 0.004, rng=rng) for arm in "abcd"}
    for one in joint_optima(dict.fromkeys(tables, points), tables).values():
        assert abs(one.hessian[0, 1]) < 0.004
    saddle = np.array([[0.03, 0.09], [0.09, 0.02]])
    tables = {arm: losses(points, (0, 0), saddle, 0.001, rng=rng) for arm in "ab"}
    for one in joint_optima(dict.fromkeys(tables, points), tables).values():
        assert np.linalg.eigvalsh(one.hessian)[0] > 0


def test_an_arm_whose_corners_diverged_takes_the_interaction_of_the_others():
    points = [*STAR, *CORNERS]
    rng = np.random.default_rng(2)
    tables = {arm: losses(points, (0.3, -0.4), noise=1e-4, rng=rng) for arm in "abc"}
    tables["c"][len(STAR) :] = np.inf
    found = joint_optima(dict.fromkeys(tables, points), tables)
    assert found["c"].hessian[0, 1] == pytest.approx(A[0, 1], rel=0.05)
    assert found["c"].at == pytest.approx((0.3, -0.4), abs=0.05)
    tables["c"][2:] = np.inf  # two points fit nothing
    assert set(joint_optima(dict.fromkeys(tables, points), tables)) == {"a", "b"}


def test_noisy_optima_move_towards_each_other_and_clear_ones_stay():
    points, spread = [*STAR, *CORNERS], {}
    for noise in (0.02, 1e-6):
        rng = np.random.default_rng(3)
        tables = {arm: losses(points, (0.2, 0.2), noise=noise, rng=rng) for arm in "abcde"}
        found = joint_optima(dict.fromkeys(tables, points), tables)
        alone = {arm: joint_optima({arm: points}, {arm: tables[arm]})[arm] for arm in tables}
        at = np.array([one.at for one in found.values()])
        spread[noise] = at.std(0).sum(), np.array([one.at for one in alone.values()]).std(0).sum()
    assert spread[0.02][0] < spread[0.02][1]
    assert spread[1e-6][0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("seeds", [1, 2])
def test_without_noise_or_with_one_seed_there_is_still_an_optimum(seeds):
    points = [*STAR, *CORNERS]
    table = losses(points, (0.3, 0.1), seeds=seeds)
    found = joint_optima({"a": points, "b": points}, {"a": table, "b": table})
    assert found["a"].at == pytest.approx((0.3, 0.1), abs=1e-5)


def test_the_joint_fit_is_nearer_to_the_optimum_than_one_axis_after_the_other():
    rng, joint, single = np.random.default_rng(4), [], []
    for _ in range(20):
        optima = {arm: rng.uniform(-0.6, 0.6, 2) for arm in "abcde"}
        points = [*STAR, *CORNERS]
        tables = {arm: losses(points, at, noise=0.003, rng=rng) for arm, at in optima.items()}
        found = joint_optima(dict.fromkeys(optima, points), tables)
        for arm, at in optima.items():
            mean = tables[arm].mean(1)
            axes = [np.polyfit([0, -1, 1], mean[[0, *rows]], 2) for rows in ((1, 2), (3, 4))]
            alone = np.array([-b / (2 * c) for c, b, _ in axes])
            for each, moved in ((joint, found[arm].at - at), (single, alone - at)):
                each.append(moved @ A @ moved)
    assert np.mean(joint) < np.mean(single) / 3
