"""Check that the soak's table separates growth within a stage from the step between two stages."""

import soak


def test_growth_is_told_within_each_stage():
    names = ["search"] * 200 + ["calibrate"] * 9 + ["confirm"] * 100
    events = [{"event": "ended", "cell": f"{name}/gelu/{i}"} for i, name in enumerate(names)]
    events.insert(0, {"event": "started", "cell": "search/gelu/0"})
    assert soak.stages(events) == {"search": (0, 200), "calibrate": (200, 209), "confirm": (209, 309)}
    samples = []
    for cells in range(310):  # worker: 30 MiB at the start, 20 more in the confirm stage, else 5 per 1,000 cells
        worker = 400 + 30 * (cells >= 5) + 20 * (cells >= 209) + 0.005 * cells
        samples.append({"seconds": cells, "cells": cells, "driver": 900 + 0.1 * cells, "worker": worker})
    samples.append({"seconds": 310, "cells": 309, "driver": 500.0, "worker": 0.0})  # no worker: the report is written
    rows = dict(soak.growth(samples, events))
    assert {name: float(value) for name, value in rows.items()} == {
        "driver: MiB per 1,000 cells, in the second half of the cells": 100.0,
        "driver: MiB per 1,000 cells, within search (200 cells)": 100.0,
        "driver: MiB per 1,000 cells, within confirm (100 cells)": 100.0,
        "worker: MiB per 1,000 cells, in the second half of the cells": 180.8,  # the step, as growth
        "worker: MiB per 1,000 cells, within search (200 cells)": 5.0,
        "worker: MiB per 1,000 cells, within confirm (100 cells)": 5.0,
    }
