import itertools

import numpy as np
import pytest

from analysis.report.palette import COLOURS, INK, colour_of

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SEEN = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(light):
    x, y, z = TO_XYZ @ np.clip(light, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    fx, fy, fz = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def apart(one, other):
    return min(np.linalg.norm(lab(m @ linear(one)) - lab(m @ linear(other))) for m in SEEN.values())


def contrast(one, other):
    low, high = sorted(float((TO_XYZ @ linear(c))[1]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_any_two_arms_are_told_apart_also_by_colour_blind_readers():
    assert min(apart(a, b) for a, b in itertools.combinations((INK, *COLOURS), 2)) >= 17
    assert apart("#d55e00", "#b56a00") < 17  # a pair below the bound


def test_every_colour_is_visible_on_white_and_on_near_black():
    assert min(contrast(colour, ground) for colour in COLOURS for ground in ("#ffffff", INK)) >= 2


def test_beyond_the_list_the_colours_are_darker_and_differ():
    found = [colour_of(place) for place in range(17)]
    assert found[:8] == list(COLOURS)
    assert len(set(found)) == 16
    assert found[8] == "#1d5e8c"
    assert found[16] == found[0]
    with pytest.raises(ValueError, match="place -1 is negative"):
        colour_of(-1)
