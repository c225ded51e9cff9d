"""Check docs/performance.md against docs/performance.json: goals, figures, and effects that invalidate them."""

import copy
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import common
import goals
import performance
import performance_trial
import pytest
import study_overhead
import trial_ideas
import trial_speed

ROOT = Path(__file__).parents[1]

MACHINE = {"processor": "P", "cores": 2, "instructions": "I", "torch": "T", "python": "3", "date": "D", "load": 0.1}
PACK = {"median": 2.0, "low": 1.5, "high": 2.5, "n": 3}
RATE = {"median": 1234.4, "low": 1.0, "high": 2.0, "n": 3}
PACKED = {"machine": MACHINE, "rows": [{"trials": 4, "device": "cpu", "in turn": RATE, "packed": RATE, "ratio": PACK}]}
TABLE = {"machine": MACHINE, "trials": 100_000, "seconds": 17.04, "peak_gigabytes": 0.559, "report_megabytes": 1.26}


def test_the_page_holds_the_figures():
    kept = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    assert performance.page(kept) == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_each_benchmark_keeps_the_figures_of_the_others(tmp_path):
    performance.keep(tmp_path, "table", TABLE)
    performance.keep(tmp_path, "packed", PACKED)
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert "| 4 | cpu | 1,234 | 1,234 | 2.00 (1.50-2.50) |" in page
    assert "A report of 100,000 trials: 17.0 s, a peak of 0.56 GB, a page of 1.3 MB." in page
    assert page.index("## Packed trials") < page.index("## A large table")
    performance.keep(tmp_path, "table", {**TABLE, "seconds": 20.0})
    assert "20.0 s" in (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))["packed"] == PACKED


def test_a_part_that_nobody_shows_is_refused(tmp_path):
    with pytest.raises(KeyError, match="nothing"):
        performance.keep(tmp_path, "nothing", TABLE)


# --- goals ---


def figure(median, low=None, high=None):
    return {"median": median, "low": median if low is None else low, "high": median if high is None else high, "n": 9}


def step(variant, ratio, of_gemm, **shape):
    base = {"d_model": 128, "n_ctx": 128, "vocab_size": 4096, "precision": "float32"}
    rate = {"tokens_per_second": figure(1000.0)}
    return {**base, **shape, "variant": variant, **rate, "ratio": figure(ratio), "of_gemm": figure(of_gemm)}


HALF = {"precision": "bfloat16"}
TRIAL = {
    "machine": {**MACHINE, "bfloat16": True},
    "speed": [
        step("HF Trainer, defaults", 1.0, 0.4),
        step("this engine", 1.4, 0.6),
        step("this engine, compiled", 1.5, 0.6),
        step("HF Trainer, defaults", 1.0, 31.9, **HALF),
        step("this engine", 3.0, 0.49, **HALF),
        step("this engine, compiled", 2.0, 0.5, **HALF),
    ],
    "arms": [
        {"arm": name, "path": "never", "ratio": figure(ratio, high=high)}
        for name, ratio, high in (("gelu", 0.5, 0.5), ("paGTU", 0.98, 1.0))
    ],
    "ideas": [],
    "precision": [
        {"what": "gelu", "float32": 1.0, "bfloat16": 1.0, "seeds": 6, "steps": 100}
        | {"difference_low": -0.01, "difference_high": 0.02, "seed_sd": 0.02}
    ],
    "memory": {
        "200 trials in one process": {"after 20 trials": 400.0, "after 100 trials": 500.0, "after 200 trials": 404.0},
        "V 50,257, logits in chunks": {"model and optimiser": 100.0, "peak of a step": 130.0},
    },
    "compile": {},
    "start": {},
}
STUDY = {
    "machine": MACHINE,
    "trial_seconds": 15.0,
    "help_seconds": 0.49,
    "status_seconds": 0.49,
    "report_seconds": 2.9,
    "start_seconds": 7.9,
    "occupancy_2_slots": {"slots": 2, "trials": 72, "wall_seconds": 500.0, "occupancy": 0.95},
    "tracking_sqlite": {"calls_ms": 1.0, "processor_ms": 0.2, "owed": 0},
    "tracking_dead_server": {"calls_ms": 0.1, "processor_ms": 1.0, "owed": 1},
}


