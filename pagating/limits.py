"""Checks of numbers and keys that a user gives. The limits of each key are written once, beside its default.

Limits are a mapping with the keys of pydantic's `Field`: `ge`, `gt`, `le`, `lt`. A study file reads the same ones.
Imports no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

Limits = Mapping[str, Any]


def interval(limits: Limits) -> str:
    """Return limits as an interval, such as `[0, 1)`."""
    low = f"[{_shown(limits['ge'])}" if "ge" in limits else f"({_shown(limits.get('gt', -math.inf))}"
    high = f"{_shown(limits['le'])}]" if "le" in limits else f"{_shown(limits.get('lt', math.inf))})"
    return f"{low}, {high}"


def _shown(number: float) -> str:
    if isinstance(number, int) and number >= 10**6 and number == 10 ** (len(str(number)) - 1):
        return f"10^{len(str(number)) - 1}"
    return f"{number:_}" if isinstance(number, int) else f"{number:g}"


def check_number(name: str, value: Any, limits: Limits, whole: bool = False) -> None:
    """Raise ValueError if a value is not a finite number within limits.

    Args:
        name: Key of the value, for the message.
        value: The value. A truth value is not a number.
        limits: Its limits.
        whole: Whether it must be an integer.
    """
    right = isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and math.isfinite(value)
    low = limits.get("ge", limits.get("gt", -math.inf))
    high = limits.get("le", limits.get("lt", math.inf))
    inside = right and low <= value <= high and not (value == low and "gt" in limits)
    if not inside or (value == high and "lt" in limits):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name}={value!r} is not {kind} in {interval(limits)}")


def check_keys(where: str, given: Any, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raise ValueError if `given` is no mapping, or has an unknown key or lacks a required one.

    Args:
        where: Start of the message, empty or with a colon at its end.
        given: The mapping.
        known: Its keys.
        required: Those that must be there.
    """
    known = list(known)
    start = f"{where} " if where else ""
    if not isinstance(given, Mapping):
        raise ValueError(f"{start}{given!r} is not a mapping; its keys are {', '.join(known)}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"{start}unknown key {key!r}; did you mean {near[0]!r}? allowed: {', '.join(known)}")
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"{start}missing: {', '.join(missing)}")
