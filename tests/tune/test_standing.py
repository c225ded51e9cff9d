"""Where a study stands, from a ledger made by hand: counts, bests, time left, and the table at several widths."""

import fcntl
import io
import os
import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console

from tune.ledger import Ledger, is_held
from tune.standing import Best, Standing
from tune.standing_table import View, duration, look
from tune.study import dump, parse

STUDY = """
question: Is it better?
model: {n_layer: 2, d_model: 16, n_head: 2, n_ctx: 16}
fixed: {tokens: 4096, batch_tokens: 64}
nuisance: {lr: {loguniform: [1.0e-4, 1.0e-2]}}
arms:
  gelu: {baseline: true}
  floor: {gate: sigmoid, alpha: 0.0, floor: true}
search: {trials_per_arm: 3}
calibrate: {points: 3, seeds: 2, max_points: 5}
confirm: {seeds: 3}
"""


def study(text=STUDY, **replaced):
    for old, new in replaced.items():
        text = text.replace(*new) if isinstance(new, tuple) else text.replace(old, new)
    return parse(text, Path("x.yaml"))


class Told:
    """Events of a ledger, written as a run writes them, at moments that the test names."""

    def __init__(self):
        self.events, self.now = [], 1000.0

    def add(self, event, **fields):
        self.events.append({"event": event, "time": self.now, **fields})

    def start(self, stage, arm, index=0, seed=1, lr=1e-3):
        key = f"{stage}/{arm}/{index}/{seed}" if stage == "search" else f"{stage}/{arm}/{lr}/{seed}"
        self.add(
            "suggested", cell=key, stage=stage, arm=arm, index=index, seed=seed, config={"lr": lr}, config_key=str(lr)
        )
        self.add("started", cell=key)
        return key

    def report(self, key, speed):
        self.add("report", cell=key, row={"step": 1, "val_nll": 5.0, "tokens_per_second": speed})

    def end(self, key, loss=None, outcome="completed"):
        self.add("ended", cell=key, outcome=outcome, final={} if loss is None else {"val_nll": loss}, reason=None)

    def cell(self, stage, arm, loss, seconds=10.0, outcome="completed", **where):
        key = self.start(stage, arm, **where)
        self.now += seconds
        self.end(key, loss, outcome)


def searching():
    told = Told()
    told.cell("search", "gelu", 4.0, 10.0, index=0, lr=1e-3)
    told.cell("search", "floor", 4.2, 20.0, index=0, lr=2e-3)
    told.cell("search", "gelu", 3.9, 12.0, index=1, lr=3e-3)
    told.cell("search", "floor", 4.5, 5.0, index=1, lr=4e-3, outcome="stopped_early")
    told.cell("search", "gelu", None, 2.0, index=2, lr=9e-3, outcome="infeasible")
    key = told.start("search", "floor", index=2, lr=5e-3)
    told.now += 4.0
    told.report(key, 250.0)
    return told


def counts(standing, stage, **arm):
    return [standing.count(stage, s, **arm) for s in ("completed", "running", "stopped_early", "infeasible", "failed")]


def test_counts_are_those_of_the_events():
    standing = Standing(study(), searching().events)
    assert counts(standing, "search") == [3, 1, 1, 1, 0]
    assert counts(standing, "search", arm="floor") == [1, 1, 1, 0, 0]
    assert counts(standing, "confirm") == [0] * 5
    assert (standing.ended, standing.running, standing.stage, standing.finished) == (5, 1, "search", False)


def test_the_best_of_search_is_the_lowest_loss_and_its_rate():
    standing = Standing(study(), searching().events)
    assert standing.best("search", "gelu") == Best(3.9, 3e-3, 1)
    assert standing.best("search", "floor") == Best(4.2, 2e-3, 1)  # the lower loss of a stopped trial would not count
    assert standing.best("confirm", "gelu") is None


def test_the_best_of_calibrate_is_a_mean_over_all_seeds_that_there_are():
    told = Told()
    for seed, losses in ((11, (4.0, 3.0, 3.5)), (12, (4.0, 3.8, 3.1))):
        for rate, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True):
            told.cell("calibrate", "gelu", loss, seed=seed, lr=rate)
    found = Standing(study(), told.events).best("calibrate", "gelu")
    assert found.loss == pytest.approx((3.5 + 3.1) / 2, abs=1e-12)
    assert (found.lr, found.n) == (4e-3, 2)
    one = Standing(study(), told.events[: 3 * 5 - 3]).best("calibrate", "gelu")  # a second seed only of the first rate
    assert (one.loss, one.lr, one.n) == (4.0, 1e-3, 2)


