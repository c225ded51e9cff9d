"""Describe an error of a study file in one line: file, key, value and what is allowed."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from analysis.io.text import one_line


def _branches(annotation: Any) -> list[Any]:
    """Return the alternatives of a union; a list of the annotation alone if it is no union."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _inside(annotation: Any, key: Any) -> Any:
    """Return the annotation of the value under `key`; the same annotation if `key` names a branch of a union."""
    for branch in _branches(annotation):
        if isinstance(branch, type) and issubclass(branch, BaseModel) and key in branch.model_fields:
            return branch.model_fields[key].annotation
        if get_origin(branch) is dict:
            return get_args(branch)[1]
        if get_origin(branch) is list and isinstance(key, int):
            return get_args(branch)[0]
    return annotation


def _known_keys(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """Return the keys that are allowed in the place of the last element of a pydantic error location."""
    node: Any = root
    for part in location[:-1]:
        node = _inside(node, part)
    for branch in _branches(node):
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            return _keys(branch)
    return []


def _keys(model: type[BaseModel]) -> list[str]:
    """Return the keys of a section that a file may have."""
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _elsewhere(key: str, root: type[BaseModel]) -> str:
    """Return a hint that names the parts of the file which have a key; "" if none has it."""
    found = ["at the top of the file"] if key in _keys(root) else []
    for section in _keys(root):
        for branch in _branches(root.model_fields[section].annotation):
            each = get_origin(branch) is dict
            model = get_args(branch)[1] if each else branch
            if isinstance(model, type) and issubclass(model, BaseModel) and key in _keys(model):
                found.append(f"of each of {section}" if each else f"of {section}")
    return f"{key} is a key {' and '.join(found)}; " if found else ""


def _is_key(part: str | int) -> bool:
    """Return True if a part of pydantic's location is a key or an index, False if it is a branch of a union."""
    if isinstance(part, int):
        return True
    branch = part in ("float", "list[float]", "str", "int", "[key]") or part.startswith("function-")
    return not (branch or part[:1].isupper())


def _advice(kind: str, value: Any) -> str:
    """Return what to write instead of a value that YAML reads as another type than the one that is meant."""
    if kind in ("string_type", "literal_error") and isinstance(value, bool | int | float):
        read = f"{value}".lower() if isinstance(value, bool) else "a number"
        return f"; YAML reads it as {read}: put text in quotes"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in ("float_type", "int_type") and isinstance(value, str) and _is_number(value):
        return "; it is text: write the number without quotes, with a decimal point and no spaces"
    return ""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.,_' ]*\d(e[-+]?\d+)?", text.strip(), re.IGNORECASE) is not None


def explain(error: ValidationError, path: Path, root: type[BaseModel]) -> str:
    """Return the most telling error of a file as one line. `root` is the model of the whole file."""
    # for a union, report the branch that fits the input's type: the others only say "not a number"
    other = ("float_type", "int_type", "string_type", "list_type", "model_type")
    problem = min(
        error.errors(),
        key=lambda item: (
            item["type"] != "extra_forbidden",
            item["type"] in other and isinstance(item["input"], dict | list),
        ),
    )
    unknown = problem["loc"][-1:] if problem["type"] == "extra_forbidden" else ()  # as the user wrote it
    location = (*filter(_is_key, problem["loc"][: -1 if unknown else None]), *unknown)
    key = one_line(".".join(str(part) for part in location), 200) or "the file"
    key = re.sub(r"^scales\.(\d+)", lambda found: f"scales: rung {int(found[1]) + 1}", key)
    value = problem["input"]
    shown = one_line(repr(value), 100)
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = _known_keys(tuple(problem["loc"]), root)
        close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = _elsewhere(str(location[-1]), root) or (f"did you mean '{close[0]}'? " if close else "")
        return f"{path}: unknown key '{key}'; {hint}allowed: {', '.join(known)}"
    if kind == "missing":
        return f"{path}: key '{key}' is missing"
    message = re.sub(r"dictionary( or instance of \w+)?", "mapping", problem["msg"].removeprefix("Value error, "))
    if kind == "value_error":
        return f"{path}: {key}: {one_line(message)}"
    if value is None:
        empty = "write {} or leave it out" if "mapping" in message else "give it a value, or leave the key out"
        return f"{path}: {key}: is empty; {empty}"
    message += _advice(kind, value)
    return f"{path}: {key}: {shown} is not allowed: {message[:1].lower() + message[1:]}"
