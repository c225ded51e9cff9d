"""Run every example of the docs, unless a comment above it says why not.

The comment is `<!-- slow -->`, `<!-- not run: WHY -->`, `<!-- exit 1 -->` (the exit code), or two of them joined by a
comma. The Python blocks of a page share their variables, and its commands share a folder.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.own_trainings import OWN
from tune.study.files import parse

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"(?:^<!-- (?P<how>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
LANGUAGES = {"python", "sh", "yaml", "json", "text"}
HOW = re.compile(r"slow|exit \d+|not run: .{10,}")


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    how: tuple[str, ...]
    line: int

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and not any(how.startswith("not run") for how in self.how)

    @property
    def exit_code(self) -> int:
        return next((int(how.removeprefix("exit ")) for how in self.how if how.startswith("exit ")), 0)


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, each with the comment above it."""
    found = []
    for match in FENCE.finditer(text):
        how = match["how"] or ""
        parts = (how,) if how.startswith("not run") else tuple(part for part in how.split(", ") if part)
        found.append(Block(match["language"], match["body"], parts, text[: match.start("body")].count("\n") + 1))
    return found


def run(block: Block, names: dict[str, object], place: Path) -> None:
    """Run one block in the folder `place`; a Python block runs in this process, with the variables `names`."""
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.body, "page", "exec"), names)
        return
    path = f"{place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", block.body]
    done = subprocess.run(
        command, cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == block.exit_code, f"line {block.line}: {block.body}\n{done.stdout}\n{done.stderr}"


def run_page(page: Path, place: Path, slow: bool) -> None:
    """Run the slow or the fast examples of a page in their order, in the folder `place`."""
    names: dict[str, object] = {}
    for block in blocks(page.read_text()):
        if block.runs and (slow or "slow" not in block.how):
            run(block, names, place)


def has(page: Path, slow: bool) -> bool:
    here = page.name != "notebook.md"  # test_notebook.py runs it
    return here and any(block.runs and ("slow" in block.how) == slow for block in blocks(page.read_text()))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if has(page, False)], ids=name_of)
def test_the_examples_of_a_page_run(page, here):
    run_page(page, here, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if has(page, True)], ids=name_of)
def test_the_long_examples_of_a_page_run(page, here):
    run_page(page, here, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_its_language_and_how_it_is_run(page):
    text = page.read_text()
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(text)), "a fence is not closed"
    for block in blocks(text):
        assert block.language in LANGUAGES, f"line {block.line}: name one of {', '.join(sorted(LANGUAGES))}"
        assert all(HOW.fullmatch(how) for how in block.how), f"line {block.line}: {block.how}"
    outside = FENCE.sub("", text)
    assert not re.search(r"(?:^|\n)\n {4}[^ -]", outside), "an indented block: fence it, and name its language"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_of_a_page_is_a_study_or_a_part_of_one(page):
    for block in blocks(page.read_text()):
        if block.language != "yaml":
            continue
        content = yaml.safe_load(block.body)
        if "question" not in content:
            rest = {
                "question": "x",
                "nuisance": {"lr": {"choice": [0.1]}},
                "arms": {"gelu": {"baseline": True}, "floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True}},
            }
            rest = OWN if page.name == "own-training.md" else rest
            arms = {**rest["arms"], **content.get("arms", {})}
            content = {**rest, **content, "arms": arms}
        parse(yaml.safe_dump(content), Path("page.yaml"))


def test_the_marks_are_read():
    text = "x\n<!-- slow, exit 1 -->\n```sh\nfalse\n```\n\n```python\na = 1\n```\n"
    text += "<!-- not run: it never ends, ever -->\n```sh\ny\n```\n"
    first, second, third = blocks(text)
    assert (first.how, first.exit_code, first.runs, first.line) == (("slow", "exit 1"), 1, True, 4)
    assert (second.language, second.body, second.how, second.runs) == ("python", "a = 1\n", (), True)
    assert not third.runs


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (Block("sh", "echo one\nfalse\necho two\n", (), 7), AssertionError),
        (Block("sh", "exit 2", ("exit 1",), 7), AssertionError),
        (Block("python", "assert 1 == 2, 'line 7'", (), 7), AssertionError),
        (Block("python", "nothing", (), 7), NameError),
    ],
)
def test_an_example_that_fails_fails(block, error, tmp_path):
    with pytest.raises(error, match=r"line 7|name 'nothing'"):
        run(block, {}, tmp_path)


def test_commands_name_what_this_interpreter_has():
    """Check that a block that calls `pagating` or `python` gets this project's."""
    assert (Path(sys.prefix) / "bin" / "pagating").exists()
