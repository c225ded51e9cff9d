"""Check the layers of the wings that `python docs/rooms.py` prints."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_arrow_points_up_and_no_circle(capsys):
    assert script().main() == 0
    said = capsys.readouterr().out
    assert said.endswith("No cycle, no upward arrow.\n")
    for room in ("backend", "verdict", "gating"):
        assert f" {room} " in said


def test_an_upward_arrow_and_a_circle_are_found():
    found = {"top": {"middle"}, "middle": {"bottom"}, "bottom": {"middle"}}
    assert script().problems([["top"], ["middle"], ["bottom"]], found) == [
        "bottom -> middle points up",
        "middle <-> bottom: a circle",
    ]


def test_no_folder_holds_more_than_sixteen_files():
    folders = {path.parent for wing in ("pagating", "tune", "analysis") for path in (ROOT / wing).rglob("*.py")}
    counts = {folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders}
    assert max(counts.values()) <= 16, max(counts, key=counts.get)