def test_confirm_gives_the_mean_and_its_number_of_seeds():
    told = Told()
    for seed, loss in ((101, 4.0), (102, 4.3)):
        told.cell("confirm", "gelu", loss, seed=seed, lr=2e-3)
    told.cell("confirm", "gelu", None, seed=103, lr=2e-3, outcome="infeasible")
    found = Standing(study(), told.events).best("confirm", "gelu")
    assert (found.loss, found.n) == (pytest.approx(4.15, abs=1e-12), 2)


def test_a_cell_that_failed_and_runs_again_is_counted_once():
    told = Told()
    key = told.start("search", "gelu")
    told.end(key, outcome="failed")
    assert counts(Standing(study(), told.events), "search") == [0, 0, 0, 0, 1]
    told.add("started", cell=key)
    assert counts(Standing(study(), told.events), "search") == [0, 1, 0, 0, 0]
    told.end(key, 4.0)
    assert counts(Standing(study(), told.events), "search") == [1, 0, 0, 0, 0]


def test_cells_that_an_earlier_run_left_do_not_run():
    standing = Standing(study(), searching().events)
    standing.only(("search/floor/2/1",))
    assert standing.running == 1
    standing.only(())
    assert (standing.running, standing.count("search", "waiting"), standing.tokens_per_second) == (0, 1, None)


def test_the_plan_is_a_range_until_it_is_decided():
    told, plan = searching(), study()
    standing = Standing(plan, told.events)
    assert standing.planned("search") == (6, 6, 6)
    least, likely, most = standing.planned("calibrate")
    assert (least, most) == (2 * 3 * 2, 2 * 5 * 2)
    assert least <= likely <= most
    assert standing.planned("confirm") == (6, 6, 6)
    told.add("grid", grid=[1e-3, 2e-3, 4e-3, 8e-3], best={})
    assert Standing(plan, told.events).planned("calibrate")[0] == 2 * 4 * 2
    told.add("chosen", arm="gelu", config={"lr": 1e-3}, config_key="k")
    assert Standing(plan, told.events).planned("calibrate") == (16, 16, 16)


def test_the_looks_of_a_sequential_rule_are_a_range():
    rule = parse(STUDY.replace("{seeds: 3}", "{rule: obrien-fleming}"), Path("x.yaml"))
    told = Told()
    assert Standing(rule).planned("confirm") == (2 * 3, 2 * 10, 2 * 10)
    for seed in range(101, 105):
        for arm in ("gelu", "floor"):
            told.cell("confirm", arm, 4.0, seed=seed)
    assert Standing(rule, told.events).planned("confirm") == (2 * 5, 2 * 10, 2 * 10)


def test_nothing_follows_a_search_that_lost_every_trial():
    told = Told()
    for index in range(3):
        for arm in ("gelu", "floor"):
            told.cell("search", arm, None, index=index, outcome="infeasible")
    standing = Standing(study(), told.events)
    assert standing.planned("confirm") == (0, 0, 0)
    assert standing.finished


def test_the_time_left_is_the_work_over_the_slots():
    told = Told()
    for index in range(3):
        told.cell("search", "gelu", 4.0, 10.0, index=index)
        told.cell("search", "floor", 4.0, 30.0, index=index)
    told.add("grid", grid=[1e-3, 2e-3, 4e-3], best={})
    told.add("chosen", arm="gelu", config={"lr": 1e-3}, config_key="k")
    plan = study()
    left = 6 * (10.0 + 30.0) + 3 * (10.0 + 30.0)  # 3 points x 2 seeds of calibrate, 3 seeds of confirm, of each arm
    for slots in (1, 2, 4):
        assert Standing(plan, told.events).seconds_left(slots, told.now) == (left / slots, left / slots)
    key = told.start("calibrate", "floor", seed=11)
    assert Standing(plan, told.events).seconds_left(1, told.now + 12.0) == (left - 12.0, left - 12.0)
    assert Standing(plan, told.events).seconds_left(10_000, told.now + 12.0)[0] == 18.0  # the running one ends later
    assert Standing(plan, told.events).seconds_left(0, told.now) is None
    told.now += 50.0  # its own stage is slower than the search was
    told.end(key, 4.0)
    slower = 5 * 50.0 + 6 * 10.0 + 3 * (10.0 + (90.0 + 50.0) / 4)
    assert Standing(plan, told.events).seconds_left(1, told.now)[0] == pytest.approx(slower)


