"""Test of the script for a GPU, at tiny sizes on this machine's processor."""

import json

import gpu_check
import pytest


def test_every_measurement_has_its_line(tmp_path, capsys):
    words = ["--tiny", "--device", "cpu", "--peak", "1", "--parts", "turn,pack,goal,wait,small"]
    assert gpu_check.main([*words, "--output", str(tmp_path / "lines")]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "lines").read_text() == out
    card, *lines = map(json.loads, out.splitlines())
    assert (card["card"], card["peak_tflops"]) == ("CPU", 1.0)
    assert [line["part"] for line in lines] == ["turn"] * 2 + ["pack"] * 3 + ["goal"] * 2 + ["small"]
    assert [line.get("trials") for line in lines[2:7]] == [2, 3, 3, 1, 2]
    for line in lines[2:]:
        tokens = line.get("trials", 1) * {"pack": 64, "goal": 32, "small": 128}[line["part"]]
        assert line["tokens_per_second"] * line["ms"] / 1e3 == pytest.approx(tokens, rel=1e-2)
        assert 0 <= line["utilisation"] < 1  # it is rounded, and a busy processor is slow


def test_a_measurement_that_does_not_fit_says_so():
    def full():
        raise MemoryError("cannot allocate 8000000000 bytes")

    line = gpu_check.measured(full, "pack")
    assert line["problem"].startswith("out of memory: 7.45 GiB more could not be had")
