"""The user's own gates: registered from Python, or named as `FILE.py:NAME`.

    def hard(x):
        return torch.clamp(x / 6 + 0.5, 0.0, 1.0)   # x * hard(x) is hard swish

    pagating.register_gate("hard", hard)            # then: pagating.patch(model, gate="hard", alpha=1.0)

Loading a file runs it. `load_gate` is called for a file that a trial names, never for one that a checkpoint names.
"""

import hashlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .catalog import GATE_ROWS, OWN_GATE, own_gate
from .gates import GATES, Function, Gate

_loaded: dict[str, str] = {}  # reference: digest of the source that was registered under it
# errors of a gate's file or function that are its own fault
_FAULTS = (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, RuntimeError, LookupError)


def register_gate(name: str, gate: Function | Gate) -> Gate:
    """Add a gate to the table `GATES` under `name`, in this process, and return its row.

    `gate` is `g`, a function of a tensor of any shape (the unit multiplies: `x * g(x)`), or a whole row, which has the
    product in a faster form. Raises ValueError if `name` is a built-in gate, or if `x * g(x)` changes shape or dtype,
    mixes tokens, draws random numbers, is not finite or has no finite gradient.
    """
    if name in GATE_ROWS:
        raise ValueError(f"gate: {name!r} is a built-in gate; register yours under another name")
    if isinstance(gate, nn.Module):
        raise ValueError(f"gate: {name!r} is a module, whose parameters would not be trained; register a function")
    row = gate if isinstance(gate, Gate) else _row(gate)
    _check(name, row)
    GATES[name] = row
    return row


def load_gate(reference: str) -> None:
    """Register the gate that `FILE.py:NAME` names, by running the file, unless it is registered already.

    The file may import installed packages, not the files beside it. Raises ValueError, one line, if it cannot be read
    or run, has no such name, or `register_gate` refuses the gate.
    """
    match = OWN_GATE.fullmatch(reference)
    if not match:
        raise ValueError(f"gate: {reference!r} is not of the form FILE.py:NAME")
    path = Path(match["file"])
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"gate: {reference!r}: {path}: {error.strerror}") from error
    if _loaded.get(reference) == digest:
        return
    spec = importlib.util.spec_from_file_location(f"pagating_own_{digest[:12]}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"gate: {reference!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except _FAULTS as error:
        raise ValueError(f"gate: {reference!r} cannot be imported: {_one_line(error)}") from error
    found = getattr(module, match["name"], None)
    if found is None:
        raise ValueError(f"gate: {reference!r}: {path} defines no {match['name']!r}")
    if not callable(found) and not isinstance(found, Gate):
        raise ValueError(f"gate: {reference!r} is {type(found).__name__}, neither a function nor a Gate")
    register_gate(reference, found)
    _loaded[reference] = digest


def load_gate_of(unit: Mapping[str, Any] | None) -> None:
    """Register the gate of a trial's unit if it is named as `FILE.py:NAME`."""
    if match := own_gate(unit):
        load_gate(match[0])


def _row(gate: Function) -> Gate:
    line = (-math.inf, math.inf)
    return Gate(gate, lambda x: x * gate(x), getattr(gate, "__name__", repr(gate)), line, line, "own gate", "your own")


def _check(name: str, row: Gate) -> None:
    """Raise ValueError if the row is no gate. Axes of the probe: B batch, T tokens, F features."""
    x_BTF = torch.linspace(-4.0, 4.0, 24).reshape(2, 3, 4).requires_grad_()
    try:
        y_BTF, gate_BTF = row.gated(x_BTF), row.gate(x_BTF)
        alone_BTF = row.gated(x_BTF[:1, :1])
    except _FAULTS as error:
        raise ValueError(f"gate: {name!r} fails on a tensor of shape (2, 3, 4): {_one_line(error)}") from error
    for given in (y_BTF, gate_BTF):
        if not isinstance(given, Tensor) or given.shape != x_BTF.shape or given.dtype != x_BTF.dtype:
            shown = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"gate: {name!r} makes {shown} of (2, 3, 4) torch.float32; a gate keeps shape and dtype")
    if not torch.isfinite(y_BTF).all():
        raise ValueError(f"gate: {name!r} is not finite between -4 and 4")
    if not torch.allclose(alone_BTF, y_BTF[:1, :1], rtol=1e-4, atol=1e-5):
        raise ValueError(f"gate: {name!r} mixes tokens or draws random numbers: a token alone gives another value")
    if not torch.allclose(y_BTF, x_BTF * gate_BTF, rtol=1e-4, atol=1e-5):
        raise ValueError(f"gate: {name!r}: gated(x) is not x * gate(x)")
    if not y_BTF.requires_grad:
        raise ValueError(f"gate: {name!r} has no gradient; write it in torch operations on its argument")
    (slope_BTF,) = torch.autograd.grad(y_BTF.sum(), x_BTF)
    if not torch.isfinite(slope_BTF).all():
        raise ValueError(f"gate: {name!r}: its gradient is not finite between -4 and 4")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