def test_before_a_cell_has_ended_the_speed_that_is_reported_counts():
    told = Told()
    key = told.start("search", "gelu")
    assert Standing(study(), told.events).seconds_left(1, told.now) is None
    told.report(key, 409.6)  # 4,096 tokens take 10 s
    standing = Standing(study(), told.events)
    least = 10.0 * (6 + 12 + 6)
    assert (
        least <= standing.seconds_left(1, told.now)[0] <= standing.seconds_left(1, told.now)[1] == 10.0 * (6 + 20 + 6)
    )


def test_the_speed_is_that_of_all_running_cells():
    told = searching()
    assert Standing(study(), told.events).tokens_per_second == 250.0
    told.start("search", "gelu", index=7)  # has not said its speed yet, as no gelu before it
    assert Standing(study(), told.events).tokens_per_second == 500.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (1380, "23 min"), (5970, "1.7 h"), (86400 * 2, "2.0 days")],
)
def test_a_duration_is_said_in_the_unit_of_people(seconds, text):
    assert duration(seconds) == text


# --- the table -------------------------------------------------------------------------------------------------------


def shown(view, width, **console):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, **console).print(view)
    return out.getvalue().splitlines()


def words(line):
    return line.split()


def test_the_table_has_a_row_a_stage_and_an_arm():
    told = searching()
    lines = shown(
        View(Standing(study(), told.events), told.now, slots=2, lines=["Log:     here"], note="And then."), 80
    )
    assert lines[0] == "x: Is it better?"
    assert words(lines[1]) == ["stage", "done", "running", "stopped", "early", "infeasible", "of"]
    assert [words(line) for line in lines[3:6]] == [
        ["search", "3", "1", "1", "1", "6"],
        ["calibrate", "0", "0", "0", "0", "12", "to", "20"],
        ["confirm", "0", "0", "0", "0", "6"],
    ]
    assert words(lines[9]) == ["gelu", "3.9000", "lr=3.0e-03"]
    assert words(lines[10]) == ["floor", "4.2000", "lr=2.0e-03"]
    assert lines[11].startswith("250 tokens/s; about ")
    assert lines[11].endswith("; 1 running in 2 slots")
    assert lines[12:] == ["Log:     here", "And then."]


@pytest.mark.parametrize("width", [30, 40, 60, 76, 80, 120])
def test_nothing_is_wider_than_the_terminal_and_the_numbers_stay(width):
    told = searching()
    told.cell("confirm", "gelu", 3.5, seed=101, lr=2e-3)
    lines = shown(View(Standing(study(), told.events), told.now, slots=2, lines=["Log:     here"]), width)
    assert max(map(len, lines)) <= width
    assert "3.5000 lr=2.0e-03 n=1" in "\n".join(lines)
    assert any(words(line)[:5] == ["search", "3", "1", "1", "1"] for line in lines if line) or width < 40
    assert any("3.9000" in line for line in lines) == (width >= 60)


def test_a_column_of_failed_cells_appears_with_the_first_one():
    told = searching()
    told.end(told.start("search", "floor", index=3), outcome="failed")
    lines = shown(View(Standing(study(), told.events), told.now), 80)
    assert words(lines[1])[-2:] == ["failed", "of"]
    assert words(lines[3]) == ["search", "3", "1", "1", "1", "1", "6"]


def test_an_arm_that_lost_every_cell_says_so():
    told = Told()
    told.cell("search", "gelu", None, outcome="infeasible")
    assert any("none: infeasible" in line for line in shown(View(Standing(study(), told.events), told.now), 80))


