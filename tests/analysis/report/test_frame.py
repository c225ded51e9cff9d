"""Check that a caption counts the points outside the frame of its figure."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.io.study import load
from analysis.report import build, frame, plots


def test_marked_points_above_the_frame_are_counted():
    fig = Figure()
    ax = fig.subplots()
    ax.plot([1, 2, 3, 4], [1.0, 2.0, 2.5, np.nan], "o")
    ax.plot([1, 2, 3], [5.0, 6.0, 1.0], marker="s", ls="-")
    ax.plot([1, 2], [9.0, 9.0])  # a line without marks has no points
    ax.plot([1], [0.985], "x", transform=ax.get_xaxis_transform())  # in units of the frame: always inside
    ax.set_ylim(0, 2.2)
    assert frame.above(fig) == 3
    assert frame.note(fig) == "3 points lie above the frame."
    ax.set_ylim(0, 5.5)
    assert frame.note(fig) == "1 point lies above the frame."
    ax.set_ylim(0, 0.5)
    assert frame.above(fig) == 6
    ax.set_ylim(0, 10)
    assert frame.note(fig) == ""


def test_the_captions_of_a_report_have_the_counts_of_its_tables(demo: Path):
    curves = pd.read_parquet(demo / "curves.parquet")
    study = load(demo)
    fig = plots.loss_curves(study)
    top = fig.axes[0].get_ylim()[1]
    means = curves[curves["stage"] == "confirm"].groupby(["arm", "tokens"])["val_nll"].mean()
    expected = int((means > top).sum())
    assert expected > 0
    assert frame.above(fig) == expected
    assert f"{expected} points lie above the frame.</figcaption>" in build.build(demo).read_text()


def test_a_trial_far_off_is_counted_in_the_learning_rate_figure(demo: Path):
    trials = pd.read_parquet(demo / "trials.parquet")
    done = trials[(trials["stage"] == "search") & (trials["outcome"] == "completed")]
    trials.loc[done["val_nll"].idxmin(), "val_nll"] = 50.0
    trials.to_parquet(demo / "trials.parquet")
    fig = plots.learning_rate(load(demo))
    top = fig.axes[0].get_ylim()[1]
    search = trials[(trials["stage"] == "search") & trials["outcome"].isin(["completed", "stopped_early"])]
    grid = trials[(trials["stage"] == "calibrate") & (trials["outcome"] == "completed")]
    means = grid.groupby(["arm", "lr"])["val_nll"].mean()
    assert top < 50
    assert frame.above(fig) == int((search["val_nll"] > top).sum() + (means > top).sum()) > 0
