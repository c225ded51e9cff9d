"""The user's own gates and activations: registered from Python, or named as `FILE.py:NAME`.

    def hard(x):
        return torch.clamp(x / 6 + 0.5, 0.0, 1.0)   # x * hard(x) is hard swish

    pagating.register_gate("hard", hard)            # then: pagating.patch(model, gate="hard", alpha=1.0)

    def snake(x):
        return x + torch.sin(x) ** 2                # an activation, not a gate

    pagating.register_unit("snake", snake)          # then: pagating.patch(model, unit="snake")

Loading a file runs it. `load_own` is called for a file that a trial names, never for one that a checkpoint names.
"""

import copy
import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .catalog import BASES, COMPETITORS, GATE_ROWS, MODULE_BASES, OWN_CODE, OWN_UNITS, own_code
from .gates import GATES, Function, Gate
from .own_check import WIDTHS, called, check_function, eager, kept_settings, one_line, plain_torch

PRECISIONS = ("float32", "bfloat16", "float16", "float64")
UNBOUNDED = 100.0  # input at which a gate that grows like an activation is told from a bounded one
_loaded: dict[tuple[str, str], str] = {}  # key and reference: digest of the source that was registered under it


def register_gate(name: str, gate: Function | Gate, precision: str = "bfloat16", far: bool = True) -> Gate:
    """Add a gate to the table `GATES` under `name`, in this process, and return its row.

    A model that is patched already keeps the gate that it has, if the name is registered again.

    Args:
        name: Name of the gate.
        gate: `g`, a function of a tensor of any shape (the unit multiplies: `x * g(x)`), or a whole row, which has the
            product in a faster form. A module is taken if it has no parameters.
        precision: A dtype that the gate is checked in besides float32, by name: one of `PRECISIONS`.
        far: Whether it must be finite at 0 and from -1000 to 1000. A gate of a model that is trained already need not.

    Raises:
        ValueError: `name` is a built-in gate, or the function cannot be trained: it changes shape, dtype, its argument
            or torch's settings, mixes tokens, draws random numbers, is not finite at -1000 to 1000, or its gradient
            is cut.
    """
    _check_name("gate", name, gate)
    if name in GATE_ROWS:
        raise ValueError(f"gate: {name!r} is a built-in gate; register yours under another name")
    if inspect.isclass(gate) or (isinstance(gate, nn.Module) and any(True for _ in gate.parameters())):
        raise ValueError(
            f"gate: {name!r} is a module or a class, whose parameters would not be trained; register a function, or "
            "the whole activation as a unit"
        )
    row = gate if isinstance(gate, Gate) else _row(gate)
    what = f"gate: {name!r}"
    for dtype, width in product(_dtypes(precision), WIDTHS):
        for function in (row.gate, row.gated) if row is gate else (row.gate,):
            check_function(what, function, width, dtype, far)
    with plain_torch(), eager(), torch.no_grad():
        x = torch.linspace(-4.0, 4.0, 24, dtype=torch.float32).reshape(1, 1, -1)  # the axes of hidden states
        if not torch.allclose(row.gated(x), x * row.gate(x), rtol=1e-4, atol=1e-5):
            raise ValueError(f"gate: {name!r}: gated(x) is not x * gate(x)")
    GATES[name] = row
    _loaded.pop(("gate", name), None)
    return row


def register_unit(name: str, activation: Any, precision: str = "bfloat16", cast: bool = True, far: bool = True) -> None:
    """Add an activation to the units that `pagating.patch(model, unit=name)` knows, in this process.

    A model that is patched already keeps the activation that it has, if the name is registered again.

    Args:
        name: Name of the unit.
        activation: A function of a tensor, a module, which is copied for each layer, or a class of modules, which is
            called for each layer: without an argument, or with the number of features if it needs one.
        precision: A dtype that the activation is checked in besides float32, by name: one of `PRECISIONS`.
        cast: Whether the parameters of a module have that dtype too, as in a model that is cast. In a study they stay
            in float32.
        far: As for `register_gate`.

    Raises:
        ValueError: `name` is a known unit, or the activation cannot be trained, as for `register_gate`; or a parameter
            of the module gets no gradient.
    """
    _check_name("unit", name, activation)
    if name in (*COMPETITORS, *BASES, *MODULE_BASES):
        raise ValueError(f"unit: {name!r} is a known unit; register yours under another name")
    what = f"unit: {name!r}"
    make = _maker(what, activation)
    for dtype, width in product(_dtypes(precision), WIDTHS):
        with plain_torch():
            made = _made(what, make, width)
            if cast and isinstance(made, nn.Module):
                made.to(dtype)
        check_function(what, made, width, dtype, far)
    OWN_UNITS[name] = make
    _loaded.pop(("unit", name), None)


def make_unit(name: str, width: int) -> Function | nn.Module:
    """Return the user's activation for one layer of `width` features. Raise ValueError if it is not registered."""
    if name not in OWN_UNITS:
        raise ValueError(f"unit: {name!r} is not one of {', '.join((*COMPETITORS, *OWN_UNITS))}")
    made: Function | nn.Module = _made(f"unit: {name!r}", OWN_UNITS[name], width)
    return made