def judged(kept):
    return {row.goal: row.judged for row in goals.goals(kept)}


def changed(kept, *path, value):
    result = copy.deepcopy(kept)
    part = result
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return result


def test_every_goal_is_met_at_its_limit():
    found = judged({"trial": TRIAL, "study": STUDY})
    assert Counter(word.split(",")[0].split(":")[0] for word in found.values()) == {"met": 14, "not measured": 1}


@pytest.mark.parametrize(
    ("path", "value", "goal"),
    [
        (("trial", "speed", 2, "ratio"), figure(1.49), "float32: tokens/s at least 1.5x"),
        (("trial", "speed", 4, "ratio"), figure(2.99), "bfloat16: tokens/s at least 3x"),
        (("trial", "speed", 5, "of_gemm"), figure(0.499), "bfloat16: at least 0.5 of the GEMM ceiling"),
        (("trial", "arms", 1, "ratio"), figure(0.979, high=0.99), "no arm over 2% slower"),
        (("trial", "memory", "V 50,257, logits in chunks", "peak of a step"), 130.1, "V 50,257: peak memory"),
        (("trial", "memory", "200 trials in one process", "after 200 trials"), 404.1, "no growth over 200 trials"),
        (("trial", "precision", 0, "difference_low"), -0.021, "bfloat16 and float32 agree"),
        (("study", "occupancy_2_slots", "occupancy"), 0.949, "2 slots, trials of 15 s"),
        (("study", "tracking_sqlite", "calls_ms"), 1.01, "tracking: at most 1 ms per report, in the driver's calls"),
        (
            ("study", "tracking_dead_server", "processor_ms"),
            1.01,
            "tracking: at most 1 ms per report, in the driver's p",
        ),
        (("study", "start_seconds"), 8.0, "`pagating sweep` to the end of its first evaluation"),
        (("study", "status_seconds"), 0.5, "`pagating status`"),
        (("study", "report_seconds"), 3.0, "`pagating report` of the laptop study"),
        (("study", "help_seconds"), 0.5, "`pagating --help`"),
    ],
)
def test_one_figure_beyond_its_limit_misses_its_goal_alone(path, value, goal):
    kept = {"trial": TRIAL, "study": STUDY}
    before, after = judged(kept), judged(changed(kept, *path, value=value))
    differ = [name for name in before if before[name] != after[name]]
    assert len(differ) == 1
    assert differ[0].startswith(goal)
    assert after[differ[0]].startswith("missed")


def test_what_cannot_be_judged_is_neither_met_nor_missed():
    emulated = changed({"trial": TRIAL}, "trial", "machine", value={**MACHINE, "instructions": "AVX2"})
    found = judged(emulated)
    half = [word for goal, word in found.items() if goal.startswith("bfloat16: ")]
    assert half == ["not judged: bfloat16 is emulated on this processor"] * 2
    assert goals.emulates_bfloat16({"instructions": "AVX2"})
    assert not goals.emulates_bfloat16({"instructions": "AVX512"})
    assert goals.emulates_bfloat16({"instructions": "AVX512", "bfloat16": False})
    packs = changed({"packed": PACKED}, "packed", "rows", 0, "ratio", value=figure(4.0))
    assert "not measured: no GPU was available" in judged(packs).values()
    on_gpu = changed(packs, "packed", "rows", 0, "device", value="cuda")
    assert judged(on_gpu)["GPU: packed trials at least 4x as fast as one after the other"] == "met"
    slow = changed(on_gpu, "packed", "rows", 0, "ratio", value=figure(3.99))
    assert judged(slow)["GPU: packed trials at least 4x as fast as one after the other"] == "missed"
    page = performance.page({"trial": TRIAL, "study": STUDY})
    assert "Of 15 goals 14 are met and 0 missed; 1 could" in page
    assert "What stands in the way" not in page


