import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, Field

from tune.study.files import parse
from tune.study.own_study import OwnStudy
from tune.study.study import Study

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
PAGE = (ROOT / "docs" / "configuration.md").read_text()


def table(section):
    """Return the rows of a section's table: key, what, default, meaning."""
    body = "|" + PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0].split("\n|", 1)[1].split("\n\n")[0]
    return {cells[0].strip("`"): cells for cells in (line.strip("| ").split(" | ") for line in body.splitlines())}


def test_the_page_is_what_the_fields_say():
    assert make.page() == PAGE, "stale: run `python docs/make_configuration.py`"


@pytest.mark.parametrize("section", ["model", "fixed", "search", "calibrate", "confirm", "resources", "tokenizer"])
def test_defaults_on_the_page_are_those_of_a_study_that_says_nothing(section):
    text = "question: x\nnuisance: {lr: {choice: [0.1]}}\narms: {a: {baseline: true}, b: {}}"
    resolved = getattr(parse(text, Path("x.yaml")), section).model_dump()
    rows = table(section)
    for key, value in resolved.items():
        shown = rows[key][2]
        assert yaml.safe_load("null" if shown == "-" else shown.strip("`")) == value
    assert resolved


def test_ranges_and_choices():
    assert table("fixed")["beta1"][1] == "number in [0, 1)"
    assert table("model")["dropout"][3].startswith("dropout rate of")
    assert table("confirm")["rule"][1] == "`fixed`, `obrien-fleming`, `e-process`"
    assert table("arm")["alpha"][1] == "number or list of numbers or [alpha](#alpha)"
    assert table("fixed")["clip"][1] == "number in (0, inf)"
    assert table("The whole file")["arms"][1:3] == ["name: [arm](#arm)", "required"]


def test_every_section_has_one_table_and_every_link_one_heading():
    headings = re.findall(r"^## (.+)$", PAGE, re.M)
    assert len(headings) == len(set(headings))
    assert set(re.findall(r"\]\(#(\w+)\)", PAGE)) <= set(headings)
    every = make.sections(OwnStudy, make.sections(Study, {}))
    parts = {"The whole file", "Your own training"}
    assert {make.anchor(model) for model in every.values()} | {"distribution"} == {*headings} - parts


def test_keys_of_the_second_form_are_there():
    assert set(table("Your own training")) >= {"trial", "metric", "budget", "nuisance", "arms", "scales"}
    assert not {"corpus", "model", "fixed"} & set(table("Your own training"))
    assert set(table("ownarm")) - {"key", "---"} == {"baseline", "floor", "set", "search", "of", "budget"}
    assert table("ownarm")["set"][1] == "name: value"
    assert table("metric")["goal"][1:3] == ["`minimize`, `maximize`", "`minimize`"]


def test_a_field_without_a_description_is_refused():
    class Silent(BaseModel):
        key: int = Field(1)

    with pytest.raises(ValueError, match=r"Silent\.key has no description"):
        make.rows(Silent)
