"""Print the sub-packages of each wing, top layer first, with what each imports: `python docs/rooms.py`.

The layers are those of the import-linter contracts in pyproject.toml. The arrows come from the imports themselves,
those inside functions included. Exits with 1 if an arrow points up, or if sub-packages or files import each other in a
circle.
"""

import sys
import tomllib
from itertools import combinations
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def layers() -> dict[str, list[list[str]]]:
    """Read the layers of each wing from pyproject.toml, the top one first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return {
        contract["containers"][0]: [[name.strip(" ()") for name in layer.split("|")] for layer in contract["layers"]]
        for contract in contracts
        if contract["type"] == "layers"
    }


def arrows(wing: str, rooms: list[str]) -> dict[str, set[str]]:
    """Map each room to the rooms that its files import."""
    graph = grimp.build_graph(wing, include_external_packages=False)
    room_of = {}
    for module in graph.modules:
        name = module.removeprefix(f"{wing}.")
        room_of[module] = max((room for room in rooms if f"{name}.".startswith(f"{room}.")), key=len, default=wing)
    found: dict[str, set[str]] = {room: set() for room in [*rooms, wing]}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if room_of[imported] != room_of[module]:
                found[room_of[module]].add(room_of[imported])
    return found


def problems(order: list[list[str]], found: dict[str, set[str]]) -> list[str]:
    """List the arrows that point up, and the pairs of rooms that reach each other."""
    level = {room: number for number, layer in enumerate(order) for room in layer}
    said = [
        f"{room} -> {to} points up" for room in level for to in found[room] if to in level and level[to] < level[room]
    ]
    reach = {room: _reached(room, found) for room in level}
    return said + [f"{a} <-> {b}: a circle" for a, b in combinations(level, 2) if b in reach[a] and a in reach[b]]


def file_cycles(wing: str) -> list[str]:
    """List the files that import each other in a circle, imports inside functions included."""
    graph = grimp.build_graph(wing, include_external_packages=False)
    found = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    reach = {module: _reached(module, found) for module in found}
    return [f"{a} <-> {b}: a circle" for a, b in combinations(sorted(found), 2) if b in reach[a] and a in reach[b]]


def _reached(room: str, found: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [room]
    while waiting:
        for to in found[waiting.pop()] - seen:
            seen.add(to)
            waiting.append(to)
    return seen


def main() -> int:
    """Print every wing; the exit code."""
    wrong = []
    for wing, order in layers().items():
        rooms = [room for layer in order for room in layer]
        found = arrows(wing, rooms)
        print(f"{wing}/")
        for number, layer in enumerate(order):
            for room in layer:
                folder = ROOT / wing / room.replace(".", "/")
                files = (
                    len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) if folder.is_dir() else 1
                )
                to = " ".join(sorted(found[room] & set(rooms), key=rooms.index)) or "nothing of this wing"
                print(f"  {len(order) - number:2} {room:12} {files:2} file{'s' if files > 1 else ' '}  -> {to}")
        wrong += [f"{wing}: {line}" for line in problems(order, found)] + file_cycles(wing)
    print("\n".join(wrong) or "No cycle, no upward arrow.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