def test_a_low_terminal_shows_the_arms_that_fit_and_counts_the_others():
    arms = "".join(f"  arm{i}: {{gate: tanh, alpha: 0.{i}}}\n" for i in range(1, 10))
    many = parse(STUDY.replace("search: {tri", arms + "search: {tri"), Path("x.yaml"))
    view = View(Standing(many), 0.0, lines=["Log:     here"], note="And then.", fit=True)
    for height in (18, 20, 24, 40):
        lines = shown(view, 80, height=height, force_terminal=True)
        assert len(lines) < height
        arms_shown = sum(line.startswith(("gelu", "floor", "arm")) for line in lines)
        assert arms_shown == 11 or f"and {11 - arms_shown} more arms" in lines
        assert lines[-1] == "And then."


def test_a_name_is_text_and_no_markup():
    plain = parse(STUDY.replace("Is it better?", "'[red]Is[/red] it [better?'"), Path("x.yaml"))
    assert shown(View(Standing(plain), 0.0), 80)[0] == "x: [red]Is[/red] it [better?"


# --- from the folder -------------------------------------------------------------------------------------------------


def written(folder, told, text=STUDY):
    folder.mkdir()
    (folder / "study.yaml").write_text(dump(parse(text, folder.with_suffix(".yaml"))))
    ledger = Ledger(folder / "ledger.jsonl")
    for event in told.events:
        ledger.append(**{("event" if k == "event" else k): v for k, v in event.items() if k != "time"})
    return ledger


def test_status_tells_a_study_that_runs_from_one_that_was_left(tmp_path):
    ledger = written(tmp_path / "x", searching())
    folder, plan = tmp_path / "x", study()
    assert is_held(folder / "ledger.jsonl")
    (folder / "ledger.lock").write_text("process 7 on there\n")
    beat = '{"time": %r, "driver": "process 7 on there", "slots": 3, "running": ["search/floor/2/1"]}'
    (folder / "heartbeat.json").write_text(beat % (ledger.events[-1]["time"] + 60))
    view = look(plan, folder, now=ledger.events[-1]["time"] + 63)
    assert view.note == "It runs: process 7 on there; last sign of life 3 s ago."
    assert (view.standing.running, view.slots) == (1, 3)
    ledger.close()
    assert not is_held(folder / "ledger.jsonl")
    left = look(plan, folder, now=ledger.events[-1]["time"] + 60 + 7200)
    assert left.note.startswith("Nothing runs it; last sign of life 2.0 h ago. `pagating sweep`")
    assert left.standing.running == 0


@pytest.mark.parametrize(
    "beat",
    ["", "[]", "{}", '{"time": "x"}', '{"time": 1e999, "driver": 1, "slots": 1e999, "running": []}', "[" * 10**5],
)
def test_a_damaged_heartbeat_is_none(tmp_path, beat):
    ledger = written(tmp_path / "x", searching())
    (tmp_path / "x" / "heartbeat.json").write_text(beat)
    view = look(study(), tmp_path / "x", now=ledger.events[-1]["time"])
    assert view.note == f"It runs: process {os.getpid()} on {socket.gethostname()}; last sign of life 0 s ago."
    ledger.close()


def test_the_heartbeat_of_a_killed_driver_is_not_that_of_the_next(tmp_path):
    ledger = written(tmp_path / "x", searching())
    beat = '{"time": 1.0, "driver": "process 7 on there", "slots": 3, "running": ["search/floor/2/1"]}'
    (tmp_path / "x" / "heartbeat.json").write_text(beat)
    view = look(study(), tmp_path / "x", now=ledger.events[-1]["time"] + 4)
    assert view.note == f"It runs: process {os.getpid()} on {socket.gethostname()}; last sign of life 4 s ago."
    assert (view.standing.running, view.slots) == (0, 0)
    ledger.close()


def test_a_look_does_not_keep_a_sweep_out(tmp_path):
    written(tmp_path / "x", searching()).close()
    path = tmp_path / "x" / "ledger.jsonl"
    with open(path, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, [looking, fcntl.LOCK_UN]).start()
        mine = Ledger(path)
        assert mine.events, "the sweep has the ledger and read it"
        mine.close()


def test_status_in_a_pipe_breaks_no_path_in_two(tmp_path, monkeypatch, capsys):
    from tune import cli_studies

    folder = tmp_path / ("a-long-name-" * 5) / "x"
    folder.parent.mkdir()
    written(folder, searching()).close()
    for columns, whole in ((None, True), ("60", False)):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
        cli_studies.status(str(folder))
        out = capsys.readouterr().out
        assert (f"Log:     {folder / 'logs'}" in out.splitlines()) is whole
        assert "search" in out