@pytest.mark.parametrize(("packed", "small", "word"), [(400, 0.45, "met"), (399, 0.449, "missed")])
def test_the_goals_of_a_gpu_are_judged_at_their_limits(packed, small, word):
    rows = [
        {"part": "turn", "what": "top rung", "tokens_per_second": 1, "utilisation": 0.9},
        {"part": "turn", "what": "4 x 128", "tokens_per_second": 100, "utilisation": 0.9},
        {"part": "goal", "trials": 16, "tokens_per_second": 300, "utilisation": 0.9},
        {"part": "goal", "trials": 64, "tokens_per_second": packed, "utilisation": 0.9},
        {"part": "small", "batch": 16384, "tokens_per_second": 9, "utilisation": small},
    ]
    found = judged({"packed": PACKED, "gpu": {"machine": {"card": "a card"}, "rows": rows}})
    assert [found[goal] for goal in found if "GPU" in goal or "Hopper" in goal] == [word] * 2


def test_the_section_on_a_gpu_has_the_kept_figures():
    kept = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))["gpu"]
    lines = performance.on_gpu(kept, performance.measured_on("gpu_check.py", kept["machine"]))
    text = "\n".join(lines)
    assert kept["machine"]["card"] in text
    for row in kept["rows"]:
        assert f"| {row['ms']:.1f} | {row['tokens_per_second']:,} | {row['utilisation']:.1%} |" in text
    assert f"{performance.pack_ratio(kept):.0f} times as fast" in text


def test_what_stands_in_the_way_is_said_of_what_is_missed_alone():
    late = changed({"trial": TRIAL, "study": STUDY}, "study", "start_seconds", value=15.1)
    page = performance.page(late)
    (line,) = [line for line in page.splitlines() if line.startswith("- `pagating sweep` to the end")]
    assert "Tried: " in line
    assert page.count("Tried: ") == 1


# --- effects that invalidate a figure ---


def test_the_trainer_at_its_defaults_is_shown_in_float32():
    page = performance.page({"trial": TRIAL})
    row = (
        "d_model 128, T 128, V 4,096, float32, beside bfloat16 | HF Trainer, defaults | 1,000 | 1.00 (1.00-1.00) | - |"
    )
    assert row in page
    assert "d_model 128, T 128, V 4,096, bfloat16 | this engine | 1,000 | 3.00 (3.00-3.00) | 0.49 (0.49-0.49) |" in page
    assert "31.9" not in page


def idea(name, low, median, vocab_size=50257, **more):
    shape = {"d_model": 128, "n_ctx": 128, "vocab_size": vocab_size, "precision": "float32"}
    return {**shape, "idea": name, "ratio": figure(median, low=low), **more}


def test_a_shape_where_more_work_was_faster_selects_nothing():
    rows = [
        idea("dropout 0.1", 1.01, 1.11),
        idea("twice the tokens a step", 1.1, 1.14),
        idea("both", 1.1, 1.2),  # allocators are measured separately
        idea("dropout 0.1", 0.99, 1.05, 4096),
        idea("twice the tokens a step", 1.1, 1.3, 4096),
    ]
    page = performance.page({"trial": {**TRIAL, "ideas": rows}})
    assert "`dropout 0.1` 1.11 do more work than the engine and yet come out faster: an effect of the order" in page
    assert "of about 0.11. The rows marked * select nothing." in page
    assert "--only ideas --shape 50257` takes them again" in page
    assert [line.split("|")[2].strip() for line in page.splitlines() if line.endswith("* |")] == [
        "dropout 0.1",
        "twice the tokens a step",
    ]
    assert "in one fixed order, the first row first (d_model" in page
    quiet = [idea("dropout 0.1", 0.8, 0.9, order="shuffled")]
    page = performance.page({"trial": {**TRIAL, "ideas": quiet, "order": "shuffled"}})
    assert "fixed order" not in page
    assert "* |" not in page


