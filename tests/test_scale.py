"""Check the page of benchmarks/scale.py against its figures, and the sizes of its studies."""

import json
import math
from pathlib import Path

import pytest
import scale
import scale_page

ROOT = Path(__file__).parents[1]

MACHINE = {"processor": "P", "cores": 2, "date": "D", "memory_mb": 16e3, "disk_mb": 1e6, "threads": 1e5, "files": 65536}


def row(cells, sampler="random", **changed):
    """Make the row of a size whose memory grows by 0.1 MB per cell on 400 MB, and whose time grows with the cells."""
    of = {"cells": cells, "sampler": sampler, "slots": 2, "seconds_a_cell": 0.05, "growth": 1.0, "suggest_ms": 1.0}
    of |= {"peak_mb": 400 + 0.1 * cells, "wall_seconds": 0.05 * cells, "mlflow_seconds": 0.01 * cells}
    return of | {"report_seconds": 3.0, "again_seconds": 2.0, "ledger_mb": 0.002 * cells} | changed


def slots(number, **changed):
    of = {"slots": number, "workers": number, "processes": 10 + number, "threads": 100 + 50 * number}
    return of | {"tree_mb": 600.0 + 90 * number, "most_files": 100 + 3 * number, "seconds_a_cell": 0.05} | changed


def found(sizes=(), side_by_side=()):
    of = {"machine": MACHINE, "slots": 2, "reports": 10, "sampler": "random"}
    sizes = list(sizes) or [row(100), row(1000), row(10_000), row(1000, "tpe", suggest_ms=40.0)]
    return of | {"sizes": sizes, "side_by_side": list(side_by_side) or [slots(2), slots(8), slots(32)]}


@pytest.mark.parametrize("cells", [40, 80, 100, 1000, 10_000])
def test_a_study_of_a_size_has_that_many_cells(cells):
    study = scale.make_study(cells, "random")
    grid = study.calibrate.points * study.calibrate.seeds
    assert len(study.arms) * (study.search.trials_per_arm + grid + study.confirm.seeds) == cells
    assert study.search.sampler == "random"


def test_what_grows_straight_is_carried_on_by_a_line_and_what_grows_faster_by_a_power():
    cells = [100, 1000]
    assert scale_page.reach(cells, [10 + 0.1 * n for n in cells], 1010.0) == pytest.approx(10_000)
    assert scale_page.reach(cells, [1e-3 * n**2 for n in cells], 1e5) == pytest.approx(10_000)
    assert scale_page.reach(cells, [5.0, 5.0], 100.0) == math.inf  # it does not grow
    assert scale_page.reach(cells, [50.0, 500.0], 100.0) == 1000  # reached within the measured range


def test_what_breaks_first_follows_from_the_growth_and_the_machine():
    sizes = [row(1000), row(10_000)]
    order = dict(scale_page.breaks_first(sizes, MACHINE))
    assert list(order) == ["peak_mb", "wall_seconds", "ledger_mb"]
    assert order["peak_mb"] == pytest.approx((16e3 - 400) / 0.1)
    assert order["wall_seconds"] == pytest.approx(scale_page.WEEK / 0.05)
    assert order["ledger_mb"] == pytest.approx(1e6 / 0.002)
    roomy = {**MACHINE, "memory_mb": 4e6}
    assert next(iter(dict(scale_page.breaks_first(sizes, roomy)))) == "wall_seconds"
    slow = [row(1000), row(10_000, wall_seconds=5000.0)]  # a step that reads all earlier cells
    first, cells = scale_page.breaks_first(slow, MACHINE)[0]
    assert first == "wall_seconds"
    assert cells == pytest.approx(10_000 * math.sqrt(scale_page.WEEK / 5000), rel=1e-9)


def test_the_slots_that_a_machine_holds():
    order = scale_page.slots_end([slots(2), slots(8), slots(32)], MACHINE)
    assert [name for name, _, _ in order] == ["tree_mb", "threads", "most_files"]
    assert order[0][1:] == (pytest.approx(90), pytest.approx((16e3 - 600) / 90))
    assert order[1][1:] == (pytest.approx(50), pytest.approx((1e5 - 100) / 50))
    few = scale_page.slots_end([slots(2), slots(32)], {**MACHINE, "threads": 4096})
    assert few[0][0] == "threads"


def test_the_page_says_what_the_figures_say():
    text = scale_page.page(found())
    assert "| 10,000 | random |" in text
    assert "| 1,000 | tpe |" in text
    assert "the driver's memory runs out first, at about 160,000 cells" in text
    assert "time at 12,000,000" in text
    assert "memory runs out first,\nat about 170 slots; 32 were run. 1,000 slots would take 91 GB" in text
    assert "600 / 0.05 = about 12,000 slots" in text
    hours = scale_page.page(found([row(1000), row(10_000, wall_seconds=5000.0)]))
    assert "time runs out first, at about 110,000 cells" in hours


def test_the_plot_has_seconds_a_cell_and_memory(tmp_path):
    scale_page.draw(found(), tmp_path / "img" / "scale.svg")
    assert (tmp_path / "img" / "scale.svg").read_text(encoding="utf-8").count("<svg") == 1


@pytest.mark.skipif(not (ROOT / "docs" / "scale.json").exists(), reason="needs docs/scale.json: benchmarks/scale.py")
def test_the_published_page_holds_the_published_figures():
    kept = json.loads((ROOT / "docs" / "scale.json").read_text(encoding="utf-8"))
    assert scale_page.page(kept) == (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
