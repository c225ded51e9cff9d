"""Write docs/configuration.md from the fields of the study file.

    python docs/make_configuration.py [FILE]

Each key has the type, range, default and description that `tune.study.sections` and `tune.study.study` state.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pagating.model.size import PRESETS
from tune.study.own_study import OwnStudy
from tune.study.sections import Distribution, OneOf, RungSection
from tune.study.study import Study

PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false"}
HEAD = """# The study file

`python docs/make_configuration.py` writes this page from the fields that the program checks; `make docs` runs it.

A study is one YAML file with the values that differ from the defaults. An unknown key is an error that names the
nearest known one. Paths are relative to the study file; of a link, to the file that it names; of standard input, to the
working directory. A key is text as it is written, so `yes` and `1` are names of arms. Anchors and merge keys (`<<`) are
read, and a key at the top that starts with `x-` only holds a value for an anchor. JSON is read too. The shipped studies
are in `configs/`. A sweep writes all values, with the defaults, to `studies/NAME/study.yaml`.
"""
OWN = """A study with `trial:` trains [your own function or command](own-training.md) in place of the built-in model. It
has these keys, and those of the whole file without `corpus`, `tokenizer`, `task`, `model` and `fixed`. `keep` has no
models."""
ABOUT = {"Distribution": "The values of a hyperparameter that is searched: exactly one of these keys."}


def anchor(model: type[BaseModel]) -> str:
    """Return the name of a section's heading, which is also its anchor."""
    return model.__name__.removesuffix("Section").lower()


def kind(annotation: Any) -> str:
    """Return what a key may hold, in words; a section is a link."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{anchor(annotation)}](#{anchor(annotation)})"
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return names(inside) or kind(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if {bool, float, str} <= set(inside):
        return "value"
    if origin in (Union, UnionType):
        return " or ".join(kind(branch) for branch in inside if branch is not type(None))
    if origin is list:
        return f"list of {kind(inside[0]).removesuffix('s')}s"
    if origin is dict:
        key = "name" if inside[0] is str else kind(inside[0])
        return f"{key}: {kind(inside[1])}"
    return PLAIN[annotation]


def names(metadata: Iterable[Any]) -> str:
    """The names that a text may be, empty if it may be any."""
    return next((", ".join(f"`{name}`" for name in limit.names) for limit in metadata if isinstance(limit, OneOf)), "")


def allowed(field: FieldInfo) -> str:
    """Return the range of a field, empty if it has no limits."""
    low, high, is_list = "", "", get_origin(field.annotation) is list
    for limit in field.metadata:
        if isinstance(limit, limits.Ge):
            low = f"[{_number(limit.ge)}"
        elif isinstance(limit, limits.Gt):
            low = f"({_number(limit.gt)}"
        elif isinstance(limit, limits.Le):
            high = f"{_number(limit.le)}]"
        elif isinstance(limit, limits.Lt):
            high = f"{_number(limit.lt)})"
        elif isinstance(limit, limits.MaxLen):
            return f"at most {limit.max_length} {'entries' if is_list else 'letters'}"
    return f"in {low or '(-inf'}, {high or 'inf)'}" if low or high else ""


def _number(value: Any) -> str:
    return f"{value:,}".replace(",", "_") if isinstance(value, int) else f"{value:g}"


def default(field: FieldInfo) -> str:
    """Return the default as it is written in a study file; `-` if the key is optional and has none."""
    if field.is_required():
        return "the file's name" if field is Study.model_fields["name"] else "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{_number(value)}`" if isinstance(value, int | float) else f"`{value}`"


def rows(model: type[BaseModel], besides: type[BaseModel] | None = None) -> list[str]:
    """Return the table of a section's keys, without those that are equal in `besides`."""
    lines = ["| key | what | default | meaning |", "| --- | --- | --- | --- |"]
    fields = RungSection.model_fields if issubclass(model, RungSection) else model.model_fields  # the rest is above
    for name, field in fields.items():
        if field.exclude or (besides and repr(besides.model_fields.get(name)) == repr(field)):
            continue
        if not field.description:
            raise ValueError(f"{model.__name__}.{name} has no description")
        what = " ".join(part for part in (names(field.metadata) or kind(field.annotation), allowed(field)) if part)
        lines.append(f"| `{name}` | {what} | {default(field)} | {field.description} |")
    return lines


def sections(model: type[BaseModel], found: dict[str, type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """Return every section below a model once, depth first, in the order of the file."""
    for field in model.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            annotation = waiting.pop(0)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not Distribution:
                if annotation.__name__ not in found:
                    found[annotation.__name__] = annotation
                    sections(annotation, found)
            else:
                waiting += get_args(annotation)
    return found


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, "## The whole file", "", *rows(Study)]
    built_in = {**sections(Study, {}), "Distribution": Distribution}
    for name, model in sections(OwnStudy, dict(built_in)).items():
        if name not in built_in and "## Your own training" not in lines:
            lines += ["", "## Your own training", "", OWN, "", *rows(OwnStudy, Study)]
        about = ABOUT.get(name, " ".join((model.__doc__ or "").split()))
        lines += ["", f"## {anchor(model)}", "", about, "", *rows(model)]
        if name == "ModelSection":
            lines += ["", "| preset | " + " | ".join(next(iter(PRESETS.values()))) + " |", "| --- |" + " ---: |" * 4]
            lines += [
                f"| `{preset}` | " + " | ".join(map(str, sizes.values())) + " |" for preset, sizes in PRESETS.items()
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "configuration.md"
    target.write_text(page(), encoding="utf-8")