def test_each_round_has_another_order_and_none_is_always_first():
    seen, names = [], ["a", "b", "c", "d"]

    def variant(name):
        def run():
            seen.append(name)
            return float(len(seen))

        return run

    times = common.interleave({name: variant(name) for name in names}, 0.0, least=40)
    rounds = [tuple(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert len(rounds) == 41  # the first is left out
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds[1:])) > 12
    firsts = Counter(order[0] for order in rounds[1:])
    assert set(firsts) == set(names)
    assert max(firsts.values()) < 20
    for name in names:  # each round's seconds belong to that round
        assert times[name] == [4 * i + rounds[i].index(name) + 1.0 for i in range(1, 41)]
    again, seen = seen, []
    random.seed(5)
    common.interleave({name: variant(name) for name in names}, 0.0, least=40)
    assert seen == again


def test_each_part_says_in_which_order_its_variants_ran():
    parts = {"packed": PACKED, "gates": {"machine": MACHINE, "rows": []}}
    page = performance.page(parts)
    assert page.count("ach round in one fixed order, the first row first") == 2
    page = performance.page({name: {**part, "order": "shuffled"} for name, part in parts.items()})
    assert page.count("ach round in another order, drawn by a seed") == 2
    assert "fixed order" not in page


def test_rows_taken_again_stand_in_the_place_of_their_like_with_their_own_load():
    old = [idea("as it is", 1, 1), idea("both", 1, 1.1), idea("dropout 0.1", 1.05, 1.11)]
    new = [idea("dropout 0.1", 0.7, 0.8, order="shuffled"), idea("a new one", 1, 1, order="shuffled")]
    rows = trial_ideas.retaken(old, new, {**MACHINE, "load": 0.25})
    assert [(row["idea"], row.get("load")) for row in rows] == [
        ("as it is", None),
        ("both", None),
        ("dropout 0.1", 0.25),
        ("a new one", 0.25),
    ]
    assert rows[2]["ratio"]["median"] == 0.8
    page = performance.page({"trial": {**TRIAL, "ideas": rows}})
    assert "| dropout 0.1 | 0.80 (0.70-0.80) (load 0.25, D) |" in page
    assert performance_trial.order_effects(rows) == {}


def test_a_vocabulary_that_the_table_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--shape 512: the table has \['4096', '50257'\]"):
        trial_speed.ideas_again(tmp_path, tmp_path, 512)


def test_a_busy_machine_is_said_under_each_heading():
    busy = {**TRIAL, "machine": {**MACHINE, "load": 5.6}}
    assert performance.page({"trial": busy}).count("Load average at the start 5.6 on 2 cores: other work ran") == 4
    assert "other work ran" not in performance.page({"trial": TRIAL})


def sleeper(begun, ended, reports):
    return SimpleNamespace(started=begun, ended=ended, curve=[{}] * reports)


def test_slots_count_from_the_first_trial_of_any_to_the_last_end_of_all():
    # trials of 10 s: two that waited 2 and 5 s for their process, then one on the first slot, half a second after it
    records = [sleeper(100.0, 112.0, 10), sleeper(100.0, 115.0, 10), sleeper(112.5, 123.0, 10)]
    found = study_overhead.occupied(records, 2, 10.0)
    assert found["occupancy"] == pytest.approx(30 / (2 * 21))  # from 102 to 123
    assert found["wall_seconds"] == pytest.approx(21)
    assert study_overhead.occupied(records[:2], 2, 10.0)["occupancy"] == pytest.approx(20 / (2 * 13))
    stopped = [sleeper(0.0, 5.0, 5), sleeper(0.0, 10.0, 10)]
    assert study_overhead.occupied(stopped, 2, 10.0)["occupancy"] == pytest.approx(15 / 20)