def load_own(key: str, reference: str, precision: str = "float32", far: bool = True) -> None:
    """Register the gate or activation that `FILE.py:NAME` names, by running the file, unless it is registered already.

    Args:
        key: `gate` or `unit`.
        reference: `FILE.py:NAME`. The file may import installed packages, not the files beside it.
        precision: A dtype that it is checked in besides float32, by name.
        far: As for `register_gate`.

    Raises:
        ValueError: The file cannot be read or run or has no such name, or what it names is refused; one line.
    """
    match = OWN_CODE.fullmatch(reference)
    if not match:
        raise ValueError(f"{key}: {reference!r} is not of the form FILE.py:NAME")
    path = Path(match["file"]).expanduser()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() + precision
    except OSError as error:
        raise ValueError(f"{key}: {reference!r}: {path}: {error.strerror}") from error
    if _loaded.get((key, reference)) == digest:
        return
    module = _run(key, reference, path, digest)
    found = getattr(module, match["name"], None)
    if found is None:
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        has = f"; it defines {', '.join(own)}" if own else ""
        raise ValueError(f"{key}: {reference!r}: {path} defines no {match['name']!r}{has}")
    if not callable(found) and not isinstance(found, Gate):
        raise ValueError(f"{key}: {reference!r} is {type(found).__name__}, neither a function nor a Gate")
    if key == "gate":
        register_gate(reference, found, precision, far)
    else:
        register_unit(reference, found, precision, cast=False, far=far)
    _loaded[key, reference] = digest


def load_own_of(unit: Mapping[str, Any] | None) -> None:
    """Register the gate or activation of a trial's unit if it is named as `FILE.py:NAME`."""
    if own := own_code(unit):
        load_own(own.key, own.reference)


def grows(reference: str) -> bool:
    """Return True if a registered gate grows like its argument on both sides, as an activation such as `x + f(x)`."""
    x = torch.tensor([[[UNBOUNDED, -UNBOUNDED]]])
    with plain_torch(), eager(), torch.no_grad():
        near, far = (called(f"gate: {reference!r}", GATES[reference].gate, at).abs() for at in (x, 2 * x))
    return bool((far > 1.5 * near).any() and (near > UNBOUNDED / 4).any())


def _run(key: str, reference: str, path: Path, digest: str) -> ModuleType:
    """Run a file as a module of its own name. Raise ValueError, one line, if it fails or ends the process."""
    name = f"pagating_own_{digest[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{key}: {reference!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        with plain_torch(), kept_settings("its code"):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{key}: {reference!r} cannot be imported: {one_line(error)}{_beside(path, error)}") from error
    return module


def _beside(path: Path, error: BaseException) -> str:
    """Return advice if a file failed because it imports a file beside it; else nothing."""
    if not isinstance(error, ImportError):
        return ""
    first = (error.name or "").partition(".")[0]
    local = "relative import" in str(error) or any((path.parent / one).exists() for one in (first, f"{first}.py"))
    return f"; a study keeps {path.name} alone: put what it needs from the files beside it into it" if local else ""


def _check_name(key: str, name: Any, given: Any) -> None:
    """Raise ValueError if a gate or an activation is registered under something that is no name, or is no function."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key}: {name!r} is not a name; give the name first, then the function")
    if not callable(given) and not isinstance(given, Gate):
        raise ValueError(f"{key}: {name!r} is {type(given).__name__}, not a function")


def _dtypes(precision: str) -> list[torch.dtype]:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    return list(dict.fromkeys([torch.float32, getattr(torch, precision)]))


def _row(gate: Function) -> Gate:
    line = (-math.inf, math.inf)
    return Gate(
        gate, partial(_product, gate), getattr(gate, "__name__", repr(gate)), line, line, "own gate", "your own"
    )


def _product(gate: Function, x: torch.Tensor) -> torch.Tensor:
    return x * gate(x)


def _maker(what: str, activation: Any) -> Callable[[int], Any]:
    """Return a function of the number of features that makes the activation of one layer."""
    if isinstance(activation, Gate):
        raise ValueError(f"{what} is a Gate; a unit is a function, a module or a class of modules")
    if isinstance(activation, nn.Module):
        return lambda width: copy.deepcopy(activation)
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        if isinstance(activation, type):
            raise ValueError(f"{what} is a class that is no nn.Module; give an instance of it, or make it a module")
        return lambda width: activation
    needed = [
        parameter
        for parameter in inspect.signature(activation).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if len(needed) > 1 or any(parameter.kind is parameter.KEYWORD_ONLY for parameter in needed):
        names = ", ".join(parameter.name for parameter in needed)
        raise ValueError(f"{what} needs the arguments {names}; allowed: none, or the number of features")
    return (lambda width: activation(width)) if needed else (lambda width: activation())


def _made(what: str, make: Callable[[int], Any], width: int) -> Any:
    try:
        return make(width)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what} cannot be made for {width} features: {one_line(error)}") from error
